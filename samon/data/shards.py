"""WebDataset shards: the contents of `_info.json`, and reading chosen samples."""

import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO, NamedTuple

from PIL import Image
from timm.data.readers.targets import get_field

from samon.data.corrupt import DataError, SampleError
from samon.data.decode import IMAGE_KEYS
from samon.data.urls import ShardCache, import_webdataset, is_local, iterate_attempts, join_url, open_url
from samon.errors import UserError, error_line, nearest

_logger = logging.getLogger(__name__)

MAX_BYTES = 64 << 20  # of one image or label; the largest file of ImageNet has 15 MB
_INFO_NAMES = ("_info.json", "info.json")
TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "val", "valid", "eval", "evaluation", "test")


class RawSample(NamedTuple):
    """One sample as stored, not decoded."""

    where: str  # shard and key, or file, for messages
    image: bytes | Image.Image  # a PIL image if the data set holds no encoded ones
    label: object  # an integer unless the data set is wrong


SampleOrError = RawSample | SampleError


def is_hidden(path: str) -> bool:
    """Whether a relative path contains a hidden name or the folder that macOS adds to archives."""
    parts = path.split("/")
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in parts)


@dataclass(frozen=True)
class ShardSet:
    """A split: the URLs of its shards, their numbers of samples, and the classes if `_info.json` lists them."""

    urls: tuple[str, ...]
    lengths: tuple[int, ...]
    num_classes: int | None = None
    class_names: list[str] | None = None
    digests: Mapping[str, str] = field(default_factory=dict)  # SHA-256 by URL, where `_info.json` lists it
    label_key: str = ""  # the field of the .json member that holds the label, timm's `alt_label` unless one is given


def _load_info(root: str, allow_shell: bool) -> tuple[str, dict[str, object]]:
    """Return the URL and content of the info file; an empty content if a local directory has none."""
    urls = [join_url(root, name, allow_shell) for name in _INFO_NAMES]
    url = next((url for url in urls if not is_local(url) or os.path.isfile(url)), None)
    if url is None:
        return urls[0], {}
    failures: list[str] = []
    for _ in iterate_attempts(url, failures):
        try:
            with open_url(url) as file:
                content = file.read(MAX_BYTES)
            break
        except (OSError, EOFError) as error:
            failures.append(str(error))
    else:
        raise DataError(f"{url}: {failures[-1]}, {len(failures)} attempts")
    try:
        info = json.loads(content)
    except ValueError as error:
        raise UserError(f"{url}: not JSON: {error}") from error
    if not isinstance(info, dict):
        raise UserError(f"{url}: not a JSON object; write it with samon-shards")
    return url, info


def _check_split(where: str, split: str, entry: object) -> tuple[list[str], list[int]]:
    """Return file names and lengths of one split of an info file."""
    keys = ("filenames", "shard_lengths", "num_samples")
    names, lengths, total = (entry.get(key) for key in keys) if isinstance(entry, Mapping) else (None,) * 3
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise UserError(f"{where}: split {split} has no list of filenames")
    if not (isinstance(lengths, list) and all(type(n) is int and n >= 0 for n in lengths)):
        raise UserError(f"{where}: split {split} has no list of shard_lengths (integers)")
    if len(names) != len(lengths) or total != sum(lengths):
        counts = f"{len(names)} filenames, {len(lengths)} shard_lengths that add up to {sum(lengths)}"
        raise UserError(f"{where}: split {split} contradicts itself: {counts}, num_samples {total}; write it again")
    return names, lengths


def load_split(
    root: str, split: str, image_keys: str | None = None, label_key: str | None = None, *, allow_shell: bool = False
) -> ShardSet:
    """Find a split's shards: by its name in the info file of `root`, or by a brace pattern (`a-{00..15}.tar|5000`).

    The info file also describes the files of a pattern; local shards that it does not list are counted.

    Args:
        image_keys, label_key: see `ShardReader`. A `label_key` replaces the info file's.

    Raises:
        UserError: no such split or file, or an info file that contradicts itself.
    """
    where, info = _load_info(root, allow_shell)
    splits = info.get("splits")
    splits = splits if isinstance(splits, dict) else {}
    synonyms = next((group for group in (TRAIN_SPLITS, EVAL_SPLITS[:-1]) if split in group), ())  # timm's, for folders
    split = next((name for name in (split, *synonyms) if name in splits), split)
    pattern, _, expected = split.partition("|")
    if split in splits:
        splits = {split: splits[split]}
        names = _check_split(where, split, splits[split])[0]
    elif ".tar" in split or ".." in split:
        names = import_webdataset("webdataset.shardlists").expand_urls(pattern)
    else:
        known_splits = f"it has {', '.join(sorted(splits))}" if splits else "write it with samon-shards"
        do = f'{known_splits}, or name the shards instead, like "train-{{0000..0127}}.tar"'
        raise UserError(f"{where}: no split {split!r}{nearest(split, splits)}; {do}")
    urls = [join_url(root, name, allow_shell) for name in names]
    if len(set(urls)) < len(urls):
        raise UserError(f"split {split!r} lists {max(urls, key=urls.count)} twice; its samples would count twice")
    if missing := [url for url in urls if is_local(url) and not os.path.isfile(url)]:
        raise UserError(f"{missing[0]}: no such shard ({len(missing)} of {len(urls)} are missing)")
    known: dict[str, int] = {}
    digests: dict[str, str] = {}
    label_keys: set[str] = set()
    for name, entry in splits.items():
        files, counts = _check_split(where, name, entry)
        listed = [join_url(root, file, allow_shell=True) for file in files]  # which is not opened here
        known |= zip(listed, counts, strict=True)
        digests |= zip(listed, entry.get("sha256", ()), strict=False)
        if set(urls).intersection(listed):
            label_keys.add(str(entry.get("alt_label") or ""))
    if not label_key and len(label_keys) > 1:
        raise UserError(f"{where}: the shards {split} have different kinds of labels; name one by --target-key")
    reader = ShardReader(image_keys, label_key or "".join(label_keys))
    lengths = [known[url] if url in known else _count_samples(url, reader.suffixes) for url in urls]
    if expected and expected != str(sum(lengths)):
        raise UserError(f"split {split!r} says {expected} samples, its shards hold {sum(lengths)}")
    return ShardSet(tuple(urls), tuple(lengths), *_load_classes(where, info), digests, reader.label_key)


def _load_classes(where: str, info: Mapping[str, object]) -> tuple[int | None, list[str] | None]:
    """Return the number of classes and their names, None if the info file does not list them."""
    count, listed = info.get("num_classes"), info.get("class_names")
    count = count if isinstance(count, int) else None
    if not isinstance(listed, list):
        return count, None
    names = [str(name) for name in listed]
    if len(set(names)) < len(names):
        raise UserError(f"{where}: two classes are called {max(names, key=names.count)!r}")
    if count is not None and count != len(names):
        raise UserError(f"{where}: {count} classes, but {len(names)} class_names")
    return len(names) or None, names


def _count_samples(url: str, suffixes: frozenset[str]) -> int:
    if not is_local(url):
        raise UserError(f"{url}: its number of samples is unknown; list it in the _info.json of its directory")
    _logger.info("counting the samples of %s", url)
    with open_url(url) as file:
        return sum(1 for _ in read_members(file, url, range(0), suffixes))


def read_members(
    file: BinaryIO, url: str, wanted: range | frozenset[int], suffixes: frozenset[str]
) -> Iterator[tuple[str, dict[str, bytes | SampleError]]]:
    """Yield each sample of a tar: its key, and its members by suffix if its position is in `wanted`.

    A sample is a run of members with one key (webdataset's rule: the name up to the first dot); what this rule would
    lose is a DataError. Other samples are skipped unread, which webdataset's own iterator cannot do. Names are never
    used as paths, links and devices are ignored, and at most `MAX_BYTES` of a member are read.
    """
    seekable = getattr(file, "seekable", lambda: False)()
    with tarfile.open(fileobj=file, mode="r:*" if seekable else "r|*") as tar:
        position = 0
        for key, members in groupby(_iterate_members(tar, suffixes), itemgetter(0)):
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
                    fields[suffix] = SampleError(f"{url} {key}: two members end in .{suffix}")
                elif member.size > MAX_BYTES:
                    fields[suffix] = SampleError(f"{url} {key}.{suffix}: {member.size} bytes, limit {MAX_BYTES}")
                else:
                    data = tar.extractfile(member)
                    fields[suffix] = b"" if data is None else data.read()
            # `a.seg.png` next to a.jpg is another image of it; `a.v2.jpg` alone, or a.v2.cls, is a lost sample.
            if lost := [name for name in dotted if not is_sample or name.endswith(".cls")]:
                do = "a sample's name ends at its first dot; rename it, or pack the data with samon-shards"
                raise DataError(f"{url} {lost[0]}: {do}")
            if is_sample:
                yield key, fields
                position += 1


def _iterate_members(tar: tarfile.TarFile, suffixes: frozenset[str]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield key, suffix and header of each file whose name ends in one of `suffixes`, possibly after other suffixes."""
    base_plus_ext = import_webdataset("webdataset.tariterators").base_plus_ext
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header in memory
        key, suffix = base_plus_ext(member.name)
        suffix = (suffix or "").lower()
        hidden = is_hidden(member.name) or re.match("__[^/]*__(/|$)", member.name)
        if member.isreg() and not hidden and (suffix in suffixes or suffix.rpartition(".")[2] in suffixes):
            yield key, suffix, member


class ShardReader:
    """Reads chosen samples of shards, with retries for remote ones and a local cache if given.

    Args:
        image_keys: suffixes of images, separated by semicolons (default `IMAGE_KEYS`).
        label_key: field of the .json member that holds the label; if empty, the .cls member is the label.
    """

    def __init__(self, image_keys: str | None, label_key: str, cache: ShardCache | None = None) -> None:
        self.image_keys = (image_keys or IMAGE_KEYS).lower().split(";")
        if label_key and "," in label_key:
            raise UserError(f"--target-key {label_key}: several fields are not supported; name one")
        self.label_key = label_key
        self.label_suffix = "json" if label_key else "cls"
        self.suffixes = frozenset({*self.image_keys, self.label_suffix})
        self.cache = cache

    def read(self, url: str, length: int, wanted: Sequence[int]) -> Iterator[tuple[int, SampleOrError]]:
        """Yield (position, sample) for each wanted position, ascending; the error in place of an unreadable sample.

        Raises:
            DataError: the shard holds more samples than `length`.
        """
        done, failures = 0, [""]
        for attempt in iterate_attempts(url, failures):
            if attempt and self.cache:
                self.cache.path(url).unlink(missing_ok=True)  # it may be damaged
            try:
                for item in self._scan(url, length, wanted[done:]):
                    yield item
                    done += 1
                failures.append(f"ends before sample {length}")
            except DataError:
                raise
            except Exception as error:  # a damaged archive can make tarfile and the decompressors raise anything
                failures.append(f"{type(error).__name__}: {error_line(error)}")
            if done == len(wanted):
                return
        for position in wanted[done:]:
            yield position, SampleError(f"{url}: {failures[-1]}; sample {position} of {length} cannot be read")

    def _scan(self, url: str, length: int, wanted: Sequence[int]) -> Iterator[tuple[int, SampleOrError]]:
        if not wanted:
            return
        positions = frozenset(wanted)
        with self.cache.open(url) if self.cache and not is_local(url) else open_url(url) as file:
            for position, (key, fields) in enumerate(read_members(file, url, positions, self.suffixes)):
                if position >= length:
                    more = f"holds more than the {length} samples that _info.json states"
                    raise DataError(f"{url}: {more}; write _info.json again")
                if position in positions:
                    printable = key.encode("unicode_escape").decode()[:200]  # it goes into logs
                    yield position, self._make_sample(f"{url} {printable}", fields)
                if position == wanted[-1] and position + 1 < length:
                    return

    def _make_sample(self, where: str, fields: Mapping[str, bytes | SampleError]) -> SampleOrError:
        no_image = SampleError(f"{where}: no image, none of .{', .'.join(self.image_keys)}")
        image = next((fields[key] for key in self.image_keys if key in fields), no_image)
        label = fields.get(self.label_suffix, SampleError(f"{where}: no label, no {self.label_suffix} member"))
        if isinstance(image, SampleError):
            return image
        if isinstance(label, SampleError):
            return label
        try:
            return RawSample(where, image, self._parse_label(label))
        except Exception as error:  # JSON of any depth and type; int() of any bytes
            return SampleError(f"{where}: {type(error).__name__}: {error_line(error)}")

    def _parse_label(self, raw: bytes) -> int:
        if self.label_key:
            value = get_field(json.loads(raw), self.label_key)
            if type(value) is not int:
                raise TypeError(f"{self.label_key} is {value!r:.40}, not an integer")
            return value
        if not re.fullmatch(rb"\s*-?\d{1,18}\s*", raw):
            raise ValueError(f"label {raw[:40]!r} is not an integer")
        return int(raw)
