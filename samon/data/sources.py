"""Where samples come from: a row per kind of data set, opened here for training and for evaluation alike."""

import bisect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import numpy as np
import timm.data
import torch
from timm.data.dataset_factory import _search_split
from timm.data.readers.targets import get_field, has_field
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from samon.data.arrays import ArrayDataset, npz_path, read_npz
from samon.data.classes import class_order, load_class_map, map_label, map_labels, renumbering
from samon.data.faults import ImageError, LabelError, SampleError
from samon.data.folders import Item, find_images
from samon.data.shards import Record, ShardReader, ShardSet, load_split
from samon.data.splits import Extent, parse_split, part_of, synonyms, train_or_test
from samon.data.urls import ShardCache, is_local, temporary_directory
from samon.errors import UserError, needed

_SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test")


@dataclass(frozen=True)
class Request:
    """What is to be opened: timm's arguments of `create_dataset`, and

    - keep: the class folders to take, the others are left out (labels stay as they are);
    - random_access: samples are read in any order, so remote shards are copied first, without `shard_cache` to a
      temporary directory;
    - unlabeled: labels are known otherwise, images may lie in no class folder;
    - allow_shell_urls, shard_cache, shard_cache_size: see `samon.data.create_dataset`.
    """

    name: str  # as `--dataset` has it
    root: str | None
    split: str
    class_map: str | dict[Any, int] = ""
    input_key: str | None = None
    target_key: str | None = None
    download: bool = False
    trust_remote_code: bool = False
    num_classes: int | None = None
    allow_shell_urls: bool = False
    shard_cache: str | None = None
    shard_cache_size: int = 200 << 30
    keep: set[str] | None = None
    unlabeled: bool = False
    random_access: bool = False

    @property
    def flat(self) -> bool:
        """Whether images may lie in no class folder."""
        return bool(self.class_map) or self.unlabeled


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
        if _kind_of(feature) == "string":
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


def _open_shards(request: Request) -> Source:
    shards = load_split(request.root or "", request.split, allow_shell=request.allow_shell_urls)
    copied = request.random_access and not all(map(is_local, shards.urls))
    directory = request.shard_cache or (temporary_directory() if copied else None)
    cache = ShardCache(directory, request.shard_cache_size) if directory else None
    return ShardSource(shards, ShardReader(request.input_key, request.target_key or shards.label_key or None, cache))


def _open_folder(request: Request) -> Source:
    endings = [f".{key.lstrip('.')}" for key in request.input_key.split(";")] if request.input_key else None
    folder = _split_folder(request.root or "", request.split)
    items, place = find_images(folder, endings), os.path.realpath(folder)
    if os.path.isfile(folder):
        items, name = _split_of_tar(items, request.split)
        place = os.path.join(place, name)
    names = sorted({item.folder for item in items if item.folder}, key=class_order)
    source = _by_class(items, [item.folder for item in items], names, place, request.flat)
    if request.keep is not None:
        source.relabel({k: k for k, name in enumerate(names) if name in request.keep}, names, len(names))
        if not source.items:
            raise UserError(f"{folder}: holds no images of this set in class folders; check --data-dir and --split")
    return source


def _by_class(items: Sequence[Item], classes: Sequence[str], names: list[str], place: str, flat: bool) -> FileSource:
    """Files labeled by their class's place among `names`, -1 in no class folder if `flat` allows that."""
    stray = [item.where for item, name in zip(items, classes, strict=True) if not name]
    if stray and not flat:
        form = "images lie in CLASS/IMAGE; move it, or pack flat ImageNet validation images by tools/make_shards.py"
        raise UserError(f"{stray[0]} lies in no class folder ({len(stray)} of {len(items)} images do not): {form}")
    labels = {name: label for label, name in enumerate(names)} | {"": -1}
    source = FileSource(items, [labels[name] for name in classes], place)
    source.class_names, source.num_classes = names or None, len(names) or None
    return source


def _split_folder(root: str, split: str) -> str:
    """The folder of a split below `root`, by timm's synonyms; `root` itself where it has no folders of splits."""
    if not os.path.exists(root):
        raise UserError(f"--data-dir {root}: no such directory")
    if "[" in split:
        raise UserError(f"{root}: split {split!r} is a part, but image folders lie class by class; name a whole split")
    folder = _search_split(root, split) if split and os.path.isdir(root) else root
    others = [name for name in _SPLIT_FOLDERS if os.path.isdir(os.path.join(root, name))]
    if split and folder == root and others:
        raise UserError(f"--data-dir {root}: no folder for split {split!r}, it has {', '.join(others)}")
    if folder == root and os.path.isfile(os.path.join(root, "_info.json")):
        raise UserError(f"--data-dir {root}: holds shards; read them with --dataset wds/NAME")
    return folder


def _split_of_tar(items: list[Item], split: str) -> tuple[list[Item], str]:
    """The images of a split in a tar and its folder's name; all and '' where no such folders are above its classes."""
    parts = [set(os.path.dirname(item.path).split("/")[:-1]) for item in items]
    held = {name for names in parts for name in names} & set(_SPLIT_FOLDERS)
    if not held or not split:
        return items, ""
    name = next((name for name in (split, *synonyms(split)) if name in held), None)
    if name is None:
        raise UserError(f"{items[0].file}: no folder for split {split!r}, it has {', '.join(sorted(held))}")
    return [item for item, names in zip(items, parts, strict=True) if name in names], name


def _open_arrays(request: Request) -> Source:
    name, part = parse_split(request.split)
    images, labels = read_npz(request.name, request.root, name)
    place = f"{npz_path(request.name, request.root).resolve()} {train_or_test(name, request.name)}"
    source = PairSource(ArrayDataset(images, labels), part, place)
    source.num_classes = int(labels.max(initial=-1)) + 1
    return source


_OWN_SPLITS = ("imagenet", "places365", "inaturalist", "inat")  # more splits than train and test


def _open_torch(request: Request) -> Source:
    root, kind = request.root or ".", request.name.rpartition("/")[2].lower()
    if kind in ("folder", "image_folder"):  # torchvision's numbering: by the outer folders, in the order of characters
        folder = _split_folder(root, request.split)
        items = sorted(find_images(folder, IMG_EXTENSIONS), key=lambda item: item.path)
        classes = [item.path.partition("/")[0] if "/" in item.path else "" for item in items]
        return _by_class(items, classes, sorted({*classes} - {""}), os.path.realpath(folder), request.flat)
    name, part = parse_split(request.split)
    if kind in _OWN_SPLITS:
        name = "train" if name == "training" else name
    else:
        name = "train" if train_or_test(name, request.name) == "train" else "validation"
    try:
        pairs: Any = timm.data.create_dataset(request.name, root, name, download=request.download)
    except RuntimeError as error:
        if request.download or "download" not in str(error):
            raise
        missing = f"{root} does not hold it, or only in part; add --dataset-download or name the directory that does"
        raise UserError(f"--dataset {request.name} --data-dir {root}: {missing}") from None
    place = f"{request.name} in {os.path.realpath(root)}, split {name}"
    if not isinstance(pairs, DatasetFolder):
        return PairSource(pairs, part, place)
    chosen = [pairs.samples[index] for index in part_of(len(pairs), part, f"the part of {place}")]
    source = FileSource([Item(path) for path, _ in chosen], [label for _, label in chosen], place)
    source.take_classes(getattr(pairs, "wnid_to_idx", pairs.class_to_idx))  # ImageNet's classes have several names
    return source


def _open_hub(request: Request) -> Source:
    datasets = needed("datasets", f"--dataset {request.name} needs the package datasets: pip install datasets")
    options = {"trust_remote_code": True} if request.trust_remote_code else {}
    name = request.name.partition("/")[2]
    dataset = datasets.load_dataset(name, split=request.split, cache_dir=request.root, **options)
    image_key, label_key = request.input_key or "image", request.target_key or "label"
    for flag, key in (("--input-key", image_key), ("--target-key", label_key)):
        if not has_field(dataset.features, key):
            there = ", ".join(f"{name} ({_kind_of(feature)})" for name, feature in dataset.features.items())
            raise UserError(f"--dataset {request.name}: no column {key!r}; it has {there}: give {flag}")
    kind = _kind_of(get_field(dataset.features, label_key))
    if kind not in ("ClassLabel", "string", "bool") and "int" not in kind:
        raise UserError(f"--dataset {request.name}: labels in {label_key!r} are {kind}; name another with --target-key")
    dataset = dataset.cast_column(image_key, datasets.Image(decode=False))
    source = HubSource(dataset, image_key, label_key, f"{request.name} split {request.split}")
    if dataset.info.splits:
        instruction = datasets.ReadInstruction.from_spec(request.split)
        lengths = {name: split.num_examples for name, split in dataset.info.splits.items()}
        parts = instruction.to_absolute(lengths)
        source.extents = [Extent(f"{request.name} {part.splitname}", part.from_, part.to) for part in parts]
    return source


def _kind_of(feature: Any) -> str:
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


class Kind(NamedTuple):
    """How data sets of a prefix are opened, and what --data-dir must be for them; '' if it may be missing."""

    open: Callable[[Request], Source]
    needs: str


SOURCES = {
    "wds": Kind(_open_shards, "the directory or URL of its shards"),
    "": Kind(_open_folder, "the directory of its class folders"),
    "npz": Kind(_open_arrays, "the directory of NAME.npz"),
    "torch": Kind(_open_torch, ""),
    "hfds": Kind(_open_hub, ""),
}
_REFUSED = ("tfds", "hfids")


def _kind(name: str) -> str:
    prefix, slash, _ = name.partition("/")
    return prefix.lower() if slash or prefix.lower() in (*SOURCES, *_REFUSED) else ""


def check_name(dataset: str, data_dir: str | None) -> None:
    """Refuse what cannot be opened whatever the disk holds.

    Raises:
        UserError: an unknown prefix, one that timm only streams, or no --data-dir where one is needed.
    """
    kind = _kind(dataset)
    if kind in _REFUSED:
        better = "use wds/, hfds/, torch/ or an image folder"
        raise UserError(f"--dataset {dataset}: {kind}/ cannot be resumed or counted exactly; {better}")
    if kind not in SOURCES:
        known = ", ".join(f"{prefix}/" for prefix in SOURCES if prefix)
        raise UserError(f"--dataset {dataset}: no such kind of data set; use {known}, or no prefix for image folders")
    if SOURCES[kind].needs and not data_dir:
        what = f"--dataset {dataset} needs" if dataset else "no data set; give"
        raise UserError(f"{what} --data-dir, {SOURCES[kind].needs}")


def open_source(name: str, root: str | None, split: str, **options: Any) -> Source:
    """The samples of a split.

    Args:
        name, root: as `--dataset` and `--data-dir` have them.
        **options: the other fields of `Request`.

    Raises:
        UserError: no such data, or more classes than `num_classes`.
    """
    check_name(name, root)
    request = Request(name, root, split, **options)
    where = f"--dataset {name or 'folder'} --data-dir {root}, split {split!r}"
    try:
        source = SOURCES[_kind(name)].open(request)
        if request.class_map:
            class_map = load_class_map(request.class_map, root or "")
            label_map, names = map_labels(class_map, source.class_names, source.place)
            source.relabel(label_map, names, max(class_map.values()) + 1)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what libraries raise depends on the data set
        raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not len(source):
        raise UserError(f"{where}: no sample of the classes in --class-map" if request.class_map else f"{where}: empty")
    found, given = source.num_classes, request.num_classes
    if given and found and found > given:
        raise UserError(f"{root}: split {split!r} has {found} classes, the model {given}; use --num-classes {found}")
    return source
