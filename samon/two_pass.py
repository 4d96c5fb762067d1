"""The two-pass step: where the gradient is taken. How it is applied stays with the optimizer (Eqs. 3 and 5).

g = dL/dw at w, with respect to the perturbed parameters only
eps = rho T^2 g / ||T g||
h = dL/dw at w + eps, accumulated into `.grad`
w is restored bit for bit; the base optimizer applies h there
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
from samon.checks import as_losses, check_options, explained_errors, raise_no_gradient, require_sam
from samon.compat import foreach_clone
from samon.contexts import modules_of, parameters_of, preserve_buffers, record_modules, requires_grad
from samon.sam import SAM, all_reduce_mean
from samon.scope import Named

Forward = Callable[[], Tensor]
Context = Callable[[], AbstractContextManager[Any]]


@torch.enable_grad()
def two_pass(
    optimizer: object,
    forward: Forward | Sequence[Forward],
    *,
    groups: int = 1,
    reduce: str = "device",
    no_sync: Context | None = None,
    scaler: GradScaler | None = None,
    bn_stats: str = "first",
    same_noise: bool = False,
    replay: bool = True,
    ascent_forward: Forward | None = None,
    loss_scale: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Accumulate the gradient at w + eps into `.grad`, leave w bit-exactly as it was, return the loss at w.

    Nothing is read on the host (with half-precision weights once, in the first step). A non-finite ascent gradient
    gives NaN in `.grad`, so that a GradScaler or a check of the gradient norm skips the step on all processes.

    Args:
        optimizer: a SAM optimizer, or a wrapper around it (Lookahead, Accelerate's, Lightning's, Fabric's).
        forward: returns the mean loss, a tensor of one element, without running backward; or a sequence of forwards,
            micro-batches that share one perturbation (their losses are averaged).
        groups: m-sharpness: that many equal sub-batches of consecutive samples, each with its own perturbation.
        reduce: whose ascent gradient counts: this process's (`device`), or the mean over all processes (`global`).
        no_sync: DistributedDataParallel's method, for the ascent pass. FSDP2 needs none.
        scaler: GradScaler; the ascent gradient is unscaled before use.
        bn_stats: the pass that updates BatchNorm running statistics: `first`, `second` or `both`.
        same_noise: use the same dropout and stochastic-depth masks in both passes.
        replay: if `perturb` selects only late layers, reuse the activations before the first of them.
        ascent_forward: the loss for the ascent pass, over a part of the batch.
        loss_scale: factor on the final gradient, 1/K for K accumulated calls.
        process_group: for `reduce='global'`.

    Returns:
        The detached loss at w; at w + eps if the ascent source makes a single pass. `SAM.stats` has more.

    Raises:
        UserError: naming what this model or combination does not support.
    """
    sam = require_sam(optimizer)
    forwards = as_losses(forward)
    ascent_forwards = forwards if ascent_forward is None else as_losses(ascent_forward)
    partial_ascent = ascent_forward is not None
    options = StepOptions(len(forwards), partial_ascent, groups, reduce, no_sync, scaler, bn_stats, same_noise, replay)
    check_options(sam, options)
    with sam.sampled_parameters() as named, explained_errors(sam):
        engine = make_engine(sam, named, options)
        return _two_pass(engine, forwards, ascent_forwards, loss_scale, process_group)


def _two_pass(
    engine: "WholeBatch",
    forwards: list[Forward],
    ascent_forwards: list[Forward],
    loss_scale: float,
    process_group: dist.ProcessGroup | None,
) -> Tensor:
    sam, options, loss, grads = engine.sam, engine.options, None, None
    noise = rng.get_torch_state(engine.device) if options.same_noise else None
    if options.ascends:
        # The ascent gradient: g = dL/dw at w (Eq. 3).
        loss, grads = engine.ascent_gradient(ascent_forwards)
        if options.reduce == "global" and dist.is_initialized():
            grads = all_reduce_mean(grads, process_group)
    # The perturbation: eps = rho T^2 g / ||T g|| (Eq. 5).
    eps, finite = sam.ascend(engine.named, grads, loss_scale, grouped=options.groups > 1)
    if noise is not None:
        rng.set_torch_state(noise, engine.device)
    # The descent gradient: h = dL/dw at w + eps, added to `.grad`. The weights are restored when the context ends.
    with nullcontext() if eps is None else engine.perturbed(eps):
        perturbed_loss = engine.descent_gradient(forwards, loss_scale, finite)
    if loss is None and all(p.grad is None for p in engine.named.values()):
        raise_no_gradient(sam)
    sam.stats |= {"loss": perturbed_loss} if loss is None else {"loss": loss, "loss_perturbed": perturbed_loss}
    return sam.stats["loss"]


@dataclass(frozen=True)
class StepOptions:
    """The arguments of `two_pass` of these names, which choose the engine of a step.

    Attributes:
        forwards: the number of forwards.
        ascent_forward: whether there is one.
        ascends: this update takes the gradient at w; the ascent source decides.
    """

    forwards: int = 1
    ascent_forward: bool = False
    groups: int = 1
    reduce: str = "device"
    no_sync: Context | None = None
    scaler: GradScaler | None = None
    bn_stats: str = "first"
    same_noise: bool = False
    replay: bool = True
    ascends: bool = True


class WholeBatch:
    """Both passes of a step, with one perturbation for the whole batch. The other engines derive from it.

    Args:
        named: the parameters that this step perturbs.

    Attributes:
        inputs: what the ascent gradient is taken with respect to.
        descending: in the second pass.
    """

    def __init__(self, sam: SAM, named: Named, options: StepOptions):
        self.sam, self.named, self.options = sam, named, options
        self.inputs: list[Tensor] = list(named.values())
        self.device = self.inputs[0].device
        self.modules = modules_of(sam, sam.model)
        self.no_sync: Context = options.no_sync or nullcontext
        self.descending = False

    # -- the algorithm -----------------------------------------------------------------------------------------------
    def ascent_gradient(self, forwards: Sequence[Forward]) -> tuple[Tensor, list[Tensor]]:
        """The first pass: the mean loss at w, [] and detached, and its unscaled gradients with respect to `inputs`,
        zero for those that it does not depend on."""
        losses: list[Tensor] = []
        total: list[Tensor] = []
        with self.ascent_pass():
            for forward in forwards:
                with self.no_sync():
                    with self.each_pass():
                        loss = forward()
                        grads = self.gradients(loss, self.inputs)
                    losses += self.keep([loss.detach()])
                    pairs = zip(self.inputs, grads, strict=True)
                    dense = self.keep([torch.zeros_like(x) if g is None else g for x, g in pairs])
                    total = [a + b for a, b in zip(total, dense, strict=True)] if total else dense
                    if any(g is None for g in grads):
                        from samon.engines.diagnostics import explain_missing_gradients

                        explain_missing_gradients(self.sam, self.named, grads, loss, forward)
        if len(losses) > 1:
            torch._foreach_div_(total, len(losses))
        return torch.stack(losses).mean(), total

    def descent_gradient(self, forwards: Sequence[Forward], loss_scale: float, finite: Tensor | None) -> Tensor:
        """The second pass: accumulate into `.grad`, NaN if the ascent gradient was not finite; the mean loss, [] and
        detached."""
        losses: list[Tensor] = []
        scaler, self.descending = self.options.scaler, True
        for i, forward in enumerate(forwards):
            # Gradients are sent with the last one. The backward is inside: checkpointed layers rerun their forward.
            sync = nullcontext() if i + 1 == len(forwards) else self.no_sync()
            with sync, self.each_pass():
                loss = forward()
                if not loss.requires_grad:
                    raise_no_gradient(self.sam)
                factor = torch.full_like(loss, loss_scale / len(forwards))
                scaled = loss * (factor if finite is None else torch.where(finite, factor, torch.nan))
                (scaled if scaler is None else scaler.scale(scaled)).backward()
            losses += self.keep([loss.detach()])
        return torch.stack(losses).mean()

    # -- what other engines override ---------------------------------------------------------------------------------
    def gradients(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Dense, unscaled gradients of a loss of the first pass; None for inputs that it does not depend on."""
        if not loss.requires_grad:
            return [None] * len(inputs)
        scaler = self.options.scaler
        grads = torch.autograd.grad(loss if scaler is None else scaler.scale(loss), inputs, allow_unused=True)
        dense: list[Tensor | None] = [g.to_dense() if g is not None and g.is_sparse else g for g in grads]
        if scaler is not None:
            torch._foreach_div_([g for g in dense if g is not None], scaler.scale(torch.ones((), device=loss.device)))
        return dense

    def frozen_parameters(self) -> list[Parameter]:
        """Parameters without a gradient in the first pass: all that this step does not perturb."""
        parameters = {id(p): p for p in self.sam.parameters()} | parameters_of(self.modules)
        perturbed = {id(p) for p in self.named.values()}
        return [p for key, p in parameters.items() if key not in perturbed]

    @contextmanager
    def ascent_pass(self) -> Iterator[None]:
        """Around the first pass."""
        buffers = preserve_buffers(self.modules if self.options.bn_stats == "second" else [])
        parameters = requires_grad(self.frozen_parameters(), False), requires_grad(self.named.values(), True)
        with parameters[0], parameters[1], buffers, record_modules(self.sam, self.sam.model):
            yield

    @contextmanager
    def perturbed(self, eps: list[Tensor]) -> Iterator[None]:
        """Around the second pass: the weights are at w + eps."""
        modules = self.modules or modules_of(self.sam, self.sam.model)
        buffers = preserve_buffers(modules if self.options.bn_stats == "first" else [])
        with buffers, self.sam.add_perturbation(self.named, eps):
            yield

    def each_pass(self) -> AbstractContextManager[None]:
        """Around each forward and its backward, in both passes."""
        if not self.sam.arithmetic.cuda_graphs:
            return nullcontext()
        from samon.engines.cuda_graph import own_gradients

        return own_gradients(self.sam.parameters())

    def keep(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Results that outlive a run of the model: copies if the next run of a CUDA graph would overwrite them."""
        return foreach_clone(tensors) if self.sam.arithmetic.cuda_graphs else list(tensors)


def make_engine(sam: SAM, named: Named, options: StepOptions) -> WholeBatch:
    """The engine of a step.

    Raises:
        UserError: naming what the model or the optimizer does not support.
    """
    if not sam.ascent.needs_ascent_pass():
        options = replace(options, ascends=False, groups=1, bn_stats="second", replay=False)  # the only pass
    replay = options.replay and options.forwards == 1 and not options.ascent_forward
    replay = replay and sam.ascent.keep_probability == 1 and sam.selection.narrowed and sam.model is not None
    if sam.sharded:
        from samon.engines.fsdp import make_sharded_engine

        return make_sharded_engine(sam, named, options, replay)
    if options.groups > 1:
        from samon.engines.groups import PerGroup

        return PerGroup(sam, named, options)
    # Buffers are written by a pass that runs, so the second pass must not be the one that updates them.
    if replay and options.bn_stats == "first":
        from samon.engines.replay import Replay

        return Replay(sam, named, options)
    return WholeBatch(sam, named, options)


def check_step(sam: SAM, options: StepOptions) -> None:
    """Raise what `two_pass` with these options raises before its first forward: for trainers, before data are read."""
    check_options(sam, options)
    with sam.sampled_parameters() as named:
        make_engine(sam, named, options)
