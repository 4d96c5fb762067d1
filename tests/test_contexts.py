"""Temporary changes to a model, also those of the engines, are undone exactly, also after an exception."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import samon
from samon import UserError, contexts
from samon.engines import patches
from samon.engines.masks import fisher_diagonal
from tests.nets import BatchNormNet, batch, randomized
from tests.steps import assert_unchanged, update, values

CONTEXTS: dict[str, Callable[[Any], AbstractContextManager[None]]] = {
    "frozen": lambda model: contexts.requires_grad(model.parameters(), False),
    "trainable": lambda model: contexts.requires_grad(model.parameters(), True),
    "preserve_buffers": lambda model: contexts.preserve_buffers(model.modules()),
    "override_attrs": lambda model: patches.override_attrs({model: {"training": False, "other": 1}}),
    "patch_forward": lambda model: patches.patch_forward({model.bn: nn.Identity(), model.head: nn.Identity()}),
    "forward_hooks": lambda model: patches.forward_hooks(model.modules(), print, print),
}


def snapshot(model: nn.Module) -> list[Any]:
    """Attributes, hooks and `requires_grad` of every module and parameter."""
    modules = [(dict(vars(m)), dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    return [modules, [p.requires_grad for p in model.parameters()]]


@pytest.mark.parametrize("name", CONTEXTS)
def test_everything_is_restored_after_an_exception(name: str) -> None:
    model = randomized(BatchNormNet())
    model.stem.bias.requires_grad_(False)
    before, tensors = snapshot(model), values(model)
    with pytest.raises(RuntimeError, match="inside"), CONTEXTS[name](model):  # noqa: PT012
        if name == "preserve_buffers":
            model(batch()[0])
            model.bn.running_mean = torch.ones(6)
        else:
            assert snapshot(model) != before
        raise RuntimeError("inside")
    assert snapshot(model) == before
    assert_unchanged(model, tensors)


def test_their_effect_inside() -> None:
    model, (x, _) = randomized(BatchNormNet()), batch()
    model.stem.bias.requires_grad_(False)
    with contexts.requires_grad(model.parameters(), False):
        assert not model(x).requires_grad
    with contexts.requires_grad([model.stem.bias], True):
        assert torch.autograd.grad(model(x).sum(), model.stem.bias)


def test_the_effect_of_patches_inside() -> None:
    model, (x, _) = randomized(BatchNormNet()), batch()
    with patches.patch_forward({model.head: nn.Identity()}):
        assert model(x).shape == (8, 6)
    calls: list[nn.Module] = []
    with patches.forward_hooks([model.bn, model.head], lambda module, args: calls.append(module)):
        torch.compile(model, backend="eager")(x)  # graphs call no hooks
    assert calls == [model.bn, model.head]


def test_all_modules_is_modules() -> None:
    model = nn.Sequential(shared := nn.Linear(2, 2), nn.Sequential(shared, nn.ReLU()))
    assert set(contexts.all_modules(model)) == set(model.modules())
    assert len(contexts.all_modules(model)) == len(list(model.modules()))


def test_modules_without_a_model_are_recorded_in_the_first_pass_that_runs_any() -> None:
    model = randomized(BatchNormNet())
    opt, before = torch.optim.SGD(model.parameters(), 0.1), values(model)
    with contexts.preserve_buffers_in_pass(opt, []):
        pass
    assert contexts.modules_of(opt, None) == []
    with contexts.preserve_buffers_in_pass(opt, []):
        model(batch()[0])
    assert set(contexts.modules_of(opt, None)) == set(model.modules())
    assert_unchanged(model, before)


def test_cached_attention_biases_follow_the_weights() -> None:
    """timm's LeViT computes them once in eval mode."""
    torch.manual_seed(0)
    layer = randomized(nn.Sequential(timm.models.levit.Attention(8, 4, resolution=4))).eval()
    opt = create_optimizer_v2(layer, "sam", lr=0.1, rho=9.0)
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)
        with opt.perturbed({name: torch.randn_like(p) * ("biases" in name) for name, p in layer.named_parameters()}):
            assert not torch.allclose(layer(x), before)
        assert torch.equal(layer(x), before)
    assert not layer[0].training
    fisher_diagonal(opt, [lambda: layer(x).square().mean()] * 2)  # two backward passes, each through its own biases
    bare = create_optimizer_v2(layer.parameters(), "sam", lr=0.1, rho=9.0)  # knows no layers before its first step
    with pytest.raises(UserError, match="caches its biases in eval mode; create the optimizer from"):
        samon.two_pass(bare, lambda: layer(x).square().mean())
    bare = create_optimizer_v2(layer.train().parameters(), "sam", lr=0.1, rho=9.0)
    update(bare, lambda: layer(x).square().mean())
    with torch.no_grad():
        layer.eval()(x)
    update(bare, lambda: layer(x).square().mean())
    assert layer[0].attention_biases.grad.any()
