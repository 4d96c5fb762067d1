"""BatchNorm running statistics during a two-pass step: a pass that is not to update them leaves no trace."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BN_STATS = ("first", "second", "both")  # which of the two passes updates the running statistics


def running_statistics(model: nn.Module, skip: Sequence[nn.Module] = ()) -> list[Tensor]:
    """The buffers that a forward pass of `model` in its present mode would update: running mean and variance
    [C] and the batch counter [] of every training BatchNorm-like module, those in `skip` left out."""
    skipped = {id(m) for m in skip}
    return [
        buffer
        for module in model.modules()
        if module.training and id(module) not in skipped and getattr(module, "track_running_stats", False)
        for name in ("running_mean", "running_var", "num_batches_tracked")
        if isinstance(buffer := getattr(module, name, None), Tensor)
    ]


@contextmanager
def kept(buffers: Sequence[Tensor], unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """The buffers' values are put back at the end, also after an exception, unless `unless()` says no then.

    Values are copied, not momenta changed: it holds for every norm class, compiled or not. The copy back is an
    in-place write, so whatever was run inside must have been back-propagated inside as well.
    """
    saved = [b.clone() for b in buffers]
    try:
        yield
    finally:
        if saved and not unless():
            with torch.no_grad():
                torch._foreach_copy_(list(buffers), saved)
