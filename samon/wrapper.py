"""An optimizer around a base optimizer, which applies the gradient."""

import inspect
from typing import Any

import timm.optim
from torch.nn import Parameter
from torch.optim import Optimizer

from samon.errors import UserError


def _of_base(name: str) -> property:
    return property(lambda self: getattr(self.base, name), lambda self, value: setattr(self.base, name, value))


class OptimizerWrapper(Optimizer):
    """An optimizer around a base optimizer, which applies the gradient. Both share parameter groups, state, defaults
    and hooks of the state dict, so schedulers, gradient scalers, checkpoints and Lookahead see a plain optimizer.

    Args:
        name: name of this optimizer, for error messages.

    Attributes:
        replacement: arguments of `replace_base` if it was called.

    Raises:
        UserError: the base optimizer cannot be used.
    """

    param_groups: Any = _of_base("param_groups")
    state: Any = _of_base("state")
    defaults: Any = _of_base("defaults")

    def __init__(self, base: Optimizer, name: str) -> None:
        check_base(base, name)
        self.base, self.name = base, name
        self.replacement: dict[str, Any] | None = None
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
        """Replace the base optimizer, and give the new one the momentum of the old (`carry_momentum`).

        `state_dict` records the arguments, and `load_state_dict` of a new optimizer repeats the call.

        Args:
            opt: timm's name of the new optimizer.
            lr_ratio: factor on the learning rates of the parameter groups, which the scheduler still sets.
            options: further arguments of timm's factory, plain values. Weight decay stays that of the groups.

        Returns:
            The number of tensors whose momentum was carried.

        Raises:
            UserError: an argument is wrong, or the optimizer is inside Lookahead.
        """
        from samon.engines.handover import carry_momentum, create_base

        base = create_base(self, opt, lr_ratio, options)
        carried = carry_momentum(self.base, base)
        self.base = base
        self.replacement = {"opt": opt.lower(), "lr_ratio": float(lr_ratio), "options": options}
        return carried

    @property
    def lr_ratio(self) -> float:
        """Factor on the learning rates of the parameter groups."""
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
    if any(group.get("maximize") for group in base.param_groups):
        raise UserError(f"{name} has maximize=True, but eps raises what it maximizes; drop it and negate the loss")
    if getattr(base, "is_second_order", False):
        raise UserError(
            f"{name} needs second derivatives, which neither pass computes; choose a first-order base optimizer such "
            "as adamw"
        )
