"""The two passes by a closure: `SAM.step(closure)`."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from samon.engines.norm_stats import kept
from samon.engines.sharded_tensors import refuse_flat
from samon.errors import UserError

if TYPE_CHECKING:
    from samon.sam import SAM

MARK = "_samon_version"  # of a gradient: its version counter when the closure was called


def raise_no_gradient(sam: "SAM") -> NoReturn:
    if sam.model is not None:
        refuse_flat(sam.model.parameters())
    raise UserError(
        f"the loss depends on no parameter that {sam.scope} perturbs: return it with its graph attached (a closure "
        "clears the gradients, then runs backward), and create the optimizer after the model's last change"
    )


class ClosureGradients:
    """Run a closure and observe the gradients of `parameters`; nothing is read on the host unless old ones stay.

    Old gradients are marked with their version counter. Clearing one drops the marked tensor (`set_to_none`) or
    advances the counter (`zero_`), so a hook that runs right before a gradient is accumulated sees whether it will be
    added to an old one, be it in another tensor (DDP moves gradients to new buckets). Afterwards it cannot be seen:
    adding advances the counter too. FSDP2 accumulates sharded gradients itself, without the hook; of these any old
    tensor that is still there counts as not cleared.
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.parameters = list(parameters)
        self.accumulated: set[Parameter] = set()
        self.old: list[Tensor] = []  # norms [] of old gradients that were not cleared

    def run(self, closure: Callable[[], Any]) -> Any:
        nodes, handles = [], []
        for p in self.parameters:
            if p.grad is not None:
                setattr(p.grad, MARK, p.grad._version)
                if p.requires_grad:
                    nodes.append(get_gradient_edge(p).node)  # a parameter does not keep its node alive
                    handles.append(nodes[-1].register_prehook(partial(self._before_accumulation, p)))
        try:
            return closure()
        finally:
            for handle in handles:
                handle.remove()

    def _before_accumulation(self, p: Parameter, grads: Any) -> None:
        if p not in self.accumulated:
            self._find_old(p, moved=True)
            self.accumulated.add(p)

    def _find_old(self, p: Parameter, moved: bool = False) -> None:
        mark = getattr(p.grad, MARK, None)
        if p.grad is None or (mark is None and not moved):
            return
        if isinstance(p.grad, DTensor):
            self.old.append(torch.ones(()))
        elif mark in (None, p.grad._version):
            self.old.append(p.grad.detach().norm())

    def received(self, p: Parameter) -> bool:
        """Whether the parameter has a gradient from the closure."""
        if p.grad is None or p in self.accumulated:
            return p.grad is not None
        mark = getattr(p.grad, MARK, None)
        return mark is None or (isinstance(p.grad, DTensor) and mark != p.grad._version)

    def check(self, sam: "SAM") -> None:
        """Raises:
        UserError: the closure did not clear old gradients that are not zero, or no perturbed parameter received one.
        """
        for p in self.parameters:
            if p not in self.accumulated:
                self._find_old(p)
        if any(norm.item() != 0 for norm in self.old):
            raise UserError(
                "step(closure) found gradients that the closure does not clear; they were not taken at w + eps. Call "
                "optimizer.zero_grad() at the start of the closure, and no backward before step. Where a trainer "
                "accumulates micro-batches (Lightning's accumulate_grad_batches), optimize manually: "
                "samon.two_pass(..., loss_scale=1/K) for each of the K micro-batches, then step()"
            )
        if sam.esam_beta == 1 and not any(map(self.received, sam.perturbed_parameters().values())):
            raise_no_gradient(sam)

    def clear(self) -> None:
        """Clear the gradients for another run as the closure does, or as the caller did: zeros or none."""
        for p in self.parameters:
            if p.grad is not None and hasattr(p.grad, MARK):
                p.grad.zero_()
            else:
                p.grad = None


def run_passes(sam: "SAM", closure: Callable[[], Any], filled: bool) -> Any:
    """Run the closure at w, at w + eps, or both, and leave the gradient of the last run; returns its first result.

    Args:
        filled: the gradients are those of this update already, if the closure computes none: a trainer's own closure
            after `two_pass`. Then it runs once.

    Raises:
        UserError: it runs under inference mode, or `ClosureGradients.check` finds that it is not a standard closure.
    """
    if torch.is_inference_mode_enabled():
        raise UserError("step(closure) cannot run under torch.inference_mode(); call it outside")
    ascent, climbs = sam.ascent, sam.ascent.climbs()
    gradients = ClosureGradients(p for group in sam.param_groups for p in group["params"])
    first: Any = None
    grads: list[Tensor | None] | None = None
    others = [p for p in sam.others() if p.grad is None]
    if climbs or filled:
        with sam.finding_modules():
            first = gradients.run(closure)
        if filled and not any(map(gradients.received, gradients.parameters)):
            return first
        gradients.check(sam)
        if climbs:
            named = sam.perturbed_parameters()
            grads, ascent.clean = [p.grad for p in named.values()], []
            ascent.note(named, grads)
    eps, _ = sam.displacement(grads)
    del grads  # not in memory beside those of the second run
    if not (climbs or filled):
        with nullcontext() if eps is None else sam.moved(eps):
            first = gradients.run(closure)
        gradients.check(sam)
    elif eps is not None:
        gradients.clear()
        for p in others:
            p.grad = None
        with kept(sam.modules()), sam.moved(eps):
            closure()
    return first
