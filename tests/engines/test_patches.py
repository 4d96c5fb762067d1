"""What the engines' temporary changes do; tests/test_contexts.py has that they are undone."""

import torch
from torch import Tensor, nn

from samon.engines import patches
from tests.nets import BatchNormNet, batch, randomized


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_their_effect_inside() -> None:
    model, (x, _) = randomized(BatchNormNet()), batch()
    with patches.patch_forward({model.head: double}):
        assert model(x).shape == (8, 6)
    calls: list[nn.Module] = []
    with patches.forward_hooks([model.bn, model.head], lambda module, args: calls.append(module)):
        torch.compile(model, backend="eager")(x)  # graphs call no hooks
    assert calls == [model.bn, model.head]
