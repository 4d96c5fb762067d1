"""Where the images of a data set lie and what their labels are, for the layouts that `make_shards.py` knows."""

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

from samon.data.classes import class_order
from samon.data.sources import EVAL_SPLITS, TRAIN_SPLITS, ImageEntry, find_images, read_npz
from samon.errors import UserError, require_package
from samon.evals.shifts import SETS, label_table, validation_number


class Split(NamedTuple):
    """Images with their labels, and what the labels are called."""

    items: list[tuple[ImageEntry, int]]
    class_names: list[str]


def numbered(items: list[ImageEntry], classes: list[str], names: list[str]) -> Split:
    """Images whose labels are the places of their classes in `names`."""
    index = {name: label for label, name in enumerate(names)}
    return Split([(item, index[name]) for item, name in zip(items, classes, strict=True)], names)


def by_folder(items: list[ImageEntry], names: list[str] | None = None) -> Split:
    """Labels in timm's order of the class folders' names, or in that of `names`."""
    folders = [item.folder for item in items]
    return numbered(items, folders, names or sorted(set(folders), key=class_order))


def folder_splits(args: argparse.Namespace) -> dict[str, Split]:
    """`<split>/<class>/<image>`, or `<class>/<image>` as the one split that --split names."""
    found = find_images(args.source, tars=True)
    first = {item.path.split("/")[0] for item in found}
    deep = min(item.path.count("/") for item in found)
    if deep == 0:
        raise UserError(f"--source {args.source}: images lie in no class folder; expected <class>/<image>")
    if not (deep >= 2 or first <= TRAIN_SPLITS | EVAL_SPLITS) or args.split:
        return {args.split or "train": by_folder(found)}
    if deep == 1:
        flat = "for ImageNet's flat validation images use --format imagenet --val-labels FILE"
        raise UserError(f"--source {args.source}: images of a split lie in no class folder; {flat}")
    names = by_folder(found).class_names  # for all splits, so that a class which one lacks does not shift the others
    parts = {name: [item for item in found if item.path.split("/")[0] == name] for name in sorted(first)}
    return {name: by_folder(items, names) for name, items in parts.items()}


def shift_split(args: argparse.Namespace) -> dict[str, Split]:
    """A shift set as distributed; its class names decide the labels, so they are checked here."""
    split = by_folder(find_images(args.source, tars=True))
    kind = args.format.replace("imagenet-v2", "imagenetv2-matched-frequency")
    label_table(kind, split.class_names)
    known = SETS[kind]
    found = (len(split.class_names), len(split.items))
    if args.format != "objectnet" and found != (known.classes, known.images):
        print(f"{args.format}: {found[0]} classes, {found[1]} images; published: {known.classes}, {known.images}")
    return {args.split or "validation": split}


def validation_synsets(path: Path) -> dict[int, str]:
    """{0-based number of an ImageNet validation image: its synset}.

    From lines `SYNSET` in the order of the images, lines `ILSVRC2012_val_00000001.JPEG SYNSET`, `LOC_val_solution.csv`
    or the devkit's directory.

    Raises:
        UserError: no such file, or a line that is none of these.
    """
    if path.is_dir():
        scipy_io = require_package("scipy.io", f"--val-labels {path}: the devkit needs scipy; run: pip install scipy")
        meta = scipy_io.loadmat(path / "data" / "meta.mat", squeeze_me=True)["synsets"]
        synset = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in meta}
        numbers = (path / "data" / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
        return {index: synset[int(number)] for index, number in enumerate(numbers)}
    if not path.is_file():
        raise UserError(f"--val-labels {path}: no such file")
    labels: dict[int, str] = {}
    for number, line in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), 1):
        first, *rest = line.replace(",", " ").split() or [""]
        if first in ("", "ImageId"):
            continue
        named = re.match(r"ILSVRC2012_val_\d{8}", first) is not None
        label = rest[0] if named and rest else " ".join([first, *rest])
        if not re.fullmatch(r"n\d{8}", label):
            lines = "`n01440764` for each image in order, or `ILSVRC2012_val_00000001.JPEG n01440764`"
            raise UserError(f"--val-labels {path}: line {number} {line[:40]!r} names no image's synset; write {lines}")
        labels[validation_number(first) if named else len(labels)] = label
    if list(labels.values()) == sorted(set(labels.values())) and len(labels) >= 1000:
        raise UserError(f"--val-labels {path}: lists every class once, in order; give the labels of the images")
    return labels


def imagenet_splits(args: argparse.Namespace) -> dict[str, Split]:
    """ImageNet's layouts: tars or folders of classes for training, flat or sorted images for validation."""
    training, validation = [], []
    for item in find_images(args.source, tars=True):
        if re.search(r"ILSVRC2012_val_\d{8}", item.path):
            validation.append(item)
        elif re.search(r"n\d{8}/[^/]*$", item.path) and not re.search(r"(^|/)(val|validation|test)/", item.path):
            training.append(item)
    splits = {"train": by_folder(training)} if training else {}
    if validation:
        sorted_in = re.search(r"n\d{8}/[^/]*$", validation[0].path)
        if sorted_in:
            splits["validation"] = by_folder(validation)
        elif args.val_labels is None:
            known = "a list of synsets, LOC_val_solution.csv or the extracted devkit"
            raise UserError(f"validation images lie in no class folders; give their labels with --val-labels ({known})")
        else:
            synsets = validation_synsets(args.val_labels)
            numbers = [validation_number(item.path) for item in validation]
            for item, number in zip(validation, numbers, strict=True):
                if number not in synsets:
                    raise UserError(f"--val-labels {args.val_labels}: {len(synsets)} labels, none for {item.path}")
            splits["validation"] = numbered(validation, [synsets[n] for n in numbers], sorted(set(synsets.values())))
    if not splits:
        raise UserError(f"--source {args.source}: no ImageNet images (n01440764/..., ILSVRC2012_val_...) found")
    both = [split.class_names for split in splits.values()]
    if len(both) == 2 and both[0] != both[1]:
        raise UserError(f"training has {len(both[0])} classes, validation {len(both[1])}: they do not match")
    return splits


def cifar_splits(args: argparse.Namespace) -> dict[str, Split]:
    """CIFAR-10/100 from torchvision's directories or an `.npz` with x_train, y_train, x_test, y_test."""
    arrays: dict[str, tuple[Any, Any]] = {}
    if args.source.suffix == ".npz":
        arrays = {split: read_npz(args.source.stem, str(args.source), split) for split in ("train", "validation")}
        names = [str(label) for label in range(int(arrays["train"][1].max()) + 1)]
    else:
        from torchvision.datasets import CIFAR10, CIFAR100

        kinds = {kind.base_folder: kind for kind in (CIFAR10, CIFAR100)}
        source = args.source.resolve()
        found = [source] if source.name in kinds else [source / name for name in kinds if (source / name).is_dir()]
        if len(found) != 1:
            raise UserError(f"--source {args.source}: give the extracted {' or '.join(kinds)}, or an .npz")
        kind, root = kinds[found[0].name], str(found[0].parent)
        try:  # torchvision compares checksums before it unpickles
            sets = {"train": kind(root, train=True), "validation": kind(root, train=False)}
        except RuntimeError:
            raise UserError(f"--source {found[0]}: files are missing or damaged; extract the archive again") from None
        arrays = {split: (data.data, data.targets) for split, data in sets.items()}
        names = sets["train"].classes
    splits = {}
    for split, pair in arrays.items():
        pairs = enumerate(zip(*pair, strict=True))
        items = [(ImageEntry(f"{split}-{i:05d}", array=image), int(y)) for i, (image, y) in pairs]
        splits[split] = Split(items, names)
    return splits


def find_splits(args: argparse.Namespace) -> dict[str, Split]:
    """The splits of `args.source` by `args.format`."""
    known = {"folder": folder_splits, "imagenet": imagenet_splits, "cifar": cifar_splits}
    return known.get(args.format, shift_split)(args)
