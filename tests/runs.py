"""Short training runs for the tests: tiny networks on a part of the embedded images."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from samon.errors import Stopped
from samon.trainer import logging, loop, main
from samon.trainer.build import Run, build
from samon.trainer.config import parse
from samon.trainer.distributed import DistInfo
from samon.trainer.run_dir import load_run_settings
from samon.trainer.state import Progress

ROOT = Path(__file__).parents[1]
CPU = DistInfo(torch.device("cpu"), 0, 1)
DATA = ["--data-dir", str(ROOT / "data/fashion-mnist"), "--dataset", "wds/fashion-mnist", "--num-classes", "10"]
INPUT = ["--in-chans", "1", "--img-size", "32", "--mean", "0.286", "--std", "0.353"]
SHORT = ["--train-num-samples", "64", "--val-num-samples", "40", "-b", "16", "-j", "0", "--epochs", "1"]
BASE = [*DATA, *INPUT, *SHORT, "--warmup-epochs", "0", "--lr", "0.05", "--model", "test_resnet"]
OnUpdate = Callable[[Run, Progress, bool], None]


def train(argv: list[str], on_update: OnUpdate | None = None, flops: bool = False) -> dict[str, Any]:
    """The final metrics of `train.py argv`; `on_update(run, progress, two_pass)` is called after each update. FLOPs are
    counted if asked for: the count takes two to four times as long as a run."""
    count = logging.step_flops if flops else lambda run: {"step": 2.0, "plain": 1.0}
    with patch.object(logging, "step_flops", count), closing(main.train(parse(argv, load_run_settings))) as training:
        while True:
            try:
                update = next(training)
            except StopIteration as end:
                return end.value
            if on_update is not None:
                on_update(*update)


def run(
    tmp_path: Path, *args: str, name: str = "run", on_update: OnUpdate | None = None, flops: bool = False
) -> tuple[dict[str, Any], Path]:
    """(final metrics, directory) of a run with BASE and `args`, which win."""
    place = ["--output", str(tmp_path), "--experiment", name, "--overwrite"]  # a test may run twice
    return train([*BASE, *place, *args], on_update, flops), tmp_path / name


def built(*args: str) -> Run:
    """What a run with BASE and `args` works with, without training."""
    return build(parse([*BASE, *args]), CPU)


def watch_batches(monkeypatch: pytest.MonkeyPatch, watch: Callable[[Tensor, Tensor], object]) -> None:
    """Call `watch(images, target)` with every training batch as the model sees it."""
    to_device = loop.to_device

    def watched(run: Run, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        batch = to_device(run, images, target)
        watch(*batch)
        return batch

    monkeypatch.setattr(loop, "to_device", watched)


def at(epoch: int, updates: int, function: Callable[[], object]) -> OnUpdate:
    """Calls `function` right after an update."""

    def on_update(run: Run, progress: Progress, two_pass: bool) -> None:
        if (progress.epoch, progress.updates) == (epoch, updates):
            function()

    return on_update


def stop_at(epoch: int, updates: int, number: int = signal.SIGTERM) -> OnUpdate:
    """Sends this process a signal right after an update."""
    return at(epoch, updates, lambda: os.kill(os.getpid(), number))


def run_stopped(tmp_path: Path, epoch: int, updates: int, *args: str) -> Path:
    """A run that a signal stops after an update; its directory."""
    with pytest.raises(Stopped, match="stopped by signal 15"):
        run(tmp_path, *args, name="stopped", on_update=stop_at(epoch, updates))
    return tmp_path / "stopped"


def last(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "last.pth.tar", weights_only=True)


def weights(directory: Path) -> dict[str, Tensor]:
    """Model and EMA weights of the last checkpoint."""
    content = last(directory)
    average = content.get("state_dict_ema", {})
    return content["state_dict"] | {f"ema.{name}": value for name, value in average.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def last_line(text: str) -> dict[str, Any]:
    return json.loads(text.strip().splitlines()[-1])
