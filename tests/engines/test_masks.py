"""Masks of sparse perturbations, and the Fisher diagonal of SSAM-F."""

import math

import pytest
import torch
from torch import Tensor

import samon
from samon.engines.masks import Mask, fisher_diagonal
from tests.nets import batch
from tests.processes import run_ranks
from tests.steps import loss_of, losses_of, make, optimizer_of


def gradients(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((40, 10), (100,))]


def update(mask: Mask, seed: int) -> Tensor:
    """The masked gradients of an update that is applied."""
    masked = flat(mask(gradients(seed)))
    mask.advance()
    return masked


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("kind", ["random", "fisher", "dynamic"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.95])
def test_fraction_of_kept_entries(kind: str, sparsity: float) -> None:
    mask = Mask(kind, sparsity, every=2)
    for seed in range(5):
        grads = gradients(seed)
        masked = update(mask, seed)
        kept = flat(mask.masks)
        assert kept.sum() == round(500 * (1 - sparsity))
        assert torch.equal(masked, flat(grads) * kept)
        if seed == 0:
            first = kept
    assert torch.equal(first, kept) == (kind == "random" or sparsity == 0)
    assert mask.state_dict()["rate"] == 0.5  # also where few entries lie outside


def test_fisher_mask_keeps_the_largest_squared_gradients() -> None:
    mask = Mask("fisher", 0.9, every=1)
    for seed in (0, 1):
        grads = gradients(seed)
        update(mask, seed)
        kept = flat(mask.masks)
        assert flat(grads).abs()[kept].min() >= flat(grads).abs()[~kept].max()


def test_dynamic_mask_drops_the_smallest_and_grows_elsewhere() -> None:
    mask = Mask("dynamic", 0.8, every=1)
    update(mask, 0)
    old, size = flat(mask.masks), flat(gradients(1)).abs()
    update(mask, 1)
    new = flat(mask.masks)
    stayed, dropped = old & new, old & ~new
    assert stayed.sum() == dropped.sum() == 50
    assert size[stayed].min() >= size[dropped].max()


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_epochs_renew_a_dynamic_mask_once_by_a_cosine(epoch: int) -> None:
    """At epoch e of four, 0.5 (1 + cos(pi e / 4)) / 2 of the 100 kept entries change."""
    mask = Mask("dynamic", 0.8)
    update(mask, 0)
    before = flat(mask.masks)
    for seed in (1, 2):  # again after a restart within the epoch
        assert mask.begin_epoch(epoch, 4, 1) is False
        update(mask, seed)
        assert flat(mask.masks).sum() == 100
    rate = 0.5 * (1 + math.cos(math.pi * epoch / 4)) / 2
    assert int((before & ~flat(mask.masks)).sum()) == round(100 * rate) == [43, 25, 7][epoch - 1]


def test_only_fisher_masks_request_a_fisher_diagonal() -> None:
    requests = [Mask(kind, 0.5).begin_epoch(0, 4, 2) for kind in ("random", "fisher", "dynamic")]
    assert requests == [False, True, False]
    mask = Mask("fisher", 0.9)
    assert [mask.begin_epoch(epoch, 4, 2) for epoch in (0, 0, 1, 2, 3)] == [True, False, False, True, False]
    scores = gradients(5)
    mask.renew_fisher([s.abs() for s in scores])
    before = flat(mask.masks)
    update(mask, 6)
    assert torch.equal(flat(mask.masks), before)
    assert flat(scores).abs()[before].min() >= flat(scores).abs()[~before].max()


def test_a_state_from_before_epochs_continues() -> None:
    mask, old = Mask("dynamic", 0.8, every=2), Mask("dynamic", 0.8, every=2)
    update(old, 0)
    mask.load_state_dict({"step": 1, "masks": old.masks}, gradients())
    assert (mask.step, mask.every, mask.rate) == (1, 2, 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_bad_sparsity(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        Mask("random", sparsity)


def test_micro_batches_of_an_update_have_one_mask() -> None:
    mask = Mask("fisher", 0.8, every=1)
    for seed in range(3):
        mask(gradients(seed))
    mask.advance()
    assert mask.step == 1
    first = Mask("fisher", 0.8)
    update(first, 0)
    assert torch.equal(flat(mask.masks), flat(first.masks))


@pytest.mark.parametrize("how", [{"kind": "fisher"}, {"sparsity": 0.5}, {"shapes": [(40, 10)]}])
def test_the_state_of_another_mask_is_ignored(how: dict) -> None:
    mask = Mask("random", 0.8)
    update(mask, 0)
    like = [torch.zeros(shape) for shape in how.pop("shapes", [(40, 10), (100,)])]
    other = Mask(how.get("kind", "random"), how.get("sparsity", 0.8))
    other.load_state_dict(mask.state_dict(), like)
    assert not other.masks


# -- in a step ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sam-random", "ssam-f", "ssam-d"])
def test_masks_follow_the_trainable_parameters(name: str) -> None:
    model, opt = make(name=name)
    for frozen in (True, False, True):
        model.norms.requires_grad_(not frozen)
        samon.two_pass(opt, loss_of(model, *batch()))
        opt.step()
        assert [m.shape for m in opt.mask.masks] == [p.shape for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", ["sam-random", "ssam-f", "ssam-d"])
def test_masks_of_complex_weights(name: str) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(48, 5, dtype=torch.complex128))
    opt = optimizer_of([{"params": [weight]}], name, mask_every=1)
    for _ in range(2):
        samon.two_pass(opt, lambda: weight.abs().square().mean())
        opt.step()
    assert opt.mask.masks[0].sum() == weight.numel() / 2


def rank_diagonal(rank: int, size: int = 3) -> list[Tensor]:
    """From this rank's part of the batch."""
    model, opt = make(name="ssam-f")
    x, y = (t[size * rank :][:size] for t in batch(6))
    return fisher_diagonal(opt, losses_of(model, x, y, size))


def test_the_fisher_diagonal_sums_squared_gradients_of_single_samples() -> None:
    """On one process and two. Tolerance 1e-12: sums of squares in float64."""
    model, _ = make()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for forward in losses_of(model, *batch(6), 6):
        model.zero_grad()
        forward().backward()
        total = {n: total[n] + p.grad**2 for n, p in model.named_parameters()}
    for found in (rank_diagonal(0, 6), *run_ranks(rank_diagonal, 2)):
        for got, want in zip(found, total.values(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-16)
