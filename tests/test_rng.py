"""The random state of a process; the device's generator is a stand-in, which `torch.cuda`'s functions reach."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from samon import rng


def test_every_generator_is_restored_the_devices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, of_device = torch.device("cuda", 1), torch.Generator()
    calls: list[torch.device] = []

    def set_state(state: Tensor, device: torch.device) -> None:
        calls.append(device)
        of_device.set_state(state)

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: of_device.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_state)
    monkeypatch.setattr(torch.cuda, "manual_seed", of_device.manual_seed)

    def draw() -> list[float]:
        values = [random.random(), float(np.random.rand())]  # noqa: NPY002
        return [*values, torch.rand(()).item(), torch.rand((), generator=of_device).item()]

    rng.seed(7, cuda)
    with rng.fork(cuda):
        inside = draw()
    assert draw() == inside
    assert draw() != inside
    rng.seed(7, cuda)
    assert draw() == inside
    assert calls == [cuda]
