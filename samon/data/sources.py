"""Sources of samples for training and evaluation: samples by number, for every kind of `--dataset`."""

import bisect
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, groupby, product
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers.targets import get_field

from samon.data import shards
from samon.data.classes import LabelMap
from samon.data.corrupt import SampleError
from samon.data.images import ImageEntry
from samon.data.shards import RawSample, SampleOrError
from samon.errors import UserError, error_line, nearest

Extents = Sequence[tuple[str, range]]  # locations and which of their samples a split has


def find_overlap(first: Extents, second: Extents) -> str:
    """Return a location from which both have samples, or ''; a folder inside another one belongs to it."""
    for (one, a), (other, b) in product(first, second):
        inside = one.startswith(f"{other}/") or other.startswith(f"{one}/")
        if inside or (one == other and max(a.start, b.start) < min(a.stop, b.stop)):
            return max(one, other)
    return ""


def parse_split(text: str) -> tuple[str, slice]:
    """Return the split's name and the part of it: `train[:45000]` is ('train', slice(None, 45000))."""
    match = re.fullmatch(r"([^\[\]]*)(?:\[(\d*):(\d*)\])?", text)
    if match is None:
        raise UserError(f"unknown split {text!r}; a part is written as train[:45000] or train[45000:]")
    name, *ends = match.groups()
    return name, slice(*(int(end) if end else None for end in ends))


def _part_range(size: int, part: slice, location: str) -> range:
    """Return the indices of a part of `size` samples; an empty one is an error."""
    indices = range(size)[part]
    if not indices:
        raise UserError(f"the part of {location} is empty, it has {size} images")
    return indices


class Source:
    """Samples by number, as stored: encoded bytes (or a PIL image) and the label.

    `class_names` are in the order of the labels; they and `num_classes` are None if unknown.
    """

    class_names: list[str] | None = None
    num_classes: int | None = None
    location: str = ""  # for messages
    extents: Extents = ()
    label_map: LabelMap | None = None  # stored label -> label, None if they are the same
    class_map_digest: str = ""  # of the labels that a class map gives

    def __len__(self) -> int:
        raise NotImplementedError

    def where(self, index: int) -> str:
        """Return the name of a sample for messages."""
        raise NotImplementedError

    def read_one(self, index: int) -> tuple[bytes | Image.Image, object]:
        """Return a sample's image and stored label; may raise anything."""
        raise NotImplementedError

    def read(self, indices: Sequence[int]) -> list[SampleOrError]:
        """Return the samples in the order of `indices`; the error in place of an unreadable one."""
        samples: list[SampleOrError] = []
        for index in indices:
            where = self.where(index)
            try:
                samples.append(self.relabeled(RawSample(where, *self.read_one(index))))
            except Exception as error:  # libraries raise anything on damaged samples
                samples.append(SampleError(f"{where}: {type(error).__name__}: {error_line(error)}"))
        return samples

    def relabeled(self, sample: SampleOrError) -> SampleOrError:
        """Return a sample with the label that `label_map` has for its stored one; the error if it has none."""
        if self.label_map is None or isinstance(sample, SampleError):
            return sample
        try:
            return sample._replace(label=self.label_map[sample.label])
        except (KeyError, TypeError):  # TypeError: a label that cannot be a key, such as a list
            return SampleError(f"{sample.where}: label {sample.label!r:.40} is not in the class map")

    def relabel(self, label_map: LabelMap, names: list[str] | None, num_classes: int) -> None:
        """Replace each label by what `label_map` has for it; `names` are the classes in the new order."""
        if self.label_map is not None:
            pairs = self.label_map.items()
            label_map = {stored: label_map[label] for stored, label in pairs if label in label_map}
        self.label_map, self.class_names, self.num_classes = label_map, names, num_classes

    def renumber(self, names: Sequence[str]) -> None:
        """Number the labels as the trained classes `names`; UserError if a class is not among them."""
        labels = {name: label for label, name in enumerate(names)}
        own = self.class_names or []
        if unknown := [name for name in own if name not in labels]:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            hint = nearest(unknown[0], names)
            raise UserError(f"{self.location}: class {unknown[0]!r}{more} is not among the {len(names)} trained{hint}")
        self.relabel({label: labels[name] for label, name in enumerate(own)}, list(names), len(names))

    def set_classes(self, labels: dict[str, int]) -> None:
        """Set class names and their number from {name: label}; of several names for one label, the first counts."""
        names = {label: str(name) for name, label in reversed(labels.items())}
        if names:
            self.num_classes = max(names) + 1
            self.class_names = [names[k] for k in range(len(names))] if len(names) == self.num_classes else None


class ShardSource(Source):
    """WebDataset shards; streams read them from front to back with `read_shard`, `read` scans for a few samples."""

    def __init__(self, shard_set: shards.ShardSet, reader: shards.ShardReader) -> None:
        self.shards, self.reader = shard_set, reader
        self.ends = list(accumulate(shard_set.lengths))
        self.class_names, self.num_classes = shard_set.class_names, shard_set.num_classes
        urls = shard_set.urls
        self.location = ", ".join(urls) if len(urls) < 3 else f"{urls[0]} to {urls[-1]}"
        self.extents = [(url, range(length)) for url, length in zip(urls, shard_set.lengths, strict=True)]

    def __len__(self) -> int:
        return self.ends[-1]

    def read_shard(self, shard: int, wanted: Sequence[int]) -> Iterator[tuple[int, SampleOrError]]:
        """Yield (position in the shard, sample) for each of the wanted positions, ascending."""
        for position, sample in self.reader.read(self.shards.urls[shard], self.shards.lengths[shard], wanted):
            yield position, self.relabeled(sample)

    def read(self, indices: Sequence[int]) -> list[SampleOrError]:
        """Return the samples, in one pass over each shard that contains some of them."""
        samples: dict[int, SampleOrError] = {}
        for shard, group in groupby(sorted(set(indices)), lambda index: bisect.bisect_right(self.ends, index)):
            first = self.ends[shard] - self.shards.lengths[shard]
            for position, sample in self.read_shard(shard, [index - first for index in group]):
                samples[first + position] = sample
        return [samples[index] for index in indices]


class FileSource(Source):
    """A part of image files, each with the number of its class.

    The part counts images round-robin over the classes, so the numbers of images per class differ by at most one.
    """

    def __init__(self, entries: Sequence[ImageEntry], labels: Sequence[int], location: str, part: slice) -> None:
        turns: defaultdict[int, Iterator[int]] = defaultdict(count)
        order = sorted((next(turns[label]), index) for index, label in enumerate(labels))
        chosen = _part_range(len(entries), part, location)
        indices = sorted(index for _, index in order[chosen.start : chosen.stop])
        self.entries, self.labels = [entries[i] for i in indices], [labels[i] for i in indices]
        self.location, self.extents = location, [(location, chosen)]

    def __len__(self) -> int:
        return len(self.entries)

    def where(self, index: int) -> str:
        return self.entries[index].where

    def read_one(self, index: int) -> tuple[bytes, int]:
        return self.entries[index].read(), self.labels[index]

    def relabel(self, label_map: LabelMap, names: list[str] | None, num_classes: int) -> None:
        """Leave out the files of classes that the map does not have, as timm does."""
        pairs = [(e, label_map[k]) for e, k in zip(self.entries, self.labels, strict=True) if k in label_map]
        self.entries, self.labels = [entry for entry, _ in pairs], [label for _, label in pairs]
        self.class_names, self.num_classes = names, num_classes


class PairSource(Source):
    """A part of a map-style data set of (image, label): torchvision's, or one of arrays."""

    def __init__(self, pairs: Any, part: slice, location: str) -> None:
        self.pairs, self.location = pairs, location
        self.indices = _part_range(len(pairs), part, location)
        self.extents = [(location, self.indices)]
        self.set_classes(getattr(pairs, "class_to_idx", None) or {})

    def __len__(self) -> int:
        return len(self.indices)

    def where(self, index: int) -> str:
        return f"{self.location} sample {self.indices[index]}"

    def read_one(self, index: int) -> tuple[bytes | Image.Image, object]:
        image, label = self.pairs[self.indices[index]]
        return image, label

    def arrays(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return images [N, H, W, C] and stored labels [N] if the data set stores them as arrays, like CIFAR."""
        images, part = getattr(self.pairs, "data", None), slice(self.indices.start, self.indices.stop)
        return (images[part], np.asarray(self.pairs.targets)[part]) if isinstance(images, np.ndarray) else None


@dataclass
class ArrayDataset:
    """Images [N, H, W, C] in memory, the arrays named as in torchvision's CIFAR."""

    data: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), int(self.targets[index])


class HubSource(PairSource):
    """A Hugging Face data set: its images are not decoded, its labels are a column of classes, text or integers."""

    def __init__(self, dataset: Any, image_key: str, label_key: str, location: str) -> None:
        super().__init__(dataset, slice(None), location)
        self.image_key, self.label_key = image_key, label_key

    def read_one(self, index: int) -> tuple[bytes, object]:
        """Return the file's bytes, from the data set itself or from the path that it stores, and the label."""
        row = self.pairs[index]
        image, label = row[self.image_key], get_field(row, self.label_key)
        if image is None or label is None:
            raise ValueError(f"{self.image_key if image is None else self.label_key} is missing")
        return image["bytes"] or ImageEntry(image["path"]).read(), label
