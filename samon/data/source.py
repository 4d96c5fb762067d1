"""What a data set is to the rest of the program: samples by number, encoded, with labels that can be numbered anew."""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

import numpy as np
from timm.data.readers.targets import get_field

from samon.data.classes import class_order, map_label, renumbering
from samon.data.corrupt import ImageError, LabelError, SampleError
from samon.data.folders import Item
from samon.data.shards import Record, ShardReader, ShardSet
from samon.data.splits import Extent, part_of


class Source:
    """Samples by number, as they lie: encoded bytes (a PIL image where there are no files) and the label.

    `class_names` are in the order of the labels; they and `num_classes` are None where nothing says.
    """

    class_names: list[str] | None = None
    num_classes: int | None = None
    place: str = ""  # what the samples are, for messages
    extents: Sequence[Extent] = ()  # where they lie: splits whose extents overlap share samples
    label_map: Mapping[Any, int] | None = None  # stored label -> label, None if they are the same

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, indices: Sequence[int]) -> list[Record | SampleError]:
        """The samples in the order asked for; the error in place of one that cannot be read."""
        return [self._guarded(index) for index in indices]

    def read_one(self, index: int) -> Record:
        """One sample with its stored label; whatever it raises becomes the error in place of the sample."""
        raise NotImplementedError

    def _guarded(self, index: int) -> Record | SampleError:
        try:
            record = self.read_one(index)
            return record._replace(label=map_label(self.label_map, record.label, record.where))
        except SampleError as error:
            return error
        except Exception as error:  # libraries raise anything on damaged samples
            return ImageError(f"{self.place} sample {index}: {type(error).__name__}: {' '.join(str(error).split())}")

    def relabel(self, label_map: Mapping[Any, int], names: list[str] | None, num_classes: int) -> None:
        """Replace each label by what `label_map` has for it; `names` are the classes in the new order."""
        before = self.label_map
        self.label_map = dict(label_map) if before is None else _chained(before, label_map)
        self.class_names, self.num_classes = names, num_classes

    def renumber(self, names: Sequence[str]) -> None:
        """Number the labels as the classes `names`, which hold all of `class_names`.

        Raises:
            UserError: a class is not among them, or the classes of this source have no names.
        """
        self.relabel(renumbering(self.class_names, names, self.place), list(names), len(names))

    def take_classes(self, labels: Mapping[str, int] | None) -> None:
        """Set class names and their number from {name: label}; of several names for one label, the first counts."""
        names: dict[int, str] = {}
        for name, label in (labels or {}).items():
            names.setdefault(label, str(name))
        if names:
            self.num_classes = max(names) + 1
            self.class_names = [names[k] for k in range(len(names))] if len(names) == self.num_classes else None


def _chained(first: Mapping[Any, int], second: Mapping[Any, int]) -> dict[Any, int]:
    return {stored: second[label] for stored, label in first.items() if label in second}


class ShardSource(Source):
    """WebDataset shards; streams read `shards` with `reader` from front to back, `read` scans for a few samples."""

    def __init__(self, shards: ShardSet, reader: ShardReader) -> None:
        self.shards, self.reader = shards, reader
        self.ends = list(accumulate(shards.lengths))
        self.class_names, self.num_classes = shards.class_names, shards.num_classes
        self.place = ", ".join(shards.urls) if len(shards.urls) < 3 else f"{shards.urls[0]} to {shards.urls[-1]}"
        self.extents = [Extent(url, 0, length) for url, length in zip(shards.urls, shards.lengths, strict=True)]

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, indices: Sequence[int]) -> list[Record | SampleError]:
        """One pass over each shard that holds some of them."""
        found: dict[int, Record | SampleError] = {}
        for shard, group in groupby(sorted(set(indices)), lambda index: bisect.bisect_right(self.ends, index)):
            length = self.shards.lengths[shard]
            first = self.ends[shard] - length
            for position, record in self.reader.read(self.shards.urls[shard], length, [i - first for i in group]):
                found[first + position] = record
        return [found[index] for index in indices]

    def relabel(self, label_map: Mapping[Any, int], names: list[str] | None, num_classes: int) -> None:
        super().relabel(label_map, names, num_classes)
        self.reader.label_map = self.label_map


class FileSource(Source):
    """Image files, each with the number of its class."""

    def __init__(self, items: Sequence[Item], labels: Iterable[int], place: str) -> None:
        self.items, self.labels, self.place = list(items), list(labels), place
        self.extents = [Extent(place, 0, len(self.items))]

    def __len__(self) -> int:
        return len(self.items)

    def read_one(self, index: int) -> Record:
        """The file's bytes."""
        item = self.items[index]
        try:
            return Record(item.where, item.read(), self.labels[index])
        except OSError as error:
            raise ImageError(f"{item.where}: {error.strerror or error}") from None

    def relabel(self, label_map: Mapping[Any, int], names: list[str] | None, num_classes: int) -> None:
        """Files of a class that the map does not have are left out, as timm does."""
        pairs = zip(self.items, self.labels, strict=True)
        kept = [(item, label_map[label]) for item, label in pairs if label in label_map]
        self.items, self.labels = [item for item, _ in kept], [label for _, label in kept]
        self.class_names, self.num_classes = names, num_classes


class PairSource(Source):
    """A map-style data set of (PIL image, label), such as torchvision's and our arrays, or a part of it."""

    def __init__(self, pairs: Any, part: slice, place: str) -> None:
        self.pairs, self.place = pairs, place
        self.indices = part_of(len(pairs), part, f"the part of {place}")
        self.extents = [Extent(place, self.indices.start, self.indices.stop)]
        self.take_classes(getattr(pairs, "class_to_idx", None))

    def __len__(self) -> int:
        return len(self.indices)

    def read_one(self, index: int) -> Record:
        """The image that the data set makes."""
        number = self.indices[index]
        return Record(f"{self.place} sample {number}", *self.pairs[number])

    def arrays(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return images [N, H, W, C] and stored labels [N] of a data set that holds them so, such as CIFAR."""
        images, part = getattr(self.pairs, "data", None), slice(self.indices.start, self.indices.stop)
        return (images[part], np.asarray(self.pairs.targets)[part]) if isinstance(images, np.ndarray) else None


class HubSource(Source):
    """A Hugging Face data set: its images are not decoded, its labels are a column of classes or integers."""

    def __init__(self, dataset: Any, image_key: str, label_key: str, place: str) -> None:
        self.dataset, self.image_key, self.label_key, self.place = dataset, image_key, label_key, place
        self.extents = [Extent(place, 0, len(dataset))]
        feature = get_field(dataset.features, label_key)
        names = getattr(feature, "names", None)
        if kind_of(feature) == "string":
            names = sorted(set(dataset.unique(label_key)) - {None}, key=class_order)
            self.label_map = {name: label for label, name in enumerate(names)}
        self.take_classes({name: label for label, name in enumerate(names)} if names else None)

    def __len__(self) -> int:
        return len(self.dataset)

    def read_one(self, index: int) -> Record:
        """The file's bytes, from the data set itself or from where it points to."""
        row, where = self.dataset[index], f"{self.place} sample {index}"
        image, label = row[self.image_key], get_field(row, self.label_key)
        if image is None:
            raise ImageError(f"{where}: {self.image_key} is missing")
        if label is None:
            raise LabelError(f"{where}: {self.label_key} is missing")
        return Record(where, image["bytes"] or Item(image["path"]).read(), label)


def kind_of(feature: Any) -> str:
    """Return what a column of a Hugging Face data set holds: a feature's name, or the type of its values."""
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind
