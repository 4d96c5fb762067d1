import pytest
import torch

from samon.optim.masks import Mask


def gradients(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((40, 10), (100,))]


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("kind", ["random", "fisher", "dynamic"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_share_of_kept_entries(kind: str, sparsity: float) -> None:
    mask = Mask(kind, sparsity, every=2)
    for seed in range(5):
        grads = gradients(seed)
        masked = flat(mask(grads))
        kept = flat(mask.masks)
        assert kept.sum() == round(500 * (1 - sparsity))
        assert torch.equal(masked, flat(grads) * kept)


def test_random_mask_is_drawn_once() -> None:
    mask = Mask("random", 0.5, every=1)
    mask(gradients(0))
    before = flat(mask.masks)
    mask(gradients(1))
    assert torch.equal(flat(mask.masks), before)


def test_fisher_mask_keeps_the_largest_squared_gradients() -> None:
    mask = Mask("fisher", 0.9, every=1)
    for seed in (0, 1):
        grads = gradients(seed)
        mask(grads)
        kept = flat(mask.masks)
        assert flat(grads).abs()[kept].min() >= flat(grads).abs()[~kept].max()


def test_dynamic_mask_drops_the_smallest_and_grows_elsewhere() -> None:
    mask = Mask("dynamic", 0.8, every=1)
    mask(gradients(0))
    old, size = flat(mask.masks), flat(gradients(1)).abs()
    mask(gradients(1))
    new = flat(mask.masks)
    stayed, dropped = old & new, old & ~new
    assert stayed.sum() == dropped.sum() == 50
    assert size[stayed].min() >= size[dropped].max()


def test_state_continues() -> None:
    one, two = Mask("dynamic", 0.8, every=2), Mask("dynamic", 0.8, every=2)
    for seed in range(3):
        one(gradients(seed))
    two.load_state_dict(one.state_dict(), torch.device("cpu"))
    for seed in range(3, 6):
        assert torch.equal(flat(one(gradients(seed))), flat(two(gradients(seed))))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_bad_sparsity(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        Mask("random", sparsity)
