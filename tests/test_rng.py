"""The random state of a process; the device's generator is a stand-in, which the functions of its module reach."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from samon import rng


@pytest.mark.parametrize(("name", "arguments"), [("cuda:1", (torch.device("cuda", 1),)), ("mps:0", ())])
def test_every_generator_is_restored_the_devices_too(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: tuple[torch.device, ...]
) -> None:
    device, of_device = torch.device(name), torch.Generator()
    calls: list[tuple[torch.device, ...]] = []

    def get_state(*args: torch.device) -> Tensor:
        calls.append(args)
        return of_device.get_state()

    def set_state(state: Tensor, *args: torch.device) -> None:
        calls.append(args)
        of_device.set_state(state)

    module = torch.get_device_module(device)
    monkeypatch.setattr(module, "get_rng_state", get_state)
    monkeypatch.setattr(module, "set_rng_state", set_state)
    monkeypatch.setattr(module, "manual_seed", of_device.manual_seed)

    def draw() -> list[float]:
        values = [random.random(), float(np.random.rand())]  # noqa: NPY002
        return [*values, torch.rand(()).item(), torch.rand((), generator=of_device).item()]

    rng.seed(7, device)
    with rng.fork(device):
        inside = draw()
    assert draw() == inside
    assert draw() != inside
    rng.seed(7, device)
    assert draw() == inside
    assert calls == [arguments] * 2
