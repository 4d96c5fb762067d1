"""Half-precision weights round w + eps: what they really took of the perturbation is reported."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import samon
from tests.nets import NETS, LayerNormNet, batch, randomized

DTYPES = [torch.bfloat16, torch.float16]
SMALL, LARGE = 1e-4, 1.0  # far below and far above the spacing of half-precision numbers near 1


def setup(dtype: torch.dtype, rho: float, net: type[nn.Module] = LayerNormNet):
    """Every perturbed entry at 1, where bfloat16 numbers are 2^-8 and 2^-7 apart, float16 numbers 2^-11 and 2^-10."""
    torch.manual_seed(0)
    model = randomized(net()).to(dtype)
    opt = create_optimizer_v2(model, "samon", lr=0.1, rho=rho)
    with torch.no_grad():
        for p in opt.perturbed_parameters().values():
            p.fill_(1)
    x, y = batch()
    return model, opt, lambda: F.cross_entropy(model(x.to(dtype)).float(), y)


def run(how: str, opt: torch.optim.Optimizer, forward) -> None:
    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = forward()
        loss.backward()
        return loss

    opt.step(closure) if how == "closure" else samon.two_pass(opt, forward)


@pytest.mark.parametrize("how", ["two_pass", "closure"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lost_perturbation_is_reported_and_warned_about_once(dtype: torch.dtype, how: str) -> None:
    _, opt, forward = setup(dtype, SMALL)
    with pytest.warns(
        UserWarning, match=r"loses 100% of the perturbation \(rho=0\.0001\).*--amp instead of.*raise rho"
    ):
        run(how, opt, forward)
    assert opt.stats["eps_norm"].item() == 0
    assert opt.stats["eps_lost"].item() == 1
    assert opt.stats["eps_lost"].shape == ()
    run(how, opt, forward)  # warnings are errors in tests: the second step has none


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_is_that_of_the_moved_weights(dtype: torch.dtype) -> None:
    _, opt, forward = setup(dtype, LARGE)
    moved: list[torch.Tensor] = []

    def watched() -> torch.Tensor:
        moved.append(torch.cat([(p.detach().float() - 1).flatten() for p in opt.perturbed_parameters().values()]))
        return forward()

    samon.two_pass(opt, watched)
    assert moved[0].norm() == 0
    assert opt.stats["eps_norm"].item() == pytest.approx(moved[1].norm().item(), rel=1e-5)
    # Rounding to nearest loses at most half a spacing an entry, 2^-8 above 1 in bfloat16, of 64 entries.
    assert 0 < opt.stats["eps_lost"].item() < 8 * 2**-8 / LARGE
    assert opt.stats["eps_norm"].dtype == torch.float32


@pytest.mark.parametrize("net", NETS.values())
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_lose_nothing(dtype: torch.dtype, net: type[nn.Module]) -> None:
    """Their offsets meet gamma and beta in float32, so a small radius stays one."""
    model, opt, forward = setup(dtype, SMALL, net)
    samon.two_pass(opt, forward, groups=4)
    assert opt.stats["eps_lost"].item() == 0
    assert opt.stats["eps_norm"].item() == pytest.approx(SMALL, rel=1e-5)
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_groups_are_close_to_float32() -> None:
    """bfloat16 keeps 8 bits; 10 % bounds what some ten layers and two passes add up, as for autocast."""
    model, opt, forward = setup(torch.bfloat16, 0.3)
    twin = copy.deepcopy(model).float()
    x, y = batch()
    samon.two_pass(opt, forward, groups=4)
    exact_opt = create_optimizer_v2(twin, "samon", lr=0.1, rho=0.3)
    samon.two_pass(exact_opt, lambda: F.cross_entropy(twin(x.float()), y), groups=4)
    got, exact = (torch.cat([p.grad.float().flatten() for p in m.parameters()]) for m in (model, twin))
    assert (got - exact).norm() < 0.1 * exact.norm()


def test_float32_reports_no_loss_and_zero_radius_none() -> None:
    _, opt, forward = setup(torch.float32, SMALL)
    samon.two_pass(opt, forward)
    assert "eps_lost" not in opt.stats
    _, opt, forward = setup(torch.bfloat16, 0.0)
    samon.two_pass(opt, forward)
    assert opt.stats["eps_lost"].item() == 0


def test_the_host_reads_once() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    _, opt, forward = setup(torch.bfloat16, LARGE)
    counts = []
    for _ in range(3):
        with Reads() as reads:
            samon.two_pass(opt, forward)
        counts.append(reads.count)
    assert counts == [1, 0, 0]


@pytest.mark.parametrize("fake", ["meta", "fake"])
def test_tensors_without_values_are_not_read(fake: str) -> None:
    with FakeTensorMode() if fake == "fake" else torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8, dtype=torch.bfloat16), nn.LayerNorm(8, dtype=torch.bfloat16))
        opt = create_optimizer_v2(model, "samon", lr=0.1)
        x = torch.empty(2, 4, dtype=torch.bfloat16)
        samon.two_pass(opt, lambda: model(x).square().mean())
        assert opt.stats["eps_lost"].shape == ()
