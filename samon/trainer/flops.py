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
MODEL_KEYS: tuple[str, ...] = ("model", "model_kwargs", "num_classes", "in_chans", "img_size", "input_size")
MODEL_KEYS += ("batch_size", "freeze", "fix_norm", "train_only_norm")
SAM_KEYS: tuple[str, ...] = (
    "perturb",
    "perturb_frozen",
    "sparsity",
    "ascent",
    "ascent_fraction",
    "ascent_size",
    "gsam_alpha",
)
SAM_KEYS += ("no_replay", "m_sharpness")


def step_flops(config: Config) -> dict[str, float] | None:
    """FLOPs per process of the mean update of a run (`step`) and of an update without perturbation (`plain`).

    None, with the reason logged, where they cannot be counted in advance."""
    if config.ascent == "aesam":
        log.info("--ascent aesam decides during training; its FLOPs are not known in advance")
        return None
    perturbs = samon.is_sam_name(config.opt)
    keys = (*MODEL_KEYS, "opt", "base_opt", *(SAM_KEYS if perturbs else ()))
    settings = {key: value for key in keys if (value := getattr(config, key)) is not None}
    try:
        plain, two_pass = count_step(json.dumps(settings))
    except Exception as error:  # a finished run must not fail here, whatever its model does on the meta device
        log.info("FLOPs of a step were not counted: %s", error_line(error, 200))
        return None
    end = config.epochs if config.sam_end_epoch is None else min(config.sam_end_epoch, config.epochs)
    if config.sam_tail is not None:
        return {"step": config.sam_tail * two_pass + (1 - config.sam_tail) * plain, "plain": plain}
    share = max(0, end - config.sam_start_epoch) / max(1, config.epochs) / config.sam_every
    return {"step": share * two_pass + (1 - share) * plain, "plain": plain}


@cache
def count_step(settings: str) -> tuple[float, float]:
    """FLOPs of a plain update, and of an update of the optimizer in these settings (JSON)."""
    config = resolve({}, json.loads(settings))
    with torch.device("meta"):
        model = create_train_model(config).train()
        size = config.input_size or [config.in_chans or 3, *[config.img_size or 224] * 2]
        x, y = torch.empty(config.batch_size, *size), torch.zeros(config.batch_size, dtype=torch.long)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    plain = count_flops(lambda: loss(x, y).backward())
    if not samon.is_sam_name(config.opt):
        return plain, plain
    optimizer = build_optimizer(config.but(lr=0.1), model)
    groups = config.batch_size // config.m_sharpness if isinstance(config.m_sharpness, int) else 1
    ascent_forward = None
    if config.ascent_fraction < 1 or config.ascent_size:
        images = math.ceil(config.ascent_fraction * config.batch_size)  # as in the training loop
        small = torch.empty(images, size[0], *[config.ascent_size or size[1]] * 2, device="meta")
        ascent_forward = partial(loss, small, y[:images])

    def update() -> None:
        optimizer.zero_grad()
        samon.two_pass(
            optimizer, partial(loss, x, y), groups=groups, replay=not config.no_replay, ascent_forward=ascent_forward
        )
        optimizer.step()

    update()  # the first update may record a replay plan, or have no direction yet
    period = int(config.ascent.split(":")[1]) if ":" in config.ascent else 1
    return plain, sum(count_flops(update) for _ in range(period)) / period


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
