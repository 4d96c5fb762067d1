"""The gradient of an update: of micro-batches, at w or at w + eps, in one or two passes."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from samon.engines.cuda_graph import own_gradients
from samon.engines.fsdp import average_gradients
from samon.geometry import to_float32
from samon.trainer.apply import parameters
from samon.trainer.build import Run
from samon.trainer.model import uses_cuda_graphs
from samon.two_pass import two_pass

Batch = tuple[Tensor, Tensor]
Forward = Callable[[], Tensor]
Values = dict[str, Tensor]  # mean losses and norms of an update, 0-dim tensors on the device


def compute_gradient(run: Run, batches: Iterator[Batch], count: int, perturb: bool) -> tuple[Values, int]:
    """Leave in `.grad` the gradient of the mean loss over `count` micro-batches, at w + eps if `perturb`.

    Returns:
        The values of the update, and the number of images of this process, all --aug-splits of a sample.
    """
    run.optimizer.zero_grad()
    rows, number = [], 0
    if perturb and run.config.m_sharpness == "global":
        micro_batches = list(batches)
        number = sum(len(images) for images, _ in micro_batches)
        rows.append(perturbed_gradient(run, [forward(run, *batch) for batch in micro_batches]))
    else:
        for index, (images, target) in enumerate(batches):
            number += len(images)
            with nullcontext() if index + 1 == count else run.no_sync():  # gradients are sent with the last one
                rows.append((sam_gradient if perturb else plain_gradient)(run, images, target, 1 / count))
    if run.config.fsdp:
        average_gradients(parameters(run.optimizer))
    return mean_values(rows), number


def mean_values(rows: Sequence[Values]) -> Values:
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


def forward(run: Run, images: Tensor, target: Tensor) -> Forward:
    """A function that computes the mean loss of a batch."""

    def loss() -> Tensor:
        with run.autocast():
            return run.task(images, target)["loss"]

    return loss


def plain_gradient(run: Run, images: Tensor, target: Tensor, scale: float) -> Values:
    """Add the gradient at w, times `scale`."""
    if run.sam is not None:
        run.sam.expect_plain_step()
    with own_gradients(parameters(run.optimizer)) if uses_cuda_graphs(run.config) else nullcontext():
        loss = forward(run, images, target)()
        scaled = loss * scale
        scaled = scaled if run.scaler is None else run.scaler.scale(scaled)
        scaled.backward(create_graph=getattr(run.optimizer, "is_second_order", False))
    return {"loss": loss.detach()}  # computed outside the CUDA graphs


def sam_gradient(run: Run, images: Tensor, target: Tensor, scale: float) -> Values:
    """Add the gradient at w + eps, times `scale`; in sub-batches of m, each with its own eps, if --m-sharpness is m."""
    assert run.sam is not None
    config, size = run.config, len(images)
    m = size if config.m_sharpness == "device" else int(config.m_sharpness)
    groups = size // m
    if groups > 1 and not run.sam.can_group:  # one sub-batch after the other
        rows = []
        for index, (x, y) in enumerate(zip(images.split(m), target.split(m), strict=True)):
            with nullcontext() if index + 1 == groups else run.no_sync():
                rows.append(perturbed_gradient(run, forward(run, x, y), loss_scale=scale / groups))
        return mean_values(rows)
    part, ascent = math.ceil(config.ascent_fraction * size), None
    if part < size or config.ascent_size is not None:
        small = images[:part]
        if config.ascent_size is not None:
            small = to_float32(small)  # on the CPU, PyTorch does not resize half precision with antialiasing
            small = F.interpolate(small, config.ascent_size, mode="bilinear", antialias=True).to(images.dtype)
        ascent = forward(run, small, target[:part])
    return perturbed_gradient(run, forward(run, images, target), scale, groups, ascent)


def perturbed_gradient(
    run: Run,
    forwards: Forward | Sequence[Forward],
    loss_scale: float = 1.0,
    groups: int = 1,
    ascent_forward: Forward | None = None,
) -> Values:
    """`samon.two_pass` with the settings of the run."""
    config = run.config
    two_pass(
        run.optimizer,
        forwards,
        groups=groups,
        reduce="global" if config.m_sharpness == "global" and run.dist_info.size > 1 else "device",
        no_sync=run.no_sync,
        scaler=run.scaler,
        bn_stats="second" if config.ascent_size else config.bn_stats,  # small images have other statistics
        same_noise=config.same_noise,
        replay=not config.no_replay,
        ascent_forward=ascent_forward,
        loss_scale=loss_scale,
    )
    assert run.sam is not None
    values = dict(run.sam.stats)
    if "loss_perturbed" in values and ascent_forward is None:
        # The sharpness is the difference of two losses of the same images. The mean of `loss` may be over more updates.
        values["loss_two_pass"] = values["loss"]
    return values
