"""What an evaluation works with: a model on its device, a data set, and this process's batches of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from PIL import Image
from timm.data import create_loader, create_transform
from timm.data.loader import fast_collate
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import Dataset, default_collate

from samon.data.classes import check_label
from samon.data.corrupt import ImageError, SampleError, explain_worker_error
from samon.data.decode import decode_pil
from samon.data.loader import SharedMemoryCollate
from samon.data.shards import RawSample
from samon.data.sources import Source
from samon.errors import UserError
from samon.evals.metrics import Scoring
from samon.progress import progress_bar
from samon.trainer.config import Config

Transform = Callable[[Image.Image], Any]  # an image to a tensor, or to a uint8 array for timm's prefetcher


@dataclass
class EvalContext:
    """A model on its device, and this process among the others.

    Attributes:
        config: settings of the command line.
        data_config: timm's preprocessing: input_size, mean, std, interpolation, crop_pct, crop_mode.
        autocast: makes the context of a forward pass (accuracy only; everything else is float32).
        name: the model's name in file names and figures.
        class_names: classes that the model was trained on, in the order of its outputs, if known.
    """

    config: Config
    model: nn.Module
    data_config: dict[str, Any]
    device: torch.device
    rank: int = 0
    world_size: int = 1
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    name: str = ""
    class_names: list[str] | None = None

    @property
    def num_classes(self) -> int:
        """Number of model outputs."""
        return int(getattr(self.model, "num_classes", 1000))

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over the processes, on the device of `values`."""
        total = values.to(self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.to(values.device)


@dataclass(eq=False)
class EvalDataset(Dataset):
    """PIL images with their labels, in a fixed order. A corrupt image stops the evaluation.

    Attributes:
        limit: evaluate only the first images, those a training run validates on.
        border: pixels to crop from every side before any other transform.
        keeps_size: images of the model's input size are neither resized nor cropped.
        label_of: label from a sample's path or key, instead of its stored label.
        scorings: how logits are compared with labels, by name; the first one is the set's own.
        class_names: of the outputs that the first scoring compares, if known.
        mismatch: how the set differs from the published one.
        published_images: expected number of images, if they can be counted only during the evaluation.
        class_of: class index by label, see `restrict_to_single_labels`.
        num_labels: labels must be less than this.
        selection: indices of the images to read; None for all.
        transform: set by timm's loader.
    """

    source: Source
    name: str = ""
    split: str = ""
    limit: int | None = None
    img_mode: str = "RGB"
    border: int = 0
    keeps_size: bool = False
    label_of: Callable[[str], int] | None = None
    scorings: dict[str, Scoring] = field(default_factory=lambda: {"": Scoring()})
    class_names: list[str] | None = None
    mismatch: str = ""
    published_images: int | None = None
    class_of: list[int] | None = None
    num_labels: int | None = None
    selection: Sequence[int] | None = None
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.source if self.selection is None else self.selection)

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        """Load a batch (called by torch's fetcher), so that a shard is scanned once per batch."""
        selected = indices if self.selection is None else [self.selection[i] for i in indices]
        return [self.load(record) for record in self.source.read(selected)]

    def load(self, record: RawSample | SampleError) -> tuple[Any, int]:
        """Decode a sample; raise UserError if it is corrupt or its label is out of range."""
        try:
            return self.decode(record)
        except SampleError as error:
            raise UserError(f"{error}; repair the data set, evaluation skips nothing") from error

    def decode(self, record: RawSample | SampleError) -> tuple[Any, int]:
        """Return the transformed image and its label; raise SampleError naming the sample."""
        if isinstance(record, SampleError):
            raise record
        label = record.label if self.label_of is None else self.label_of(record.where)
        label = check_label(label, self.num_labels, record.where)
        label = label if self.class_of is None else self.class_of[label]
        try:
            image = decode_pil(record.image, self.img_mode)
            if self.border:
                width, height = image.size
                if min(width, height) <= 2 * self.border:
                    raise ImageError(f"{width} x {height} pixels, too small to crop a border of {self.border}")
                image = image.crop((self.border, self.border, width - self.border, height - self.border))
            return image if self.transform is None else self.transform(image), label
        except SampleError as error:
            raise ImageError(f"{record.where}: {error}") from error
        except Exception as error:  # transforms raise anything on sizes they do not expect
            raise ImageError(f"{record.where}: {type(error).__name__}: {' '.join(str(error).split())}") from error


class ClassSubset(nn.Module):
    """A model with the logits of some classes only."""

    classes: Tensor

    def __init__(self, model: nn.Module, classes: Tensor | list[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("classes", torch.as_tensor(classes, device=next(model.parameters()).device))

    def forward(self, x: Tensor) -> Tensor:
        return predict(self.model, x)[:, self.classes]


def restrict_to_single_labels(evaluation: str, model: nn.Module, dataset: EvalDataset) -> nn.Module:
    """Return the model with the logits of the set's classes; make each label of the set the index of its class.

    Raises:
        UserError: an image may have several right classes, for which the losses are not defined.
    """
    classes, label_sets = next(iter(dataset.scorings.values()))
    if label_sets is not None:
        if int(label_sets.sum(1).max()) > 1:
            fault = "images have several right classes, and its loss is defined for one"
            raise UserError(f"{evaluation} {dataset.name}: {fault}; evaluate a set with one label per image")
        label_sets = label_sets if classes is None else label_sets[:, classes]
        dataset.class_of = label_sets.float().argmax(1).tolist()
    return model if classes is None else ClassSubset(model, classes)


def choose_samples(size: int, count: int | None, seed: int, limit: int | None = None) -> list[int]:
    """Draw `count` of the first `limit` of `size` indices by `seed`, ascending; all of them if `count` is None."""
    size = min(size, limit or size)
    if count is None or count >= size:
        return list(range(size))
    return sorted(torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def shard_samples(samples: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[int]:
    """This process's samples: every `world_size`-th batch, so that batches do not depend on the number of processes."""
    starts = range(rank * batch_size, len(samples), world_size * batch_size)
    return [i for start in starts for i in samples[start : start + batch_size]]


def load_batches(
    context: EvalContext,
    dataset: EvalDataset,
    samples: list[int],
    batch_size: int,
    *,
    raw: bool = False,
    progress: str = "",
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield this process's batches of `samples`: (batch number, sample indices, images, labels).

    Images [B, C, H, W] and labels [B] are on the device.

    Args:
        raw: images in [0, 1] instead of normalized ones.
        progress: name of a progress bar over this process's images.
    """
    config, data, size = context.config, context.data_config, context.data_config["input_size"]
    mine = shard_samples(samples, batch_size, context.rank, context.world_size)
    if not mine:
        return
    prefetch = not config.no_prefetcher
    options: dict[str, Any] = {key: data[key] for key in ("interpolation", "mean", "std")}
    if raw:
        options |= {"mean": (0.0,) * len(data["mean"]), "std": (1.0,) * len(data["std"])}
    subset = replace(dataset, selection=mine)
    loader = create_loader(
        subset,  # type: ignore[arg-type]  # timm types its own data sets
        size,
        batch_size,
        crop_pct=data["crop_pct"],
        crop_mode=data["crop_mode"],
        num_workers=config.workers,
        pin_memory=config.pin_mem,
        persistent_workers=False,
        use_prefetcher=prefetch,
        collate_fn=SharedMemoryCollate(fast_collate if prefetch else default_collate),
        device=context.device,
        **options,
    )
    if dataset.keeps_size:
        exact = create_transform(size, crop_pct=1.0, use_prefetcher=prefetch, **options)
        subset.transform = partial(_transform_by_size, exact, cast(Transform, subset.transform), (size[2], size[1]))
    try:
        with progress_bar(progress, len(mine), "image", show=bool(progress) and context.rank == 0) as bar:
            for k, (images, labels) in enumerate(loader):
                index = torch.tensor(mine[k * batch_size : (k + 1) * batch_size])
                number = context.rank + k * context.world_size
                yield number, index, images.to(context.device), labels.to(context.device)
                bar.update(len(images))
    except (RuntimeError, OSError, UserError) as error:
        raise explain_worker_error(error) from None


def _transform_by_size(exact: Transform, other: Transform, size: tuple[int, int], image: Image.Image) -> object:
    """Apply `exact` to an image of `size` (width, height) and `other` to all others."""
    return (exact if image.size == size else other)(image)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, C] of a model, the first of its outputs if it has several."""
    output = model(images)
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def evaluating(model: nn.Module, requires_grad: bool | None = None) -> Iterator[None]:
    """Put the model in eval mode for the block, and restore its mode afterwards.

    If `requires_grad` is given, all parameters have it inside the block, and GPUs compute in float32 without TF32.
    """
    training = model.training
    changed = [] if requires_grad is None else [p for p in model.parameters() if p.requires_grad != requires_grad]
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    model.eval()
    try:
        for parameter in changed:
            parameter.requires_grad_(bool(requires_grad))
        if requires_grad is not None:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        model.train(training)
        for parameter in changed:
            parameter.requires_grad_(not requires_grad)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
