"""Models whose graphs are captured as CUDA graphs: the next run overwrites the outputs of this one.

Losses, ascent gradients and statistics that outlive a run are cloned (`WholeBatch.keep`), gradients here.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def own_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Around a backward: copy the `.grad`s that it creates. Autograd keeps the tensors that it receives, so the next
    micro-batch would add to memory that its own backward has overwritten, without any error."""
    new = [p for p in parameters if p.grad is None]
    yield
    for p in new:
        p.grad = None if p.grad is None else p.grad.clone()
