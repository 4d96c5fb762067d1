"""From bytes to augmented uint8 images: Pillow as timm uses it, or tensors all the way, which is faster.

The tensor path decodes JPEGs with torchvision (libjpeg-turbo, as in Pillow: the same pixels) and runs timm's own
random choices on the tensor, so a seed gives the same crop box, flip and interpolation on both paths. Only the
resampling differs: torch rounds where Pillow does, to within one or two levels of 255.
"""

import io
import logging
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor
from torchvision.transforms.v2 import functional as F

from samon.data.faults import ImageError, ImageTooLargeError
from samon.errors import UserError

_logger = logging.getLogger(__name__)

MAX_PIXELS = 89_478_485  # Pillow's own default; the largest image of ImageNet has 61 million
# Formats that Pillow decodes by itself. Others would run programs on the bytes (EPS starts Ghostscript).
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'MPO', 'JPEG2000', 'AVIF')
_TENSOR_INTERPOLATIONS = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)


def open_image(data: bytes) -> Image.Image:
    """Parse an image's header, decode nothing; refuse more than `MAX_PIXELS`.

    Raises:
        ImageError: no image in a known format, or too large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(str(error)) from error
    except Exception as error:  # hostile bytes can make any parser raise anything
        raise ImageError(f'not an image: {len(data)} bytes starting {data[:12]!r}') from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageTooLargeError(f'{image.width} x {image.height} pixels, limit {MAX_PIXELS}')
    return image


def decode_pil(data: bytes | Image.Image, mode: str = 'RGB') -> Image.Image:
    """Decode with Pillow and convert to ``mode``; some data sets give Pillow images already."""
    return _load(data if isinstance(data, Image.Image) else open_image(data), mode)


def _load(image: Image.Image, mode: str) -> Image.Image:
    try:
        if image.mode != 'P':
            return image.convert(mode) if mode else image.copy()
        with warnings.catch_warnings():
            # Transparency is dropped by the conversion, which is what timm does as well.
            warnings.filterwarnings('ignore', 'Palette images with Transparency', UserWarning)
            return image.convert(mode) if mode else image.copy()
    except Exception as error:
        raise ImageError(f'cannot be decoded: {type(error).__name__}: {error}') from error


def decode_tensor(data: bytes | Image.Image) -> Tensor:
    """Decode to uint8 RGB [3, H, W]: JPEGs by torchvision, anything else (or CMYK) by Pillow."""
    image = data if isinstance(data, Image.Image) else open_image(data)
    if isinstance(data, bytes) and image.format == 'JPEG' and image.mode in ('RGB', 'L'):
        try:
            # The copy into a writable buffer, which torch wants, takes 2 microseconds of about 1,000.
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # Pillow decides whether it is damaged
    return pil_to_tensor(_load(image, 'RGB'))


class TensorCrop:
    """timm's random resized crop on a uint8 tensor: its choices, torch's resampling."""

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop = crop
        modes = crop.interpolation
        self.modes = tuple(modes) if isinstance(modes, (tuple, list)) else (modes,)

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [C, H, W] to uint8 [C, *size]; draws in timm's order."""
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        mode = random.choice(self.modes) if len(self.modes) > 1 else self.modes[0]
        return F.resize_image(image[:, top:top + height, left:left + width], list(self.crop.size), mode)


class TensorResize:
    """torchvision's Resize on a uint8 tensor without its detour over float."""

    def __init__(self, resize: transforms.Resize) -> None:
        size = resize.size
        self.size = [size] if isinstance(size, int) else list(size)
        self.mode = resize.interpolation

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [C, H, W] to uint8, the shorter edge (or both) as asked."""
        return F.resize_image(image, self.size, self.mode)


def _to_float(image: Tensor) -> Tensor:
    return image.float() / 255


def _tensor_step(step: Any) -> Callable[[Any], Any] | None:
    """The same step for tensors; None if there is no equal one."""
    if isinstance(step, RandomResizedCropAndInterpolation):
        crop = TensorCrop(step)
        return crop if all(mode in _TENSOR_INTERPOLATIONS for mode in crop.modes) else None
    if isinstance(step, transforms.Resize):
        return TensorResize(step) if step.interpolation in _TENSOR_INTERPOLATIONS else None
    if isinstance(step, transforms.ColorJitter):
        return v2.ColorJitter(step.brightness, step.contrast, step.saturation, step.hue)
    if isinstance(step, MaybeToTensor):
        return _to_float
    if isinstance(step, (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip, transforms.CenterCrop,
                         transforms.Normalize, MaybePILToTensor, RandomErasing)):
        return step
    return None


def choose_decoder(decoder: str, transform: Any, mode: str) -> tuple[Callable[[Any], Any], Any]:
    """The decode function and the transform to run on its result, for ``--decoder auto|torch|pil``.

    ``transform`` is what timm's `create_transform` made. `auto` takes the tensor path when every step of it has an
    equal for tensors.

    Raises:
        UserError: ``torch`` was asked for and a step has no equal; it is named.
    """
    if decoder not in ('auto', 'torch', 'pil'):
        raise UserError(f'--decoder {decoder}: choose auto, torch or pil')

    steps = getattr(transform, 'transforms', [transform])
    converted = [(step, _tensor_step(step)) for step in steps]
    without = [type(step).__name__ for step, equal in converted if equal is None]
    reason = f'no tensor form of {", ".join(without)}' if without else f'image mode {mode!r}' * (mode != 'RGB')
    if decoder == 'torch' and reason:
        raise UserError(f'--decoder torch: {reason}; use --decoder auto or pil')
    if decoder == 'pil' or reason:
        _logger.info('images are decoded by Pillow: %s', reason or 'as asked')
        return partial(decode_pil, mode=mode), transform
    _logger.info('images are decoded to tensors by torchvision')
    return decode_tensor, transforms.Compose([equal for _, equal in converted])
