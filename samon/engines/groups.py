"""m-sharpness in one batched pass: every group of m samples carries its own gamma + d_gamma[g], beta + d_beta[g].

Only normalization parameters are perturbed (scope `samon`), so a loop over G small batches needs no loop: the offsets d
are explicit tensors [G, *parameter shape], the gradient with respect to them holds every group's ascent gradient, and
BatchNorm, which couples samples, computes its statistics per group by folding the groups into the channels.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from samon.engines.cuda_graph import owned
from samon.engines.grouped_norm import Call, GroupedNorm
from samon.engines.norm_stats import kept
from samon.engines.passes import changed, frozen, gradients, refuse_checkpointing, unperturbed
from samon.errors import UserError
from samon.geometry import wide
from samon.sam import SAM
from samon.scope import affine_dim, looks_like_norm, norm_modules


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
        self.modules = sam.modules()
        self.frozen = [] if sam.distributed else unperturbed(sam, self.modules)
        # [module -> the (mean, variance) [G, C] of each call in the passes that count]
        self.statistics: dict[Any, list[Call]] = defaultdict(list)
        self.under_way = "first"
        for module in self.modules:
            if module.training and module._buffers and looks_like_norm(module):
                raise UserError(
                    f"groups={groups}: {type(module).__name__} is not known as a normalization layer and may compute "
                    f"statistics of the whole batch; samon.register_norm({type(module).__name__}, dim=...) says how"
                )
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
        batch_norm = isinstance(module, _BatchNorm)
        coupled = module.training and (batch_norm or dim is None)
        own = {name for name, p in module._parameters.items() if id(p) in self.perturbed}
        if not coupled and not own:
            return False
        counting = module.training and not batch_norm and getattr(module, "track_running_stats", False)
        if dim is None or counting or own - {"weight", "bias"} or "forward" in vars(module):
            raise UserError(
                f"groups={self.groups}: {type(module).__name__} {name!r} cannot be grouped; use groups=1 "
                "(--m-sharpness device) or another normalization layer"
            )
        return True

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the first pass."""
        with frozen(self.frozen), kept(self.modules if self.bn_stats == "second" else []):
            yield

    def gradients(self, loss: Tensor, scaler: Any) -> list[Tensor | None]:
        """Unscaled gradients of the first pass's loss with respect to `inputs`.

        Raises:
            UserError: the loss also depends on a perturbed parameter outside its layer's call: a loop would have each
                group's own value there.
        """
        found = gradients(loss, [*self.inputs, *self.perturbed.values()], scaler)
        for (name, _), grad in zip(self.sam.perturbed_parameters().items(), found[len(self.inputs) :], strict=True):
            if grad is not None:
                raise UserError(
                    f"groups={self.groups}: the loss depends on {name!r} outside the call of its layer (a penalty on "
                    "the parameters, or functional code that reads them), where the groups cannot have values of "
                    "their own; call the layer, use the optimizer's weight_decay, or groups=1 (--m-sharpness device)"
                )
        return found[: len(self.inputs)]

    @contextmanager
    def each_first(self) -> Iterator[None]:
        """Around each forward of the first pass, and around each of the second."""
        offsets = dict(zip(self.perturbed, self.inputs, strict=True))
        for layer in self.layers:
            layer.follow()
            layer.offsets = [offsets.get(id(p)) for p in layer.affine]
        try:
            with changed({layer.module: {"forward": layer.forward} for layer in self.layers}):
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
        with kept(self.modules if self.bn_stats == "first" else []):
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
