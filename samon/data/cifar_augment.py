"""CIFAR's augmentation: crop from a padded image, flip, AutoAugment; image by image, or a batch on the device.

On the device every random decision of an epoch is drawn at once on the CPU from (seed, epoch) and kept by sample
index, so a sample's augmentation depends neither on its batch nor on the device, the processes or a restart."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm.data
import torch
import torch.nn.functional as F
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode

# torchvision keeps this private; it is what its AutoAugment does to one image, here to a batch.
from torchvision.transforms.autoaugment import _apply_op

from samon.errors import UserError

GREY = 128  # fills what AutoAugment moves in from outside, as in the paper's public code


def padding(size: int) -> int:
    """Pixels to pad each side with before the random crop: an eighth of the image, 4 for CIFAR's 32."""
    return max(1, size // 8)


def create_transform(
    input_size: int | tuple[int, int] | tuple[int, int, int], *, is_training: bool = False, **kwargs: Any
) -> Any:
    """timm's `create_transform`, which also knows `train_crop_mode='pad'` and `auto_augment='cifar10'`.

    The pad crop stands where timm's random crop does (an image of another size is resized first), the policy
    behind the flips, in place of colour jitter as with timm's own policies.
    """
    pad, policy = kwargs.get("train_crop_mode") == "pad", kwargs.get("auto_augment") == "cifar10"
    if not is_training or kwargs.get("no_aug") or not (pad or policy):
        made = timm.data.create_transform(input_size, is_training=is_training, **kwargs)
        first = (made[0] if isinstance(made, tuple) else made).transforms[0]
        if isinstance(first, RandomResizedCropAndInterpolation):
            first.get_params = partial(_whole_pixels, first.get_params)  # type: ignore[method-assign]
        return made
    if kwargs.get("separate"):
        raise UserError("--train-crop-mode pad and --aa cifar10 do not go with --aug-splits")
    kwargs |= {"train_crop_mode": None} if pad else {}
    kwargs |= {"auto_augment": None, "color_jitter": None} if policy else {}
    steps = timm.data.create_transform(input_size, is_training=True, **kwargs).transforms
    size = steps[0].size
    if pad:
        resize = transforms.Resize(size, InterpolationMode.BICUBIC)
        steps[:1] = [resize, transforms.RandomCrop(size, padding=padding(min(size)))]
    if policy:
        flips = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)
        behind = max((i for i, step in enumerate(steps) if isinstance(step, flips)), default=1 if pad else 0)
        steps.insert(behind + 1, AutoAugment(AutoAugmentPolicy.CIFAR10, fill=GREY))
    return transforms.Compose(steps)


def _whole_pixels(get_params: Callable[..., tuple[int, ...]], image: Any, *ranges: Any) -> tuple[int, ...]:
    """timm's random box, at least 1 pixel wide and high: of thin images a small share can round to none."""
    top, left, height, width = get_params(image, *ranges)
    if height == 0:  # then top may be just below the image
        top, height = max(top - 1, 0), 1
    if width == 0:
        left, width = max(left - 1, 0), 1
    return top, left, height, width


@dataclass
class Draws:
    """One epoch's decisions, first axis the sample index of the whole data set."""

    order: Tensor  # [N] permutation
    corner: Tensor  # [N, 2] top and left corner of the crop in the padded image
    flip: Tensor  # [N] bool
    policy: Tensor  # [N] AutoAugment sub-policy
    chance: Tensor  # [N, 2] uniform numbers that decide whether each operation is applied
    negative: Tensor  # [N, 2] bool, direction of signed operations


class Augment:
    """Pad-and-crop, flip and AutoAugment of uint8 batches [B, C, H, W], all on the batch's device."""

    def __init__(self, size: tuple[int, int], hflip: float = 0.5, policy: bool = False) -> None:
        self.size, self.hflip, self.pad = size, hflip, padding(min(size))
        self.auto = AutoAugment(AutoAugmentPolicy.CIFAR10) if policy else None

    def draw(self, count: int, seed: int, epoch: int) -> Draws:
        """All decisions of an epoch for `count` samples."""
        g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return Draws(
            order=torch.randperm(count, generator=g),
            corner=torch.randint(2 * self.pad + 1, (count, 2), generator=g),
            flip=torch.rand(count, generator=g) < self.hflip,
            policy=torch.randint(25, (count,), generator=g),
            chance=torch.rand(count, 2, generator=g),
            negative=torch.randint(2, (count, 2), generator=g).bool(),
        )

    def __call__(self, images: Tensor, index: Tensor, draws: Draws) -> Tensor:
        """uint8 [B, C, H, W] of the samples `index` [B] (on the CPU) -> the same shape, augmented."""
        device = images.device
        images = self._crop(images, draws.corner[index].to(device, non_blocking=True))
        flip = draws.flip[index].to(device, non_blocking=True)
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        if self.auto is not None:
            for step in (0, 1):
                self._auto(images, step, index, draws)
        return images

    def _crop(self, images: Tensor, corner: Tensor) -> Tensor:
        height, width = self.size
        windows = F.pad(images, (self.pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view, by corner
        batch = torch.arange(len(images), device=images.device)
        return windows[batch, :, corner[:, 0], corner[:, 1]].contiguous()  # [B, C, H, W]

    def _auto(self, images: Tensor, step: int, index: Tensor, draws: Draws) -> None:
        """Apply each sample's operation number `step` in place, one call per operation, strength and direction."""
        assert self.auto is not None
        space = self.auto._augmentation_space(10, self.size)
        fill = [float(GREY)] * images.shape[1]
        groups: dict[tuple[str, float], list[int]] = {}
        drawn = (draws.policy[index], draws.chance[index, step], draws.negative[index, step])
        picks = zip(*(values.tolist() for values in drawn), strict=True)
        for row, (policy, chance, negative) in enumerate(picks):
            name, probability, level = self.auto.policies[policy][step]
            if chance <= probability:
                magnitudes, signed = space[name]
                size = float(magnitudes[level]) if level is not None else 0.0
                groups.setdefault((name, -size if signed and negative else size), []).append(row)
        for (name, magnitude), rows in groups.items():
            where = torch.tensor(rows, device=images.device)
            images[where] = _apply_op(images[where], name, magnitude, InterpolationMode.NEAREST, fill)
