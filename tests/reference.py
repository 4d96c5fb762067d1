"""Naive loops in plain float64 PyTorch that everything fast is checked against.

Written from the paper's formulas alone: no foreach kernels, no freezing, no sharing, nothing imported from samon.
"""

import math
from collections.abc import Callable, Sequence

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


def perturbation(geometry: str, weights: dict[str, Tensor], grads: dict[str, Tensor], rho: float) -> dict[str, Tensor]:
    """eps of Eq. 5."""
    eta = ETA[geometry]
    t = {n: scale(geometry, n, weights[n], grads[n], eta) for n in weights}
    if geometry == "elemlinf":
        return {n: rho * t[n] * torch.sign(grads[n]) for n in weights}
    norm = math.sqrt(sum(float(((t[n] * grads[n]) ** 2).sum()) for n in weights))
    return {n: rho * t[n] ** 2 * grads[n] / norm if norm > 0 else torch.zeros_like(t[n]) for n in weights}


def sam_gradient(
    model: nn.Module, losses: Sequence[Callable[[], Tensor]], names: Sequence[str], geometry: str, rho: float
) -> tuple[float, dict[str, Tensor]]:
    """(mean loss at w, gradient at w + eps of every parameter), one perturbation for all `losses` (their mean)."""
    parameters = dict(model.named_parameters())
    chosen = {n: parameters[n] for n in names}

    def gradient() -> tuple[float, dict[str, Tensor]]:
        total, sums = 0.0, {n: torch.zeros_like(p) for n, p in parameters.items()}
        for loss in losses:
            model.zero_grad()
            value = loss()
            value.backward()
            total += value.item() / len(losses)
            for n, p in parameters.items():
                if p.grad is not None:
                    sums[n] += p.grad / len(losses)
        model.zero_grad()
        return total, sums

    clean, ascent = gradient()
    eps = perturbation(geometry, {n: p.detach().clone() for n, p in chosen.items()}, ascent, rho)
    saved = {n: p.detach().clone() for n, p in chosen.items()}
    with torch.no_grad():
        for n, p in chosen.items():
            p.copy_(saved[n] + eps[n])
    _, final = gradient()
    with torch.no_grad():
        for n, p in chosen.items():
            p.copy_(saved[n])
    return clean, final


def m_sharpness_gradient(
    model: nn.Module, losses: Sequence[Callable[[], Tensor]], names: Sequence[str], geometry: str, rho: float
) -> tuple[float, dict[str, Tensor]]:
    """The mean over `losses` of each one's own sharpness-aware gradient: the loop over sub-batches."""
    each = [sam_gradient(model, [loss], names, geometry, rho) for loss in losses]
    mean = {n: sum(g[n] for _, g in each) / len(each) for n in each[0][1]}
    return sum(clean for clean, _ in each) / len(each), mean
