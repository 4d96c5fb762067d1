"""The perturbation of SAM in each geometry (Eq. 5, Table 9): maximize the linearized loss over ||T^-1 eps||_p <= rho.

T is a diagonal scaling. Every function treats a list of tensors as one vector. If `grouped`, gradients have a leading
dimension, [G, *shape], and each of the G rows is a vector of its own; weights never have this dimension. Nothing here
reads a value on the host.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from samon.errors import UserError

LOW_PRECISION = (torch.float16, torch.bfloat16)
RADIUS_RULES = ("ball", "raw", "loss")
Tensors = Sequence[Tensor]
# From the 2-norms of local shards, one per tensor, to those of the full tensors; None if no tensor is sharded.
NormReduction = Callable[[Tensor], Tensor] | None
Scale = Callable[[Tensors, Tensors, float, Sequence[bool]], list[Tensor]]  # (weights, gradients, eta, is_weight) -> T


@dataclass(frozen=True)
class Geometry:
    """A row of Table 9.

    Attributes:
        p: p of the ball ||T^-1 eps||_p <= rho.
        eta: default value of the constant eta in T.
        label: its name in the paper's Table 1.
        rho: default radius of the scopes `sam` and `samnn`, and that of `samon`: middle values of the paper's Tables 7
            and 8, not tuned.
        scale: function that computes T, one tensor per weight that broadcasts against its gradient; None for T = 1.
        per_tensor: whether T is one number per tensor, its 2-norm.
        by_name: whether T differs between weights and other parameters, which only their names tell apart.
    """

    p: float
    eta: float
    label: str
    description: str
    rho: tuple[float, float]
    scale: Scale | None = None
    per_tensor: bool = False
    by_name: bool = False


def _elementwise(weights: Tensors, grads: Tensors, eta: float, is_weight: Sequence[bool]) -> list[Tensor]:
    return list(torch._foreach_abs(list(weights)))


def _elementwise_original(weights: Tensors, grads: Tensors, eta: float, is_weight: Sequence[bool]) -> list[Tensor]:
    return [w.abs() + eta if weight else torch.ones_like(w) for w, weight in zip(weights, is_weight, strict=True)]


def _layerwise(weights: Tensors, grads: Tensors, eta: float, is_weight: Sequence[bool]) -> list[Tensor]:
    return list(torch._foreach_norm(list(weights)))


def _fisher(weights: Tensors, grads: Tensors, eta: float, is_weight: Sequence[bool]) -> list[Tensor]:
    return [(1 + eta * (g.abs() if g.is_complex() else g).square()).rsqrt() for g in grads]


_ORIGINAL = "elementwise l2, T = |w| + eta for weights, 1 for the rest"
_LAYERWISE = "layerwise l2, T = ||tensor||_2"
GEOMETRIES: dict[str, Geometry] = {
    "": Geometry(2, 0.0, "SAM", "l2 ball, T = 1", (0.05, 0.5)),
    "eleml2": Geometry(2, 0.0, "el. l2", "elementwise l2, T = |w|", (1.0, 1.0), _elementwise),
    "eleml2orig": Geometry(2, 0.01, "el. l2, orig.", _ORIGINAL, (0.5, 0.5), _elementwise_original, by_name=True),
    "elemlinf": Geometry(math.inf, 0.0, "el. linf", "elementwise l_inf, T = |w|", (0.001, 0.005), _elementwise),
    "layerl2": Geometry(2, 0.0, "layer. l2", _LAYERWISE, (0.005, 0.05), _layerwise, per_tensor=True),
    "fisher": Geometry(2, 1.0, "Fisher", "Fisher l2, T = (1 + eta g^2)^-1/2", (0.05, 0.5), _fisher),
}


def validate_nonnegative(name: str, value: object) -> float:
    """Return rho or eta (`name`) as a float.

    Raises:
        UserError: it is not a finite number >= 0.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise UserError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(value)


def validate_radius_rule(radius: object) -> str | float:
    """Return what rho measures: `ball`, `raw`, `loss`, or the share of `ball` in a mix with `raw`.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(radius, str) and radius in RADIUS_RULES:
        return radius
    try:
        share = float(radius)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        share = -1.0
    if isinstance(radius, bool) or not 0 < share < 1:
        raise UserError(f"radius must be {', '.join(RADIUS_RULES)} or a number in (0, 1), got {radius!r}")
    return share


def radius_scale(radius: str | float, dual_norm: Tensor) -> Tensor | None:
    """The factor on the perturbation of Eq. 5, whose length is rho; None stands for 1.

    With the dual norm ||g||* = ||T g||_2 (p = 2) or ||T g||_1 (p = inf), the linearized loss rises by ||g||* per unit
    length, so every rule holds for every geometry:

    `ball`  1: the perturbation has length rho (Eq. 5).
    `raw`   ||g||*: length rho ||g||*, for p = 2 eps = rho T^2 g: USAM (Andriushchenko and Flammarion 2022).
    lambda  lambda + (1 - lambda) ||g||*: Unified SAM (arXiv 2503.02225).
    `loss`  1 / ||g||*: the linearized loss rises by rho: LE-SAM (arXiv 2605.10183).
    """
    if radius == "ball":
        return None
    if radius == "raw":
        return dual_norm
    if radius == "loss":
        return torch.where(dual_norm > 0, 1 / dual_norm, 0)
    assert isinstance(radius, float)
    return radius + (1 - radius) * dual_norm


def to_float32(tensor: Tensor) -> Tensor:
    """The tensor dense, and in float32 if its precision is lower: norms of float16 gradients overflow."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return tensor.float() if tensor.dtype in LOW_PRECISION else tensor


def global_norm(tensors: Tensors, order: float = 2, grouped: bool = False, reduce: NormReduction = None) -> Tensor:
    """The norm of all tensors as one vector: shape [], or [G] if grouped. With `reduce`, order is 1 or 2."""
    if grouped:
        per_tensor = [torch.linalg.vector_norm(x.flatten(1), order, dim=1) for x in tensors]
        return torch.linalg.vector_norm(torch.stack(per_tensor), order, dim=0)
    norms = torch.stack(torch._foreach_norm(list(tensors), order))
    if reduce is not None:  # it sums squares over the shards, so 1-norms pass through it as square roots
        norms = reduce(norms) if order == 2 else reduce(norms.sqrt()).square()
    return torch.linalg.vector_norm(norms, order)


def ascent_step(
    geometry: str,
    weights: Tensors,
    grads: Tensors,
    rho: float,
    eta: float = 0.0,
    is_weight: Sequence[bool] = (),
    grouped: bool = False,
    reduce: NormReduction = None,
    radius: str | float = "ball",
) -> tuple[list[Tensor], Tensor]:
    """The maximizer of the linearized loss (Eq. 5).

    p = 2: eps = rho T^2 g / ||T g||_2, zero if ||T g|| is zero. p = inf: eps = rho T sign(g), with g / |g| for
    complex g.

    Args:
        is_weight: which tensors are weights, for a geometry `by_name` (section 3.2: T = |w| + eta for these, else 1).
        reduce: completes the norms of sharded tensors.
        radius: what rho measures (see `radius_scale`).

    Returns:
        `(eps, ||T g||_2)`, eps in the gradients' shapes and dtypes.
    """
    row = GEOMETRIES[geometry]
    scales = None if row.scale is None else row.scale(weights, grads, eta, is_weight)
    if scales is not None and row.per_tensor and reduce is not None:
        scales = list(reduce(torch.stack(scales)).unbind())

    def scaled(tensors: Tensors) -> list[Tensor]:
        return list(tensors) if scales is None else [t * x for t, x in zip(scales, tensors, strict=True)]

    scaled_grads = scaled(grads)  # T g
    norm = global_norm(scaled_grads, grouped=grouped, reduce=reduce)
    if row.p == math.inf:
        signs = [rho * x for x in scaled([g.sgn() for g in grads])]
        scale = None if radius == "ball" else radius_scale(radius, global_norm(scaled_grads, 1, grouped, reduce))
        return signs if scale is None else [x * _per_row(scale, x) for x in signs], norm
    # One division by norm / rho, which for rho = 0 gives x / inf = 0. If the norm is zero, then so is T g.
    divisor = torch.where(norm > 0, norm, 1) / rho
    if (scale := radius_scale(radius, norm)) is not None:
        divisor = divisor / torch.where(norm > 0, scale, 1)
    if grouped:
        return [x / _per_row(divisor, x) for x in scaled(scaled_grads)], norm
    return list(torch._foreach_div(scaled(scaled_grads), divisor)), norm


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """Values [] or [G], shaped to broadcast against `like` [G, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1)) if values.dim() else values


def perturbation(
    geometry: str,
    weights: Tensors,
    grads: Tensors,
    rho: float,
    eta: float,
    is_weight: Sequence[bool],
    grouped: bool,
    reduce: NormReduction = None,
    radius: str | float = "ball",
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The eps of `ascent_step`, or zero if it or the gradient is not finite.

    Returns:
        `(eps, ||T g||_2, finite)`. If all tensors have the same dtype and device, eps is a list of one flat tensor, [N]
        or [G, N] (see `FlatTensors`), because launching hundreds of small kernels would cost as much as the arithmetic.
    """
    low = [to_float32(w) for w in weights]
    eps, norm = ascent_step(geometry, low, grads, rho, eta, is_weight, grouped, reduce, radius)
    finite = norm.isfinite()
    if radius != "ball":  # 1 / ||g||* overflows for tiny gradients
        finite &= torch.stack([t.isfinite().flatten(int(grouped)).all(-1) for t in eps]).all(0)
    if len({(t.dtype, t.device) for t in eps}) > 1:
        return [torch.where(_per_row(finite, t), t, 0) for t in eps], norm, finite
    flat = torch.cat([t.flatten(int(grouped)) for t in eps], -1)
    return [flat.masked_fill_(~finite.unsqueeze(-1), 0)], norm, finite


class FlatTensors(list[Tensor]):
    """A list of views of one tensor `flat`, [N] or [G, N], in the shapes of `like`."""

    def __init__(self, flat: Tensor, like: Tensors) -> None:
        self.flat = flat
        sizes = [t.numel() for t in like] if flat.dim() == 1 else [t[0].numel() for t in like]
        super().__init__(part.view_as(t) for part, t in zip(flat.split(sizes, -1), like, strict=True))
