"""FLOPs of a step relative to a plain one, which run.json records."""

import pytest
import torch
from torch import nn

from samon.trainer.config import parse
from samon.trainer.flops import count_flops, step_flops

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


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 24, 3, groups=8), nn.ConvTranspose2d(8, 24, 3, stride=2, groups=4)])
def test_each_gradient_of_a_grouped_convolution_costs_as_much_as_its_forward_pass(layer: nn.Module) -> None:
    layer, x = layer.to("meta"), torch.empty(2, 8, 10, 10, device="meta", requires_grad=True)
    forward = count_flops(lambda: layer(x))
    assert forward > 0
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * forward
    layer.requires_grad_(False)
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * forward


def test_a_frozen_network_saves_its_backward_pass() -> None:
    """2 of 3 parts of the step; the perturbed normalization layers need both passes and the gradients in between."""
    head = ["--freeze", "^(?!fc)", "--opt", "sgd"]
    all_layers, frozen = (step_flops(parse([*NET, *flags])) for flags in (["--opt", "sgd"], head))
    assert all_layers is not None
    assert frozen is not None
    assert frozen["step"] / all_layers["step"] == pytest.approx(1 / 3, abs=0.02)
    assert ratio(*head, "--opt", "samon", "--perturb-frozen") == pytest.approx(3, abs=0.05)
