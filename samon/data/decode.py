"""From bytes to augmented uint8 images: Pillow as timm uses it, or tensors all the way, which is faster.

The tensor path decodes JPEGs with simplejpeg (libjpeg-turbo, as in Pillow: the same pixels) and runs timm's own
random choices on the tensor, so a seed gives the same crop box, flip and interpolation on both paths. Only the
resampling differs: bilinear by one level of 255 at most; bicubic by more in about one value of a thousand, where its
overshoot is cut off.
"""

import io
import logging
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import simplejpeg
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor
from torchvision.transforms.v2 import functional as F

from samon.data.faults import ImageError, ImageTooLargeError
from samon.errors import UserError

_logger = logging.getLogger(__name__)

MAX_PIXELS = 89_478_485  # Pillow's own default; the largest image of ImageNet has 61 million
# Formats that Pillow decodes by itself. Others would run programs on the bytes (EPS starts Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")
_CROP_AND_FLIPS = (transforms.CenterCrop, transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)
_SAME_ON_TENSORS = (*_CROP_AND_FLIPS, transforms.Normalize, MaybePILToTensor, RandomErasing)
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
        raise ImageError(f"not an image: {len(data)} bytes starting {data[:12]!r}") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageTooLargeError(f"{image.width} x {image.height} pixels, limit {MAX_PIXELS}")
    return image


def decode_pil(data: bytes | Image.Image, mode: str = "RGB") -> Image.Image:
    """Decode with Pillow and convert to ``mode``; some data sets give Pillow images already."""
    return _load(data if isinstance(data, Image.Image) else open_image(data), mode)


def _load(image: Image.Image, mode: str) -> Image.Image:
    try:
        if image.mode != "P":
            return image.convert(mode) if mode else image.copy()
        with warnings.catch_warnings():
            # Transparency is dropped by the conversion, which is what timm does as well.
            warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
            return image.convert(mode) if mode else image.copy()
    except Exception as error:
        raise ImageError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def decode_tensor(data: bytes | Image.Image) -> Tensor:
    """Decode to uint8 RGB [3, H, W]: JPEGs by simplejpeg, what it does not take (or CMYK) by Pillow."""
    if isinstance(data, bytes) and data.startswith(b"\xff\xd8"):
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            if colors in ("YCbCr", "Gray", "RGB") and height * width <= MAX_PIXELS:
                return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
        except ValueError:
            pass  # it is stricter than Pillow, which decides whether the file is damaged
    return pil_to_tensor(decode_pil(data, "RGB"))


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
        return F.resize_image(image[:, top : top + height, left : left + width], list(self.crop.size), mode)


class TensorResize:
    """torchvision's Resize on a uint8 tensor without its detour over float."""

    def __init__(self, resize: transforms.Resize) -> None:
        size = resize.size
        self.size = [size] if isinstance(size, int) else list(size)
        self.mode = resize.interpolation

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [C, H, W] to uint8, the shorter edge (or both) as asked."""
        return F.resize_image(image, self.size, self.mode)


def _blend(start: Tensor | int, image: Tensor, factor: float) -> Tensor:
    """Pillow's `Image.blend`: from ``start`` towards and past ``image``, cut off to whole levels."""
    base = start.float() if isinstance(start, Tensor) else start
    return (base + factor * (image.float() - base)).clamp_(0, 255).to(torch.uint8)


def _grey(image: Tensor) -> Tensor:
    """Pillow's integer luma of uint8 [3, H, W], [1, H, W]."""
    red, green, blue = image.to(torch.int32)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)[None]


class TensorJitter:
    """torchvision's ColorJitter (no hue) on uint8 RGB tensors, with Pillow's arithmetic."""

    def __init__(self, jitter: transforms.ColorJitter) -> None:
        self.jitter = jitter

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] to the same; draws in torchvision's order."""
        jitter = self.jitter
        order, brightness, contrast, saturation, _ = jitter.get_params(
            jitter.brightness, jitter.contrast, jitter.saturation, None
        )
        for kind in order.tolist():
            if kind == 0 and brightness is not None:
                image = _blend(0, image, brightness)
            elif kind == 1 and contrast is not None:
                image = _blend(int(_grey(image).float().mean() + 0.5), image, contrast)
            elif kind == 2 and saturation is not None:
                image = _blend(_grey(image), image, saturation)
        return image


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
        return TensorJitter(step) if step.hue is None else None
    if isinstance(step, MaybeToTensor):
        return _to_float
    return step if isinstance(step, _SAME_ON_TENSORS) else None


def choose_decoder(decoder: str, transform: Any, mode: str) -> tuple[Callable[[Any], Any], Any]:
    """The decode function and the transform to run on its result, for ``--decoder auto|torch|pil``.

    ``transform`` is what timm's `create_transform` made. `auto` takes the tensor path when every step of it has an
    equal for tensors.

    Raises:
        UserError: ``torch`` was asked for and a step has no equal; it is named.
    """
    if decoder not in ("auto", "torch", "pil"):
        raise UserError(f"--decoder {decoder}: choose auto, torch or pil")

    steps = getattr(transform, "transforms", [transform])
    converted = [(step, _tensor_step(step)) for step in steps]
    without = [type(step).__name__ for step, equal in converted if equal is None]
    reason = f"no tensor form of {', '.join(without)}" if without else f"image mode {mode!r}" * (mode != "RGB")
    if decoder == "torch" and reason:
        raise UserError(f"--decoder torch: {reason}; use --decoder auto or pil")
    if decoder == "pil" or reason:
        _logger.info("images are decoded by Pillow: %s", reason or "as asked")
        return partial(decode_pil, mode=mode), transform
    _logger.info("images are decoded and augmented as tensors")
    return decode_tensor, transforms.Compose([equal for _, equal in converted])
