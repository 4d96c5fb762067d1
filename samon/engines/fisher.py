"""The diagonal of the empirical Fisher matrix, by which SSAM-F chooses its entries (Mi et al. 2022, Algorithm 1)."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from samon.geometry import wide
from samon.sam import SAM


def fisher_diagonal(sam: SAM, losses: Iterable[Callable[[], Tensor]]) -> list[Tensor]:
    """The sum over samples of the squared gradient of each one's loss, shaped like the perturbed parameters; summed
    over the processes as well, each of which brings its own samples."""
    parameters = list(sam.perturbed_parameters().values())
    total = [wide(torch.zeros_like(p)) for p in parameters]
    for loss in losses:
        grads = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
        total = [t + wide(g).abs().square() for t, g in zip(total, grads, strict=True)]
    if dist.is_available() and dist.is_initialized():
        for part in total:
            dist.all_reduce(part)
    return total
