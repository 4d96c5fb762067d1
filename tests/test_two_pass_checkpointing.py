"""Gradients that are missing: lost in reentrant checkpointing (refused by name) or of parameters that are unused."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_reentrant_ckpt
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.checkpoint import checkpoint

import samon
from tests.nets import LayerNormNet, batch, randomized

# torch says so when the checkpointed part's input needs no gradient; the error must come all the same.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")


class Checkpointed(nn.Module):
    """Perturbed layers before, inside and behind a checkpointed block, and in a branch that is not used."""

    def __init__(self, reentrant: bool = False, norms: str = "") -> None:
        super().__init__()
        self.reentrant, self.norms = reentrant, norms
        self.stem, self.head = nn.Linear(192, 6), nn.Linear(6, 5)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        if "before" in norms:
            self.before = nn.LayerNorm(6)
        if "behind" in norms:
            self.behind = nn.LayerNorm(6)
        if "unused" in norms:
            self.unused = nn.LayerNorm(6)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.stem(x.flatten(1))
        x = self.before(x) if "before" in self.norms else x
        x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(self.behind(x) if "behind" in self.norms else x)


def step(model: nn.Module, opt: torch.optim.Optimizer, **kwargs: object) -> torch.Tensor:
    x, y = batch()
    torch.manual_seed(3)
    return samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), **kwargs)


@pytest.mark.parametrize("norms", ["", "before", "behind", "before behind", "behind unused"])
@pytest.mark.parametrize("scope", ["sam", "samon", "samnn"])
def test_reentrant_checkpointing_is_refused(scope: str, norms: str) -> None:
    model = randomized(Checkpointed(True, norms))
    opt = create_optimizer_v2(model, scope, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(samon.UserError, match=r"use_reentrant=True\) hides .*; pass use_reentrant=False"):
        step(model, opt)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    names = [n for n, _ in model.named_parameters()]
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in names)


def test_refused_by_name_in_groups_and_from_bare_parameters() -> None:
    model = randomized(LayerNormNet())
    mixed = model.mixes[2]
    plain = mixed.forward
    mixed.forward = lambda x: x + checkpoint(nn.Module.__call__, inner, x.detach(), use_reentrant=True)
    inner = model.inner = nn.LayerNorm(17).double()
    for opt, how in (
        (create_optimizer_v2(model, "samon", lr=0.1), {"groups": 4}),
        (create_optimizer_v2(model.named_parameters(), "sam", lr=0.1), {}),
    ):
        with pytest.raises(samon.UserError, match=r"hides inner\.weight"):
            step(model, opt, **how)
    mixed.forward = plain


def test_timms_reentrant_checkpointing() -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=5).double().train()
    model.set_grad_checkpointing(True)
    opt = create_optimizer_v2(model, "samon", lr=0.1)
    x, y = batch(image=32)
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(samon.UserError, match=r"hides blocks\.0\.norm1\.weight.*set_reentrant_ckpt\(False\)"):
            samon.two_pass(opt, lambda: F.cross_entropy(model(x), y))
    finally:
        set_reentrant_ckpt(False)
    samon.two_pass(opt, lambda: F.cross_entropy(model(x), y))


@pytest.mark.parametrize("scope", ["sam", "samon"])
def test_unused_parameters_count_as_zero_and_are_looked_into_once(scope: str) -> None:
    """The look is a forward more, which leaves no trace in statistics and noise; later steps do without it."""
    model, lean = randomized(Checkpointed(norms="behind unused")), randomized(Checkpointed(norms="behind"))
    lean.load_state_dict(model.state_dict(), strict=False)
    opts = [create_optimizer_v2(m, scope, lr=0.1, rho=0.3) for m in (model, lean)]
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


def test_a_loss_without_graph_is_refused() -> None:
    model = randomized(LayerNormNet())
    opt = create_optimizer_v2(model, "samon", lr=0.1)
    with pytest.raises(samon.UserError, match="the loss depends on no parameter that samon perturbs"):
        samon.two_pass(opt, lambda: torch.zeros(()))
