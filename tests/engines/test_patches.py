"""Temporary changes of the engines are undone exactly, also after an exception."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samon.engines import patches
from tests.nets import BatchNormNet, batch, randomized
from tests.test_contexts import snapshot


def double(x: Tensor) -> Tensor:
    return 2 * x


CONTEXTS: dict[str, Callable[[Any], AbstractContextManager[None]]] = {
    "override_attrs": lambda model: patches.override_attrs({model: {"training": False, "other": 1}}),
    "patch_forward": lambda model: patches.patch_forward({model.bn: double, model.head: double}),
    "forward_hooks": lambda model: patches.forward_hooks(model.modules(), print, print),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_everything_is_restored_after_an_exception(name: str) -> None:
    model = randomized(BatchNormNet())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="inside"), CONTEXTS[name](model):  # noqa: PT012
        assert snapshot(model) != before
        raise RuntimeError("inside")
    assert snapshot(model) == before


def test_their_effect_inside() -> None:
    model, (x, _) = randomized(BatchNormNet()), batch()
    with patches.patch_forward({model.head: double}):
        assert model(x).shape == (8, 6)
    calls: list[nn.Module] = []
    with patches.forward_hooks([model.bn, model.head], lambda module, args: calls.append(module)):
        torch.compile(model, backend="eager")(x)  # graphs call no hooks
    assert calls == [model.bn, model.head]
