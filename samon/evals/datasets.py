"""Opening data sets: --suite files, the label conventions of ImageNet's shift sets, labels matched to the model."""

import argparse
import itertools
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from samon.data.classes import check_ranks, log_once, validation_number
from samon.data.corrupt import SampleError
from samon.data.decode import open_image
from samon.data.source_factory import check_name, open_source, source_options
from samon.data.sources import ShardSource, Source
from samon.errors import UserError, nearest, reraise_as_user_error
from samon.evals import EVALS, corruptions, shifts
from samon.evals.context import EvalContext, EvalDataset
from samon.evals.metrics import Scoring

_SUITE_KEYS = ("set", "name", "dataset", "data_dir", "split", "evals")


@dataclass(frozen=True)
class EvalSpec:
    """A data set and what to evaluate on it.

    Attributes:
        kind: a key of `shifts.SETS`; empty: labels as they are.
        metadata: further columns of its results.
        limit: evaluate only the first images, those a training run validates on.
    """

    name: str
    dataset: str
    root: str
    split: str
    evals: Sequence[str]
    kind: str = ""
    metadata: dict[str, str | int] = field(default_factory=dict)
    limit: int | None = None


# --- which data sets ------------------------------------------------------------------------------------------------


def read_specs(config: argparse.Namespace, suite: object, limit: int | None) -> list[EvalSpec]:
    """The data sets of `suite`, the content of --suite, or without it the one of --data-dir."""
    names = evaluation_names(config.evals, "--evals")
    if not config.suite:
        if any(EVALS[name].needs_data for name in names):
            check_name(config.dataset, config.data_dir)
        name = config.dataset or Path(config.data_dir or "").name
        return [EvalSpec(name, config.dataset, config.data_dir or "", config.split, names, limit=limit)]
    flag = f"--suite {config.suite}"
    if not isinstance(suite, list) or not suite or not all(isinstance(item, dict) for item in suite):
        raise UserError(f"{flag}: expected a list of data sets such as {{set: imagenet-r, data_dir: DIR}}")
    specs = [_suite_spec(item, flag, config, names) for item in suite]
    counts = Counter(spec.name for spec in specs)
    specs = [replace(s, name=f"{s.name} {s.split}".strip()) if counts[s.name] > 1 else s for s in specs]
    for name, count in Counter(spec.name for spec in specs).items():
        if count > 1:
            raise UserError(f"{flag}: {count} entries are called {name!r}; give each a `name` of its own")
    return [part for spec in specs for part in (_corruption_specs(spec) if spec.kind == "imagenet-c" else [spec])]


def _corruption_specs(spec: EvalSpec) -> list[EvalSpec]:
    """The 75 sets of ImageNet-C, at CORRUPTION/SEVERITY below its directory."""
    specs = []
    for corruption, severity in itertools.product(corruptions.ALEXNET, corruptions.SEVERITIES):
        metadata: dict[str, str | int] = {"corruption": corruption, "severity": severity}
        part = f"{corruption}/{severity}"
        specs.append(replace(spec, name=f"{spec.name}/{part}", root=f"{spec.root}/{part}", metadata=metadata))
    return specs


def evaluation_names(text: str | list[str], flag: str) -> list[str]:
    """Names of evaluations from a list or a comma-separated text; raise UserError for an unknown one."""
    names = text.split(",") if isinstance(text, str) else text
    for name in names:
        if name not in EVALS:
            raise UserError(f"{flag}: unknown evaluation {name!r}{nearest(name, EVALS)}; use {', '.join(EVALS)}")
    return list(dict.fromkeys(names))


def _suite_spec(item: dict[str, str | list[str]], flag: str, config: argparse.Namespace, names: list[str]) -> EvalSpec:
    for key, value in item.items():
        if key not in _SUITE_KEYS:
            raise UserError(f"{flag}: unknown key {key!r}{nearest(key, _SUITE_KEYS)}; use {', '.join(_SUITE_KEYS)}")
        texts = value if key == "evals" and isinstance(value, list) and value else [value]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{flag}: {key} is {value!r}; it must be text, write it in quotes")
    evals = evaluation_names(item.pop("evals"), flag) if "evals" in item else names
    entry = {key: str(value) for key, value in item.items()}
    kind, dataset = entry.get("set", ""), entry.get("dataset", "")
    if kind and kind not in shifts.SETS:
        raise UserError(f"{flag}: unknown set {kind!r}{nearest(kind, shifts.SETS)}; use {', '.join(shifts.SETS)}")
    if "data_dir" not in entry:
        raise UserError(f"{flag}: {item} has no data_dir")
    name = entry.get("name") or kind or dataset or Path(entry["data_dir"]).name
    split = entry.get("split", "" if kind and not dataset else config.split)
    return EvalSpec(name, dataset, str(Path(config.data_dir or "", entry["data_dir"])), split, evals, kind)


# --- images and labels ----------------------------------------------------------------------------------------------


def open_dataset(context: EvalContext, spec: EvalSpec, split: str | None = None) -> EvalDataset:
    """Open a split of a data set, its own if None, and determine how its labels are read.

    The labels follow the convention of the set, or --valid-labels and --real-labels, or the model's class names.
    """
    config, num_classes = context.config, context.num_classes
    if (spec.kind or config.real_labels) and num_classes != 1000:
        raise UserError(f"{spec.name}: needs a model of the 1000 ImageNet classes, this one has {num_classes}")
    if spec.kind and (config.valid_labels or config.real_labels):
        flag = "--valid-labels" if config.valid_labels else "--real-labels"
        raise UserError(f"{spec.name}: the set {spec.kind} defines its labels; drop {flag}")
    own_split = split is None or split == spec.split
    dataset = _open_images(context, spec, spec.split if split is None else split)
    source = dataset.source
    check_ranks(source.class_names, len(dataset), source.location)
    if context.class_map_digest and source.class_map_digest not in ("", context.class_map_digest):
        fault = f"{config.class_map} gives {source.location} other labels than those the model was trained on"
        raise UserError(f"--class-map: {fault}; restore the file, or give --class-map FILE")
    dataset.limit = spec.limit if own_split else None
    if spec.kind:
        _use_set_labels(dataset, spec, own_split)
    elif config.valid_labels or config.real_labels:
        classes = read_class_indices(config.valid_labels, num_classes) if config.valid_labels else None
        label_sets = None
        if config.real_labels:
            label_sets = shifts.real_labels("" if config.real_labels == "real" else config.real_labels)
            dataset.label_of = validation_number
        names = ["ReaL"] * bool(config.real_labels) + ["valid labels"] * bool(config.valid_labels)
        dataset.scorings = {", ".join(names): Scoring(classes, label_sets)}
    else:
        _match_model_classes(context, spec, dataset)
        _compare_colors(context, spec, dataset)
    scoring = next(iter(dataset.scorings.values()))
    columns = range(num_classes) if scoring.classes is None else scoring.classes
    dataset.num_classes = len(columns if scoring.label_sets is None else scoring.label_sets)
    synsets = shifts.synsets()
    dataset.class_names = source.class_names if scoring.label_sets is None else [synsets[i] for i in columns]
    return dataset


def _open_images(context: EvalContext, spec: EvalSpec, split: str) -> EvalDataset:
    config, shift = context.config, shifts.SETS.get(spec.kind, shifts.ImageNetSet("", 0, 0))
    options = source_options(config) | {
        "keep": set(shifts.objectnet_classes()) if spec.kind == "objectnet" else None,
        "unlabeled": bool(config.real_labels) or shift.names == "real",
        "random_access": True,
    }
    options |= {"class_map": ""} if spec.kind else {}  # class names determine the labels of a shift set
    source = open_source(spec.dataset, spec.root, split, **options)
    mode = config.input_img_mode or ("L" if context.data_config["input_size"][0] == 1 else "RGB")
    dataset = EvalDataset(source=source, size=len(source), image_mode=mode, name=spec.name, split=split)
    dataset.border, dataset.keeps_size = shift.border + (config.crop_border_pixels or 0), shift.keeps_size
    return dataset


def _use_set_labels(dataset: EvalDataset, spec: EvalSpec, own_split: bool) -> None:
    shift = shifts.SETS[spec.kind]
    label_sets = shifts.label_table(spec.kind, dataset.source.class_names)
    dataset.scorings = set_scorings(spec.kind, label_sets)
    counts = {"images": (len(dataset), shift.images)}
    if shift.names == "real":
        dataset.label_of = validation_number
    else:
        counts = {"classes": (int(label_sets.any(1).sum()), shift.classes), **counts}
    if shift.names == "objectnet":
        dataset.published_images = shift.images
        if spec.dataset.startswith("wds"):  # its shards hold images of other classes too
            del counts["images"]
    if own_split:
        faults = [f"{n} {what}, published {published}" for what, (n, published) in counts.items() if n != published]
        dataset.mismatch = "; ".join(faults)


def set_scorings(kind: str, label_sets: Tensor) -> dict[str, Scoring]:
    """How the logits on a set of `shifts.SETS` are scored, by name, its own convention first.

    ImageNet itself is also scored on the 200 classes of A and of R (their clean subsets), ObjectNet also with
    predictions restricted to the classes of its 113 folders.
    """
    if letter := shifts.SETS[kind].subset:
        return {"200 classes": Scoring(shifts.subset_indices(letter), label_sets)}
    scorings = {"1000 classes": Scoring(None, label_sets)}
    if kind == "objectnet":
        classes = sorted(set(itertools.chain(*shifts.objectnet_classes().values())))
        scorings["113 classes"] = Scoring(classes, label_sets)
    if kind == "imagenet":
        for letter in "ar":
            classes = shifts.subset_indices(letter)
            inside = torch.zeros_like(label_sets)
            inside[:, classes] = label_sets[:, classes]
            scorings[f"clean subset of imagenet-{letter}"] = Scoring(classes, inside)
    return scorings


def read_class_indices(path: str, num_classes: int) -> list[int]:
    """The classes in a --valid-labels file in its order, as in timm's validate; a label is an index among them."""
    with reraise_as_user_error(f"--valid-labels {path}"):
        words = Path(path).read_text().split()
    for word in words or [""]:
        if not word.isdecimal() or int(word) >= num_classes:
            expected = f"expected numbers in 0..{num_classes - 1}, one per line"
            raise UserError(f"--valid-labels {path}: {word!r} is not a class; {expected}")
    return list(map(int, words))


def _match_model_classes(context: EvalContext, spec: EvalSpec, dataset: EvalDataset) -> None:
    """Give labels the numbers of the model's classes, by name, and warn about what is assumed. Raise UserError if a
    class is unknown to the model, or its name does not tell which of the model's it is."""
    source, num_classes, trained = dataset.source, context.num_classes, context.class_names or []
    names, count, where = source.class_names or [], source.num_classes or 0, f"{spec.name} {spec.root}"
    known = {"ImageNet synsets": shifts.synsets()} if num_classes == 1000 else {}
    known |= {"numbers": [str(index) for index in range(num_classes)]}
    counts, cure = f"it has {count} classes, the model {num_classes}", "; map its classes with --class-map FILE"
    class_map = context.config.class_map
    if names and trained and (not class_map or context.class_map_digest):
        if names != trained:
            source.renumber(trained)
            _warn(context, f"{where}: its labels are renumbered by the {len(trained)} classes of the training data")
    elif count > num_classes > 0:
        raise UserError(f"{where}: {counts}{cure}")
    elif class_map or not 0 < count < num_classes:
        return
    elif names and (kinds := [kind for kind, order in known.items() if set(names) <= set(order)]):
        source.renumber(known[kinds[0]])
        _warn(context, f"{where}: its {count} class names are {kinds[0]} and determine the labels")
    elif names:
        raise UserError(f"{where}: {counts}, and the name {names[0]!r} does not tell which{cure}")
    else:
        assumption = f"its labels are taken as the model's first {count} classes; if that is wrong, use --class-map"
        _warn(context, f"{where}: {counts}: {assumption}")


def _compare_colors(context: EvalContext, spec: EvalSpec, dataset: EvalDataset) -> None:
    """Warn if a sample of the images is gray and the model takes color, or the other way round."""
    modes = _image_modes(dataset.source) if context.config.input_img_mode is None else []
    gray_model = dataset.image_mode == "L"
    if modes and all((mode in ("1", "L")) != gray_model for mode in modes):
        effect = "converted to gray, their color is lost" if gray_model else "converted to RGB, three times the gray"
        where = f"{spec.name} {spec.root}"
        _warn(context, f"{where}: its images are {modes[0]}, the model takes {dataset.image_mode}: they are {effect}")


def _image_modes(source: Source) -> list[str]:
    """PIL modes of up to eight readable images: the first ones of shards, otherwise spread over the set."""
    step = 1 if isinstance(source, ShardSource) else max(1, len(source) // 8)
    modes = []
    for record in source.read(range(0, len(source), step)[:8]):
        with suppress(SampleError):
            if not isinstance(record, SampleError):
                image = record.image
                modes.append((image if isinstance(image, Image.Image) else open_image(image)).mode)
    return modes


def _warn(context: EvalContext, text: str) -> None:
    if context.rank == 0:
        log_once(text)
