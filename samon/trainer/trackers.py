"""Experiment trackers (`--trackers`)."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from samon.errors import UserError, nearest
from samon.trainer.config import Config


class Tracker(Protocol):
    """What receives the metrics of a run."""

    def __init__(self, config: Config, directory: Path, resumed: bool) -> None:
        """Start a run, or resume it, with the name of the directory and the settings of `config`."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record values after `step` updates."""

    def finish(self, completed: bool) -> None:
        """End the run; not `completed` after an error or a signal."""


class TensorBoard:
    """Event files in `tb/`."""

    def __init__(self, config: Config, directory: Path, resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tb"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            if "/" in name:  # the others are the row of summary.csv, under timm's names
                self.writer.add_scalar(name, value, step)

    def finish(self, completed: bool) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases. `--wandb-resume-id` names a run to resume."""

    def __init__(self, config: Config, directory: Path, resumed: bool) -> None:
        import wandb

        resume = {"resume": "must", "id": config.wandb_resume_id} if config.wandb_resume_id else {}
        run = {"project": config.wandb_project, "name": directory.name, "tags": config.wandb_tags}
        self.run = wandb.init(config=vars(config), **run, **resume)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def finish(self, completed: bool) -> None:
        self.run.finish(exit_code=0 if completed else 1)


class Trackio:
    """trackio's local database (`TRACKIO_DIR`), or its server or Space. Runs resume by their name."""

    def __init__(self, config: Config, directory: Path, resumed: bool) -> None:
        import trackio

        project, resume = config.wandb_project or "samon", "allow" if resumed else "never"
        self.trackio = trackio
        trackio.init(project, directory.name, config=vars(config), resume=resume, embed=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.trackio.log(dict(values), step=step)

    def finish(self, completed: bool) -> None:
        self.trackio.finish()


class MLflow:
    """The MLflow server or database of `MLFLOW_TRACKING_URI`. `MLFLOW_RUN_ID` names a run to resume."""

    def __init__(self, config: Config, directory: Path, resumed: bool) -> None:
        import mlflow

        self.mlflow = mlflow
        if "MLFLOW_RUN_ID" not in os.environ:
            mlflow.set_experiment(config.wandb_project or "samon")
        mlflow.start_run(run_name=directory.name)
        mlflow.log_params(vars(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def finish(self, completed: bool) -> None:
        self.mlflow.end_run("FINISHED" if completed else "FAILED")


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": MLflow}


def tracker_names(config: Config) -> list[str]:
    """Names of `--trackers` and `--log-wandb`, without duplicates."""
    names = [] if config.trackers == "none" else [name.strip() for name in config.trackers.split(",")]
    names = list(dict.fromkeys([*names, *(["wandb"] * config.log_wandb)]))
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--trackers {name} is not none or one of {', '.join(TRACKERS)}{nearest(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--trackers {name}: {name} is not installed; run: pip install {name}")
    return names
