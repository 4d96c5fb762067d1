"""Names of splits, and parts of them such as `train[:45000]`."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from samon.errors import UserError

TRAIN_SPLITS = {"train", "training"}
EVAL_SPLITS = {"validation", "val", "valid", "eval", "evaluation", "test"}
_SYNONYMS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))  # timm's, for folders


class Extent(NamedTuple):
    """Samples `start` to `stop` (exclusive) of a place on disk: how two splits are known to share samples."""

    place: str
    start: int
    stop: int


def overlap(first: Sequence[Extent], second: Sequence[Extent]) -> str:
    """Return the place of which both have some sample, or ''."""
    places: dict[str, list[Extent]] = {}
    for extent in second:
        places.setdefault(extent.place, []).append(extent)
    pairs = ((a, b) for a in first for b in places.get(a.place, ()))
    return next((a.place for a, b in pairs if max(a.start, b.start) < min(a.stop, b.stop)), "")


def synonyms(name: str) -> tuple[str, ...]:
    """Return the names by which timm also looks for a split, its own included; () if it has no others."""
    return next((group for group in _SYNONYMS if name in group), ())


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
