"""Where the direction of the perturbation comes from (`ascent=`), and what is made of the gradient at w + eps.

Below, g is the gradient at w and h the one at w + eps, both with respect to the perturbed parameters. What one update
hands to the next is taken when the optimizer steps: from h as it is applied (mean over micro-batches and processes,
unscaled, clipped) and from the mean of g over the same samples. So it is the same on all processes, and a checkpoint
of one of them serves all.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from samon.errors import UserError
from samon.geometry import global_norm, wide

SOURCES = {
    "batch": "this batch's gradient at w",
    "previous": "the last update's gradient: no ascent pass",
    "momentum": "against the base optimizer's momentum: no ascent pass",
    "friendly": "this batch's gradient minus its running mean",
    "every:k": "this batch's gradient at each k-th update; between, a part of the last one's is reused at w",
    "adaptive": "this batch's gradient where the gradient norm is large; a plain step elsewhere",
}
FRIENDLY_SIGMA, FRIENDLY_LAMBDA = 1.0, 0.9
LOOK_ALPHA = 0.7
ADAPTIVE_DELTA, ADAPTIVE_LAMBDA_1, ADAPTIVE_LAMBDA_2 = 0.9, -1.0, 1.0
MOMENTUM = 0.9  # of the running sum where the base optimizer keeps none

Named = Mapping[str, Parameter]
Tensors = list[Tensor]


class Ascent:
    """The source of the direction and what it keeps from update to update.

    `batch`      d = g: SAM (Eq. 3).
    `previous`   d = h of the last update.
    `momentum`   d = -v with the base optimizer's momentum v: MSAM (Becker et al. 2024, Algorithm 1). v sums gradients
                 and the step goes along -v, so the perturbation lies ahead on the path. Where the base keeps no
                 momentum, v <- 0.9 v + h is kept here.
    `friendly`   d = g - sigma m, m <- lambda m + (1 - lambda) g, sigma = 1, lambda = 0.9: F-SAM (Li et al. 2024), with
                 m before this batch; with m after it d is shorter by lambda and points the same way.
    `every:k`    each k-th update is SAM and keeps h_v = h - (h.g / g.g) g; between, g + alpha ||g|| h_v / ||h_v|| is
                 applied, alpha = 0.7: LookSAM (Liu et al. 2022, Algorithm 1), for the perturbed parameters.
    `adaptive`   SAM where n >= mu + c sigma, a plain step elsewhere; n is ||h||^2 of the last update, mu and sigma^2
                 its running mean and variance (delta = 0.9), c falls from 1 to -1 over `total` updates (0 without):
                 AE-SAM (Jiang et al. 2023). There n is this batch's own, which costs the pass that is to be saved.
    `gsam_alpha` h - alpha (g - (g.h / h.h) h) is applied: GSAM (Zhuang et al. 2022, Algorithm 1), for the perturbed
                 parameters.

    Where nothing is kept yet, `previous` and `momentum` make a plain step.

    Attributes:
        notes: whether g is needed when the optimizer steps.
        passless: whether no update makes an ascent pass.
        counts: whether what comes next depends on how many updates were applied.
        keeps: whether tensors are handed from update to update.

    Raises:
        UserError: an unknown source, or gsam_alpha where there is not an ascent pass at every update.
    """

    def __init__(self, source: str = "batch", gsam_alpha: float = 0.0) -> None:
        found = re.fullmatch(r"(batch|previous|momentum|friendly|adaptive)|every:([1-9]\d*)", str(source))
        if found is None:
            raise UserError(f"ascent must be one of {', '.join(SOURCES)} (k a number), got {source!r}")
        self.source, self.kind, self.k = str(source), found[1] or "every", int(found[2] or 1)
        self.gsam_alpha = gsam_alpha
        self.notes = self.kind in ("friendly", "every") or gsam_alpha > 0
        self.passless = self.kind in ("previous", "momentum")
        self.counts = self.kind in ("friendly", "every", "adaptive")
        self.keeps = self.kind != "batch"
        if gsam_alpha and self.kind not in ("batch", "friendly"):
            raise UserError(
                f"gsam_alpha needs the gradient at w of every update, which ascent={source!r} does not take"
            )
        self.updates = 0  # two-pass updates that were applied
        self.total: int | None = None  # updates of the whole training, where that is known
        self.kept: dict[str, Tensor] = {}
        self.moments: Tensors = []  # of `adaptive`: n, mu, sigma^2, each []
        self.clean: Tensors = []  # g of the update under way
        self.used = False  # whether the update under way asked for a direction

    # -- within an update --------------------------------------------------------------------------------------------
    def climbs(self) -> bool:
        """Whether this update makes an ascent pass. `adaptive` reads a number on the host here."""
        if self.kind == "every":
            return self.updates % self.k == 0
        if self.kind != "adaptive" or not self.moments:
            return not self.passless
        size, mean, variance = self.moments
        done = 0.5 if self.total is None else min(1.0, self.updates / self.total)
        c = done * ADAPTIVE_LAMBDA_1 + (1 - done) * ADAPTIVE_LAMBDA_2
        return bool(size >= mean + c * variance.sqrt())

    def stored(self, named: Named, state: Mapping[Parameter, Any]) -> Tensors | None:
        """The direction of an update without ascent pass; None for one that is made at w."""
        if self.kind == "momentum":
            buffers = momenta(named.values(), state) or self._of(named)
            return None if buffers is None else list(torch._foreach_neg(buffers))
        return self._of(named) if self.kind == "previous" else None

    def direction(self, named: Named, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The direction from this batch's gradients at w, shaped as they are (groups included)."""
        mean = self._of(named) if self.kind == "friendly" else None
        if mean is None:
            return list(grads)
        zeros = [m.new_zeros(()) if g is None else wide(g) for m, g in zip(mean, grads, strict=True)]
        return [g - FRIENDLY_SIGMA * m for g, m in zip(zeros, mean, strict=True)]

    @torch.no_grad()
    def note(self, named: Named, grads: Sequence[Tensor | None], weight: float = 1.0) -> None:
        """Add a micro-batch's g, which counts for `weight` in the update's mean."""
        if self.notes:
            pairs = zip(named.values(), grads, strict=True)
            parts = [wide(torch.zeros_like(p)) if g is None else weight * wide(g) for p, g in pairs]
            self.clean = [a + b for a, b in zip(self.clean, parts, strict=True)] if self.clean else parts

    # -- at the end of it --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def update(self, parameters: Callable[[], Named], state: Mapping[Parameter, Any]) -> None:
        """Before the base step: change `.grad` where the source says so, and keep what the next update needs."""
        used, clean, self.used, self.clean = self.used, self.clean, False, []
        if self.kind == "batch" and not self.gsam_alpha:
            self.updates += used
            return
        named = parameters()
        final = [wide(torch.zeros_like(p) if p.grad is None else p.grad) for p in named.values()]
        if clean and dist.is_available() and dist.is_initialized():
            clean = all_reduce_mean(clean)
        before, new = self._of(named), None
        if self.kind == "previous":
            new = [h.clone() for h in final]
        elif self.kind == "momentum" and momenta(named.values(), state) is not None:
            self.kept = {}
        elif self.kind == "momentum":
            new = [h.clone() for h in final] if before is None else _mix(MOMENTUM, before, 1.0, final)
        elif self.kind == "friendly" and clean:
            new = clean if before is None else _mix(FRIENDLY_LAMBDA, before, 1 - FRIENDLY_LAMBDA, clean)
        elif self.kind == "every" and clean:
            new = orthogonal(final, clean)
        elif self.kind == "every" and used and before is not None:
            size = LOOK_ALPHA * global_norm(final) * _inverse(global_norm(before))
            _add(named, [size * v for v in before])
        elif self.kind == "adaptive" and used:
            self._observe(global_norm(final).square())
        if new is not None:
            self.kept = dict(zip(named, new, strict=True))
        if self.gsam_alpha and clean:
            _add(named, [-self.gsam_alpha * v for v in orthogonal(clean, final)])
        self.updates += used

    def _observe(self, size: Tensor) -> None:
        if not self.moments:
            self.moments = [size, size, torch.zeros_like(size)]
            return
        _, mean, variance = self.moments
        mean = ADAPTIVE_DELTA * mean + (1 - ADAPTIVE_DELTA) * size
        self.moments = [size, mean, ADAPTIVE_DELTA * variance + (1 - ADAPTIVE_DELTA) * (size - mean).square()]

    def _of(self, named: Named) -> Tensors | None:
        """What is kept of these parameters, zero for those that were not there; None before anything is."""
        if not self.kept:
            return None
        return [self.kept[n] if n in self.kept else torch.zeros_like(wide(p.detach())) for n, p in named.items()]

    # -- checkpoints -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"source": self.source, "updates": self.updates, "kept": dict(self.kept), "moments": list(self.moments)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """A state of the same source; another one's is left aside."""
        if state["source"] == self.source:
            self.updates = state["updates"]
            self.kept = {name: tensor.to(device) for name, tensor in state["kept"].items()}
            self.moments = [tensor.to(device) for tensor in state["moments"]]


def momenta(parameters: Iterable[Parameter], state: Mapping[Parameter, Any]) -> Tensors | None:
    """The base optimizer's momentum (its sum or mean of gradients) of each parameter, zero where it has none yet; None
    where it has none at all."""
    found: list[Tensor | None] = []
    for p in (parameters := list(parameters)):
        own = state.get(p, {})
        found.append(next((own[key] for key in ("momentum_buffer", "exp_avg") if own.get(key) is not None), None))
    if all(v is None for v in found):
        return None
    return [wide(torch.zeros_like(p) if v is None else v) for p, v in zip(parameters, found, strict=True)]


def orthogonal(x: Tensors, y: Tensors) -> Tensors:
    """The part of x orthogonal to y, both as one real vector: x - (x.y / y.y) y."""
    product = torch.stack([(a.conj() * b).real.sum() for a, b in zip(x, y, strict=True)]).sum()
    share = product * _inverse(global_norm(y).square())
    return [a - share * b for a, b in zip(x, y, strict=True)]


def all_reduce_mean(tensors: Tensors, group: dist.ProcessGroup | None = None) -> Tensors:
    """The tensors averaged over the processes, in one message."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0: what is divided by a zero length is zero as well."""
    return torch.where(x > 0, 1 / x, 0)


def _mix(a: float, x: Tensors, b: float, y: Tensors) -> Tensors:
    return [a * u + b * v for u, v in zip(x, y, strict=True)]


def _add(named: Named, changes: Tensors) -> None:
    for p, change in zip(named.values(), changes, strict=True):
        if p.grad is not None:
            change = change.to(p.grad.dtype)
            p.grad += change.to_sparse(p.grad.sparse_dim()) if p.grad.is_sparse else change
