"""What an evaluation works with: a model on its device, a data set, and this process's batches of it."""

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch import distributed as dist

from samon import contexts
from samon.data.corrupt import SampleError
from samon.data.decode import Transform, decode_pil
from samon.data.loader import create_loader
from samon.data.shards import RawSample, SampleOrError
from samon.data.stream import Processed, SampleStream
from samon.data.transforms import create_transform
from samon.errors import UserError
from samon.evals.metrics import Scoring
from samon.progress import progress_bar

log = logging.getLogger("samon")
DataConfig = dict[str, Any]  # timm's preprocessing: input_size, mean, std, interpolation, crop_pct, crop_mode


@dataclass
class EvalContext:
    """A model on its device, and this process among the others.

    Attributes:
        config: settings of the command line.
        autocast: makes the context of a forward pass (accuracy only; everything else is float32).
        name: the model's name in file names and figures.
        class_names: classes that the model was trained on, in the order of its outputs, if known.
        class_map_digest: of the labels that it was trained on, if known and given by a class map.
        compiled: the model as accuracy calls it, if --torchcompile asks for it.
    """

    config: argparse.Namespace
    model: nn.Module
    data_config: DataConfig
    device: torch.device
    rank: int = 0
    world_size: int = 1
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    name: str = ""
    class_names: list[str] | None = None
    class_map_digest: str = ""
    compiled: nn.Module | None = None

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


@dataclass(eq=False, kw_only=True)
class EvalDataset(SampleStream):
    """Images with their labels, in a fixed order.

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
        skip_corrupt: log a corrupt image and give a black one with label -1; otherwise it stops the evaluation.
        chosen: indices of the images to read; set by `load_batches`.
    """

    is_training: bool = False
    batch_size: int = 1
    name: str = ""
    split: str = ""
    limit: int | None = None
    border: int = 0
    keeps_size: bool = False
    label_of: Callable[[str], int] | None = None
    scorings: dict[str, Scoring] = field(default_factory=lambda: {"": Scoring()})
    class_names: list[str] | None = None
    mismatch: str = ""
    published_images: int | None = None
    class_of: list[int] | None = None
    skip_corrupt: bool = False
    chosen: Sequence[int] = ()

    def read_samples(self, epoch: int, stream: int, num_streams: int, skip: int) -> Iterator[tuple[int, SampleOrError]]:
        """Yield every `num_streams`-th batch; each is read at once, so that a shard is scanned once per batch."""
        order = shard_samples(self.chosen, self.batch_size, stream, num_streams)[skip:]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            yield from zip(batch, self.source.read(batch), strict=True)

    def _process_or_replace(self, sample: SampleOrError, *_: object) -> Processed:
        try:
            if self.label_of and isinstance(sample, RawSample):
                sample = sample._replace(label=self.label_of(sample.where))
            image, label = self.process(sample)
        except SampleError as error:
            if not self.skip_corrupt:
                raise
            log.warning("%s", error)
            black = Image.new(self.image_mode, (64, 64))
            return (black if self.transform is None else self.transform(black)), -1
        return image, label if self.class_of is None else self.class_of[label]


class ClassSubset(nn.Module):
    """A model with the logits of some classes only."""

    classes: Tensor

    def __init__(self, model: nn.Module, classes: Tensor | list[int]) -> None:
        super().__init__()
        self.model, self.num_classes = model, len(classes)
        self.register_buffer("classes", torch.as_tensor(classes, device=next(model.parameters()).device))

    def forward(self, x: Tensor) -> Tensor:
        return predict(self.model, x)[:, self.classes]


def restrict_to_single_labels(evaluation: str, model: nn.Module, dataset: EvalDataset) -> nn.Module:
    """Return the model with the logits of the set's classes; make each label of the set the index of its class. Raise
    UserError if an image may have no or several right classes, for which the losses are not defined."""
    classes, label_sets = next(iter(dataset.scorings.values()))
    if label_sets is not None:
        label_sets = label_sets if classes is None else label_sets[:, classes]
        if (label_sets.sum(1) != 1).any():
            fault = "images have no or several right classes, and its loss is defined for one"
            raise UserError(f"{evaluation} {dataset.name}: {fault}; evaluate a set with one label per image")
        dataset.class_of = label_sets.float().argmax(1).tolist()
    return model if classes is None else ClassSubset(model, classes)


def choose_samples(size: int, count: int | None, seed: int, limit: int | None = None) -> list[int]:
    """Draw `count` of the first `limit` of `size` indices by `seed`, ascending; all of them if `count` is None."""
    size = min(size, limit or size)
    if count is None or count >= size:
        return list(range(size))
    return sorted(torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def shard_samples(samples: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[int]:
    """Every `world_size`-th batch of samples: batches do not depend on the number of processes (or workers)."""
    starts = range(rank * batch_size, len(samples), world_size * batch_size)
    return [i for start in starts for i in samples[start : start + batch_size]]


def load_batches(
    context: EvalContext,
    dataset: EvalDataset,
    samples: list[int],
    batch_size: int,
    raw: bool = False,
    progress: str = "",
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield this process's batches of `samples`: (batch number, sample indices, images, labels).

    Images [B, C, H, W] and labels [B] are on the device.

    Args:
        raw: images in [0, 1] instead of normalized ones.
        progress: name of a progress bar over this process's images.
    """
    config, size = context.config, context.data_config["input_size"]
    mine = shard_samples(samples, batch_size, context.rank, context.world_size)
    if not mine:
        return
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    options = {key: context.data_config[key] for key in keys} | {"use_prefetcher": not config.no_prefetcher}
    if raw:
        options |= {"mean": (0.0,) * size[0], "std": (1.0,) * size[0]}
    stream = replace(dataset, size=len(mine), batch_size=batch_size, chosen=mine)
    workers = {"num_workers": config.workers, "pin_memory": config.pin_mem}
    loader = create_loader(stream, size, batch_size, device=context.device, decoder="pil", **workers, **options)
    if dataset.border:
        stream.decode = partial(_crop_border, dataset)
    if dataset.keeps_size:
        exact = create_transform(size, **options | {"crop_pct": 1.0})
        stream.transform = partial(_transform_by_size, exact, stream.transform or exact, (size[2], size[1]))
    show = bool(progress) and context.rank == 0
    with closing(loader), progress_bar(progress, len(mine), "image", show=show) as bar:
        for k, (images, labels) in enumerate(loader):
            index = torch.tensor(mine[k * batch_size : (k + 1) * batch_size])
            yield context.rank + k * context.world_size, index, images, labels
            bar.update(len(images))


def _crop_border(dataset: EvalDataset, data: bytes | Image.Image) -> Image.Image:
    """Decode an image and crop the data set's border from each side."""
    image, border = decode_pil(data, dataset.image_mode), dataset.border
    width, height = image.size
    if min(width, height) <= 2 * border:
        raise SampleError(f"{width} x {height} pixels, too small to crop a border of {border}")
    return image.crop((border, border, width - border, height - border))


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
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    model.eval()
    try:
        if requires_grad is not None:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        fixed = nullcontext() if requires_grad is None else contexts.requires_grad(model.parameters(), requires_grad)
        with fixed, contexts.uncached_biases(contexts.find_bias_caches(model.modules())):
            yield
    finally:
        model.train(training)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
