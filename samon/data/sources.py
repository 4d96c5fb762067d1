"""Where samples come from: a row per kind of data set, opened here for training and for evaluation alike."""

import bisect
import io
import logging
import os
import posixpath
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.dataset_factory import _search_split
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.targets import get_field, has_field
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from samon.data.classes import class_order, load_class_map, map_label, map_labels, renumbering
from samon.data.corrupt import ImageError, LabelError, SampleError
from samon.data.decode import IMAGE_KEYS
from samon.data.shards import (
    RawSample,
    ShardCache,
    ShardReader,
    ShardSet,
    is_hidden,
    is_local,
    load_split,
    synonyms,
    temporary_directory,
)
from samon.errors import UserError, require_package

TRAIN_SPLITS = {"train", "training"}
EVAL_SPLITS = {"validation", "val", "valid", "eval", "evaluation", "test"}


class Extent(NamedTuple):
    """Samples `start` to `stop` (exclusive) of a place on disk: how two splits are known to share samples."""

    location: str
    start: int
    stop: int


def find_overlap(first: Sequence[Extent], second: Sequence[Extent]) -> str:
    """Return the place of which both have some sample, or ''."""
    places: dict[str, list[Extent]] = {}
    for extent in second:
        places.setdefault(extent.location, []).append(extent)
    pairs = ((a, b) for a in first for b in places.get(a.location, ()))
    return next((a.location for a, b in pairs if max(a.start, b.start) < min(a.stop, b.stop)), "")


def parse_split(text: str) -> tuple[str, slice]:
    """Return the split's name and the part of it: `train[:45000]` is ('train', slice(None, 45000))."""
    found = re.fullmatch(r"([^\[\]]*)(?:\[(\d*):(\d*)\])?", text)
    if found is None:
        raise UserError(f"unknown split {text!r}; a part is written as train[:45000] or train[45000:]")
    name, *ends = found.groups()
    return name, slice(*(int(end) if end else None for end in ends))


def train_or_test(name: str, where: str) -> str:
    """Return 'train' or 'test', the two splits of a data set that has no others.

    Raises:
        UserError: another name.
    """
    if name not in TRAIN_SPLITS | EVAL_SPLITS:
        raise UserError(f"{where}: unknown split {name!r}; use train or validation, or a part such as train[:45000]")
    return "train" if name in TRAIN_SPLITS else "test"


def part_of(size: int, part: slice, where: str) -> range:
    """Return the indices of a part of `size` samples.

    Raises:
        UserError: there are none.
    """
    indices = range(size)[part]
    if not indices:
        raise UserError(f"{where} is empty, it has {size} images")
    return indices


def npz_path(name: str, root: str | None) -> Path:
    """Return the file of `npz/NAME`: NAME.npz in `root`, or `root` itself."""
    path = Path(root or ".")
    return path if path.suffix == ".npz" else path / f"{name.removeprefix('npz/')}.npz"


def read_npz(name: str, root: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [N, H, W, 3] (or [N, H, W]) and labels int64 [N] of a split of `npz/NAME`.

    Raises:
        UserError: no such file or split, or arrays that are no images with one class each.
    """
    path = npz_path(name, root)
    if not path.is_file():
        raise UserError(f"{path} does not exist; --dataset npz/NAME reads NAME.npz in --data-dir")
    kind = train_or_test(split, str(path))
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays: dict[str, Any] = {key: file.get(key) for key in (f"x_{kind}", f"y_{kind}")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as arrays: {error}") from None
    if missing := [key for key, array in arrays.items() if array is None]:
        raise UserError(f"{path} holds no {' and no '.join(missing)}; it needs x_train, y_train, x_test and y_test")
    images, labels = arrays.values()
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.shape[3:] not in ((), (3,)) or images.ndim < 3:
        transpose = f"; write x_{kind}.transpose(0, 2, 3, 1)" if images.ndim == 4 and images.shape[1] == 3 else ""
        raise UserError(f"{path}: x_{kind} is {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 3]{transpose}")
    return images, _integers(labels, len(images), f"{path}: y_{kind}")


def _integers(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    """Labels int64 [N]; whole numbers of another type, or [N, 1], are taken as these."""
    shape = list(labels.shape)
    if shape not in ([count], [count, 1]) or labels.dtype.kind not in "buif":
        raise UserError(f"{where} is {labels.dtype} {shape}, not one class number for each of the {count} images")
    labels = labels.reshape(-1)
    with np.errstate(invalid="ignore"):
        whole = labels.astype(np.int64)
    wrong = np.flatnonzero((whole != labels) | (whole < 0))
    if len(wrong):
        raise UserError(f"{where}: label {labels[wrong[0]]} of image {wrong[0]} is no class number")
    return whole


class ArrayDataset(Dataset):
    """Images in memory, read as PIL images; map-style, arrays named as torchvision's CIFAR names them."""

    def __init__(self, data: np.ndarray, targets: np.ndarray) -> None:
        self.data, self.targets = data, targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), int(self.targets[index])


_log_once = cache(logging.getLogger("samon").warning)  # a set is opened several times in a run

# Endings of images that can be decoded, of which timm reads .png, .jpg and .jpeg.
KNOWN_ENDINGS = frozenset(f".{key}" for key in IMAGE_KEYS.split(";"))


class ImageEntry(NamedTuple):
    """One image.

    - path: relative to the source, for people and class names;
    - file: the directory that it lies in, or the tar if there is an `offset`;
    - array: pixels [H, W, C] or [H, W] instead of a file.
    """

    path: str
    file: str = ""
    offset: int = -1
    size: int = -1
    array: Any = None

    @property
    def where(self) -> str:
        return os.path.join(self.file, self.path)

    @property
    def folder(self) -> str:
        """Name of the innermost folder, '' if there is none: timm's rule for classes."""
        return os.path.basename(os.path.dirname(self.path))

    @property
    def nbytes(self) -> int:
        if self.array is not None:
            return int(self.array.nbytes)
        return os.path.getsize(self.where) if self.offset < 0 else self.size

    def read(self) -> bytes:
        """Return the image's own bytes; a PNG of an array."""
        if self.array is not None:
            png = io.BytesIO()
            Image.fromarray(self.array).save(png, "PNG")
            return png.getvalue()
        with open(self.where if self.offset < 0 else self.file, "rb") as file:
            file.seek(max(self.offset, 0))
            return file.read(self.size)


def tar_items(file: str, prefix: str = "", offset: int = 0) -> Iterator[ImageEntry]:
    """Yield the files of a plain tar (that may lie inside another one at `offset`) and of tars inside it.

    Raises:
        UserError: no plain tar.
    """
    with open(file, "rb") as raw:
        raw.seek(offset)
        try:
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                for member in tar:
                    path = prefix + posixpath.normpath(member.name)
                    if member.isreg() and path.endswith(".tar") and not is_hidden(path):
                        yield from tar_items(file, f"{path.removesuffix('.tar')}/", member.offset_data)
                    elif member.isreg():
                        yield ImageEntry(path, file, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UserError(f"{file}: no plain tar archive ({error}); extract it and give the directory") from error


def _raise(error: OSError) -> NoReturn:
    raise error


def _directory_items(root: str, tars: bool) -> Iterator[ImageEntry]:
    """Yield the files below a directory; hidden directories by their name alone."""
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        relative = os.path.relpath(folder, root).removeprefix(".").lstrip("/")
        for name in names:
            path = os.path.join(relative, name)
            if tars and name.endswith(".tar") and not is_hidden(path):
                yield from tar_items(os.path.join(root, path), f"{path.removesuffix('.tar')}/")
            else:
                yield ImageEntry(path, root)
        for name in filter(is_hidden, folders):
            yield ImageEntry(os.path.join(relative, name), root)
        folders[:] = [name for name in folders if not is_hidden(name)]


def find_images(source: str | Path, endings: Iterable[str] | None = None, *, tars: bool = False) -> list[ImageEntry]:
    """Return the images below a directory or in a plain tar, in natural order of their paths.

    Hidden names and images of other formats are left out and counted in the log.

    Args:
        endings: of the files' names, with the dot (default: timm's, .png .jpg .jpeg).
        tars: also look into the tars of a directory.

    Raises:
        UserError: no such place, or no image there.
    """
    source = str(source)
    if not os.path.exists(source):
        raise UserError(f"{source}: no such file or directory")
    wanted = frozenset(ending.lower() for ending in endings or get_img_extensions())
    found: list[ImageEntry] = []
    hidden: list[str] = []
    other: Counter[str] = Counter()
    seen = ""
    for item in tar_items(source) if os.path.isfile(source) else _directory_items(source, tars):
        ending = os.path.splitext(item.path)[1].lower()
        if is_hidden(item.path):
            hidden.append(item.path)
        elif ending in wanted:
            found.append(item)
        else:
            other[ending] += ending in KNOWN_ENDINGS
            seen = item.path if ending == ".tar" or not seen else seen
    more = ", ".join(f"{count} {ending}" for ending, count in sorted(other.items()) if count)
    if not found:
        raise UserError(f"{source}: no images found ({', '.join(sorted(wanted))}){_instead(source, more, seen)}")
    if hidden:
        _log_once(f"{source}: {len(hidden)} hidden files or folders are left out, such as {hidden[0]}")
    if more:
        _log_once(f"{source}: images with other endings are left out ({more}); --input-key names those to read")
    return sorted(found, key=lambda item: class_order(item.path))


def _instead(source: str, more: str, seen: str) -> str:
    """What a place without images has."""
    if more:
        return f"; it has {more}"
    if seen.endswith(".tar"):
        return "; it has tar files: shards are read with --dataset wds/NAME, others must be extracted"
    return f"; it has {seen}" if seen else "; it is empty"


class Source:
    """Samples by number, as they lie: encoded bytes (a PIL image where there are no files) and the label.

    `class_names` are in the order of the labels; they and `num_classes` are None where nothing says.
    """

    class_names: list[str] | None = None
    num_classes: int | None = None
    location: str = ""  # what the samples are, for messages
    extents: Sequence[Extent] = ()  # where they lie: splits whose extents overlap share samples
    label_map: Mapping[Any, int] | None = None  # stored label -> label, None if they are the same

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, indices: Sequence[int]) -> list[RawSample | SampleError]:
        """The samples in the order asked for; the error in place of one that cannot be read."""
        return [self._guarded(index) for index in indices]

    def read_one(self, index: int) -> RawSample:
        """One sample with its stored label; whatever it raises becomes the error in place of the sample."""
        raise NotImplementedError

    def _guarded(self, index: int) -> RawSample | SampleError:
        try:
            record = self.read_one(index)
            return record._replace(label=map_label(self.label_map, record.label, record.where))
        except SampleError as error:
            return error
        except Exception as error:  # libraries raise anything on damaged samples
            return ImageError(f"{self.location} sample {index}: {type(error).__name__}: {' '.join(str(error).split())}")

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
        self.relabel(renumbering(self.class_names, names, self.location), list(names), len(names))

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
        self.location = ", ".join(shards.urls) if len(shards.urls) < 3 else f"{shards.urls[0]} to {shards.urls[-1]}"
        self.extents = [Extent(url, 0, length) for url, length in zip(shards.urls, shards.lengths, strict=True)]

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, indices: Sequence[int]) -> list[RawSample | SampleError]:
        """One pass over each shard that holds some of them."""
        found: dict[int, RawSample | SampleError] = {}
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

    def __init__(self, items: Sequence[ImageEntry], labels: Iterable[int], location: str) -> None:
        self.items, self.labels, self.location = list(items), list(labels), location
        self.extents = [Extent(location, 0, len(self.items))]

    def __len__(self) -> int:
        return len(self.items)

    def read_one(self, index: int) -> RawSample:
        """The file's bytes."""
        item = self.items[index]
        try:
            return RawSample(item.where, item.read(), self.labels[index])
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

    def __init__(self, pairs: Any, part: slice, location: str) -> None:
        self.pairs, self.location = pairs, location
        self.indices = part_of(len(pairs), part, f"the part of {location}")
        self.extents = [Extent(location, self.indices.start, self.indices.stop)]
        self.take_classes(getattr(pairs, "class_to_idx", None))

    def __len__(self) -> int:
        return len(self.indices)

    def read_one(self, index: int) -> RawSample:
        """The image that the data set makes."""
        number = self.indices[index]
        return RawSample(f"{self.location} sample {number}", *self.pairs[number])

    def arrays(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return images [N, H, W, C] and stored labels [N] of a data set that holds them so, such as CIFAR."""
        images, part = getattr(self.pairs, "data", None), slice(self.indices.start, self.indices.stop)
        return (images[part], np.asarray(self.pairs.targets)[part]) if isinstance(images, np.ndarray) else None


class HubSource(Source):
    """A Hugging Face data set: its images are not decoded, its labels are a column of classes or integers."""

    def __init__(self, dataset: Any, image_key: str, label_key: str, location: str) -> None:
        self.dataset, self.image_key, self.label_key, self.location = dataset, image_key, label_key, location
        self.extents = [Extent(location, 0, len(dataset))]
        feature = get_field(dataset.features, label_key)
        names = getattr(feature, "names", None)
        if kind_of(feature) == "string":
            names = sorted(set(dataset.unique(label_key)) - {None}, key=class_order)
            self.label_map = {name: label for label, name in enumerate(names)}
        self.take_classes({name: label for label, name in enumerate(names)} if names else None)

    def __len__(self) -> int:
        return len(self.dataset)

    def read_one(self, index: int) -> RawSample:
        """The file's bytes, from the data set itself or from where it points to."""
        row, where = self.dataset[index], f"{self.location} sample {index}"
        image, label = row[self.image_key], get_field(row, self.label_key)
        if image is None:
            raise ImageError(f"{where}: {self.image_key} is missing")
        if label is None:
            raise LabelError(f"{where}: {self.label_key} is missing")
        return RawSample(where, image["bytes"] or ImageEntry(image["path"]).read(), label)


def kind_of(feature: Any) -> str:
    """Return what a column of a Hugging Face data set holds: a feature's name, or the type of its values."""
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


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
    items: Sequence[ImageEntry], classes: Sequence[str], names: list[str], place: str, part: slice, flat: bool
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


def _evenly(items: Sequence[ImageEntry], labels: Sequence[int], part: slice, place: str) -> FileSource:
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


def _split_of_tar(items: list[ImageEntry], split: str) -> tuple[list[ImageEntry], str]:
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
    source = _evenly(
        [ImageEntry(path) for path, _ in pairs.samples], [label for _, label in pairs.samples], part, place
    )
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
            label_map, names = map_labels(class_map, source.class_names, source.location)
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
