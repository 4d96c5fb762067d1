"""The SAM step: compute the gradient at w + eps. The base optimizer then applies it at w (Eqs. 3 and 5).

g = dL/dw at w, with respect to the perturbed parameters only
eps = rho T^2 g / ||T g||_2, or rho T sign(g) for the l_inf ball
h = dL/dw at w + eps, accumulated into `.grad`
w is restored bit for bit

T is the diagonal scaling of the chosen geometry (`samon.geometry`), 1 for plain SAM.
Equations and tables are those of Mueller et al., "Normalization Layers Are All That Sharpness-Aware Minimization Needs"
(NeurIPS 2023, arXiv 2306.04226). An engine runs the two passes of one step: `WholeBatch`, or a class of `samon.engines`
derived from it. These modules import this one, so functions here import them when they need them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Parameter

from samon import rng
from samon.checks import (
    as_losses,
    check_options,
    explained_errors,
    raise_no_gradient,
    refuse_weight_changes,
    require_sam,
)
from samon.compat import foreach_clone
from samon.contexts import modules_of, parameters_of, preserve_buffers, preserve_buffers_in_pass, requires_grad
from samon.sam import SAM, all_reduce_mean
from samon.scope import NamedParameters

Forward = Callable[[], Tensor]  # returns the mean loss of a batch
ContextFactory = Callable[[], AbstractContextManager[Any]]


@torch.compiler.disable  # in a compiled training step; a compiled model stays compiled
@torch.enable_grad()
def two_pass(
    optimizer: object,
    forward: Forward | Sequence[Forward],
    *,
    groups: int = 1,
    reduce: str = "device",
    no_sync: ContextFactory | None = None,
    scaler: GradScaler | None = None,
    bn_stats: str = "first",
    same_noise: bool = False,
    replay: bool = True,
    ascent_forward: Forward | None = None,
    loss_scale: float = 1.0,
) -> Tensor:
    """Accumulate the gradient at w + eps into `.grad`, leave w bit-exactly as it was, return the loss at w.

    The ascent pass computes g, the descent pass h. Neither waits for the GPU, except for checks in the first steps,
    and in every step with `ascent='aesam'`. A non-finite g makes `.grad` NaN on all processes, so a
    GradScaler, or a check of the gradient norm, skips the step.

    Args:
        optimizer: a SAM optimizer, or a wrapper around it (Lookahead, Accelerate's, Lightning's, Fabric's).
        forward: function that returns the mean loss of the batch (one element) and does not run backward; or a sequence
            of such functions for micro-batches, which share one perturbation and whose losses are averaged.
        groups: number G of equal sub-batches of consecutive samples, each with its own perturbation: m-sharpness with
            m = batch size / G.
        reduce: the perturbation follows the ascent gradient of this process (`device`), or its mean over all processes
            (`global`).
        no_sync: `no_sync` of DistributedDataParallel. The ascent pass then sends no gradients, and the descent pass
            sends them only after the last forward. FSDP2 does not need it.
        scaler: GradScaler (default: that of Accelerate's optimizer); the ascent gradient is unscaled before use.
        bn_stats: the pass that updates BatchNorm running statistics: `first`, `second` or `both`. With
            `ascent_forward`, `first` means `second`, which sees the whole batch. Layers outside the optimizer's model
            are always updated by both passes.
        same_noise: use the same dropout and stochastic-depth masks in both passes.
        replay: if the optimizer perturbs only late layers (`perturb`), run the layers before them once and reuse their
            outputs in the second pass.
        ascent_forward: function for the ascent pass in place of `forward`, usually the loss of a part of the batch.
        loss_scale: factor on the final gradient, 1/K for K accumulated calls.

    Returns:
        The loss at w, detached; if the step makes no pass at w (`ascent='previous'`), the loss at w + eps. `SAM.stats`
        has further values.

    Raises:
        UserError: an argument is invalid, or the model or this combination of arguments is not supported.
    """
    sam = require_sam(optimizer)
    scaler = scaler or getattr(optimizer, "scaler", None)  # Accelerate's `step` divides the gradients by its scale
    forwards = as_losses(forward)
    ascent_forwards = forwards if ascent_forward is None else as_losses(ascent_forward)
    partial_ascent = ascent_forward is not None
    options = StepOptions(len(forwards), partial_ascent, groups, reduce, no_sync, scaler, bn_stats, same_noise, replay)
    check_options(sam, options)
    with sam.sampled_parameters() as named, explained_errors(sam):
        engine = make_engine(sam, named, options)
        return _run_passes(engine, forwards, ascent_forwards, loss_scale)


def _run_passes(
    engine: "WholeBatch", forwards: list[Forward], ascent_forwards: list[Forward], loss_scale: float
) -> Tensor:
    """The algorithm at the top of this file, in the same order."""
    sam, loss, grads = engine.sam, None, None
    options = engine.options  # `make_engine` may have changed the caller's
    noise = rng.get_torch_state(engine.device) if options.same_noise else None
    if options.ascent_pass:
        # The ascent gradient: g = dL/dw at w (Eq. 3).
        loss, grads = engine.ascent_gradient(ascent_forwards)
        if options.reduce == "global" and dist.is_initialized():
            grads = all_reduce_mean(grads)
    # The perturbation: eps = rho T^2 g / ||T g|| (Eq. 5), None for a step at w; `finite` says whether g is.
    eps, finite = sam.step_perturbation(engine.named, grads, loss_scale, grouped=options.groups > 1)
    if noise is not None:
        rng.set_torch_state(noise, engine.device)
    # The descent gradient: h = dL/dw at w + eps, added to `.grad`. The weights are restored when the context ends.
    with nullcontext() if eps is None else engine.perturbed(eps):
        perturbed_loss = engine.descent_gradient(forwards, loss_scale, finite)
    if loss is None and all(p.grad is None for p in engine.named.values()):
        raise_no_gradient(sam)  # with an ascent pass, `ascent_gradient` has raised it already
    sam.stats |= {"loss": perturbed_loss} if loss is None else {"loss": loss, "loss_perturbed": perturbed_loss}
    return sam.stats["loss"]


@dataclass(frozen=True)
class StepOptions:
    """What selects the engine of a step: arguments of `two_pass`, described there, and three values more.

    Attributes:
        num_forwards: the number of micro-batches in `forward`.
        partial_ascent: whether `ascent_forward` is given.
        ascent_pass: whether this step takes the gradient at w. The ascent source (`SAM.ascent`) decides.
    """

    num_forwards: int = 1
    partial_ascent: bool = False
    groups: int = 1
    reduce: str = "device"
    no_sync: ContextFactory | None = None
    scaler: GradScaler | None = None
    bn_stats: str = "first"
    same_noise: bool = False
    replay: bool = True
    ascent_pass: bool = True


class WholeBatch:
    """The engine with one perturbation for the whole batch, from which the others derive.

    Args:
        named: the parameters that this step perturbs, by qualified name.

    Attributes:
        inputs: the tensors that the ascent gradient is taken with respect to: here, the perturbed parameters.
        modules: all modules of the optimizer's model, whose buffers only one pass may update.
        in_descent_pass: whether the second pass has begun.
    """

    def __init__(self, sam: SAM, named: NamedParameters, options: StepOptions):
        self.sam, self.named, self.options = sam, named, options
        self.inputs: list[Tensor] = list(named.values())
        self.device = self.inputs[0].device
        self.modules = modules_of(sam, sam.model)
        self.no_sync: ContextFactory = options.no_sync or nullcontext
        self.in_descent_pass = False

    # -- the algorithm -----------------------------------------------------------------------------------------------
    def ascent_gradient(self, forwards: Sequence[Forward]) -> tuple[Tensor, list[Tensor]]:
        """Run the first pass. Returns the mean loss at w (detached, shape []) and its unscaled gradients with respect
        to `inputs`; the gradient of an input that the loss does not depend on is zero."""
        losses: list[Tensor] = []
        total: list[Tensor] = []
        with self.ascent_pass():
            for forward in forwards:
                with self.no_sync():
                    with self.each_pass():
                        loss = forward()
                        grads = self.gradients(loss, self.inputs)
                    losses += self.graph_safe([loss.detach()])
                    pairs = zip(self.inputs, grads, strict=True)
                    filled = self.graph_safe([torch.zeros_like(x) if g is None else g for x, g in pairs])
                    total = [a + b for a, b in zip(total, filled, strict=True)] if total else filled
                    if any(g is None for g in grads):
                        from samon.engines.diagnostics import explain_missing_gradients

                        explain_missing_gradients(self.sam, self.named, grads, loss, forward)
        if len(losses) > 1:
            torch._foreach_div_(total, len(losses))
        return torch.stack(losses).mean(), total

    def descent_gradient(self, forwards: Sequence[Forward], loss_scale: float, finite: Tensor | None) -> Tensor:
        """Run the second pass: accumulate the gradient into `.grad`, NaN unless the ascent gradient was `finite`.
        Returns the mean loss (detached, shape [])."""
        losses: list[Tensor] = []
        scaler, self.in_descent_pass = self.options.scaler, True
        for i, forward in enumerate(forwards):
            # Only the last backward sends gradients. Backward is inside `each_pass`, too: checkpointed layers run their
            # forward again in it.
            sync = nullcontext() if i + 1 == len(forwards) else self.no_sync()
            with sync, refuse_weight_changes(self.sam, self.modules), self.each_pass():
                loss = forward()
                if not loss.requires_grad:
                    raise_no_gradient(self.sam)
                factor = torch.full_like(loss, loss_scale / len(forwards))
                scaled = loss * (factor if finite is None else torch.where(finite, factor, torch.nan))
                (scaled if scaler is None else scaler.scale(scaled)).backward()
            losses += self.graph_safe([loss.detach()])
        return torch.stack(losses).mean()

    # -- what other engines override ---------------------------------------------------------------------------------
    def gradients(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Dense, unscaled gradients of a loss of the first pass; None for inputs that the loss does not depend on."""
        if not loss.requires_grad:
            return [None] * len(inputs)
        scaler = self.options.scaler
        grads = torch.autograd.grad(loss if scaler is None else scaler.scale(loss), inputs, allow_unused=True)
        dense: list[Tensor | None] = [g.to_dense() if g is not None and g.is_sparse else g for g in grads]
        if scaler is None:
            return dense
        scale = scaler.scale(torch.ones((), device=loss.device))  # on the device; `get_scale` would wait for it
        return foreach(torch._foreach_div, dense, scale)

    def frozen_parameters(self) -> list[Parameter]:
        """Parameters that need no gradient in the first pass: all that this step does not perturb."""
        parameters = {id(p): p for p in self.sam.parameters()} | parameters_of(self.modules)
        perturbed = {id(p) for p in self.named.values()}
        return [p for key, p in parameters.items() if key not in perturbed]

    @contextmanager
    def ascent_pass(self) -> Iterator[None]:
        """Context of the first pass: only perturbed parameters require gradients, and buffers are restored at the end
        if only the second pass is to update them."""
        buffers = preserve_buffers(self.modules if self.options.bn_stats == "second" else [])
        frozen, trained = requires_grad(self.frozen_parameters(), False), requires_grad(self.named.values(), True)
        with frozen, trained, buffers:
            yield

    @contextmanager
    def perturbed(self, eps: list[Tensor]) -> Iterator[None]:
        """Context of the second pass: the weights are w + eps, and buffers are restored at the end if only the first
        pass was to update them."""
        restores = self.options.bn_stats == "first"
        buffers = preserve_buffers_in_pass(self.sam, self.modules) if restores else nullcontext()
        with buffers, self.sam.add_perturbation(self.named, eps):
            yield

    def each_pass(self) -> AbstractContextManager[None]:
        """Context of each forward and its backward, in both passes."""
        if not self.sam.arithmetic.cuda_graphs:
            return nullcontext()
        from samon.engines.cuda_graph import own_gradients

        return own_gradients(self.sam.parameters())

    def graph_safe(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Results of a run of the model; copies of them if the next run of its CUDA graphs would overwrite them."""
        return foreach_clone(tensors) if self.sam.arithmetic.cuda_graphs else list(tensors)


def foreach(
    function: Callable[..., Sequence[Tensor]], grads: Sequence[Tensor | None], factor: object
) -> list[Tensor | None]:
    """Apply `torch._foreach_div` or `_foreach_mul` with one factor to the gradients that are not None. Not in place:
    for a loss of a + b, autograd returns the same tensor as the gradient of both, or views of it."""
    given = [g for g in grads if g is not None]
    results = iter(function(given, factor) if given else ())
    return [None if g is None else next(results) for g in grads]


def make_engine(sam: SAM, named: NamedParameters, options: StepOptions) -> WholeBatch:
    """The engine of a step.

    Raises:
        UserError: the model or the optimizer does not support an option.
    """
    if not sam.ascent.needs_ascent_pass():  # then the descent pass is the only one
        options = replace(options, ascent_pass=False, groups=1, bn_stats="second", replay=False)
    if options.partial_ascent and options.bn_stats == "first":  # statistics are those of the whole batch
        options = replace(options, bn_stats="second")
    # Replay needs the same forward in both passes, and layers before the first perturbed one (`perturb` narrows).
    replay = options.replay and options.num_forwards == 1 and not options.partial_ascent
    replay = replay and sam.ascent.keep_probability == 1 and sam.selection.narrowed and sam.model is not None
    if sam.sharded:
        from samon.engines.fsdp import make_sharded_engine

        return make_sharded_engine(sam, named, options, replay)
    if options.groups > 1:
        from samon.engines.groups import PerGroup

        return PerGroup(sam, named, options)
    # Replayed layers do not run in the second pass, so they could not update their statistics there.
    if replay and options.bn_stats == "first":
        from samon.engines.replay import Replay

        return Replay(sam, named, options)
    return WholeBatch(sam, named, options)


def check_step(sam: SAM, options: StepOptions) -> None:
    """Raise the errors that `two_pass` raises for these options before its first forward. Trainers call this early."""
    check_options(sam, options)
    with sam.sampled_parameters() as named:
        make_engine(sam, named, options)
