"""Short training runs for the tests: tiny networks on a part of the embedded images."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from samon.errors import Stopped
from samon.trainer import main as train
from samon.trainer.build import Hooks, Run
from samon.trainer.state import Progress

ROOT = Path(__file__).parents[1]
DATA = ["--data-dir", str(ROOT / "data/fashion-mnist"), "--dataset", "wds/fashion-mnist", "--num-classes", "10"]
INPUT = ["--in-chans", "1", "--img-size", "32", "--mean", "0.286", "--std", "0.353"]
SHORT = ["--train-num-samples", "64", "--val-num-samples", "40", "-b", "16", "-j", "0", "--epochs", "1"]
BASE = [*DATA, *INPUT, *SHORT, "--warmup-epochs", "0", "--lr", "0.05", "--model", "test_resnet"]


WATCH = Hooks()  # what the fixtures `jobs` and `batches` look in by


def run(tmp_path: Path, *args: str, name: str = "run", hooks: Hooks | None = None) -> tuple[dict[str, Any], Path]:
    """(final metrics, directory) of a run with BASE and `args`, which win."""
    place = ["--output", str(tmp_path), "--experiment", name, "--overwrite"]  # a test may run twice
    metrics = train.main([*BASE, *place, *args], hooks or WATCH)
    return metrics, tmp_path / name


def last(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "last.pth.tar", weights_only=True)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Model and EMA weights of the last checkpoint."""
    content = last(directory)
    average = content.get("state_dict_ema", {})
    return content["state_dict"] | {f"ema.{name}": value for name, value in average.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def stop_at(epoch: int, updates: int, number: int = signal.SIGTERM) -> Hooks:
    """Hooks that send this process a signal right after an update."""

    def updated(job: Run, progress: Progress, perturbed: bool) -> None:
        if (progress.epoch, progress.updates) == (epoch, updates):
            os.kill(os.getpid(), number)

    return Hooks(updated=updated)


def run_stopped(tmp_path: Path, epoch: int, updates: int, *args: str) -> Path:
    """A run that a signal stops after an update; its directory."""
    with pytest.raises(Stopped, match="stopped by signal 15"):
        run(tmp_path, *args, name="stopped", hooks=stop_at(epoch, updates))
    return tmp_path / "stopped"


def last_line(text: str) -> dict[str, Any]:
    return json.loads(text.strip().splitlines()[-1])
