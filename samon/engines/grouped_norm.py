"""A normalization layer with its own gamma and beta for each group of samples."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from samon.contexts import preserve_buffers
from samon.errors import UserError
from samon.geometry import LOW_PRECISION, to_float32
from samon.scope import affine_dim

BatchStatistics = tuple[Tensor, Tensor]  # HALF times mean and variance, [G, C]
# The momentum at which batch statistics are read. At momentum 1, a compiled forward returns the memory of the mean that
# it saves for the backward pass, which reuses that memory. A power of two keeps every bit.
HALF = 0.5


class GroupedNorm:
    """A layer's forward with gamma + d_gamma[g], beta + d_beta[g] in group g.

    The forward is a function of its input and of this object's attributes, and the object is reused at every step, so a
    compiled graph stays valid from step to step: the offsets are inputs of the graph, the batch statistics outputs.

    Args:
        module: the layer, of a class with an `affine_dim`.
        groups: G, equal groups of consecutive samples in the leading dimension.

    Attributes:
        bare: a copy of the layer with gamma 1, beta 0 and no activation. The layer itself keeps its parameters, so code
            that reads them outside the layer's own call sees their values.
        offsets: for weight and bias; None for an unperturbed one.
        calls: the batch statistics of each call, for a training BatchNorm that tracks them.
    """

    def __init__(self, module: nn.Module, groups: int):
        self.module, self.groups = module, groups
        self.affine = (module._parameters.get("weight"), module._parameters.get("bias"))
        self.offsets: Sequence[Tensor | None] = (None, None)
        self.calls: tuple[BatchStatistics, ...] = ()
        self.own_statistics = isinstance(module, _BatchNorm) and module.training
        self.checked = type(module).__module__.partition(".")[0] in ("torch", "timm")  # by tests
        # timm's fused norm+act classes: their activation runs after the groups' own gamma and beta.
        self.children = dict(module._modules)
        self.after = {n: m for n, m in self.children.items() if n in ("drop", "act") and m is not None}
        fills = {"weight": torch.ones_like, "bias": torch.zeros_like}
        own = module._parameters.items()
        self._replaced_attributes: dict[str, Any] = {
            "_parameters": {n: fills[n](p.detach()) if n in fills and p is not None else p for n, p in own},
            "_modules": self.children | {name: nn.Identity() for name in self.after},
        }
        self.bare: nn.Module = object.__new__(type(module))
        self.sync_attributes()

    def sync_attributes(self) -> None:
        """Copy the layer's current attributes (eps, mode, buffers)."""
        vars(self.bare).update(vars(self.module) | self._replaced_attributes)

    def fits(self, module: nn.Module) -> bool:
        """Whether the layer still has the mode, children, parameters, dtype and device of this object."""
        own = [(n, p) for n, p in module._parameters.items() if p is not None]
        bare = self._replaced_attributes["_parameters"]
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
        """Compare a class that is not torch's or timm's with its own forward, run group by group, which shows a wrong
        `dim`, statistics of the whole batch and x * (1 + weight). The parameters are shifted first, because the last
        is right if weight is 1."""
        offsets, calls = self.offsets, self.calls
        own: dict[str, Any] = dict(self.module._parameters)
        shifted = {n: own[n] + 0.5 for n, d in zip(("weight", "bias"), offsets, strict=True) if d is not None}
        twin = object.__new__(type(self.module))
        vars(twin).update(vars(self.module) | {"_parameters": own | shifted})
        with preserve_buffers(self.module.modules()):
            expected = torch.cat([type(twin).forward(twin, part) for part in x.chunk(self.groups)])
            try:
                self.offsets = [None if d is None else d + 0.5 for d in offsets]
                error = (self._output(x) - expected).abs() / (1 + expected.abs())
            except RuntimeError:  # incompatible shapes
                error = torch.ones(())
        self.offsets, self.calls = offsets, calls
        if (error > (0.1 if expected.dtype in LOW_PRECISION else 1e-3)).any():
            name = type(self.module).__name__
            raise UserError(
                f"groups={self.groups}: {name} is not normalized(x) * weight + bias along dimension "
                f"{affine_dim(self.module)} for each sample separately; use groups=1, and declare it by "
                f"samon.register_norm({name}, dim=None)"
            )
        self.checked = True

    def _per_group(self, parameter: Parameter | None, offset: Tensor | None) -> Tensor | None:
        """The parameter of every group, [G, *shape]; None for a missing one."""
        if parameter is None:
            return None
        if offset is None:
            return to_float32(parameter).expand(self.groups, *parameter.shape)
        # The first pass differentiates only the offsets: a gradient of the parameter then means use outside the layer.
        return (parameter.detach() if offset.requires_grad else parameter) + offset

    def _layer(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        y = type(self.bare).forward(self.bare, x)
        z = y.view(self.groups, -1, *y.shape[1:])
        z = z if gamma is None else z * self._broadcastable(z, gamma)
        z = z if beta is None else z + self._broadcastable(z, beta)
        return _merge_groups(z, y.shape).to(y.dtype)

    def _broadcastable(self, z: Tensor, affine: Tensor) -> Tensor:
        """Affine parameters [G, *shape], shaped to broadcast against the output viewed as [G, m, ...]."""
        ones = [1] * (z.dim() - affine.dim())
        if affine_dim(self.module) == 1:
            return affine.view(self.groups, 1, -1, *ones[1:])
        return affine.view(self.groups, *ones, *affine.shape[1:])

    def _batch_norm(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        """BatchNorm with each group's own statistics."""
        module: Any = self.module
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, variance = (torch.zeros(self.groups, x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
        # Single samples [G, C, ...] fold into the channels [1, G * C, ...] without a copy, unless channels_last. Copies
        # cost more than a call for each group (up to 5 times as much in channels_last); in a compiled graph they are
        # fused, and every call would be compiled.
        single = x.shape[0] == self.groups and x.is_contiguous()
        apply = _fold_batch_norm if single or torch.compiler.is_compiling() else _loop_batch_norm
        y = apply(x, mean, variance, gamma, beta, module.eps)
        if getattr(module, "track_running_stats", False):
            self.calls = (*self.calls, (mean, variance))
        return y


def _loop_batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """[B, C, ...] -> [B, C, ...], group by group; HALF times the statistics, [G, C], go to `mean` and `variance`."""
    gammas, betas = ([None] * len(mean) if a is None else a.unbind() for a in (gamma, beta))
    groups = zip(x.chunk(len(mean)), mean, variance, gammas, betas, strict=True)
    return torch.cat([F.batch_norm(part, m, v, g, b, True, HALF, eps) for part, m, v, g, b in groups])


def _fold_batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """The same in one call: [B, C, ...] -> [m, G * C, ...] -> batch norm -> back."""
    groups, channels = mean.shape
    folded = x.reshape(groups, -1, *x.shape[1:]).transpose(0, 1).reshape(-1, groups * channels, *x.shape[2:])
    gamma, beta = (None if a is None else a.flatten() for a in (gamma, beta))
    y = F.batch_norm(folded, mean.view(-1), variance.view(-1), gamma, beta, True, HALF, eps)
    y = y.view(-1, groups, channels, *x.shape[2:]).transpose(0, 1)
    return _merge_groups(y if y.is_contiguous() else y.contiguous(), x.shape)


def _merge_groups(x: Tensor, shape: torch.Size) -> Tensor:
    """x.view(shape) that autograd does not treat as a view: an in-place activation after a view would cost a copy of
    the whole gradient."""
    return torch.ops.aten._unsafe_view(x, shape)
