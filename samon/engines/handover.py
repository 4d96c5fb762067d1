"""The base optimizer of SAM: which can be one, what both share, and handing over to another."""

import inspect
import math
from typing import Any

import timm.optim
import torch
from timm.optim.muon import _is_suitable_for_muon
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from samon.errors import UserError, reraise_as_user_error

SGD = (torch.optim.SGD, timm.optim.SGDW)
ADAM = (torch.optim.Adam, torch.optim.AdamW, timm.optim.AdamWLegacy, timm.optim.NAdamW)
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
KEPT = {"lr", "weight_decay"}  # options of a parameter group that stay; others are the new optimizer's


def _of_base(name: str) -> property:
    return property(lambda self: getattr(self.base, name), lambda self, value: setattr(self.base, name, value))


class OptimizerWrapper(Optimizer):
    """An optimizer around a base optimizer, which applies the gradient. Both share parameter groups, state, defaults
    and hooks of the state dict, so schedulers, gradient scalers, checkpoints and Lookahead see a plain optimizer.

    Args:
        name: of this optimizer, for errors.

    Attributes:
        replacement: arguments of `replace_base` if it was called.

    Raises:
        UserError: the base optimizer cannot be used.
    """

    replacement: dict[str, Any] | None = None
    param_groups: Any = _of_base("param_groups")
    state: Any = _of_base("state")
    defaults: Any = _of_base("defaults")

    def __init__(self, base: Optimizer, name: str) -> None:
        check_base(base, name)
        self.base, self.name = base, name
        self._init_instance()

    def _init_instance(self) -> None:
        """Initialize a new instance or a copy. `Optimizer.__init__` would empty the base's state and groups."""
        super().__setstate__({})
        vars(self).update({name: hooks for name, hooks in vars(self.base).items() if "state_dict" in name})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._init_instance()

    def parameters(self) -> list[Parameter]:
        """All parameters that the base optimizer updates."""
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the group to the base optimizer."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's own state, which it can load alone, and the arguments of `replace_base`."""
        state = self.base.state_dict()
        if self.replacement is not None:
            state["replacement"] = self.replacement
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state; UserError if it is that of another base optimizer, before or after `replace_base`."""
        stored, own = state_dict.get("replacement"), self.replacement
        if stored is not None and own is None:
            self.replace_base(stored["opt"], stored["lr_ratio"], **stored["options"])
        elif (stored and stored["opt"]) != (own and own["opt"]):
            what = f"after replace_base({stored['opt']!r})" if stored else "before replace_base"
            raise UserError(f"the state was saved {what}; create the optimizer anew to load it")
        self.base.load_state_dict(state_dict)

    def replace_base(self, opt: str, lr_ratio: float = 1.0, **options: Any) -> int:
        """Hand over to another base optimizer, with the momentum that both have (`carry_momentum`).

        `state_dict` records the arguments, with which `load_state_dict` of a new optimizer does the same first.

        Args:
            opt: timm's name of it.
            lr_ratio: it steps at this multiple of the groups' learning rates, which stay the scheduler's.
            options: further arguments of timm's factory, plain values. Weight decay stays that of the groups.

        Returns:
            The number of tensors whose momentum was carried.

        Raises:
            UserError: an argument is wrong, or the optimizer is inside Lookahead.
        """
        base = create_base(self, opt, lr_ratio, options)
        carried = carry_momentum(self.base, base)
        self.base = base
        self.replacement = {"opt": opt.lower(), "lr_ratio": float(lr_ratio), "options": options}
        return carried

    @property
    def lr_ratio(self) -> float:
        """What multiplies the groups' learning rates, whatever scheduler sets them."""
        return 1.0 if self.replacement is None else self.replacement["lr_ratio"]

    def step_base(self) -> Any:
        """The base step, at `lr_ratio` times the groups' learning rates."""
        if self.lr_ratio == 1:
            return self.base.step()
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = self.lr_ratio * group["lr"]
            return self.base.step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


def check_base(base: Optimizer, opt: str) -> None:
    """Raise UserError if two passes, with the optimizer name `opt`, do not work with this base optimizer."""
    name = type(base).__name__
    if isinstance(base, OptimizerWrapper | timm.optim.Lookahead):
        raise UserError(f"{name} cannot be the base optimizer; Lookahead goes around it: use lookahead_{opt}")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(
            f"{name} evaluates the loss several times in its step, which two passes do not cover; choose a base "
            "optimizer that applies a gradient, such as adamw"
        )
    if getattr(base, "is_second_order", False):
        raise UserError(
            f"{name} needs second derivatives, which neither pass computes; choose a first-order base optimizer such "
            "as adamw"
        )


def create_base(sam: OptimizerWrapper, opt: str, lr_ratio: float, options: dict[str, Any]) -> Optimizer:
    """A new base optimizer for the parameter groups of `sam`, without state.

    Raises:
        UserError: an argument is wrong, or the optimizer is inside Lookahead.
    """
    old = sam.base
    if isinstance(lr_ratio, bool) or not isinstance(lr_ratio, (int, float)) or not 0 < lr_ratio < math.inf:
        raise UserError(f"lr_ratio must be a finite number > 0, got {lr_ratio!r}")
    if own := sorted(KEPT & options.keys()):
        raise UserError(f"the parameter groups keep their {' and '.join(own)}; drop it here, and see lr_ratio")
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
    the first update. These therefore take `step`, `exp_avg` and `exp_avg_sq` from each other, and from the rows above
    nothing: they start as new. So do all other optimizers.
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
