"""What a run computes: exact FLOPs of a step like its own, on the meta device, where nothing is really computed."""

import json
import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import samon
from samon.report.content import Run
from samon.trainer import model as models
from samon.trainer.build import build_optimizer
from samon.trainer.config import resolve

log = logging.getLogger("samon")
KEYS = ("model", "model_kwargs", "num_classes", "in_chans", "img_size", "input_size", "batch_size", "opt", "base_opt")
SAM_KEYS = ("perturb", "sparsity", "ascent", "ascent_fraction", "ascent_size", "gsam_alpha", "no_replay", "m_sharpness")


def add_flops(run: Run) -> None:
    """`step_flops` (over a plain step) and `flops` (of the whole run) to a run's cost, where they can be counted."""
    if "step_flops" in run.cost or (found := step_flops(run)) is None:
        return
    step, plain = found
    share = two_pass_share(run)
    mean = share * step + (1 - share) * plain
    run.cost["step_flops"] = round(mean / plain, 4)
    if "updates" in run.cost:
        accumulated = run.settings.get("grad_accum_steps") or 1
        run.cost["flops"] = mean * run.cost["updates"] * accumulated * run.made.get("processes", 1)


def two_pass_share(run: Run) -> float:
    """Share of the epochs and updates that have the two-pass step (--sam-start-epoch, --sam-end-epoch, --sam-every)."""
    epochs = int(run.settings.get("epochs") or 1)
    end = run.settings.get("sam_end_epoch")
    inside = min(epochs if end is None else end, epochs) - (run.settings.get("sam_start_epoch") or 0)
    return max(0, inside) / epochs / (run.settings.get("sam_every") or 1)


def step_flops(run: Run) -> tuple[float, float] | None:
    """(FLOPs of a process's update as the run makes it, of a plain one); None, logged with the reason, if unknown."""
    if "model" not in run.settings:  # of another program, such as the translation example
        return None
    keys = (*KEYS, *SAM_KEYS) if samon.is_sam_name(run.settings["opt"]) else KEYS
    settings = {key: run.settings[key] for key in keys if run.settings.get(key) is not None}
    if str(settings.get("ascent")) == "adaptive":
        log.info("%s: --ascent adaptive decides while it runs; its FLOPs are not known beforehand", run.name)
        return None
    try:
        return counted(json.dumps(settings))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        log.warning("%s: FLOPs not counted: %s", run.name, " ".join(str(error).split())[:200])
        return None


@cache
def counted(text: str) -> tuple[float, float]:
    """`step_flops` of settings as JSON."""
    config = resolve({}, json.loads(text))
    with torch.device("meta"):
        model: Any = models.create_model(config).train()
        size = config.input_size or [config.in_chans or 3, *[config.img_size or 224] * 2]
        x = torch.empty(config.batch_size, *size)
        y = torch.zeros(config.batch_size, dtype=torch.long)

    def forward(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    plain = flops(lambda: forward().backward())
    if not samon.is_sam_name(config.opt):
        return plain, plain
    optimizer = build_optimizer(config.but(lr=0.1), model)
    how: dict[str, Any] = {"replay": not config.no_replay}
    if isinstance(config.m_sharpness, int):
        how["groups"] = config.batch_size // config.m_sharpness
    if config.ascent_fraction < 1 or config.ascent_size:
        part = math.ceil(config.ascent_fraction * config.batch_size)  # as the loop takes it
        small = torch.empty(part, size[0], *[config.ascent_size or size[1]] * 2, device="meta")
        how["ascent_forward"] = lambda: forward(small, y[:part])

    def update() -> None:
        optimizer.zero_grad()
        samon.two_pass(optimizer, forward, **how)
        optimizer.step()

    update()  # the first may record a replay plan, or have no direction yet
    update()
    period = int(config.ascent.split(":")[1]) if config.ascent.startswith("every:") else 1
    return sum(flops(update) for _ in range(period)) / period, plain


def flops(function: Callable[[], Any]) -> int:
    """Counted operations of one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
