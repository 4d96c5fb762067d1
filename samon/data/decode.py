"""From bytes to augmented uint8 images: Pillow as timm uses it, or tensors all the way, which is faster.

The tensor path decodes JPEGs with simplejpeg (libjpeg-turbo, as in Pillow: the same pixels) and runs timm's own
random choices on the tensor, so a seed gives the same crop box, flip and interpolation on both paths. Only the
resampling differs: bilinear by one level of 255 at most; bicubic by more in about one value of a thousand, where its
overshoot is cut off. Where the transform begins with a random crop, `samon.data.decode` decodes that part alone.
"""

import io
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor
from torchvision.transforms.v2 import functional as F

from samon.data.corrupt import ImageError, ImageTooLargeError
from samon.errors import UserError


def available() -> bool:
    """Whether the package is installed (`pip install 'samon-timm[decode]'`); nothing is imported."""
    return find_spec("nvidia") is not None and find_spec("nvidia.nvimgcodec") is not None


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries for formats other than JPEG say on file descriptor 2 that they miss their CUDA parts."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@cache
def _decoder(_process: int) -> tuple[Any, Any, Any]:
    """The package, a decoder that touches no GPU and starts no thread, its settings; one a process."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # what it cannot decode, the caller says
    with _quiet():
        from nvidia import nvimgcodec

        cpu = [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
        decoder = nvimgcodec.Decoder(nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=cpu)
    # As timm and Pillow: the camera's orientation is not applied.
    return nvimgcodec, decoder, nvimgcodec.DecodeParams(apply_exif_orientation=False)


class Jpeg:
    """A JPEG that is not decoded yet."""

    def __init__(self, data: bytes, height: int, width: int) -> None:
        self.data, self.height, self.width = data, height, width

    @property
    def like(self) -> Tensor:
        """What it will be, [3, H, W] without any memory, for those who only want to know its size."""
        return torch.empty((3, self.height, self.width), dtype=torch.uint8, device="meta")

    def region(self, top: int, left: int, height: int, width: int) -> Tensor | None:
        """uint8 RGB [3, height, width], equal to that part of the whole image; None where it cannot be decoded."""
        package, decoder, params = _decoder(os.getpid())
        part = package.Region(top, left, top + height, left + width)
        image = decoder.decode(package.CodeStream(self.data).get_sub_code_stream(region=part), params=params)
        return None if image is None else torch.from_numpy(np.asarray(image)).permute(2, 0, 1)

    def scaled(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor | None:
        """About the same part, of the smallest 1/2^k of the image in which it has ``size`` or more (height, width).

        None where that is the image itself, or where it is damaged.
        """
        factor = next((f for f in (8, 4, 2) if box[2] >= f * size[0] and box[3] >= f * size[1]), 1)
        if factor == 1:
            return None
        smaller = [-(-side // factor) for side in (self.height, self.width)]
        try:
            whole = simplejpeg.decode_jpeg(self.data, min_height=smaller[0], min_width=smaller[1])
        except ValueError:
            return None
        top, left, height, width = (round(side / factor) for side in box)
        return torch.from_numpy(whole[top : top + height, left : left + width]).permute(2, 0, 1)


def parse(data: bytes, max_pixels: int) -> Jpeg | None:
    """The JPEG in ``data``; None for anything else (CMYK or damaged headers too) or more than ``max_pixels``."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return Jpeg(data, height, width) if colors in ("YCbCr", "Gray", "RGB") and height * width <= max_pixels else None


_logger = logging.getLogger(__name__)

DECODERS = ("auto", "torch", "crop", "scaled", "pil")
IMAGE_KEYS = "jpg;jpeg;png;webp;bmp;ppm;pgm;tif;tiff;gif;avif;jp2;j2k"  # endings of these formats
MAX_PIXELS = 89_478_485  # Pillow's own default; the largest image of ImageNet has 61 million
# Formats that Pillow decodes by itself. Others would run programs on the bytes (EPS starts Ghostscript).
# MPO comes with JPEG; a name that Pillow does not have would hide the ones after it.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
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


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scale gray values of 16 bits to 8, by the high byte as Pillow does for colors; `convert` would make them white.

    Raises:
        ImageError: integers or floats of 32 bits beyond 0 to 255, whose white is not defined.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM", "JPEG2000")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
        if low < 0 or high > 255 or (image.mode == "F" and high <= 1):
            raise ImageError(f"values from {low:g} to {high:g} of 32 bits; save it with 8 or 16 bits")
    return image


def decode_pil(data: bytes | Image.Image, mode: str = "RGB") -> Image.Image:
    """Decode with Pillow and convert to ``mode``; some data sets give Pillow images already."""
    image = data if isinstance(data, Image.Image) else open_image(data)
    try:
        with warnings.catch_warnings() if image.mode == "P" else nullcontext():
            if image.mode == "P":  # transparency is dropped by the conversion, which is what timm does as well
                warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
            return to_8_bits(image).convert(mode) if mode else image.copy()
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def decode_tensor(data: bytes | Image.Image) -> Tensor:
    """Decode to uint8 RGB [3, H, W]: JPEGs by simplejpeg, what it does not take (or CMYK) by Pillow."""
    if isinstance(data, bytes) and parse(data, MAX_PIXELS):
        with suppress(ValueError):  # it is stricter than Pillow, which decides whether the file is damaged
            return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
    return pil_to_tensor(decode_pil(data, "RGB"))


def decode_later(data: bytes | Image.Image) -> Jpeg | Tensor:
    """A JPEG as it is, for `TensorCrop` to decode what it needs; anything else as `decode_tensor` gives it."""
    parsed = parse(data, MAX_PIXELS) if isinstance(data, bytes) else None
    return parsed or decode_tensor(data)


class TensorCrop:
    """timm's random resized crop on uint8 [C, H, W] or a JPEG: its choices, torch's resampling."""

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop = crop
        self.scaled = False  # take the crop of a smaller image where that is enough
        modes = crop.interpolation
        self.modes = tuple(modes) if isinstance(modes, (tuple, list)) else (modes,)

    def __call__(self, image: Tensor | Jpeg) -> Tensor:
        """uint8 [C, *size]; draws in timm's order."""
        whole = image.like if isinstance(image, Jpeg) else image
        top, left, height, width = box = self.crop.get_params(whole, self.crop.scale, self.crop.ratio)
        mode = random.choice(self.modes) if len(self.modes) > 1 else self.modes[0]
        part = None
        if isinstance(image, Jpeg):
            part = image.scaled(box, self.crop.size) if self.scaled else None
            part = image.region(*box) if part is None and available() else part
            image = decode_tensor(image.data) if part is None else whole
        part = image[:, top : top + height, left : left + width] if part is None else part
        return F.resize_image(part, list(self.crop.size), mode)


def _blend(start: Tensor | int, image: Tensor, factor: float) -> Tensor:
    """Pillow's `Image.blend`: from ``start`` towards and past ``image``, cut off to whole levels."""
    base = start.float() if isinstance(start, Tensor) else start
    return (base + factor * (image.float() - base)).clamp_(0, 255).to(torch.uint8)


def _grey(image: Tensor) -> Tensor:
    """Pillow's integer luma of uint8 [3, H, W], [1, H, W]."""
    red, green, blue = image.to(torch.int32)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)[None]


def jitter_tensor(image: Tensor, jitter: transforms.ColorJitter) -> Tensor:
    """torchvision's ColorJitter (no hue) on uint8 [3, H, W], with Pillow's arithmetic; draws in torchvision's order."""
    ranges = jitter.brightness, jitter.contrast, jitter.saturation
    order, brightness, contrast, saturation, _ = jitter.get_params(*ranges, None)
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
        if step.interpolation not in _TENSOR_INTERPOLATIONS:
            return None
        size = [step.size] if isinstance(step.size, int) else list(step.size)
        return partial(F.resize_image, size=size, interpolation=step.interpolation)  # uint8 without a detour over float
    if isinstance(step, transforms.ColorJitter):
        return partial(jitter_tensor, jitter=step) if step.hue is None else None
    if isinstance(step, MaybeToTensor):
        return _to_float
    return step if isinstance(step, _SAME_ON_TENSORS) else None


def choose_decoder(decoder: str, transform: Any, mode: str, quiet: bool = False) -> tuple[Callable[[Any], Any], Any]:
    """The decode function and the transform to run on its result, for ``--decoder``.

    ``transform`` is what timm's `create_transform` made. `auto` takes the tensor path when every step of it has an
    equal for tensors. `crop` is that path with only the crop decoded, and `auto` takes it where it is installed;
    `scaled` also decodes at a half, a quarter or an eighth where that is enough, which changes pixels. The choice is
    logged unless `quiet`.

    Raises:
        UserError: another than ``auto`` and ``pil`` was asked for and cannot be; what is missing is named.
    """
    if decoder not in DECODERS:
        raise UserError(f"--decoder {decoder}: choose {', '.join(DECODERS)}")
    if decoder == "crop" and not available():
        raise UserError("--decoder crop needs nvImageCodec: pip install 'samon-timm[decode]', or use --decoder auto")

    log = _logger.debug if quiet else _logger.info
    steps = getattr(transform, "transforms", [transform])
    converted = [(step, _tensor_step(step)) for step in steps]
    without = [type(step).__name__ for step, equal in converted if equal is None]
    reason = f"no tensor form of {', '.join(without)}" if without else f"image mode {mode!r}" * (mode != "RGB")
    if decoder not in ("auto", "pil") and reason:
        raise UserError(f"--decoder {decoder}: {reason}; use --decoder auto or pil")
    if decoder == "pil" or reason:
        log("training images are decoded by Pillow%s", f": {reason}" if reason and decoder == "auto" else "")
        return partial(decode_pil, mode=mode), transform
    chosen = [equal for _, equal in converted]
    first = chosen[0]
    if decoder == "torch" or not isinstance(first, TensorCrop) or not (decoder == "scaled" or available()):
        log("training images are decoded and augmented as tensors")
        return decode_tensor, transforms.Compose(chosen)
    first.scaled = decoder == "scaled"
    how = "at the smallest scale that a crop needs" if first.scaled else "only where the crop lies"
    log("training images are decoded and augmented as tensors, JPEGs %s", how)
    return decode_later, transforms.Compose(chosen)
