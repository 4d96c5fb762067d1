"""The training loop: epochs of updates, each followed by validation and a checkpoint."""

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from samon import rng as generators
from samon.data import DataError
from samon.data.corrupt import WorkerError
from samon.engines.masks import fisher_diagonal
from samon.errors import RunError, os_error_text
from samon.evals.accuracy import accuracy, pad_batches
from samon.progress import progress_bar
from samon.trainer.apply import apply_gradient, count_skipped, parameters
from samon.trainer.build import Run, tail_options
from samon.trainer.checkpoint import CheckpointManager
from samon.trainer.flag_rows import parse_interval
from samon.trainer.gradient import Batch, Forward, compute_gradient
from samon.trainer.logging import RunLogger, mean_lr
from samon.trainer.meter import Meter, Timer
from samon.trainer.model import parse_dtype, resolve_data_config
from samon.trainer.signals import SignalHandler
from samon.trainer.state import Metrics, Progress, Tree

log = logging.getLogger("samon")


class Update(NamedTuple):
    """What `fit` yields after each update."""

    run: Run
    progress: Progress
    two_pass: bool  # whether the gradient was taken at w + eps


def fit(
    run: Run, checkpoints: CheckpointManager, signals: SignalHandler, logger: RunLogger, rng: Tree | None = None
) -> Generator[Update, None, Metrics]:
    """Train from `run.progress` to the last epoch: yield after each update, return the final metrics.

    Args:
        rng: state of the random generators to set before the first update.

    Raises:
        UserError: the data do not fit the settings, or too many samples are corrupt.
        RunError: too many non-finite updates, a loader worker was killed, or a file cannot be written.
    """
    metrics = logger.last_epoch() if run.progress.epoch >= run.stop else {}
    with naming_last_checkpoint(checkpoints):
        while run.progress.epoch < run.stop:
            progress = run.progress
            renew_mask(run)
            run.task.trainable_module.train()
            meter, timer = Meter(progress), Timer(progress, run.images_per_sample)
            logger.start_epoch()
            for batches, count in updates(run, timer, logger, rng):
                perturb = run.update in run.two_pass_updates
                set_rho(run)
                replace_base(run)
                values, images = compute_gradient(run, batches, count, perturb)
                values["grad_norm"], applied = apply_gradient(run)
                meter.add(images, values, applied)
                if isinstance(applied, bool):
                    count_skipped(run, meter.outcomes)
                progress.updates += 1
                progress.samples += int(images / run.images_per_sample) * run.dist_info.size
                lr = mean_lr(run.optimizer)  # before the schedule sets that of the next update
                update_average_and_schedule(run)
                yield Update(run, progress, perturb)
                logger.advance()
                if progress.updates % run.config.log_interval == 0 or progress.updates == run.updates_per_epoch:
                    count_skipped(run, meter.outcomes)
                    logger.log_update(meter.read(signals.reduce), lr, *timer.read(), count_corrupt(run, signals))
                save_or_stop(run, checkpoints, signals, meter)
            rng = None
            metrics = finish_epoch(run, checkpoints, signals, logger, meter)
        metrics |= {f"best_{key}": checkpoints.best[key] for key in ("metric", "epoch")}
        return metrics | {"skipped_steps": run.progress.skipped, "skipped_samples": count_corrupt(run, signals)}


def count_corrupt(run: Run, signals: SignalHandler) -> int:
    """Corrupt samples that all processes have skipped since this start."""
    count = torch.tensor([run.train_loader.corrupt_samples])
    signals.reduce(count)
    return int(count)


def finish_epoch(
    run: Run, checkpoints: CheckpointManager, signals: SignalHandler, logger: RunLogger, meter: Meter
) -> Metrics:
    """Validate, step the schedule, save a checkpoint, and start the next epoch; return the metrics."""
    config, done = run.config, run.progress.epoch + 1
    if hasattr(run.optimizer, "sync_lookahead"):
        run.optimizer.sync_lookahead()
    share_running_statistics(run, run.model)
    train: Metrics = {name: meter.epoch_mean(name) for name in ("loss", "loss_perturbed")}
    evaluated, decisive = None, None
    due = done % config.val_interval == 0 or done == run.stop or done in config.save_epochs
    if due:
        evaluated = validate(run, checkpoints, signals)
        decisive = (train if evaluated is None else evaluated)[run.metric]
        logger.log_epoch(train, evaluated)
    if run.scheduler is not None:
        run.scheduler.step(done, decisive)
    if due:
        checkpoints.save_epoch(decisive)
    metrics: Metrics = {"epoch": run.progress.epoch} | {f"train_{k}": v for k, v in train.items()}
    metrics |= {f"eval_{k}": v for k, v in (evaluated or {}).items() if k != "num_samples"}
    run.progress = run.progress.next_epoch()
    return metrics


@contextmanager
def naming_last_checkpoint(checkpoints: CheckpointManager) -> Iterator[None]:
    """Name the last good checkpoint in errors that end the training."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error}; {checkpoints.describe_last_good()}") from error
    except (WorkerError, FloatingPointError) as error:
        raise RunError(f"{error}; {checkpoints.describe_last_good()}") from error
    except OSError as error:
        error.filename = error.filename or str(checkpoints.directory)
        raise RunError(f"{os_error_text(error)}; {checkpoints.describe_last_good()}") from error


# --- batches --------------------------------------------------------------------------------------------------------


def updates(run: Run, timer: Timer, logger: RunLogger, rng: Tree | None) -> Iterator[tuple[Iterator[Batch], int]]:
    """For each update from `run.progress` to the end of the epoch, its micro-batches and their number."""
    config, loader, progress = run.config, run.train_loader, run.progress
    loader.set_epoch(progress.epoch, progress.samples)
    if config.mixup_off_epoch and progress.epoch >= config.mixup_off_epoch:
        (run.mixup or loader).mixup_enabled = False
    left = len(loader) - progress.samples // (config.batch_size * run.dist_info.size)
    batches = timer.timed(loader)
    while left > 0:
        count = min(config.grad_accum_steps, left)
        first = next(batches)
        if rng is not None:  # after the loader has started, which may draw too
            generators.set_state(rng, run.dist_info.device)
            rng = None
        logger.log_images(first[0])
        yield (to_device(run, *batch) for batch in chain([first], islice(batches, count - 1))), count
        left -= count
    if rng is not None:  # the run was stopped after the last update of the epoch
        generators.set_state(rng, run.dist_info.device)


def to_device(run: Run, images: Tensor, target: Tensor) -> Batch:
    """The batch as the model takes it. Without the prefetcher the images are mixed here."""
    config, device = run.config, run.dist_info.device
    if config.no_prefetcher:
        images, target = images.to(device, parse_dtype(config.model_dtype)), target.to(device)
        if run.mixup is not None:
            images, target = run.mixup(images, target)
    return images.contiguous(memory_format=torch.channels_last) if config.channels_last else images, target


# --- an update ------------------------------------------------------------------------------------------------------


def set_rho(run: Run) -> None:
    """Set rho of the next update (--rho-sched)."""
    if run.sam is not None and run.rho_schedule is not None:
        group = run.optimizer.param_groups[0]
        run.sam.rho = run.rho_schedule.at(run.update, group["lr"] / group.get("lr_scale", 1.0))


def replace_base(run: Run) -> None:
    """Replace the base optimizer in the first update of the tail (--tail-opt)."""
    config, sam = run.config, run.sam
    if sam is None or run.tail is None or config.tail_opt is None or sam.replacement is not None:
        return
    if run.update in run.tail:
        before = type(sam.base).__name__
        carried = sam.replace_base(config.tail_opt, config.tail_lr, **tail_options(config))
        text = "update %d, the start of the tail: --tail-opt %s replaces %s, with the momentum of %d of %d tensors"
        log.info(text, run.update, config.tail_opt, before, carried, sum(1 for _ in parameters(run.optimizer)))


def update_average_and_schedule(run: Run) -> None:
    """What follows the optimizer's step: weight average, learning rate, --synchronize-step."""
    if run.ema is not None:
        run.ema.update(run.model, step=run.update)
    if run.scheduler is not None:
        run.scheduler.step_update(num_updates=run.update)
    if run.config.synchronize_step and run.dist_info.device.type == "cuda":
        torch.cuda.synchronize()


def save_or_stop(run: Run, checkpoints: CheckpointManager, signals: SignalHandler, meter: Meter) -> None:
    """Save a mid-epoch state if one is due; stop after a signal."""
    for loader in (run.train_loader, run.eval_loader):
        if loader is not None and loader.worker_error is not None:
            signals.fail(loader.worker_error)
    signum, due = signals.poll()
    steps = parse_interval(run.config.checkpoint_interval)[0] or run.config.recovery_interval
    due |= bool(steps) and run.progress.updates % steps == 0
    if signum or (due and run.progress.updates < run.updates_per_epoch):
        count_skipped(run, meter.outcomes)
        meter.flush(signals.reduce)
        checkpoints.save_recovery()
    if signum:
        signals.stop(signum, checkpoints)


# --- around an epoch ------------------------------------------------------------------------------------------------


def renew_mask(run: Run) -> None:
    """Renew a sparse mask at every --mask-epochs-th epoch, unless `mask_every` in --opt-kwargs counts steps.

    The Fisher diagonal is the sum over --fisher-samples images, one by one, in the order and with the augmentation of
    the epoch that starts. The model is in eval mode, since BatchNorm has no statistics of one image, and the random
    generators are left unchanged.
    """
    sam, config = run.sam, run.config
    if sam is None or sam.mask is None or "mask_every" in config.opt_kwargs:
        return
    if not sam.mask.begin_epoch(run.progress.epoch, run.epochs, config.mask_epochs):
        return
    share = -(-config.fisher_samples // run.dist_info.size)
    with generators.fork(run.dist_info.device):
        run.model.eval()
        run.train_loader.set_epoch(run.progress.epoch, 0)
        diagonal = fisher_diagonal(sam, islice(image_losses(run), share))
        run.model.train()
    sam.mask.renew_fisher(diagonal)
    log.info("SSAM-F: new mask from %d images", share * run.dist_info.size)


def image_losses(run: Run) -> Iterator[Forward]:
    """The loss of each training image, by the bare model: not compiled, not wrapped for DDP."""

    def loss(image: Tensor, target: Tensor) -> Tensor:
        with run.autocast():
            return run.task.criterion(run.model(image), target)

    for batch in run.train_loader:
        images, target = to_device(run, *batch)
        yield from (partial(loss, *one) for one in zip(images.split(1), target.split(1), strict=True))


def share_running_statistics(run: Run, model: nn.Module) -> None:
    """Average or broadcast the BatchNorm statistics over the processes (--dist-bn)."""
    if run.dist_info.size > 1 and run.config.dist_bn:
        distribute_bn(model, run.dist_info.size, run.config.dist_bn == "reduce")


def validate(run: Run, checkpoints: CheckpointManager, signals: SignalHandler) -> dict[str, float] | None:
    """Metrics of the model, or of its average if there is one on the device; None without validation data.

    After a signal the run stops, with the epoch's training saved.
    """
    if run.eval_loader is None:
        return None
    model = run.model
    if run.ema is not None and not run.config.model_ema_force_cpu:
        model = run.ema.module
        share_running_statistics(run, model)
    dtype = next(model.parameters()).dtype  # float32 for the average of a model in half precision
    batches: Iterator[Batch] = ((images.to(dtype), target) for images, target in signals.until_signal(run.eval_loader))
    if run.config.fsdp:
        size = resolve_data_config(run.config, run.model)["input_size"]
        image = torch.zeros(1, *size, device=run.dist_info.device, dtype=dtype)
        batches = pad_batches(batches, len(run.eval_loader), model, image, run.autocast)
    shown, total = run.dist_info.is_rank_zero, len(run.eval_loader)
    metrics = accuracy(
        model,
        progress_bar(f"validation {run.progress.epoch}", total, "batch", batches, show=shown),
        device=run.dist_info.device,
        amp_autocast=run.autocast,
        channels_last=run.config.channels_last,
    )
    if signum := signals.agree():
        checkpoints.save_recovery()
        signals.stop(signum, checkpoints)
    return metrics
