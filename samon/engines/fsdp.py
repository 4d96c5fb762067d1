"""Two-pass steps of models that FSDP2 shards (`torch.distributed.fsdp.fully_shard`).

If the perturbed parameters are replicated (`ignored_params=`; `train.py --fsdp` does so for scope `samon`), a step
differs from others in three ways. Nothing is frozen: FSDP2 fixes `requires_grad` of the gathered parameters when it
first gathers them, and `torch.autograd.grad(inputs=...)` skips the weight gradients anyway. The ascent pass sends no
gradient, and its backward does not reshard, so the second forward gathers nothing again. FSDP does not average the
gradients of replicated parameters; `average_gradients` does.

If perturbed parameters are sharded, all processes share one perturbation: the ascent gradient is FSDP's own averaged
one, from a full backward pass. The arithmetic is elementwise and runs on the shards; only norms need communication.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from samon.checks import raise_no_gradient
from samon.compat import fsdp_param_groups
from samon.contexts import all_modules
from samon.engines.groups import PerGroup
from samon.engines.patches import override_attrs
from samon.errors import UserError
from samon.geometry import NormReduction
from samon.sam import SAM, all_reduce_mean
from samon.scope import NamedParameters
from samon.two_pass import Forward, StepOptions, WholeBatch

SHARDED = "perturbed parameters are sharded (FSDP): "


def _set(model: nn.Module | None, **values: bool) -> AbstractContextManager[None]:
    """Temporarily set attributes of FSDP's parameter groups. Its setters are public; the values before are not."""
    modules = [] if model is None else all_modules(model)
    states = [module._get_fsdp_state() for module in modules if isinstance(module, FSDPModule)]
    return override_attrs({group: values for state in states for group in fsdp_param_groups(state)})


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free gathered parameters, copies of weights that are about to change. A forward without a backward pass leaves
    those of the root, and `set_reshard_after_backward(False)` leaves all."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


def no_sync(model: nn.Module | None) -> Callable[[], AbstractContextManager[None]]:
    """Like DistributedDataParallel's: gradients accumulate inside and are sent with the next backward outside."""
    return lambda: _set(model, reduce_grads=False, all_reduce_grads=False)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average `.grad` of the replicated parameters of a sharded model over the processes, in one message. Call it once
    per update, before clipping; FSDP averages the sharded ones itself."""
    if grads := [p.grad for p in parameters if not isinstance(p, DTensor) and p.grad is not None]:
        torch._foreach_copy_(grads, all_reduce_mean(grads))


class Replicated(WholeBatch):
    """Replicated perturbed parameters in a model whose other parameters are sharded."""

    def __init__(self, sam: SAM, named: NamedParameters, options: StepOptions) -> None:
        super().__init__(sam, named, options)
        self.no_sync = options.no_sync or no_sync(sam.model)

    def frozen_parameters(self) -> list[Parameter]:
        return []

    @contextmanager
    def ascent_pass(self) -> Iterator[None]:
        with (
            _set(self.sam.model, reduce_grads=False, all_reduce_grads=False, reshard_after_backward=False),
            super().ascent_pass(),
        ):
            yield


class ReplicatedPerGroup(Replicated, PerGroup):
    """m-sharpness with replicated perturbed parameters."""


class Sharded(Replicated):
    """Sharded perturbed parameters: a full backward pass, whose gradients FSDP averages and shards."""

    def ascent_gradient(self, forwards: Sequence[Forward]) -> tuple[Tensor, list[Tensor]]:
        """The mean loss at w, [] and detached, and the gradients of the mean over processes, sharded as the parameters
        are. `.grad` is unchanged at the end."""
        parameters = self.sam.parameters()
        before = [p.grad for p in parameters]
        losses = []
        try:
            for p in parameters:
                p.grad = None
            with WholeBatch.ascent_pass(self), self.each_pass():
                for i, forward in enumerate(forwards):
                    with nullcontext() if i + 1 == len(forwards) else self.no_sync():
                        loss = forward()
                        (loss / len(forwards)).backward()
                    losses.append(loss.detach())
            perturbed = self.named.values()
            if all(p.grad is None for p in perturbed):
                raise_no_gradient(self.sam)
            average_gradients(perturbed)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in perturbed]
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
        return torch.stack(losses).mean(), grads


def make_sharded_engine(sam: SAM, named: NamedParameters, options: StepOptions, replay: bool) -> WholeBatch:
    """The engine of a step; UserError names what a sharded model does not support."""
    if replay:
        raise UserError(
            "replay keeps activations from module to module, across which FSDP gathers and frees parameters; pass "
            "replay=False (--no-replay)"
        )
    if not any(map(_shard_groups, named.values())):
        return (Replicated if options.groups == 1 else ReplicatedPerGroup)(sam, named, options)
    if options.reduce != "global" or options.groups > 1:
        raise UserError(
            f"{SHARDED}all processes share one perturbation of them; pass reduce='global' (--m-sharpness global), or "
            "replicate them with fully_shard(ignored_params=...)"
        )
    if not all(p.requires_grad for p in named.values()):
        raise UserError(f"{SHARDED}perturb_frozen needs the frozen ones replicated, by fully_shard(ignored_params=...)")
    if options.scaler is not None:
        raise UserError(f"{SHARDED}float16 with a GradScaler is not supported; use bfloat16")
    return Sharded(sam, named, replace(options, reduce="device"))  # FSDP averages


def check_sharded_parameters(sam: SAM, named: NamedParameters) -> None:
    """Raise UserError if the ascent source or the mask needs full tensors, and a perturbed parameter is sharded."""
    needs_full = sam.ascent.reads_gradients or sam.mask is not None
    if needs_full and any(map(_shard_groups, named.values())):
        what = f"ascent={sam.ascent.name!r} and gsam_alpha need" if sam.mask is None else "sparse perturbations need"
        raise UserError(f"{SHARDED}{what} full tensors")


def _shard_groups(tensor: Tensor) -> list[dist.ProcessGroup]:
    """The process groups across which a tensor is sharded; none for a replicated one."""
    if not isinstance(tensor, DTensor):
        return []
    mesh, placements = tensor.device_mesh, enumerate(tensor.placements)
    return [mesh.get_group(dim) for dim, placement in placements if not placement.is_replicate()]


def norm_reduction(tensors: Iterable[Tensor]) -> NormReduction:
    """The function from 2-norms [T] of local shards to those of the full tensors [T], in one message per process group:
    one for FSDP2, two if tensor parallelism shards some of them too. None if no tensor is sharded."""
    groups = [_shard_groups(t) for t in tensors]
    return partial(_reduce_norms, groups) if any(groups) else None


def _reduce_norms(groups: Sequence[Sequence[dist.ProcessGroup]], norms: Tensor) -> Tensor:
    squares = norms.square()
    for group in dict.fromkeys(chain.from_iterable(groups)):
        dist.all_reduce(total := squares.clone(), group=group)
        squares = torch.where(torch.tensor([group in g for g in groups], device=norms.device), total, squares)
    return torch.where(torch.tensor([bool(g) for g in groups], device=norms.device), squares.sqrt(), norms)
