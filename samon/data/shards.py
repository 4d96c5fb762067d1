"""WebDataset shards: which there are and how long (`_info.json`), and reading chosen samples out of one."""

import atexit
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from braceexpand import braceexpand
from webdataset.gopen import gopen, gopen_schemes, rewrite_url
from webdataset.tariterators import base_plus_ext

from samon.data.classes import map_label, unique_names
from samon.data.corrupt import DataError, ImageTooLargeError, LabelError, SampleError, ShardError
from samon.data.decode import IMAGE_KEYS
from samon.errors import UserError
from samon.files import atomic_write

_logger = logging.getLogger(__name__)

ATTEMPTS = 5  # tries per shard; between them 1, 2, 4 and 8 seconds
_SHELL = frozenset({"pipe"})
# webdataset fetches these by running curl, gsutil or ais with the URL as ONE argument, no shell in between; the
# argument starts with the scheme, so it cannot be taken for an option either.
_REMOTE = frozenset(gopen_schemes) - _SHELL - {"__default__"}


def scheme(url: str) -> str:
    """The URL's scheme if it is one that can be opened; '' for a local path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", url)
    name = found[1].lower() if found else ""
    if name in _SHELL | _REMOTE or name == "file":
        return name
    if found and url[found.end() :].startswith("//"):
        known = ", ".join(sorted(_REMOTE))
        raise UserError(f"{url}: no way to open {name}:// URLs; use a local path or one of {known}")
    return ""


def checked_url(url: str, allow_shell: bool = False) -> str:
    """The URL as it will be opened: rewritten as the environment asks, local paths made absolute.

    Raises:
        UserError: it would run a shell command and that is not allowed, or nothing can open it.
    """
    url = rewrite_url(url)
    kind = scheme(url)
    if kind in _SHELL and not allow_shell:
        raise UserError(f"{url}: runs a shell command; if you trust where it comes from, add --allow-shell-urls")
    if kind == "file":
        return os.path.abspath(re.sub("^file:(//)?", "", url))
    return url if kind else os.path.abspath(url)


def join(root: str, name: str, allow_shell: bool = False) -> str:
    """A file beside others under a root that is a directory or a URL; a name that is a URL stays as it is."""
    if scheme(name):
        return checked_url(name, allow_shell)
    return checked_url(f"{root.rstrip('/')}/{name}" if scheme(root) else os.path.join(root, name), allow_shell)


def is_local(url: str) -> bool:
    """Whether a checked URL is a file on this machine."""
    return not scheme(url)


def open_url(url: str) -> BinaryIO:
    """Open a checked URL for reading."""
    return open(url, "rb") if is_local(url) else gopen(url)


def attempts(url: str, faults: list[Any]) -> Iterator[int]:
    """0, 1, ...: one attempt at a local file; `ATTEMPTS` at a remote one, with waits between them that double.

    The caller appends to ``faults`` why an attempt failed; the last one is logged before the next attempt.
    """
    for attempt in range(1 if is_local(url) else ATTEMPTS):
        if attempt:
            wait = 2 ** (attempt - 1)
            _logger.warning("%s: %s; trying again in %d s", url, faults[-1], wait)
            time.sleep(wait)
        yield attempt


def read_url(url: str, limit: int) -> bytes:
    """The first ``limit`` bytes of a checked URL, tried as often as `attempts` says.

    Raises:
        DataError: the last attempt failed too.
    """
    faults: list[Exception] = []
    for _ in attempts(url, faults):
        try:
            with open_url(url) as file:
                return file.read(limit)
        except (OSError, EOFError) as error:
            faults.append(error)
    raise DataError(f"{url}: {faults[-1]}" + f", {len(faults)} attempts" * (len(faults) > 1)) from faults[-1]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file that other processes wait for; it is removed afterwards."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@cache
def temporary_directory() -> str:
    """A directory for copies that this process and its workers share, removed when it ends."""
    path = tempfile.mkdtemp(prefix="samon-shards-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)  # not run by workers
    return path


class ShardCache:
    """Local copies of remote shards in one directory, the least recently used removed to keep under ``max_bytes``.

    Processes may share the directory: copies appear under their final name only when complete, and removing one
    that another process has open leaves it readable there.
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int) -> None:
        self.directory = Path(directory)
        self.max_bytes = max_bytes
        self.directory.mkdir(parents=True, exist_ok=True)

    def path(self, url: str) -> Path:
        """The file that caches ``url``; two URLs with the same last part do not meet."""
        tail = re.sub(r"[^\w.-]", "_", url.rsplit("/", 1)[-1])[-80:]
        return self.directory / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{tail}"

    def open(self, url: str) -> BinaryIO:
        """Open the copy, fetching it first if need be."""
        path = self.path(url)
        if (copy := self._copy(path)) is not None:
            return copy
        with _locked(path.with_name(f"{path.name}.lock")):
            if (copy := self._copy(path)) is not None:  # another process fetched it meanwhile
                return copy
            with atomic_write(path) as target:
                # gopen's close() raises when the command that fetched failed, so an incomplete copy is never kept.
                with open_url(url) as source:
                    shutil.copyfileobj(source, target, 1 << 20)
                self._make_room(target.tell())
                return open(target.name, "rb")  # stays readable should another process remove the file at once

    def _copy(self, path: Path) -> BinaryIO | None:
        with suppress(FileNotFoundError):
            os.utime(path)  # last use, which the removal goes by
            return open(path, "rb")
        return None

    def forget(self, url: str) -> None:
        """Remove a copy that turned out to be damaged."""
        self.path(url).unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        if size > self.max_bytes:
            limit = f"the shard cache of {self.max_bytes} bytes; raise --shard-cache-size"
            raise UserError(f"a shard of {size} bytes does not fit {limit}")
        entries = []
        for path in self.directory.iterdir():
            with suppress(FileNotFoundError):  # another process was quicker
                status = path.stat()
                # A part is being written by someone, unless it was left behind long ago.
                if path.suffix not in (".part", ".lock") or time.time() - status.st_mtime > 3600:
                    entries.append((status.st_mtime_ns, status.st_size, path))
        used = sum(entry[1] for entry in entries)
        for _, entry_size, path in sorted(entries):
            if used + size <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            used -= entry_size


_logger = logging.getLogger(__name__)

MAX_BYTES = 64 << 20  # of one image or label; the largest file of ImageNet has 15 MB
_INFO_NAMES = ("_info.json", "info.json")
_TOOL = "samon-shards"


_SYNONYMS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))  # timm's, for folders


def is_hidden(path: str) -> bool:
    """Whether a relative path leads through a hidden name or the folder that macOS adds to archives."""
    parts = path.split("/")
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in parts)


def synonyms(name: str) -> tuple[str, ...]:
    """Return the names by which timm also looks for a split, its own included; () if it has no others."""
    return next((group for group in _SYNONYMS if name in group), ())


class RawSample(NamedTuple):
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
    tried = [join(root, name, allow_shell) for name in _INFO_NAMES]
    for url in tried:
        if is_local(url) and not os.path.isfile(url):
            continue
        content = read_url(url, MAX_BYTES)
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
    paths = [join(root, name, allow_shell) for name in names]
    missing = [path for path in paths if is_local(path) and not os.path.isfile(path)]
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
    if not is_local(path):
        raise UserError(f"{path}: its number of samples is not known; list it in _info.json beside it")
    _logger.info("counting the samples of %s", path)
    with open_url(path) as file:
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

    def __init__(self, image_keys: str | None, label_key: str | None, cache: ShardCache | None = None) -> None:
        self.image_keys = (image_keys or IMAGE_KEYS).lower().split(";")
        if label_key and "," in label_key:
            raise UserError(f"--target-key {label_key}: several fields at once are not supported; name one")
        self.label_key = label_key
        self.suffixes = frozenset(self.image_keys) | {"json" if label_key else "cls"}
        self.cache = cache
        self.label_map: Mapping[Any, int] | None = None

    def read(self, url: str, length: int, wanted: Sequence[int]) -> Iterator[tuple[int, RawSample | SampleError]]:
        """(position, sample) for each wanted position, ascending; what cannot be read comes as its error.

        Raises:
            DataError: the shard holds more samples than ``length``.
        """
        done, faults = 0, [""]
        for attempt in attempts(url, faults):
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

    def _scan(self, url: str, length: int, wanted: Sequence[int]) -> Iterator[tuple[int, RawSample | SampleError]]:
        if not wanted:
            return
        chosen = frozenset(wanted)
        cached = self.cache is not None and not is_local(url)
        with self.cache.open(url) if cached and self.cache else open_url(url) as file:
            for position, (key, fields) in enumerate(members_by_key(file, url, chosen, self.suffixes)):
                if position >= length:
                    more = f"holds more than the {length} samples that _info.json states"
                    raise DataError(f"{url}: {more}; write _info.json again")
                if position in chosen:
                    printable = key.encode("unicode_escape").decode()[:200]  # it goes into logs
                    yield position, self._record(f"{url} {printable}", fields)
                if position == wanted[-1] and position + 1 < length:
                    return

    def _record(self, where: str, fields: Mapping[str, bytes | SampleError]) -> RawSample | SampleError:
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
            return RawSample(where, image, map_label(self.label_map, self._label(label), where))
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
