"""m-sharpness in one batched pass: every group of m samples carries its own gamma + d_gamma[g], beta + d_beta[g].

Only normalization parameters are perturbed (scope `samon`), so a loop over G small batches needs no loop: the offsets d
are explicit tensors [G, *parameter shape], the gradient with respect to them holds every group's ascent gradient, and
BatchNorm, which couples samples, computes its statistics per group by folding the groups into the channels.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from samon.errors import UserError
from samon.optim.geometry import wide
from samon.optim.norm_stats import modules_of
from samon.optim.sam import SAM
from samon.optim.scope import affine_dim, norm_modules
from samon.step.captured import owned
from samon.step.grouped_norm import Call, GroupedNorm
from samon.step.passes import changed, frozen, refuse_checkpointing, unperturbed


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
        self.perturbed = {id(p): p for p in parameters}
        self.inputs = [wide(p.new_zeros(groups, *p.shape)).requires_grad_() for p in parameters]
        self.frozen = [*([] if sam.distributed else unperturbed(sam, modules_of(sam.model))), *parameters]
        # [module -> the (mean, variance) [G, C] of each call in the passes that count]
        self.statistics: dict[Any, list[Call]] = defaultdict(list)
        self.under_way = "first"
        modules = [m for name, m in norm_modules(sam.model).items() if self._is_grouped(name, m)]
        # Those of the last step where they still serve: new ones would not be what a compiled graph was made of.
        known = {layer.module: layer for layer in sam.grouped if layer.groups == groups}
        self.layers = [known[m] if m in known and known[m].serves(m) else GroupedNorm(m, groups) for m in modules]
        sam.grouped = self.layers
        if any(layer.own_statistics for layer in self.layers):
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
        offsets = dict(zip(self.perturbed, self.inputs, strict=True))
        for layer in self.layers:
            layer.offsets = [offsets.get(id(p)) for p in layer.affine]
        try:
            with changed({layer.module: layer.bare for layer in self.layers}):
                yield
            for layer in self.layers if self.bn_stats in (self.under_way, "both") else []:
                calls = [(owned(self.sam.captured, mean), owned(self.sam.captured, var)) for mean, var in layer.calls]
                self.statistics[layer.module] += calls
        finally:
            for layer in self.layers:
                layer.offsets, layer.calls = (None, None), ()

    each_second = each_first

    @contextmanager
    def second(self, eps: list[Tensor]) -> Iterator[None]:
        """Around the second pass, with the perturbations [G, *shape] as offsets."""
        self.inputs, self.under_way = eps, "second"
        self.sam.measure(eps, eps, grouped=True)
        yield
        self._update_running_statistics()

    @torch.no_grad()
    def _update_running_statistics(self) -> None:
        """Bring the running statistics to where a loop over the groups, two passes each, would have left them."""
        for module, calls in self.statistics.items():
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
