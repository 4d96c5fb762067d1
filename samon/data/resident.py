"""The whole data set resident on the device, augmented there in batches (`--data-resident`).

For sets that fit (CIFAR: 150 MB): no worker processes, no copies, nothing to wait for. Same interface as the other
loaders: len, set_epoch(epoch, samples_consumed), (input, target) on the device, normalised. Every rank holds the
whole set and takes its part of each global batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import timm.data
import torch
import torch.distributed as dist
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from samon.data.cifar_augment import Augment, Draws, normalization
from samon.data.stream import SampleStream
from samon.errors import UserError


class ResidentLoader:
    """Batches of a data set held as uint8 [N, C, H, W] and labels [N] on the device."""

    mixup_enabled = False
    bad_samples = 0

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        is_training: bool,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment | None = None,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        img_dtype: torch.dtype = torch.float32,
    ) -> None:
        if is_training and len(images) < batch_size * world_size:
            what = f"one batch of {batch_size} on each of {world_size} processes"
            raise UserError(f"{len(images)} training samples do not fill {what}; lower --batch-size")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.is_training, self.augment, self.seed = is_training, augment, seed
        self.rank, self.world_size, self.img_dtype = rank, world_size, img_dtype
        self.mean, self.std = normalization(mean, std, images.device)
        self.num_samples = len(images)
        self.epoch = self.samples_consumed = 0

    def __len__(self) -> int:
        """Batches of this process in a full epoch; a last incomplete global batch is left out in training."""
        if self.is_training:
            return self.num_samples // (self.batch_size * self.world_size)
        return -(-len(range(self.rank, self.num_samples, self.world_size)) // self.batch_size)

    def set_epoch(self, epoch: int, samples_consumed: int = 0) -> None:
        """Which epoch the next iteration is, and how many of its samples, over all ranks, are behind it."""
        self.epoch, self.samples_consumed = epoch, samples_consumed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._train() if self.is_training else self._evaluate()

    def _train(self) -> Iterator[tuple[Tensor, Tensor]]:
        draws = (self.augment or Augment((8, 8))).draw(self.num_samples, self.seed, self.epoch)
        start, self.samples_consumed = self.samples_consumed, 0
        step = self.batch_size * self.world_size
        for at in range(start, self.num_samples - step + 1, step):
            first = at + self.rank * self.batch_size
            yield self._batch(draws, draws.order[first : first + self.batch_size])

    def _batch(self, draws: Draws, index: Tensor) -> tuple[Tensor, Tensor]:
        where = index.to(self.images.device, non_blocking=True)
        images = self.images[where]
        if self.augment is not None:
            images = self.augment(images, index, draws)
        return self._normalize(images), self.labels[where]

    def _evaluate(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.images[self.rank :: self.world_size], self.labels[self.rank :: self.world_size]
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            yield self._normalize(images[batch]), labels[batch]

    def _normalize(self, images: Tensor) -> Tensor:
        return images.to(self.img_dtype).sub_(self.mean).div_(self.std)


def read_all(stream: SampleStream, size: tuple[int, int, int], transform: Callable[[Any], Any] | None) -> Any:
    """Every sample of a one-rank evaluation stream: uint8 [N, C, H, W] and labels [N], on the CPU.

    Args:
        size: channels, height and width that all images end up with.
        transform: PIL image -> uint8 array [C, H, W]; None resizes to `size` and no more.
    """
    channels, height, width = size
    pairs = getattr(stream.source, "pairs", None)
    arrays = getattr(pairs, "data", None)  # torchvision's CIFAR and our npz: no need to go through PIL
    if transform is None and isinstance(arrays, np.ndarray) and arrays.shape[1:] == (height, width, channels):
        labels = torch.as_tensor(np.asarray(pairs.targets, dtype=np.int64))  # type: ignore[union-attr]
        return torch.from_numpy(arrays[: stream.size]).permute(0, 3, 1, 2).contiguous(), labels[: stream.size]

    def resize(image: Image.Image) -> np.ndarray:
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.array(image).reshape(height, width, channels).transpose(2, 0, 1)

    stream.transform = transform or resize
    stream.set_loader_cfg(0)
    images, targets = torch.empty((stream.size, *size), dtype=torch.uint8), torch.empty(stream.size, dtype=torch.int64)
    for i, (image, label) in enumerate(stream):
        images[i], targets[i] = torch.as_tensor(image), int(label)
    return images, targets


def create_resident_loader(
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
) -> ResidentLoader:
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
        refuse(train_crop_mode, no_aug, auto_augment, rest)
        augment = None if no_aug else Augment(size[1:], hflip, policy=auto_augment == "cifar10")
    elif (crop_pct or 1.0) != 1.0 or crop_mode not in (None, "center"):
        crop: dict[str, Any] = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
        transform = timm.data.create_transform(size, use_prefetcher=True, **crop)
    images, labels = read_all(dataset, size, transform)
    grouped = dist.is_available() and dist.is_initialized()
    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()} if grouped else {}
    look: dict[str, Any] = {"mean": mean, "std": std, "augment": augment, "img_dtype": img_dtype, **ranks}
    images, labels = images.to(device), labels.to(device)
    return ResidentLoader(images, labels, batch_size, is_training=is_training, seed=dataset.seed, **look)


# What is done image by image on the CPU and has no counterpart on the device: argument and flag.
_BY_IMAGE = {"vflip": "vflip", "color_jitter": "color-jitter", "grayscale_prob": "grayscale-prob", "re_prob": "reprob"}
_BY_IMAGE |= {"gaussian_blur_prob": "gaussian-blur-prob", "num_aug_splits": "aug-splits"}
_BY_IMAGE |= {"num_aug_repeats": "aug-repeats", "size_schedule": "train-img-sizes"}


def refuse(crop_mode: str | None, no_aug: bool, policy: str | None, rest: dict[str, Any]) -> None:
    """Say which flag asks for what cannot be done on the device."""
    if crop_mode != "pad" and not no_aug:
        raise UserError("--data-resident needs --train-crop-mode pad (or --no-aug)")
    if policy not in (None, "", "cifar10"):
        raise UserError(f"--data-resident does not go with --aa {policy}; use --aa cifar10 or none")
    if rest.get("collate_fn") is not None:
        raise UserError("--data-resident: mix on the device instead, with --no-prefetcher")
    for key, flag in _BY_IMAGE.items():
        jitter_is_off = key == "color_jitter" and policy  # timm, too, leaves it out beside a policy
        if rest.get(key) and not no_aug and not jitter_is_off:
            raise UserError(f"--data-resident does not go with --{flag}; leave it out or set it to 0")
