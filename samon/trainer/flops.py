"""FLOPs of a run's updates and of plain ones, counted on the meta device, where nothing is computed."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import samon
from samon.checks import require_sam
from samon.errors import error_line
from samon.scope import SCOPES
from samon.trainer.build import Run, build_optimizer
from samon.trainer.config import Config, images_per_batch
from samon.trainer.model import create_train_model, resolve_data_config

log = logging.getLogger("samon")
ESAM_SAMPLES = 8  # updates whose sampled tensors are counted; their mean is within about 1 % of that of many
# Settings that load weights, which the meta device does not hold, and those that only say where a run writes.
IGNORED = {"pretrained": False, "pretrained_path": "", "initial_checkpoint": "", "output": "", "experiment": ""}
IGNORED |= {"seed": 0, "resume": "", "config": None, "data": None, "data_dir": None}


class UpdateCost:
    """FLOPs of an update of one process, by its kind.

    Args:
        plain: one pass, without perturbation.
        cycle: two-pass updates; number i costs as much as `cycle[i % len(cycle)]`.
        recording: what an update costs more in which replay records the order of modules.
    """

    def __init__(self, plain: float, *cycle: float, recording: float = 0.0) -> None:
        self.plain, self.cycle, self.recording = plain, cycle, recording

    def two_pass(self, index: int) -> float:
        """The cost of the two-pass update with this number, from 0."""
        return self.cycle[index % len(self.cycle)]


def step_flops(run: Run) -> dict[str, float] | None:
    """FLOPs per process and micro-batch of a run from its first to its last epoch (`step`), and of the same run without
    perturbation (`plain`).

    Every update is counted as it runs, its last micro-batches and the optimizer included (Muon multiplies matrices).
    Exceptions: of ESAM, the tensors sampled by the first ESAM_SAMPLES updates stand for all; a resumed run records
    the order of modules for replay once more; random numbers that a model draws between its early modules, which turn
    replay off, are not noticed; the Fisher diagonal of SSAM-F and skipped updates are not considered.

    Returns:
        None, with the reason logged, where they cannot be counted in advance.
    """
    config, per_epoch, accumulation = run.config, run.updates_per_epoch, run.config.grad_accum_steps
    if reason := unknown_in_advance(config):
        log.info("%s; the FLOPs are not known in advance", reason)
        return None
    batches, epochs = len(run.train_loader), max(1, run.stop - run.start)
    rest = batches - (per_epoch - 1) * accumulation  # micro-batches of an epoch's last update

    def micro_batches(update: int) -> int:
        return rest if (update + 1) % per_epoch == 0 else accumulation

    try:
        options = {key: value for key, value in config.opt_kwargs.items() if key != "fused"}  # no kernels on meta
        settings = json.dumps(vars(config.but(**IGNORED, opt_kwargs=options)), sort_keys=True)
        costs = {count: count_update(settings, count) for count in {rest, micro_batches(0)}}
    except Exception as error:  # a finished run must not fail here, whatever its model does on the meta device
        log.info("FLOPs of a step were not counted: %s", error_line(error, 200))
        return None
    plain = epochs * sum(costs[micro_batches(update)].plain for update in range(per_epoch))
    two_pass = [u for u in run.two_pass_updates if run.start * per_epoch <= u < run.stop * per_epoch]
    kinds = [costs[micro_batches(update)] for update in two_pass]
    more = math.fsum(cost.two_pass(index) - cost.plain for index, cost in enumerate(kinds))
    more += next((cost.recording for cost in kinds if cost.recording), 0.0)  # once in a run
    total = epochs * batches
    return {"step": (plain + more) / total, "plain": plain / total}


def unknown_in_advance(config: Config) -> str:
    """What decides the cost of an update only during training; '' if nothing does."""
    if config.ascent == "aesam":
        return "--ascent aesam decides during training"
    if config.train_img_sizes:
        return "--train-img-sizes changes the image size from batch to batch"
    return ""


@cache
def count_update(settings: str, micro_batches: int) -> UpdateCost:
    """Count an update of this number of micro-batches.

    Args:
        settings: of the run, JSON.
    """
    config = Config(**json.loads(settings))
    with torch.device("meta"):
        model = create_train_model(config).train()
        size, images = resolve_data_config(config, model)["input_size"], images_per_batch(config)
        x, y = torch.empty(images, *size), torch.zeros(images, dtype=torch.long)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    optimizer = build_optimizer(config.but(lr=0.1), model)
    sam = samon.sam_of(optimizer)
    if sam is not None:
        sam.expect_plain_step()
    one_pass = count_flops(lambda: loss(x, y).backward())
    plain = micro_batches * one_pass + count_flops(optimizer.step)
    if sam is None:
        return UpdateCost(plain)
    if config.tail_opt is not None:
        sam.replace_base(config.tail_opt)
    passes, times = two_pass_call(config, optimizer, loss, x, y, micro_batches)

    def count() -> int:
        optimizer.zero_grad()
        return count_flops(passes)

    first, step = count(), count_flops(optimizer.step)
    if config.fsdp and not SCOPES[sam.scope].norms_only:  # `engines.fsdp.Sharded` makes a full backward pass
        return UpdateCost(plain, 2 * micro_batches * one_pass + step)
    cycle = []
    period = int(config.ascent.split(":")[1]) if ":" in config.ascent else 1
    for update in range(ESAM_SAMPLES if sam.ascent.keep_probability < 1 else period):
        sam.ascent.updates = update  # from the first one again, now with a replay plan and a direction
        cycle.append(count())
    return UpdateCost(plain, *(times * flops + step for flops in cycle), recording=first - cycle[0])


def two_pass_call(
    config: Config,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    micro_batches: int,
) -> tuple[Callable[[], object], float]:
    """A call of `samon.two_pass` as `samon.trainer.gradient` makes them, and how many of them an update consists of."""
    m, size, ascent = config.m_sharpness, len(x), None
    groups = size // m if isinstance(m, int) else 1
    forwards, times = [partial(loss, x, y)], float(micro_batches)
    if m == "global":  # from two micro-batches on, each costs the same
        forwards *= min(micro_batches, 2)
        times /= len(forwards)
    elif groups > 1 and not require_sam(optimizer).can_group:
        forwards, times, groups = [partial(loss, x[:m], y[:m])], times * groups, 1
    part = math.ceil(config.ascent_fraction * size)
    if part < size or config.ascent_size:
        side = config.ascent_size
        ascent = partial(loss, x.new_empty(part, x.shape[1], *([side, side] if side else x.shape[2:])), y[:part])
    # Not `reduce`: only rank 0 counts, and the mean over the processes costs no FLOPs.
    return partial(
        samon.two_pass,
        optimizer,
        forwards,
        groups=groups,
        bn_stats=config.bn_stats,
        # Drawing random numbers between modules turns replay off, and nothing is drawn on the meta device.
        replay=not config.no_replay and not config.norm_dropout,
        ascent_forward=ascent,
    ), times


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
