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
from samon.trainer.checkpoint import Checkpoints, Progress, class_names
from samon.trainer.config import Config, dump, parse
from samon.trainer.control import Control
from samon.trainer.dcp import Parts
from samon.trainer.distributed import DistInfo, distributed_session, log_handler, rank_zero_only
from samon.trainer.flag_rows import steps_or_minutes
from samon.trainer.logging import Report
from samon.trainer.loop import fit
from samon.trainer.state import Keeper, Place, begin, locate, move_schedule, put_back, restore, stored_settings

log = logging.getLogger("samon")


def main(argv: list[str] | None = None, hooks: Hooks | None = None) -> dict[str, Any]:
    """Parse, build, run; returns the final metrics."""
    config = parse(argv, stored_settings)
    if config.print_config:
        print(dump(config), end="")
        return {}
    check_name(config.dataset, config.data_dir)
    with distributed_session(config) as world:
        return train(config, world, hooks)


def check_left(run: Run, progress: Progress, place: Place) -> None:
    """A run that has ended may be started again, and ends as it did; any other without an epoch is a mistake.

    Raises:
        UserError: no epoch is left.
    """
    if progress.epoch < run.stop:
        return
    from_here = place.source is not None and place.source.parent.resolve() == place.directory.resolve()
    if not from_here or run.config.start_epoch is not None:
        where = f"{place.source} goes on at" if place.source else "--start-epoch is"
        raise UserError(f"{where} epoch {progress.epoch} of {run.stop}: nothing is left to train; raise --epochs")
    log.warning("%s has had its %d epochs: nothing is left to do", place.directory, run.stop)


def train(config: Config, world: DistInfo, hooks: Hooks | None = None) -> dict[str, Any]:
    """A run of these processes, from the start or from where it stopped."""
    random_seed(config.seed, world.rank)
    began, early = time.monotonic(), MemoryHandler(1)  # without a target it keeps what is logged until there is a file
    place = rank_zero_only(world, lambda: locate(config))
    control = Control(steps_or_minutes(config.checkpoint_interval)[1])
    with ExitStack() as at_end:
        at_end.callback(control.close)
        with log_handler(early):
            run = build(config, world, hooks, class_names(place.source) if place.source else None)
            kind = Parts if config.checkpoint_format == "dcp" else Checkpoints
            checkpoints = kind(place.directory, config.checkpoint_hist, lower_is_better=run.metric == "loss")
            progress, rng = Progress(epoch=config.start_epoch or 0), None
            if place.source:
                progress, rng = restore(run, place.source, checkpoints)
            elif progress.epoch:
                move_schedule(run, progress)
            check_left(run, progress, place)
        # No mistake is found later than here: the directory is written to from now on.
        rank_zero_only(world, lambda: begin(place, run.effective))
        if world.is_rank_zero:
            at_end.callback(put_back, place.directory)
        report = Report(config, place.directory, world, early.buffer, began)
        at_end.callback(report.close)
        report.describe(run)
        metrics = fit(run, progress, Keeper(run, checkpoints, control, place.started), report, rng)
        checkpoints.finish()
        report.finish(metrics)
        return metrics
