"""Sources of samples for training and evaluation: one row per kind of data set."""

import argparse
import bisect
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.dataset_factory import _search_split
from timm.data.readers.targets import get_field, has_field
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from samon.data import shards
from samon.data.classes import LabelMap, apply_class_map, class_order, load_class_map, log_once
from samon.data.corrupt import SampleError
from samon.data.images import ImageEntry, find_images
from samon.data.shards import EVAL_SPLITS, TRAIN_SPLITS, RawSample, SampleOrError
from samon.errors import UserError, error_line, nearest, require_package

# --- splits and parts of them -----------------------------------------------------------------------------------------

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


def train_or_test(name: str, where: str) -> str:
    """Return 'train' or 'test', the two splits of a data set that has no others; another name is an error."""
    if name not in TRAIN_SPLITS + EVAL_SPLITS:
        raise UserError(f"{where}: unknown split {name!r}; use train or validation, or a part such as train[:45000]")
    return "train" if name in TRAIN_SPLITS else "test"


def _part_range(size: int, part: slice, location: str) -> range:
    """Return the indices of a part of `size` samples; an empty one is an error."""
    indices = range(size)[part]
    if not indices:
        raise UserError(f"the part of {location} is empty, it has {size} images")
    return indices


# --- arrays -----------------------------------------------------------------------------------------------------------


def read_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [N, H, W, 3] (or [N, H, W]) and labels int64 [N] of a split.

    Raises:
        UserError: no such file or split, or arrays that are not images with one class each.
    """
    split = train_or_test(split, str(path))
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            images, labels = file[f"x_{split}"], file[f"y_{split}"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: x_{split} and y_{split} cannot be read: {error_line(error)}") from None
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.shape[3:] not in ((), (3,)) or images.ndim < 3:
        raise UserError(f"{path}: x_{split} is {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 3]")
    if labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "buif":
        kind = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"{path}: y_{split} is {kind}, not one class number for each of the {len(images)} images")
    labels = labels.reshape(-1)
    with np.errstate(invalid="ignore"):
        integers = labels.astype(np.int64)
    wrong = np.flatnonzero((integers != labels) | (integers < 0))
    if len(wrong):
        raise UserError(f"{path}: y_{split}: label {labels[wrong[0]]} of image {wrong[0]} is not a class number")
    return images, integers


# --- sources ----------------------------------------------------------------------------------------------------------


class Source:
    """Samples by number, as stored: encoded bytes (or a PIL image) and the label.

    `class_names` are in the order of the labels; they and `num_classes` are None if unknown.
    """

    class_names: list[str] | None = None
    num_classes: int | None = None
    location: str = ""  # for messages
    extents: Extents = ()
    label_map: LabelMap | None = None  # stored label -> label, None if they are the same

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


class _ArrayDataset(Dataset):
    """Images [N, H, W, C] in memory, the arrays named as in torchvision's CIFAR."""

    def __init__(self, data: np.ndarray, targets: np.ndarray) -> None:
        self.data, self.targets = data, targets

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


# --- opening ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Which data set to open: the arguments of `samon.data.create_dataset`, and three for evaluation."""

    name: str  # as --dataset gives it
    root: str | None
    split: str
    class_map: str | LabelMap = ""
    input_key: str | None = None
    target_key: str | None = None
    download: bool = False
    trust_remote_code: bool = False
    allow_shell_urls: bool = False
    shard_cache: str | None = None
    shard_cache_size: int = 200 << 30
    keep: set[str] | None = None  # class folders to read, the others are left out (labels stay as they are)
    unlabeled: bool = False  # labels come from elsewhere, images need no class folder
    random_access: bool = False  # samples are read in any order: remote shards are copied to a directory first


def _open_shards(request: Request) -> Source:
    shard_set = shards.load_split(request.root or "", request.split, allow_shell=request.allow_shell_urls)
    directory = request.shard_cache
    if directory is None and request.random_access and not all(map(shards.is_local, shard_set.urls)):
        directory = shards.temporary_directory()
    cache = shards.ShardCache(directory, request.shard_cache_size) if directory else None
    label_key = request.target_key or shard_set.label_key or None
    return ShardSource(shard_set, shards.ShardReader(request.input_key, label_key, cache))


def _open_folder(request: Request) -> Source:
    folder = _find_split_folder(request)
    entries = find_images(folder, request.input_key)
    places = sorted({os.path.dirname(os.path.dirname(entry.path)) for entry in entries})
    if len(places) > 1:
        names = f"each innermost folder is a class, in {places[0] or '.'}, {places[1]}"
        log_once(f"{folder}: {names}, ...; --dataset torch/folder takes the outermost ones")
    return _label_by_class(entries, [entry.folder for entry in entries], class_order, folder, request)


def _label_by_class(
    entries: Sequence[ImageEntry], classes: Sequence[str], order: Callable[[str], Any], folder: str, request: Request
) -> FileSource:
    """Label files by the index of their class in `order`, -1 without a class folder if the request allows that."""
    stray = [entry.where for entry, name in zip(entries, classes, strict=True) if not name]
    if stray and not (request.class_map or request.unlabeled):
        raise UserError(
            f"{stray[0]} is in no class folder ({len(stray)} of {len(entries)} images are not); move images to "
            "CLASS/IMAGE, or pack flat ImageNet validation images with samon-shards"
        )
    labels = {name: label for label, name in enumerate(sorted({*classes} - {""}, key=order))}
    _, part = parse_split(request.split)
    source = FileSource(entries, [labels.get(name, -1) for name in classes], os.path.realpath(folder), part)
    source.set_classes(labels)
    if request.keep is not None:
        source.relabel({k: k for name, k in labels.items() if name in request.keep}, list(labels), len(labels))
    return source


def _find_split_folder(request: Request) -> str:
    """Return the folder of a split below the root, by timm's synonyms; the root if it has no folders of splits."""
    root, (split, _) = request.root or ".", parse_split(request.split)
    if not os.path.isdir(root):
        pack = "; extract it, or pack it with samon-shards" if os.path.exists(root) else ""
        raise UserError(f"--data-dir {root}: no such directory{pack}")
    folder = _search_split(root, split) if split else root
    others = [name for name in TRAIN_SPLITS + EVAL_SPLITS if os.path.isdir(os.path.join(root, name))]
    if split and folder == root and others:
        raise UserError(f"--data-dir {root}: no folder for split {split!r}, it has {', '.join(others)}")
    if not split and len(others) > 1:
        raise UserError(f"--data-dir {root}: it has the splits {', '.join(others)}; name one of them")
    return folder


def _open_arrays(request: Request) -> Source:
    name, part = parse_split(request.split)
    path = Path(request.root or ".")
    path = path if path.suffix == ".npz" else path / f"{request.name.removeprefix('npz/')}.npz"
    images, labels = read_npz(path, name)
    source = PairSource(_ArrayDataset(images, labels), part, f"{path.resolve()} {train_or_test(name, request.name)}")
    source.num_classes = int(labels.max(initial=-1)) + 1
    _check_classes_of_part(request.split, source.location, len(np.unique(labels[part])), len(np.unique(labels)))
    return source


def _check_classes_of_part(split: str, location: str, classes: int, total: int) -> None:
    if "[" in split and classes < total:
        log_once(
            f"{location}: {split} has images of {classes} of the {total} classes, as when images lie class by class"
        )


def _open_torchvision(request: Request) -> Source:
    root, kind = request.root or ".", request.name.rpartition("/")[2].lower()
    split, part = parse_split(request.split)
    if kind in ("folder", "image_folder"):  # torchvision's numbering: by the outer folders, in the order of characters
        folder = _find_split_folder(request)
        entries = sorted(
            find_images(folder, request.input_key or ";".join(IMG_EXTENSIONS)), key=lambda entry: entry.path
        )
        classes = [entry.path.partition("/")[0] if "/" in entry.path else "" for entry in entries]
        return _label_by_class(entries, classes, str, folder, request)
    if kind in ("imagenet", "places365", "inaturalist", "inat"):  # these have other splits than train and test
        split = "train" if split == "training" else split
    else:
        split = train_or_test(split, request.name)
    try:
        dataset = timm.data.create_dataset(request.name, root, split, download=request.download)
    except RuntimeError as error:
        if request.download or "download" not in str(error):
            raise
        do = f"{root} does not contain it, or only in part; add --dataset-download or name the directory that does"
        raise UserError(f"--dataset {request.name} --data-dir {root}: {do}") from None
    location = f"{request.name} in {os.path.realpath(root)}, split {split}"
    if not isinstance(dataset, DatasetFolder):
        return PairSource(dataset, part, location)
    paths, labels = zip(*dataset.samples, strict=True)
    source = FileSource([ImageEntry(path) for path in paths], labels, location, part)
    source.set_classes(getattr(dataset, "wnid_to_idx", dataset.class_to_idx))  # ImageNet's classes have several names
    return source


def _open_hub(request: Request) -> Source:
    datasets = require_package("datasets", f"--dataset {request.name} needs the package datasets: pip install datasets")
    options = {"trust_remote_code": True} if request.trust_remote_code else {}
    name = request.name.partition("/")[2]
    dataset = datasets.load_dataset(name, split=request.split, cache_dir=request.root, **options)
    image_key, label_key = request.input_key or "image", request.target_key or "label"
    for flag, key in (("--input-key", image_key), ("--target-key", label_key)):
        if not has_field(dataset.features, key):
            columns = ", ".join(dataset.features)
            raise UserError(f"--dataset {request.name}: no column {key!r}; it has {columns}: give {flag}")
    feature = get_field(dataset.features, label_key)
    names, is_text = getattr(feature, "names", None) or [], getattr(feature, "dtype", "") == "string"
    if is_text:
        names = sorted(set(dataset.unique(label_key)) - {None}, key=class_order)
    location = f"{request.name} split {request.split}"
    if names and label_key in dataset.features:
        _check_classes_of_part(request.split, request.name, len(set(dataset.unique(label_key)) - {None}), len(names))
    dataset = dataset.cast_column(image_key, datasets.Image(decode=False))
    source = HubSource(dataset, image_key, label_key, location)
    labels = {name: label for label, name in enumerate(names)}
    source.set_classes(labels)
    source.label_map = labels if is_text else None
    if dataset.info.splits:
        lengths = {name: split.num_examples for name, split in dataset.info.splits.items()}
        parts = datasets.ReadInstruction.from_spec(request.split).to_absolute(lengths)
        source.extents = [(f"{request.name} {part.splitname}", range(part.from_, part.to)) for part in parts]
    return source


# How data sets of each prefix are opened, and what --data-dir must be for them; '' if it is optional.
SOURCES: dict[str, tuple[Callable[[Request], Source], str]] = {
    "wds": (_open_shards, "the directory or URL of its shards"),
    "": (_open_folder, "the directory of its class folders"),
    "npz": (_open_arrays, "the directory of NAME.npz"),
    "torch": (_open_torchvision, ""),
    "hfds": (_open_hub, ""),
}


def is_sorted_by_class(name: str) -> bool:
    """Whether the first samples of such a data set may all be of one class."""
    shuffled = ("torch/cifar10", "torch/cifar100", "torch/mnist", "torch/kmnist", "torch/fashion_mnist", "torch/qmnist")
    return _get_kind(name) not in ("wds", "npz") and name.lower() not in shuffled


def _get_kind(name: str) -> str:
    prefix, slash, _ = name.partition("/")
    return prefix.lower() if slash or prefix.lower() in SOURCES else ""


def check_name(dataset: str, data_dir: str | None) -> None:
    """Raise UserError for an unknown prefix (timm only streams tfds/ and hfids/) or a missing --data-dir."""
    kind = _get_kind(dataset)
    if kind not in SOURCES:
        known = ", ".join(f"{prefix}/" for prefix in SOURCES if prefix)
        raise UserError(f"--dataset {dataset}: {kind}/ cannot be read; use {known}, or no prefix for image folders")
    if (directory := SOURCES[kind][1]) and not data_dir:
        what = f"--dataset {dataset} needs" if dataset else "no data set; give"
        raise UserError(f"{what} --data-dir, {directory}")


def source_options(config: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `open_source` besides name, root and split, from the settings of train and validate."""
    same = ("class_map", "input_key", "target_key", "allow_shell_urls", "shard_cache")
    return {key: getattr(config, key) for key in same} | {
        "download": config.dataset_download,
        "trust_remote_code": config.dataset_trust_remote_code,
        "shard_cache_size": int(config.shard_cache_size * 2**30),
    }


def open_source(name: str, root: str | None, split: str, **options: Any) -> Source:
    """Open the samples of a split; `options` are the other fields of `Request`."""
    check_name(name, root)
    request = Request(name, root, split, **options)
    where = f"--dataset {name or 'folder'} --data-dir {root}, split {split!r}"
    try:
        source = SOURCES[_get_kind(name)][0](request)
        if request.class_map:
            class_map = load_class_map(request.class_map, root or "")
            label_map, names = apply_class_map(class_map, source.class_names, source.location)
            source.relabel(label_map, names, max(class_map.values()) + 1)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what libraries raise depends on the data set
        raise UserError(f"{where}: {type(error).__name__}: {error_line(error)}") from error
    if not len(source):
        raise UserError(f"{where}: no samples of the classes that are read")
    return source
