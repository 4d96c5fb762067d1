"""One normalization layer with a gamma and a beta of its own for each group of samples."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from samon.engines.norm_stats import kept
from samon.errors import UserError
from samon.geometry import HALF, wide
from samon.scope import affine_dim

Call = tuple[Tensor, Tensor]  # mean and variance, [G, C]


class GroupedNorm:
    """A layer's forward with gamma + d_gamma[g], beta + d_beta[g] in group g.

    It is a function of its input and of this object's attributes, and the object serves every step, so a graph compiled
    of it holds from step to step: the offsets are inputs of the graph, the batch statistics outputs.

    Args:
        module: the layer, of a class with an `affine_dim`.
        groups: G, equal groups of consecutive samples in the leading dimension.

    Attributes:
        bare: a copy of the layer with unit gamma, zero beta and without what follows them. The layer itself keeps its
            parameters, so code that reads them outside the layer's own call sees what they are.
        offsets: for weight and bias, None for an unperturbed one.
        calls: the batch statistics of each call, of a training BatchNorm that tracks them.
    """

    def __init__(self, module: nn.Module, groups: int):
        self.module, self.groups = module, groups
        self.affine = (module._parameters.get("weight"), module._parameters.get("bias"))
        self.offsets: Sequence[Tensor | None] = (None, None)
        self.calls: tuple[Call, ...] = ()
        self.own_statistics = isinstance(module, _BatchNorm) and module.training
        self.checked = type(module).__module__.partition(".")[0] in ("torch", "timm")  # by tests
        # timm's fused norm+act classes: their activation runs behind the groups' own gamma and beta.
        self.children = dict(module._modules)
        self.after = {n: m for n, m in self.children.items() if n in ("drop", "act") and m is not None}
        fills = {"weight": torch.ones_like, "bias": torch.zeros_like}
        own = module._parameters.items()
        self._bare_attributes: dict[str, Any] = {
            "_parameters": {n: fills[n](p.detach()) if n in fills and p is not None else p for n, p in own},
            "_modules": self.children | {name: nn.Identity() for name in self.after},
        }
        self.bare: nn.Module = object.__new__(type(module))
        self.follow()

    def follow(self) -> None:
        """Take over what the layer's attributes are now (epsilons, mode), buffers included."""
        vars(self.bare).update(vars(self.module) | self._bare_attributes)

    def serves(self, module: nn.Module) -> bool:
        """Whether the layer still is what this object was made of: mode, children, parameters, dtype and device."""
        own = [(n, p) for n, p in module._parameters.items() if p is not None]
        bare = self._bare_attributes["_parameters"]
        return (
            self.own_statistics == (isinstance(module, _BatchNorm) and module.training)
            and all(a is b for a, b in zip(self.affine, map(module._parameters.get, ("weight", "bias")), strict=True))
            and all((bare[n].dtype, bare[n].device) == (p.dtype, p.device) for n, p in own)
            and self.children == module._modules
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> the same shape and dtype.

        Raises:
            UserError: the groups do not divide the batch, or a class of the user's cannot be grouped.
        """
        if x.shape[0] % self.groups:
            raise UserError(
                f"a batch of {x.shape[0]} does not divide into {self.groups} groups at {type(self.module).__name__}; "
                "choose a batch size that m divides"
            )
        if not self.checked and all(d is None or d.requires_grad for d in self.offsets):  # zero, in the first pass
            self._check(x)
        return self._output(x)

    def _output(self, x: Tensor) -> Tensor:
        gamma, beta = (self._per_group(p, d) for p, d in zip(self.affine, self.offsets, strict=True))
        y = self._batch_norm(x, gamma, beta) if self.own_statistics else self._layer(x, gamma, beta)
        for child in self.after.values():
            y = child(y)
        return y

    @torch.compiler.disable
    @torch.no_grad()
    def _check(self, x: Tensor) -> None:
        """Whether a class that torch and timm do not bring is what the groups take it for, by its own forward of each
        group. A wrong `dim`, statistics of the whole batch and x * (1 + weight) all show here, the last one because the
        parameters are moved first: where the weight is 1, both are the same."""
        offsets, calls = self.offsets, self.calls
        own: dict[str, Any] = dict(self.module._parameters)
        moved = {n: own[n] + 0.5 for n, d in zip(("weight", "bias"), offsets, strict=True) if d is not None}
        twin = object.__new__(type(self.module))
        vars(twin).update(vars(self.module) | {"_parameters": own | moved})
        with kept(self.module.modules()):
            expected = torch.cat([type(twin).forward(twin, part) for part in x.chunk(self.groups)])
            try:
                self.offsets = [None if d is None else d + 0.5 for d in offsets]
                error = (self._output(x) - expected).abs() / (1 + expected.abs())
            except RuntimeError:  # shapes that do not fit
                error = torch.ones(())
        self.offsets, self.calls = offsets, calls
        if (error > (0.1 if expected.dtype in HALF else 1e-3)).any():
            name = type(self.module).__name__
            raise UserError(
                f"groups={self.groups}: {name} is not normalized(x) * weight + bias along dimension "
                f"{affine_dim(self.module)} with each sample on its own; use groups=1, and say so by "
                f"samon.register_norm({name}, dim=None)"
            )
        self.checked = True

    def _per_group(self, parameter: Parameter | None, offset: Tensor | None) -> Tensor | None:
        """The parameter of every group, [G, *shape], made anew at each call; None for a missing one."""
        if parameter is None:
            return None
        if offset is None:
            return wide(parameter).expand(self.groups, *parameter.shape)
        # Only the offsets are differentiated in the first pass: what else reaches the parameter, bypasses them.
        return (parameter.detach() if offset.requires_grad else parameter) + offset

    def _layer(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        y = type(self.bare).forward(self.bare, x)
        z = y.view(self.groups, -1, *y.shape[1:])
        z = z if gamma is None else z * self._facing(z, gamma)
        z = z if beta is None else z + self._facing(z, beta)
        return _joined(z, y.shape).to(y.dtype)

    def _facing(self, z: Tensor, affine: Tensor) -> Tensor:
        """Affine parameters [G, *shape] as they meet the output viewed as [G, m, ...]."""
        ones = [1] * (z.dim() - affine.dim())
        if affine_dim(self.module) == 1:
            return affine.view(self.groups, 1, -1, *ones[1:])
        return affine.view(self.groups, *ones, *affine.shape[1:])

    def _batch_norm(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        """BatchNorm with each group's own statistics: [B, C, ...] -> [m, G * C, ...] -> batch norm -> back."""
        module: Any = self.module
        groups, channels = self.groups, x.shape[1]
        folded = x.reshape(groups, -1, *x.shape[1:]).transpose(0, 1).reshape(-1, groups * channels, *x.shape[2:])
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, variance = (torch.zeros(groups * channels, dtype=dtype, device=x.device) for _ in range(2))
        gamma, beta = (None if a is None else a.flatten() for a in (gamma, beta))
        y = F.batch_norm(folded, mean, variance, gamma, beta, training=True, momentum=1.0, eps=module.eps)
        if getattr(module, "track_running_stats", False):
            self.calls = (*self.calls, (mean.view(groups, -1), variance.view(groups, -1)))
        y = y.view(-1, groups, channels, *x.shape[2:]).transpose(0, 1)
        return _joined(y if y.is_contiguous() else y.contiguous(), x.shape)


def _joined(x: Tensor, shape: torch.Size) -> Tensor:
    """x.view(shape) that autograd does not call a view: an in-place activation behind a view would cost it a copy of
    the whole gradient."""
    return torch.ops.aten._unsafe_view(x, shape)
