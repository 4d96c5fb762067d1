"""What every evaluation needs: a model on its device, a data set with its labels, this process's batches of it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.data import create_loader
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from samon.data.decode import decode_pil
from samon.data.faults import SampleError, from_worker
from samon.data.shards import Record
from samon.data.sources import Source, open_source
from samon.errors import UserError
from samon.evals import evaluation, needs_data, shifts
from samon.evals.results import Row

log = logging.getLogger("samon")
Device = torch.device | str


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

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, on the CPU."""
        values = values.to(self.device)
        if self.world > 1:
            dist.all_reduce(values)
        return values.cpu()


@dataclass(eq=False)
class EvalImages(Dataset):
    """PIL images in a fixed order, each with the row of its label; a damaged one stops the evaluation."""

    source: Source
    img_mode: str = "RGB"
    border: int = 0  # pixels cut off on every side before anything else
    row_of: Callable[[str], int] | None = None  # from where an image lies, in place of its label
    scorings: dict[str, shifts.Scoring] = field(default_factory=lambda: {"": (None, None)})
    mismatch: str = ""  # what differs from the set as published

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        """One batch at a time (torch's fetcher calls this), so that a shard is scanned once per batch."""
        return [self._decoded(record) for record in self.source.read(indices)]

    def _decoded(self, record: Record | SampleError) -> tuple[Any, int]:
        if isinstance(record, SampleError):
            raise UserError(f"{record}; repair the data set, evaluation skips nothing") from record
        try:
            image = decode_pil(record.image, self.img_mode)
        except SampleError as error:
            raise UserError(f"{record.where}: {error}; repair the data set, evaluation skips nothing") from error
        if self.border:
            width, height = image.size
            image = image.crop((self.border, self.border, width - self.border, height - self.border))
        return image, record.label if self.row_of is None else self.row_of(record.where)


@dataclass(frozen=True)
class Entry:
    """One data set to evaluate."""

    name: str
    dataset: str
    root: str
    split: str
    evals: Sequence[str]
    kind: str = ""  # a key of `shifts.SETS`, or '' for labels as they are
    first: int | None = None  # only so many images from the front: what a training run validates on

    def open(self, target: Target, split: str) -> EvalImages:
        """A split with its labels as they are."""
        config, shift = target.config, shifts.SETS.get(self.kind)
        mode = config.input_img_mode or ("L" if target.data_config["input_size"][0] == 1 else "RGB")
        options = {"input_key": config.input_key, "target_key": config.target_key, "input_img_mode": mode}
        options |= {"download": config.dataset_download, "trust_remote_code": config.dataset_trust_remote_code}
        if shift is None:  # else what its classes are called decides the label
            options |= {"class_map": config.class_map, "num_classes": getattr(target.model, "num_classes", None)}
        source = open_source(self.dataset, self.root, split, keep=shifts.kept(self.kind), **options)
        return EvalImages(source, mode, shift.border if shift else 0)

    def labelled(self, target: Target) -> EvalImages:
        """The split, with how its labels are to be read: by the set's convention, or as the settings say."""
        classes = getattr(target.model, "num_classes", 1000)
        if self.kind and classes != 1000:
            raise UserError(f"{self.name}: needs a model of the 1000 ImageNet classes, this one has {classes}")
        config, images = target.config, self.open(target, self.split)
        if self.kind:
            named, counted = shifts.SETS[self.kind].named, {}
            table = shifts.label_table(named, images.source.class_names)
            if named == "real":
                images.row_of = shifts.validation_number
            else:
                counted["classes"] = int(table.any(1).sum())
            if not (named == "objectnet" and self.dataset.startswith("wds")):  # labels lie inside the shards
                counted["images"] = len(images)
            images.scorings, images.mismatch = shifts.scorings(self.kind, table), shifts.mismatch(self.kind, **counted)
            return images
        if config.valid_labels:
            columns = [int(line) for line in Path(config.valid_labels).read_text().split()]
            images.scorings = {"valid labels": (columns, None)}
        if config.real_labels:
            table = shifts.real_labels(None if config.real_labels == "real" else config.real_labels)
            images.scorings, images.row_of = {"ReaL": (None, table)}, shifts.validation_number
        return images


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


class Part(Subset):
    """Chosen images, through the transform that the loader sets."""

    transform: Any = None

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        return [(self.transform(image), label) for image, label in super().__getitems__(indices)]


def batches(
    target: Target, images: Dataset, chosen: list[int], size: int, *, raw: bool = False, bar: str = ""
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(number of the batch, its indices in the set, images, labels) of this process's share of ``chosen``.

    ``raw`` leaves the images in [0, 1] instead of normalising them; ``bar`` names a progress bar.
    """
    mine = share(chosen, size, target.rank, target.world)
    if not mine:
        return
    config, data = target.config, target.data_config
    options: dict[str, Any] = {key: data[key] for key in ("interpolation", "crop_pct", "crop_mode", "mean", "std")}
    if raw:
        options |= {"mean": (0.0,) * len(data["mean"]), "std": (1.0,) * len(data["std"])}
    options |= {"num_workers": config.workers, "pin_memory": config.pin_mem, "use_prefetcher": not config.no_prefetcher}
    options |= {"crop_border_pixels": config.crop_border_pixels, "persistent_workers": False, "device": target.device}
    part: Any = Part(images, mine)  # timm types its own data sets
    loader = create_loader(part, data["input_size"], size, **options)
    try:
        for k, (x, y) in enumerate(tqdm(loader, bar, disable=not bar or target.rank != 0, unit="batch")):
            yield target.rank + k * target.world, torch.tensor(mine[k * size : (k + 1) * size]), x, y
    except UserError as error:
        raise from_worker(error) from None


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The model's output [B, C]; the first one of several."""
    output = model(images)
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def evaluating(model: nn.Module, gradients: bool | None = None) -> Iterator[None]:
    """Eval mode inside, all parameters with or without ``gradients`` if that is given; afterwards as before."""
    was_training = model.training
    changed = [] if gradients is None else [p for p in model.parameters() if p.requires_grad != gradients]
    model.eval()
    try:
        for parameter in changed:
            parameter.requires_grad_(bool(gradients))
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


def evaluate(target: Target, entry: Entry, about: Row) -> list[Row]:
    """An entry's evaluations that need its data, as full rows; ``about`` names the model."""
    rows = []
    for name in filter(needs_data, entry.evals):
        log.info("%s on %s", name, entry.name)
        place = {"dataset": entry.name, "split": entry.split, "eval": name}
        rows += [{**about, **place, **row} for row in evaluation(name).rows(target, entry)]
    return rows
