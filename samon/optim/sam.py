"""The sharpness-aware optimizer: a shell around any base optimizer that knows how to perturb the weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from samon.errors import UserError
from samon.optim.geometry import GEOMETRIES, ascend
from samon.optim.masks import Mask
from samon.optim.norm_stats import kept, running_statistics
from samon.optim.scope import Selection, select, select_bare

Grads = Mapping[str, Tensor | None] | Sequence[Tensor | None]


class SAM(Optimizer):
    """Sharpness-aware minimization over a selection of parameters (Eqs. 2 to 5).

    The base optimizer applies the gradient; this one shares its `param_groups`, `state` and `defaults`, so schedulers,
    gradient scalers, checkpoints and Lookahead see a plain optimizer. `samon.two_pass` is the fast way to fill `.grad`
    with the gradient at w + eps; `step(closure)` does the same for any trainer that passes a standard closure.

    Args:
        base: optimizer over all trained parameters.
        selection: the parameters to perturb.
        geometry: row of Table 9; `rho` radius of its ball; `eta` its constant (the row's own by default).
        mask: sparse perturbation of section 5.1.

    Attributes:
        stats: of the last step, as 0-dim tensors on the device: loss, loss_perturbed, eps_norm, ascent_grad_norm.

    Raises:
        UserError: rho or eta is negative.
    """

    def __init__(
        self,
        base: Optimizer,
        selection: Selection,
        *,
        rho: float,
        geometry: str = "",
        eta: float | None = None,
        mask: Mask | None = None,
    ):
        eta = GEOMETRIES[geometry].eta if eta is None else eta
        for name, value in (("rho", rho), ("eta", eta)):
            if not value >= 0:
                raise UserError(f"{name} must be zero or positive, got {value}")
        self.base, self.rho, self.eta, self.geometry, self.mask = base, float(rho), float(eta), geometry, mask
        trained = {id(p) for group in base.param_groups for p in group["params"]}
        selection.parameters = {n: p for n, p in selection.parameters.items() if id(p) in trained}
        self.selection = selection
        self.stats: dict[str, Tensor] = {}
        self.plan: Any = None  # the replay plan that samon.step keeps between steps
        super().__init__(base.param_groups, base.defaults)

    # -- one set of groups and one state with the base ---------------------------------------------------------------
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def scope(self) -> str:
        return self.selection.scope

    @property
    def model(self) -> torch.nn.Module | None:
        return self.selection.model

    @property
    def can_group(self) -> bool:
        """Whether each of several groups can carry its own copy of the perturbed parameters in one pass."""
        return self.scope == "samon" and self.model is not None and self.mask is None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the group to the base; those of its parameters that fall into the scope are perturbed from now on."""
        self.base.add_param_group(param_group)
        old, added = self.selection, {id(p) for p in self.base.param_groups[-1]["params"]}
        if old.model is not None:
            found = select(old.model, old.scope, old.perturb)
        else:
            found = select_bare(self.base.param_groups, old.scope, old.perturb)
        known = {id(p) for p in old.parameters.values()}
        if new := {n: p for n, p in found.parameters.items() if id(p) in added - known}:
            old.parameters |= new
            self.plan = None

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state if self.mask is None else {**state, "mask": self.mask.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state written by this class or by the base optimizer alone."""
        super().load_state_dict(state_dict)
        if self.mask is not None and "mask" in state_dict:
            self.mask.load_state_dict(state_dict["mask"], next(iter(self.selection.parameters.values())).device)

    def __getstate__(self) -> dict[str, Any]:
        return {k: self.__dict__[k] for k in ("base", "selection", "rho", "eta", "geometry", "mask", "defaults")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" not in state:  # from load_state_dict: new groups and state
            self.base.__setstate__(state)
            return
        self.stats, self.plan = {}, None
        super().__setstate__(state)

    # -- perturbation ------------------------------------------------------------------------------------------------
    def perturbed_parameters(self) -> dict[str, Parameter]:
        """The perturbed parameters that are trainable now, by qualified name."""
        return {name: p for name, p in self.selection.parameters.items() if p.requires_grad}

    def is_weight(self) -> list[bool]:
        """For `eleml2orig`: which perturbed tensors are weights, by their own name as in the authors' code."""
        return [name.rpartition(".")[2] == "weight" for name in self.perturbed_parameters()]

    @torch.no_grad()
    def perturbation(
        self, grads: Sequence[Tensor | None], grouped: bool = False
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """`(eps, ||T g||_2, finite)` for ascent gradients in the order of `perturbed_parameters`; a missing gradient
        counts as zero, and a non-finite one anywhere makes eps zero and `finite` (bool, []) false. With `grouped` the
        gradients have a leading dimension [G], and so has everything else."""
        weights = [_wide(p.detach()) for p in self.perturbed_parameters().values()]
        dense = [torch.zeros_like(w) if g is None else _wide(g) for w, g in zip(weights, grads, strict=True)]
        dense = dense if self.mask is None else self.mask(dense)
        eps, norm = ascend(self.geometry, weights, dense, self.rho, self.eta, self.is_weight(), grouped)
        finite = norm.isfinite()
        rows = [finite.view(-1, *[1] * (e.dim() - 1)) if grouped else finite for e in eps]
        return [torch.where(row, e, 0) for row, e in zip(rows, eps, strict=True)], norm, finite

    @contextmanager
    def perturbed(self, grads: Grads) -> Iterator[None]:
        """w + eps inside, w bit-exactly outside, also after an exception.

        Args:
            grads: ascent gradients by qualified name, or in the order of `perturbed_parameters`.
        """
        if isinstance(grads, Mapping):
            grads = [grads.get(name) for name in self.perturbed_parameters()]
        with self.moved(self.perturbation(grads)[0]), torch.enable_grad():
            yield

    @contextmanager
    def moved(self, eps: Sequence[Tensor]) -> Iterator[None]:
        """w + eps inside, w outside: the saved values are copied back, since (w + eps) - eps is not w."""
        parameters: list[Tensor] = list(self.perturbed_parameters().values())
        steps = [e.to(p.dtype) for e, p in zip(eps, parameters, strict=True)]
        with torch.no_grad():
            saved = [p.clone() for p in parameters]
            torch._foreach_add_(parameters, steps)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, saved)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The base step with the gradients that are there; with a closure, first the two passes that fill them.

        Args:
            closure: the standard one (zero the gradients, forward, backward, return the loss). It runs twice; the
                second run, at w + eps, leaves the gradient and does not update BatchNorm statistics.

        Returns:
            The loss at w, or None without a closure.
        """
        if closure is None:
            return self.base.step()
        with torch.enable_grad():
            loss = closure()
        grads = [None if p.grad is None else p.grad.clone() for p in self.perturbed_parameters().values()]
        buffers = [] if self.model is None else running_statistics(self.model)
        with kept(buffers), self.perturbed(grads):
            closure()
        self.base.step()
        return loss


def _wide(tensor: Tensor) -> Tensor:
    """float32 or wider: norms of half-precision gradients overflow."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def sam_of(optimizer: Any) -> SAM | None:
    """The SAM optimizer inside `optimizer` (itself, or below Lookahead); None where there is none."""
    while optimizer is not None and not isinstance(optimizer, SAM):
        optimizer = getattr(optimizer, "_base_optimizer", None)
    return optimizer
