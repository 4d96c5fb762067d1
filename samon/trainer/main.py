"""A training run, from its command line to its last line."""

import logging
import time
from contextlib import ExitStack
from logging.handlers import MemoryHandler
from typing import Any

from timm.utils import random_seed

from samon.data.sources import check_name
from samon.errors import UserError
from samon.trainer.build import Hooks, Run, build
from samon.trainer.checkpoint import CheckpointManager
from samon.trainer.config import Config, dump, parse
from samon.trainer.control import Control
from samon.trainer.distributed import DistInfo, distributed_session, log_handler, rank_zero_only
from samon.trainer.flag_rows import steps_or_minutes
from samon.trainer.logging import Report
from samon.trainer.loop import fit
from samon.trainer.resume import fast_forward_scheduler
from samon.trainer.run_dir import RunDir, find_run_dir, load_run_settings, prepare_run_dir, restore_overwritten
from samon.trainer.state import Progress, load_class_names

log = logging.getLogger("samon")


def main(argv: list[str] | None = None, hooks: Hooks | None = None) -> dict[str, Any]:
    """Parse, build, run; returns the final metrics."""
    config = parse(argv, load_run_settings)
    if config.print_config:
        print(dump(config), end="")
        return {}
    check_name(config.dataset, config.data_dir)
    with distributed_session(config) as world:
        return train(config, world, hooks)


def check_left(run: Run, progress: Progress, run_dir: RunDir) -> None:
    """A run that has ended may be started again, and ends as it did; any other without an epoch is a mistake.

    Raises:
        UserError: no epoch is left.
    """
    if progress.epoch < run.stop:
        return
    from_here = run_dir.source is not None and run_dir.source.parent.resolve() == run_dir.path.resolve()
    if not from_here or run.config.start_epoch is not None:
        where = f"{run_dir.source} goes on at" if run_dir.source else "--start-epoch is"
        raise UserError(f"{where} epoch {progress.epoch} of {run.stop}: nothing is left to train; raise --epochs")
    log.warning("%s has had its %d epochs: nothing is left to do", run_dir.path, run.stop)


def train(config: Config, world: DistInfo, hooks: Hooks | None = None) -> dict[str, Any]:
    """A run of these processes, from the start or from where it stopped."""
    random_seed(config.seed, world.rank)
    began, early = time.monotonic(), MemoryHandler(1)  # without a target it keeps what is logged until there is a file
    run_dir = rank_zero_only(world, lambda: find_run_dir(config))
    control = Control(steps_or_minutes(config.checkpoint_interval)[1])
    with ExitStack() as at_end:
        at_end.callback(control.close)
        with log_handler(early):
            run = build(config, world, hooks, load_class_names(run_dir.source) if run_dir.source else None)
            checkpoints = CheckpointManager(run, run_dir)
            progress, rng = Progress(epoch=config.start_epoch or 0), None
            if run_dir.source:
                progress, rng = checkpoints.restore(run_dir.source)
            elif progress.epoch:
                fast_forward_scheduler(run, progress)
            check_left(run, progress, run_dir)
        # No mistake is found later than here: the directory is written to from now on.
        rank_zero_only(world, lambda: prepare_run_dir(run_dir, run.effective))
        if world.is_rank_zero:
            at_end.callback(restore_overwritten, run_dir.path)
        report = Report(config, run_dir.path, world, early.buffer, began)
        at_end.callback(report.close)
        report.describe(run)
        metrics = fit(run, progress, checkpoints, control, report, rng)
        checkpoints.finish()
        report.finish(metrics)
        return metrics
