#!/usr/bin/env python3
"""Images per second of timm's `wds/` reader, webdataset's own loader, torchvision's folder and ours, in one run.

    python tools/bench_data.py [--images 512] [--workers 1 2] [--size 224 160]

Makes JPEGs of 500 x 375 and about 110 kB (noise with a photograph's 1/f spectrum), packs them with make_shards.py and
times batches of augmented uint8 images, as they go to the device, with each number of workers (0: per second of CPU
time), in turns, so that other load on the machine hits all alike; then prints how far each decoder's pixels are from
Pillow's.
"""

import argparse
import contextlib
import io
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm.data
import torch
import webdataset
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode as Mode
from torchvision.transforms import v2

from samon import rng
from samon.cli import make_shards
from samon.data import create_dataset, create_loader
from samon.data.decode import choose_decoder

BATCH = 32
OURS = ("pil", "torch", "crop")  # by --decoder
KINDS = ("timm", "webdataset", "torchvision", *OURS)
TARGETS = {(224, "crop"): 1.8}  # times timm
# Random resized crop and flip, as in the recipes; bilinear or bicubic by chance, as in timm's train.py.
AUGMENT = {"color_jitter": None, "interpolation": "random"}
BYTES = 110_000
Loader = Iterable[tuple[torch.Tensor, torch.Tensor]]


def photo(seed: int, width: int = 500, height: int = 375) -> bytes:
    """A JPEG (4:2:0) of noise with a 1/f spectrum, at the quality that makes it `BYTES` long."""
    random_numbers = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1

    def field(falling: float) -> np.ndarray:
        real, imaginary = random_numbers.normal(size=(2, *frequency.shape))
        spectrum = real + 1j * imaginary
        values = np.fft.irfft2(spectrum / frequency**falling, (height, width))
        return (values - values.mean()) / values.std()

    planes = [128 + 50 * field(1.2), 128 + 15 * field(1.6), 128 + 15 * field(1.6)]
    image = Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8), "YCbCr").convert("RGB")
    low, high = 50, 99
    while True:
        quality = (low + high) // 2
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        if low >= high:
            return out.getvalue()
        low, high = (quality + 1, high) if out.tell() < BYTES else (low, quality)


def make_set(directory: Path, images: int) -> list[bytes]:
    """Write shards of `images` photos under `directory`/shards; return the different ones."""
    some = [photo(i) for i in range(min(images, 128))]
    for i in range(images):
        path = directory / f"source/train/class{i % 8}/{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(some[i % len(some)])
    with contextlib.redirect_stdout(io.StringIO()):
        make_shards.main(["--source", str(directory / "source"), "--output", str(directory / "shards")])
    return some


def their_loader(kind: str, directory: Path, size: int, workers: int) -> Loader:
    """What webdataset's and torchvision's documentation would have one write; uint8 here too."""
    choices = [v2.RandomResizedCrop(size, interpolation=how) for how in (Mode.BILINEAR, Mode.BICUBIC)]
    augment = v2.Compose([v2.RandomChoice(choices), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    if kind == "torchvision":
        folder = ImageFolder(str(directory / "source/train"), augment)
        return DataLoader(folder, BATCH, shuffle=True, num_workers=workers, drop_last=True)
    urls = sorted(map(str, (directory / "shards").glob("*train*.tar")))
    shards = webdataset.WebDataset(urls, shardshuffle=100, seed=0).shuffle(2048, rng=random.Random(0))
    samples = shards.decode("pil").to_tuple("jpg", "cls").map_tuple(augment, int)
    return webdataset.WebLoader(samples.batched(BATCH, partial=False), batch_size=None, num_workers=workers)


def make_loader(kind: str, directory: Path, size: int, workers: int) -> Loader:
    """Batches (uint8 [B, 3, size, size], target) on the CPU, before normalization."""
    if kind in ("webdataset", "torchvision"):
        return their_loader(kind, directory, size, workers)
    root = str(directory / "shards")
    common: dict[str, Any] = {"root": root, "split": "train", "is_training": True, "batch_size": BATCH}
    loading: dict[str, Any] = {
        "input_size": (3, size, size),
        "batch_size": BATCH,
        "is_training": True,
        "num_workers": workers,
        "device": torch.device("cpu"),
        **AUGMENT,
    }
    if kind == "timm":
        return timm.data.create_loader(timm.data.create_dataset("wds/bench", **common), **loading).loader
    return create_loader(create_dataset("wds/bench", **common), decoder=kind, **loading).loader


def epoch_rate(loader: Loader, clock: Callable[[], float]) -> float:
    """Images per second over an epoch, from the second batch on: workers have started."""
    count, start = 0, 0.0
    for images, _ in loader:
        assert images.dtype == torch.uint8
        if start:
            count += len(images)
        else:
            start = clock()
    return count / (clock() - start)


def pixels(some: list[bytes], size: int) -> None:
    """Print how far each decoder's training images are from those of timm's Pillow path, in levels of 255."""
    # timm's training transform, to uint8
    transform = create_transform((3, size, size), is_training=True, use_prefetcher=True, **AUGMENT)  # type: ignore[arg-type]
    images: dict[str, torch.Tensor] = {}
    for kind in OURS:
        decode, step = choose_decoder(kind, transform, "RGB")
        tensors = []
        for seed, data in enumerate(some):
            rng.seed(seed)
            tensors.append(torch.as_tensor(step(decode(data))).float())
        images[kind] = torch.stack(tensors)
    for kind in OURS[1:]:
        difference = (images[kind] - images["pil"]).abs()
        print(f"{kind} against pil at {size} px: mean {difference.mean():.3f}, largest {int(difference.max())} of 255")


def race(directory: Path, size: int, workers: int, rounds: int) -> None:
    """Print images per second of every loader, taking turns, and the ratio to timm's."""
    # Without workers one core does everything, and its CPU time does not see other load on the machine.
    clock = time.perf_counter if workers else time.process_time
    loaders = {kind: make_loader(kind, directory, size, workers) for kind in KINDS}
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            rates[kind].append(epoch_rate(loaders[kind], clock))
    print(f"{size} px, {workers} workers:")
    for kind in KINDS:
        ratios = [ours / theirs for ours, theirs in zip(rates[kind], rates["timm"], strict=True)]
        target = f"   target {TARGETS[size, kind]}" if (size, kind) in TARGETS else ""
        name = f"samon --decoder {kind}" if kind in OURS else kind
        span = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  {name:24}{median(rates[kind]):6.0f} images/s {median(ratios):6.2f} x timm {span}{target}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, nargs="+", default=[224, 160], help="training image sizes")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        some = make_set(Path(directory), args.images)
        print(
            f"{args.images} JPEGs of 500 x 375, {sum(map(len, some)) / len(some) / 1e3:.0f} kB on average; "
            f"torch {torch.__version__}, timm {timm.__version__}"
        )
        for size in args.size:
            for workers in args.workers:
                race(Path(directory), size, workers, args.rounds)
        for size in args.size:
            pixels(some, size)


if __name__ == "__main__":
    main()
