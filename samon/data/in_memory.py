"""The whole data set resident on the device, augmented there in batches (`--data-resident`).

For sets that fit (CIFAR: 150 MB): no worker processes, no copies, nothing to wait for. Same interface as the other
loaders: len, set_epoch(epoch, samples_consumed), (input, target) on the device, normalised. Every rank holds the
whole set and takes its part of each global batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import timm.data
import torch
import torch.distributed as dist
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from samon.data.classes import check_label
from samon.data.loader import Augment
from samon.data.sources import PairSource
from samon.data.stream import SampleStream
from samon.errors import UserError, refuse


@dataclass(eq=False)
class InMemoryLoader:
    """Batches of a data set held as uint8 [N, C, H, W] and labels [N] on the device."""

    images: Tensor
    labels: Tensor
    batch_size: int
    _: KW_ONLY
    is_training: bool
    mean: Sequence[float]
    std: Sequence[float]
    augment: Augment | None = None
    seed: int = 42
    rank: int = 0
    world_size: int = 1
    img_dtype: torch.dtype = torch.float32

    mixup_enabled = False
    corrupt_samples = epoch = samples_consumed = 0
    worker_error = None  # there are no workers

    def __post_init__(self) -> None:
        self.num_samples = len(self.images)
        if self.is_training and self.num_samples < self.batch_size * self.world_size:
            what = f"one batch of {self.batch_size} on each of {self.world_size} processes"
            raise UserError(f"{self.num_samples} training samples do not fill {what}; lower --batch-size")
        pixels = [[value * 255 for value in values] for values in (self.mean, self.std)]
        self.shift, self.scale = torch.tensor(pixels, device=self.images.device).view(2, 1, -1, 1, 1)

    def __len__(self) -> int:
        """Batches of this process in a full epoch; a last incomplete global batch is left out in training."""
        if self.is_training:
            return self.num_samples // (self.batch_size * self.world_size)
        return -(-len(range(self.rank, self.num_samples, self.world_size)) // self.batch_size)

    def set_epoch(self, epoch: int, samples_consumed: int = 0) -> None:
        """Which epoch the next iteration is, and how many of its samples, over all ranks, are behind it."""
        self.epoch, self.samples_consumed = epoch, samples_consumed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, world, draws = self.batch_size, self.world_size, None
        if self.is_training:
            draws = (self.augment or Augment((8, 8))).draw(self.num_samples, self.seed, self.epoch)
            order, self.samples_consumed = draws.order[self.samples_consumed :], 0
            starts = range(self.rank * size, len(order) // (size * world) * size * world, size * world)
        else:
            order = torch.arange(self.num_samples)[self.rank :: world]
            starts = range(0, len(order), size)
        for start in starts:
            index = order[start : start + size]
            where = index.to(self.images.device, non_blocking=True)
            images = self.images[where]
            if draws is not None and self.augment is not None:
                images = self.augment(images, index, draws)
            yield images.to(self.img_dtype).sub_(self.shift).div_(self.scale), self.labels[where]


def read_all(stream: SampleStream, size: tuple[int, int, int], transform: Callable[[Any], Any] | None) -> Any:
    """Every sample of a one-rank evaluation stream: uint8 [N, C, H, W] and labels [N], on the CPU.

    Args:
        size: channels, height and width that all images end up with.
        transform: PIL image -> uint8 [C, H, W]; None resizes to `size` and no more.
    """
    channels, height, width = size
    source = stream.source
    # torchvision's CIFAR and our npz: no need to go through PIL
    arrays = source.arrays() if isinstance(source, PairSource) and source.label_map is None else None
    if transform is None and arrays is not None and arrays[0].shape[1:] == (height, width, channels):
        pixels, labels = (array[: stream.size] for array in arrays)
        for label in np.unique(labels):
            check_label(label, stream.num_classes, source.location)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(labels, dtype=torch.int64)

    resizing: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}
    stream.transform = transform or timm.data.create_transform(size, use_prefetcher=True, **resizing)
    stream.set_loader_cfg(0)
    images, targets = torch.empty((stream.size, *size), dtype=torch.uint8), torch.empty(stream.size, dtype=torch.int64)
    for i, (image, label) in enumerate(stream):
        images[i], targets[i] = image, int(label)
    return images, targets


def create_in_memory_loader(
    dataset: SampleStream,
    input_size: tuple[int, int, int],
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
    interpolation: str = "bicubic",
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    **rest: Any,
) -> InMemoryLoader:
    """`samon.data.create_loader` for `--data-resident`: the same arguments, of which it takes what it can do.

    Args:
        dataset: an evaluation stream with rank 0 of 1: every rank reads the whole set.

    Raises:
        UserError: an augmentation that is made image by image, or images of mixed sizes that cannot be one array.
    """
    size = (int(input_size[0]), int(input_size[1]), int(input_size[2]))
    device = torch.device(device)
    augment = transform = None
    if is_training:
        check_augmentation(train_crop_mode, no_aug, auto_augment, rest)
        augment = None if no_aug else Augment(size[1:], hflip, policy=auto_augment == "cifar10")
    elif (crop_pct or 1.0) != 1.0 or crop_mode not in (None, "center"):
        crop: dict[str, Any] = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
        transform = timm.data.create_transform(size, use_prefetcher=True, **crop)
    images, labels = read_all(dataset, size, transform)
    grouped = dist.is_available() and dist.is_initialized()
    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()} if grouped else {}
    look: dict[str, Any] = {"mean": mean, "std": std, "augment": augment, "img_dtype": img_dtype, **ranks}
    images, labels = images.to(device), labels.to(device)
    return InMemoryLoader(images, labels, batch_size, is_training=is_training, seed=dataset.seed, **look)


# What is done image by image on the CPU and has no counterpart on the device: argument and flag.
_BY_IMAGE = {"vflip": "vflip", "color_jitter": "color-jitter", "grayscale_prob": "grayscale-prob", "re_prob": "reprob"}
_BY_IMAGE |= {"gaussian_blur_prob": "gaussian-blur-prob", "num_aug_splits": "aug-splits"}
_BY_IMAGE |= {"num_aug_repeats": "aug-repeats", "size_schedule": "train-img-sizes"}


def check_augmentation(crop_mode: str | None, no_aug: bool, policy: str | None, rest: dict[str, Any]) -> None:
    """Say which flag asks for what cannot be done on the device."""
    mistakes = {
        "--data-resident needs --train-crop-mode pad (or --no-aug)": crop_mode != "pad" and not no_aug,
        f"--data-resident does not go with --aa {policy}; use --aa cifar10 or none": policy
        not in (None, "", "cifar10"),
        "--data-resident: mix on the device instead, with --no-prefetcher": rest.get("collate_fn") is not None,
    }
    for key, flag in _BY_IMAGE.items():
        jitter_is_off = key == "color_jitter" and policy  # timm, too, leaves it out beside a policy
        message = f"--data-resident does not go with --{flag}; leave it out or set it to 0"
        mistakes[message] = bool(rest.get(key)) and not no_aug and not jitter_is_off
    refuse(mistakes)
