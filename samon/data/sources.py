"""Where samples come from: a row per kind of data set, opened here for training and for evaluation alike."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm.data
import torch
from timm.data.dataset_factory import _search_split
from timm.data.readers.targets import get_field, has_field
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from samon.data.arrays import ArrayDataset, npz_path, read_npz
from samon.data.classes import class_order, load_class_map, map_labels
from samon.data.folders import Item, find_images
from samon.data.shards import ShardReader, load_split
from samon.data.source import FileSource, HubSource, PairSource, ShardSource, Source, kind_of
from samon.data.splits import Extent, parse_split, part_of, synonyms, train_or_test
from samon.data.urls import ShardCache, is_local, temporary_directory
from samon.errors import UserError, require_package

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


def _open_shards(request: Request) -> Source:
    shards = load_split(request.root or "", request.split, allow_shell=request.allow_shell_urls)
    copied = request.random_access and not all(map(is_local, shards.urls))
    directory = request.shard_cache or (temporary_directory() if copied else None)
    cache = ShardCache(directory, request.shard_cache_size) if directory else None
    return ShardSource(shards, ShardReader(request.input_key, request.target_key or shards.label_key or None, cache))


def _open_folder(request: Request) -> Source:
    endings = [f".{key.lstrip('.')}" for key in request.input_key.split(";")] if request.input_key else None
    split, part = parse_split(request.split)
    folder = _split_folder(request.root or "", split)
    items, place = find_images(folder, endings), os.path.realpath(folder)
    if os.path.isfile(folder):
        items, name = _split_of_tar(items, split)
        place = os.path.join(place, name)
    names = sorted({item.folder for item in items if item.folder}, key=class_order)
    source = _by_class(items, [item.folder for item in items], names, place, part, request.flat)
    if request.keep is not None:
        source.relabel({k: k for k, name in enumerate(names) if name in request.keep}, names, len(names))
        if not source.items:
            raise UserError(f"{folder}: holds no images of this set in class folders; check --data-dir and --split")
    return source


def _by_class(
    items: Sequence[Item], classes: Sequence[str], names: list[str], place: str, part: slice, flat: bool
) -> FileSource:
    """Files labeled by their class's place among `names`, -1 in no class folder if `flat` allows that."""
    stray = [item.where for item, name in zip(items, classes, strict=True) if not name]
    if stray and not flat:
        form = "images lie in CLASS/IMAGE; move it, or pack flat ImageNet validation images by samon-shards"
        raise UserError(f"{stray[0]} lies in no class folder ({len(stray)} of {len(items)} images do not): {form}")
    labels = {name: label for label, name in enumerate(names)} | {"": -1}
    source = _evenly(items, [labels[name] for name in classes], part, place)
    source.class_names, source.num_classes = names or None, len(names) or None
    return source


def _evenly(items: Sequence[Item], labels: Sequence[int], part: slice, place: str) -> FileSource:
    """A part of files that lie class by class.

    It is counted in turns around the classes, so that it has as many images of each class as of any other, or one more.
    """
    turns: Counter[int] = Counter()
    order = []
    for index, label in enumerate(labels):
        order.append((turns[label], index))
        turns[label] += 1
    chosen = part_of(len(items), part, f"the part of {place}")
    kept = sorted(index for _, index in sorted(order)[chosen.start : chosen.stop])
    source = FileSource([items[index] for index in kept], [labels[index] for index in kept], place)
    source.extents = [Extent(place, chosen.start, chosen.stop)]
    return source


def _split_folder(root: str, split: str) -> str:
    """The folder of a split below `root`, by timm's synonyms; `root` itself where it has no folders of splits."""
    if not os.path.exists(root):
        raise UserError(f"--data-dir {root}: no such directory")
    folder = _search_split(root, split) if split and os.path.isdir(root) else root
    others = [name for name in _SPLIT_FOLDERS if os.path.isdir(os.path.join(root, name))]
    if split and folder == root and others:
        raise UserError(f"--data-dir {root}: no folder for split {split!r}, it has {', '.join(others)}")
    if not split and len(others) > 1:
        raise UserError(f"--data-dir {root}: holds the splits {', '.join(others)}; name one of them")
    if folder == root and os.path.isfile(os.path.join(root, "_info.json")):
        raise UserError(f"--data-dir {root}: holds shards; read them with --dataset wds/NAME")
    return folder


def _split_of_tar(items: list[Item], split: str) -> tuple[list[Item], str]:
    """The images of a split in a tar and its folder's name; all and '' where no such folders are above its classes."""
    parts = [set(os.path.dirname(item.path).split("/")[:-1]) for item in items]
    held = {name for names in parts for name in names} & set(_SPLIT_FOLDERS)
    if len(held) > 1 and not split:
        raise UserError(f"{items[0].file}: holds the splits {', '.join(sorted(held))}; name one of them")
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
    name, part = parse_split(request.split)
    if kind in ("folder", "image_folder"):  # torchvision's numbering: by the outer folders, in the order of characters
        folder = _split_folder(root, name)
        items = sorted(find_images(folder, IMG_EXTENSIONS), key=lambda item: item.path)
        classes = [item.path.partition("/")[0] if "/" in item.path else "" for item in items]
        return _by_class(items, classes, sorted({*classes} - {""}), os.path.realpath(folder), part, request.flat)
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
    source = _evenly([Item(path) for path, _ in pairs.samples], [label for _, label in pairs.samples], part, place)
    source.take_classes(getattr(pairs, "wnid_to_idx", pairs.class_to_idx))  # ImageNet's classes have several names
    return source


def _open_hub(request: Request) -> Source:
    datasets = require_package("datasets", f"--dataset {request.name} needs the package datasets: pip install datasets")
    options = {"trust_remote_code": True} if request.trust_remote_code else {}
    name = request.name.partition("/")[2]
    dataset = datasets.load_dataset(name, split=request.split, cache_dir=request.root, **options)
    image_key, label_key = request.input_key or "image", request.target_key or "label"
    for flag, key in (("--input-key", image_key), ("--target-key", label_key)):
        if not has_field(dataset.features, key):
            there = ", ".join(f"{name} ({kind_of(feature)})" for name, feature in dataset.features.items())
            raise UserError(f"--dataset {request.name}: no column {key!r}; it has {there}: give {flag}")
    kind = kind_of(get_field(dataset.features, label_key))
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


def in_order_of_classes(name: str) -> bool:
    """Whether the first samples of such a data set may be all of one class: its files or rows lie as they were made."""
    return _kind(name) in ("", "hfds") or name.lower() in ("torch/folder", "torch/image_folder", "torch/imagenet")


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
    except ModuleNotFoundError as error:
        raise UserError(f"{where} needs the package {error.name}; run: pip install {error.name}") from error
    except Exception as error:  # what libraries raise depends on the data set
        raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not len(source):
        raise UserError(f"{where}: no sample of the classes in --class-map" if request.class_map else f"{where}: empty")
    found, given = source.num_classes, request.num_classes
    if given and found and found > given:
        raise UserError(f"{root}: split {split!r} has {found} classes, the model {given}; use --num-classes {found}")
    return source
