#!/usr/bin/env python3
"""Images per second of a training loader at CIFAR's size: in-memory data set on the device, and image by image.

    python tools/bench_in_memory.py [--device cuda] [--workers 2] [--images 10000]

Random images of 32 px, batch 128, the paper's two augmentations. The loaders of each pair alternate in one process,
three times; medians are printed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samon.data import create_dataset, create_in_memory_loader, create_loader


def images_per_second(loader: Any, epoch: int, device: torch.device) -> float:
    loader.set_epoch(epoch)
    began, count = time.perf_counter(), 0
    for images, _ in loader:
        count += len(images)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (args.images, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, args.images)
    print(f"{device}, {args.workers} workers, {args.images} images of 32 px, batch 128, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as root:
        np.savez(Path(root) / "random.npz", x_train=images, y_train=labels)
        for aa in (None, "cifar10"):
            kwargs: dict[str, Any] = {
                "train_crop_mode": "pad",
                "auto_augment": aa,
                "color_jitter": 0.0,
                "device": device,
            }
            dataset = create_dataset("npz/random", root=root, split="train", rank=0, world_size=1)
            stream = create_dataset("npz/random", root=root, split="train", is_training=True, batch_size=128)
            loaders = {
                "in memory": create_in_memory_loader(dataset, (3, 32, 32), 128, True, **kwargs),
                "by image": create_loader(stream, (3, 32, 32), 128, True, num_workers=args.workers, **kwargs),
            }
            speeds: dict[str, list[float]] = {name: [] for name in loaders}
            for epoch in range(4):
                for name, loader in loaders.items():
                    speed = images_per_second(loader, epoch, device)
                    if epoch:  # the first starts the workers
                        speeds[name].append(speed)
            medians = {name: statistics.median(values) for name, values in speeds.items()}
            ratio = medians["in memory"] / medians["by image"]
            shown = "  ".join(f"{name} {speed:.0f} img/s" for name, speed in medians.items())
            print(f"augmentation {aa or 'basic':8} {shown}  x{ratio:.1f}")


if __name__ == "__main__":
    main()
