"""What a run tells: log lines or a progress bar, log.txt, summary.csv, TensorBoard, wandb, and the last line."""

import csv
import io
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from samon.errors import os_error_text
from samon.files import write_text
from samon.progress import is_terminal, metric_format, progress_bar
from samon.scope import norm_parameters
from samon.trainer.build import Run
from samon.trainer.config import Config
from samon.trainer.distributed import DistInfo, log_handler
from samon.trainer.flags import program
from samon.trainer.record import write_record
from samon.trainer.state import Progress

log = logging.getLogger("samon")
VALIDATE = {
    "samon-train": "samon-validate",
    "python -m samon.cli.train": "python -m samon.cli.validate",
}  # else the script


class LogFile(logging.FileHandler):
    """A log file whose lines are lost on a full disk, with one warning; the next state that is written ends the run."""

    lost = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.lost:
            self.lost = True
            print(f"warning: {self.baseFilename}: {error.strerror}: lines are lost", file=sys.stderr)


class Report:
    """Output of a run. Only rank 0 writes; on the others every method does nothing."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        world: DistInfo,
        early: Iterable[logging.LogRecord] = (),
        began: float | None = None,
    ) -> None:
        """`early`: what was logged before; `began`: when the run began, by the monotonic clock."""
        self.config, self.directory, self.is_rank_zero, self._world = config, directory, world.is_rank_zero, world
        self._tensorboard = self._wandb = None
        self._bar: Any = None
        self._started, self._done = 0.0, 0  # of the first epoch, and updates since
        self._open = ExitStack()
        self._images_left = 1
        self._began = time.monotonic() if began is None else began
        if not self.is_rank_zero:
            return
        file = LogFile(directory / "log.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._open.callback(file.close)
        for record in early:
            file.handle(record)
        self._open.enter_context(log_handler(file))
        self._tensorboard = self._open.enter_context(SummaryWriter(str(directory / "tb"), purge_step=None))
        self._wandb = self._start_wandb() if config.log_wandb else None

    def _start_wandb(self) -> Any:
        try:
            import wandb
        except ImportError:
            log.warning("--log-wandb: wandb is not installed, metrics are not sent; pip install wandb")
            return None
        config, run_id = self.config, self.config.wandb_resume_id or None
        resume = {"resume": "must", "id": run_id} if run_id else {}
        name, project, tags = self.directory.name, config.wandb_project, config.wandb_tags
        run = wandb.init(project=project, name=name, config=vars(config), tags=tags, **resume)
        self._open.callback(run.finish)
        return run

    def close(self) -> None:
        """Close all files; what they cannot take is lost, but no state."""
        try:
            self._open.close()
        except OSError as error:
            log.warning("The end of the log is lost: %s", os_error_text(error))

    # --- while training -------------------------------------------------------------------------------------------

    def describe(self, run: Run) -> None:
        """What is about to run: data, model, what is perturbed."""
        size, config = sum(p.numel() for p in run.model.parameters()) / 1e6, run.config
        place = f"{run.world.size} x {run.world.device.type}" + ", sharded" * config.fsdp
        log.info("Results go to %s", self.directory)
        log.info("%s: %.2f M parameters, %d classes, on %s", config.model, size, run.settled.num_classes, place)
        much = f"{run.train_loader.num_samples} training samples, {run.updates_per_epoch} updates per epoch"
        log.info("%s, %d epochs, --opt %s, lr %.4g", much, run.epochs, config.opt, run.settled.lr)
        warm = 0 if run.scheduler is None or config.warmup_prefix else config.warmup_epochs
        if warm >= run.epochs and self.is_rank_zero:
            log.warning(
                "--warmup-epochs %d of %d epochs: the learning rate never gets to its schedule", warm, run.epochs
            )
        if run.sam is not None:
            eta = f", eta {run.sam.eta:g}" if run.sam.eta else ""
            log.info("rho %g%s; %s", run.sam.rho, eta, run.sam.selection.summary())

    def begin_epoch(self, run: Run, progress: Progress) -> None:
        self._started = self._started or time.monotonic()
        if self.is_rank_zero and self._bar is None and is_terminal():
            total, before = run.stop * run.updates_per_epoch, progress.epoch * run.updates_per_epoch
            self._bar = self._open.enter_context(progress_bar("", total, "update", initial=before + progress.updates))
        if self._bar is not None:
            self._bar.set_description(f"epoch {progress.epoch}", refresh=False)

    def advance(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def time_left(self, run: Run, update: int) -> str:
        """Of the whole run, validation included, at the mean pace of this process."""
        pace = (time.monotonic() - self._started) / max(self._done, 1)
        return tqdm.format_interval(pace * (run.stop * run.updates_per_epoch - update))

    def update(self, run: Run, progress: Progress, means: Mapping[str, float], speed: float, waited: float) -> None:
        """One log line and its scalars. speed: images/s over all processes; waited: share of time spent on data."""
        if self._tensorboard is None:
            return
        step = progress.epoch * run.updates_per_epoch + progress.updates
        lr = mean_lr(run.optimizer)
        scalars = {f"train/{name}": value for name, value in means.items()}
        if "loss_perturbed" in means:
            scalars["train/sharpness"] = means["loss_perturbed"] - means["loss"]
        if run.sam is not None:
            scalars["train/rho"] = run.sam.rho
        scalars |= {
            "train/lr": lr,
            "train/images_per_second": speed,
            "train/data_wait": waited,
            "train/skipped_steps": progress.skipped,
            "train/skipped_samples": run.train_loader.corrupt_samples,
        }
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
        loss = means.get("loss", float("nan"))
        perturbed = f" at w+eps {means['loss_perturbed']:.4f}" if "loss_perturbed" in means else ""
        skipped = f" skipped {progress.skipped}" if progress.skipped else ""
        where = f"Train {progress.epoch} [{progress.updates}/{run.updates_per_epoch}]"
        pace = f"{speed:.0f} img/s data {100 * waited:.0f}%"
        values = f"loss {loss:.4f}{perturbed} lr {lr:.4g} {pace}{skipped}"
        if self._bar is not None:
            self._bar.set_postfix_str(values)
        log.info("%s %s eta %s", where, values, self.time_left(run, step), extra={"shown": self._bar is not None})

    def images(self, batch: Tensor, update: int, last_of_interval: bool) -> None:
        """The input batch: the run's first to TensorBoard, and with --save-images one per log interval to a file."""
        if self._tensorboard is None:
            return
        if self._images_left:
            self._images_left = 0
            grid = make_grid(batch[:16].detach().float().cpu(), nrow=4, normalize=True)
            self._tensorboard.add_image("input", grid, update)
        if self.config.save_images and last_of_interval:
            path = self.directory / f"train-batch-{update}.jpg"
            save_image(batch.detach().float().cpu(), path, padding=0, normalize=True)

    # --- after an epoch -------------------------------------------------------------------------------------------

    def end_epoch(
        self, run: Run, progress: Progress, train: Mapping[str, Any], evaluated: Mapping[str, float] | None
    ) -> None:
        if self._tensorboard is None:
            return
        row: dict[str, Any] = {"epoch": progress.epoch} | {f"train_{name}": value for name, value in train.items()}
        row |= {f"eval_{name}": evaluated[name] for name in ("loss", "top1", "top5")} if evaluated else {}
        row["lr"] = mean_lr(run.optimizer)
        append_summary(self.directory / "summary.csv", row)
        step = (progress.epoch + 1) * run.updates_per_epoch
        for name, value in (evaluated or {}).items():
            self._tensorboard.add_scalar(f"eval/{name}", value, step)
        for depth, (name, parameter) in enumerate(norm_parameters(run.model).items()):
            kind = "gamma" if name.endswith("weight") else "beta"
            if bool(parameter.isfinite().all()):
                self._tensorboard.add_histogram(f"{kind}/{depth:03d} {name}", parameter.detach().float().cpu(), step)
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(row)
        log.info(" ".join(f"{k} {v:{metric_format(k)}}" for k, v in row.items() if v is not None).capitalize())

    def told(self) -> dict[str, Any]:
        """The last epoch's metrics of a run that has ended, as it wrote them."""
        rows = summary_rows(self.directory / "summary.csv") if self.is_rank_zero else []
        row = {key: float(value) for key, value in rows[-1].items() if value and key != "lr"} if rows else {}
        return row | ({"epoch": int(row["epoch"])} if row else {})

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Where everything is and what to do next, then the final metrics as the last line on stdout."""
        if not self.is_rank_zero:
            return
        if self._bar is not None:
            self._bar.close()
        where, checkpoint = shlex.quote(str(self.directory)), self.directory / "model_best.pth.tar"
        best = f" (best: {checkpoint.name})" if checkpoint.exists() else ""
        print(f"\nResults      {where}: summary.csv, log.txt, checkpoints{best}")
        print(f"TensorBoard  tensorboard --logdir {shlex.quote(str(self.directory / 'tb'))}")
        print(f"Next         {VALIDATE.get(program(), 'python validate.py')} --checkpoint {where}")
        print(f"             samon-report {where} -o report.html\n")
        seconds = round(time.monotonic() - self._began, 1)
        write_record(self.directory, self.config, self._world, metrics, seconds)
        print(json.dumps({**metrics, "output": str(self.directory), "seconds": seconds}), flush=True)


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    rates = [group["lr"] for group in optimizer.param_groups]
    return float(sum(rates) / len(rates))


def summary_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def append_summary(path: Path, row: Mapping[str, Any]) -> None:
    """Add an epoch's row; rows of this epoch and later, of an earlier attempt, go."""
    kept = [old for old in summary_rows(path) if int(old["epoch"]) < row["epoch"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(row), extrasaction="ignore", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows([*kept, row])
    write_text(path, text.getvalue())
