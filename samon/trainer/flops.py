"""FLOPs of a run's updates and of plain ones, counted on the meta device, where nothing is computed."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import samon
from samon.errors import error_line
from samon.scope import SCOPES
from samon.trainer.build import Run, Task, build_optimizer
from samon.trainer.config import images_per_batch
from samon.trainer.distributed import DistInfo
from samon.trainer.gradient import compute_gradient
from samon.trainer.model import create_train_model, resolve_data_config

log = logging.getLogger("samon")
META = torch.device("meta")
ESAM_SAMPLES = 8  # updates whose sampled tensors are counted; their mean is within about 1 % of that of many


@dataclass
class UpdateCost:
    """FLOPs of an update of one process.

    Attributes:
        plain: one pass, without perturbation.
        two_pass: two-pass updates; number i costs as much as `two_pass[i % len(two_pass)]`.
        recording: what an update costs more in which replay records the order of modules.
    """

    plain: float
    two_pass: Sequence[float] = ()
    recording: float = 0.0


def step_flops(run: Run) -> dict[str, float] | None:
    """FLOPs per process and micro-batch of a run from its first to its last epoch (`step`), and of the same run without
    perturbation (`plain`).

    Every update is counted as it runs, its last micro-batches and the optimizer included (Muon multiplies matrices).
    Exceptions: of ESAM, the tensors sampled by the first ESAM_SAMPLES updates stand for all; a resumed run records
    the order of modules for replay once more; random numbers that a model draws between its early modules, which turn
    replay off, are not noticed; the forward that verifies replay, the Fisher diagonal of SSAM-F and skipped updates are
    not considered.

    Returns:
        None, with the reason logged, where they cannot be counted in advance.
    """
    config, per_epoch, accumulation = run.config, run.updates_per_epoch, run.config.grad_accum_steps
    if config.ascent == "aesam" or config.train_img_sizes:
        what = "--train-img-sizes changes the image size" if config.train_img_sizes else "--ascent aesam decides"
        log.info("%s during training; the FLOPs are not known in advance", what)
        return None
    batches, epochs = len(run.train_loader), max(1, run.stop - run.progress.start)
    rest = batches - (per_epoch - 1) * accumulation  # micro-batches of an epoch's last update

    def micro_batches(update: int) -> int:
        return rest if (update + 1) % per_epoch == 0 else accumulation

    try:
        costs = {count: count_update(run, count) for count in {rest, micro_batches(0)}}
    except Exception as error:  # a finished run must not fail here, whatever its model does on the meta device
        log.info("FLOPs of a step were not counted: %s", error_line(error, 200))
        return None
    plain = epochs * sum(costs[micro_batches(update)].plain for update in range(per_epoch))
    two_pass = [u for u in run.two_pass_updates if run.progress.start * per_epoch <= u < run.stop * per_epoch]
    kinds = [costs[micro_batches(update)] for update in two_pass]
    more = math.fsum(cost.two_pass[i % len(cost.two_pass)] - cost.plain for i, cost in enumerate(kinds))
    more += next((cost.recording for cost in kinds if cost.recording), 0.0)  # once in a run
    total = epochs * batches
    return {"step": (plain + more) / total, "plain": plain / total}


def meta_run(run: Run) -> Run:
    """The run in one process on the meta device, without what costs no FLOPs or cannot be on it: weights of a file,
    lower precision, fused optimizers, equal noise."""
    config = run.config
    config = config.but(
        pretrained=False,
        pretrained_path="",
        initial_checkpoint="",
        opt_kwargs={key: value for key, value in config.opt_kwargs.items() if key != "fused"},
        torchcompile=None,
        fsdp=False,
        same_noise=False,
        # Drawing random numbers between modules turns replay off, unless both passes draw the same.
        no_replay=config.no_replay or (bool(config.norm_dropout) and not config.same_noise),
    )
    with META:
        model = create_train_model(config).train()
    optimizer, task = build_optimizer(config, model), Task(model, nn.CrossEntropyLoss(), device=META, verbose=False)
    return replace(
        run,
        config=config,
        dist_info=DistInfo(META, 0, 1),
        model=model,
        task=task,
        optimizer=optimizer,
        sam=samon.sam_of(optimizer),
        scaler=None,
        autocast=nullcontext,
    )


def count_update(run: Run, micro_batches: int) -> UpdateCost:
    """Count an update of this number of micro-batches. From the third one on, each costs what the second does, and all
    sub-batches of a loop (--m-sharpness m) cost the same."""
    config, meta = run.config, meta_run(run)
    sam, size = meta.sam, images_per_batch(config)
    x = torch.empty(size, *resolve_data_config(config, meta.model)["input_size"], device=META)
    y = torch.zeros(size, dtype=torch.long, device=META)
    m = config.m_sharpness if sam is not None and not sam.can_group and isinstance(config.m_sharpness, int) else size
    counted = min(micro_batches, 2)

    def count_passes(perturb: bool) -> int:
        batch = (x[:m], y[:m]) if perturb else (x, y)
        return count_flops(lambda: compute_gradient(meta, iter([batch] * counted), counted, perturb))

    def count_step() -> int:
        if sam is not None:
            sam.expect_plain_step()
        return count_flops(meta.optimizer.step)

    passes = count_passes(False) * micro_batches / counted
    plain = passes + count_step()
    if sam is None:
        return UpdateCost(plain)
    if config.tail_opt is not None:
        sam.replace_base(config.tail_opt)
    step = count_step()
    if config.fsdp and not SCOPES[sam.scope].norms_only:  # `engines.fsdp.Sharded` makes a full backward pass
        return UpdateCost(plain, [2 * passes + step])
    first, cycle = count_passes(True), []
    period = int(config.ascent.split(":")[1]) if ":" in config.ascent else 1
    for update in range(ESAM_SAMPLES if sam.ascent.keep_probability < 1 else period):
        sam.ascent.updates = update
        cycle.append(count_passes(True))
    times = micro_batches / counted * (size / m)
    return UpdateCost(plain, [times * flops + step for flops in cycle], recording=first - cycle[0])


def count_flops(function: Callable[[], object]) -> int:
    """FLOPs of one call."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        function()
    return counter.get_total_flops()


def _conv_backward_flops(
    grad: list[int], x: list[int], weight: list[int], *options: object, out_shape: object = None
) -> int:
    """FLOPs of a convolution's backward pass: as many as its forward's for each gradient, of input and weight.

    torch 2.11 to 2.14 count the gradient of a grouped convolution's weight as if it had one group, which made
    the plain step of EfficientNet-Lite0 13 times as expensive."""
    *_, transposed, _, _, wanted = options
    assert isinstance(wanted, Sequence)
    forward = 2 * math.prod(x if transposed else grad) * math.prod(weight[1:])
    return forward * sum(wanted[:2])


FORMULAS = {torch.ops.aten.convolution_backward: _conv_backward_flops}
