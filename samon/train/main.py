#!/usr/bin/env python3
"""Train a timm model: `python train.py --help`, `torchrun --nproc-per-node 8 train.py -c hparams/quickstart.yaml`."""

from typing import Any

from samon.errors import Stopped, run
from samon.session.checkpoint import Checkpoints, Progress
from samon.session.world import World, build_world, shut_down
from samon.settings.config import Config, dump, parse
from samon.settings.rows import steps_or_minutes
from samon.train.build import build
from samon.train.control import Control
from samon.train.loop import fit
from samon.train.report import Report, console
from samon.train.state import Keeper, locate, restore


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, build, run; returns the final metrics."""
    config = parse(argv)
    if config.print_config:
        print(dump(config), end="")
        return {}
    world = build_world(config)
    with console(world):
        try:
            metrics = train(config, world)
        except Stopped:
            shut_down()
            raise
    shut_down()  # after a fault it could wait for a process that is gone
    return metrics


def train(config: Config, world: World) -> dict[str, Any]:
    """A run of these processes, from the start or from where it stopped."""
    directory, started, source = locate(config, world)
    report = Report(config, directory, world)
    control = Control(steps_or_minutes(config.checkpoint_interval)[1])
    try:
        job = build(config, world)
        checkpoints = Checkpoints(directory, config.checkpoint_hist, lower_is_better=job.metric == "loss")
        progress, rng = restore(job, source, checkpoints) if source else (Progress(epoch=config.start_epoch or 0), None)
        report.describe(job)
        metrics = fit(job, progress, Keeper(job, checkpoints, control, started), report, rng)
        report.finish(metrics)
        return metrics
    finally:
        control.close()
        report.close()


if __name__ == "__main__":
    run(main)
