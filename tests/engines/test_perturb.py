"""The arithmetic of the perturbation, compiled: the eager one's numbers, one graph for each function."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

import samon
from tests import reference
from tests.nets import BatchNormNet, batch, randomized


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def steps(name: str, backend: str, count: int = 10, **how) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model after this many steps with the compiled arithmetic, and one after as many with the eager one."""
    torch.manual_seed(0)
    model = randomized(BatchNormNet())
    twin = copy.deepcopy(model)
    opt, eager = (create_optimizer_v2(m, name, lr=0.1, rho=0.3) for m in (model, twin))
    opt.compile(backend)
    x, y = batch()
    for _ in range(count):
        for o, m in ((opt, model), (eager, twin)):
            o.zero_grad()
            samon.two_pass(o, lambda m=m: F.cross_entropy(m(x), y), **how)
            o.step()
    assert opt.stats.keys() == eager.stats.keys()
    return model, twin


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("geometry", reference.GEOMETRIES)
def test_equals_the_eager_one(geometry: str, groups: int) -> None:
    """The same kernels in the same order: bit for bit. Ten steps make one graph of the ascent, and one each of adding
    and of copying back, which groups do without."""
    model, twin = steps(f"samon-{geometry}".strip("-"), "aot_eager", groups=groups)
    assert graphs() == (3 if groups == 1 else 1)
    assert not torch._dynamo.utils.counters["graph_break"]
    for (name, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_inductor() -> None:
    """Fused loops sum in another order: 1e-12 in float64 for one step, 1e-9 after three."""
    model, twin = steps("samon-layerl2", "inductor", 3)
    assert graphs() == 3
    for (name, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=name)


def test_a_non_finite_gradient_perturbs_nothing() -> None:
    model = randomized(BatchNormNet())
    opt = create_optimizer_v2(model, "samon", lr=0.1)
    opt.compile("aot_eager")
    eps, _, finite = opt.perturbation(
        opt.perturbed_parameters(), [torch.full_like(p, torch.inf) for p in opt.perturbed_parameters().values()]
    )
    assert not finite
    assert not any(e.any() for e in eps)


def test_a_random_part_is_refused() -> None:
    """Another ascent graph at each update: one step took 40 times a plain one's time."""
    opt = create_optimizer_v2(randomized(BatchNormNet()), "samon", lr=0.1, esam_beta=0.5)
    with pytest.raises(ValueError, match=r"--esam-beta.* would be recompiled each time; drop it or --torchcompile"):
        opt.compile()
