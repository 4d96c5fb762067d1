"""Sparse perturbations that the paper compares SAM-ON with (section 5.1, Tables 5 and 12).

A mask keeps the share 1 - sparsity of all perturbed entries, counted over all tensors together and exactly. `random`
draws it once; `fisher` (SSAM-F) keeps the entries with the largest diagonal of the empirical Fisher; `dynamic` (SSAM-D)
starts at random and at each renewal gives up a share of its entries, those with the smallest gradients, for random
others; the share falls by a cosine from a half to nothing (Mi et al. 2022, Algorithms 1 and 2).

In train.py masks are renewed every `--mask-epochs`, SSAM-F from `--fisher-samples` images. Without it nobody tells
epochs or holds the data: both are renewed every `every` steps, SSAM-F from that step's squared gradient, SSAM-D by a
half. Gradients are averaged over the processes, so all of them hold the same mask and a checkpoint of one serves all.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from samon.errors import UserError

KINDS = {
    "random": "a random mask, drawn once",
    "fisher": "a Fisher mask (SSAM-F)",
    "dynamic": "a dynamic mask (SSAM-D)",
}
EXCHANGED = 0.5  # share of the kept entries that SSAM-D gives up at its first renewal


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
        self.step, self.rate = 0, EXCHANGED
        self.epoch, self.due = -1, False  # as `begin_epoch` was told last, and whether it asked for a renewal
        self.masks: list[Tensor] = []
        self.upcoming: list[Tensor] = []  # of the update under way, which may be skipped
        self.stale = False  # whether the next call belongs to another update

    def begin_epoch(self, epoch: int, epochs: int, every: int) -> bool:
        """From the first call on, epochs renew the mask: SSAM-D with the next gradient, SSAM-F by `renew_fisher`.

        Returns:
            Whether `renew_fisher` is due: at each `every`-th epoch, once.
        """
        if self.kind == "random" or epoch == self.epoch:
            return False
        self.every, self.epoch, due = 0, epoch, epoch % every == 0
        self.rate = EXCHANGED * (1 + math.cos(math.pi * epoch / epochs)) / 2
        self.due = due and self.kind == "dynamic"
        return due and self.kind == "fisher"

    def renew_fisher(self, diagonal: Sequence[Tensor]) -> None:
        """Keep the entries with the largest diagonal of the Fisher, shaped like the parameters, of all processes."""
        self.masks = self._renewed(diagonal, "fisher", summed=True)

    def __call__(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients with the dropped entries zeroed; renews the mask first when it is due, once in an update."""
        shapes = [g.shape for g in grads]
        if self.stale or [m.shape for m in self.upcoming] != shapes:
            self.upcoming, self.stale = self.masks, False
            if [m.shape for m in self.masks] != shapes:  # none yet, or others are perturbed now
                self.upcoming = self._renewed(grads, "fisher" if self.kind == "fisher" else "random")
            elif self.kind != "random" and self.every and self.step % self.every == 0:
                self.upcoming = self._renewed(grads, self.kind)
            if self.due:
                self.upcoming = self._renewed(grads, self.kind)
        return [g * m for g, m in zip(grads, self.upcoming, strict=True)]

    def advance(self) -> None:
        """The update is applied: its mask stays. That of a skipped one, made from a gradient that is not finite, is
        never used again."""
        if self.upcoming:
            self.masks, self.upcoming, self.due = self.upcoming, [], False
            self.step += 1

    def _renewed(self, grads: Sequence[Tensor], kind: str, summed: bool = False) -> list[Tensor]:
        flat = torch.cat([g.flatten() for g in grads])
        keep = max(1, round((1 - self.sparsity) * flat.numel()))
        if kind != "random" and not summed and dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        size = self._random(flat) if kind == "random" else flat.abs()
        if kind == "dynamic":
            old = torch.cat([m.flatten() for m in self.upcoming])
            exchanged = min(round(self.rate * keep), flat.numel() - keep)  # there must be others to take
            stay = _largest(size.masked_fill(~old, -1), keep - exchanged)
            mask = stay | _largest(self._random(flat).masked_fill(old, -1), exchanged)
        else:
            mask = _largest(size, keep)
        return [m.view_as(g) for m, g in zip(mask.split([g.numel() for g in grads]), grads, strict=True)]

    def _random(self, like: Tensor) -> Tensor:
        # On the CPU and from the step number: the same on every device, process and after a resume.
        generator = torch.Generator().manual_seed(self.seed + self.step)
        return torch.rand(like.numel(), generator=generator, dtype=torch.float32).to(like.device)

    def state_dict(self) -> dict:
        names = ("step", "epoch", "due", "rate", "every", "kind", "sparsity")
        return {name: getattr(self, name) for name in names} | {"masks": list(self.masks)}

    def load_state_dict(self, state: dict, like: Sequence[Tensor]) -> None:
        """Also a state that was written before masks knew epochs. One of another kind or sparsity, or of other tensors
        than `like`, is left aside: a new mask is drawn.

        Args:
            like: the tensors that are masked.
        """
        ours = (state.get("kind", self.kind), state.get("sparsity", self.sparsity)) == (self.kind, self.sparsity)
        if ours and [m.shape for m in state["masks"]] in ([], [t.shape for t in like]):
            self.masks = [m.to(t.device) for m, t in zip(state["masks"], like)]  # noqa: B905 none before the first step
            vars(self).update({name: value for name, value in state.items() if name != "masks"})


def _largest(scores: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` largest scores, shape [N]."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.topk(count).indices] = True
    return mask
