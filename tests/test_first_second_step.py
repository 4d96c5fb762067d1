"""`first_step` and `second_step`: davda54/sam's protocol, equal to `step(closure)` bit for bit."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

import samon
from tests.nets import NETS, BatchNormNet, batch, randomized


def run(model: nn.Module, name: str, step: Callable, updates: int = 3, **kwargs: object) -> dict:
    opt = create_optimizer_v2(model, name, lr=0.1, rho=0.3, **kwargs)
    for seed in range(updates):
        torch.manual_seed(seed)
        x, y = batch()
        step(opt, lambda x=x, y=y: F.cross_entropy(model(x), y))
    return copy.deepcopy({"model": model.state_dict(), "optimizer": opt.state_dict()})


def manual(opt: samon.SAM, forward: Callable) -> None:
    forward().backward()
    opt.first_step(zero_grad=True)
    forward().backward()
    opt.second_step(zero_grad=True)


def by_closure(opt: samon.SAM, forward: Callable) -> None:
    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = forward()
        loss.backward()
        return loss

    opt.step(closure)
    opt.zero_grad()


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("sam", {}),
        ("samon-layerl2-adamw", {}),
        ("samnn-elemlinf", {}),
        ("sam-random", {}),
        ("samon", {"ascent": "looksam:2"}),
        ("samon", {"gsam_alpha": 0.3}),
        ("samon", {"esam_beta": 0.5}),
        ("samon", {"radius": "raw"}),
    ],
)
def test_equals_the_closure(net: str, name: str, kwargs: dict) -> None:
    torch.manual_seed(0)
    model = randomized(NETS[net]())
    twin = copy.deepcopy(model)
    results = run(model, name, manual, **kwargs), run(twin, name, by_closure, **kwargs)
    for got, want in zip(*(torch.utils._pytree.tree_leaves(r) for r in results), strict=True):
        assert torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want


def test_wrong_order_is_refused_and_the_weights_come_back() -> None:
    torch.manual_seed(0)
    model = randomized(BatchNormNet())
    opt = create_optimizer_v2(model, "samon", lr=0.1, rho=0.3)
    x, y = batch()

    def backward() -> None:
        F.cross_entropy(model(x), y).backward()

    with pytest.raises(samon.UserError, match=r"second_step\(\) needs first_step"):
        opt.second_step()
    with pytest.raises(samon.UserError, match="depends on no parameter"):
        opt.first_step()
    backward()
    before = copy.deepcopy(model.state_dict())
    opt.first_step()
    for call in (opt.first_step, opt.step, lambda: samon.two_pass(opt, lambda: F.cross_entropy(model(x), y))):
        with pytest.raises(samon.UserError, match="call second_step"):
            call()
    backward()  # adds to the gradients at w
    with pytest.raises(samon.UserError, match="not cleared"):
        opt.second_step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    opt.zero_grad()
    manual(opt, lambda: F.cross_entropy(model(x), y))  # usable again
    single = create_optimizer_v2(model, "samon", lr=0.1, ascent="previous")
    backward()
    with pytest.raises(samon.UserError, match="makes a single pass"):
        single.first_step()
