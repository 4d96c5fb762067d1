"""WebDataset shards: which there are and how long (`_info.json`), and reading chosen samples out of one."""

import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO, NamedTuple

from braceexpand import braceexpand
from webdataset.tariterators import base_plus_ext

from samon.data import urls
from samon.data.classes import map_label, unique_names
from samon.data.corrupt import DataError, ImageTooLargeError, LabelError, SampleError, ShardError
from samon.data.decode import IMAGE_KEYS
from samon.data.folders import is_hidden
from samon.data.splits import synonyms
from samon.errors import UserError

_logger = logging.getLogger(__name__)

MAX_BYTES = 64 << 20  # of one image or label; the largest file of ImageNet has 15 MB
_INFO_NAMES = ("_info.json", "info.json")
_TOOL = "samon-shards"


class Record(NamedTuple):
    """One sample as it lies in its shard or file, nothing decoded."""

    where: str  # shard and key, for messages
    image: Any  # bytes; a PIL image where a data set has no files
    label: Any


@dataclass(frozen=True)
class ShardSet:
    """A split: its shards' URLs, how many samples each holds, and the classes if they are written down."""

    urls: tuple[str, ...]
    lengths: tuple[int, ...]
    num_classes: int | None = None
    class_names: list[str] | None = None
    label_key: str = ""  # timm's `alt_label`: the field of the .json member that holds the label


def _load_info(root: str, allow_shell: bool) -> tuple[str, dict[str, Any]]:
    """The first info file there is and its content; an empty one when there is none in a local directory."""
    tried = [urls.join(root, name, allow_shell) for name in _INFO_NAMES]
    for url in tried:
        if urls.is_local(url) and not os.path.isfile(url):
            continue
        content = urls.read_url(url, MAX_BYTES)
        try:
            info = json.loads(content)
        except ValueError as error:
            raise UserError(f"{url}: not JSON: {error}") from error
        if not isinstance(info, dict):
            raise UserError(f"{url}: holds no JSON object; write it with {_TOOL}")
        return url, info
    return tried[0], {}


def _split_entry(where: str, split: str, entry: Any) -> tuple[list[str], list[int]]:
    """File names and lengths of one split of an info file, checked against each other."""
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: split {split} is no object")
    names, lengths = entry.get("filenames"), entry.get("shard_lengths")
    if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise UserError(f"{where}: split {split} has no list of filenames")
    if not (isinstance(lengths, list) and all(type(n) is int and n >= 0 for n in lengths)):
        raise UserError(f"{where}: split {split} has no list of shard_lengths (integers)")
    total = entry.get("num_samples")
    if len(names) != len(lengths) or total != sum(lengths):
        counts = f"{len(names)} filenames, {len(lengths)} shard_lengths that add up to {sum(lengths)}"
        raise UserError(f"{where}: split {split} contradicts itself: {counts}, num_samples {total}; write it again")
    return names, lengths


def load_split(root: str, split: str, *, allow_shell: bool = False) -> ShardSet:
    """Find a split's shards: by name in the info file under ``root``, or as a brace pattern (`a-{00..15}.tar|5000`).

    A pattern's lengths come from the info file too if it lists those files; local shards that it does not list are
    counted by reading their headers.

    Raises:
        UserError: no such split or file, or an info file that contradicts itself.
    """
    where, info = _load_info(root, allow_shell)
    splits = info.get("splits")
    splits = splits if isinstance(splits, dict) else {}
    split = next((name for name in (split, *synonyms(split)) if name in splits), split)
    if split in splits:
        names, lengths = _split_entry(where, split, splits[split])
    elif ".tar" in split or ".." in split:
        names = [name for part in split.split("|")[0].split("::") for name in braceexpand(part)]
        entries = [_split_entry(where, other, entry) for other, entry in splits.items()]
        known = {name: length for entry in entries for name, length in zip(*entry, strict=True)}
        lengths = [known.get(name, -1) for name in names]
    elif splits:
        near = [f"; did you mean {name!r}?" for name in get_close_matches(split, list(splits), 1)]
        raise UserError(f"{where}: no split {split!r}{''.join(near) or ';'} it has {', '.join(sorted(splits))}")
    else:
        what = f"write it with {_TOOL}, or name the shards instead of split {split!r}, like"
        raise UserError(f'{where}: not found or without splits; {what} "train-{{0000..0127}}.tar"')
    paths = [urls.join(root, name, allow_shell) for name in names]
    missing = [path for path in paths if urls.is_local(path) and not os.path.isfile(path)]
    if missing:
        raise UserError(f"{missing[0]}: no such shard ({len(missing)} of {len(paths)} are missing)")
    lengths = [_count(path) if n < 0 else n for path, n in zip(paths, lengths, strict=True)]
    expected = split.partition("|")[2] if split not in splits else ""
    if expected and expected != str(sum(lengths)):
        raise UserError(f"split {split!r} says {expected} samples, its shards hold {sum(lengths)}")
    classes, class_names = info.get("num_classes"), info.get("class_names")
    classes = classes if isinstance(classes, int) else None
    class_names = unique_names(class_names, classes, where) if isinstance(class_names, list) else None
    classes = len(class_names) if class_names else classes
    label_key = str(splits[split].get("alt_label", "")) if split in splits else ""
    return ShardSet(tuple(paths), tuple(lengths), classes, class_names, label_key)


def _count(path: str) -> int:
    if not urls.is_local(path):
        raise UserError(f"{path}: its number of samples is not known; list it in _info.json beside it")
    _logger.info("counting the samples of %s", path)
    with urls.open_url(path) as file:
        return sum(1 for _ in members_by_key(file, path, range(0), frozenset(IMAGE_KEYS.split(";")) | {"cls"}))


def members_by_key(
    file: BinaryIO, url: str, wanted: range | frozenset[int], suffixes: frozenset[str]
) -> Iterator[tuple[str, dict[str, bytes | SampleError]]]:
    """Each sample of a tar: its key, and for those whose position is wanted its members by suffix.

    A sample is a run of members with one key (webdataset's rule: the name up to the first dot). Other samples are
    passed over unread, which webdataset's own iterator cannot do. Names are never used as paths, links and devices
    are ignored, and no more than `MAX_BYTES` of a member is read.
    """
    seekable = getattr(file, "seekable", lambda: False)()
    with tarfile.open(fileobj=file, mode="r:*" if seekable else "r|*") as tar:
        position = 0
        for key, members in groupby(_members(tar, suffixes), itemgetter(0)):
            fields: dict[str, bytes | SampleError] = {}
            dotted, is_sample = [], False
            for _, suffix, member in members:
                if suffix not in suffixes:
                    dotted.append(member.name)
                    continue
                is_sample = True
                if position not in wanted:
                    continue
                if suffix in fields:
                    fields[suffix] = ShardError(f"{url} {key}: two members end in .{suffix}")
                elif member.size > MAX_BYTES:
                    fields[suffix] = ImageTooLargeError(f"{url} {key}.{suffix}: {member.size} bytes, limit {MAX_BYTES}")
                else:
                    data = tar.extractfile(member)
                    fields[suffix] = b"" if data is None else data.read()
            # `a.seg.png` beside a.jpg is another image of it; `a.v2.jpg` alone, or a.v2.cls, is a sample that got lost.
            if lost := [name for name in dotted if not is_sample or name.endswith(".cls")]:
                rename = "a sample's name ends at its first dot; rename it, or pack the set by samon-shards"
                raise DataError(f"{url} {lost[0]}: {rename}")
            if is_sample:
                yield key, fields
                position += 1


def _members(tar: tarfile.TarFile, suffixes: frozenset[str]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, suffix and header of each file whose name ends in one of ``suffixes``, also after a suffix with dots."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
        key, suffix = base_plus_ext(member.name)
        suffix = (suffix or "").lower()
        hidden = is_hidden(member.name) or re.match("__[^/]*__(/|$)", member.name)
        if member.isreg() and suffix.rpartition(".")[2] in suffixes and not hidden:
            yield key, suffix, member


class ShardReader:
    """Reads chosen samples of shards, with retries for remote ones and a local cache if asked."""

    def __init__(self, image_keys: str | None, label_key: str | None, cache: urls.ShardCache | None = None) -> None:
        self.image_keys = (image_keys or IMAGE_KEYS).lower().split(";")
        if label_key and "," in label_key:
            raise UserError(f"--target-key {label_key}: several fields at once are not supported; name one")
        self.label_key = label_key
        self.suffixes = frozenset(self.image_keys) | {"json" if label_key else "cls"}
        self.cache = cache
        self.label_map: Mapping[Any, int] | None = None

    def read(self, url: str, length: int, wanted: Sequence[int]) -> Iterator[tuple[int, Record | SampleError]]:
        """(position, sample) for each wanted position, ascending; what cannot be read comes as its error.

        Raises:
            DataError: the shard holds more samples than ``length``.
        """
        done, faults = 0, [""]
        for attempt in urls.attempts(url, faults):
            if attempt and self.cache:
                self.cache.forget(url)
            try:
                for item in self._scan(url, length, wanted[done:]):
                    yield item
                    done += 1
                faults.append(f"ends before sample {length}")
            except DataError:
                raise
            except Exception as error:  # a damaged archive can make tarfile and the decompressors raise anything
                faults.append(f"{type(error).__name__}: {error}")
            if done == len(wanted):
                return
        for position in wanted[done:]:
            yield position, ShardError(f"{url}: {faults[-1]}; sample {position} of {length} cannot be read")

    def _scan(self, url: str, length: int, wanted: Sequence[int]) -> Iterator[tuple[int, Record | SampleError]]:
        if not wanted:
            return
        chosen = frozenset(wanted)
        cached = self.cache is not None and not urls.is_local(url)
        with self.cache.open(url) if cached and self.cache else urls.open_url(url) as file:
            for position, (key, fields) in enumerate(members_by_key(file, url, chosen, self.suffixes)):
                if position >= length:
                    more = f"holds more than the {length} samples that _info.json states"
                    raise DataError(f"{url}: {more}; write _info.json again")
                if position in chosen:
                    printable = key.encode("unicode_escape").decode()[:200]  # it goes into logs
                    yield position, self._record(f"{url} {printable}", fields)
                if position == wanted[-1] and position + 1 < length:
                    return

    def _record(self, where: str, fields: Mapping[str, bytes | SampleError]) -> Record | SampleError:
        image = next((fields[key] for key in self.image_keys if key in fields), None)
        if image is None:
            return ShardError(f"{where}: no image, none of .{', .'.join(self.image_keys)}")
        label = fields.get("json" if self.label_key else "cls")
        if label is None:
            return LabelError(f"{where}: no label, no {'json' if self.label_key else 'cls'} member")
        for value in (image, label):
            if isinstance(value, SampleError):
                return value
        try:
            return Record(where, image, map_label(self.label_map, self._label(label), where))
        except LabelError as error:
            return error
        except Exception as error:  # JSON of any depth and type; int() of any bytes
            return LabelError(f"{where}: {type(error).__name__}: {error}")

    def _label(self, raw: Any) -> int:
        if self.label_key:
            value: Any = json.loads(raw)
            for part in [self.label_key] if self.label_key in value else self.label_key.split("/"):
                value = value[part]
            if type(value) is not int:
                raise TypeError(f"{self.label_key} is {value!r:.40}, no integer")
            return value
        if not re.fullmatch(rb"\s*-?\d{1,18}\s*", raw):
            raise ValueError(f"label {raw[:40]!r} is no integer")
        return int(raw)
