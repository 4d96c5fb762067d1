"""The step-size rule of Auto-PGD (Croce & Hein 2020, section 3), for the input-space and the weight-space ascent."""

import torch
from torch import Tensor


def checkpoints(n_iter: int) -> dict[int, int]:
    """{0-based iteration at whose end the step size is judged: iterations since the last judgement}.

    Intervals are 0.22 n, then shorter by 0.03 n each, at least 0.06 n, in whole iterations rounded down, at
    least 1: the released AutoAttack (the paper writes them as fractions of n).
    """
    length, shortest, shrink = (max(int(f * n_iter), 1) for f in (0.22, 0.06, 0.03))
    ends: dict[int, int] = {}
    end = -1
    while end + length < n_iter:
        end += length
        ends[end] = length
        length = max(length - shrink, shortest)
    return ends


class StepSize:
    """One step size per problem (an image, or a batch whose loss the weights maximise), halved at
    checkpoints.

    Halved if at most (``strict``: fewer than) ``rho`` of the interval's steps were improvements, or if the
    best loss has not moved over an interval at whose start the step size was kept. The caller then goes on
    from its best point. What counts as an improvement is the caller's: Auto-PGD compares with the iterate
    before.
    """

    def __init__(self, initial: Tensor, best: Tensor, checks: dict[int, int], rho: float = 0.75, strict: bool = False):
        self.size = initial.clone()  # [B]
        self.checks, self.rho, self.strict = checks, rho, strict
        self.count = torch.zeros_like(initial)
        self.best_at_check = best.clone()  # [B], the best losses so far
        self.halved = torch.ones_like(initial, dtype=torch.bool)

    def update(self, iteration: int, improved: Tensor, best: Tensor) -> Tensor | None:
        """After an iteration: [B] bool, which problems halved their step; None between checkpoints."""
        self.count += improved
        length = self.checks.get(iteration)
        if length is None:
            return None
        few = self.count < self.rho * length if self.strict else self.count <= self.rho * length
        stuck = ~self.halved & (self.best_at_check >= best)
        self.halved = few | stuck
        self.size = torch.where(self.halved, self.size / 2, self.size)
        self.best_at_check = best.clone()
        self.count = torch.zeros_like(self.count)
        return self.halved

    def keep(self, mask: Tensor) -> None:
        """Drop the problems outside ``mask`` [B] bool."""
        self.size, self.count = self.size[mask], self.count[mask]
        self.best_at_check, self.halved = self.best_at_check[mask], self.halved[mask]
