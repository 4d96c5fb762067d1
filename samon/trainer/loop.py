"""The training loop: what happens in an update, an epoch, a run."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import distribute_bn
from torch import Tensor

from samon import rng as generators
from samon.data import DataError
from samon.data.corrupt import WorkerError
from samon.engines.cuda_graph import own_gradients
from samon.engines.fsdp import average_gradients
from samon.engines.masks import fisher_diagonal
from samon.errors import RunError, UserError, os_error_text
from samon.evals.accuracy import accuracy
from samon.geometry import to_float32
from samon.progress import progress_bar
from samon.trainer.apply import apply_gradient, count_bad, parameters
from samon.trainer.build import Run
from samon.trainer.checkpoint import CheckpointManager
from samon.trainer.control import Control
from samon.trainer.flag_rows import steps_or_minutes
from samon.trainer.fsdp import pad_batches
from samon.trainer.logging import Report
from samon.trainer.meter import Clock, Meter
from samon.trainer.model import parse_dtype, resolve_data_config, uses_cuda_graphs
from samon.trainer.state import Progress
from samon.two_pass import two_pass

log = logging.getLogger("samon")
Batch = tuple[Tensor, Tensor]
Update = tuple[Iterator[Batch], int]


def fit(
    run: Run,
    progress: Progress,
    checkpoints: CheckpointManager,
    control: Control,
    report: Report,
    rng: dict[str, Any] | None,
) -> dict[str, Any]:
    """Epochs from `progress` to the end; returns the final metrics. `rng`: random state to set before the next update.

    Raises:
        UserError: the data do not fit the settings, or too many samples are unreadable.
        RunError: too many non-finite updates, a loader worker was killed, or a file cannot be written.
    """
    try:
        return _fit(run, progress, checkpoints, control, report, rng)
    except DataError as error:
        if checkpoints.last_good is None:
            raise
        raise DataError(f"{error}; {checkpoints.describe_last_good()}") from error
    except WorkerError as error:
        raise RunError(f"{error}; {checkpoints.describe_last_good()}") from error
    except OSError as error:
        error.filename = error.filename or str(checkpoints.directory)
        raise RunError(f"{os_error_text(error)}; {checkpoints.describe_last_good()}") from error


def _fit(
    run: Run,
    progress: Progress,
    checkpoints: CheckpointManager,
    control: Control,
    report: Report,
    rng: dict[str, Any] | None,
) -> dict[str, Any]:
    final = report.told() if progress.epoch >= run.stop else {}
    while progress.epoch < run.stop:
        train = train_epoch(run, progress, checkpoints, control, report, rng)
        rng = None
        share_running_statistics(run, run.model)
        done = progress.epoch + 1
        due = done % run.config.val_interval == 0 or done == run.stop or done in run.config.save_epochs
        evaluated = decisive = None
        if due:
            evaluated = validate(run, progress, checkpoints, control)
            decisive = (train if evaluated is None else evaluated)[run.metric]
            report.end_epoch(run, progress, train, evaluated)
        if run.scheduler is not None:
            run.scheduler.step(progress.epoch + 1, decisive)
        if due:
            checkpoints.save_epoch(progress, decisive)
        final = {"epoch": progress.epoch} | {f"train_{k}": v for k, v in train.items()}
        final |= {f"eval_{k}": v for k, v in (evaluated or {}).items() if k != "num_samples"}
        progress.epoch, progress.updates, progress.samples, progress.sums = progress.epoch + 1, 0, 0, {}
        progress.layouts = []
    best = checkpoints.best
    bad = torch.tensor([run.train_loader.corrupt_samples])
    control.reduce(bad)
    return final | {
        "best_metric": best["metric"],
        "best_epoch": best["epoch"],
        "skipped_steps": progress.skipped,
        "skipped_samples": int(bad),
    }


def train_epoch(
    run: Run, progress: Progress, checkpoints: CheckpointManager, control: Control, report: Report, rng: Any
) -> dict[str, float | None]:
    """The updates of an epoch that are left; returns the mean losses over all of its samples."""
    run.hooks.begun(run, progress)
    renew_mask(run, progress)
    run.net.train()
    meter, clock = Meter(progress), Clock(progress)
    report.begin_epoch(run, progress)
    for batches, count in updates(run, progress, clock, rng, report):
        perturb = perturbs(run, progress)
        values, samples = gradient(run, batches, count, perturb)
        values["grad_norm"], applied = apply_gradient(run)
        meter.add(samples, values, applied)
        if isinstance(applied, bool):
            count_bad(run, progress, checkpoints, meter.outcomes)
        progress.updates, progress.samples = progress.updates + 1, progress.samples + samples * run.world.size
        after_update(run, progress)
        run.hooks.updated(run, progress, perturb)
        report.advance()
        last = progress.updates == run.updates_per_epoch
        if progress.updates % run.config.log_interval == 0 or last:
            count_bad(run, progress, checkpoints, meter.outcomes)
            report.update(run, progress, meter.read(control.reduce), *clock.read())
        save_or_stop(run, progress, checkpoints, control, meter, last)
    if hasattr(run.optimizer, "sync_lookahead"):
        run.optimizer.sync_lookahead()
    return {"loss": meter.epoch_mean("loss"), "loss_perturbed": meter.epoch_mean("loss_perturbed")}


def renew_mask(run: Run, progress: Progress) -> None:
    """At the begin of each --mask-epochs-th epoch; a `mask_every` in --opt-kwargs counts steps instead.

    The Fisher diagonal is taken over --fisher-samples images in the order and augmentation of the epoch that begins,
    one by one, in eval mode: BatchNorm has no statistics of a single image. Generators are left as they were.
    """
    sam, config = run.sam, run.config
    if sam is None or sam.mask is None or "mask_every" in config.opt_kwargs:
        return
    if not sam.mask.begin_epoch(progress.epoch, run.epochs, config.mask_epochs):
        return
    share = -(-config.fisher_samples // run.world.size)
    with generators.fork(run.world.device):
        run.model.eval()
        run.train_loader.set_epoch(progress.epoch, 0)
        diagonal = fisher_diagonal(sam, islice(image_losses(run), share))
        run.model.train()
    sam.mask.renew_fisher(diagonal)
    log.info("SSAM-F: the mask is renewed from %d images", share * run.world.size)


def image_losses(run: Run) -> Iterator[Callable[[], Tensor]]:
    """The loss of every image by itself, of the model as it is without wrappers."""

    def loss(image: Tensor, target: Tensor) -> Tensor:
        with run.autocast():
            return run.loss(run.model(image), target)

    for batch in run.train_loader:
        images, target = to_device(run, *batch)
        yield from (partial(loss, *one) for one in zip(images.split(1), target.split(1), strict=True))


# --- an update ------------------------------------------------------------------------------------------------------


def updates(run: Run, progress: Progress, clock: "Clock", rng: Any, report: Report) -> Iterator[Update]:
    """(the micro-batches of an update, their number), from where `progress` stands to the end of the epoch."""
    loader, accumulate = run.train_loader, run.config.grad_accum_steps
    loader.set_epoch(progress.epoch, progress.samples)
    off = run.config.mixup_off_epoch
    on = not off or progress.epoch < off
    if run.mixup is not None:
        run.mixup.mixup_enabled = on
    elif not on:
        loader.mixup_enabled = False
    left = len(loader) - progress.samples // (run.config.batch_size * run.world.size)
    source = clock.timed(loader) if left else iter(())
    if left:
        first = next(source)
        report.images(first[0], progress.epoch * run.updates_per_epoch, progress.updates % run.config.log_interval == 0)
        source = chain([first], source)
    if rng is not None:  # after the loader has started, which may draw too
        generators.set_state(rng, run.world.device)
    while left > 0:
        count = min(accumulate, left)
        yield (to_device(run, *batch) for batch in islice(source, count)), count
        left -= count


def to_device(run: Run, images: Tensor, target: Tensor) -> Batch:
    """The batch as the model takes it; without the prefetcher the mixing happens here."""
    config, device = run.config, run.world.device
    if config.no_prefetcher:
        images = images.to(device, parse_dtype(config.model_dtype))
        target = target.to(device)
        if run.mixup is not None:
            images, target = run.mixup(images, target)
    images = images.contiguous(memory_format=torch.channels_last) if config.channels_last else images
    run.hooks.batch(images, target)
    return images, target


def perturbs(run: Run, progress: Progress) -> bool:
    """Whether this update is a two-pass one (--sam-start-epoch, --sam-end-epoch, --sam-every)."""
    config, end = run.config, run.config.sam_end_epoch
    if run.sam is None or progress.epoch < config.sam_start_epoch or (end is not None and progress.epoch >= end):
        return False
    return (progress.epoch * run.updates_per_epoch + progress.updates) % config.sam_every == 0


def gradient(run: Run, batches: Iterator[Batch], count: int, perturb: bool) -> tuple[dict[str, Tensor], int]:
    """Leave in `.grad` the gradient of the mean loss over the micro-batches, at w + eps if `perturb`.

    Returns: (mean losses and norms as 0-dim device tensors, samples of this process).
    """
    run.optimizer.zero_grad()
    rows, samples = [], 0
    if perturb and run.config.m_sharpness == "global":
        held = list(batches)
        samples = sum(len(images) for images, _ in held)
        rows.append(perturbed(run, [forward(run, *batch) for batch in held], reduce="global"))
    else:
        for index, (images, target) in enumerate(batches):
            samples += len(images)
            with sync_if(run, index + 1 == count):
                rows.append((sharp if perturb else plain)(run, images, target, 1 / count))
    if run.config.fsdp:
        average_gradients(parameters(run.optimizer))
    names = rows[0].keys()
    return {name: torch.stack([row[name] for row in rows]).mean() for name in names}, samples


def sync_if(run: Run, last: bool) -> Any:
    """Gradients are sent with the last micro-batch only."""
    return nullcontext() if last or run.no_sync is None else run.no_sync()


def forward(run: Run, images: Tensor, target: Tensor) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        with run.autocast():
            logits = run.net(images)
            if not isinstance(logits, Tensor):
                what = f"--model {run.config.model} returns a {type(logits).__name__} in training, not logits alone"
                raise UserError(f"{what}; drop aux_logits or the like from --model-kwargs")
            return run.loss(to_float32(logits), target)  # on the CPU autocast leaves losses in bfloat16: 3 digits

    return loss


def plain(run: Run, images: Tensor, target: Tensor, scale: float) -> dict[str, Tensor]:
    """The base step's gradient."""
    if run.sam is not None:
        run.sam.expect_plain_step()
    graphs = uses_cuda_graphs(run.config)
    if graphs:
        torch.compiler.cudagraph_mark_step_begin()
    with own_gradients(parameters(run.optimizer)) if graphs else nullcontext():
        loss = forward(run, images, target)()
        scaled = loss * scale
        scaled = scaled if run.scaler is None else run.scaler.scale(scaled)
        scaled.backward(create_graph=getattr(run.optimizer, "is_second_order", False))
    return {"loss": loss.detach()}  # made outside the graphs


def sharp(run: Run, images: Tensor, target: Tensor, scale: float) -> dict[str, Tensor]:
    """The two-pass gradient of one micro-batch, in sub-batches of m if --m-sharpness is a number."""
    m, size = run.config.m_sharpness, len(images)
    if m == "device" or m == size:
        first = ascent_forward(run, images, target)
        return perturbed(run, forward(run, images, target), loss_scale=scale, ascent_forward=first)
    groups, synced = size // int(m), getattr(run.net, "require_backward_grad_sync", False)
    if run.sam is not None and run.sam.can_group:  # every group's own copy of the perturbed parameters fits in one pass
        return perturbed(run, forward(run, images, target), loss_scale=scale, groups=groups)
    rows = []
    for index, (x, y) in enumerate(zip(images.split(int(m)), target.split(int(m)), strict=True)):
        with sync_if(run, index + 1 == groups or not synced):
            rows.append(perturbed(run, forward(run, x, y), loss_scale=scale / groups))
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


def ascent_forward(run: Run, images: Tensor, target: Tensor) -> Callable[[], Tensor] | None:
    """The ascent pass over a part of the batch (--ascent-fraction) or smaller images (--ascent-size), if asked for."""
    part, size = math.ceil(run.config.ascent_fraction * len(images)), run.config.ascent_size
    if part == len(images) and size is None:
        return None
    images = images[:part]
    if size is not None:
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return forward(run, images, target[:part])


def perturbed(run: Run, forwards: Any, **how: Any) -> dict[str, Tensor]:
    config = run.config
    two_pass(
        run.optimizer,
        forwards,
        no_sync=run.no_sync,
        scaler=run.scaler,
        bn_stats="second" if config.ascent_size else config.bn_stats,  # statistics of small images are others
        same_noise=config.same_noise,
        replay=not run.settled.no_replay,
        **how,
    )
    return {} if run.sam is None else dict(run.sam.stats)


def after_update(run: Run, progress: Progress) -> None:
    """What follows the optimizer's step: average, schedule, and --synchronize-step."""
    count = progress.epoch * run.updates_per_epoch + progress.updates
    if run.ema is not None:
        run.ema.update(run.model, step=count)
    if run.scheduler is not None:
        run.scheduler.step_update(num_updates=count)
    if run.config.synchronize_step and run.world.device.type == "cuda":
        torch.cuda.synchronize()


def save_or_stop(
    run: Run, progress: Progress, checkpoints: CheckpointManager, control: Control, meter: Meter, last: bool
) -> None:
    """A state within the epoch where one is due; on a signal also the end."""
    for loader in (run.train_loader, run.eval_loader):
        if loader is not None and loader.worker_error is not None:
            control.fail(loader.worker_error)
    signum, due = control.poll()
    steps = steps_or_minutes(run.config.checkpoint_interval)[0] or run.config.recovery_interval
    due |= bool(steps) and progress.updates % steps == 0
    if signum or (due and not last):
        count_bad(run, progress, checkpoints, meter.outcomes)
        meter.read(control.reduce)
        checkpoints.save_recovery(progress)
    if signum:
        checkpoints.wait()
        raise control.reason(signum, checkpoints)


# --- after an epoch -------------------------------------------------------------------------------------------------


def share_running_statistics(run: Run, model: torch.nn.Module) -> None:
    if run.world.size > 1 and run.settled.dist_bn:
        distribute_bn(model, run.world.size, run.settled.dist_bn == "reduce")


def validate(run: Run, progress: Progress, checkpoints: CheckpointManager, control: Control) -> dict[str, float] | None:
    """Metrics of the model, or of its average where one is kept; None without validation data.

    A signal meanwhile ends the run, with the epoch's training saved.
    """
    if run.eval_loader is None:
        return None
    run.hooks.validating(run, progress)
    model = run.model
    if run.ema is not None and not run.config.model_ema_force_cpu:
        model = run.ema.module
        share_running_statistics(run, model)
    dtype = next(model.parameters()).dtype  # float32 for the average of a model in half precision
    batches: Iterator[Batch] = ((images.to(dtype), target) for images, target in control.until_signal(run.eval_loader))
    if run.config.fsdp:
        size = resolve_data_config(run.config, run.model)["input_size"]
        image = torch.zeros(1, *size, device=run.world.device, dtype=dtype)
        batches = pad_batches(batches, len(run.eval_loader), model, image, run.autocast)
    metrics = accuracy(
        model,
        progress_bar(
            f"validation {progress.epoch}", len(run.eval_loader), "batch", batches, show=run.world.is_rank_zero
        ),
        device=run.world.device,
        amp_autocast=run.autocast,
        channels_last=run.config.channels_last,
    )
    if signum := control.agree():
        checkpoints.save_recovery(progress)
        checkpoints.wait()
        raise control.reason(signum, checkpoints)
    return metrics
