"""JPEGs decoded only as far as a crop needs them.

Either only where it lies, by nvImageCodec's libjpeg-turbo on the CPU: the same pixels. Rows below the crop are not
read at all, blocks beside it not transformed. Or at 1/2, 1/4 or 1/8 of the size, by simplejpeg's, where the crop still
has the pixels that the network wants: other pixels, and a gain only for photographs much larger than the crop's
result, since entropy decoding, most of the time at ImageNet's sizes, is done at any scale.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor


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
