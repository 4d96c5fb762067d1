"""The two-pass step: where the gradient is taken. How it is applied stays with the optimizer (Eqs. 3 and 5)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from samon import rng
from samon.engines import fsdp as sharded
from samon.engines.ascent import Ascent, all_reduce_mean
from samon.engines.closure import raise_no_gradient
from samon.engines.cuda_graph import begin, own_gradients, owned
from samon.engines.groups import Grouped
from samon.engines.norm_stats import BN_STATS
from samon.engines.passes import backward_errors, explain_missing, losses_of, refuse_static_graph
from samon.engines.replay import Plain
from samon.engines.sharded_tensors import is_cut
from samon.errors import UserError, refuse
from samon.sam import SAM, sam_of

Forward = Callable[[], Tensor]
Context = Callable[[], AbstractContextManager]
Passes = Plain | Grouped


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
    process_group: Any = None,
    ascent: str | None = None,
) -> Tensor:
    """Accumulate the gradient at w + eps into `.grad`; the weights end bit-exactly as they were.

    The ascent gradient is taken with respect to the perturbed parameters only, everything else frozen, and never
    touches `.grad`. Nothing is read on the host (with half-precision weights once, in the first step). A non-finite
    ascent gradient leaves the weights unperturbed and makes the final gradient NaN, so that a gradient scaler, or any
    check of its norm, skips the step on all processes.

    Args:
        optimizer: a SAM optimizer, or one around it: timm's Lookahead, Accelerate's, Lightning's or Fabric's.
        forward: returns the mean loss over its batch, a tensor of one element, without running backward. A sequence of
            forwards is one batch in micro-batches that share one perturbation (their mean is taken).
        groups: m-sharpness inside the batch: that many equal sub-batches of consecutive samples, each with its own
            perturbation (scope `samon`).
        reduce: whose ascent gradient makes the perturbation: this process's (`device`) or the mean over all
            processes (`global`).
        no_sync: DistributedDataParallel's; the ascent pass runs inside, so a step sends the gradients once. A model
            sharded by FSDP2 needs none.
        scaler: GradScaler; both losses are scaled, the ascent gradient is unscaled before it is used.
        bn_stats: the pass that updates BatchNorm running statistics: `first`, `second` or `both`.
        same_noise: the second pass draws the same dropout and stochastic-depth masks as the first.
        replay: where `perturb` left only late layers, keep what the first pass computed in front of them.
        ascent_forward: the loss for the first pass, over a part of the batch.
        loss_scale: factor on the gradient, 1/K for K accumulated calls. The ascent gradient is never scaled by it,
            since the Fisher geometry depends on its size.
        process_group: for `reduce='global'`.
        ascent: where the direction of the perturbation comes from (`samon.engines.ascent`), from now on; the
            optimizer's own if not given. `previous` and `momentum` make one pass, at w + eps.

    Returns:
        The clean loss, at w, detached; where no pass is made there, the one at w + eps. `SAM.stats` holds more.

    Raises:
        UserError: naming what this model or combination cannot honour.
    """
    sam = sam_of(optimizer)
    if sam is None:
        raise UserError(
            f"two_pass needs one of samon's optimizers, got {type(optimizer).__name__}; create one with "
            "timm.optim.create_optimizer_v2(model, 'samon-layerl2', ...)"
        )
    if ascent is not None and ascent != sam.ascent.source:
        sam.ascent = Ascent(ascent, sam.ascent.gsam_alpha)
    if no_sync is None:
        no_sync = sharded.no_sync(sam.model) if sam.distributed and sam.model is not None else nullcontext
    forwards = losses_of(forward)
    ascents = forwards if ascent_forward is None else losses_of(ascent_forward)
    _check(sam, forwards, groups, reduce, bn_stats, ascent_forward)
    if sam.distributed:
        sharded.check(sam, reduce=reduce, groups=groups, replay=replay, scaler=scaler)
    unseen = not sam.replicas_ran and torch.distributed.is_available() and torch.distributed.is_initialized()
    with sam.drawn(), backward_errors(), refuse_static_graph(sam.replicas_ran) if unseen else nullcontext():
        passes: Passes
        climbs = sam.ascent.climbs()
        if groups > 1 and climbs:
            passes = Grouped(sam, groups, bn_stats)
        else:
            single = climbs and len(forwards) == 1 and ascent_forward is None and sam.esam_beta == 1
            statistics = bn_stats if climbs else "second"  # the only pass that there is
            passes = Plain(sam, statistics, replay=replay and single, same_noise=same_noise)
        noise = rng.take_torch(passes.device) if same_noise else None
        how = {"reduce": reduce, "process_group": process_group, "loss_scale": loss_scale}
        clean, eps, finite = climb(passes, ascents if climbs else [], no_sync, scaler, **how)
        if noise is not None:
            rng.put_torch(noise, passes.device)
        with nullcontext() if eps is None else passes.second(eps):
            last = descend(passes, forwards, no_sync, scaler, loss_scale, finite)
        if clean is None and all(p.grad is None for p in sam.perturbed_parameters().values()):
            raise_no_gradient(sam)
    sam.stats |= {"loss": last} if clean is None else {"loss": clean, "loss_perturbed": last}
    return sam.stats["loss"]


def _check(
    sam: SAM, forwards: list[Forward], groups: int, reduce: str, bn_stats: str, ascent_forward: Forward | None
) -> None:
    grouped = f"groups={groups} gives each sub-batch its own perturbation and does not combine with "
    mistakes = {
        "two_pass cannot run under torch.inference_mode(); call it outside": torch.is_inference_mode_enabled(),
        "forward is an empty sequence": not forwards,
        f"reduce must be 'device' or 'global', got {reduce!r}": reduce not in ("device", "global"),
        f"bn_stats must be one of {', '.join(BN_STATS)}, got {bn_stats!r}": bn_stats not in BN_STATS,
        f"groups must be at least 1, got {groups}": groups < 1,
        grouped + "reduce='global', which makes one for all": groups > 1 and reduce == "global",
        grouped + "several forwards that share one": groups > 1 and len(forwards) > 1,
        grouped + "ascent_forward over a part of the batch": groups > 1 and ascent_forward is not None,
        f"ascent={sam.ascent.source!r} makes no ascent pass; drop groups, reduce='global' and ascent_forward": (
            sam.ascent.passless and (groups > 1 or reduce == "global" or bool(ascent_forward))
        ),
        "ascent_forward takes a single forward beside it": len(forwards) > 1 and ascent_forward is not None,
        f"bn_stats={bn_stats!r} must know the BatchNorm layers; create the optimizer from the model": (
            bn_stats != "first" and sam.model is None
        ),
    }
    refuse(mistakes)


def climb(
    passes: Passes,
    forwards: Sequence[Forward],
    no_sync: Context,
    scaler: Any,
    *,
    reduce: str = "device",
    process_group: Any = None,
    loss_scale: float = 1.0,
) -> tuple[Tensor | None, list[Tensor] | None, Tensor]:
    """The perturbation, by an ascent pass over `forwards` where there are some, else from what the optimizer has kept:
    `(the loss at w or None, eps or None for a step at w, whether the ascent gradient is finite)`."""
    sam, named = passes.sam, passes.sam.perturbed_parameters()
    clean: Tensor | None = None
    grads: list[Tensor] | None = None
    if forwards:
        if sam.distributed and any(is_cut(p) for p in named.values()):
            with passes.first(), passes.each_first():
                clean, grads = sharded.climbing_gradients(sam, forwards, no_sync)
        else:
            with sharded.ascending(sam.model) if sam.distributed else nullcontext():
                clean, grads = first_pass(passes, forwards, no_sync, scaler)
            if reduce == "global" and torch.distributed.is_initialized():
                grads = all_reduce_mean(grads, process_group)
        sam.ascent.note(named, [g.mean(0) for g in grads] if passes.groups > 1 else grads, loss_scale)
    eps, finite = sam.displacement(grads, grouped=passes.groups > 1)
    return clean, eps, torch.ones((), dtype=torch.bool, device=passes.device) if finite is None else finite


def first_pass(
    passes: Passes, forwards: Sequence[Forward], no_sync: Context, scaler: Any
) -> tuple[Tensor, list[Tensor]]:
    """The first pass: the mean loss at w, [] and detached, and its unscaled gradients with respect to `passes.inputs`,
    zeros where it does not depend on one.

    Raises:
        UserError: a gradient got lost in reentrant checkpointing.
    """
    sam = passes.sam
    losses: list[Tensor] = []
    total: list[Tensor] = []
    missing: list[tuple[list[Tensor | None], Tensor, Forward]] = []
    with passes.first():
        for forward in forwards:
            with no_sync(), passes.each_first():
                begin(sam.captured)
                loss = forward()
                found = passes.gradients(loss, scaler)
            if any(g is None for g in found):
                missing.append((found, loss, forward))
            losses.append(owned(sam.captured, loss.detach()))
            pairs = zip(passes.inputs, found, strict=True)
            grads = [torch.zeros_like(x) if g is None else owned(sam.captured, g) for x, g in pairs]
            total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
    for incomplete in missing:
        with no_sync():
            explain_missing(sam, *incomplete)
    if len(losses) > 1:
        torch._foreach_div_(total, len(losses))
    if passes.groups > 1:  # the loss is the mean over equal groups, each group's own depends on its offsets alone
        torch._foreach_mul_(total, passes.groups)
    return torch.stack(losses).mean(), total


def descend(
    passes: Passes, forwards: Sequence[Forward], no_sync: Context, scaler: Any, loss_scale: float, finite: Tensor
) -> Tensor:
    """The second pass: accumulate into `.grad`, NaN where the ascent gradient was not finite; the mean loss, [] and
    detached."""
    losses, sam = [], passes.sam
    parameters = [p for group in sam.param_groups for p in group["params"]]
    for i, forward in enumerate(forwards):
        # Gradients are sent with the last one. The backward is inside: checkpointed parts run their forward in it.
        sync = nullcontext() if i + 1 == len(forwards) else no_sync()
        with sync, passes.each_second(), own_gradients(sam.captured, parameters):
            begin(sam.captured)
            loss = forward()
            if not loss.requires_grad:
                raise_no_gradient(sam)
            scaled = loss * torch.where(finite, torch.full_like(loss, loss_scale / len(forwards)), torch.nan)
            (scaled if scaler is None else scaler.scale(scaled)).backward()
        losses.append(owned(sam.captured, loss.detach()))
    return torch.stack(losses).mean()
