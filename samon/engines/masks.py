"""Sparse perturbations that the paper compares SAM-ON with (section 5.1, Tables 5 and 12).

A mask keeps the fraction 1 - sparsity of all perturbed entries, exactly, counted over all tensors together. `random`
samples it once; `fisher` (SSAM-F) keeps the entries with the largest diagonal of the empirical Fisher; `dynamic`
(SSAM-D) starts at random and at each renewal replaces a fraction of its entries, those with the smallest gradients, by
random others; the fraction falls from 1/2 to 0 by a cosine (Mi et al. 2022, Algorithms 1 and 2).

In train.py masks are renewed every `--mask-epochs`, SSAM-F from `--fisher-samples` images. In other loops both are
renewed every `every` steps, SSAM-F from that step's squared gradient, SSAM-D with the fraction 1/2. Gradients are
averaged over the processes, so all of them have the same mask and a checkpoint of one process serves all.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from samon.errors import UserError
from samon.geometry import FlatTensors, to_float32
from samon.sam import SAM

KINDS = ("random", "fisher", "dynamic")
REPLACED = 0.5  # fraction of the kept entries that SSAM-D replaces at its first renewal


class Mask:
    """A binary mask over a list of tensors of fixed shapes.

    Raises:
        UserError: `sparsity` is not in [0, 1).
    """

    def __init__(self, kind: str, sparsity: float, every: int = 100, seed: int = 0):
        assert kind in KINDS, kind
        if not 0 <= sparsity < 1:
            raise UserError(f"sparsity must be in [0, 1), got {sparsity}; 0.5 keeps half of the entries")
        self.kind, self.sparsity, self.every, self.seed = kind, sparsity, every, seed
        self.step, self.rate = 0, REPLACED
        self.epoch, self.due = -1, False  # epoch of the last `begin_epoch`, and whether it requested a renewal
        self.masks: list[Tensor] = []
        self.upcoming: list[Tensor] = []  # masks of the current update, which may be skipped
        self.stale = False  # the next call belongs to another update

    def begin_epoch(self, epoch: int, epochs: int, every: int) -> bool:
        """From the first call on, epochs renew the mask: SSAM-D with the next gradient, SSAM-F by `renew_fisher`.

        Returns:
            Whether `renew_fisher` is due: at each `every`-th epoch, once.
        """
        if self.kind == "random" or epoch == self.epoch:
            return False
        self.every, self.epoch, due = 0, epoch, epoch % every == 0
        self.rate = REPLACED * (1 + math.cos(math.pi * epoch / epochs)) / 2
        self.due = due and self.kind == "dynamic"
        return due and self.kind == "fisher"

    def renew_fisher(self, diagonal: Sequence[Tensor]) -> None:
        """Keep the entries with the largest diagonal of the Fisher, shaped like the parameters, of all processes."""
        self.masks = self._renewed(diagonal, "fisher", summed=True)

    def __call__(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients with the dropped entries zeroed. Renews the mask first if it is due, once per update."""
        shapes = [g.shape for g in grads]
        if self.stale or [m.shape for m in self.upcoming] != shapes:
            self.upcoming, self.stale = self.masks, False
            if [m.shape for m in self.masks] != shapes:  # none yet, or other parameters are perturbed now
                self.upcoming = self._renewed(grads, "fisher" if self.kind == "fisher" else "random")
            elif self.kind != "random" and self.every and self.step % self.every == 0:
                self.upcoming = self._renewed(grads, self.kind)
            if self.due:
                self.upcoming = self._renewed(grads, self.kind)
        return [g * m for g, m in zip(grads, self.upcoming, strict=True)]

    def advance(self) -> None:
        """Keep the mask of an update that is applied. The mask of a skipped one, whose gradient was not finite, is
        never used again."""
        if self.upcoming:
            self.masks, self.upcoming, self.due = self.upcoming, [], False
            self.step += 1

    def _renewed(self, grads: Sequence[Tensor], kind: str, summed: bool = False) -> list[Tensor]:
        flat = torch.cat([g.flatten() for g in grads])
        keep = max(1, round((1 - self.sparsity) * flat.numel()))
        if kind != "random" and not summed and dist.is_initialized():
            dist.all_reduce(flat)
        size = self._random(flat) if kind == "random" else flat.abs()
        if kind == "dynamic":
            old = torch.cat([m.flatten() for m in self.upcoming])
            replaced = min(round(self.rate * keep), flat.numel() - keep)  # no more than there are others
            stay = _largest(size.masked_fill(~old, -1), keep - replaced)
            mask = stay | _largest(self._random(flat).masked_fill(old, -1), replaced)
        else:
            mask = _largest(size, keep)
        return list(FlatTensors(mask, grads))

    def _random(self, like: Tensor) -> Tensor:
        # On the CPU and from the step number: the same on every device, process and after a resume.
        generator = torch.Generator().manual_seed(self.seed + self.step)
        return torch.rand(like.numel(), generator=generator, dtype=torch.float32).to(like.device)

    def state_dict(self) -> dict[str, Any]:
        names = ("step", "epoch", "due", "rate", "every", "kind", "sparsity")
        return {name: getattr(self, name) for name in names} | {"masks": list(self.masks)}

    def load_state_dict(self, state: dict[str, Any], like: Sequence[Tensor]) -> None:
        """Load a state, also one from before masks knew epochs. One of another kind or sparsity, or for tensors other
        than `like`, is ignored: a new mask is made."""
        same = (state.get("kind", self.kind), state.get("sparsity", self.sparsity)) == (self.kind, self.sparsity)
        if same and [m.shape for m in state["masks"]] in ([], [t.shape for t in like]):
            self.masks = [m.to(t.device) for m, t in zip(state["masks"], like)]  # noqa: B905 empty before the first step
            vars(self).update({name: value for name, value in state.items() if name != "masks"})


def _largest(scores: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` largest scores, shape [N]."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.topk(count).indices] = True
    return mask


def fisher_diagonal(sam: SAM, losses: Iterable[Callable[[], Tensor]]) -> list[Tensor]:
    """The diagonal of the empirical Fisher matrix: the sum over samples, of all processes, of the squared gradient of
    each one's loss, shaped like the perturbed parameters."""
    with sam.sampled_parameters() as named:
        total = [to_float32(torch.zeros_like(p)) for p in named.values()]
        for loss in losses:
            grads = torch.autograd.grad(loss(), [*named.values()], allow_unused=True, materialize_grads=True)
            total = [t + to_float32(g).abs().square() for t, g in zip(total, grads, strict=True)]
    if dist.is_initialized():
        for part in total:
            dist.all_reduce(part)
    return total
