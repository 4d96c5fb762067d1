"""FLOPs of a step relative to a plain one, which run.json records."""

import pytest

from samon.trainer.config import parse
from samon.trainer.flops import step_flops

NET = ["--data-dir", "x", "--model", "resnet20_cifar", "--num-classes", "10", "--img-size", "32", "-b", "8"]


def ratio(*flags: str) -> float | None:
    flops = step_flops(parse([*NET, "--opt", "samon-momentum", *flags]))
    return flops and flops["step"] / flops["plain"]


def test_flops_of_every_kind_of_step() -> None:
    full = ratio()
    assert full is not None
    assert 1.6 < full < 1.7
    assert ratio("--opt", "sgd") == ratio("--ascent", "previous") == 1
    assert ratio("--opt", "sam") == pytest.approx(2, abs=0.02)
    assert ratio("--ascent", "looksam:4") == pytest.approx(1 + (full - 1) / 4, abs=0.01)
    assert ratio("--m-sharpness", "2") == pytest.approx(full, abs=0.02)
    assert ratio("--ascent-fraction", "0.5") == pytest.approx(1 + (full - 1) / 2, abs=0.01)
    assert ratio("--sam-every", "2") == pytest.approx(1 + (full - 1) / 2)
    assert ratio("--epochs", "10", "--sam-start-epoch", "6") == pytest.approx(1 + (full - 1) * 0.4)
    assert ratio("--ascent", "aesam") is None  # decided during training
