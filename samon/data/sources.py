"""Where samples come from: a row per kind of data set, opened here for training and for evaluation alike."""

import bisect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import timm.data
from timm.data.dataset_factory import _search_split
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_factory import create_reader

from samon.data.arrays import ArrayDataset, read_npz
from samon.data.faults import ImageError, SampleError
from samon.data.shards import Record, ShardReader, ShardSet, load_split
from samon.data.urls import ShardCache
from samon.errors import UserError, user_errors

_SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test")


@dataclass(frozen=True)
class Request:
    """What is to be opened: timm's arguments of `create_dataset`, and

    - keep: the class folders to take, the others are left out (labels stay as they are);
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


class Source:
    """Samples by number, as they lie: encoded bytes (a PIL image where there are no files) and the label.

    `class_names` are in the order of the labels; they and `num_classes` are None where nothing says.
    """

    class_names: list[str] | None = None
    num_classes: int | None = None
    place: str = ""  # what the samples are: two splits of the same place are the same images

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, indices: Sequence[int]) -> list[Record | SampleError]:
        """The samples in the order asked for; the error in place of one that cannot be read."""
        raise NotImplementedError

    def renumber(self, names: list[str]) -> None:
        """Take the labels as places in `names`, which holds all of `class_names`.

        Raises:
            UserError: the labels of this kind of source are numbers already.
        """
        raise UserError(f"{self.place}: its classes are not those trained on; give --class-map, or write the set anew")

    def take_classes(self, inner: Any) -> None:
        """Classes as timm's readers and torchvision's data sets have them, if they do."""
        classes = getattr(inner, "class_to_idx", None)
        if classes:
            self.class_names, self.num_classes = sorted(classes, key=classes.__getitem__), len(classes)


class ShardSource(Source):
    """WebDataset shards; streams read `shards` with `reader` from front to back, `read` scans for a few samples."""

    def __init__(self, shards: ShardSet, reader: ShardReader) -> None:
        self.shards, self.reader = shards, reader
        self.ends = list(accumulate(shards.lengths))
        self.class_names, self.num_classes = shards.class_names, shards.num_classes
        self.place = ", ".join(shards.urls)

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


class FileSource(Source):
    """One of timm's readers, which give the opened file and the label; `name` of the set where files have none."""

    def __init__(self, reader: Any, name: str = "") -> None:
        self.reader, self.name = reader, name
        self.take_classes(reader)

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, indices: Sequence[int]) -> list[Record | SampleError]:
        """Each file's bytes."""
        return [self._read(index) for index in indices]

    def renumber(self, names: list[str]) -> None:
        """For class folders."""
        if self.class_names is None or not hasattr(self.reader, "samples"):
            return super().renumber(names)
        label = [names.index(name) for name in self.class_names]
        self.reader.samples = [(path, label[old]) for path, old in self.reader.samples]
        self.class_names, self.num_classes = names, len(names)

    def _read(self, index: int) -> Record | SampleError:
        try:
            where = f"{self.name} sample {index}" if self.name else self.reader.filename(index, absolute=True)
            file, label = self.reader[index]
            with file:
                return Record(where, file.read(), label)
        except OSError as error:
            return ImageError(f"sample {index}: {error}")


class PairSource(Source):
    """A map-style data set of (PIL image, label), such as torchvision's and our arrays."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs
        self.take_classes(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, indices: Sequence[int]) -> list[Record | SampleError]:
        """The images that the data set makes."""
        return [Record(f"sample {index}", *self.pairs[index]) for index in indices]


def _open_shards(request: Request) -> Source:
    shards = load_split(request.root or "", request.split, allow_shell=request.allow_shell_urls)
    cache = ShardCache(request.shard_cache, request.shard_cache_size) if request.shard_cache else None
    class_map = request.class_map
    if isinstance(class_map, str) and class_map and not os.path.isfile(class_map):
        raise UserError(f"--class-map {class_map}: no such file")
    reader = ShardReader(request.input_key, request.target_key or shards.label_key or None, cache)
    source = ShardSource(shards, reader)
    if class_map:
        reader.class_map = load_class_map(class_map)
        source.class_names, source.num_classes = None, max(reader.class_map.values(), default=-1) + 1
    return source


def _open_folder(request: Request) -> Source:
    root, split = request.root or "", request.split
    if not os.path.exists(root):
        raise UserError(f"--data-dir {root}: no such directory")
    folder = _search_split(root, split) if split and os.path.isdir(root) else root
    others = [name for name in _SPLIT_FOLDERS if os.path.isdir(os.path.join(root, name))]
    if split and folder == root and others:
        raise UserError(f"--data-dir {root}: no folder for split {split!r}, it has {', '.join(others)}")
    reader: Any = create_reader("", folder, class_map=request.class_map or "", input_key=request.input_key)
    source = FileSource(reader)
    source.place = os.path.realpath(folder)
    if request.keep is not None:
        names = source.class_names or []
        reader.samples = [(path, label) for path, label in reader.samples if names[label] in request.keep]
        if not reader.samples:
            raise UserError(f"{folder}: holds no images of this set in class folders; check --data-dir and --split")
    return source


def _open_arrays(request: Request) -> Source:
    images, labels = read_npz(request.name, request.root, request.split)
    source = PairSource(ArrayDataset(images, labels))
    source.num_classes = int(labels.max(initial=-1)) + 1
    return source


def _open_torch(request: Request) -> Source:
    root = request.root or "."
    return PairSource(timm.data.create_dataset(request.name, root, request.split, download=request.download))


def _open_hfds(request: Request) -> Source:
    options: Any = {"class_map": request.class_map, "trust_remote_code": request.trust_remote_code}
    options |= {"input_key": request.input_key, "target_key": request.target_key}
    return FileSource(create_reader(request.name, request.root, request.split, **options), request.name)


class Kind(NamedTuple):
    """How data sets of a prefix are opened, and what --data-dir must be for them; '' if it may be missing."""

    open: Callable[[Request], Source]
    needs: str


SOURCES = {
    "wds": Kind(_open_shards, "the directory or URL of its shards"),
    "": Kind(_open_folder, "the directory of its class folders"),
    "npz": Kind(_open_arrays, "the directory of NAME.npz"),
    "torch": Kind(_open_torch, ""),
    "hfds": Kind(_open_hfds, ""),
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
    with user_errors(f"--dataset {name or 'folder'} --data-dir {root}, split {split!r}"):
        source = SOURCES[_kind(name)].open(request)
    source.place = source.place or f"{name} {split}"
    found, given = source.num_classes, request.num_classes
    if given and found and found > given:
        raise UserError(f"{root}: split {split!r} has {found} classes, the model {given}; use --num-classes {found}")
    return source
