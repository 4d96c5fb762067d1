"""The random state of this process: Python, NumPy (global: timm draws from it), torch on CPU and device."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

CPU = torch.device("cpu")
State = dict[str, Any]  # tensors and plain types only, so that `weights_only=True` can load it


def get_state(device: torch.device = CPU) -> State:
    """The state of all generators."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    numpy = [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]
    return {"python": random.getstate(), "numpy": numpy, **get_torch_state(device)}


def set_state(state: State, device: torch.device = CPU) -> None:
    """Set all generators to a state from `get_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    set_torch_state(state, device)


def set_torch_state(state: State, device: torch.device = CPU) -> None:
    """Set only torch's generators, which dropout and stochastic depth draw from."""
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], *_arguments(device))


def get_torch_state(device: torch.device = CPU) -> State:
    """The state of torch's generators, for `set_torch_state`."""
    get_own = getattr(getattr(torch, device.type, None), "get_rng_state", None)  # that of torch.cuda, mps or xpu
    return {"torch": torch.get_rng_state(), "device": get_own and get_own(*_arguments(device))}


def _arguments(device: torch.device) -> tuple[torch.device, ...]:
    """What names a device in a call of its module: nothing for torch.mps, which has one."""
    return () if device.type == "mps" else (device,)


def seed(value: int, device: torch.device = CPU) -> None:
    """Seed all generators."""
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(value % 2**63)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(value % 2**63)


@contextmanager
def fork(device: torch.device = CPU) -> Iterator[None]:
    """Restore all generators at the end."""
    state = get_state(device)
    try:
        yield
    finally:
        set_state(state, device)
