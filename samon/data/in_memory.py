"""Data sets kept in the device's memory and augmented there in batches (`--in-memory`).

For sets that fit (CIFAR: 150 MB): no worker processes, no copies, no waiting. Every rank keeps the whole set and takes
its part of each global batch. The random numbers of an epoch are drawn at once on the CPU from (seed, epoch), by sample
index, so a sample's augmentation depends on neither its batch nor the device, the processes or a restart."""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode

# Private in torchvision: what its AutoAugment does to one image, here to a batch. AutoAugment itself, called with one
# operation at a time, takes 1.4 times as long on a CPU.
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.v2.functional import equalize

from samon.data.classes import check_label
from samon.data.sources import PairSource
from samon.data.stream import SampleStream, check_epoch, process_rank
from samon.data.transforms import GRAY, pad_pixels
from samon.errors import UserError

# Batches are augmented together up to this number of samples: AutoAugment launches some hundred small kernels, whatever
# the number of images, and a sample's augmentation does not depend on its batch.
AUGMENTED_TOGETHER = 2048


@dataclass
class AugmentDraws:
    """One epoch's random numbers; the first axis is the sample index of the whole data set."""

    order: Tensor  # [N] permutation
    corner: Tensor  # [N, 2] top and left corner of the crop in the padded image
    flip: Tensor  # [N] bool
    policy: Tensor  # [N] AutoAugment sub-policy
    chance: Tensor  # [N, 2] uniform numbers that decide whether each operation is applied
    negative: Tensor  # [N, 2] bool, direction of signed operations


class Augment:
    """Pad-and-crop, flip and AutoAugment of uint8 batches [B, C, H, W], all on the batch's device."""

    def __init__(self, size: tuple[int, int], hflip: float = 0.5, policy: bool = False) -> None:
        self.size, self.hflip, self.pad = size, hflip, pad_pixels(min(size))
        self.auto = AutoAugment(AutoAugmentPolicy.CIFAR10) if policy else None

    def draw(self, count: int, seed: int, epoch: int) -> AugmentDraws:
        """Draw an epoch's random numbers for `count` samples."""
        g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return AugmentDraws(
            order=torch.randperm(count, generator=g),
            corner=torch.randint(2 * self.pad + 1, (count, 2), generator=g),
            flip=torch.rand(count, generator=g) < self.hflip,
            policy=torch.randint(25, (count,), generator=g),
            chance=torch.rand(count, 2, generator=g),
            negative=torch.randint(2, (count, 2), generator=g).bool(),
        )

    def __call__(self, images: Tensor, index: Tensor, draws: AugmentDraws) -> Tensor:
        """Return the augmented uint8 [B, C, H, W] of the samples `index` [B] (on the CPU)."""
        device, (height, width) = images.device, self.size
        corner = draws.corner[index].to(device, non_blocking=True)
        flip = draws.flip[index].to(device, non_blocking=True)
        windows = F.pad(images, (self.pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view, by corner
        batch = torch.arange(len(images), device=device)
        images = windows[batch, :, corner[:, 0], corner[:, 1]].contiguous()
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        if self.auto is not None:
            for step in (0, 1):
                self._apply_policies(self.auto, images, step, index, draws)
        return images

    def _apply_policies(self, auto: AutoAugment, images: Tensor, step: int, index: Tensor, draws: AugmentDraws) -> None:
        """Apply each sample's operation number `step` in place, one call per operation, strength and direction."""
        space = auto._augmentation_space(10, self.size)
        groups: dict[tuple[str, float], list[int]] = {}
        numbers = (draws.policy[index], draws.chance[index, step], draws.negative[index, step])
        for row, (policy, chance, negative) in enumerate(zip(*(n.tolist() for n in numbers), strict=True)):
            name, probability, level = auto.policies[policy][step]
            if chance <= probability:
                magnitudes, signed = space[name]
                magnitude = float(magnitudes[level]) if level is not None else 0.0
                groups.setdefault((name, -magnitude if signed and negative else magnitude), []).append(row)
        fill = [float(GRAY)] * images.shape[1]
        for (name, magnitude), rows in groups.items():
            where = torch.tensor(rows, device=images.device)
            images[where] = (
                equalize(images[where])  # the other goes image by image, and waits for the device at each
                if name == "Equalize"
                else _apply_op(images[where], name, magnitude, InterpolationMode.NEAREST, fill)
            )


@dataclass(eq=False)
class InMemoryLoader:
    """Normalized batches (input, target) of a data set kept as uint8 [N, C, H, W] and labels [N] on the device."""

    images: Tensor
    labels: Tensor
    batch_size: int
    _: KW_ONLY
    is_training: bool
    num_samples: int  # per epoch
    mean: Sequence[float]
    std: Sequence[float]
    augment: Augment | None = None
    seed: int = 42
    img_dtype: torch.dtype = torch.float32

    mixup_enabled = False
    corrupt_samples = epoch = samples_consumed = 0
    worker_error = None  # there are no workers

    def __post_init__(self) -> None:
        self.rank, self.world_size = process_rank()
        if self.is_training:
            check_epoch(self.num_samples, self.batch_size, self.world_size)
        pixels = [[value * 255 for value in values] for values in (self.mean, self.std)]
        self.shift, self.scale = torch.tensor(pixels, device=self.images.device).view(2, 1, -1, 1, 1)

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch; training leaves out a last incomplete global batch."""
        if self.is_training:
            return self.num_samples // (self.batch_size * self.world_size)
        return -(-len(range(self.rank, self.num_samples, self.world_size)) // self.batch_size)

    def set_epoch(self, epoch: int, samples_consumed: int = 0) -> None:
        """Set the epoch of the next iteration, and how many of its samples (over all ranks) to skip."""
        step = self.batch_size * self.world_size  # a resumed run may have another one
        self.epoch, self.samples_consumed = epoch, samples_consumed // step * step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, world, draws = self.batch_size, self.world_size, None
        if self.is_training:
            draws = (self.augment or Augment((8, 8))).draw(len(self.images), self.seed, self.epoch)
            order = draws.order[self.samples_consumed : self.num_samples]
            starts = range(self.rank * size, len(order) // (size * world) * size * world, size * world)
        else:
            order = torch.arange(self.num_samples)[self.rank :: world]
            starts = range(0, len(order), size)
        together = max(1, AUGMENTED_TOGETHER // size)
        for first in range(0, len(starts), together):
            parts = [order[start : start + size] for start in starts[first : first + together]]
            index = torch.cat(parts)
            where = index.to(self.images.device, non_blocking=True)
            images, labels = self.images[where], self.labels[where]
            if draws is not None and self.augment is not None:
                images = self.augment(images, index, draws)
            counts = [len(part) for part in parts]
            for batch, targets in zip(images.split(counts), labels.split(counts), strict=True):
                yield batch.to(self.img_dtype).sub_(self.shift).div_(self.scale), targets
        self.set_epoch(self.epoch + 1)


def _read_all(stream: SampleStream, size: tuple[int, int, int], as_stored: bool) -> tuple[Tensor, Tensor]:
    """Return all images, uint8 [N, *size], and labels [N] of a stream, on the CPU.

    If `as_stored`, the stream's transform leaves images of `size` (C, H, W) as they are.
    """
    (channels, height, width), source, arrays = size, stream.source, None
    if as_stored and stream.image_mode == "RGB" and isinstance(source, PairSource) and source.label_map is None:
        arrays = source.arrays()
    if arrays is not None and arrays[0].shape[1:] == (height, width, channels):
        pixels, labels = (array[: stream.size] for array in arrays)
        for label in np.unique(labels):
            check_label(label, stream.num_classes, source.location)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(labels, dtype=torch.int64)
    stream.set_loader_cfg(0)
    images, targets = torch.empty((stream.size, *size), dtype=torch.uint8), torch.empty(stream.size, dtype=torch.int64)
    for i, (image, label) in enumerate(stream):
        images[i], targets[i] = torch.as_tensor(image), label
    return images, targets


def create_in_memory_loader(
    dataset: SampleStream,
    input_size: Sequence[int],
    batch_size: int,
    is_training: bool = False,
    *,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    img_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
    no_aug: bool = False,
    train_crop_mode: str | None = None,
    hflip: float = 0.5,
    auto_augment: str | None = None,
    interpolation: str = "bilinear",
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    **others: object,
) -> InMemoryLoader:
    """Return the loader for `--in-memory`; the arguments are those of `samon.data.create_loader`.

    Args:
        dataset: an evaluation stream with rank 0 of 1: every rank reads the whole set. Its size is that of an epoch.

    Raises:
        UserError: another stream, or an augmentation that works image by image.
    """
    if dataset.is_training or dataset.world_size > 1:
        raise UserError("every process keeps the whole set: create_dataset(is_training=False, rank=0, world_size=1)")
    channels, height, width = input_size
    size, augment, num_samples = (channels, height, width), None, dataset.size
    resize: dict[str, Any] = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    if is_training:
        dataset.size = len(dataset.source)  # an epoch takes its samples from all
        _check_augmentation(train_crop_mode, no_aug, auto_augment, others)
    if is_training and not no_aug:
        augment = Augment((height, width), hflip, policy=auto_augment == "cifar10")
        resize = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}  # before the pad crop
    plain = is_training and no_aug
    dataset.transform = timm.data.create_transform(size, is_training=plain, no_aug=True, use_prefetcher=True, **resize)
    images, labels = _read_all(dataset, size, as_stored=is_training or crop_pct == 1.0)
    return InMemoryLoader(
        images.to(device),
        labels.to(device),
        batch_size,
        is_training=is_training,
        num_samples=num_samples,
        mean=mean,
        std=std,
        augment=augment,
        seed=dataset.seed,
        img_dtype=img_dtype,
    )


# Arguments of `create_loader` that are not possible here, and their flags. --no-aug switches the first ones off.
_PER_IMAGE = {"vflip": "vflip", "color_jitter": "color-jitter", "grayscale_prob": "grayscale-prob"}
_PER_IMAGE |= {"gaussian_blur_prob": "gaussian-blur-prob", "re_prob": "reprob"}
_PER_BATCH = {"num_aug_splits": "aug-splits", "num_aug_repeats": "aug-repeats", "size_schedule": "train-img-sizes"}


def _check_augmentation(crop_mode: str | None, no_aug: bool, policy: str | None, others: dict[str, object]) -> None:
    """Raise a UserError that names the flag of an augmentation that cannot be done on the device."""
    if others.get("collate_fn") is not None:
        raise UserError("--in-memory: mix on the device instead, with --no-prefetcher")
    if not no_aug and crop_mode != "pad":
        raise UserError("--in-memory needs --train-crop-mode pad (or --no-aug)")
    if not no_aug and policy not in (None, "", "cifar10"):
        raise UserError(f"--in-memory cannot be combined with --aa {policy}; use --aa cifar10 or none")
    for key, flag in (_PER_BATCH if no_aug else _PER_BATCH | _PER_IMAGE).items():
        jitter_is_off = key == "color_jitter" and policy  # timm, too, leaves it out beside a policy
        if others.get(key) and not jitter_is_off:
            raise UserError(f"--in-memory cannot be combined with --{flag}; leave it out or set it to 0")
