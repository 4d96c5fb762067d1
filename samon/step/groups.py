"""m-sharpness in one batched pass: every group of m samples carries its own gamma + d_gamma[g], beta + d_beta[g].

Only normalization parameters are perturbed (scope `samon`), so a loop over G small batches needs no loop: the offsets d
are explicit tensors [G, *parameter shape], the gradient with respect to them holds every group's ascent gradient, and
BatchNorm, which couples samples, computes its statistics per group by folding the groups into the channels.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from samon.errors import UserError
from samon.optim.geometry import wide
from samon.optim.sam import SAM
from samon.optim.scope import affine_dim, norm_modules
from samon.step.passes import frozen, refuse_checkpointing, swapped_forwards, unperturbed


class Grouped:
    """Both passes with one perturbation per group: normalization layers carry one set of affine parameters for each.

    The running statistics are written once, at the end.

    Args:
        groups: G, equal groups of consecutive samples in the leading dimension.

    Attributes:
        inputs: the offsets [G, *parameter shape], in float32 or wider, so that no half-precision sum rounds them away.

    Raises:
        UserError: naming the layer or option that cannot be grouped.
    """

    def __init__(self, sam: SAM, groups: int, bn_stats: str):
        if not sam.can_group:
            raise UserError(
                f"groups={groups} holds one copy of the perturbed parameters per group, which only scope samon on a "
                f"model can do (this is scope {sam.scope}); loop over the sub-batches instead"
            )
        assert sam.model is not None
        self.sam, self.groups, self.bn_stats = sam, groups, bn_stats
        parameters = list(sam.perturbed_parameters().values())
        self.device = parameters[0].device
        self.perturbed = {id(p): i for i, p in enumerate(parameters)}
        self.inputs = [wide(p.new_zeros(groups, *p.shape)).requires_grad_() for p in parameters]
        self.frozen = [*unperturbed(sam), *parameters]
        # [module -> per pass -> the (mean, variance) [G, C] of each call]
        self.statistics: dict[Any, list[list[tuple[Tensor, Tensor]]]] = defaultdict(lambda: [[], []])
        self.pass_index = 0
        self.modules = [m for name, m in norm_modules(sam.model).items() if self._is_grouped(name, m)]
        if any(isinstance(m, _BatchNorm) and m.training for m in self.modules):
            refuse_checkpointing(sam.model, f"groups={groups} computes BatchNorm statistics once")

    def _is_grouped(self, name: str, module: nn.Module) -> bool:
        """Perturbed layers, and every BatchNorm that computes statistics of the batch."""
        dim = affine_dim(module)
        coupled = module.training and (isinstance(module, _BatchNorm) or dim is None)
        if not coupled and not any(id(p) in self.perturbed for p in module.parameters(recurse=False)):
            return False
        if dim is None:
            raise UserError(
                f"groups={self.groups}: {type(module).__name__} {name!r} cannot be grouped; use groups=1 "
                "(--m-sharpness device) or another normalization layer"
            )
        return True

    def first(self) -> AbstractContextManager[None]:
        """Around the first pass."""
        return frozen(self.frozen)

    @contextmanager
    def each_first(self) -> Iterator[None]:
        """Around each forward of the first pass, and around each of the second."""
        with ExitStack() as stack:
            forwards: dict[nn.Module, Callable] = {}
            for module in self.modules:
                affine = tuple(module._parameters.get(name) for name in ("weight", "bias"))
                forwards[module] = self._forward(module, affine, stack.enter_context(_bare(module)))
            stack.enter_context(swapped_forwards(forwards))
            yield

    each_second = each_first

    @contextmanager
    def second(self, eps: list[Tensor]) -> Iterator[None]:
        """Around the second pass, with the perturbations [G, *shape] as offsets."""
        self.inputs, self.pass_index = eps, 1
        self.sam.measure(eps, eps, grouped=True)
        yield
        self._update_running_statistics()

    def _per_group(self, parameter: Parameter | None) -> Tensor | None:
        """The parameter of every group, [G, *shape], made anew at each call; None for a missing one."""
        if parameter is None:
            return None
        i = self.perturbed.get(id(parameter))
        return wide(parameter).expand(self.groups, *parameter.shape) if i is None else parameter + self.inputs[i]

    def _forward(self, module: nn.Module, affine: tuple, activation: Callable[[Tensor], Tensor]) -> Callable:
        statistics = isinstance(module, _BatchNorm) and module.training
        normalized = type(module).forward  # with unit gamma and zero beta: `_bare` has set them

        def forward(x: Tensor) -> Tensor:
            if x.shape[0] % self.groups:
                raise UserError(
                    f"a batch of {x.shape[0]} does not divide into {self.groups} groups at {type(module).__name__}; "
                    "choose a batch size that m divides"
                )
            gamma, beta = (self._per_group(parameter) for parameter in affine)
            if statistics:
                return activation(self._batch_norm(module, x, gamma, beta))
            y = normalized(module, x)
            shape = _broadcast_shape(module, y, gamma if gamma is not None else beta)
            z = y.view(self.groups, -1, *y.shape[1:])
            z = z if gamma is None else z * gamma.view(shape)
            z = z if beta is None else z + beta.view(shape)
            return activation(_joined(z, y.shape).to(y.dtype))

        return forward

    def _batch_norm(self, module: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        """BatchNorm with each group's own statistics: [B, C, ...] -> [m, G * C, ...] -> batch norm -> back."""
        groups, channels = self.groups, x.shape[1]
        folded = x.reshape(groups, -1, *x.shape[1:]).transpose(0, 1).reshape(-1, groups * channels, *x.shape[2:])
        mean, variance = torch.zeros(
            2, groups * channels, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
        )
        gamma, beta = (None if a is None else a.flatten() for a in (gamma, beta))
        y = F.batch_norm(folded, mean, variance, gamma, beta, training=True, momentum=1.0, eps=module.eps)
        if getattr(module, "track_running_stats", False):
            self.statistics[module][self.pass_index].append((mean.view(groups, -1), variance.view(groups, -1)))
        y = y.view(-1, groups, channels, *x.shape[2:]).transpose(0, 1)
        return _joined(y if y.is_contiguous() else y.contiguous(), x.shape)

    @torch.no_grad()
    def _update_running_statistics(self) -> None:
        """Bring the running statistics to where a loop over the groups, two passes each, would have left them."""
        passes = {"first": [0], "second": [1], "both": [0, 1]}[self.bn_stats]
        for module, by_pass in self.statistics.items():
            calls = [call for i in passes for call in by_pass[i]]
            if not calls or module.running_mean is None:
                continue
            count = self.groups * len(calls)
            module.num_batches_tracked += count
            if module.momentum is None:  # cumulative average over all batches ever seen
                keep = (module.num_batches_tracked - count) / module.num_batches_tracked
                weights = (1 / module.num_batches_tracked).expand(count)
            else:
                keep = (1 - module.momentum) ** count
                order = torch.arange(count - 1, -1, -1, device=module.running_mean.device)
                weights = module.momentum * (1 - module.momentum) ** order.to(module.running_mean.dtype)
            for running, index in ((module.running_mean, 0), (module.running_var, 1)):
                sequence = torch.stack([call[index] for call in calls], 1).flatten(0, 1)  # [G * calls, C]
                running.mul_(keep).add_(weights.to(sequence.dtype) @ sequence)


@contextmanager
def _bare(module: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, the layer only normalises: gamma = 1, beta = 0, no activation. Yields the activation of timm's fused
    norm+act classes, to be applied behind the groups' own gamma and beta."""
    parameters, children = module._parameters, module._modules
    fills = {"weight": torch.ones_like, "bias": torch.zeros_like}
    bare = {n: fills[n](p.detach()) if n in fills and p is not None else p for n, p in parameters.items()}
    after = {n: child for n, child in children.items() if n in ("drop", "act") and child is not None}
    module.__dict__.update(_parameters=bare, _modules=children | dict.fromkeys(after, nn.Identity()))
    try:
        yield nn.Sequential(*after.values())
    finally:
        module.__dict__.update(_parameters=parameters, _modules=children)


def _joined(x: Tensor, shape: torch.Size) -> Tensor:
    """x.view(shape) that autograd does not call a view: an in-place activation behind a view would cost it a copy of
    the whole gradient."""
    return torch.ops.aten._unsafe_view(x, shape)


def _broadcast_shape(module: nn.Module, y: Tensor, affine: Tensor | None) -> tuple[int, ...]:
    """[G, 1, ...] so that the affine parameters [G, *shape] meet the output viewed as [G, m, ...]."""
    if affine is None:
        return ()
    if affine_dim(module) == 1:
        return (affine.shape[0], 1, affine.shape[1], *[1] * (y.dim() - 2))
    return (affine.shape[0], *[1] * (y.dim() - affine.dim() + 1), *affine.shape[1:])
