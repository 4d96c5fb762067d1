"""From bytes to augmented uint8 images: by Pillow as in timm, or as tensors throughout, which is faster.

The tensor path decodes JPEGs with simplejpeg (libjpeg-turbo, as in Pillow: the same pixels) and runs timm's own random
choices on the tensor, so a seed gives the same crop box, flip and interpolation on both paths. Only the arithmetic
differs: bilinear resampling by one level of 255 at most; bicubic by more in about one value per thousand, where its
overshoot is clipped; color jitter, torchvision's own, by 3 levels at most for a given image.

Where the transform begins with a random crop, only that region of a JPEG can be decoded, by nvImageCodec's
libjpeg-turbo on the CPU: the same pixels.
"""

import io
import logging
import os
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor
from torchvision.transforms.v2 import functional as F

from samon.data.corrupt import SampleError
from samon.errors import UserError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None  # Pillow decodes the same pixels in 1.6 times the time

_logger = logging.getLogger(__name__)

Transform = Callable[[Any], Any]  # an image in one form -> the image in another; torchvision types no more either

DECODERS = ("auto", "torch", "crop", "pil")
IMAGE_KEYS = "jpg;jpeg;png;webp;bmp;ppm;pgm;tif;tiff;gif;avif;jp2;j2k"  # file name endings of the formats below
MAX_PIXELS = 89_478_485  # Pillow's own default; the largest image of ImageNet has 61 million
# Formats that Pillow decodes by itself. Others would run programs on the bytes (EPS starts Ghostscript).
# MPO comes with JPEG; a name that Pillow does not have would hide the ones after it.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
FLIPS = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)
_SAME_ON_TENSORS = (*FLIPS, transforms.CenterCrop, transforms.Normalize, MaybePILToTensor, RandomErasing)
_TENSOR_INTERPOLATIONS = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)


def open_image(data: bytes) -> Image.Image:
    """Parse an image's header without decoding it.

    Raises:
        SampleError: not an image in a known format, or more than `MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError(str(error)) from error
    except Exception as error:  # hostile bytes can make any parser raise anything
        raise SampleError(f"not an image: {len(data)} bytes starting {data[:12]!r}") from error
    if image.width * image.height > MAX_PIXELS:
        raise SampleError(f"{image.width} x {image.height} pixels, limit {MAX_PIXELS}")
    return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale gray values of 16 bits to 8, by the high byte as Pillow does for colors; `convert` would make them white.

    Raises:
        SampleError: integers or floats of 32 bits outside 0 to 255, whose white is not defined.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM", "JPEG2000")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
        if low < 0 or high > 255 or (image.mode == "F" and high <= 1):
            raise SampleError(f"values from {low:g} to {high:g} of 32 bits; save it with 8 or 16 bits")
    return image


def decode_pil(data: bytes | Image.Image, mode: str = "RGB") -> Image.Image:
    """Decode with Pillow and convert to `mode`; some data sets hold Pillow images already."""
    image = data if isinstance(data, Image.Image) else open_image(data)
    try:
        if image.mode == "P" and "A" not in mode:  # Pillow warns that the conversion drops transparency, as timm does
            image.info.pop("transparency", None)
        return _to_8_bits(image).convert(mode)
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(f"cannot be decoded: {type(error).__name__}: {error}") from error


class Jpeg:
    """A JPEG that is not decoded yet."""

    def __init__(self, data: bytes, height: int, width: int) -> None:
        self.data, self.height, self.width = data, height, width

    def meta(self) -> Tensor:
        """Return an empty uint8 [3, H, W] on the meta device, for code that only asks for the image's size."""
        return torch.empty((3, self.height, self.width), dtype=torch.uint8, device="meta")

    def decode_region(self, top: int, left: int, height: int, width: int) -> Tensor | None:
        """Return uint8 RGB [3, height, width], equal to that part of the whole image; None if that fails."""
        return _region_decoder(os.getpid())(self.data, (top, left, top + height, left + width))


def parse_jpeg(data: bytes | Image.Image) -> Jpeg | None:
    """Return the JPEG; None for anything else (CMYK and damaged headers included) or more than `MAX_PIXELS`."""
    if not isinstance(data, bytes) or not data.startswith(b"\xff\xd8"):
        return None
    try:
        image = open_image(data)
    except SampleError:
        return None
    return Jpeg(data, image.height, image.width) if image.mode in ("RGB", "L") else None


def can_decode_regions() -> bool:
    """Whether nvImageCodec is installed (`pip install 'samon-timm[decode]'`); nothing is imported."""
    return find_spec("nvidia") is not None and find_spec("nvidia.nvimgcodec") is not None


@cache
def _region_decoder(_process: int) -> Callable[[bytes, tuple[int, int, int, int]], Tensor | None]:
    """Return a function of a JPEG and (top, left, bottom, right) that uses no GPU and no threads; one per process."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # the caller reports what cannot be decoded
    spec = find_spec("nvidia.nvimgcodec")
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
    with tempfile.TemporaryDirectory() as only_jpeg:
        # The extensions for other formats print to stderr that CUDA libraries are missing: load only this one.
        for path in [path for folder in folders for path in folder.glob("extensions/*jpeg_turbo*")]:
            Path(only_jpeg, path.name).symlink_to(path)
        os.environ["NVIMGCODEC_EXTENSIONS_PATH"] = only_jpeg
        from nvidia import nvimgcodec

        cpu = [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
        decoder = nvimgcodec.Decoder(nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=cpu)
        del os.environ["NVIMGCODEC_EXTENSIONS_PATH"]
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False)  # as in timm and Pillow

    def decode(data: bytes, box: tuple[int, int, int, int]) -> Tensor | None:
        stream = nvimgcodec.CodeStream(data).get_sub_code_stream(region=nvimgcodec.Region(*box))
        image = decoder.decode(stream, params=params)
        return None if image is None else torch.from_numpy(np.asarray(image)).permute(2, 0, 1)

    return decode


def decode_tensor(data: bytes | Image.Image) -> Tensor:
    """Decode to uint8 RGB [3, H, W]: JPEGs by simplejpeg, what it does not accept (or CMYK) by Pillow."""
    if simplejpeg is not None and (jpeg := parse_jpeg(data)):
        with suppress(ValueError):  # it is stricter than Pillow, which decides whether the file is damaged
            return torch.from_numpy(simplejpeg.decode_jpeg(jpeg.data)).permute(2, 0, 1)
    return pil_to_tensor(decode_pil(data, "RGB"))


def decode_later(data: bytes | Image.Image) -> Jpeg | Tensor:
    """Return a JPEG undecoded, for `TensorCrop` to decode what it needs; anything else decoded."""
    return parse_jpeg(data) or decode_tensor(data)


class TensorCrop:
    """timm's random resized crop of a uint8 [C, H, W] or a JPEG: the same random choices, torch's resampling."""

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop, modes = crop, crop.interpolation
        self.modes = tuple(modes) if isinstance(modes, (tuple, list)) else (modes,)

    def __call__(self, image: Tensor | Jpeg) -> Tensor:
        """Return uint8 [C, *size]; random numbers are consumed in timm's order."""
        like = image.meta() if isinstance(image, Jpeg) else image
        top, left, height, width = box = self.crop.get_params(like, self.crop.scale, self.crop.ratio)
        mode = random.choice(self.modes) if len(self.modes) > 1 else self.modes[0]
        part = image.decode_region(*box) if isinstance(image, Jpeg) else None
        if part is None:
            whole = decode_tensor(image.data) if isinstance(image, Jpeg) else image
            part = whole[:, top : top + height, left : left + width]
        return F.resize_image(part, list(self.crop.size), mode)


def _tensor_step(step: Transform) -> Transform | None:
    """Return the equivalent of a transform's step for tensors, None if it has none."""
    if isinstance(step, RandomResizedCropAndInterpolation):
        crop = TensorCrop(step)
        return crop if all(mode in _TENSOR_INTERPOLATIONS for mode in crop.modes) else None
    if isinstance(step, transforms.Resize):
        if step.interpolation not in _TENSOR_INTERPOLATIONS:
            return None
        size = [step.size] if isinstance(step.size, int) else list(step.size)
        return partial(F.resize_image, size=size, interpolation=step.interpolation)
    if isinstance(step, transforms.ColorJitter):
        return step if step.hue is None else None  # hue takes four times as long on tensors as in Pillow
    if isinstance(step, MaybeToTensor):
        return transforms.ConvertImageDtype(torch.float32)
    return step if isinstance(step, _SAME_ON_TENSORS) else None


def choose_decoder(decoder: str, transform: Transform, mode: str, quiet: bool = False) -> tuple[Transform, Transform]:
    """Return the decode function and the transform of its result for `--decoder`, and log the choice unless `quiet`.

    `auto` takes the tensor path if every step of the transform has an equivalent for tensors, and decodes only the
    crop, as `crop` does, if nvImageCodec is installed.

    Args:
        transform: as timm's `create_transform` returns it.
        mode: of the images, 'RGB' or 'L'.

    Raises:
        UserError: a decoder other than `auto` and `pil` cannot be used; the message names what is missing.
    """
    if decoder not in DECODERS:
        raise UserError(f"--decoder {decoder}: choose {', '.join(DECODERS)}")
    if decoder == "crop" and not can_decode_regions():
        raise UserError("--decoder crop needs nvImageCodec: pip install 'samon-timm[decode]', or use --decoder auto")
    log = _logger.debug if quiet else _logger.info
    steps: list[Transform] = getattr(transform, "transforms", [transform])
    converted = [_tensor_step(step) for step in steps]
    missing = [type(step).__name__ for step, tensor_step in zip(steps, converted, strict=True) if tensor_step is None]
    reason = f"no tensor form of {', '.join(missing)}" if missing else f"image mode {mode!r}" if mode != "RGB" else ""
    if reason and decoder not in ("auto", "pil"):
        raise UserError(f"--decoder {decoder}: {reason}; use --decoder auto or pil")
    if reason or decoder == "pil":
        log("training images are decoded by Pillow%s", f": {reason}" if reason and decoder == "auto" else "")
        return partial(decode_pil, mode=mode), transform
    tensor_transform = transforms.Compose(converted)
    if decoder == "torch" or not can_decode_regions() or not isinstance(converted[0], TensorCrop):
        log("training images are decoded and augmented as tensors")
        return decode_tensor, tensor_transform
    log("training images are decoded and augmented as tensors, JPEGs only in the region of the crop")
    return decode_later, tensor_transform
