"""How each kind of `--dataset` is opened: one row of `SOURCES` per kind."""

import argparse
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from timm.data.dataset_factory import _search_split
from timm.data.readers.targets import get_field, has_field
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from samon.data import shards, urls
from samon.data.classes import LabelMap, apply_class_map, class_map_digest, class_order, load_class_map, log_once
from samon.data.images import ImageEntry, find_images
from samon.data.shards import EVAL_SPLITS, TRAIN_SPLITS
from samon.data.sources import ArrayDataset, FileSource, HubSource, PairSource, ShardSource, Source, parse_split
from samon.errors import UserError, error_line, require_package


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
    keys = request.input_key, request.target_key
    shard_set = shards.load_split(request.root or "", request.split, *keys, allow_shell=request.allow_shell_urls)
    directory = request.shard_cache
    if directory is None and request.random_access and not all(map(urls.is_local, shard_set.urls)):
        directory = urls.temporary_directory()
    cache = urls.ShardCache(directory, request.shard_cache_size, shard_set.digests) if directory else None
    return ShardSource(shard_set, shards.ShardReader(request.input_key, shard_set.label_key, cache))


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


def train_or_test(name: str, where: str) -> str:
    """Return 'train' or 'test', the two splits of a data set that has no others; another name is an error."""
    if name not in TRAIN_SPLITS + EVAL_SPLITS:
        raise UserError(f"{where}: unknown split {name!r}; use train or validation, or a part such as train[:45000]")
    return "train" if name in TRAIN_SPLITS else "test"


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


def _open_arrays(request: Request) -> Source:
    name, part = parse_split(request.split)
    path = Path(request.root or ".")
    path = path if path.suffix == ".npz" else path / f"{request.name.removeprefix('npz/')}.npz"
    images, labels = read_npz(path, name)
    source = PairSource(ArrayDataset(images, labels), part, f"{path.resolve()} {train_or_test(name, request.name)}")
    source.num_classes = int(labels.max(initial=-1)) + 1
    _check_classes_of_part(request.split, source.location, len(np.unique(labels[part])), len(np.unique(labels)))
    return source


def _check_classes_of_part(split: str, location: str, classes: int, total: int) -> None:
    if "[" in split and classes < total:
        log_once(f"{location}: {split} has images of {classes} of the {total} classes, as if sorted by class")


def _open_torchvision(request: Request) -> Source:
    root, kind = request.root or ".", request.name.rpartition("/")[2].lower()
    split, part = parse_split(request.split)
    if kind in ("folder", "image_folder"):  # torchvision's numbering: by the outer folders, in the order of characters
        folder = _find_split_folder(request)
        entries = find_images(folder, request.input_key or ";".join(IMG_EXTENSIONS))
        entries.sort(key=lambda entry: entry.path)
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
    names, is_text = getattr(feature, "names", None) or [], getattr(feature, "dtype", "") in ("string", "large_string")
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
            numbered = source.class_names if label_map is class_map else None
            source.class_map_digest = class_map_digest(class_map, numbered)
            source.relabel(label_map, names, max(class_map.values()) + 1)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what libraries raise depends on the data set
        raise UserError(f"{where}: {type(error).__name__}: {error_line(error)}") from error
    if not len(source):
        raise UserError(f"{where}: no samples of the classes that are read")
    return source
