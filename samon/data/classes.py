"""Labels and classes: the rules for every kind of data set, in training and in evaluation."""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import blake2b

import numpy as np
import torch.distributed as dist
from timm.data.readers.class_map import load_class_map as load_timm_class_map

from samon.data.corrupt import DataError, SampleError
from samon.errors import UserError, error_line

log_once = cache(logging.getLogger("samon").warning)  # a data set is opened several times in a run
LabelMap = Mapping[object, int]  # from labels as stored (integers, or text in Hugging Face data sets) or class names


def class_order(name: str) -> tuple[list[int | str], str]:
    """Return timm's natural sort key, then the name itself, so that `A` and `a`, `1` and `01` never tie."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))], name


def validation_number(name: str) -> int:
    """Return the 0-based number of an ImageNet validation image, from ILSVRC2012_val_00000001.JPEG or that key."""
    match = re.search(r"ILSVRC2012_val_(\d{8})", name)
    if match is None or not 1 <= int(match[1]) <= 50_000:
        names = "ILSVRC2012_val_00000001.JPEG ... 00050000.JPEG"
        raise UserError(f"{name}: labels of ImageNet's validation images go by their own file names, {names}")
    return int(match[1]) - 1


def check_label(label: object, num_classes: int | None, where: str) -> int:
    """Return the label of the sample `where` as an int in [0, num_classes), without a limit if that is None.

    Raises:
        SampleError: not an integer, or negative: this sample is corrupt.
        DataError: `num_classes` or more: the settings do not fit the data.
    """
    if not isinstance(label, (int, np.integer)):
        raise SampleError(f"{where}: label {label!r:.40} is not an integer")
    if label < 0:
        raise SampleError(f"{where}: label {label} is not in 0..{(num_classes or 1) - 1}")
    if num_classes and label >= num_classes:
        known = f"there are {num_classes} classes (0..{num_classes - 1})"
        raise DataError(f"{where}: label {label}, but {known}; raise --num-classes or use --class-map")
    return int(label)


def load_class_map(class_map: str | LabelMap, root: str) -> LabelMap:
    """Return {class name or stored label: label} of --class-map, a .txt of names (one per line) or a .pkl of a dict.

    Raises:
        UserError: no such file, or its content is not a class map.
    """
    try:
        labels = dict(load_timm_class_map(class_map, root))
    except Exception as error:  # unpickling arbitrary bytes can raise anything
        raise UserError(f"--class-map {class_map}: {error_line(error)}") from None
    if labels.get("") == len(labels) - 1:  # an empty last line
        del labels[""]
    labels = {name.removeprefix("\ufeff") if isinstance(name, str) else name: labels[name] for name in labels}
    if not labels:
        raise UserError(f"--class-map {class_map} is empty")
    if str(class_map).endswith(".txt") and set(labels.values()) != set(range(len(labels))):
        raise UserError(f"--class-map {class_map}: a class is listed twice; write each on a line of its own")
    for name, label in labels.items():
        if type(label) is not int or label < 0:
            raise UserError(f"--class-map {class_map}: {label!r} of {name!r} is not a label; use integers from 0")
    return labels


def class_map_digest(class_map: LabelMap, names: Sequence[str] | None) -> str:
    """Return a hash of the labels that a class map gives, however it lists them. `names` are the classes that it
    numbers by their stored labels, if these have names."""
    text = f"{sorted(class_map.items(), key=repr)}{names or ''}"
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def apply_class_map(class_map: LabelMap, names: Sequence[str] | None, where: str) -> tuple[LabelMap, list[str] | None]:
    """Return ({stored label: label}, class names in the order of the new labels, None if a label has not one name).

    Args:
        class_map: labels by class name or by stored label.
        names: the classes in the order of the stored labels, None if they have no names.

    Raises:
        UserError: the map has class names and the data set has none of these.
    """
    by_label, label_map = all(isinstance(key, int) for key in class_map), class_map
    if not by_label:
        if names is None:
            raise UserError(
                f"{where}: its classes have no names; --class-map must map stored labels (.pkl of integers)"
            )
        label_map = {label: class_map[name] for label, name in enumerate(names) if name in class_map}
    others = [name for label, name in enumerate(names or ()) if label not in label_map]
    if names and len(others) == len(names):
        known = f"it lists {next(iter(class_map))!r}, the data {names[0]!r}"
        raise UserError(f"{where}: --class-map has none of its classes; {known}")
    if others:
        log_once(f"{where}: {len(others)} classes are not in --class-map and are left out, such as {others[0]!r}")
    if by_label:
        return label_map, None
    ordered = sorted(class_map, key=class_map.__getitem__)
    has_one_name = sorted(class_map.values()) == list(range(len(class_map)))
    return label_map, [str(name) for name in ordered] if has_one_name else None


def check_ranks(names: Sequence[str] | None, num_samples: int, where: str) -> None:
    """Check that all processes see the same classes and number of samples; does nothing without a process group.

    Raises:
        UserError: they differ (raised on all processes).
    """
    if not dist.is_initialized():
        return
    text = "\0".join(names or ()).encode("utf-8", "surrogateescape")
    seen: list[tuple[str, int, int]] = [("", 0, 0)] * dist.get_world_size()
    dist.all_gather_object(seen, (blake2b(text, digest_size=8).hexdigest(), len(names or ()), num_samples))
    for rank, other in enumerate(seen):
        if other != seen[0]:
            counts = [f"process {r} sees {seen[r][2]} samples of {seen[r][1]} classes" for r in (0, rank)]
            raise UserError(f"{where}: {', '.join(counts)}; the classes or files differ, copy the data set again")
