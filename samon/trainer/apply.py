"""Clipping and the optimizer's step; an update whose gradient is not finite changes nothing.

On the CPU the host looks whether the gradient is finite and skips. On an accelerator that look would stop the queue of
kernels at every update, so there the step is undone on the device: optimizers that take `found_inf` (torch's fused
ones) skip by themselves, for the others parameters and state are copied before and selected back. The copies live while
no activations do, so they seldom raise the peak. The host looks there too where only it can undo a step: in the first
update, which makes the state, and where the state is not all tensors (Kron, LAMB, Adan and others count in Python).
A step count that is a tensor on the host (Adam's `step`, unless fused or capturable) counts a later skipped step too.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.models import model_parameters
from timm.optim import Lookahead
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.nn.utils import get_total_norm

from samon.compat import foreach_clone
from samon.engines.fsdp import norm_reduction
from samon.errors import RunError
from samon.geometry import global_norm
from samon.sam import SAM, sam_of, to_local
from samon.trainer.build import Run
from samon.trainer.checkpoint import CheckpointManager
from samon.trainer.state import Progress


def apply_gradient(run: Run, reads: bool | None = None) -> tuple[Tensor, bool | Tensor]:
    """Clip and step.

    Args:
        reads: whether the host may wait for the device; on the CPU if not given. It does where updates are counted.

    Returns:
        The gradient's norm before clipping, and whether the step was taken: a bool, or one on the device, [].
    """
    config, scaler, optimizer = run.config, run.scaler, run.optimizer
    reads = run.world.device.type == "cpu" if reads is None else reads
    reads = reads or counts_updates(optimizer)
    if scaler is not None:
        scaler.unscale_(optimizer)
    grads = [p.grad for p in parameters(optimizer) if p.grad is not None]
    norm = global_norm([*map(to_local, grads)], reduce=norm_reduction(grads)) if config.fsdp else get_total_norm(grads)
    finite = norm.isfinite()
    if reads and scaler is None and not bool(finite):
        return norm, False
    if config.clip_grad is not None and config.fsdp:
        clip_parts([*map(to_local, grads)], norm, config.clip_grad, config.clip_mode)
    elif config.clip_grad is not None:
        clipped = model_parameters(run.model, exclude_head="agc" in config.clip_mode)
        dispatch_clip_grad(clipped, config.clip_grad, mode=config.clip_mode)
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


def clip_parts(grads: list[Tensor], norm: Tensor, value: float, mode: str) -> None:
    """`dispatch_clip_grad`, modes norm and value, on what this process has of gradients whose norm is known."""
    if mode == "norm":
        torch._foreach_mul_(grads, (value / (norm + 1e-6)).clamp(max=1))
    else:
        torch._foreach_clamp_max_(grads, value)
        torch._foreach_clamp_min_(grads, -value)


def counts_updates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether what happens next depends on how many updates were applied, which only the host can count: Lookahead, the
    ascents that go by it, and masks that are renewed."""
    sam = sam_of(optimizer)
    if sam is None:
        return isinstance(optimizer, Lookahead)
    renewed = sam.mask is not None and sam.mask.kind != "random"
    return isinstance(optimizer, Lookahead) or sam.ascent.counts_updates or renewed


def parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


@torch.no_grad()
def step_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """The optimizer's step where `finite` (bool, [] on the device) holds; else everything is as it was. The host reads
    it only where `changes_more_than_tensors`. What the ascent keeps from now on starts at zero."""
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
    before = held(optimizer, sam)
    copies = dict(zip(before, foreach_clone(list(before.values())), strict=True))
    optimizer.step()
    for key, after in held(optimizer, sam).items():
        old = copies[key] if key in copies else torch.zeros_like(after)
        after.copy_(torch.where(finite, after, old))


def changes_more_than_tensors(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step makes the state of a parameter, or changes what is no tensor: counts, lists, random states."""
    states = [optimizer.state.get(p) for p in parameters(optimizer) if p.grad is not None]
    if not all(states) or any("step" in group for group in optimizer.param_groups):
        return True
    return any(not isinstance(value, Tensor | bool) for state in states for value in (state or {}).values())


def held(optimizer: torch.optim.Optimizer, sam: SAM | None) -> dict[Any, Tensor]:
    """Every tensor that a step may change, by what it is: parameters, their state, and what the ascent keeps."""
    found: dict[Any, Tensor] = {}
    for i, p in enumerate(parameters(optimizer)):
        found[i, ""] = to_local(p)
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.device == p.device:
                found[i, name] = to_local(value)
    if sam is not None:
        found |= {("kept", name): value for name, value in sam.ascent.state.items()}
        found |= {("moments", i): value for i, value in enumerate(sam.ascent.moments)}
    return found


def count_bad(run: Run, progress: Progress, checkpoints: CheckpointManager, outcomes: list[bool | Tensor]) -> None:
    """Count the skipped updates among those since the last call, in one transfer; too many in a row end the run."""
    flags = torch.stack([torch.as_tensor(outcome) for outcome in outcomes]).tolist() if outcomes else []
    outcomes.clear()
    for applied in flags:
        progress.bad_in_a_row = 0 if applied else progress.bad_in_a_row + 1
        progress.skipped += not applied
        if progress.bad_in_a_row >= run.config.max_nonfinite_steps:
            where = f"epoch {progress.epoch}, update {progress.updates}"
            raise RunError(
                f"non-finite gradients in {progress.bad_in_a_row} updates in a row ({where}); lower --lr or --rho; "
                f"{checkpoints.describe_last_good()}"
            )
