"""Streaming is our own reader on top of webdataset's tar and URL parts, because a `wds.WebDataset` pipeline cannot give
equal batches on every rank, each validation sample exactly once, and a resume at the exact next sample.

- `urls`: opening local and remote files; `shards`: reading chosen samples of a shard;
- `sources`: samples by number, for every kind of `--dataset`, which `source_factory` opens; `images` finds image
  files; `classes` decides labels;
- `sharding`: which samples a loader worker reads, in which order; `stream` reads them;
- `decode`, `transforms`: from bytes to augmented tensors;
- `loader`, `in_memory`: batches on the device;
- `corrupt`: errors in samples, which are counted.
"""

from samon.data.corrupt import CorruptSampleCounter, DataError, SampleError
from samon.data.in_memory import InMemoryLoader, create_in_memory_loader
from samon.data.loader import Loader, create_dataset, create_loader

__all__ = [
    "CorruptSampleCounter",
    "DataError",
    "InMemoryLoader",
    "Loader",
    "SampleError",
    "create_dataset",
    "create_in_memory_loader",
    "create_loader",
]
