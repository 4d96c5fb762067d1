"""A model whose graphs are captured as CUDA graphs: their outputs lie in memory that the next run writes again.

So every pass says that a run begins, and what is needed behind it (losses, ascent gradients, statistics of the groups,
`.grad`) is copied out. Without `captured` nothing is done.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def begin(captured: bool) -> None:
    """A run begins: outputs of earlier ones may be overwritten from here on."""
    if captured:
        torch.compiler.cudagraph_mark_step_begin()


def owned(captured: bool, tensor: Tensor) -> Tensor:
    """The tensor in memory of its own."""
    return tensor.clone() if captured else tensor


@contextmanager
def own_gradients(captured: bool, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Around a backward: the `.grad`s that it makes. Autograd keeps what a backward hands it instead of a copy, and
    the next micro-batch would add to memory that its own backward has overwritten, without any error."""
    new = [p for p in parameters if p.grad is None] if captured else []
    yield
    for p in new:
        p.grad = None if p.grad is None else owned(captured, p.grad)
