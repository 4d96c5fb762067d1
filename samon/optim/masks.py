"""Sparse perturbations that the paper compares SAM-ON with (section 5.1, Tables 5 and 12).

A mask keeps the share 1 - sparsity of all perturbed entries, counted over all tensors together. `random` draws it
once; `fisher` (SSAM-F) keeps the entries with the largest squared batch gradient; `dynamic` (SSAM-D) starts at random
and at each renewal exchanges half of the kept entries, those with the smallest gradients, for random others.
Fisher and dynamic masks are renewed every `every` steps from that step's gradient, averaged over the processes, so all
of them hold the same mask and a checkpoint of one serves all.
"""

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
EXCHANGED = 0.5  # share of the kept entries that SSAM-D gives up at a renewal (its initial rate)


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
        self.step = 0
        self.masks: list[Tensor] = []

    def __call__(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients with the dropped entries zeroed; renews the mask first when it is due."""
        if not self.masks:
            self._renew(grads, "fisher" if self.kind == "fisher" else "random")
        elif self.kind != "random" and self.step % self.every == 0:
            self._renew(grads, self.kind)
        self.step += 1
        return [g * m for g, m in zip(grads, self.masks, strict=True)]

    def _renew(self, grads: Sequence[Tensor], kind: str) -> None:
        flat = torch.cat([g.flatten() for g in grads])
        keep = max(1, round((1 - self.sparsity) * flat.numel()))
        if kind == "random":
            mask = _largest(self._random(flat), keep)
        else:
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(flat)
            size = flat.abs()
            if kind == "fisher":
                mask = _largest(size, keep)
            else:
                old = torch.cat([m.flatten() for m in self.masks])
                stay = _largest(size.masked_fill(~old, -1), keep - round(EXCHANGED * keep))
                # New entries come from outside the old mask; where too few lie outside, old ones come back.
                chance = self._random(flat) + (~old).to(flat.dtype)
                mask = stay | _largest(chance.masked_fill(stay, -1), keep - int(stay.sum()))
        self.masks = [m.view_as(g) for m, g in zip(mask.split([g.numel() for g in grads]), grads, strict=True)]

    def _random(self, like: Tensor) -> Tensor:
        # On the CPU and from the step number: the same on every device, process and after a resume.
        generator = torch.Generator().manual_seed(self.seed + self.step)
        return torch.rand(like.numel(), generator=generator, dtype=torch.float32).to(like)

    def state_dict(self) -> dict:
        return {"step": self.step, "masks": list(self.masks)}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.step, self.masks = state["step"], [m.to(device) for m in state["masks"]]


def _largest(scores: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` largest scores, shape [N]."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.topk(count).indices] = True
    return mask
