#!/usr/bin/env python3
"""Throughput of plain SGD: this project's loop against a bare one on timm's loader, model and optimizer.

    python tools/bench_loop.py                       # the embedded shards, one process
    python tools/bench_loop.py --model resnet50 --img-size 224 --batch-size 64 --device cuda --amp

The two loops take turns for a number of updates on the same shards with the same transforms, workers and precision,
so that whatever else the machine does hits both alike. Where others use the machine, look at the CPU time of the
training process (data workers apart): it does not count the waiting.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2

from samon.trainer import config, loop
from samon.trainer.build import build
from samon.trainer.checkpoint import CheckpointManager
from samon.trainer.distributed import DistInfo, init_distributed
from samon.trainer.logging import RunLogger
from samon.trainer.run_dir import RunDir
from samon.trainer.signals import SignalHandler

ROOT = Path(__file__).resolve().parent.parent


def now() -> tuple[float, float]:
    """(wall clock, CPU time of this process) in seconds."""
    return time.perf_counter(), time.process_time()


def bare(c: config.Config, device: torch.device) -> Iterator[None]:
    """An update at a time of the shortest loop: forward, backward, step, nothing else."""
    input_size = (c.in_chans or 3, c.img_size, c.img_size)
    dataset = timm.data.create_dataset(
        c.dataset,
        root=c.data_dir,
        split=c.train_split,
        is_training=True,
        batch_size=c.batch_size,
        seed=c.seed,
        input_img_mode="L" if input_size[0] == 1 else "RGB",
    )
    loader = timm.data.create_loader(
        dataset,
        input_size,
        c.batch_size,
        is_training=True,
        num_workers=c.workers,
        device=device,
        mean=c.mean,
        std=c.std,
        color_jitter=c.color_jitter,
        interpolation=c.train_interpolation,
    )
    model = timm.create_model(c.model, num_classes=c.num_classes, in_chans=input_size[0], **c.model_kwargs).to(device)
    optimizer = create_optimizer_v2(model, "sgd", lr=c.lr, weight_decay=c.weight_decay)
    criterion = LabelSmoothingCrossEntropy(c.smoothing)
    amp = torch.autocast(device.type, torch.bfloat16) if c.amp else contextlib.nullcontext()
    model.train()
    while True:
        for images, target in loader:
            with amp:
                loss = criterion(model(images), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield


def ours(c: config.Config, dist_info: DistInfo, folder: Path) -> Iterator[None]:
    """An update at a time of samon.trainer.loop, everything on: meters, finite check, log lines, TensorBoard."""
    run, run_dir = build(c, dist_info), RunDir(folder)
    logger = RunLogger(run, run_dir)
    logger.start_trackers()
    for _ in loop.fit(run, CheckpointManager(run, run_dir), SignalHandler(), logger):
        if dist_info.device.type == "cuda":
            torch.cuda.synchronize()
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each loop")
    parser.add_argument("--updates", type=int, default=25, help="updates in a turn")
    chosen, rest = parser.parse_known_args()
    argv = ["-c", str(ROOT / "hparams/quickstart.yaml"), "--opt", "sgd", "--data-dir", str(ROOT / "data/fashion-mnist")]
    c = config.parse([*argv, "--epochs", "1000", "--log-interval", "50", "--val-split", "", *rest])
    dist_info = init_distributed(c)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        loops = {"bare": bare(c, dist_info.device), "samon": ours(c, dist_info, Path(folder))}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
        for turn in range(chosen.rounds + 1):
            order = list(loops) if turn % 2 else list(loops)[::-1]
            for name in order:
                before = now()
                for _ in range(chosen.updates):
                    next(loops[name])
                after = now()
                if turn:  # the first turn warms up
                    seconds[name].append((after[0] - before[0], after[1] - before[1]))
    for kind, index in (("wall", 0), ("CPU", 1)):
        bare_s, samon_s = ([pair[index] / chosen.updates for pair in seconds[name]] for name in ("bare", "samon"))
        ratios = statistics.quantiles([b / a for a, b in zip(bare_s, samon_s, strict=True)], n=4)
        low, middle, high = (f"{100 * (ratio - 1):+.2f} %" for ratio in ratios)
        rates = [c.batch_size / statistics.median(values) for values in (bare_s, samon_s)]
        print(
            f"{kind:4} time: bare {rates[0]:.1f} images/s, samon {rates[1]:.1f}; samon takes {middle} more an update "
            f"(median of {len(bare_s)} pairs; quartiles {low}, {high})"
        )


if __name__ == "__main__":
    main()
