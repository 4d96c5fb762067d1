"""What every evaluation needs: a model on its device, a data set with its labels, this process's batches of it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_loader, create_transform
from timm.data.loader import fast_collate
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from samon.data.classes import check_label, check_ranks
from samon.data.corrupt import ImageError, SampleError, explain_worker_error
from samon.data.decode import decode_pil, open_image
from samon.data.loader import SharedMemoryCollate
from samon.data.shards import RawSample
from samon.data.sources import ShardSource, Source, open_source
from samon.errors import UserError
from samon.evals import shifts
from samon.progress import progress_bar

log = logging.getLogger("samon")
_warn = cache(log.warning)  # once in a run, however often the set is opened


@dataclass
class Target:
    """A model on a device, and this process among the others."""

    config: Any  # the settings, by name; never set
    model: nn.Module
    data_config: dict[str, Any]  # timm's: input_size, mean, std, interpolation, crop_pct, crop_mode
    device: torch.device
    rank: int
    world: int
    autocast: Callable[[], AbstractContextManager[Any]]
    name: str = ""  # of the model, in files
    class_names: list[str] | None = None  # that it was trained on, in the order of its outputs

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, where the values lie."""
        found = values.to(self.device)
        if self.world > 1:
            dist.all_reduce(found)
        return found.to(values.device)


@dataclass(eq=False)
class EvalImages(Dataset):
    """PIL images in a fixed order, each with the row of its label; a damaged one stops the evaluation."""

    source: Source
    img_mode: str = "RGB"
    border: int = 0  # pixels cut off on every side before anything else
    row_of: Callable[[str], int] | None = None  # from where an image lies, in place of its label
    scorings: dict[str, shifts.Scoring] = field(default_factory=lambda: {"": (None, None)})
    mismatch: str = ""  # what differs from the set as published
    keeps_size: bool = False  # images of the model's input size are neither resized nor cropped
    class_of: list[int] | None = None  # of each row of labels, where `one_label` has made classes of them
    num_labels: int | None = None  # labels lie in 0..num_labels - 1
    chosen: Sequence[int] | None = None  # numbers of the images that are read; None for all
    transform: Callable[[Any], Any] | None = None  # set by timm's loader

    def __len__(self) -> int:
        return len(self.source if self.chosen is None else self.chosen)

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        """One batch at a time (torch's fetcher calls this), so that a shard is scanned once per batch."""
        wanted = indices if self.chosen is None else [self.chosen[i] for i in indices]
        return [self.load(record) for record in self.source.read(wanted)]

    def load(self, record: RawSample | SampleError) -> tuple[Any, int]:
        """The transformed image and its label.

        Raises:
            UserError: it is damaged, or its label is no class.
        """
        try:
            return self.decode(record)
        except SampleError as error:
            raise UserError(f"{error}; repair the data set, evaluation skips nothing") from error

    def decode(self, record: RawSample | SampleError) -> tuple[Any, int]:
        """`load`, with a SampleError that names the sample."""
        if isinstance(record, SampleError):
            raise record
        label = self._label(record)
        try:
            image = decode_pil(record.image, self.img_mode)
            if self.border:
                width, height = image.size
                if min(width, height) <= 2 * self.border:
                    raise ImageError(f"{width} x {height} pixels, nothing is left inside a border of {self.border}")
                image = image.crop((self.border, self.border, width - self.border, height - self.border))
            return image if self.transform is None else self.transform(image), label
        except SampleError as error:
            raise ImageError(f"{record.where}: {error}") from error
        except Exception as error:  # a transform can raise anything on sizes that it does not expect
            raise ImageError(f"{record.where}: {type(error).__name__}: {' '.join(str(error).split())}") from error

    def _label(self, record: RawSample) -> int:
        label = record.label if self.row_of is None else self.row_of(record.where)
        label = check_label(label, self.num_labels, record.where)
        return label if self.class_of is None else self.class_of[label]


@dataclass(frozen=True)
class Entry:
    """One data set to evaluate."""

    name: str
    dataset: str
    root: str
    split: str
    evals: Sequence[str]
    kind: str = ""  # a key of `shifts.SETS`, or '' for labels as they are
    about: Mapping[str, Any] = field(default_factory=dict)  # goes into every row
    first: int | None = None  # only so many images from the front: what a training run validates on

    def images(self, target: Target, split: str | None = None) -> EvalImages:
        """A split (its own if none is named) with how its labels are to be read: every evaluation opens it so.

        The labels are read by the set's convention, or as the settings say, or as they are.
        """
        config, own = target.config, split in (None, self.split)
        classes = getattr(target.model, "num_classes", 1000)
        if (self.kind or config.real_labels) and classes != 1000:
            raise UserError(f"{self.name}: needs a model of the 1000 ImageNet classes, this one has {classes}")
        if self.kind and (config.valid_labels or config.real_labels):
            flag = "--valid-labels" if config.valid_labels else "--real-labels"
            raise UserError(f"{self.name}: {self.kind} decides by itself which labels count; drop {flag}")
        images = self._open(target, self.split if split is None else split)
        check_ranks(images.source.class_names, len(images), images.source.location)
        if self.kind:
            named, counted = shifts.SETS[self.kind].named, {}
            table = shifts.label_table(self.kind, images.source.class_names)
            if named == "real":
                images.row_of = shifts.validation_number
            else:
                counted["classes"] = int(table.any(1).sum())
            if not (named == "objectnet" and self.dataset.startswith("wds")):  # labels lie inside the shards
                counted["images"] = len(images)
            images.scorings = shifts.scorings(self.kind, table)
            images.mismatch = shifts.mismatch(self.kind, **counted) if own else ""
        elif config.valid_labels or config.real_labels:
            names = ["ReaL"] * bool(config.real_labels) + ["valid labels"] * bool(config.valid_labels)
            valid = shifts.class_indices(config.valid_labels, classes) if config.valid_labels else None
            real = None
            if config.real_labels:
                real = shifts.real_labels(None if config.real_labels == "real" else config.real_labels)
                images.row_of = shifts.validation_number
            images.scorings = {", ".join(names): (valid, real)}
        else:
            self._compare(target, images)
        columns, rows = next(iter(images.scorings.values()))
        images.num_labels = len(rows) if rows is not None else classes if columns is None else len(columns)
        return images

    def _open(self, target: Target, split: str) -> EvalImages:
        config, shift = target.config, shifts.SETS.get(self.kind)
        mode = config.input_img_mode or ("L" if target.data_config["input_size"][0] == 1 else "RGB")
        options = {"input_key": config.input_key, "target_key": config.target_key}
        options["unlabeled"] = bool(config.real_labels) or (shift is not None and shift.named == "real")
        options |= {"download": config.dataset_download, "trust_remote_code": config.dataset_trust_remote_code}
        options |= {"allow_shell_urls": config.allow_shell_urls, "shard_cache": config.shard_cache}
        options |= {"shard_cache_size": int(config.shard_cache_size * 2**30), "random_access": True}
        if shift is None:  # else what its classes are called decides the label
            options["class_map"] = config.class_map
        source = open_source(self.dataset, self.root, split, keep=shifts.kept(self.kind), **options)
        border = (shift.border if shift else 0) + (config.crop_border_pixels or 0)
        return EvalImages(source, mode, border, keeps_size=shift is not None and shift.keeps_size)

    def _compare(self, target: Target, images: EvalImages) -> None:
        """Labels get the numbers of the model's classes; what is assumed where nothing tells is said.

        Raises:
            UserError: a class that is none of the model's, or that cannot be told from its name.
        """
        source, classes = images.source, getattr(target.model, "num_classes", 0)
        names, found = source.class_names or [], source.num_classes or 0
        said, trained = [], target.class_names or []
        do = "; give its classes' numbers with --class-map FILE"
        if names and trained and names != trained and not target.config.class_map:
            source.renumber(trained)
            said.append(f"its labels are numbered by the {len(trained)} classes that were trained on")
        elif found > classes > 0:
            raise UserError(f"{self.name} {self.root}: it has {found} classes, the model {classes}{do}")
        elif 0 < found < classes and not target.config.class_map:
            if classes == 1000 and names and set(names) <= set(shifts.synsets()):
                images.scorings = {"": (None, shifts.label_table("imagenet", names))}
                said.append(f"its {found} classes are called as ImageNet's and taken as these")
            elif names and set(names) <= set(map(str, range(classes))):
                source.renumber([str(index) for index in range(classes)])
                said.append(f"its {found} class names are numbers and taken as the model's")
            elif names:
                what = f"it has {found} classes, the model {classes}, and {names[0]!r} does not tell which"
                raise UserError(f"{self.name} {self.root}: {what}{do}")
            else:
                assumed = f"its labels are taken as the model's first {found} classes; if they are others, --class-map"
                said.append(f"it has {found} classes, the model {classes}: {assumed}")
        modes = _modes(source) if target.config.input_img_mode is None else []
        if modes and all((mode in ("1", "L")) != (images.img_mode == "L") for mode in modes):
            made = "gray, their color is lost" if images.img_mode == "L" else "RGB, three times the gray"
            said.append(f"its images are {modes[0]}, the model takes {images.img_mode}: they are made {made}")
        for text in said if target.rank == 0 else ():
            _warn(f"{self.name} {self.root}: {text}")


def _modes(source: Source) -> list[str]:
    """PIL's modes of up to eight images, spread over folders, the first ones of shards; of those that can be read."""
    step = 1 if isinstance(source, ShardSource) else max(1, len(source) // 8)
    found = []
    for record in source.read(range(0, len(source), step)[:8]):
        with suppress(SampleError):
            if isinstance(record, SampleError):
                raise record
            image = record.image
            found.append((image if isinstance(image, Image.Image) else open_image(image)).mode)
    return found


class Among(nn.Module):
    """``model`` with the logits of the classes that predictions are restricted to."""

    columns: Tensor

    def __init__(self, model: nn.Module, columns: Tensor | list[int]):
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.register_buffer("columns", torch.as_tensor(columns, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return predict(self.model, x)[:, self.columns]


def one_label(what: str, entry: Entry, images: EvalImages, model: nn.Module) -> nn.Module:
    """The model with the logits of the set's classes; a label of the images becomes its class among them.

    Raises:
        UserError: an image may have several right classes.
    """
    columns, table = next(iter(images.scorings.values()))
    if table is not None and int(table.sum(1).max()) > 1:
        why = "its images have several right classes, and the loss that is maximised is defined for one"
        raise UserError(f"{what} {entry.name}: {why}; evaluate a set with one label an image")
    if table is not None:
        images.class_of = (table if columns is None else table[:, columns]).float().argmax(1).tolist()
    return model if columns is None else Among(model, columns)


def choose(size: int, count: int | None, seed: int, first: int | None = None) -> list[int]:
    """``count`` of ``size`` indices (of the ``first`` so many) drawn by ``seed``, ascending; all if there are fewer."""
    size = min(size, first or size)
    if count is None or count >= size:
        return list(range(size))
    return sorted(torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def share(indices: Sequence[int], batch_size: int, rank: int, world: int) -> list[int]:
    """This process's part: every world-th whole batch, so that a batch is the same whoever computes it."""
    starts = range(rank * batch_size, len(indices), world * batch_size)
    return [i for start in starts for i in indices[start : start + batch_size]]


def batches(
    target: Target, images: EvalImages, chosen: list[int], size: int, *, raw: bool = False, bar: str = ""
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(number of the batch, its indices in the set, images, labels) of this process's share of ``chosen``.

    Images and labels lie on the device.
    ``raw`` leaves the images in [0, 1] instead of normalising them; ``bar`` names a progress bar of images, the
    first process's share of them.
    """
    mine = share(chosen, size, target.rank, target.world)
    if not mine:
        return
    config, data = target.config, target.data_config
    options: dict[str, Any] = {key: data[key] for key in ("interpolation", "crop_pct", "crop_mode", "mean", "std")}
    if raw:
        options |= {"mean": (0.0,) * len(data["mean"]), "std": (1.0,) * len(data["std"])}
    options |= {"num_workers": config.workers, "pin_memory": config.pin_mem, "use_prefetcher": not config.no_prefetcher}
    options |= {"persistent_workers": False, "device": target.device}
    options["collate_fn"] = SharedMemoryCollate(fast_collate if options["use_prefetcher"] else default_collate)
    part: Any = replace(images, chosen=mine)  # timm types its own data sets
    loader = create_loader(part, data["input_size"], size, **options)
    if images.keeps_size:
        same = {key: options[key] for key in ("interpolation", "mean", "std", "use_prefetcher")}
        exact = create_transform(data["input_size"], crop_pct=1.0, **same)
        part.transform = partial(_unless_sized, exact, part.transform, data["input_size"][:0:-1])
    try:
        with progress_bar(bar, len(mine), "image", show=bool(bar) and target.rank == 0) as shown:
            for k, (x, y) in enumerate(loader):
                index = torch.tensor(mine[k * size : (k + 1) * size])
                yield target.rank + k * target.world, index, x.to(target.device), y.to(target.device)
                shown.update(len(x))
    except (RuntimeError, OSError, UserError) as error:
        raise explain_worker_error(error) from None


def _unless_sized(exact: Any, transform: Any, size: tuple[int, int], image: Image.Image) -> Any:
    """``exact`` of an image that has the ``size`` (width, height), ``transform`` of any other."""
    return (exact if image.size == tuple(size) else transform)(image)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The model's output [B, C]; the first one of several."""
    output = model(images)
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def evaluating(model: nn.Module, gradients: bool | None = None) -> Iterator[None]:
    """Eval mode inside; afterwards as before.

    If ``gradients`` is given, all parameters are with or without them, in `full_precision`.
    """
    was_training = model.training
    changed = [] if gradients is None else [p for p in model.parameters() if p.requires_grad != gradients]
    model.eval()
    try:
        for parameter in changed:
            parameter.requires_grad_(bool(gradients))
        with nullcontext() if gradients is None else full_precision():
            yield
    finally:
        model.train(was_training)
        for parameter in changed:
            parameter.requires_grad_(not gradients)


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 all through: no TF32 in convolutions and matrix products on GPUs."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
