"""The random generators of this process: Python, NumPy (global: timm draws from it), torch on CPU and device."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

CPU = torch.device("cpu")


def take(device: torch.device = CPU) -> dict[str, Any]:
    """The state of all generators, tensors and plain types only, so that `weights_only=True` reads it."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        **take_torch(device),
    }


def put(state: Mapping[str, Any], device: torch.device = CPU) -> None:
    """Set all generators to a state of `take`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    put_torch(state, device)


def put_torch(state: Mapping[str, Any], device: torch.device = CPU) -> None:
    """Set torch's generators alone, which dropout and stochastic depth draw from."""
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)


def take_torch(device: torch.device = CPU) -> dict[str, Any]:
    """The state of torch's generators, for `put_torch`."""
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def seed(value: int, device: torch.device = CPU) -> None:
    """Seed all generators."""
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(value % 2**63)
    if device.type == "cuda":
        torch.cuda.manual_seed(value % 2**63)


@contextmanager
def kept(device: torch.device = CPU) -> Iterator[None]:
    """All generators are afterwards as they were before."""
    state = take(device)
    try:
        yield
    finally:
        put(state, device)
