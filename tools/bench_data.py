#!/usr/bin/env python3
"""Images per second of timm's `wds/` reader and loader and of ours, on the same shards in one run.

    python tools/bench_data.py [--images 512] [--workers 1 2]

Makes JPEGs of 500 x 375 and about 110 kB (noise with a photograph's 1/f spectrum), packs them with make_shards.py and
times: the whole loader with each number of workers (0: per second of CPU time), in turns, so that other load on the
machine hits both alike; then, in this process, each stage by itself.
"""

import argparse
import contextlib
import io
import logging
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
from PIL import Image
from timm.data.loader import fast_collate
from timm.data.readers.reader_wds import log_and_continue
from timm.data.transforms_factory import create_transform
from webdataset import DataPipeline, SimpleShardList, tarfile_to_samples

from samon.commands import make_shards
from samon.data import create_dataset, create_loader
from samon.data.decode import choose_decoder, decode_pil, decode_tensor
from samon.data.shards import ShardReader, load_split

SIZE, BATCH = (3, 224, 224), 32
# Random resized crop and flip, as in the recipes; bilinear or bicubic by chance, as in timm's train.py.
AUGMENT = {"color_jitter": None, "interpolation": "random"}
BYTES = 110_000


def photo(seed: int, width: int = 500, height: int = 375) -> bytes:
    """A JPEG (4:2:0) of noise with a 1/f spectrum, at the quality that makes it `BYTES` long."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1

    def field(falling: float) -> np.ndarray:
        spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
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
    """Shards of ``images`` photos under ``directory``/shards; a few of them for the stages."""
    some = [photo(i) for i in range(min(images, 128))]
    for i in range(images):
        path = directory / f"source/train/class{i % 8}/{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(some[i % len(some)])
    with contextlib.redirect_stdout(io.StringIO()):
        make_shards.main(["--source", str(directory / "source"), "--output", str(directory / "shards")])
    return some


def make_loader(kind: str, root: Path, workers: int) -> Any:
    """timm's loader or one of ours (by decoder) over the shards, on the CPU."""
    common: dict[str, Any] = {"root": str(root), "split": "train", "is_training": True, "batch_size": BATCH}
    loading: dict[str, Any] = {
        "input_size": SIZE,
        "batch_size": BATCH,
        "is_training": True,
        "num_workers": workers,
        "device": torch.device("cpu"),
        **AUGMENT,
    }
    if kind == "timm":
        return timm.data.create_loader(timm.data.create_dataset("wds/bench", **common), **loading)
    return create_loader(create_dataset("wds/bench", **common), decoder=kind, **loading)


def epoch_rate(loader: Any, clock: Callable[[], float]) -> float:
    """Images per second over an epoch, from the second batch on: workers have started."""
    count, start = 0, 0.0
    for images, _ in loader:
        if start:
            count += len(images)
        else:
            start = clock()
    return count / (clock() - start)


def milliseconds(action: Callable[[Any], Any], items: Iterable[Any], repeats: int = 5) -> float:
    """Best of ``repeats`` mean times per item."""
    items = list(items)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for item in items:
            action(item)
        best = min(best, (time.perf_counter() - start) / len(items) * 1e3)
    return best


def stages(root: Path, some: list[bytes]) -> None:
    """Print milliseconds per image of each stage, timm's and ours."""
    shards = load_split(str(root), "train")
    reader = ShardReader(None, None)
    images = sum(shards.lengths)

    def read_timm(_: Any) -> None:
        for _sample in DataPipeline(SimpleShardList(list(shards.urls)), tarfile_to_samples(handler=log_and_continue)):
            pass

    def read_ours(_: Any) -> None:
        for url, length in zip(shards.urls, shards.lengths, strict=True):
            for _sample in reader.read(url, length, range(length)):
                pass

    transform = create_transform(SIZE, is_training=True, use_prefetcher=True, **AUGMENT)  # type: ignore[arg-type]
    _, tensor_transform = choose_decoder("torch", transform, "RGB")
    pils, tensors = [decode_pil(data) for data in some], [decode_tensor(data) for data in some]
    ready = [(transform(image), 0) for image in pils[:BATCH]]
    ready_tensors = [(tensor_transform(image), 0) for image in tensors[:BATCH]]
    rows: list[tuple[str, float, float]] = [
        ("read", milliseconds(read_timm, [0]) / images, milliseconds(read_ours, [0]) / images),
        ("decode", milliseconds(decode_pil, some), milliseconds(decode_tensor, some)),
        ("augment", milliseconds(transform, pils), milliseconds(tensor_transform, tensors)),
        ("collate", milliseconds(fast_collate, [ready]) / BATCH, milliseconds(fast_collate, [ready_tensors]) / BATCH),
    ]
    print(f"\n{'ms per image':14}{'timm':>8}{'ours':>8}")
    for name, theirs, ours in rows:
        print(f"{name:14}{theirs:8.3f}{ours:8.3f}")
    theirs, ours = sum(row[1] for row in rows), sum(row[2] for row in rows)
    print(f"{'sum':14}{theirs:8.3f}{ours:8.3f}   ratio {theirs / ours:.2f}")
    print(f"bound if all but decoding and reading were free: {theirs / (rows[0][2] + rows[1][2]):.2f}")


def main(argv: list[str] | None = None) -> None:
    """Make the set, time loaders and stages, print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        some = make_set(Path(directory), args.images)
        root = Path(directory) / "shards"
        print(
            f"{args.images} JPEGs of 500 x 375, {sum(map(len, some)) / len(some) / 1e3:.0f} kB on average; "
            f"torch {torch.__version__}, timm {timm.__version__}"
        )
        print(f"{'workers':8}{'timm':>8}{'ours pil':>10}{'ours torch':>12}   images/s, ratio torch : timm (per round)")
        for workers in args.workers:
            kinds = ("timm", "pil", "torch")
            # Without workers one core does everything, and its CPU time does not see other load on the machine.
            clock = time.perf_counter if workers else time.process_time
            loaders = {kind: make_loader(kind, root, workers) for kind in kinds}
            rates: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(args.rounds):
                for kind in kinds:
                    rates[kind].append(epoch_rate(loaders[kind], clock))
            ratios = [ours / theirs for ours, theirs in zip(rates["torch"], rates["timm"], strict=True)]
            print(
                f"{workers:<8}{median(rates['timm']):8.0f}{median(rates['pil']):10.0f}{median(rates['torch']):12.0f}"
                f"   {median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
                flush=True,
            )
        stages(root, some)


if __name__ == "__main__":
    main()
