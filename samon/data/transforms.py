"""timm's `create_transform`, extended by what the paper's recipes need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm.data
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode

from samon.data.decode import FLIPS, Transform
from samon.errors import UserError

GRAY = 128  # fills what AutoAugment moves in from outside, as in the paper's public code


def pad_pixels(size: int) -> int:
    """Return the padding of each side before the random crop: an eighth of the image, 4 for CIFAR's 32 pixels."""
    return max(1, size // 8)


def create_transform(
    input_size: int | Sequence[int], *, is_training: bool = False, splits: int = 0, **kwargs: Any
) -> Transform:
    """timm's `create_transform`, extended by `train_crop_mode='pad'`, `auto_augment='cifar10'` and AugMix's `splits`.

    The pad crop replaces timm's random crop (an image of another size is resized first). The policy follows the flips
    and replaces color jitter, as timm's own policies do.
    """
    pad, policy = kwargs.get("train_crop_mode") == "pad", kwargs.get("auto_augment") == "cifar10"
    if not is_training or kwargs.get("no_aug") or not (pad or policy):
        kwargs |= {"is_training": is_training, "separate": splits > 0}
        transform = timm.data.create_transform(input_size, **kwargs)  # type: ignore[arg-type]
        first = (transform[0] if isinstance(transform, tuple) else transform).transforms[0]
        if isinstance(first, RandomResizedCropAndInterpolation):
            first.get_params = partial(_sample_box, first.get_params)  # type: ignore[method-assign]
        return SplitTransform(transform, splits) if isinstance(transform, tuple) else transform
    if splits:
        raise UserError("--train-crop-mode pad and --aa cifar10 cannot be combined with --aug-splits")
    kwargs |= {"train_crop_mode": None} if pad else {}
    kwargs |= {"auto_augment": None, "color_jitter": None} if policy else {}
    steps = timm.data.create_transform(input_size, is_training=True, **kwargs).transforms  # type: ignore[arg-type]
    size = steps[0].size
    if pad:
        resize = transforms.Resize(size, InterpolationMode.BICUBIC)
        steps[:1] = [resize, transforms.RandomCrop(size, padding=pad_pixels(min(size)))]
    if policy:
        last = max((i for i, step in enumerate(steps) if isinstance(step, FLIPS)), default=1 if pad else 0)
        steps.insert(last + 1, AutoAugment(AutoAugmentPolicy.CIFAR10, fill=GRAY))
    return transforms.Compose(steps)


def _sample_box(get_params: Callable[..., tuple[int, ...]], image: object, *ranges: object) -> tuple[int, ...]:
    """Sample timm's random box, at least one pixel wide and high: timm's can be empty for thin images."""
    top, left, height, width = get_params(image, *ranges)
    if height == 0:  # then top may be just below the image
        top, height = max(top - 1, 0), 1
    if width == 0:
        left, width = max(left - 1, 0), 1
    return top, left, height, width


@dataclass
class SplitTransform:
    """AugMix's input: the clean image and `count` - 1 augmented ones, from timm's three-part transform."""

    parts: tuple[Transform, Transform, Transform]
    count: int

    def __call__(self, image: object) -> tuple[object, ...]:
        base, augment, final = self.parts
        image = base(image)
        return (final(image), *(final(augment(image)) for _ in range(self.count - 1)))
