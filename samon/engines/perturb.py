"""The arithmetic of a perturbation as functions of tensors alone, which run eagerly or compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from samon.compat import foreach_clone
from samon.geometry import Norms, Tensors, ascend, widened

CAPTURING = ("reduce-overhead", "max-autotune")  # modes of torch.compile that capture CUDA graphs on a GPU


def perturbation(
    geometry: str,
    weights: Tensors,
    grads: Tensors,
    rho: float,
    eta: float,
    is_weight: Sequence[bool],
    grouped: bool,
    share: float,
    whole: Norms = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`(eps / share, ||T g||_2, whether that is finite)`, eps zero where it is not: all, or with `grouped` each group.

    Where dtype and device are the same, eps is one flat tensor, [N] or [G, N]: hundreds of small kernels would cost as
    much as the arithmetic."""
    eps, norm = ascend(geometry, widened(weights), grads, rho, eta, is_weight, grouped, whole)
    eps = eps if share == 1 else list(torch._foreach_div(eps, share))
    finite = norm.isfinite()
    if len({(t.dtype, t.device) for t in eps}) > 1:
        rows = [finite.view(-1, *[1] * (t.dim() - 1)) if grouped else finite for t in eps]
        return [torch.where(row, t, 0) for row, t in zip(rows, eps, strict=True)], norm, finite
    if grouped:
        return [torch.cat([t.flatten(1) for t in eps], 1).masked_fill_(~finite[:, None], 0)], norm, finite
    return [torch.cat([t.reshape(-1) for t in eps]).masked_fill_(~finite, 0)], norm, finite


@torch.no_grad()
def shift(weights: list[Tensor], eps: list[Tensor]) -> list[Tensor]:
    """Add eps in place (float32 eps on half-precision weights: rounded once); returns what the weights were."""
    saved = foreach_clone(weights)
    torch._foreach_add_(weights, eps)
    return saved


@torch.no_grad()
def restore(weights: list[Tensor], saved: list[Tensor]) -> None:
    torch._foreach_copy_(weights, saved)


class Arithmetic:
    """The three functions, compiled where a backend is named."""

    def __init__(self, backend: Any = None):
        def made(function: Callable[..., Any]) -> Callable[..., Any]:
            return function if backend is None else torch.compile(function, backend=backend)

        self.perturbation, self.shift, self.restore = made(perturbation), made(shift), made(restore)


class Parts(list[Tensor]):
    """Tensors that are views of `flat`, of shape [N], or [G, N] where they are grouped."""

    def __init__(self, flat: Tensor, like: list[Tensor]) -> None:
        self.flat = flat
        sizes = [t.numel() for t in like] if flat.dim() == 1 else [t[0].numel() for t in like]
        super().__init__(part.view_as(t) for part, t in zip(flat.split(sizes, -1), like, strict=True))
