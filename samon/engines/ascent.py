"""Sources of the ascent direction (`ascent=`), one class per paper.

g is the gradient at w and h the one at w + eps, both with respect to the perturbed parameters. What one update hands to
the next is computed when the optimizer steps: from h as it is applied (averaged over micro-batches and processes,
unscaled; clipped but for AE-SAM) and from the mean of g over the same samples. So it is the same on all processes, and
a checkpoint of one process serves all.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from samon.ascent import AscentSource, BaseState, Grads, Tensors
from samon.errors import UserError
from samon.geometry import global_norm, to_float32
from samon.scope import NamedParameters

SOURCES = {
    "batch": "this batch's gradient at w",
    "previous": "the last update's gradient: no ascent pass",
    "msam": "against the base optimizer's momentum: no ascent pass",
    "fsam": "this batch's gradient minus its running mean",
    "looksam:k": "this batch's gradient at every k-th update; in between, a part of the last one is reused at w",
    "aesam": "this batch's gradient if the gradient norm is large; otherwise a plain step",
}


class PreviousGradient(AscentSource):
    """Direction h of the last update. The first update is a plain step."""

    name = former_name = "previous"
    single_pass = uses_final_gradient = has_state = True

    def direction(self, named: NamedParameters, grads: Grads | None, base_state: BaseState) -> Grads | None:
        return _stored(self.state, named)

    def before_step(self, named: NamedParameters, base_state: BaseState) -> None:
        self.state = _by_name(named, [h.clone() for h in final_gradients(named)])


class MSAM(AscentSource):
    """Direction -v with the base optimizer's momentum v: MSAM (Becker et al. 2024, Algorithm 1).

    v sums gradients and the step goes along -v, so the perturbation lies ahead on the path. For a base without
    momentum, v <- 0.9 v + h is kept here. Without a momentum yet, the update is a plain step.
    """

    name, former_name = "msam", "momentum"
    single_pass = uses_final_gradient = has_state = True
    decay = 0.9

    def direction(self, named: NamedParameters, grads: Grads | None, base_state: BaseState) -> Grads | None:
        momenta = base_momenta(named.values(), base_state) or _stored(self.state, named)
        return None if momenta is None else list(torch._foreach_neg(momenta))

    def before_step(self, named: NamedParameters, base_state: BaseState) -> None:
        if base_momenta(named.values(), base_state) is not None:
            self.state = {}
            return
        before, final = _stored(self.state, named), final_gradients(named)
        new = [h.clone() for h in final] if before is None else _mix(self.decay, before, 1.0, final)
        self.state = _by_name(named, new)


class FriendlySAM(AscentSource):
    """Direction d = g - sigma m, m <- lambda m + (1 - lambda) g: F-SAM (Li et al. 2024), sigma = 1, lambda = 0.9.

    m is the mean before this batch; with the mean after it, d is shorter by lambda and has the same direction.
    """

    name, former_name = "fsam", "friendly"
    needs_clean_grad = has_state = counts_updates = True
    sigma, decay = 1.0, 0.9

    def direction(self, named: NamedParameters, grads: Grads | None, base_state: BaseState) -> Grads | None:
        mean = _stored(self.state, named)
        if mean is None or grads is None:
            return grads
        dense = [m.new_zeros(()) if g is None else to_float32(g) for m, g in zip(mean, grads, strict=True)]
        return [g - self.sigma * m for g, m in zip(dense, mean, strict=True)]

    def before_step(self, named: NamedParameters, base_state: BaseState) -> None:
        if self.clean:
            before = _stored(self.state, named)
            new = self.clean if before is None else _mix(self.decay, before, 1 - self.decay, self.clean)
            self.state = _by_name(named, new)


class LookSAM(AscentSource):
    """LookSAM (Liu et al. 2022, Algorithm 1), for the perturbed parameters, alpha = 0.7.

    Every k-th update is SAM and keeps h_v = h - (h.g / g.g) g. In between, h + alpha ||h|| h_v / ||h_v|| is applied,
    with h taken at w.
    """

    needs_clean_grad = uses_final_gradient = has_state = counts_updates = True
    alpha = 0.7

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.name, self.former_name = k, f"looksam:{k}", f"every:{k}"

    def needs_ascent_pass(self) -> bool:
        return self.updates % self.k == 0

    def before_clipping(self, named: NamedParameters) -> None:
        before = _stored(self.state, named)
        if self.used and not self.clean and before is not None:
            scale = self.alpha * global_norm(final_gradients(named)) * _inverse(global_norm(before))
            _add_to_gradients(named, [scale * v for v in before])

    def before_step(self, named: NamedParameters, base_state: BaseState) -> None:
        if self.clean:
            self.state = _by_name(named, orthogonal_part(final_gradients(named), self.clean))


class AESAM(AscentSource):
    """SAM if n >= mu + c sigma, otherwise a plain step: AE-SAM (Jiang et al. 2023).

    n is ||h||^2 of the last update, mu and sigma^2 its running mean and variance (delta = 0.9); c falls from 1 to -1
    over `total` updates (0 if unknown). In the paper n is this batch's own, which costs the pass that it would save.
    """

    name, former_name = "aesam", "adaptive"
    uses_final_gradient = has_state = counts_updates = True
    delta, lambda_1, lambda_2 = 0.9, -1.0, 1.0

    def needs_ascent_pass(self) -> bool:
        """Reads a number on the host."""
        if not self.moments:
            return True
        size, mean, variance = self.moments
        progress = 0.5 if self.total is None else min(1.0, self.updates / self.total)
        c = progress * self.lambda_1 + (1 - progress) * self.lambda_2
        return bool(size >= mean + c * variance.sqrt())

    def before_clipping(self, named: NamedParameters) -> None:
        size = global_norm(final_gradients(named)).square()
        self.next_moments = [size, size, torch.zeros_like(size)]
        if self.moments:
            _, mean, variance = self.moments
            mean = self.delta * mean + (1 - self.delta) * size
            self.next_moments = [size, mean, self.delta * variance + (1 - self.delta) * (size - mean).square()]

    def before_step(self, named: NamedParameters, base_state: BaseState) -> None:
        if self.used:
            self.moments = self.next_moments


class GSAM(AscentSource):
    """h - alpha (g - (g.h / h.h) h) is applied: GSAM (Zhuang et al. 2022, Algorithm 1), on the perturbed parameters."""

    needs_clean_grad = uses_final_gradient = True
    alpha = 0.0

    def before_clipping(self, named: NamedParameters) -> None:
        if self.clean:
            parts = orthogonal_part(self.clean, final_gradients(named))
            _add_to_gradients(named, [-self.alpha * v for v in parts])


class FriendlyGSAM(GSAM, FriendlySAM):
    """The direction of F-SAM, and the gradient of GSAM."""


class ESAM(AscentSource):
    """Each update perturbs every tensor with probability beta and divides the perturbation by it: the stochastic weight
    perturbation of ESAM (Du et al. 2022, Eq. 6).

    The sample depends only on the number of the update, so it is the same on all processes and after a restart.
    """

    counts_updates = True

    def __init__(self, beta: float) -> None:
        if not 0 < beta < 1:
            raise UserError(f"esam_beta must be in (0, 1], got {beta}; 1 perturbs every tensor")
        super().__init__()
        self.keep_probability = beta

    def sample(self, named: NamedParameters) -> NamedParameters:
        samples = torch.rand(len(named), generator=torch.Generator().manual_seed(self.updates)).tolist()
        limit = max(self.keep_probability, min(samples, default=0) + 1e-12)  # at least one tensor
        return {name: p for (name, p), sample in zip(named.items(), samples, strict=True) if sample < limit}


def make_ascent(source: str = "batch", gsam_alpha: float = 0.0, esam_beta: float = 1.0) -> AscentSource:
    """The ascent source of this name, today's or a former one (`momentum`, `friendly`, `every:k`, `adaptive`).

    Raises:
        UserError: an unknown source, a constant out of range, or a combination that no method has.
    """
    if esam_beta != 1:
        if source != "batch" or gsam_alpha:
            raise UserError("esam_beta samples other tensors at every update and combines only with ascent='batch'")
        return ESAM(esam_beta)
    classes = (AscentSource, PreviousGradient, MSAM, FriendlySAM, AESAM)
    ascent = next((cls() for cls in classes if source in (cls.name, cls.former_name)), None)
    if match := re.fullmatch(r"(?:looksam|every):([1-9]\d*)", str(source)):
        ascent = LookSAM(int(match[1]))
    if ascent is None:
        raise UserError(f"ascent must be one of {', '.join(SOURCES)} (k a number), got {source!r}")
    if not gsam_alpha:
        return ascent
    if type(ascent) not in (AscentSource, FriendlySAM):
        raise UserError(
            f"gsam_alpha needs the gradient at w of every update, which ascent={ascent.name!r} does not take"
        )
    gsam = GSAM() if type(ascent) is AscentSource else FriendlyGSAM()
    gsam.alpha = gsam_alpha
    return gsam


def base_momenta(parameters: Iterable[Parameter], base_state: BaseState) -> Tensors | None:
    """The base optimizer's momentum (sum or mean of gradients) of each parameter, zero if it has none yet; None if it
    has none at all."""
    momenta: list[Tensor | None] = []
    for p in (parameters := list(parameters)):
        own = base_state.get(p, {})
        momenta.append(next((own[key] for key in ("momentum_buffer", "exp_avg") if own.get(key) is not None), None))
    if all(v is None for v in momenta):
        return None
    return [to_float32(torch.zeros_like(p) if v is None else v) for p, v in zip(parameters, momenta, strict=True)]


def final_gradients(named: NamedParameters) -> Tensors:
    """h as it is applied, zero for parameters without a gradient."""
    return [to_float32(torch.zeros_like(p) if p.grad is None else p.grad) for p in named.values()]


def orthogonal_part(x: Tensors, y: Tensors) -> Tensors:
    """The part of x orthogonal to y, both as one real vector: x - (x.y / y.y) y."""
    product = torch.stack([(a.conj() * b).real.sum() for a, b in zip(x, y, strict=True)]).sum()
    share = product * _inverse(global_norm(y).square())
    return [a - share * b for a, b in zip(x, y, strict=True)]


def _stored(state: Mapping[str, Tensor], named: NamedParameters) -> Tensors | None:
    """The state of these parameters, zero for new ones; None if there is no state yet."""
    if not state:
        return None
    return [state[n] if n in state else torch.zeros_like(to_float32(p.detach())) for n, p in named.items()]


def _by_name(named: NamedParameters, tensors: Tensors) -> dict[str, Tensor]:
    return dict(zip(named, tensors, strict=True))


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0: what is divided by a zero length is zero as well."""
    return torch.where(x > 0, 1 / x, 0)


def _mix(a: float, x: Tensors, b: float, y: Tensors) -> Tensors:
    return [a * u + b * v for u, v in zip(x, y, strict=True)]


def _add_to_gradients(named: NamedParameters, changes: Tensors) -> None:
    for p, change in zip(named.values(), changes, strict=True):
        if p.grad is not None:
            change = change.to(p.grad.dtype)
            p.grad += change.to_sparse(p.grad.sparse_dim()) if p.grad.is_sparse else change
