"""`perturb_frozen=True`: frozen parameters are perturbed, restored exactly and never updated."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

import samon
from tests import reference
from tests.nets import NETS, BatchNormNet, batch, randomized

RHO = 0.3


def probe(net: str) -> nn.Module:
    """A network of which only the last layer is trained."""
    torch.manual_seed(0)
    model = randomized(NETS[net]())
    for p in model.parameters():
        p.requires_grad_(False)
    list(model.parameters())[-1].requires_grad_(True)
    list(model.parameters())[-2].requires_grad_(True)
    return model


def by_closure(opt: samon.SAM, forward: Callable) -> None:
    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = forward()
        loss.backward()
        return loss

    opt.step(closure)


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"perturb": "late"}, {"perturb": "late", "replay": False}])
@pytest.mark.parametrize("name", ["samon", "samon-layerl2", "sam-fisher", "samnn-elemlinf"])
@pytest.mark.parametrize("net", NETS)
def test_the_gradient_is_that_of_the_unfrozen_model(net: str, name: str, options: dict) -> None:
    """The direction does not depend on which parameters are trained, so neither does the gradient of those that are."""
    model = probe(net)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    unfrozen = copy.deepcopy(model).requires_grad_(True)
    x, y = batch()
    if "groups" in options and not name.startswith("samon"):
        pytest.skip("groups are for scope samon")
    before, late = copy.deepcopy(model.state_dict()), {"batchnorm": r"blocks\.2", "layernorm": r"norms\.3|mixes\.3"}
    perturb, steps = (late[net], 3) if "perturb" in options else (None, 1)  # the first update records what is replayed
    two_pass = {key: value for key, value in options.items() if key != "perturb"}
    for m, kwargs in ((model, {"perturb_frozen": True}), (unfrozen, {})):
        opt = create_optimizer_v2(m, name, lr=0.1, rho=RHO, perturb=perturb, **kwargs)
        for _ in range(steps):
            opt.zero_grad()
            samon.two_pass(opt, lambda m=m: F.cross_entropy(m(x), y), **two_pass)
    for (n, p), q in zip(model.named_parameters(), unfrozen.parameters(), strict=True):
        assert torch.equal(p, before[n])
        assert (p.grad is not None) == p.requires_grad == (n in trained)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("net", NETS)
def test_the_closure_and_the_loop(net: str) -> None:
    model = probe(net)
    twin, x, y = copy.deepcopy(model), *batch()
    names = reference.scope_names(model, "samon")
    unfrozen = copy.deepcopy(model).requires_grad_(True)
    _, expected = reference.sam_gradient(unfrozen, [lambda: F.cross_entropy(unfrozen(x), y)], names, "", RHO)
    start = copy.deepcopy(model.state_dict())
    opts = [create_optimizer_v2(m, "samon", lr=0.1, rho=RHO, perturb_frozen=True) for m in (model, twin)]
    by_closure(opts[0], lambda: F.cross_entropy(model(x), y))
    samon.two_pass(opts[1], lambda: F.cross_entropy(twin(x), y))
    opts[1].step()
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[n], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(p, twin.get_parameter(n), rtol=1e-12, atol=0)
        else:
            assert p.grad is None
            assert torch.equal(p, start[n])


def test_accumulation_keeps_what_earlier_calls_recorded() -> None:
    model = probe("layernorm")
    opt = create_optimizer_v2(model, "samon", lr=0.1, rho=RHO, perturb_frozen=True, ascent="fsam")
    x, y = batch()
    for part, target in zip(x.chunk(2), y.chunk(2), strict=True):
        samon.two_pass(opt, lambda x=part, y=target: F.cross_entropy(model(x), y), loss_scale=0.5)
    named = opt.perturbed_parameters()
    for p in named.values():
        p.requires_grad_(True)
    halves = [
        torch.autograd.grad(F.cross_entropy(model(a), b), list(named.values()))
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True)
    ]
    for p in named.values():
        p.requires_grad_(False)
    opt.step()
    for got, a, b in zip(opt.ascent.state.values(), *halves, strict=True):
        torch.testing.assert_close(got, (a + b) / 2, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_done_is_refused() -> None:
    model = probe("layernorm")
    with pytest.raises(samon.UserError, match="perturb_frozen=True"):
        create_optimizer_v2(model, "samon", lr=0.1)
    for source in (*({"ascent": name} for name in ("previous", "msam", "looksam:2", "aesam")), {"gsam_alpha": 0.1}):
        with pytest.raises(samon.UserError, match=r"perturb_frozen excludes .* use ascent='batch'"):
            create_optimizer_v2(model, "samon", lr=0.1, perturb_frozen=True, **source)
    with pytest.raises(samon.UserError, match="create the optimizer from the model"):
        create_optimizer_v2(list(model.parameters())[-2:], "sam", lr=0.1, perturb_frozen=True)
    opt = create_optimizer_v2(model, "samon", lr=0.1, perturb_frozen=True)
    with pytest.raises(samon.UserError, match="no gradients of frozen parameters"):
        opt.first_step()


def test_a_whole_frozen_scope_shows_in_the_summary() -> None:
    opt = create_optimizer_v2(probe("batchnorm"), "samon", lr=0.1, perturb_frozen=True)
    whole = create_optimizer_v2(randomized(BatchNormNet()), "samon", lr=0.1)
    assert opt.selection.summary() == whole.selection.summary()
    assert len(opt.perturbed_parameters()) > 0
