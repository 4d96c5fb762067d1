"""The weight-space ball of a sharpness-aware step: scales T, ascent and projection (Eq. 5, Table 9).

Every function treats a list of tensors as one vector. With `grouped=True` the gradients carry a leading dimension
[G, *shape] and each of the G rows is a vector of its own; weights never do. Nothing here reads a value on the host.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from samon.errors import UserError

HALF = (torch.float16, torch.bfloat16)
Tensors = Sequence[Tensor]
Norms = Callable[[Tensor], Tensor] | None  # 2-norms [T] of parts of tensors to those of the tensors; None: no parts
Scale = Callable[[Tensors, Tensors, float, Sequence[bool]], list[Tensor]]


@dataclass(frozen=True)
class Geometry:
    """A row of Table 9: eps maximises the linearised loss over ||T^-1 eps||_p <= rho.

    Attributes:
        label: its name in the paper's Table 1.
        rho: radius to start from, and for SAM-ON: middle values of the paper's Tables 7 and 8, not tuned ones.
        scale: T from (weights, gradients, eta, which tensors are weights), one tensor per weight that broadcasts
            against its gradient; None stands for T = 1.
        of_norms: T consists of the tensors' 2-norms, and not of numbers for single entries.
        by_kind: T differs between weights and the rest, so it takes the parameters' names.
    """

    p: float
    eta: float
    label: str
    description: str
    rho: tuple[float, float]
    scale: Scale | None = None
    of_norms: bool = False
    by_kind: bool = False


def _entry_sizes(weights: Tensors, grads: Tensors, eta: float, is_weight: Sequence[bool]) -> list[Tensor]:
    return list(torch._foreach_abs(list(weights)))


def _weight_sizes(weights: Tensors, grads: Tensors, eta: float, is_weight: Sequence[bool]) -> list[Tensor]:
    return [w.abs() + eta if weight else torch.ones_like(w) for w, weight in zip(weights, is_weight, strict=True)]


def _tensor_norms(weights: Tensors, grads: Tensors, eta: float, is_weight: Sequence[bool]) -> list[Tensor]:
    return list(torch._foreach_norm(list(weights)))


def _fisher(weights: Tensors, grads: Tensors, eta: float, is_weight: Sequence[bool]) -> list[Tensor]:
    return [(1 + eta * (g.abs() if g.is_complex() else g).square()).rsqrt() for g in grads]


_ORIGINAL = "elementwise l2, T = |w| + eta for weights, 1 for the rest"
_LAYERWISE = "layerwise l2, T = ||tensor||_2"
GEOMETRIES: dict[str, Geometry] = {
    "": Geometry(2, 0.0, "SAM", "l2 ball, T = 1", (0.05, 0.5)),
    "eleml2": Geometry(2, 0.0, "el. l2", "elementwise l2, T = |w|", (1.0, 1.0), _entry_sizes),
    "eleml2orig": Geometry(2, 0.01, "el. l2, orig.", _ORIGINAL, (0.5, 0.5), _weight_sizes, by_kind=True),
    "elemlinf": Geometry(math.inf, 0.0, "el. linf", "elementwise l_inf, T = |w|", (0.001, 0.005), _entry_sizes),
    "layerl2": Geometry(2, 0.0, "layer. l2", _LAYERWISE, (0.005, 0.05), _tensor_norms, of_norms=True),
    "fisher": Geometry(2, 1.0, "Fisher", "Fisher l2, T = (1 + eta g^2)^-1/2", (0.05, 0.5), _fisher),
}


def radius(name: str, value: Any) -> float:
    """A rho or an eta.

    Raises:
        UserError: it is not a finite number >= 0.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise UserError(f"{name} must be a finite number, zero or positive, got {value!r}")
    return float(value)


def wide(tensor: Tensor) -> Tensor:
    """Dense, and float32 or wider: norms of half-precision gradients overflow."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return tensor.float() if tensor.dtype in HALF else tensor


def widened(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`wide` of each."""
    return [wide(t) for t in tensors]


def global_norm(tensors: Tensors, order: float = 2, grouped: bool = False, whole: Norms = None) -> Tensor:
    """The norm of this order of all tensors as one vector: shape [], or [G] when they are grouped. `whole`: for parts
    of tensors and order 2."""
    if grouped:
        parts = [torch.linalg.vector_norm(x.flatten(1), order, dim=1) for x in tensors]
        return torch.linalg.vector_norm(torch.stack(parts), order, dim=0)
    norms = torch.stack(torch._foreach_norm(list(tensors), order))
    return torch.linalg.vector_norm(norms if whole is None else whole(norms), order)


def ascend(
    geometry: str,
    weights: Tensors,
    grads: Tensors,
    rho: float,
    eta: float = 0.0,
    is_weight: Sequence[bool] = (),
    grouped: bool = False,
    whole: Norms = None,
) -> tuple[list[Tensor], Tensor]:
    """One ascent step (Eq. 5): `(eps, ||T g||_2)`, eps shaped like the gradients, in their dtype.

    p = 2: eps = rho T^2 g / ||T g||_2, zero where ||T g|| is zero; p = inf: eps = rho T sign(g), for complex g
    g / |g|.

    Args:
        is_weight: for a geometry `by_kind`, which tensors are weights: |w| + eta; the others get 1 (section 3.2).
        whole: for weights and gradients of which this process has a part: makes norms whole (`sharded.whole_norms`).
    """
    row = GEOMETRIES[geometry]
    scales = None if row.scale is None else row.scale(weights, grads, eta, is_weight)
    if scales is not None and row.of_norms and whole is not None:
        scales = list(whole(torch.stack(scales)).unbind())

    def scaled(tensors: Tensors) -> list[Tensor]:
        return list(tensors) if scales is None else [a * x for a, x in zip(scales, tensors, strict=True)]

    steep = scaled(grads)
    norm = global_norm(steep, grouped=grouped, whole=whole)
    if row.p == math.inf:
        return [rho * x for x in scaled([g.sgn() for g in grads])], norm
    # One division, exact for rho = 0 too (x / inf = 0); where the norm is zero, so is every direction.
    divisor = torch.where(norm > 0, norm, 1) / rho
    if grouped:
        return [x / divisor.view(-1, *[1] * (x.dim() - 1)) for x in scaled(steep)], norm
    return list(torch._foreach_div(scaled(steep), divisor)), norm


def project(deltas: Tensors, scales: Tensors, rho: float, order: float) -> list[Tensor]:
    """The deltas on or inside ||T^-1 delta||_order <= rho: clipped for infinity, scaled back for 2.

    Where T (`scales`) is zero the ball has no extent, so delta is zero there.
    """
    if order == math.inf:
        return [torch.clamp(d, -rho * a, rho * a) for d, a in zip(deltas, scales, strict=True)]
    inside = [torch.where(a > 0, d, 0) for d, a in zip(deltas, scales, strict=True)]
    radius = global_norm([torch.where(a > 0, d / a, 0) for d, a in zip(inside, scales, strict=True)])
    factor = torch.where(radius > rho, rho / radius, 1)
    return list(torch._foreach_mul(inside, factor))
