"""Evaluation sets as map-style data sets, and the ImageNet shift sets with each one's own label convention.

A shift set never needs a class map: what its folders (or the ``class_names`` in a shard set's ``_info.json``)
are called decides the label. A label is a row of a table [rows, 1000] of the ImageNet classes that count as
right.
"""

import bisect
import itertools
import json
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.dataset_factory import _search_split
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor
from torch.utils.data import Dataset

from samon.data import shards
from samon.data.decode import decode_pil
from samon.data.faults import SampleError
from samon.data.loader import _indexed_source
from samon.errors import UserError

Sample = tuple[bytes, int, str]  # encoded image, label, name


class EvalImages(Dataset):
    """PIL images in a fixed order with `row_of(label, name)`; a damaged one stops the evaluation."""

    def __init__(self, count: int, read: Callable[[list[int]], list[Sample]], class_names: list[str] | None):
        self.count, self.read, self.class_names = count, read, class_names
        self.row_of: Callable[[int, str], int] = lambda label, _name: label
        self.img_mode, self.border = "RGB", 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        """One batch at a time (torch's fetcher calls this), so that a shard is scanned once per batch."""
        return [self._decoded(*sample) for sample in self.read(indices)]

    def _decoded(self, data: bytes, label: int, name: str) -> tuple[Any, int]:
        try:
            image = decode_pil(data, self.img_mode)
        except SampleError as error:
            raise UserError(f"{name}: {error}; repair the data set, evaluation skips nothing") from error
        if self.border:
            width, height = image.size
            image = image.crop((self.border, self.border, width - self.border, height - self.border))
        return image, self.row_of(label, name)


def from_folder(root: str, split: str, class_map: str = "", keep: set[str] | None = None) -> EvalImages:
    """An image folder, labels in timm's order of class folders; ``keep`` leaves the other classes out."""
    if not Path(root).is_dir():
        raise UserError(f"{root}: no such directory; give the data set's with --data-dir")
    folder = _search_split(root, split) if split else root
    classes = None
    if class_map:
        from timm.data.readers.class_map import load_class_map

        classes = load_class_map(class_map, root)
    found, classes = find_images_and_targets(folder, class_to_idx=classes)
    names = sorted(classes, key=classes.__getitem__)
    found = [(path, label) for path, label in found if keep is None or names[label] in keep]
    if not found:
        raise UserError(f"{folder}: holds no images of this set in class folders; check --data-dir and --split")

    def read(indices: list[int]) -> list[Sample]:
        return [(Path(path).read_bytes(), label, path) for path, label in (found[i] for i in indices)]

    return EvalImages(len(found), read, names)


def from_shards(root: str, split: str, image_key: str | None = None, label_key: str | None = None) -> EvalImages:
    """WebDataset shards as `samon.data.shards` finds them; class names from the info file, if it has them."""
    found = shards.load_split(root, split)
    reader = shards.ShardReader(image_key, label_key or found.label_key or None)
    ends = list(itertools.accumulate(found.lengths))

    def read(indices: list[int]) -> list[Sample]:
        samples: dict[int, Sample] = {}
        for shard, group in itertools.groupby(sorted(indices), lambda i: bisect.bisect_right(ends, i)):
            first = ends[shard] - found.lengths[shard]
            wanted = [i - first for i in group]
            for position, record in reader.read(found.urls[shard], found.lengths[shard], wanted):
                if isinstance(record, SampleError):
                    raise UserError(f"{record}; repair the data set, evaluation skips nothing")
                samples[first + position] = record.image, record.label, record.where
        return [samples[i] for i in indices]

    info = Path(root, "_info.json")
    names = json.loads(info.read_text()).get("class_names") if info.is_file() else None
    return EvalImages(ends[-1], read, names)


def open_images(name: str, root: str, split: str, *, num_classes: int | None = None, **options: Any) -> Any:
    """Any data set by its ``--dataset`` name with its labels as they are, map-style, so that subsets can be chosen."""
    if name.startswith("wds"):
        images: Any = from_shards(root, split, options["input_key"], options["target_key"])
    elif name == "":
        images = from_folder(root, split, options["class_map"])
    else:
        return _indexed_source(name, root, split, num_classes, **options)
    images.img_mode = options["input_img_mode"]
    found = len(images.class_names or ())
    if num_classes and found > num_classes:
        raise UserError(f"{root}: split {split!r} has {found} classes, the model {num_classes}; check --num-classes")
    return images


def choose(size: int, count: int | None, seed: int) -> list[int]:
    """``count`` of ``size`` indices drawn by ``seed``, ascending; all when there are no more than that."""
    if count is None or count >= size:
        return list(range(size))
    return sorted(torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def share(indices: Sequence[int], batch_size: int, rank: int, world: int) -> list[int]:
    """This process's part: every world-th whole batch, so that a batch is the same whoever computes it."""
    starts = range(rank * batch_size, len(indices), world * batch_size)
    return [i for start in starts for i in indices[start : start + batch_size]]


@dataclass(frozen=True)
class ShiftSet:
    """A row of the table below. ``named``: how class names turn into ImageNet indices."""

    named: str  # 'synset', 'integer', 'objectnet' or 'real' (by file name)
    classes: int
    images: int
    only: str = ""  # the subset of classes ('a', 'r') that predictions are restricted to
    border: int = 0  # pixels cut off on every side before anything else


SETS = {
    "imagenet": ShiftSet("synset", 1000, 50_000),
    "imagenet-real": ShiftSet("real", 1000, 50_000),
    "imagenetv2-matched-frequency": ShiftSet("integer", 1000, 10_000),
    "imagenetv2-threshold0.7": ShiftSet("integer", 1000, 10_000),
    "imagenetv2-top-images": ShiftSet("integer", 1000, 10_000),
    "imagenet-r": ShiftSet("synset", 200, 30_000, only="r"),
    "imagenet-a": ShiftSet("synset", 200, 7_500, only="a"),
    "imagenet-sketch": ShiftSet("synset", 1000, 50_889),
    "objectnet": ShiftSet("objectnet", 113, 18_574, border=2),
}


def _timm_lines(name: str) -> list[str]:
    data = pkgutil.get_data("timm.data", f"_info/{name}")
    assert data is not None
    return data.decode().split()


def subset_indices(letter: str) -> list[int]:
    """The 200 ImageNet indices of ImageNet-A or ImageNet-R, from timm's lists."""
    return [int(line) for line in _timm_lines(f"imagenet_{letter}_indices.txt")]


def objectnet_classes() -> dict[str, list[int]]:
    """ObjectNet folder -> ImageNet indices, for the 113 classes that both have."""
    return json.loads(Path(__file__).with_name("objectnet_to_imagenet.json").read_text())


def real_labels(path: str | None = None) -> Tensor:
    """ReaL: [50000, 1000] bool, the labels of validation image 1, 2, ...; timm's file unless ``path`` is given."""
    data = Path(path).read_bytes() if path else pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    assert data is not None
    labels = json.loads(data)
    table = torch.zeros(len(labels), 1000, dtype=torch.bool)
    rows = [row for row, wanted in enumerate(labels) for _ in wanted]
    table[rows, [label for wanted in labels for label in wanted]] = True
    return table


def validation_number(name: str) -> int:
    """0-based number of an ImageNet validation image, from ILSVRC2012_val_00000001.JPEG (or that shard key)."""
    number = re.search(r"ILSVRC2012_val_(\d{8})", name)
    if number is None:
        raise UserError(f"{name}: ReaL labels go by ImageNet's own file names, ILSVRC2012_val_00000001.JPEG ...")
    return int(number[1]) - 1


def label_table(named: str, names: list[str] | None) -> Tensor:
    """[rows, 1000] bool: the ImageNet classes that are right for label 0, 1, ..., named ``names``.

    Raises:
        UserError: a name that is none of the convention's (ObjectNet's other 200 classes get an empty row).
    """
    if named == "real":
        return real_labels()
    if names is None:
        raise UserError("shards of a shift set need class_names in _info.json; write them with tools/make_shards.py")
    known: dict[str, list[int]]
    if named == "objectnet":
        known = objectnet_classes()
    else:
        synsets = _timm_lines("imagenet_synsets.txt")
        known = {str(i) if named == "integer" else synset: [i] for i, synset in enumerate(synsets)}
    strange = [name for name in names if name not in known]
    if (strange and named != "objectnet") or len(strange) == len(names):
        form = {"synset": "ImageNet synset (n01440764)", "integer": "integer 0..999"}.get(named, "ObjectNet class")
        raise UserError(f"class folder {strange[0]!r} is no {form}; check the data set and its directory")
    table = torch.zeros(len(names), 1000, dtype=torch.bool)
    for row, name in enumerate(names):
        table[row, known.get(name, [])] = True
    return table


def open_set(kind: str, dataset: str, root: str, split: str) -> tuple[EvalImages, Tensor, str]:
    """(images, label table, what differs from the set as published or '')."""
    info = SETS[kind]
    if dataset.startswith("wds"):
        images = from_shards(root, split)
    else:
        keep = set(objectnet_classes()) if info.named == "objectnet" else None
        images = from_folder(root, split, keep=keep)
    table = label_table(info.named, images.class_names)
    images.border = info.border
    if info.named == "real":
        images.row_of = lambda _label, name: validation_number(name)
    found = {"classes": int(table.any(1).sum()), "images": len(images)}
    if info.named == "real":
        found["classes"] = info.classes
    if dataset.startswith("wds") and info.named == "objectnet":
        found["images"] = info.images  # labels lie inside the shards: known once they are read
    wrong = [
        f"{count} {what}, published {getattr(info, what)}"
        for what, count in found.items()
        if count != getattr(info, what)
    ]
    return images, table, "; ".join(wrong)


def scorings(kind: str, table: Tensor) -> dict[str, tuple[list[int] | None, Tensor]]:
    """{name of the reading: (columns the prediction is restricted to, label table)}, the set's own first.

    ImageNet itself is also read on the 200 classes of A and R (their clean-subset accuracy); ObjectNet also
    with predictions restricted to the indices of its 113 classes.
    """
    if kind in ("imagenet-r", "imagenet-a"):
        return {"200 classes": (subset_indices(SETS[kind].only), table)}
    readings: dict[str, tuple[list[int] | None, Tensor]] = {"1000 classes": (None, table)}
    if kind == "objectnet":
        columns = sorted({i for indices in objectnet_classes().values() for i in indices})
        readings["113 classes"] = (columns, table)
    if kind == "imagenet":
        for letter in "ar":
            columns = subset_indices(letter)
            inside = table.clone()
            inside[:, sorted(set(range(1000)) - set(columns))] = False
            readings[f"clean subset of imagenet-{letter}"] = (columns, inside)
    return readings
