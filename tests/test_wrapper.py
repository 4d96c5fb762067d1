"""Every optimizer of timm is a base that stays itself: its state is saved, loaded and copied as it does it."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import Lookahead, create_optimizer_v2, list_optimizers
from torch import nn

import samon
from samon.registry import VARIANTS
from tests.steps import closure_of, same

BASES = [n for n in list_optimizers(exclude_filters=["fused*", "bnb*", "adahessian"]) if not samon.is_sam_name(n)]
HALF = ("sgd", "adamw", "nadam", "lion", "muon", "adafactor", "kron")  # one of each kind of state
# PyTorch loads NAdam's float32 running product in the type of the weights: the plain optimizer resumes no better.
INEXACT = {("nadam", torch.bfloat16)}
NO_MODEL = [n for n, v in VARIANTS.items() if v.scope == "sam" and v.geometry != "eleml2orig"]


@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance("force_eager"):  # kron would compile itself
        yield


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).to(dtype)


def step(model: nn.Module, opt: torch.optim.Optimizer, t: int) -> None:
    torch.manual_seed(t)  # kron draws from it, and so does the gradient
    for p in model.parameters():
        p.grad = torch.randn(p.shape).to(p)
    opt.step()


def make(model: nn.Module, base: str, **how: Any) -> samon.SAM:
    opt = create_optimizer_v2(model, "sam", lr=0.01, weight_decay=0.01, base_opt=base, **how)
    opt._warned_plain = True  # the gradients here are arbitrary ones
    return opt


def through_a_file(value: Any) -> Any:
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore")  # some bases use what torch has deprecated
@pytest.mark.parametrize(
    ("base", "dtype"), [*((base, torch.float32) for base in BASES), *((base, torch.bfloat16) for base in HALF)]
)
def test_a_saved_state_continues_bit_exactly(base: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    opt = make(model, base)
    for t in range(3):
        step(model, opt, t)
    assert opt.base.state_dict().keys() <= opt.state_dict().keys()  # kron's random state
    content = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    resumed, alone = net(dtype), net(dtype)
    resumed.load_state_dict(content["model"])
    alone.load_state_dict(content["model"])
    again, plain = make(resumed, base), create_optimizer_v2(alone, base, lr=0.01, weight_decay=0.01)
    again.load_state_dict(copy.deepcopy(content["opt"]))
    plain.load_state_dict(copy.deepcopy(content["opt"]))
    twin, twin_opt = copy.deepcopy((model, opt))
    for t in range(3, 7):
        for m, o in ((model, opt), (resumed, again), (alone, plain), (twin, twin_opt)):
            step(m, o, t)
    exact = (base, dtype) not in INEXACT
    assert same(model.state_dict(), resumed.state_dict()) == same(opt.state_dict(), again.state_dict()) == exact
    assert same(resumed.state_dict(), alone.state_dict())  # the base optimizer alone reads it too
    assert same(model.state_dict(), twin.state_dict())


def test_a_base_keeps_the_state_it_had() -> None:
    model = net()
    base = torch.optim.AdamW(model.parameters())
    step(model, base, 0)
    before = {p: dict(values) for p, values in base.state.items()}
    opt = samon.SAM(base, samon.scope.select(model, "samon"), rho=0.05)
    assert before
    assert opt.state is base.state
    assert {p: dict(values) for p, values in opt.state.items()} == before


def test_hooks_see_the_state() -> None:
    opt, calls = make(net(), "adamw"), []
    opt.register_state_dict_post_hook(lambda _, state: calls.append(sorted(state)))
    opt.register_load_state_dict_pre_hook(lambda _, state: calls.append("load"))
    opt.load_state_dict(opt.state_dict())
    assert calls == [["param_groups", "state"], "load"]


@pytest.mark.parametrize("name", ["lookahead_sgd", "Lookahead_adamw"])
def test_lookahead_goes_around(name: str) -> None:
    """Below, it would save no state and keep the learning rate of before a load."""
    with pytest.raises(samon.UserError, match="use lookahead_sam"):
        make(net(), name)
    model = net()
    base = Lookahead(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(samon.UserError, match="Lookahead cannot be the base optimizer"):
        samon.SAM(base, samon.scope.select(model, "samon"), rho=0.05)


@pytest.mark.parametrize(
    ("cls", "how", "message"),
    [
        (torch.optim.LBFGS, {}, "LBFGS evaluates the loss several times"),
        (torch.optim.SGD, {"maximize": True}, "SGD has maximize=True.*negate the loss"),
    ],
)
def test_a_base_that_two_passes_do_not_fit_is_refused(cls: Any, how: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(samon.UserError, match=message):
        samon.SAM(cls(model.parameters(), **how), samon.scope.select(model, "samon"), rho=0.05)


# -- what timm promises of every name ----------------------------------------------------------------------------------


Layout = Callable[[nn.Parameter, nn.Parameter], Any]
LAYOUTS: dict[str, Layout] = {
    "parameters": lambda weight, bias: [weight, bias],
    "groups": lambda weight, bias: [{"params": [weight]}, {"params": [bias], "lr": 3e-3}],
    "one": lambda weight, bias: [{"params": bias, "lr": 3e-3}],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NO_MODEL)
def test_timms_generic_checks(name: str, layout: str) -> None:
    """Of its optimizer tests: steps lower the loss, a loaded state is the saved one, gradients are set to None;
    for a weight [10, 5] that is not contiguous and a bias [10]."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(10, 5, 2)[..., 0]), nn.Parameter(torch.randn(10))
    opt, x = create_optimizer_v2(LAYOUTS[layout](weight, bias), name, lr=1e-3), torch.randn(5)
    assert repr(opt)
    closure = closure_of(opt, lambda: (weight.mv(x) + bias).square().sum())
    start = closure()
    for _ in range(10):
        opt.step(closure)
    state = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(copy.deepcopy(state))
    assert same(state, opt.state_dict())
    assert closure() < start
    opt.zero_grad(set_to_none=False)
    assert not bias.grad.any()
    opt.zero_grad()
    assert bias.grad is None
