"""Models whose graphs are captured as CUDA graphs: the next run overwrites the outputs of this one.

Losses, ascent gradients and statistics that outlive a run are copied by `WholeBatch.graph_safe`, gradients here.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def own_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Around a run of the graphs, forward and backward: copy the `.grad`s that it creates. Autograd keeps the tensors
    that it receives, so the next micro-batch would add to memory that its own backward has overwritten, without any
    error."""
    torch.compiler.cudagraph_mark_step_begin()
    new = [p for p in parameters if p.grad is None]
    yield
    for p in new:
        p.grad = None if p.grad is None else p.grad.clone()
