"""Mixed precision: scaled and unscaled ascent gradients, overflow in either pass, autocast's weight cache."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

import samon
from tests.nets import BatchNormNet, LayerNormNet, batch, randomized

RHO = 0.3


def setup(net=LayerNormNet, name: str = "samon", **kwargs):
    torch.manual_seed(0)
    model = randomized(net()).float()
    x, y = batch()
    return model, create_optimizer_v2(model, name, lr=0.1, rho=RHO, **kwargs), x.float(), y


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("geometry", ["", "-fisher", "-elemlinf"])
@pytest.mark.parametrize("scope", ["sam", "samon"])
def test_scaled_step_equals_unscaled(scope: str, geometry: str) -> None:
    """2^12 scales float32 exactly, so only Fisher's T, where g is squared, could differ: by rounding of g / scale."""
    model, opt, x, y = setup(name=scope + geometry)
    twin, twin_opt, _, _ = setup(name=scope + geometry)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), scaler=scaler)
    samon.two_pass(twin_opt, lambda: F.cross_entropy(twin(x), y))
    torch.testing.assert_close(gradient(model), gradient(twin) * 2**12, rtol=1e-5, atol=1e-3)
    scaler.unscale_(opt)
    torch.testing.assert_close(gradient(model), gradient(twin), rtol=1e-5, atol=1e-7)


def test_groups_with_scaler() -> None:
    model, opt, x, y = setup()
    twin, twin_opt, _, _ = setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), scaler=scaler, groups=4)
    samon.two_pass(twin_opt, lambda: F.cross_entropy(twin(x), y), groups=4)
    scaler.unscale_(opt)
    torch.testing.assert_close(gradient(model), gradient(twin), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("bn_stats", ["first", "second", "both"])
def test_overflow_skips_the_step_and_backs_off_once(bad_pass: int, bn_stats: str) -> None:
    model, opt, x, y = setup(BatchNormNet)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, backoff_factor=0.5)
    before = copy.deepcopy(dict(model.named_parameters()))
    calls = []

    def forward() -> torch.Tensor:
        calls.append(1)
        loss = F.cross_entropy(model(x), y)
        return loss * torch.inf if len(calls) == bad_pass else loss

    samon.two_pass(opt, forward, scaler=scaler, bn_stats=bn_stats)
    assert not gradient(model).isfinite().all()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(b.isfinite().all() for b in model.buffers())
    # and the next step works
    opt.zero_grad()
    bad_pass = 0
    samon.two_pass(opt, forward, scaler=scaler)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert not torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["sam", "samon"])
def test_autocast_around_the_whole_step_sees_the_moved_weights(scope: str, dtype: torch.dtype) -> None:
    """Autocast keeps half-precision copies of weights for as long as its context lasts."""
    model, opt, x, y = setup(name=scope)
    twin, twin_opt, _, _ = setup(name=scope)

    def inside(m: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            return F.cross_entropy(m(x), y)

    with torch.autocast("cpu", dtype):
        samon.two_pass(opt, lambda: F.cross_entropy(model(x), y))
    samon.two_pass(twin_opt, lambda: inside(twin))
    assert opt.stats["loss_perturbed"] == twin_opt.stats["loss_perturbed"] > opt.stats["loss"]
    assert torch.equal(gradient(model), gradient(twin))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("net", [LayerNormNet, BatchNormNet])
def test_bfloat16_is_close_to_float32(net, groups: int) -> None:
    """bfloat16 keeps 8 bits, 2^-8 = 0.4 % an operation; 10 % bounds what some ten layers and two passes add up."""
    model, opt, x, y = setup(net)
    twin, twin_opt, _, _ = setup(net)
    with torch.autocast("cpu", torch.bfloat16):
        samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), groups=groups)
    samon.two_pass(twin_opt, lambda: F.cross_entropy(twin(x), y), groups=groups)
    exact = gradient(twin)
    assert (gradient(model) - exact).norm() < 0.1 * exact.norm()
    assert all(b.dtype in (torch.float32, torch.int64) for b in model.buffers())
