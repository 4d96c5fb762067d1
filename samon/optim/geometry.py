"""The weight-space ball of a sharpness-aware step: scales T, ascent and projection (Eq. 5, Table 9).

Every function treats a list of tensors as one vector. With `grouped=True` the gradients carry a leading dimension
[G, *shape] and each of the G rows is a vector of its own; weights never do. Nothing here reads a value on the host.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Geometry:
    """A row of Table 9: eps maximises the linearised loss over ||T^-1 eps||_p <= rho."""

    p: float
    eta: float
    description: str


GEOMETRIES: dict[str, Geometry] = {
    "": Geometry(2, 0.0, "l2 ball, T = 1"),
    "eleml2": Geometry(2, 0.0, "elementwise l2, T = |w|"),
    "eleml2orig": Geometry(2, 0.01, "elementwise l2, T = |w| + eta for weights, 1 for the rest"),
    "elemlinf": Geometry(math.inf, 0.0, "elementwise l_inf, T = |w|"),
    "layerl2": Geometry(2, 0.0, "layerwise l2, T = ||tensor||_2"),
    "fisher": Geometry(2, 1.0, "Fisher l2, T = (1 + eta g^2)^-1/2"),
}


def scales(
    geometry: str, weights: Tensors, grads: Tensors, eta: float = 0.0, is_weight: Sequence[bool] = ()
) -> list[Tensor] | None:
    """T of Table 9, one tensor per weight that broadcasts against its gradient; None stands for T = 1.

    Args:
        is_weight: for `eleml2orig`, which tensors are weights (|w| + eta); the others get 1 (section 3.2).
    """
    if geometry == "":
        return None
    if geometry in ("eleml2", "elemlinf"):
        return list(torch._foreach_abs(list(weights)))
    if geometry == "eleml2orig":
        return [w.abs() + eta if weight else torch.ones_like(w) for w, weight in zip(weights, is_weight, strict=True)]
    if geometry == "layerl2":
        return list(torch._foreach_norm(list(weights)))
    assert geometry == "fisher", geometry
    return [(1 + eta * g.square()).rsqrt() for g in grads]


def global_norm(tensors: Tensors, p: float = 2, grouped: bool = False) -> Tensor:
    """The p-norm of all tensors as one vector: shape [], or [G] when they are grouped."""
    if grouped:
        parts = [torch.linalg.vector_norm(t.flatten(1), p, dim=1) for t in tensors]
        return torch.linalg.vector_norm(torch.stack(parts), p, dim=0)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), p)), p)


def ascend(
    geometry: str,
    weights: Tensors,
    grads: Tensors,
    rho: float,
    eta: float = 0.0,
    is_weight: Sequence[bool] = (),
    grouped: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """One ascent step (Eq. 5): `(eps, ||T g||_2)`, eps shaped like the gradients, in their dtype.

    p = 2: eps = rho T^2 g / ||T g||_2, zero where ||T g|| is zero; p = inf: eps = rho T sign(g).
    """
    t = scales(geometry, weights, grads, eta, is_weight)
    u = list(grads) if t is None else [a * g for a, g in zip(t, grads, strict=True)]
    norm = global_norm(u, grouped=grouped)
    if GEOMETRIES[geometry].p == math.inf:
        assert t is not None
        return [rho * a * g.sign() for a, g in zip(t, grads, strict=True)], norm
    u = u if t is None else [a * b for a, b in zip(t, u, strict=True)]
    # One division, exact for rho = 0 too (x / inf = 0); where the norm is zero, so is every u.
    divisor = torch.where(norm > 0, norm, 1) / rho
    if grouped:
        return [b / divisor.view(-1, *[1] * (b.dim() - 1)) for b in u], norm
    return list(torch._foreach_div(u, divisor)), norm


def project(deltas: Tensors, t: Tensors, rho: float, p: float) -> list[Tensor]:
    """The deltas on or inside ||T^-1 delta||_p <= rho: clipped for p = inf, scaled back for p = 2.

    Where T is zero the ball has no extent, so delta is zero there.
    """
    if p == math.inf:
        return [torch.clamp(d, -rho * a, rho * a) for d, a in zip(deltas, t, strict=True)]
    inside = [torch.where(a > 0, d, 0) for d, a in zip(deltas, t, strict=True)]
    radius = global_norm([torch.where(a > 0, d / a, 0) for d, a in zip(inside, t, strict=True)])
    factor = torch.where(radius > rho, rho / radius, 1)
    return list(torch._foreach_mul(inside, factor))
