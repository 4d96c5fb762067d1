"""The layouts of image data sets that `samon-shards` knows: where the images lie and what their labels are."""

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from samon.data.classes import class_order, validation_number
from samon.data.images import ImageEntry, find_images
from samon.data.shards import EVAL_SPLITS, TRAIN_SPLITS
from samon.data.source_factory import read_npz
from samon.errors import UserError, require_package

# Sets that are distributed as class folders of one validation split. Evaluation checks their classes.
SHIFT_SETS = ("imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet")
FORMATS = ("folder", "imagenet", "cifar", *SHIFT_SETS)


class LabeledImages(NamedTuple):
    """Images with their labels, and the names of the classes in the order of the labels."""

    items: list[tuple[ImageEntry, int]]
    class_names: list[str]


def label_images(
    entries: list[ImageEntry], names: list[str] | None = None, classes: list[str] | None = None
) -> LabeledImages:
    """Label each image by the index of its class (default: its folder) in `names` (default: in timm's order)."""
    classes = classes or [entry.folder for entry in entries]
    names = names or sorted(set(classes), key=class_order)
    labels = {name: label for label, name in enumerate(names)}
    return LabeledImages([(entry, labels[name]) for entry, name in zip(entries, classes, strict=True)], names)


def find_folder_splits(args: argparse.Namespace) -> dict[str, LabeledImages]:
    """Read `<split>/<class>/<image>`, or `<class>/<image>` as the only split, which --split names."""
    entries = find_images(args.source, args.input_key, tars=True)
    tops = {entry.path.split("/")[0] for entry in entries}
    depth = min(entry.path.count("/") for entry in entries)
    if depth == 0:
        raise UserError(f"--source {args.source}: images lie in no class folder; expected <class>/<image>")
    splits = tops & {*TRAIN_SPLITS, *EVAL_SPLITS}
    if not (depth >= 2 or tops == splits) or args.split:
        if len(splits) > 1 or (splits and depth == 1 < max(entry.path.count("/") for entry in entries)):
            mixed, do = ", ".join(sorted(splits)), "give the folder of one split, or a directory of splits alone"
            raise UserError(f"--source {args.source}: images of {mixed} (and others) would become one split; {do}")
        return {args.split or "train": label_images(entries)}
    if depth == 1:
        do = "for ImageNet's flat validation images use --format imagenet --val-labels FILE"
        raise UserError(f"--source {args.source}: images of a split lie in no class folder; {do}")
    names = label_images(entries).class_names  # of all splits: a class missing from one must not shift the others
    parts = {name: [entry for entry in entries if entry.path.split("/")[0] == name] for name in sorted(tops)}
    return {name: label_images(part, names) for name, part in parts.items()}


def read_validation_synsets(path: Path) -> dict[int, str]:
    """Return {0-based number of an ImageNet validation image: its synset}.

    Args:
        path: lines `SYNSET` in the order of the images, lines `ILSVRC2012_val_00000001.JPEG SYNSET`,
            `LOC_val_solution.csv`, or the devkit's directory.
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


def find_imagenet_splits(args: argparse.Namespace) -> dict[str, LabeledImages]:
    """Read ImageNet: tars or folders of classes for training, flat or sorted images for validation."""
    training, validation = [], []
    for entry in find_images(args.source, args.input_key, tars=True):
        if re.search(r"ILSVRC2012_val_\d{8}", entry.path):
            validation.append(entry)
        elif re.search(r"n\d{8}/[^/]*$", entry.path) and not re.search(r"(^|/)(val|validation|test)/", entry.path):
            training.append(entry)
    for images, parts in ((training, 2), (validation, 1)):  # in training, names may repeat in another class
        counts = Counter("/".join(entry.path.split("/")[-parts:]) for entry in images)
        if len(counts) < len(images):
            twice = counts.most_common(1)[0][0]
            raise UserError(f"--source {args.source}: {twice} occurs twice, as in a tar and extracted; remove one")
    splits = {"train": label_images(training)} if training else {}
    if validation and re.search(r"n\d{8}/[^/]*$", validation[0].path):
        splits["validation"] = label_images(validation)
    elif validation and args.val_labels is None:
        known = "a list of synsets, LOC_val_solution.csv or the extracted devkit"
        raise UserError(f"validation images lie in no class folders; give their labels with --val-labels ({known})")
    elif validation:
        synsets = read_validation_synsets(args.val_labels)
        numbers = [validation_number(entry.path) for entry in validation]
        for entry, number in zip(validation, numbers, strict=True):
            if number not in synsets:
                raise UserError(f"--val-labels {args.val_labels}: {len(synsets)} labels, none for {entry.path}")
        names = sorted(set(synsets.values()))
        splits["validation"] = label_images(validation, names, [synsets[number] for number in numbers])
    if not splits:
        raise UserError(f"--source {args.source}: no ImageNet images (n01440764/..., ILSVRC2012_val_...) found")
    names_of = [images.class_names for images in splits.values()]
    if names_of[0] != names_of[-1]:
        raise UserError(f"training has {len(names_of[0])} classes, validation {len(names_of[-1])}: they do not match")
    return splits


def find_cifar_splits(args: argparse.Namespace) -> dict[str, LabeledImages]:
    """Read CIFAR-10/100 from torchvision's directories or an `.npz` with x_train, y_train, x_test, y_test."""
    if args.source.suffix == ".npz":
        arrays = {split: read_npz(args.source, split) for split in ("train", "validation")}
        names = [str(label) for label in range(int(arrays["train"][1].max()) + 1)]
    else:
        from torchvision.datasets import CIFAR10, CIFAR100

        kinds = {kind.base_folder: kind for kind in (CIFAR10, CIFAR100)}
        source = args.source.resolve()
        extracted = [source] if source.name in kinds else [source / name for name in kinds if (source / name).is_dir()]
        if len(extracted) != 1:
            raise UserError(f"--source {args.source}: give the extracted {' or '.join(kinds)}, or an .npz")
        kind, root = kinds[extracted[0].name], str(extracted[0].parent)
        try:  # torchvision compares checksums before it unpickles
            sets = {"train": kind(root, train=True), "validation": kind(root, train=False)}
        except RuntimeError:
            raise UserError(f"--source {extracted[0]}: files are missing or damaged; extract it again") from None
        arrays = {split: (data.data, data.targets) for split, data in sets.items()}
        names = sets["train"].classes
    splits = {}
    for split, (images, labels) in arrays.items():
        entries = [ImageEntry(f"{split}-{i:05d}", array=image) for i, image in enumerate(images)]
        splits[split] = LabeledImages([(e, int(label)) for e, label in zip(entries, labels, strict=True)], names)
    return splits


def find_splits(args: argparse.Namespace) -> dict[str, LabeledImages]:
    """Return the images of each split of `args.source`, whose layout is `args.format`."""
    if args.format in SHIFT_SETS:
        return {args.split or "validation": label_images(find_images(args.source, args.input_key, tars=True))}
    known = {"folder": find_folder_splits, "imagenet": find_imagenet_splits, "cifar": find_cifar_splits}
    return known[args.format](args)
