"""m-sharpness in one batched pass: each group of m samples has its own gamma + d_gamma[g], beta + d_beta[g].

It replaces a loop over G small batches, which is possible because only normalization parameters are perturbed (scope
`samon`). The offsets d are tensors [G, *parameter shape]; the gradient with respect to them contains every group's
ascent gradient. BatchNorm, which couples samples, computes statistics per group by folding the groups into the
channels.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from samon.contexts import preserve_buffers
from samon.engines.grouped_norm import HALF, GroupedNorm
from samon.engines.patches import override_attrs
from samon.errors import UserError
from samon.geometry import to_float32
from samon.sam import SAM
from samon.scope import NamedParameters, affine_dim, looks_like_norm, norm_modules
from samon.two_pass import StepOptions, WholeBatch, foreach

# Layers of the last step, reused while they fit, because compiled graphs refer to them.
LAYERS: WeakKeyDictionary[SAM, list[GroupedNorm]] = WeakKeyDictionary()


class PerGroup(WholeBatch):
    """One perturbation per group: normalization layers have one set of affine parameters for each.

    Attributes:
        groups: G, equal groups of consecutive samples in the leading dimension.
        inputs: the offsets [G, *parameter shape], in float32 or wider, so that no half-precision sum rounds them away.

    Raises:
        UserError: a layer or the scope cannot be grouped.
    """

    def __init__(self, sam: SAM, named: NamedParameters, options: StepOptions):
        groups = self.groups = options.groups
        if not sam.can_group:
            raise UserError(
                f"groups={groups} needs a copy of the perturbed parameters per group, which is possible only for scope "
                f"samon, created from a model (this is scope {sam.scope}); loop over the sub-batches instead"
            )
        assert sam.model is not None
        super().__init__(sam, named, options)
        self.perturbed_ids = {id(p): None for p in named.values()}  # in order
        self.inputs = [to_float32(p.new_zeros(groups, *p.shape)).requires_grad_() for p in named.values()]
        # Per module the (mean, variance), [G, C] each, of every call in the passes that count.
        self.statistics: dict[Any, list[Sequence[Tensor]]] = defaultdict(list)
        for module in self.modules:
            if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
                raise UserError(
                    f"groups={groups} divides the first dimension, which is not that of the samples around an "
                    "nn.MultiheadAttention with batch_first=False; build the model with batch_first=True"
                )
            if module.training and module._buffers and looks_like_norm(module):
                raise UserError(
                    f"groups={groups}: {type(module).__name__} is not known as a normalization layer and may compute "
                    f"statistics of the whole batch; call samon.register_norm({type(module).__name__}, dim=...)"
                )
        modules = [m for name, m in norm_modules(sam.model).items() if self._needs_grouping(name, m)]
        known = {layer.module: layer for layer in LAYERS.get(sam, []) if layer.groups == groups}
        self.layers = [known[m] if m in known and known[m].fits(m) else GroupedNorm(m, groups) for m in modules]
        LAYERS[sam] = self.layers
        if any(layer.own_statistics for layer in self.layers):
            refuse_checkpointing(sam.model, f"groups={groups} computes BatchNorm statistics once")

    def _needs_grouping(self, name: str, module: nn.Module) -> bool:
        """Whether the layer is perturbed, or is a BatchNorm that computes statistics of the batch."""
        dim = affine_dim(module)
        batch_norm = isinstance(module, _BatchNorm)
        couples_samples = module.training and (batch_norm or dim is None)
        perturbed = {name for name, p in module._parameters.items() if id(p) in self.perturbed_ids}
        if not couples_samples and not perturbed:
            return False
        other_statistics = module.training and not batch_norm and getattr(module, "track_running_stats", False)
        if dim is None or other_statistics or perturbed - {"weight", "bias"} or "forward" in vars(module):
            raise UserError(
                f"groups={self.groups}: {type(module).__name__} {name!r} cannot be grouped; use groups=1 "
                "(--m-sharpness device) or another normalization layer"
            )
        return True

    def gradients(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of each group's own loss with respect to its offsets: G times those of the mean loss.

        Raises:
            UserError: the loss also depends on a perturbed parameter outside its layer's call: a loop would have each
            group's own value there.
        """
        grads = super().gradients(loss, [*inputs, *self.named.values()])
        for name, grad in zip(self.named, grads[len(inputs) :], strict=True):
            if grad is not None:
                raise UserError(
                    f"groups={self.groups}: the loss depends on {name!r} outside the call of its layer (a penalty on "
                    "the parameters, or functional code that reads them), where the groups cannot have values of "
                    "their own; call the layer, use the optimizer's weight_decay, or groups=1 (--m-sharpness device)"
                )
        return foreach(torch._foreach_mul, grads[: len(inputs)], self.groups)

    @contextmanager
    def each_pass(self) -> Iterator[None]:
        """Replace the forwards of the layers, with the current `inputs` as offsets."""
        offsets = dict(zip(self.perturbed_ids, self.inputs, strict=True))
        for layer in self.layers:
            layer.sync_attributes()
            layer.offsets = [offsets.get(id(p)) for p in layer.affine]
        try:
            forwards = override_attrs({layer.module: {"forward": layer.forward} for layer in self.layers})
            with super().each_pass(), forwards:
                yield
            counts = self.options.bn_stats in ("second" if self.in_descent_pass else "first", "both")
            for layer in self.layers if counts else []:
                self.statistics[layer.module] += [self.graph_safe(call) for call in layer.calls]
        finally:
            for layer in self.layers:
                layer.offsets, layer.calls = (None, None), ()

    @contextmanager
    def perturbed(self, eps: list[Tensor]) -> Iterator[None]:
        """Around the second pass, with eps [G, *shape] as offsets; the running statistics are updated at the end."""
        self.inputs = eps
        self.sam.record_perturbation(self.named, eps)
        with preserve_buffers(self.modules if self.options.bn_stats == "first" else []):
            yield
        self._update_running_statistics()

    @torch.no_grad()
    def _update_running_statistics(self) -> None:
        """Update the running statistics as a loop over the groups would have."""
        for module, calls in self.statistics.items():
            if not calls or module.running_mean is None:
                continue
            count = self.groups * len(calls)
            module.num_batches_tracked += count
            if module.momentum is None:  # cumulative average over all batches
                keep = (module.num_batches_tracked - count) / module.num_batches_tracked
                weights = (1 / module.num_batches_tracked).expand(count)
            else:
                keep = (1 - module.momentum) ** count
                order = torch.arange(count - 1, -1, -1, device=module.running_mean.device)
                weights = module.momentum * (1 - module.momentum) ** order.to(module.running_mean.dtype)
            for running, index in ((module.running_mean, 0), (module.running_var, 1)):
                sequence = torch.stack([call[index] for call in calls], 1).flatten(0, 1)  # [G * calls, C]
                running.mul_(keep).add_((weights / HALF).to(sequence.dtype) @ sequence)


def refuse_checkpointing(model: nn.Module, purpose: str) -> None:
    """Raise UserError if the model recomputes its forward in the backward pass (timm's `set_grad_checkpointing`)."""
    for name, module in model.named_modules():
        if getattr(module, "grad_checkpointing", False) is True:
            raise UserError(
                f"{purpose}, but gradient checkpointing is on in {name or type(module).__name__!r} and runs the "
                "forward again; turn one of the two off"
            )
