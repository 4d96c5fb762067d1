"""What rho measures (`radius=`), for every geometry, against formulas in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor

import samon
from samon.geometry import GEOMETRIES, ascent_step
from tests import reference
from tests.nets import LayerNormNet, batch, randomized

RHO, RULES = 0.3, ("raw", 0.25, "loss")


def expected_step(geometry: str, weights: list[Tensor], grads: list[Tensor], rule: str | float) -> list[Tensor]:
    """Eq. 5 with rho replaced by the length that the rule prescribes."""
    names = [f"layer{i}.{'weight' if i % 2 == 0 else 'bias'}" for i in range(len(weights))]
    by_name = [dict(zip(names, tensors, strict=True)) for tensors in (weights, grads)]
    return list(reference.perturbation(geometry, *by_name, RHO, rule).values())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_rule_in_every_geometry(geometry: str, rule: str | float) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(3, 4).double(), torch.randn(4).double(), torch.randn(2, 2).double()]
    rows = [[torch.randn_like(w) for w in weights] for _ in range(3)]
    is_weight, eta = [True, False, True], GEOMETRIES[geometry].eta
    expected = [expected_step(geometry, weights, grads, rule) for grads in rows]
    eps, _ = ascent_step(geometry, weights, rows[0], RHO, eta, is_weight, radius=rule)
    for got, want in zip(eps, expected[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    stacked = [torch.stack(tensors) for tensors in zip(*rows, strict=True)]
    grouped, _ = ascent_step(geometry, weights, stacked, RHO, eta, is_weight, grouped=True, radius=rule)
    for i, got in enumerate(grouped):
        torch.testing.assert_close(got, torch.stack([want[i] for want in expected]), rtol=1e-12, atol=0)


def test_the_linearized_loss_rises_by_rho() -> None:
    model = randomized(LayerNormNet()).double()
    x, y = batch()
    opt = create_optimizer_v2(model, "samon-layerl2", lr=0.1, rho=1e-6, radius="loss")
    before = F.cross_entropy(model(x), y)
    samon.two_pass(opt, lambda: F.cross_entropy(model(x), y))
    rise = opt.stats["loss_perturbed"].item() - before.item()
    assert rise == pytest.approx(1e-6, rel=1e-4)  # the second-order term is of relative size rho


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("geometry", ["", "elemlinf"])
def test_zero_and_tiny_gradients(geometry: str, rule: str | float) -> None:
    """Zero does not move; if 1 / ||g|| overflows, the update is skipped as one with a non-finite gradient is."""
    model = randomized(LayerNormNet()).float()
    name = "-".join(filter(None, ("samon", geometry)))
    opt = create_optimizer_v2(model, name, lr=0.1, rho=1.0, radius=rule)
    named = opt.perturbed_parameters()
    eps, _, finite = opt.perturbation(named, [torch.zeros_like(p) for p in named.values()])
    assert finite
    assert not any(e.any() for e in eps)
    eps, _, finite = opt.perturbation(named, [torch.full_like(p, 1e-42) for p in named.values()])
    assert all(e.isfinite().all() for e in eps)
    assert finite != (rule == "loss" and geometry == "elemlinf")  # the 2-norm underflows to zero before


def test_copies_and_wrong_values() -> None:
    model = randomized(LayerNormNet())
    opt = create_optimizer_v2(model, "samon", lr=0.1, radius="raw")
    assert "radius=raw" in repr(opt)
    assert copy.deepcopy(opt).radius == "raw"
    for wrong in ("rho", 0, 1, -0.5, math.nan, True, None):
        with pytest.raises(samon.UserError, match="radius must be ball, raw, loss or a number in"):
            create_optimizer_v2(model, "samon", lr=0.1, radius=wrong)
