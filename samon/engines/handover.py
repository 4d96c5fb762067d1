"""Handing over to another base optimizer (`SAM.replace_base`)."""

import math
from typing import Any

import timm.optim
import torch
from timm.optim.muon import _is_suitable_for_muon
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from samon.errors import UserError, reraise_as_user_error
from samon.wrapper import OptimizerWrapper, check_base

SGD = (torch.optim.SGD, timm.optim.SGDW)
ADAM = (torch.optim.Adam, torch.optim.AdamW, timm.optim.AdamWLegacy, timm.optim.NAdamW)
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
KEPT = {"lr", "weight_decay"}  # options of a parameter group that stay; the new optimizer sets the others


def create_base(sam: OptimizerWrapper, opt: str, lr_ratio: float, options: dict[str, Any]) -> Optimizer:
    """A new base optimizer for the parameter groups of `sam`, without state.

    Raises:
        UserError: an argument is wrong, or the optimizer is inside Lookahead.
    """
    old = sam.base
    if isinstance(lr_ratio, bool) or not isinstance(lr_ratio, (int, float)) or not 0 < lr_ratio < math.inf:
        raise UserError(f"lr_ratio must be a finite number > 0, got {lr_ratio!r}")
    if own := sorted(KEPT & options.keys()):
        raise UserError(f"the parameter groups keep their {' and '.join(own)} (lr_ratio scales the lr); do not pass it")
    if any("lookahead_step" in group for group in old.param_groups):
        raise UserError("Lookahead keeps its state in the base optimizer, which can then not be replaced; drop it")
    dropped = (old.defaults.keys() - KEPT) | {"step"}
    groups = [{key: value for key, value in group.items() if key not in dropped} for group in old.param_groups]
    peak = max(float(group.get("initial_lr", group["lr"])) for group in groups)
    with reraise_as_user_error(f"base optimizer {opt!r}"):
        if issubclass(timm.optim.get_optimizer_class(opt, bind_defaults=False), OptimizerWrapper):  # type: ignore[arg-type]
            raise UserError(f"{opt!r} is itself sharpness-aware; name a plain timm optimizer such as 'muon'")
        new = timm.optim.create_optimizer_v2(groups, opt, lr=lr_ratio * peak, **options)
    check_base(new, sam.name)
    new.defaults["lr"] = peak  # for groups that are added later
    vars(new).update({name: hooks for name, hooks in vars(old).items() if name.endswith("_hooks")})
    return new


@torch.no_grad()
def carry_momentum(old: Optimizer, new: Optimizer) -> int:
    """Fill the state of `new` from that of `old`; returns the number of tensors that got a momentum.

    m is the exponential mean of the gradients, which these optimizers keep:

    | optimizer | buffer | m |
    |---|---|---|
    | SGD, SGDW | `momentum_buffer`, a sum | (1 - momentum) / (1 - dampening) x buffer |
    | Lion | `exp_avg` | buffer |
    | Muon, AdaMuon: matrices | `momentum_buffer` | buffer |
    | Adam, AdamW, NAdamW; Muon's and AdaMuon's other tensors | `exp_avg` | buffer |

    The last row divides m by 1 - beta1^step, so m without its step count would be 1 / (1 - beta1) times too large in
    the first update. `step`, `exp_avg` and `exp_avg_sq` are therefore copied only within that row; after one of
    another row it starts without a state, and so do all other optimizers.
    """
    carried = 0
    for old_group, new_group in zip(old.param_groups, new.param_groups, strict=True):
        for p in new_group["params"]:
            source, target = momentum_of(old, old_group, p), momentum_of(new, new_group, p)
            state = old.state.get(p, {})
            if source is None or target is None or state.get(source[0]) is None:
                continue
            if not is_adam(new, new_group, p):
                new.state[p] = {target[0]: state[source[0]] * (source[1] / target[1])}
            elif is_adam(old, old_group, p) and not new_group.get("amsgrad"):
                new.state[p] = {key: state[key].clone() for key in ADAM_STATE}
                on_device = new_group.get("capturable") or new_group.get("fused")
                new.state[p]["step"] = state["step"].to(p.device if on_device else "cpu", copy=True)
            carried += p in new.state
    return carried


def momentum_of(optimizer: Optimizer, group: dict[str, Any], p: Parameter) -> tuple[str, float] | None:
    """The name of the momentum buffer, and the factor that makes it the exponential mean of the gradients; None for
    optimizers without one."""
    if isinstance(optimizer, SGD) and group["momentum"] and group["dampening"] != 1:
        return "momentum_buffer", (1 - group["momentum"]) / (1 - group["dampening"])
    if isinstance(optimizer, timm.optim.Muon) and not is_adam(optimizer, group, p):
        return "momentum_buffer", 1.0
    return ("exp_avg", 1.0) if isinstance(optimizer, (timm.optim.Lion, timm.optim.Muon, *ADAM)) else None


def is_adam(optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> bool:
    """Whether the optimizer updates this tensor by Adam's rule, as Muon does unless it is a matrix."""
    if isinstance(optimizer, timm.optim.Muon):
        return bool(group.get("use_fallback") or not group.get("use_muon", _is_suitable_for_muon(p)))
    return isinstance(optimizer, ADAM)
