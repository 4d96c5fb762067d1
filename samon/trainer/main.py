"""A training run, from its command line to its last line of output."""

import logging
import time
from collections.abc import Generator
from contextlib import ExitStack
from logging.handlers import MemoryHandler

from timm.utils import random_seed

from samon.data.source_factory import check_name
from samon.errors import UserError
from samon.progress import plural
from samon.trainer.build import Run, build
from samon.trainer.checkpoint import CheckpointManager
from samon.trainer.config import Config, dump, flags_in_errors, parse
from samon.trainer.distributed import distributed_session, log_handler, rank_zero_only
from samon.trainer.flag_rows import parse_interval
from samon.trainer.logging import RunLogger
from samon.trainer.loop import Update, fit
from samon.trainer.resume import fast_forward_scheduler
from samon.trainer.run_dir import RunDir, find_run_dir, load_run_settings, prepare_run_dir, restore_overwritten
from samon.trainer.signals import SignalHandler
from samon.trainer.state import Metrics, load_state
from samon.trainer.trackers import tracker_names

log = logging.getLogger("samon")


def main(argv: list[str] | None = None) -> Metrics:
    """Train to the end, or print the configuration; return the final metrics."""
    early = MemoryHandler(1)  # without a target it keeps the lines until there is a file
    with log_handler(early), log_handler(logging.StreamHandler()):
        config = parse(argv, load_run_settings)
    if config.print_config:
        print(dump(config), end="")
        return {}
    training = train(config, early)
    while True:
        try:
            next(training)
        except StopIteration as end:
            return end.value


def train(config: Config, early: MemoryHandler | None = None) -> Generator[Update, None, Metrics]:
    """Train from the start or from where the run stopped: yield after each update, return the final metrics. `early`
    has the lines logged before."""
    check_name(config.dataset, config.data_dir)
    tracker_names(config)  # raises before anything is loaded
    with distributed_session(config) as dist_info, flags_in_errors(), ExitStack() as at_end:
        random_seed(config.seed, dist_info.rank)
        start, early = time.monotonic(), early or MemoryHandler(1)
        with log_handler(early):
            run_dir = rank_zero_only(dist_info, lambda: find_run_dir(config))
            signals = SignalHandler(parse_interval(config.checkpoint_interval)[1])
            at_end.callback(signals.close)
            run = build(config, dist_info, load_state(run_dir.source) if run_dir.source else None)
            checkpoints, rng = CheckpointManager(run, run_dir), None
            if run_dir.source:
                rng = checkpoints.restore(run_dir.source)
            elif run.progress.epoch:
                fast_forward_scheduler(run)
            check_epochs_left(run, run_dir)
        # All settings have been checked: the directory is written to from here on.
        rank_zero_only(dist_info, lambda: prepare_run_dir(run_dir, run.config))
        if dist_info.is_rank_zero:
            at_end.callback(restore_overwritten, run_dir.path)
        logger = RunLogger(run, run_dir, early.buffer, start)
        at_end.callback(logger.close)
        rank_zero_only(dist_info, logger.start_trackers)
        logger.log_setup()
        metrics = yield from fit(run, checkpoints, signals, logger, rng)
        checkpoints.finish()
        logger.finish(metrics)
        return metrics


def check_epochs_left(run: Run, run_dir: RunDir) -> None:
    """Warn if a finished run is started again, which ends as it did.

    Raises:
        UserError: no epoch is left for another reason.
    """
    if run.progress.epoch < run.stop:
        return
    if run_dir.source is None or not run_dir.same_run or run.config.start_epoch is not None:
        where = f"{run_dir.source} continues" if run_dir.source else "--start-epoch starts"
        raise UserError(
            f"{where} at epoch {run.progress.epoch} of {run.stop}: nothing is left to train; raise --epochs"
        )
    log.warning("%s has finished its %s: nothing is left to do", run_dir.path, plural(run.stop, "epoch"))
