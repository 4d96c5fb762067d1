"""The two-pass step: where the gradient is taken. How it is applied stays with the optimizer (Eqs. 3 and 5).

g = dL/dw at w, with respect to the perturbed parameters only
eps = rho T^2 g / ||T g||
h = dL/dw at w + eps, accumulated into `.grad`
w is restored bit for bit; the base optimizer applies h there
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from samon import rng
from samon.contexts import frozen, modules_of, preserve_buffers, record_modules, trainable
from samon.errors import UserError
from samon.sam import SAM, all_reduce_mean, sam_of
from samon.scope import Named, refuse_fsdp1

Forward = Callable[[], Tensor]
Context = Callable[[], AbstractContextManager[Any]]
BN_STATS = ("first", "second", "both")  # the pass that updates running statistics


@torch.enable_grad()
def two_pass(
    optimizer: Any,
    forward: Forward | Sequence[Forward],
    *,
    groups: int = 1,
    reduce: str = "device",
    no_sync: Context | None = None,
    scaler: Any = None,
    bn_stats: str = "first",
    same_noise: bool = False,
    replay: bool = True,
    ascent_forward: Forward | None = None,
    loss_scale: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
    ascent: str | None = None,
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
        ascent: the source of the ascent direction (`samon.engines.ascent`) from now on; default: the optimizer's own.

    Returns:
        The detached loss at w; at w + eps if the ascent source makes a single pass. `SAM.stats` has more.

    Raises:
        UserError: naming what this model or combination does not support.
    """
    sam = _prepare_optimizer(optimizer, ascent)
    forwards = _as_losses(forward)
    ascent_forwards = forwards if ascent_forward is None else _as_losses(ascent_forward)
    _check_arguments(sam, len(forwards), groups, reduce, bn_stats, ascent_forward is not None)
    with sam.sampled_parameters() as named, _explained_errors(sam):
        ascent_pass = sam.ascent.needs_ascent_pass()
        replay = replay and ascent_forward is None and len(forwards) == 1
        engine = _make_engine(sam, named, ascent_pass, groups, reduce, bn_stats, replay, same_noise, scaler)
        engine.no_sync, engine.scaler = no_sync or engine.no_sync, scaler
        average = partial(all_reduce_mean, group=process_group) if reduce == "global" else None
        return _two_pass(engine, forwards, ascent_forwards if ascent_pass else [], loss_scale, average, same_noise)


def check_step(
    optimizer: Any,
    *,
    forwards: int = 1,
    groups: int = 1,
    reduce: str = "device",
    bn_stats: str = "first",
    ascent_forward: bool = False,
    replay: bool = True,
    scaler: Any = None,
) -> None:
    """Raise what `two_pass` with these arguments raises before its first forward: for trainers, before data are read.

    Args:
        forwards: the number of forwards.
        ascent_forward: whether there is one.
    """
    sam = _prepare_optimizer(optimizer, None)
    _check_arguments(sam, forwards, groups, reduce, bn_stats, ascent_forward)
    with sam.sampled_parameters() as named:
        replay = replay and not ascent_forward and forwards == 1
        _make_engine(sam, named, sam.ascent.needs_ascent_pass(), groups, reduce, bn_stats, replay, False, scaler)


def _two_pass(
    engine: "WholeBatch",
    forwards: list[Forward],
    ascent_forwards: list[Forward],
    loss_scale: float,
    average: Callable[[list[Tensor]], list[Tensor]] | None,
    same_noise: bool,
) -> Tensor:
    sam, loss, grads = engine.sam, None, None
    noise = rng.get_torch_state(engine.device) if same_noise else None
    if ascent_forwards:
        # The ascent gradient: g = dL/dw at w (Eq. 3).
        loss, grads = engine.ascent_gradient(ascent_forwards)
        if average is not None and dist.is_initialized() and not engine.averages_gradients:
            grads = average(grads)
        if sam.ascent.needs_clean_grad:
            mean = [g.mean(0) for g in grads] if engine.groups > 1 else grads
            sam.ascent.accumulate_clean_grad(mean, loss_scale)
    # The perturbation: eps = rho T^2 g / ||T g|| (Eq. 5).
    eps, finite = sam.ascend(engine.named, grads, grouped=engine.groups > 1)
    if noise is not None:
        rng.set_torch_state(noise, engine.device)
    # The descent gradient: h = dL/dw at w + eps, added to `.grad`. The weights are restored when the context ends.
    with nullcontext() if eps is None else engine.perturbed(eps):
        perturbed_loss = engine.descent_gradient(forwards, loss_scale, finite)
    if loss is None and all(p.grad is None for p in engine.named.values()):
        raise_no_gradient(sam)
    sam.stats |= {"loss": perturbed_loss} if loss is None else {"loss": loss, "loss_perturbed": perturbed_loss}
    return sam.stats["loss"]


class WholeBatch:
    """Both passes of a step, with one perturbation for the whole batch. The other engines derive from it.

    Args:
        named: the parameters that this step perturbs.

    Attributes:
        inputs: what the ascent gradient is taken with respect to.
        groups: perturbations per batch.
        averages_gradients: the ascent gradient is the mean over all processes already.
    """

    groups = 1
    averages_gradients = False
    no_sync: Context = nullcontext
    scaler: Any = None

    def __init__(self, sam: SAM, named: Named, bn_stats: str = "first"):
        self.sam, self.named, self.bn_stats = sam, named, bn_stats
        self.inputs: list[Tensor] = list(named.values())
        self.device = self.inputs[0].device
        self.modules = modules_of(sam, sam.model)
        # The next run of a CUDA graph overwrites the outputs of this one.
        self.keep: Callable[[Tensor], Tensor] = torch.clone if sam.arithmetic.cuda_graphs else _identity

    # -- the algorithm -----------------------------------------------------------------------------------------------
    def ascent_gradient(self, forwards: Sequence[Forward]) -> tuple[Tensor, list[Tensor]]:
        """The first pass: the mean loss at w, [] and detached, and its unscaled gradients with respect to `inputs`,
        zero for those that it does not depend on."""
        losses: list[Tensor] = []
        total: list[Tensor] = []
        incomplete: list[tuple[list[Tensor | None], Tensor, Forward]] = []
        with self.ascent_pass():
            for forward in forwards:
                with self.no_sync(), self.each_ascent():
                    loss = forward()
                    grads = self.gradients(loss)
                if any(g is None for g in grads):
                    incomplete.append((grads, loss, forward))
                losses.append(self.keep(loss.detach()))
                pairs = zip(self.inputs, grads, strict=True)
                dense = [torch.zeros_like(x) if g is None else self.keep(g) for x, g in pairs]
                total = [a + b for a, b in zip(total, dense, strict=True)] if total else dense
        for grads, loss, forward in incomplete:
            from samon.engines.diagnostics import explain_missing_gradients

            with self.no_sync():
                explain_missing_gradients(self.sam, self.named, grads, loss, forward)
        if len(losses) > 1:
            torch._foreach_div_(total, len(losses))
        if self.groups > 1:  # the loss is the mean over groups; each group's own loss depends on its offsets alone
            torch._foreach_mul_(total, self.groups)
        return torch.stack(losses).mean(), total

    def descent_gradient(self, forwards: Sequence[Forward], loss_scale: float, finite: Tensor | None) -> Tensor:
        """The second pass: accumulate into `.grad`, NaN if the ascent gradient was not finite; the mean loss, [] and
        detached."""
        losses = []
        for i, forward in enumerate(forwards):
            # Gradients are sent with the last one. The backward is inside: checkpointed layers rerun their forward.
            sync = nullcontext() if i + 1 == len(forwards) else self.no_sync()
            with sync, self.each_descent():
                loss = forward()
                if not loss.requires_grad:
                    raise_no_gradient(self.sam)
                factor = torch.full_like(loss, loss_scale / len(forwards))
                scaled = loss * (factor if finite is None else torch.where(finite, factor, torch.nan))
                (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            losses.append(self.keep(loss.detach()))
        return torch.stack(losses).mean()

    # -- what other engines override ---------------------------------------------------------------------------------
    def gradients(self, loss: Tensor) -> list[Tensor | None]:
        """Unscaled gradients of a loss of the first pass with respect to `inputs`."""
        return unscaled_gradients(loss, self.inputs, self.scaler)

    def frozen_parameters(self) -> list[Parameter]:
        """Parameters without a gradient in the first pass."""
        return unperturbed_parameters(self.sam, self.named, self.modules)

    @contextmanager
    def ascent_pass(self) -> Iterator[None]:
        """Around the first pass."""
        buffers = preserve_buffers(self.modules if self.bn_stats == "second" else [])
        with frozen(self.frozen_parameters()), trainable(self.named.values()), buffers:
            yield

    @contextmanager
    def perturbed(self, eps: list[Tensor]) -> Iterator[None]:
        """Around the second pass: the weights are at w + eps."""
        modules = self.modules or modules_of(self.sam, self.sam.model)
        with preserve_buffers(modules if self.bn_stats == "first" else []), self.sam.add_perturbation(self.named, eps):
            yield

    def each_ascent(self) -> AbstractContextManager[None]:
        """Around each forward of the first pass."""
        if self.sam.arithmetic.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return record_modules(self.sam, self.sam.model)

    def each_descent(self) -> AbstractContextManager[None]:
        """Around each forward and backward of the second pass."""
        if not self.sam.arithmetic.cuda_graphs:
            return nullcontext()
        from samon.engines.cuda_graph import own_gradients

        torch.compiler.cudagraph_mark_step_begin()
        return own_gradients(p for group in self.sam.param_groups for p in group["params"])


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _make_engine(
    sam: SAM,
    named: Named,
    ascent_pass: bool,
    groups: int,
    reduce: str,
    bn_stats: str,
    replay: bool,
    same_noise: bool,
    scaler: Any,
) -> WholeBatch:
    if not ascent_pass:
        groups, bn_stats, replay = 1, "second", False  # the only pass
    replay = replay and sam.ascent.keep_probability == 1
    if sam.sharded:
        from samon.engines import fsdp

        return fsdp.make_engine(sam, named, groups, reduce, bn_stats, replay, scaler)
    if groups > 1:
        from samon.engines.groups import PerGroup

        return PerGroup(sam, named, groups, bn_stats)
    # Buffers are written by a pass that runs, so the second pass must not be the one that updates them.
    if replay and sam.selection.narrowed and bn_stats == "first" and sam.model is not None:
        from samon.engines.replay import Replay

        return Replay(sam, named, same_noise)
    return WholeBatch(sam, named, bn_stats)


def _prepare_optimizer(optimizer: Any, ascent: str | None) -> SAM:
    sam = sam_of(optimizer)
    if sam is None:
        raise UserError(
            f"two_pass needs one of samon's optimizers, got {type(optimizer).__name__}; create one with "
            "timm.optim.create_optimizer_v2(model, 'samon-layerl2', ...)"
        )
    if ascent is not None and ascent != sam.ascent.name:
        from samon.engines.ascent import replace_ascent

        replace_ascent(sam, ascent)
    return sam


@contextmanager
def _explained_errors(sam: SAM) -> Iterator[None]:
    """Errors of PyTorch that a wrong `forward` causes, as UserError."""
    check: AbstractContextManager[None] = nullcontext()
    if dist.is_available() and dist.is_initialized():
        from samon.engines.diagnostics import refuse_static_graph

        check = refuse_static_graph(sam)
    try:
        with check:
            yield
    except RuntimeError as error:
        from samon.engines.diagnostics import explain_error

        explain_error(error)
        raise


def _check_arguments(sam: SAM, forwards: int, groups: int, reduce: str, bn_stats: str, ascent_forward: bool) -> None:
    if torch.is_inference_mode_enabled():
        raise UserError("two_pass cannot run under torch.inference_mode(); call it outside")
    if not forwards:
        raise UserError("forward is an empty sequence")
    if reduce not in ("device", "global"):
        raise UserError(f"reduce must be 'device' or 'global', got {reduce!r}")
    if bn_stats not in BN_STATS:
        raise UserError(f"bn_stats must be one of {', '.join(BN_STATS)}, got {bn_stats!r}")
    if groups < 1:
        raise UserError(f"groups must be at least 1, got {groups}")
    if groups > 1 and (reduce == "global" or forwards > 1 or ascent_forward):
        raise UserError(
            f"groups={groups} gives each sub-batch its own perturbation, so it does not combine with reduce='global', "
            "several forwards or ascent_forward, where sub-batches share one"
        )
    if sam.ascent.single_pass and (groups > 1 or reduce == "global" or ascent_forward):
        raise UserError(
            f"ascent={sam.ascent.name!r} makes no ascent pass; drop groups and reduce='global' (--m-sharpness), and "
            "ascent_forward (--ascent-fraction, --ascent-size)"
        )
    if forwards > 1 and ascent_forward:
        raise UserError("ascent_forward requires a single forward")
    if bn_stats != "first" and sam.model is None:
        raise UserError(f"bn_stats={bn_stats!r} must know the BatchNorm layers; create the optimizer from the model")


def _as_losses(forward: Any) -> list[Forward]:
    """Each of the forwards, checked to return a loss."""
    forwards = [forward] if callable(forward) or not isinstance(forward, Sequence) else list(forward)
    for f in forwards:
        if not callable(f):
            raise UserError(
                "forward must be a function that two_pass calls in each pass, such as lambda: loss_fn(model(x), y), "
                f"got {type(f).__name__}"
            )
    return [partial(_call_loss, f) for f in forwards]


def _call_loss(forward: Callable[[], Any]) -> Tensor:
    loss = forward()
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise UserError(f"forward must return the mean loss and nothing else, a tensor of one element, got {got}")


def raise_no_gradient(sam: SAM) -> NoReturn:
    """Raise the error for a loss without a gradient for any perturbed parameter."""
    if sam.model is not None:
        refuse_fsdp1(sam.model.parameters())
    raise UserError(
        f"the loss depends on no parameter that {sam.scope} perturbs: return it with its graph attached (a closure "
        "clears the gradients, then runs backward), and create the optimizer after the model's last change"
    )


def unscaled_gradients(loss: Tensor, inputs: Sequence[Tensor], scaler: Any = None) -> list[Tensor | None]:
    """Dense, unscaled gradients of the loss; None for inputs that it does not depend on."""
    if not loss.requires_grad:
        return [None] * len(inputs)
    scaled = loss if scaler is None else scaler.scale(loss)
    grads = torch.autograd.grad(scaled, list(inputs), allow_unused=True)
    dense: list[Tensor | None] = [g.to_dense() if g is not None and g.is_sparse else g for g in grads]
    if scaler is not None:
        torch._foreach_div_([g for g in dense if g is not None], scaler.scale(torch.ones((), device=loss.device)))
    return dense


def unperturbed_parameters(sam: SAM, named: Named, modules: Iterable[Module]) -> list[Parameter]:
    """All parameters of the optimizer and the modules that this step does not perturb."""
    perturbed = {id(p) for p in named.values()}
    parameters = {id(p): p for group in sam.param_groups for p in group["params"]}
    for module in modules:
        if module._parameters:
            parameters |= {id(p): p for p in module._parameters.values() if p is not None}
    return [p for key, p in parameters.items() if key not in perturbed]
