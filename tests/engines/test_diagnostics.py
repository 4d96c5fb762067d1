"""Missing gradients: lost in reentrant checkpointing (refused, naming the parameter) or of unused parameters."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import set_reentrant_ckpt
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import samon
from samon import UserError
from tests.nets import LayerNormNet, batch, randomized
from tests.steps import assert_gradients, gradients, loss_of, optimizer_of

# torch says so when the input of the checkpointed part needs no gradient; the error must come all the same.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")


class Checkpointed(nn.Module):
    """Perturbed layers before, inside and after a checkpointed block, and in a branch that is not used."""

    def __init__(self, reentrant: bool = False, norms: str = "") -> None:
        super().__init__()
        self.reentrant, self.norms, self.calls = reentrant, norms, 0
        self.stem, self.head = nn.Linear(192, 6), nn.Linear(6, 5)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        for name in norms.split():
            self.add_module(name, nn.LayerNorm(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.stem(x.flatten(1))
        x = self.before(x) if "before" in self.norms else x
        x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(self.after(x) if "after" in self.norms else x)


def step(model: nn.Module, opt: Any, **kwargs: Any) -> None:
    torch.manual_seed(3)
    samon.two_pass(opt, loss_of(model, *batch()), **kwargs)


@pytest.mark.parametrize("norms", ["", "before", "after", "before after", "after unused"])
@pytest.mark.parametrize("scope", ["sam", "samon", "samnn"])
def test_reentrant_checkpointing_is_refused(scope: str, norms: str) -> None:
    model = randomized(Checkpointed(True, norms))
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(UserError, match=r"use_reentrant=True\) hides .*; pass use_reentrant=False"):
        step(model, optimizer_of(model, scope))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_lost_parameter_is_named_in_groups_and_for_bare_parameters() -> None:
    model = randomized(LayerNormNet())
    inner = model.inner = nn.LayerNorm(17).double()
    model.mixes[2].forward = lambda x: x + checkpoint(nn.Module.__call__, inner, x.detach(), use_reentrant=True)
    bare = create_optimizer_v2(model.named_parameters(), "sam", lr=0.1)
    for opt, options in ((optimizer_of(model), {"groups": 4}), (bare, {})):
        with pytest.raises(UserError, match=r"hides inner\.weight"):
            step(model, opt, **options)


def test_checkpointing_of_timms_models() -> None:
    """The non-reentrant way gives the same gradients; the reentrant one is refused, and so is replay with either."""
    model = timm.create_model("test_vit", img_size=32, num_classes=5).double().train()
    twin, data = copy.deepcopy(model), batch(image=32)
    model.set_grad_checkpointing(True)
    opt = optimizer_of(model)
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(UserError, match=r"hides blocks\.0\.norm1\.weight.*set_reentrant_ckpt\(False\)"):
            samon.two_pass(opt, loss_of(model, *data))
    finally:
        set_reentrant_ckpt(False)
    samon.two_pass(opt, loss_of(model, *data))
    samon.two_pass(optimizer_of(twin), loss_of(twin, *data))
    assert_gradients(model, gradients(twin), 1e-12)
    late = optimizer_of(model, perturb="norm$|^norm|blocks.[4-9]")
    with pytest.raises(UserError, match=r"replay .*--no-replay.*gradient checkpointing is on"):
        samon.two_pass(late, loss_of(model, *data))
    samon.two_pass(late, loss_of(model, *data), replay=False)


@pytest.mark.parametrize("scope", ["sam", "samon"])
def test_an_unused_parameter_counts_as_zero_and_costs_one_forward_once(scope: str) -> None:
    """That forward leaves no trace in statistics and noise; later steps do without it."""
    model, lean = randomized(Checkpointed(norms="after unused")), randomized(Checkpointed(norms="after"))
    lean.load_state_dict(model.state_dict(), strict=False)
    opts = [optimizer_of(m, scope) for m in (model, lean)]
    for calls in (3, 2, 2):
        model.calls = 0
        for m, opt in zip((model, lean), opts, strict=True):
            opt.zero_grad()
            step(m, opt)
            opt.step()
        assert model.calls == calls
    assert model.unused.weight.grad is None
    for name, value in lean.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-14, msg=name)
