"""The two passes as the caller runs them: `SAM.step(closure)`, `SAM.first_step()` and `SAM.second_step()`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from samon.checks import raise_no_gradient, refuse_weight_changes
from samon.contexts import modules_of, preserve_buffers_in_pass, requires_grad
from samon.engines.patches import graph_leaves, override_attrs
from samon.errors import UserError
from samon.sam import SAM
from samon.scope import NamedParameters

VERSION = "_samon_version"  # attribute of a gradient: its version counter when the closure was called


class GradientObserver:
    """Observe the gradients of `parameters` during a backward; nothing is read on the host unless old ones stay.

    Old gradients are marked with their version counter. Clearing one drops the marked tensor (`set_to_none`) or
    advances the counter (`zero_`), so a hook that runs right before a gradient is accumulated sees whether it will be
    added to an old one, even in another tensor (DDP moves gradients to new buckets). Afterwards this cannot be seen:
    adding advances the counter too. FSDP2 accumulates sharded gradients itself, without the hook; any old one of these
    that is still there counts as not cleared.
    """

    def __init__(self, parameters: list[Parameter]) -> None:
        self.parameters = parameters
        self.accumulated: set[Parameter] = set()
        self.old_norms: list[Tensor] = []  # [] each, of old gradients that were not cleared

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Around the backward."""
        nodes, handles = [], []
        for p in self.parameters:
            if p.grad is not None:
                setattr(p.grad, VERSION, p.grad._version)
                if p.requires_grad:
                    nodes.append(get_gradient_edge(p).node)  # a parameter does not keep its node alive
                    handles.append(nodes[-1].register_prehook(partial(self._before_accumulation, p)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_accumulation(self, p: Parameter, grads: object) -> None:
        if p not in self.accumulated:
            self._record_old(p, moved=True)
            self.accumulated.add(p)

    def _record_old(self, p: Parameter, moved: bool = False) -> None:
        version = getattr(p.grad, VERSION, None)
        if p.grad is None or (version is None and not moved):
            return
        if isinstance(p.grad, DTensor):
            self.old_norms.append(torch.ones(()))
        elif version in (None, p.grad._version):
            self.old_norms.append(p.grad.detach().norm())

    def received(self, p: Parameter) -> bool:
        """Whether the parameter has a gradient from the closure."""
        if p.grad is None or p in self.accumulated:
            return p.grad is not None
        version = getattr(p.grad, VERSION, None)
        return version is None or (isinstance(p.grad, DTensor) and version != p.grad._version)

    def check(self, sam: SAM, named: NamedParameters) -> None:
        """Raise UserError if the closure left gradients that are not zero, or no perturbed parameter received one."""
        for p in self.parameters:
            if p not in self.accumulated:
                self._record_old(p)
        if any(norm.item() != 0 for norm in self.old_norms):
            raise UserError(
                "earlier gradients were not cleared, and they were not taken at w + eps. Start a closure with "
                "optimizer.zero_grad(), and run no backward before step(closure); or call first_step(zero_grad=True). "
                "If a trainer accumulates micro-batches (Lightning's accumulate_grad_batches), optimize manually: "
                "samon.two_pass(..., loss_scale=1/K) for each of the K micro-batches, then step()"
            )
        if sam.ascent.keep_probability == 1 and not any(map(self.received, named.values())):
            raise_no_gradient(sam)

    def clear(self) -> None:
        """Clear the gradients for another run, to zeros or None as the closure or its caller did."""
        for p in self.parameters:
            if p.grad is not None and hasattr(p.grad, VERSION):
                p.grad.zero_()
            else:
                p.grad = None


@contextmanager
def record_foreign_gradients(own: set[int]) -> Iterator[dict[Tensor, Tensor | None]]:
    """During a run of a closure, record the `.grad` that leaves other than `own` (ids) have before its backward: those
    of another optimizer's parameters, which the closure may not clear. Any backward comes through one function of
    PyTorch, where the graph says which leaves there are."""
    gradients: dict[Tensor, Tensor | None] = {}
    original = torch.autograd.backward

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        roots = [tensors] if isinstance(tensors, Tensor) else tensors
        for leaf in graph_leaves(t.grad_fn for t in roots if isinstance(t, Tensor)):
            if id(leaf) not in own and leaf not in gradients:
                gradients[leaf] = None if leaf.grad is None else leaf.grad.clone()
        original(tensors, *args, **kwargs)

    with override_attrs({torch.autograd: {"backward": backward}}):
        yield gradients


def run_closure(sam: SAM, named: NamedParameters, closure: Callable[[], Any], filled: bool) -> Any:
    """Run the closure at w, at w + eps, or both, and leave the gradient of the last run; returns its first result.

    | the ascent source | `filled` | runs |
    |---|---|---|
    | needs an ascent pass | no | at w, at w + eps |
    | makes a single pass | no | at w + eps |
    | either | yes | once; if it computes gradients, again at w + eps |

    Args:
        named: the parameters that this step perturbs.
        filled: `two_pass` has filled the gradients of this update, so a closure that computes none runs once.

    Raises:
        UserError: it runs under inference mode, or `GradientObserver.check` rejects the closure.
    """
    if torch.is_inference_mode_enabled():
        raise UserError("step(closure) cannot run under torch.inference_mode(); call it outside")
    ascends = sam.ascent.needs_ascent_pass()
    untrained = [p for p in named.values() if not p.requires_grad]
    if untrained and dist.is_initialized():
        raise UserError("step(closure) does not average gradients of frozen parameters; use samon.two_pass")
    gradients = GradientObserver(sam.parameters())
    if not (ascends or filled):
        eps, _ = sam.step_perturbation(named, None)
        with nullcontext() if eps is None else sam.add_perturbation(named, eps), gradients.observe():
            loss = closure()
        gradients.check(sam, named)
        return loss
    own = set(map(id, gradients.parameters))
    with requires_grad(untrained, True), gradients.observe(), record_foreign_gradients(own) as foreign:
        loss = closure()
    if filled and not any(map(gradients.received, gradients.parameters)):
        return loss
    gradients.check(sam, named)
    grads = None
    if ascends:
        grads, sam.ascent.clean = [p.grad for p in named.values()], []
    eps, _ = sam.step_perturbation(named, grads)
    del grads  # not in memory together with those of the second run
    if eps is not None:
        gradients.clear()
        for leaf, grad in foreign.items():
            leaf.grad = grad
        modules = modules_of(sam, sam.model)
        buffers, perturbed = preserve_buffers_in_pass(sam, modules), sam.add_perturbation(named, eps)
        with buffers, perturbed, refuse_weight_changes(sam, modules):
            closure()
    return loss


@contextmanager
def manual_passes(sam: SAM) -> Iterator[None]:
    """Between the first and the second pass by the caller: the weights are at w + eps.

    Raises:
        UserError: no perturbed parameter has a gradient, or the ascent source makes a single pass; at the end,
            gradients of the first pass were not cleared, or the second pass computed none.
    """
    if sam.ascent.single_pass:
        raise UserError(f"ascent={sam.ascent.name!r} makes a single pass; use samon.two_pass or step(closure)")
    if sam.selection.perturb_frozen:
        raise UserError("first_step() finds no gradients of frozen parameters; use samon.two_pass or step(closure)")
    with sam.sampled_parameters() as named:
        grads = [p.grad for p in named.values()]
        if all(g is None for g in grads):
            raise_no_gradient(sam)
        eps, _ = sam.step_perturbation(named, grads if sam.ascent.needs_ascent_pass() else None)
        del grads  # not in memory together with those of the second pass
        gradients = GradientObserver(sam.parameters())
        perturbed = nullcontext() if eps is None else sam.add_perturbation(named, eps)
        with preserve_buffers_in_pass(sam, modules_of(sam, sam.model)), perturbed, gradients.observe():
            yield
    if not any(map(gradients.received, gradients.parameters)):
        raise UserError(
            "second_step() found no gradients at w + eps; run a backward pass between first_step(zero_grad=True) and "
            "second_step()"
        )
    gradients.check(sam, named)
