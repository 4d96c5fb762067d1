"""Means and speed of a log interval."""

import pytest

from samon.trainer.meter import Timer
from samon.trainer.state import Progress


def test_the_speed_counts_all_augmented_images_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("samon.trainer.meter.time.monotonic", lambda: next(clock))
    progress = Progress(samples=8)
    timer = Timer(progress, images_per_sample=3)
    progress.samples += 16
    assert timer.read() == (24.0, 0.0)
