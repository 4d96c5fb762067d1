import math

import pytest
import torch

from samon.engines.masks import Mask


def gradients(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((40, 10), (100,))]


def update(mask: Mask, seed: int) -> torch.Tensor:
    """The masked gradients of an update that is applied."""
    masked = flat(mask(gradients(seed)))
    mask.advance()
    return masked


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("kind", ["random", "fisher", "dynamic"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_share_of_kept_entries(kind: str, sparsity: float) -> None:
    mask = Mask(kind, sparsity, every=2)
    for seed in range(5):
        grads = gradients(seed)
        masked = update(mask, seed)
        kept = flat(mask.masks)
        assert kept.sum() == round(500 * (1 - sparsity))
        assert torch.equal(masked, flat(grads) * kept)


def test_random_mask_is_drawn_once() -> None:
    mask = Mask("random", 0.5, every=1)
    update(mask, 0)
    before = flat(mask.masks)
    update(mask, 1)
    assert torch.equal(flat(mask.masks), before)


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


def test_epochs_renew_a_dynamic_mask_by_a_cosine() -> None:
    """Every second epoch of four, once: 0.5 (1 + cos(pi e / 4)) / 2 of the 100 kept entries change."""
    mask = Mask("dynamic", 0.8)
    changed = []
    for epoch in range(4):
        for told in range(2):  # again after a restart within the epoch
            assert mask.begin_epoch(epoch, 4, 2) is False, told
            before = flat(mask.masks) if mask.masks else None
            update(mask, 2 * epoch + told)
            changed.append(0 if before is None else int((before & ~flat(mask.masks)).sum()))
            assert flat(mask.masks).sum() == 100
    assert changed == [0, 0, 0, 0, 25, 0, 0, 0]  # at epoch 0 the random mask has been renewed at once


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_the_rate_of_exchange_falls_as_a_cosine(epoch: int) -> None:
    """Of 100 kept entries 50 change at first, (1 + cos(pi e / 4)) / 2 of that at epoch e of four."""
    mask = Mask("dynamic", 0.8)
    update(mask, 0)
    before = flat(mask.masks)
    mask.begin_epoch(epoch, 4, 1)
    update(mask, 1)
    rate = 0.5 * (1 + math.cos(math.pi * epoch / 4)) / 2
    assert int((before & ~flat(mask.masks)).sum()) == round(100 * rate) == [43, 25, 7][epoch - 1]


def test_a_dynamic_mask_keeps_its_sparsity_where_few_entries_lie_outside() -> None:
    mask = Mask("dynamic", 0.1, every=1)
    for seed in range(3):
        update(mask, seed)
        assert flat(mask.masks).sum() == 450
    assert mask.state_dict()["rate"] == 0.5


def test_epochs_ask_for_the_fisher_of_fisher_masks_alone() -> None:
    asked = [Mask(kind, 0.5).begin_epoch(0, 4, 2) for kind in ("random", "fisher", "dynamic")]
    assert asked == [False, True, False]
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


def test_state_continues() -> None:
    one, two = Mask("dynamic", 0.8, every=2), Mask("dynamic", 0.8, every=2)
    for seed in range(3):
        update(one, seed)
    two.load_state_dict(one.state_dict(), gradients())
    for seed in range(3, 6):
        assert torch.equal(update(one, seed), update(two, seed))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_bad_sparsity(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        Mask("random", sparsity)


@pytest.mark.parametrize("kind", ["fisher", "dynamic"])
def test_a_skipped_update_leaves_no_trace(kind: str) -> None:
    """Its gradient is not finite: a mask made from it would drop what matters until the next renewal."""
    ends = []
    for skipped in ((), (0, 2, 3)):
        mask = Mask(kind, 0.8, every=2)
        for seed in range(6):
            if seed in skipped:
                mask([g * torch.nan for g in gradients(seed)])
                mask.stale = True  # as `zero_grad` does
            update(mask, seed)
        ends.append(flat(mask.masks))
    assert torch.equal(*ends)


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
def test_the_state_of_another_mask_is_left_aside(how: dict) -> None:
    mask = Mask("random", 0.8)
    update(mask, 0)
    like = [torch.zeros(shape) for shape in how.pop("shapes", [(40, 10), (100,)])]
    other = Mask(how.get("kind", "random"), how.get("sparsity", 0.8))
    other.load_state_dict(mask.state_dict(), like)
    assert not other.masks
