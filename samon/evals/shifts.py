"""The ImageNet shift sets, each with its own label convention.

A shift set never needs a class map: what its folders (or the ``class_names`` in a shard set's ``_info.json``)
are called decides the label. A label is a row of a table [rows, 1000] of the ImageNet classes that count as
right.
"""

import itertools
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from samon.errors import UserError, reraise_as_user_error

TIMM = files("timm.data") / "_info"
# How logits are read: (columns the prediction is restricted to, label sets [rows, classes]); None for plain.
Scoring = tuple[Tensor | list[int] | None, Tensor | None]


@dataclass(frozen=True)
class ShiftSet:
    """A row of the table below. ``named``: how class names turn into ImageNet indices."""

    named: str  # 'synset', 'integer', 'objectnet' or 'real' (by file name)
    classes: int
    images: int
    only: str = ""  # the subset of classes ('a', 'r') that predictions are restricted to
    border: int = 0  # pixels cut off on every side before anything else
    keeps_size: bool = False  # published at the network's input size, and measured without another resize


SETS = {
    "imagenet": ShiftSet("synset", 1000, 50_000),
    "imagenet-real": ShiftSet("real", 1000, 50_000),
    "imagenet-c": ShiftSet("synset", 1000, 50_000, keeps_size=True),  # each corruption at each severity
    "imagenetv2-matched-frequency": ShiftSet("integer", 1000, 10_000),
    "imagenetv2-threshold0.7": ShiftSet("integer", 1000, 10_000),
    "imagenetv2-top-images": ShiftSet("integer", 1000, 10_000),
    "imagenet-r": ShiftSet("synset", 200, 30_000, only="r"),
    "imagenet-a": ShiftSet("synset", 200, 7_500, only="a"),
    "imagenet-sketch": ShiftSet("synset", 1000, 50_889),
    "objectnet": ShiftSet("objectnet", 113, 18_574, border=2),
}


def _timm_lines(name: str) -> list[str]:
    return (TIMM / name).read_text().split()


def synsets() -> list[str]:
    """ImageNet's 1000 classes in the order of their indices."""
    return _timm_lines("imagenet_synsets.txt")


def subset_indices(letter: str) -> list[int]:
    """The 200 ImageNet indices of ImageNet-A or ImageNet-R, from timm's lists."""
    return [int(line) for line in _timm_lines(f"imagenet_{letter}_indices.txt")]


def objectnet_classes() -> dict[str, list[int]]:
    """ObjectNet folder -> ImageNet indices, for the 113 classes that both have."""
    return json.loads(Path(__file__).with_name("objectnet_to_imagenet.json").read_text())


def real_labels(path: str | None = None) -> Tensor:
    """ReaL: [50000, 1000] bool, the labels of validation image 1, 2, ...; timm's file unless ``path`` is given.

    Raises:
        UserError: the file does not hold such labels.
    """
    file = Path(path) if path else TIMM / "imagenet_real_labels.json"
    with reraise_as_user_error(f"--real-labels {path}"):
        rows = json.loads(file.read_text())
    whole = isinstance(rows, list) and len(rows) == 50_000 and all(isinstance(row, list) for row in rows)
    if not whole or not all(type(label) is int and 0 <= label < 1000 for row in rows for label in row):
        raise UserError(f"--real-labels {path}: must hold 50000 lists of classes 0..999, one for each validation image")
    return _table(rows)


def class_indices(path: str, classes: int) -> list[int]:
    """The classes in a file of --valid-labels, ascending as in timm's validate: a label is a place among them.

    Raises:
        UserError: no such file, or a word in it that is no index of one of the model's ``classes``.
    """
    with reraise_as_user_error(f"--valid-labels {path}"):
        words = Path(path).read_text().split()
    for word in words or [""]:
        if not word.isdecimal() or int(word) >= classes:
            raise UserError(
                f"--valid-labels {path}: {word!r} is no class; write numbers in 0..{classes - 1}, one per line"
            )
    return sorted(set(map(int, words)))


def _table(right: list[list[int]]) -> Tensor:
    """[rows, 1000] bool of lists of classes."""
    table = torch.zeros(len(right), 1000, dtype=torch.bool)
    rows = [row for row, classes in enumerate(right) for _ in classes]
    table[rows, list(itertools.chain(*right))] = True
    return table


def validation_number(name: str) -> int:
    """0-based number of an ImageNet validation image, from ILSVRC2012_val_00000001.JPEG (or that shard key)."""
    number = re.search(r"ILSVRC2012_val_(\d{8})", name)
    if number is None or not 1 <= int(number[1]) <= 50_000:
        names = "ILSVRC2012_val_00000001.JPEG ... 00050000.JPEG"
        raise UserError(f"{name}: labels of ImageNet's validation images go by their own file names, {names}")
    return int(number[1]) - 1


def label_table(kind: str, names: list[str] | None) -> Tensor:
    """[rows, 1000] bool: the ImageNet classes that are right for label 0, 1, ..., named ``names``, in a set of `SETS`.

    Raises:
        UserError: a name that is none of the set's (ObjectNet's other 200 classes get an empty row).
    """
    named, only = SETS[kind].named, SETS[kind].only
    if named == "real":
        return real_labels()
    if names is None:
        raise UserError("shards of a shift set need class_names in _info.json; write them with samon-shards")
    every, inside = synsets(), subset_indices(only) if only else range(1000)
    known = {str(i) if named == "integer" else every[i]: [i] for i in inside}
    if named == "objectnet":
        known = objectnet_classes()
    unknown = [name for name in names if name not in known]
    if (unknown and named != "objectnet") or len(unknown) == len(names):
        form = {"synset": "ImageNet synset (n01440764)", "integer": "integer 0..999"}.get(named, "ObjectNet class")
        what = f"not among the {len(known)} classes of {kind}" if only and unknown[0] in every else f"no {form}"
        raise UserError(f"class folder {unknown[0]!r} is {what}; check the data set and its directory")
    return _table([known.get(name, []) for name in names])


def kept(kind: str) -> set[str] | None:
    """The class folders that are read, where a set has others as well."""
    return set(objectnet_classes()) if kind == "objectnet" else None


def mismatch(kind: str, **found: int) -> str:
    """What differs from the numbers of ``classes`` and ``images`` as published, or ''."""
    published = {what: getattr(SETS[kind], what) for what in found}
    return "; ".join(f"{n} {what}, published {published[what]}" for what, n in found.items() if n != published[what])


def scorings(kind: str, table: Tensor) -> dict[str, Scoring]:
    """{name of the reading: how logits are read}, the set's own first.

    ImageNet itself is also read on the 200 classes of A and R (their clean-subset accuracy); ObjectNet also
    with predictions restricted to the indices of its 113 classes.
    """
    if letter := SETS[kind].only:
        return {"200 classes": (subset_indices(letter), table)}
    readings: dict[str, Scoring] = {"1000 classes": (None, table)}
    if kind == "objectnet":
        readings["113 classes"] = (sorted(set(itertools.chain(*objectnet_classes().values()))), table)
    if kind == "imagenet":
        for letter in "ar":
            columns = subset_indices(letter)
            inside = torch.zeros_like(table)
            inside[:, columns] = table[:, columns]
            readings[f"clean subset of imagenet-{letter}"] = (columns, inside)
    return readings
