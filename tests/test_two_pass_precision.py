"""Gradient scalers, autocast and half-precision weights.

bfloat16 has 8 significant bits, 2^-8 = 0.4 % per operation; where a test allows 10 %, that bounds what some ten layers
and two passes add up.
"""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import samon
from tests.nets import NETS, BatchNormNet, LayerNormNet, SharedGradients, batch, randomized
from tests.steps import Forward, HostReads, assert_unchanged, closure_of, flat_gradient, loss_of, optimizer_of, values


def make(net: Any = LayerNormNet, name: str = "samon", **how: Any) -> tuple[nn.Module, Any, Forward]:
    """(float32 network, optimizer, its loss)."""
    torch.manual_seed(0)
    model = randomized(net()).float()
    x, y = batch()
    return model, optimizer_of(model, name, **how), loss_of(model, x.float(), y)


def scaler_of(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=0.5)


def assert_near(model: nn.Module, twin: nn.Module) -> None:
    exact = flat_gradient(twin)
    assert (flat_gradient(model).float() - exact).norm() < 0.1 * exact.norm()


# -- scalers and autocast ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "groups", "how"),
    [(s + g, 1, {}) for s in ("sam", "samon") for g in ("", "-fisher", "-elemlinf")]
    + [("samon", 4, {}), ("samon-fisher", 4, {}), ("sam", 1, {"net": SharedGradients})]
    + [("samon-layerl2", groups, {"radius": rule}) for rule in ("raw", 0.5, "loss") for groups in (1, 4)],
)
def test_a_scaled_step_equals_an_unscaled_one(name: str, groups: int, how: dict[str, Any]) -> None:
    """2^12 scales float32 exactly, so only Fisher's T, where g is squared, could differ: by rounding of g / scale."""
    (model, opt, forward), (twin, other, plain) = make(name=name, **how), make(name=name, **how)
    scaler = scaler_of(2.0**12)
    samon.two_pass(opt, forward, scaler=scaler, groups=groups)
    samon.two_pass(other, plain, groups=groups)
    assert opt.stats["ascent_grad_norm"].item() == pytest.approx(other.stats["ascent_grad_norm"].item(), rel=1e-6)
    torch.testing.assert_close(flat_gradient(model), flat_gradient(twin) * 2**12, rtol=1e-5, atol=1e-3)
    scaler.unscale_(opt)
    torch.testing.assert_close(flat_gradient(model), flat_gradient(twin), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("scope", "groups"), [("sam", 1), ("samon", 1), ("samon", 4)])
def test_a_scaled_loss_without_perturbed_parameters_is_refused(scope: str, groups: int) -> None:
    _, opt, _ = make(name=scope)
    elsewhere = torch.ones((), requires_grad=True)
    with pytest.raises(samon.UserError, match="depends on no parameter"):
        samon.two_pass(opt, lambda: elsewhere * 2, scaler=scaler_of(2.0**12), groups=groups)


@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("bn_stats", ["first", "second", "both"])
def test_an_overflow_skips_the_step_and_backs_off_once(bad_pass: int, bn_stats: str) -> None:
    model, opt, plain = make(BatchNormNet)
    scaler, before, calls = scaler_of(2.0**10), copy.deepcopy(dict(model.named_parameters())), []

    def forward() -> Tensor:
        calls.append(1)
        return plain() * torch.inf if len(calls) == bad_pass else plain()

    samon.two_pass(opt, forward, scaler=scaler, bn_stats=bn_stats)
    assert not flat_gradient(model).isfinite().all()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(b.isfinite().all() for b in model.buffers())
    opt.zero_grad()  # and the next step works
    samon.two_pass(opt, forward, scaler=scaler)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert not torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("net", NETS.values())
def test_bfloat16_autocast_is_close_to_float32(net: Any, groups: int) -> None:
    (model, opt, forward), (twin, other, plain) = make(net), make(net)
    with torch.autocast("cpu", torch.bfloat16):
        samon.two_pass(opt, forward, groups=groups)
    samon.two_pass(other, plain, groups=groups)
    assert_near(model, twin)
    assert all(b.dtype in (torch.float32, torch.int64) for b in model.buffers())


# -- half-precision weights round w + eps ------------------------------------------------------------------------------
DTYPES = [torch.bfloat16, torch.float16]
SMALL, LARGE = 1e-4, 1.0  # far below and far above the spacing of half-precision numbers near 1


def make_half(dtype: torch.dtype, rho: float, net: Any = LayerNormNet) -> tuple[nn.Module, Any, Forward]:
    """Every perturbed entry is 1, where bfloat16 numbers are 2^-8 and 2^-7 apart, float16 numbers 2^-11 and 2^-10."""
    torch.manual_seed(0)
    model = randomized(net()).to(dtype)
    opt = optimizer_of(model, rho=rho)
    with torch.no_grad():
        for p in opt.perturbed_parameters().values():
            p.fill_(1)
    x, y = batch()
    return model, opt, lambda: F.cross_entropy(model(x.to(dtype)).float(), y)


@pytest.mark.parametrize("way", ["two_pass", "closure"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lost_perturbation_is_reported_and_warned_about_once(dtype: torch.dtype, way: str) -> None:
    _, opt, forward = make_half(dtype, SMALL)
    for first in (True, False):
        with (
            pytest.warns(UserWarning, match=r"loses 100%.*rho=0\.0001.*--amp instead of.*raise rho")
            if first
            else nullcontext()  # other warnings are errors in tests
        ):
            opt.step(closure_of(opt, forward)) if way == "closure" else samon.two_pass(opt, forward)
        assert (opt.stats["eps_norm"].item(), opt.stats["eps_lost"].item()) == (0, 1)
        assert opt.stats["eps_lost"].shape == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_norm_is_the_length_that_the_weights_took(dtype: torch.dtype) -> None:
    _, opt, forward = make_half(dtype, LARGE)
    deltas: list[Tensor] = []

    def observed() -> Tensor:
        deltas.append(torch.cat([(p.detach().float() - 1).flatten() for p in opt.perturbed_parameters().values()]))
        return forward()

    samon.two_pass(opt, observed)
    assert deltas[0].norm() == 0
    assert opt.stats["eps_norm"].item() == pytest.approx(deltas[1].norm().item(), rel=1e-5)
    # Rounding to nearest loses at most half a spacing per entry, 2^-8 above 1 in bfloat16, of 64 entries.
    assert 0 < opt.stats["eps_lost"].item() < 8 * 2**-8 / LARGE
    assert opt.stats["eps_norm"].dtype == torch.float32


@pytest.mark.parametrize("net", NETS.values())
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_lose_nothing(dtype: torch.dtype, net: Any) -> None:
    """Their offsets are added to gamma and beta in float32, so a small radius stays one."""
    model, opt, forward = make_half(dtype, SMALL, net)
    samon.two_pass(opt, forward, groups=4)
    assert opt.stats["eps_lost"].item() == 0
    assert opt.stats["eps_norm"].item() == pytest.approx(SMALL, rel=1e-5)
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_groups_with_bfloat16_weights_are_close_to_float32() -> None:
    model, opt, forward = make_half(torch.bfloat16, 0.3)
    twin = copy.deepcopy(model).float()
    x, y = batch()
    samon.two_pass(opt, forward, groups=4)
    samon.two_pass(optimizer_of(twin), loss_of(twin, x.float(), y), groups=4)
    assert_near(model, twin)


def test_nothing_is_lost_in_float32_and_with_a_radius_of_zero() -> None:
    _, opt, forward = make_half(torch.float32, SMALL)
    samon.two_pass(opt, forward)
    assert "eps_lost" not in opt.stats
    _, opt, forward = make_half(torch.bfloat16, 0.0)
    samon.two_pass(opt, forward)
    assert opt.stats["eps_lost"].item() == 0


def test_only_the_first_step_reads_on_the_host() -> None:
    _, opt, forward = make_half(torch.bfloat16, LARGE)
    counts = []
    for _ in range(3):
        with HostReads() as reads:
            samon.two_pass(opt, forward)
        counts.append(reads.count)
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


@pytest.mark.parametrize("fake", ["meta", "fake"])
def test_tensors_without_values_are_not_read(fake: str) -> None:
    with FakeTensorMode() if fake == "fake" else torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8, dtype=torch.bfloat16), nn.LayerNorm(8, dtype=torch.bfloat16))
        opt = optimizer_of(model)
        x = torch.empty(2, 4, dtype=torch.bfloat16)
        samon.two_pass(opt, lambda: model(x).square().mean())
        assert opt.stats["eps_lost"].shape == ()


def test_norms_of_half_precision_gradients_are_computed_in_float32() -> None:
    """Their squares overflow in half precision, and in float32 from 1e19 on."""
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).bfloat16()
    opt = optimizer_of(model, "sam", rho=0.5)
    named = opt.perturbed_parameters()
    for size, ok in ((1e30, False), (1e15, True)):
        eps, _, finite = opt.perturbation(named, [torch.full_like(p, size) for p in named.values()])
        assert finite == ok
        assert {e.dtype for e in eps} == {torch.float32}
    before = values(model)
    samon.two_pass(opt, lambda: model(torch.ones(2, 8, dtype=torch.bfloat16)).square().mean())
    assert_unchanged(model, before)
