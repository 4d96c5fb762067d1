"""ImageNet and its distribution-shift sets: how class folders and file names map to the 1000 ImageNet classes.

A shift set needs no class map: the names of its folders (or `class_names` in the `_info.json` of its shards) determine
the labels. Which classes count as right for a label is a row of a table, bool [labels, 1000].
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from samon.errors import UserError, reraise_as_user_error

_TIMM_INFO = files("timm.data") / "_info"


@dataclass(frozen=True)
class ImageNetSet:
    """A published data set with ImageNet classes.

    Attributes:
        names: what a class folder's name is: "synset", "integer", "objectnet"; "real": labels go by file name (ReaL).
        classes: published number of classes.
        images: published number of images.
        subset: "a" or "r" if predictions are restricted to the 200 classes of ImageNet-A or ImageNet-R.
        border: pixels to crop from every side before any other transform.
        keeps_size: images of the model's input size are neither resized nor cropped.
    """

    names: str
    classes: int
    images: int
    subset: str = ""
    border: int = 0
    keeps_size: bool = False


SETS = {
    "imagenet": ImageNetSet("synset", 1000, 50_000),
    "imagenet-real": ImageNetSet("real", 1000, 50_000),
    "imagenet-c": ImageNetSet("synset", 1000, 50_000, keeps_size=True),  # each corruption at each severity
    "imagenetv2-matched-frequency": ImageNetSet("integer", 1000, 10_000),
    "imagenetv2-threshold0.7": ImageNetSet("integer", 1000, 10_000),
    "imagenetv2-top-images": ImageNetSet("integer", 1000, 10_000),
    "imagenet-r": ImageNetSet("synset", 200, 30_000, subset="r"),
    "imagenet-a": ImageNetSet("synset", 200, 7_500, subset="a"),
    "imagenet-sketch": ImageNetSet("synset", 1000, 50_889),
    "objectnet": ImageNetSet("objectnet", 113, 18_574, border=2),
}


def synsets() -> list[str]:
    """The 1000 ImageNet synsets in label order."""
    return (_TIMM_INFO / "imagenet_synsets.txt").read_text().split()


def subset_indices(letter: str) -> list[int]:
    """The 200 ImageNet classes of ImageNet-A ("a") or ImageNet-R ("r"), from timm's lists."""
    return [int(line) for line in (_TIMM_INFO / f"imagenet_{letter}_indices.txt").read_text().split()]


def objectnet_classes() -> dict[str, list[int]]:
    """ImageNet classes by ObjectNet folder, for the 113 ObjectNet classes that overlap with ImageNet."""
    return json.loads(Path(__file__).with_name("objectnet_to_imagenet.json").read_text())


def real_labels(path: str = "") -> Tensor:
    """ReaL labels of the ImageNet validation images in order, bool [50000, 1000]; timm's file if `path` is empty."""
    file = Path(path) if path else _TIMM_INFO / "imagenet_real_labels.json"
    with reraise_as_user_error(f"--real-labels {path}"):
        rows = json.loads(file.read_text())
    valid = isinstance(rows, list) and len(rows) == 50_000 and all(isinstance(row, list) for row in rows)
    if not valid or not all(type(label) is int and 0 <= label < 1000 for row in rows for label in row):
        raise UserError(f"--real-labels {path}: expected 50000 lists of classes 0..999, one per validation image")
    return _label_table(rows)


def label_table(name: str, class_names: Sequence[str] | None) -> Tensor:
    """The classes that count as right for each label of a set, bool [labels, 1000].

    Args:
        name: a key of `SETS`.
        class_names: the data set's classes in label order.

    Raises:
        UserError: a class does not belong to the set. ObjectNet's other 200 classes get an empty row instead.
    """
    kind = SETS[name]
    if kind.names == "real":
        return real_labels()
    if class_names is None:
        raise UserError("shards of a shift set need class_names in _info.json; write them with samon-shards")
    all_synsets, indices = synsets(), subset_indices(kind.subset) if kind.subset else range(1000)
    known = {str(i) if kind.names == "integer" else all_synsets[i]: [i] for i in indices}
    if kind.names == "objectnet":
        known = objectnet_classes()
    unknown = [folder for folder in class_names if folder not in known]
    if (unknown and kind.names != "objectnet") or len(unknown) == len(class_names):
        form = {"synset": "ImageNet synset (n01440764)", "integer": "integer 0..999"}.get(kind.names, "ObjectNet class")
        fault = f"not among the {len(known)} classes of {name}"
        if not kind.subset or unknown[0] not in all_synsets:
            fault = f"no {form}"
        raise UserError(f"class folder {unknown[0]!r} is {fault}; check the data set and its directory")
    return _label_table([known.get(folder, []) for folder in class_names])


def _label_table(classes: list[list[int]]) -> Tensor:
    table = torch.zeros(len(classes), 1000, dtype=torch.bool)
    rows = [row for row, indices in enumerate(classes) for _ in indices]
    table[rows, list(itertools.chain(*classes))] = True
    return table
