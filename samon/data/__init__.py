"""Data: shards and folders as streams that lose nothing, and the loader that feeds a device from them."""

from samon.data.corrupt import (
    CorruptSampleCounter,
    DataError,
    ImageError,
    ImageTooLargeError,
    LabelError,
    SampleError,
    ShardError,
)
from samon.data.in_memory import InMemoryLoader, create_in_memory_loader
from samon.data.loader import Loader, create_dataset, create_loader

__all__ = [
    "CorruptSampleCounter",
    "DataError",
    "ImageError",
    "ImageTooLargeError",
    "InMemoryLoader",
    "LabelError",
    "Loader",
    "SampleError",
    "ShardError",
    "create_dataset",
    "create_in_memory_loader",
    "create_loader",
]
