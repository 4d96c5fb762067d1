"""Naive loops in plain float64 PyTorch, against which everything fast is checked.

Written from the paper's formulas alone: no foreach kernels, no freezing, no sharing, nothing imported from samon.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GEOMETRIES = ("", "eleml2", "eleml2orig", "elemlinf", "layerl2", "fisher")
ETA = {"": 0.0, "eleml2": 0.0, "eleml2orig": 0.01, "elemlinf": 0.0, "layerl2": 0.0, "fisher": 1.0}
NORM_CLASSES = ("BatchNorm2d", "BatchNormAct2d", "LayerNorm", "LayerNorm2d", "GroupNorm", "RmsNorm", "RMSNorm")


def norm_names(model: nn.Module) -> set[str]:
    """Names of the affine parameters of normalization layers, by the class names a reader would list."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if type(module).__name__ in NORM_CLASSES
        for name, _ in module.named_parameters(recurse=False)
    }


def scope_names(model: nn.Module, scope: str) -> list[str]:
    norms = norm_names(model)
    return [name for name, _ in model.named_parameters() if scope == "sam" or (name in norms) == (scope == "samon")]


def scale(geometry: str, name: str, w: Tensor, g: Tensor, eta: float) -> Tensor:
    """T of Table 9, entry by entry."""
    if geometry == "":
        return torch.ones_like(w)
    if geometry in ("eleml2", "elemlinf"):
        return w.abs()
    if geometry == "eleml2orig":
        return w.abs() + eta if name.endswith("weight") else torch.ones_like(w)
    if geometry == "layerl2":
        return torch.full_like(w, math.sqrt(sum(x * x for x in w.flatten().tolist())))
    return 1 / torch.sqrt(1 + eta * g * g)


def perturbation(
    geometry: str, weights: dict[str, Tensor], grads: dict[str, Tensor], rho: float, radius: str | float = "ball"
) -> dict[str, Tensor]:
    """eps of Eq. 5, with rho replaced by the length that `radius` prescribes."""
    eta = ETA[geometry]
    if radius != "ball":
        ball = perturbation(geometry, weights, grads, 1.0)
        dual = sum(float((grads[n] * ball[n]).sum()) for n in ball)  # max of <g, eps> over the unit ball
        length = {"raw": rho * dual, "loss": rho / dual}.get(str(radius))
        length = rho * (float(radius) + (1 - float(radius)) * dual) if length is None else length
        return {n: length * e for n, e in ball.items()}
    t = {n: scale(geometry, n, weights[n], grads[n], eta) for n in weights}
    if geometry == "elemlinf":
        return {n: rho * t[n] * torch.sign(grads[n]) for n in weights}
    norm = math.sqrt(sum(float(((t[n] * grads[n]) ** 2).sum()) for n in weights))
    return {n: rho * t[n] ** 2 * grads[n] / norm if norm > 0 else torch.zeros_like(t[n]) for n in weights}


Loss = Callable[[], Tensor]
Gradients = dict[str, Tensor]


def gradient_at(model: nn.Module, losses: Sequence[Loss], eps: Gradients | None = None) -> tuple[float, Gradients]:
    """(mean loss, its gradient) at w + eps; the weights are w again at the end."""
    parameters = dict(model.named_parameters())
    saved = {n: p.detach().clone() for n, p in parameters.items()}
    total, sums = 0.0, {n: torch.zeros_like(p) for n, p in parameters.items()}
    with torch.no_grad():
        for n, e in (eps or {}).items():
            parameters[n] += e
    for loss in losses:
        model.zero_grad()
        value = loss()
        value.backward()
        total += value.item() / len(losses)
        for n, p in parameters.items():
            if p.grad is not None:
                sums[n] += p.grad / len(losses)
    model.zero_grad()
    with torch.no_grad():
        for n, p in parameters.items():
            p.copy_(saved[n])
    return total, sums


def sam_gradient(
    model: nn.Module,
    losses: Sequence[Loss],
    names: Sequence[str],
    geometry: str,
    rho: float,
    radius: str | float = "ball",
) -> tuple[float, Gradients]:
    """(mean loss at w, gradient at w + eps of every parameter), one perturbation for all `losses` (their mean)."""
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
    clean, ascent = gradient_at(model, losses)
    return clean, gradient_at(model, losses, perturbation(geometry, weights, ascent, rho, radius))[1]


def m_sharpness_gradient(model: nn.Module, losses: Sequence[Loss], *args: Any) -> tuple[float, Gradients]:
    """The mean over `losses` of each one's own `sam_gradient`: the loop over sub-batches."""
    each = [sam_gradient(model, [loss], *args) for loss in losses]
    mean = {n: sum(g[n] for _, g in each) / len(each) for n in each[0][1]}
    return sum(clean for clean, _ in each) / len(each), mean


class AscentLoop:
    """Sources of the ascent direction by their papers' formulas, for the parameters `names`.

    Attributes:
        stored: what the last update left: h (previous), -v (msam), m (fsam) or h_v (looksam).
        moments: ||h||^2, its running mean and variance (aesam).
    """

    def __init__(self, source: str, names: Sequence[str]) -> None:
        self.kind, _, self.k = source.partition(":")
        self.names, self.stored, self.moments = names, dict[str, Tensor](), (0.0, 0.0, 0.0)

    def dot(self, a: Gradients, b: Gradients) -> float:
        return sum(float((a[n] * b[n]).sum()) for n in self.names)

    def way(self, t: int) -> str:
        """What update t does: 'sam', 'stored' (one pass along a stored direction) or 'plain'."""
        size, mean, variance = self.moments
        if self.kind == "looksam":
            return "sam" if t % int(self.k) == 0 else "plain"
        if self.kind == "aesam":
            return "sam" if t == 0 or size >= mean + 0.0 * math.sqrt(variance) else "plain"
        if self.kind in ("previous", "msam"):
            return "stored" if self.stored else "plain"
        return "sam"

    def direction(self, g: Gradients) -> Gradients:
        return {n: g[n] - self.stored[n] if self.kind == "fsam" and self.stored else g[n] for n in self.names}

    def finish(self, t: int, way: str, clean: Gradients, final: Gradients) -> Gradients:
        """The gradient to apply, from the means g and h over the update; keeps what the next update needs."""
        if self.kind == "looksam" and way == "plain":
            stretch = 0.7 * math.sqrt(self.dot(final, final)) / math.sqrt(self.dot(self.stored, self.stored))
            final = final | {n: final[n] + stretch * self.stored[n] for n in self.names}
        elif self.kind == "looksam":
            share = self.dot(final, clean) / self.dot(clean, clean)
            self.stored = {n: final[n] - share * clean[n] for n in self.names}
        elif self.kind == "fsam":
            self.stored = {n: 0.9 * self.stored[n] + 0.1 * clean[n] if self.stored else clean[n] for n in self.names}
        elif self.kind == "previous":
            self.stored = {n: final[n].clone() for n in self.names}
        elif self.kind == "aesam":
            size, (_, mean, variance) = self.dot(final, final), self.moments
            mean = 0.9 * mean + 0.1 * size if t else size
            self.moments = (size, mean, 0.9 * variance + 0.1 * (size - mean) ** 2 if t else 0.0)
        return final


def ascent_training(
    model: nn.Module,
    updates: Sequence[Sequence[Loss]],
    names: Sequence[str],
    geometry: str,
    rho: float,
    source: str,
    gsam_alpha: float = 0.0,
    lr: float = 0.1,
    momentum: float = 0.9,
) -> list[str]:
    """Train by SGD with momentum in place, the direction of each perturbation from `source`; every loss of an update is
    a micro-batch with a perturbation of its own. Returns what each update did (`AscentLoop.way`)."""
    parameters, loop = dict(model.named_parameters()), AscentLoop(source, names)
    buffers = {n: torch.zeros_like(p) for n, p in parameters.items()}
    ways = []
    for t, losses in enumerate(updates):
        ways.append(way := loop.way(t))
        weights = {n: parameters[n].detach().clone() for n in names}
        clean, final = ({n: torch.zeros_like(p) for n, p in parameters.items()} for _ in range(2))
        for loss in losses:
            eps = None if way == "plain" else loop.stored
            if way == "sam":
                _, g = gradient_at(model, [loss])
                clean = {n: clean[n] + g[n] / len(losses) for n in clean}
                eps = loop.direction(g)
            _, h = gradient_at(model, [loss], None if eps is None else perturbation(geometry, weights, eps, rho))
            final = {n: final[n] + h[n] / len(losses) for n in final}
        if gsam_alpha:
            share = loop.dot(clean, final) / loop.dot(final, final)
            final |= {n: final[n] - gsam_alpha * (clean[n] - share * final[n]) for n in names}
        final = loop.finish(t, way, clean, final)
        with torch.no_grad():
            for n, p in parameters.items():
                buffers[n] = momentum * buffers[n] + final[n]
                p -= lr * buffers[n]
        if source == "msam":
            loop.stored = {n: -buffers[n] for n in names}
    return ways
