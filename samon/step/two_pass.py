"""The two-pass step: where the gradient is taken. How it is applied stays with the optimizer (Eqs. 3 and 5)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from samon.errors import UserError
from samon.optim.geometry import global_norm
from samon.optim.norm_stats import BN_STATS, kept, running_statistics
from samon.optim.sam import SAM, sam_of
from samon.step.groups import GroupedNorms
from samon.step.passes import Noise, all_reduce_mean, frozen, refuse_checkpointing
from samon.step.replay import Plan, Tape, make_plan, recorded

Forward = Callable[[], Tensor]
Context = Callable[[], AbstractContextManager]


@dataclass
class Options:
    """The keywords of `two_pass`, as documented there."""

    groups: int = 1
    reduce: str = "device"
    no_sync: Context = nullcontext
    scaler: Any = None
    bn_stats: str = "first"
    same_noise: bool = False
    replay: bool = True
    ascent_forward: Forward | None = None
    loss_scale: float = 1.0
    process_group: Any = None


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
    process_group: Any = None,
) -> Tensor:
    """Accumulate the gradient at w + eps into `.grad`; the weights end bit-exactly as they were.

    The ascent gradient is taken with respect to the perturbed parameters only, everything else frozen, and never
    touches `.grad`. Nothing is read on the host. A non-finite ascent gradient leaves the weights unperturbed and makes
    the final gradient NaN, so that a gradient scaler, or any check of its norm, skips the step on all processes.

    Args:
        optimizer: a SAM optimizer, or Lookahead around one.
        forward: returns the mean loss over its batch, 0-dim, without running backward. A sequence of forwards is one
            batch in micro-batches that share one perturbation (their mean is taken).
        groups: m-sharpness inside the batch: that many equal sub-batches of consecutive samples, each with its own
            perturbation (scope `samon`).
        reduce: whose ascent gradient makes the perturbation: this process's (`device`) or the mean over all
            processes (`global`).
        no_sync: DistributedDataParallel's; the ascent pass runs inside, so a step sends the gradients once.
        scaler: GradScaler; both losses are scaled, the ascent gradient is unscaled before it is used.
        bn_stats: the pass that updates BatchNorm running statistics: `first`, `second` or `both`.
        same_noise: the second pass draws the same dropout and stochastic-depth masks as the first.
        replay: where `perturb` left only late layers, keep what the first pass computed in front of them.
        ascent_forward: the loss for the first pass, over a part of the batch.
        loss_scale: factor on the gradient, 1/K for K accumulated calls. The ascent gradient is never scaled by it,
            since the Fisher geometry depends on its size.
        process_group: for `reduce='global'`.

    Returns:
        The clean loss, at w, detached. `SAM.stats` holds more.

    Raises:
        UserError: naming what this model or combination cannot honour.
    """
    sam = sam_of(optimizer)
    if sam is None:
        raise UserError(
            f"two_pass needs one of samon's optimizers, got {type(optimizer).__name__}; create one with "
            "timm.optim.create_optimizer_v2(model, 'samon-layerl2', ...)"
        )
    forwards = [forward] if callable(forward) else list(forward)
    options = Options(
        groups,
        reduce,
        no_sync or nullcontext,
        scaler,
        bn_stats,
        same_noise,
        replay,
        ascent_forward,
        loss_scale,
        process_group,
    )
    _check(sam, forwards, options)
    if groups > 1:
        return _grouped(sam, forwards[0], options)
    return _plain(sam, forwards, options)


def _check(sam: SAM, forwards: list[Forward], o: Options) -> None:
    def refuse(condition: bool, message: str) -> None:
        if condition:
            raise UserError(message)

    refuse(not forwards, "forward is an empty sequence")
    refuse(o.reduce not in ("device", "global"), f"reduce must be 'device' or 'global', got {o.reduce!r}")
    refuse(o.bn_stats not in BN_STATS, f"bn_stats must be one of {', '.join(BN_STATS)}, got {o.bn_stats!r}")
    refuse(o.groups < 1, f"groups must be at least 1, got {o.groups}")
    if o.groups > 1:
        clash = f"groups={o.groups} gives each sub-batch its own perturbation and does not combine with "
        refuse(o.reduce == "global", clash + "reduce='global', which makes one for all")
        refuse(len(forwards) > 1, clash + "several forwards that share one")
        refuse(o.ascent_forward is not None, clash + "ascent_forward over a part of the batch")
    refuse(len(forwards) > 1 and o.ascent_forward is not None, "ascent_forward takes a single forward beside it")
    refuse(not sam.perturbed_parameters(), f"all parameters that {sam.scope} perturbs are frozen; unfreeze some")
    refuse(
        o.bn_stats != "first" and sam.model is None,
        f"bn_stats={o.bn_stats!r} must know the BatchNorm layers; create the optimizer from the model",
    )


def _plain(sam: SAM, forwards: list[Forward], o: Options) -> Tensor:
    """One perturbation for all forwards."""
    parameters = list(sam.perturbed_parameters().values())
    noise = Noise(parameters[0].device) if o.same_noise else None
    with _Replay(sam, forwards, o) as replay:
        ascents = forwards if o.ascent_forward is None else [o.ascent_forward]
        losses, grads = [], [torch.zeros_like(p) for p in parameters] if len(ascents) > 1 else []
        with frozen(replay.frozen), replay.statistics_kept(o.bn_stats == "second"):
            for ascent in ascents:
                with o.no_sync(), replay.first():
                    loss = ascent()
                    found = ascent_gradients(loss, parameters, o.scaler)
                losses.append(loss.detach())
                grads = [a + b for a, b in zip(grads, found, strict=True)] if grads else found
        if len(ascents) > 1:
            torch._foreach_div_(grads, len(ascents))
        if o.reduce == "global" and torch.distributed.is_initialized():
            grads = all_reduce_mean(grads, o.process_group)
        eps, norm, finite = sam.perturbation(grads)
        del grads
        if noise is not None:
            noise.restore()
        clean = torch.stack(losses).mean()
        with replay.statistics_kept(o.bn_stats == "first"), _moved(sam, eps):
            at_perturbed = _descend(forwards, replay.second, finite, o)
    return _report(sam, clean, at_perturbed, global_norm(eps), norm)


def ascent_gradients(loss: Tensor, wrt: Sequence[Tensor], scaler: Any) -> list[Tensor]:
    """Unscaled gradients of the loss, zeros where it does not depend on a tensor."""
    scaled = loss if scaler is None else scaler.scale(loss)
    grads = torch.autograd.grad(scaled, list(wrt), allow_unused=True, materialize_grads=True)
    if scaler is not None:
        torch._foreach_div_(grads, scaler.scale(torch.ones((), device=loss.device)))
    return list(grads)


def _descend(forwards: list[Forward], around: Context, finite: Tensor, o: Options) -> Tensor:
    """Second pass over all forwards; gradients are sent with the last one. Returns the mean loss at w + eps."""
    losses = []
    for i, forward in enumerate(forwards):
        sync = nullcontext if i + 1 == len(forwards) else o.no_sync
        with sync(), around():  # the backward inside too: checkpointed parts run their forward in it
            loss = forward()
            scaled = loss * torch.where(finite.all(), loss.new_full((), o.loss_scale / len(forwards)), torch.nan)
            (scaled if o.scaler is None else o.scaler.scale(scaled)).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


@contextmanager
def _moved(sam: SAM, eps: list[Tensor]) -> Iterator[None]:
    # An autocast context around the whole step would go on using its half-precision copies of the old weights.
    torch.clear_autocast_cache()
    with sam.moved(eps):
        yield
    torch.clear_autocast_cache()


def _report(sam: SAM, clean: Tensor, perturbed: Tensor, eps_norm: Tensor, grad_norm: Tensor) -> Tensor:
    sam.stats = {"loss": clean, "loss_perturbed": perturbed, "eps_norm": eps_norm, "ascent_grad_norm": grad_norm}
    return clean


def unperturbed(sam: SAM) -> list[Parameter]:
    """All parameters that are not perturbed."""
    perturbed = {id(p) for p in sam.perturbed_parameters().values()}
    groups = [p for group in sam.param_groups for p in group["params"]]
    everything = groups if sam.model is None else [*sam.model.parameters(), *groups]
    return list({id(p): p for p in everything if id(p) not in perturbed}.values())


class _Replay:
    """How this step uses replay: not at all, recording the order of modules for a plan, or by the plan."""

    def __init__(self, sam: SAM, forwards: list[Forward], o: Options):
        self.sam = sam
        wanted = o.replay and sam.selection.narrowed and sam.model is not None
        if wanted and sam.model is not None:
            refuse_checkpointing(sam.model, "replay (replay=True; --no-replay) keeps activations")
        # With both passes updating the statistics, the front's BatchNorms would have to run twice.
        self.usable = wanted and len(forwards) == 1 and o.ascent_forward is None and o.bn_stats != "both"
        plan: Plan | None = sam.plan if self.usable else None
        device = next(iter(sam.perturbed_parameters().values())).device
        self.tape = Tape(plan, device, o.same_noise) if plan is not None and plan.front else None
        self.planning = self.usable and plan is None
        if self.tape is not None:
            self.frozen = self.tape.plan.late
        else:
            self.frozen = [] if self.planning else unperturbed(sam)

    def __enter__(self) -> "_Replay":
        return self

    def __exit__(self, *_: object) -> None:
        if self.tape is not None:
            if self.tape.reordered:
                self.sam.plan = None  # modules ran in another order: look again
            self.tape.outputs.clear()

    @contextmanager
    def statistics_kept(self, wanted: bool) -> Iterator[None]:
        """A pass that leaves the running statistics alone. Front layers run once and stay updated, since both passes
        would see the same batch there; only if the kept outputs cannot be used they are put back too."""
        if not wanted or self.sam.model is None:
            yield
            return
        front = [] if self.tape is None else [m for f in self.tape.plan.front for m in f.modules()]
        late = running_statistics(self.sam.model, skip=front)
        known = {id(b) for b in late}
        early = [b for b in running_statistics(self.sam.model) if id(b) not in known]
        with kept(late), kept(early, unless=lambda: self.tape is not None and self.tape.whole):
            yield

    @contextmanager
    def first(self) -> Iterator[None]:
        if self.tape is not None:
            with self.tape.recording():
                yield
        elif self.planning:
            assert self.sam.model is not None
            with recorded(self.sam.model) as trace:
                yield
            self.sam.plan = make_plan(self.sam, trace)
        else:
            yield

    @contextmanager
    def second(self) -> Iterator[None]:
        with self.tape.replaying() if self.tape is not None and self.tape.whole else nullcontext():
            yield


def _grouped(sam: SAM, forward: Forward, o: Options) -> Tensor:
    """m-sharpness in one batched pass; the running statistics are written once, at the end."""
    norms = GroupedNorms(sam, o.groups)
    noise = Noise(norms.parameters[0].device) if o.same_noise else None
    with frozen([*unperturbed(sam), *norms.parameters]), o.no_sync(), norms.first_pass() as offsets:
        loss = forward()
        grads = ascent_gradients(loss, offsets, o.scaler)
    # The loss is the mean over G equal groups, each group's own loss depends on its offsets alone.
    torch._foreach_mul_(grads, o.groups)
    eps, norm, finite = sam.perturbation(grads, grouped=True)
    if noise is not None:
        noise.restore()
    around: Context = lambda: norms.second_pass(eps)  # noqa: E731
    at_perturbed = _descend([forward], around, finite, o)
    norms.update_running_statistics(o.bn_stats)
    return _report(sam, loss.detach(), at_perturbed, global_norm(eps, grouped=True).mean(), norm.mean())
