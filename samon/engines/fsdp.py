"""Two-pass steps of models that FSDP2 shards (`torch.distributed.fsdp.fully_shard`).

Where the perturbed parameters lie whole on every process (`ignored_params=`; `train.py --fsdp` does so for scope
`samon`), a step is what it is elsewhere, with three differences. Nothing is frozen: FSDP2 fixes `requires_grad` of the
gathered parameters when it first gathers them, and `torch.autograd.grad(inputs=...)` skips the weight gradients anyway.
The ascent pass sends no gradient and leaves gathered what its backward has gathered, so the second forward does not
gather it again. And nobody averages the gradients of whole parameters, which `average_gradients` does.

Where perturbed parameters are sharded, one perturbation is common to all processes: the ascent gradient is FSDP's own
averaged one, from a full backward pass.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from samon.compat import fsdp_param_groups
from samon.engines.ascent import all_reduce_mean
from samon.engines.closure import raise_no_gradient
from samon.engines.norm_stats import modules_of
from samon.engines.passes import changed
from samon.engines.sharded_tensors import is_cut
from samon.errors import refuse
from samon.sam import SAM


def _set(model: nn.Module | None, **values: bool) -> AbstractContextManager[None]:
    """Around what FSDP's parameter groups do like this. Its setters are public; what they were set to is not."""
    modules = [] if model is None else modules_of(model)
    states = [module._get_fsdp_state() for module in modules if isinstance(module, FSDPModule)]
    return changed({group: values for state in states for group in fsdp_param_groups(state)})


def ascending(model: nn.Module | None) -> AbstractContextManager[None]:
    """Around an ascent pass that differentiates with respect to whole parameters only."""
    return _set(model, reduce_grads=False, all_reduce_grads=False, reshard_after_backward=False)


def no_sync(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """As DistributedDataParallel's: gradients are added up here and sent with those of the next backward outside."""
    return lambda: _set(model, reduce_grads=False, all_reduce_grads=False)


def average_gradients(parameters: Iterable[Tensor], group: Any = None) -> None:
    """`.grad` of the parameters that lie whole on every process of a sharded model becomes the mean over them, in one
    message. Call it once an update, before clipping; FSDP averages the sharded ones itself."""
    if grads := [p.grad for p in parameters if not isinstance(p, DTensor) and p.grad is not None]:
        torch._foreach_copy_(grads, all_reduce_mean(grads, group))


def check(sam: SAM, *, reduce: str, groups: int, replay: bool, scaler: Any) -> None:
    """Raises:
    UserError: what a sharded model cannot honour, by name.
    """
    cut = any(is_cut(p) for p in sam.perturbed_parameters().values())
    sharded = "perturbed parameters are sharded (FSDP): "
    mistakes = {
        "replay keeps activations from module to module, across which FSDP gathers and frees parameters; pass "
        "replay=False (--no-replay)": replay and sam.selection.narrowed and sam.model is not None,
        f"{sharded}all processes share one perturbation of them; pass reduce='global' (--m-sharpness global), or leave "
        "them whole by fully_shard(ignored_params=...)": cut and (reduce != "global" or groups > 1),
        f"{sharded}float16 with a GradScaler is not supported; use bfloat16": cut and scaler is not None,
    }
    refuse(mistakes)


def climbing_gradients(
    sam: SAM, forwards: Sequence[Callable[[], Tensor]], sync: Callable[[], AbstractContextManager]
) -> tuple[Tensor, list[Tensor]]:
    """The first pass over sharded perturbed parameters: (the mean loss at w, [] and detached; the gradients of the mean
    over processes, sharded as the parameters are). `.grad` is as it was afterwards."""
    parameters = [p for group in sam.param_groups for p in group["params"]]
    before = [p.grad for p in parameters]
    losses = []
    try:
        for p in parameters:
            p.grad = None
        for i, forward in enumerate(forwards):
            with nullcontext() if i + 1 == len(forwards) else sync():
                loss = forward()
                (loss / len(forwards)).backward()
            losses.append(loss.detach())
        perturbed = sam.perturbed_parameters().values()
        if all(p.grad is None for p in perturbed):
            raise_no_gradient(sam)
        average_gradients(perturbed)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in perturbed]
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
    return torch.stack(losses).mean(), grads
