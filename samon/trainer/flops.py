"""FLOPs of a run's update and of a plain one, counted on the meta device, where nothing is computed."""

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
from samon.errors import error_line
from samon.trainer.build import build_optimizer
from samon.trainer.config import Config, resolve
from samon.trainer.model import create_train_model

log = logging.getLogger("samon")
# The settings on which the FLOPs of an update depend.
MODEL_KEYS = {"model", "model_kwargs", "num_classes", "in_chans", "img_size", "input_size", "batch_size"}
MODEL_KEYS |= {"freeze", "fix_norm", "train_only_norm", "opt", "base_opt", "grad_accum_steps"}
SAM_KEYS = {"perturb", "perturb_frozen", "sparsity", "ascent", "ascent_fraction", "ascent_size", "gsam_alpha"}
SAM_KEYS |= {"no_replay", "m_sharpness", "sam_tail", "tail_opt"}


def step_flops(config: Config, tail: samon.Tail | None = None) -> dict[str, float] | None:
    """FLOPs per process of the mean update of a run (`step`) and of an update without perturbation (`plain`).

    Those of the optimizer are included (Muon multiplies matrices). None, with the reason logged, where they cannot be
    counted in advance.
    """
    if config.ascent == "aesam":
        log.info("--ascent aesam decides during training; its FLOPs are not known in advance")
        return None
    keys = sorted(MODEL_KEYS | SAM_KEYS if samon.is_sam_name(config.opt) else MODEL_KEYS)
    settings = {key: value for key in keys if (value := getattr(config, key)) is not None}
    try:
        plain, two_pass = count_step(json.dumps(settings))
    except Exception as error:  # a finished run must not fail here, whatever its model does on the meta device
        log.info("FLOPs of a step were not counted: %s", error_line(error, 200))
        return None
    end = config.epochs if config.sam_end_epoch is None else min(config.sam_end_epoch, config.epochs)
    share = max(0, end - config.sam_start_epoch) / max(1, config.epochs) / config.sam_every
    if config.sam_tail is not None:
        share = config.sam_tail if tail is None else tail.share
    return {"step": share * two_pass + (1 - share) * plain, "plain": plain}


@cache
def count_step(settings: str) -> tuple[float, float]:
    """FLOPs of a plain update, and of an update of the optimizer (or --tail-opt) in these settings (JSON)."""
    config = resolve({}, json.loads(settings))
    with torch.device("meta"):
        model = create_train_model(config).train()
        size = config.input_size or [config.in_chans or 3, *[config.img_size or 224] * 2]
        x, y = torch.empty(config.batch_size, *size), torch.zeros(config.batch_size, dtype=torch.long)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    optimizer = build_optimizer(config.but(lr=0.1), model)
    sam = samon.sam_of(optimizer)

    def step() -> float:
        """FLOPs of the optimizer, per micro-batch."""
        return count_flops(optimizer.step) / config.grad_accum_steps

    if sam is not None:
        sam.expect_plain_step()
    plain = count_flops(lambda: loss(x, y).backward()) + step()
    if sam is None:
        return plain, plain
    if config.tail_opt is not None:
        sam.replace_base(config.tail_opt)
    groups = config.batch_size // config.m_sharpness if isinstance(config.m_sharpness, int) else 1
    ascent_forward = None
    if config.ascent_fraction < 1 or config.ascent_size:
        images = math.ceil(config.ascent_fraction * config.batch_size)  # as in the training loop
        small = torch.empty(images, size[0], *[config.ascent_size or size[1]] * 2, device="meta")
        ascent_forward = partial(loss, small, y[:images])

    def passes() -> None:
        optimizer.zero_grad()
        samon.two_pass(
            optimizer, partial(loss, x, y), groups=groups, replay=not config.no_replay, ascent_forward=ascent_forward
        )

    passes()  # the first update may record a replay plan, or have no direction yet
    optimizer.step()
    period = int(config.ascent.split(":")[1]) if ":" in config.ascent else 1
    return plain, sum(count_flops(passes) + step() for _ in range(period)) / period


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
