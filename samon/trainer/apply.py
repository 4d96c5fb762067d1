"""Clipping and the optimizer's step; an update with a non-finite gradient changes nothing.

On the CPU the host reads whether the gradient is finite and skips the step. On an accelerator that read would stop the
queue of kernels at every update, so there the step is undone on the device: optimizers that take `found_inf` (torch's
fused ones) skip by themselves; for the others parameters and state are copied before the step and selected after it.
The copies exist while no activations do, so they rarely raise the peak memory. The host reads on an accelerator too
where only it can undo a step: in the first update, which creates the state, and if the state has more than tensors
(Kron, LAMB, Adan and others count in Python). A step count that is a tensor on the host (Adam's `step`, unless fused or
capturable) also counts a skipped step.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.optim import Lookahead
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.nn.utils import get_total_norm

from samon.compat import foreach_clone
from samon.engines.fsdp import norm_reduction
from samon.geometry import global_norm
from samon.sam import SAM, sam_of, to_local
from samon.trainer.build import Run


def apply_gradient(run: Run) -> tuple[Tensor, bool | Tensor]:
    """Clip the gradient and step. The host waits for the device only if the number of applied updates matters.

    Returns:
        The gradient's norm before clipping, and whether the step was taken: a bool, or a bool tensor [] on the device.
    """
    config, scaler, optimizer = run.config, run.scaler, run.optimizer
    reads = run.dist_info.device.type == "cpu" or counts_updates(optimizer)
    if scaler is not None:
        scaler.unscale_(optimizer)
    if (sam := sam_of(optimizer)) is not None:
        sam.correct_gradients()
    grads = [p.grad for p in parameters(optimizer) if p.grad is not None]
    norm = global_norm([*map(to_local, grads)], reduce=norm_reduction(grads)) if config.fsdp else get_total_norm(grads)
    finite = norm.isfinite()
    if reads and scaler is None and not bool(finite):
        return norm, False
    if config.clip_grad is not None:
        clip(run, grads, norm)
    if not reads:
        step_if(optimizer, finite)
        if scaler is not None:
            scaler.update()
        return norm, finite
    if scaler is None:
        optimizer.step()
        return norm, True
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return norm, scaler.get_scale() >= before


def clip(run: Run, grads: list[Tensor], norm: Tensor) -> None:
    """Clip as timm does (--clip-grad, --clip-mode); sharded gradients by their global `norm` or element by element."""
    value, mode = run.config.clip_grad, run.config.clip_mode
    if not run.config.fsdp:
        dispatch_clip_grad(run.task.get_clip_parameters(exclude_head="agc" in mode), value, mode=mode)
    elif mode == "norm":
        torch._foreach_mul_([*map(to_local, grads)], (value / (norm + 1e-6)).clamp(max=1))
    else:
        torch._foreach_clamp_max_([*map(to_local, grads)], value)
        torch._foreach_clamp_min_([*map(to_local, grads)], -value)


def counts_updates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the next update depends on the number of applied ones, which only the host can count: Lookahead, some
    ascent sources, and masks that are renewed."""
    sam = sam_of(optimizer)
    if sam is None:
        return isinstance(optimizer, Lookahead)
    renewed = sam.mask is not None and sam.mask.kind != "random"
    return isinstance(optimizer, Lookahead) or sam.ascent.counts_updates or renewed


def parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """All parameters of an optimizer."""
    return (p for group in optimizer.param_groups for p in group["params"])


@torch.no_grad()
def step_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Step if `finite` (bool, [] on the device) holds; otherwise leave everything as it was.

    The host reads it only if `changes_more_than_tensors`. State that the ascent creates in a skipped step is zero.
    """
    if changes_more_than_tensors(optimizer):
        if bool(finite):
            optimizer.step()
        return
    sam = sam_of(optimizer)
    base: Any = optimizer if sam is None else sam.base
    if getattr(base, "_step_supports_amp_scaling", False) and (sam is None or not sam.ascent.has_state):
        base.grad_scale, base.found_inf = None, (~finite).float()
        try:
            optimizer.step()
        finally:
            del base.grad_scale, base.found_inf
        return
    before = changed_by_step(optimizer, sam)
    copies = dict(zip(before, foreach_clone(list(before.values())), strict=True))
    optimizer.step()
    for key, after in changed_by_step(optimizer, sam).items():
        old = copies[key] if key in copies else torch.zeros_like(after)
        after.copy_(torch.where(finite, after, old))


def changes_more_than_tensors(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step creates the state of a parameter, or changes counts, lists or random states in Python."""
    states = [optimizer.state.get(p) for p in parameters(optimizer) if p.grad is not None]
    if not all(states) or any("step" in group for group in optimizer.param_groups):
        return True
    return any(not isinstance(value, Tensor | bool) for state in states for value in (state or {}).values())


def changed_by_step(optimizer: torch.optim.Optimizer, sam: SAM | None) -> dict[tuple[str, str | int], Tensor]:
    """Every tensor that a step may change, by a name: parameters, their state, and the state of the ascent."""
    tensors: dict[tuple[str, str | int], Tensor] = {}
    for i, p in enumerate(parameters(optimizer)):
        tensors["", i] = to_local(p)
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.device == p.device:
                tensors[name, i] = to_local(value)
    if sam is not None:
        tensors |= {("ascent", name): value for name, value in sam.ascent.state.items()}
        tensors |= {("ascent", i): value for i, value in enumerate(sam.ascent.moments)}
    return tensors


def count_skipped(run: Run, outcomes: list[bool | Tensor]) -> None:
    """Count the skipped updates among `outcomes` in one transfer, and empty the list.

    Raises:
        FloatingPointError: --max-nonfinite-steps updates in a row were skipped.
    """
    progress = run.progress
    flags = torch.stack([torch.as_tensor(outcome) for outcome in outcomes]).tolist() if outcomes else []
    outcomes.clear()
    for applied in flags:
        progress.bad_in_a_row = 0 if applied else progress.bad_in_a_row + 1
        progress.skipped += not applied
        if progress.bad_in_a_row >= run.config.max_nonfinite_steps:
            raise FloatingPointError(
                f"non-finite gradients in {progress.bad_in_a_row} updates in a row (epoch {progress.epoch}, update "
                f"{progress.updates}); lower --lr or --rho"
            )
