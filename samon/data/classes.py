"""Classes and labels: the one place that decides them, for every kind of data set, in training and in evaluation.

- `class_order` sorts class names and files alike on every process.
- `load_class_map` and `map_labels` apply --class-map to any data set whose classes have names or numbers.
- `renumbering` says which label a class has among the names that a model was trained on (`Source.renumber`).
- `check_label` decides whether a label can be used: training skips and counts a `LabelError`, evaluation stops at it.
- `check_ranks` makes sure that all processes read the same data with the same labels.
"""

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch.distributed as dist
from timm.data.readers.class_map import load_class_map as load_timm_class_map

from samon.data.corrupt import DataError, LabelError
from samon.errors import UserError, nearest


def class_order(name: str) -> tuple[list[int | str], str]:
    """Return timm's natural key, then the name itself: `A` and `a`, `1` and `01` always come in the same order."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))], name


def check_label(label: Any, num_classes: int | None, where: str) -> int:
    """Return a sample's label as an int in [0, num_classes).

    Args:
        num_classes: unlimited if None.
        where: names the sample in the message.

    Raises:
        LabelError: no integer, or negative: a fault of this sample.
        DataError: `num_classes` or more: the settings do not fit the data.
    """
    if not isinstance(label, (int, np.integer)):
        raise LabelError(f"{where}: label {label!r:.40} is no integer")
    if label < 0:
        raise LabelError(f"{where}: label {label} is not in 0..{(num_classes or 1) - 1}")
    if num_classes and label >= num_classes:
        there = f"there are {num_classes} classes (0..{num_classes - 1})"
        raise DataError(f"{where}: label {label}, but {there}; raise --num-classes or give --class-map")
    return int(label)


def map_label(label_map: Mapping[Any, int] | None, label: Any, where: str) -> Any:
    """Return what a stored label stands for.

    Raises:
        LabelError: the map does not have it.
    """
    if label_map is None:
        return label
    try:
        return label_map[label]
    except (KeyError, TypeError):  # TypeError: a label that is no key at all, such as a list
        raise LabelError(f"{where}: label {label!r:.40} is not in the class map") from None


def load_class_map(class_map: str | Mapping[Any, int], root: str) -> dict[Any, int]:
    """Return {class name or stored label: label} of --class-map, a .txt of names (one per line) or a .pkl of a dict.

    Raises:
        UserError: no such file, or one that maps nothing to labels.
    """
    try:
        loaded = dict(load_timm_class_map(class_map, root))
    except Exception as error:  # bytes that are no pickle can raise anything
        raise UserError(f"--class-map {class_map}: {' '.join(str(error).split())}") from None
    last_line_is_empty = loaded.get("") == len(loaded) - 1
    if last_line_is_empty:
        del loaded[""]
    if str(class_map).endswith(".txt") and set(loaded.values()) != set(range(len(loaded))):
        raise UserError(f"--class-map {class_map}: a class is named twice; write each on a line of its own")
    wrong = [name for name, label in loaded.items() if type(label) is not int or label < 0]
    if wrong or not loaded:
        raise UserError(f"--class-map {class_map}: no label for {wrong[0]!r}" if wrong else f"{class_map} is empty")
    return loaded


def map_labels(
    class_map: Mapping[Any, int], names: Sequence[str] | None, where: str
) -> tuple[dict[Any, int], list[str] | None]:
    """Return ({stored label: label}, class names in the order of the new labels, if each has one).

    Args:
        class_map: labels by class name or by stored label.
        names: the classes in the order of the stored labels, None if they have no names.

    Raises:
        UserError: the map names classes and the data set has none of these.
    """
    by_name = not all(isinstance(key, int) for key in class_map)
    if not by_name:
        return dict(class_map), None
    if names is None:
        raise UserError(f"{where}: its classes have no names, --class-map can only number its labels anew (.pkl)")
    label_map = {label: class_map[name] for label, name in enumerate(names) if name in class_map}
    if not label_map:
        example = next(iter(class_map))
        raise UserError(f"{where}: --class-map has none of its classes; it says {example!r}, here is {names[0]!r}")
    ordered = sorted(class_map, key=class_map.__getitem__)
    return label_map, ordered if [class_map[name] for name in ordered] == list(range(len(ordered))) else None


def renumbering(names: Sequence[str] | None, trained: Sequence[str], where: str) -> dict[int, int]:
    """Return {label: its class's label among `trained`}.

    Args:
        names: the classes of the data in the order of their labels.
        trained: the classes that the model was trained on, in the order of its outputs.

    Raises:
        UserError: a class that was not trained, or classes without names.
    """
    if names is None:
        raise UserError(f"{where}: its classes have no names, so its labels cannot follow the trained classes")
    labels = {name: label for label, name in enumerate(trained)}
    unknown = [name for name in names if name not in labels]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        like = nearest(unknown[0], trained)
        raise UserError(f"{where}: class {unknown[0]!r}{more} is not among the {len(trained)} trained{like}")
    return {label: labels[name] for label, name in enumerate(names)}


def unique_names(names: Sequence[Any], num_classes: Any, where: str) -> list[str]:
    """Return class names as text.

    Raises:
        UserError: two classes of one name, or another number of them than `num_classes`.
    """
    texts = [str(name) for name in names]
    if len(set(texts)) < len(texts):
        twice = next(name for name in texts if texts.count(name) > 1)
        raise UserError(f"{where}: two classes are called {twice!r}")
    if isinstance(num_classes, int) and num_classes != len(texts):
        raise UserError(f"{where}: {num_classes} classes, but {len(texts)} class_names")
    return texts


def check_ranks(names: Sequence[str] | None, num_samples: int, where: str) -> None:
    """Compare a split's classes and number of samples over all processes; does nothing without a process group.

    Raises:
        UserError: they differ (on all processes).
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    text = "\0".join(names or ()).encode("utf-8", "surrogateescape")
    mine = (blake2b(text, digest_size=8).hexdigest(), len(names or ()), num_samples)
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, mine)
    other = next((rank for rank, theirs in enumerate(seen) if theirs != seen[0]), None)
    if other is not None:
        counts = [f"process {rank} sees {seen[rank][2]} samples of {seen[rank][1]} classes" for rank in (0, other)]
        raise UserError(f"{where}: {', '.join(counts)}; the classes or files differ, copy the data set anew")
