"""The base class of ascent sources (`ascent=`), which is also the default source: this batch's gradient."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from samon.errors import UserError
from samon.geometry import to_float32
from samon.scope import NamedParameters, Selection

Grads = Sequence[Tensor | None]  # in the order of the perturbed parameters
Tensors = list[Tensor]
BaseState = Mapping[Parameter, Mapping[str, Tensor]]


class AscentSource:
    """Where the direction of the perturbation comes from. This one is SAM (Eq. 3): g, this batch's gradient at w.

    Attributes:
        name: its value of `ascent=`; `former_name` is that of older checkpoints.
        single_pass: no update makes an ascent pass.
        needs_clean_grad: the methods below use g, the update's mean gradient at w.
        uses_final_gradient: what is applied or stored depends on h, the gradient at w + eps.
        has_state: tensors are carried from update to update.
        counts_updates: the number of updates decides what the next one does.
        keep_probability: fraction of the tensors that an update perturbs.
        updates: two-pass updates applied.
        used: a two-pass step has run since the optimizer's last step.
        corrected: `before_clipping` has been called for the current update.
    """

    name = former_name = "batch"
    single_pass = needs_clean_grad = uses_final_gradient = has_state = counts_updates = False
    keep_probability = 1.0

    def __init__(self) -> None:
        self.updates, self.used, self.corrected = 0, False, False
        self.clean: list[Tensor] = []  # g of the current update
        self.state: dict[str, Tensor] = {}  # by parameter name
        self.moments: list[Tensor] = []  # of AE-SAM
        self.total: int | None = None  # updates of the whole training, if known

    def check(self, mask: object | None, selection: Selection) -> None:
        """Raise UserError if the source does not combine with the mask or the frozen parameters of an optimizer."""
        if mask is not None and self.keep_probability < 1:
            raise UserError("esam_beta samples other tensors at every update, so it does not combine with a mask")
        if selection.perturb_frozen and self.uses_final_gradient:
            raise UserError(
                "perturb_frozen excludes ascent sources that use the gradient at w + eps, which frozen parameters do "
                "not have; use ascent='batch' or 'fsam', without gsam_alpha"
            )

    @property
    def reads_gradients(self) -> bool:
        """Whether the update's gradients are read or changed before the base optimizer's step."""
        return self.needs_clean_grad or self.has_state

    def needs_ascent_pass(self) -> bool:
        """Whether the current update takes the gradient at w first."""
        return not self.single_pass

    def sample(self, named: NamedParameters) -> NamedParameters:
        """The parameters that the current update perturbs."""
        return named

    def direction(self, named: NamedParameters, grads: Grads | None, base_state: BaseState) -> Grads | None:
        """The direction of the perturbation, in the order of `named`; None for a step at w.

        Args:
            grads: g; None if the update makes no ascent pass.
            base_state: the base optimizer's state by parameter.
        """
        return grads

    def accumulate_clean_grad(self, grads: Tensors, weight: float | Tensor) -> None:
        """Add weight * g of a micro-batch to the update's mean gradient at w."""
        terms = [weight * to_float32(g) for g in grads]
        self.clean = [a + b for a, b in zip(self.clean, terms, strict=True)] if self.clean else terms

    def before_clipping(self, named: NamedParameters) -> None:
        """Before the gradients are clipped: change `.grad` if the method says so, or measure it. `clean` is the mean
        over the update's samples on all processes, empty if there was no ascent pass."""

    def before_step(self, named: NamedParameters, base_state: BaseState) -> None:
        """Just before the base optimizer's step: store what the next update needs."""

    def finish_update(self) -> None:
        """Count the current update, which the base optimizer's step applies."""
        self.updates += self.used
        self.discard_update()

    def discard_update(self) -> None:
        """Forget an update that is not applied."""
        self.used, self.corrected, self.clean = False, False, []

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.name, "updates": self.updates, "kept": dict(self.state), "moments": list(self.moments)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Load the state of the same source; that of another one is ignored."""
        if state["source"] in (self.name, self.former_name):
            self.updates = state["updates"]
            self.state = {name: tensor.to(device) for name, tensor in state["kept"].items()}
            self.moments = [tensor.to(device) for tensor in state["moments"]]
