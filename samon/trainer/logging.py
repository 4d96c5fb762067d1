"""Output of a run: log lines or a progress bar, log.txt, summary.csv, trackers, run.json, the last line."""

import csv
import io
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import timm
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import samon
from samon.errors import UserError, error_line, os_error_text
from samon.files import write_text
from samon.progress import is_terminal, metric_format, plural, progress_bar
from samon.scope import norm_parameters
from samon.trainer.build import Run
from samon.trainer.distributed import log_handler
from samon.trainer.flags import program
from samon.trainer.flops import step_flops
from samon.trainer.run_dir import RunDir
from samon.trainer.state import Metrics
from samon.trainer.trackers import TRACKERS, TensorBoard, Tracker, tracker_names

log = logging.getLogger("samon")
# How the validation is started, by how the training was; otherwise by the script.
VALIDATE = {"samon-train": "samon-validate", "python -m samon.cli.train": "python -m samon.cli.validate"}


class LogFile(logging.FileHandler):
    """A log file that loses lines on a full disk, with one warning; the next checkpoint then ends the run."""

    loses_lines = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.loses_lines:
            self.loses_lines = True
            print(f"warning: {self.baseFilename}: {error.strerror}: lines are lost", file=sys.stderr)


class RunLogger:
    """Writes the output of a run on rank 0; on the other processes every method does nothing."""

    def __init__(
        self, run: Run, run_dir: RunDir, early: Iterable[logging.LogRecord] = (), start: float | None = None
    ) -> None:
        """`early`: records logged before; `start`: when the run started, by the monotonic clock."""
        self.run, self.config, self.directory = run, run.config, run_dir.path
        self.resumed = run_dir.source is not None
        self.start = time.monotonic() if start is None else start
        self._writes = run.dist_info.is_rank_zero
        self._first_epoch, self._updates = 0.0, 0  # when the first epoch started, and the updates since
        self._open = ExitStack()
        self._bar: tqdm | None = None
        self._trackers: dict[str, Tracker] = {}
        self._images_logged = self._completed = False
        if self._writes:
            file = LogFile(self.directory / "log.txt")
            file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            self._open.callback(file.close)
            for record in early:
                file.handle(record)
            self._open.enter_context(log_handler(file))

    def start_trackers(self) -> None:
        """Start the trackers (rank 0)."""
        for name in tracker_names(self.config):
            try:
                with redirect_stdout(sys.stderr):  # the metrics stay the last line of stdout
                    tracker = self._trackers[name] = TRACKERS[name](self.config, self.directory, self.resumed)
            except Exception as error:
                raise UserError(f"--trackers {name}: {error_line(error)}") from error
            self._open.callback(self._finish_tracker, name, tracker)

    def _finish_tracker(self, name: str, tracker: Tracker) -> None:
        try:
            with redirect_stdout(sys.stderr):
                tracker.finish(self._completed)
        except Exception as error:
            log.warning("--trackers %s: the end of the run is not recorded: %s", name, error_line(error))

    def _track(self, values: Mapping[str, float | None], step: int) -> None:
        """Send values to every tracker. One that fails is dropped with a warning; training continues."""
        known = {name: value for name, value in values.items() if value is not None}
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(known, step)
            except Exception as error:
                del self._trackers[name]
                log.warning("--trackers %s gets no more metrics: %s", name, error_line(error))

    def close(self) -> None:
        """Close all files. If the disk is full, the end of the log is lost, but no checkpoint."""
        try:
            self._open.close()
        except OSError as error:
            log.warning("The end of the log is lost: %s", os_error_text(error))

    # --- while training -------------------------------------------------------------------------------------------

    def log_setup(self) -> None:
        """Log the data, the model, and which parameters are perturbed."""
        run, config = self.run, self.config
        size = sum(p.numel() for p in run.model.parameters()) / 1e6
        place = f"{run.dist_info.size} x {run.dist_info.device.type}" + ", sharded" * config.fsdp
        log.info("Results go to %s", self.directory)
        log.info("%s: %.2f M parameters, %d classes, on %s", config.model, size, config.num_classes, place)
        updates, epochs = plural(run.updates_per_epoch, "update"), plural(run.epochs, "epoch")
        samples = f"{plural(run.train_loader.num_samples, 'training sample')}, {updates} per epoch"
        log.info("%s, %s, --opt %s, lr %.4g", samples, epochs, config.opt, config.lr)
        warmup = 0 if run.scheduler is None or config.warmup_prefix else config.warmup_epochs
        if warmup >= run.epochs and self._writes:
            log.warning("--warmup-epochs %d of %s: the learning rate never reaches its schedule", warmup, epochs)
        if run.sam is not None:
            eta = f", eta {run.sam.eta:g}" if run.sam.eta else ""
            log.info("rho %g%s; %s", run.sam.rho, eta, run.sam.selection.summary())
            if run.tail is not None:
                flops = step_flops(run)
                cost = "" if flops is None else f": {flops['step'] / flops['plain']:.2f}x the FLOPs of plain training"
                log.info("two passes in the last %g %% of updates%s", 100 * run.tail.fraction, cost)
            if config.tail_opt is not None:
                log.info("%s takes over there, at %g times the learning rate", config.tail_opt, config.tail_lr)

    def start_epoch(self) -> None:
        """Show the epoch on the progress bar, if stderr is a terminal."""
        self._first_epoch = self._first_epoch or time.monotonic()
        if self._writes and self._bar is None and is_terminal():
            total = self.run.stop * self.run.updates_per_epoch
            self._bar = self._open.enter_context(progress_bar("", total, "update", initial=self.run.update))
        if self._bar is not None:
            self._bar.set_description(f"epoch {self.run.progress.epoch}", refresh=False)

    def advance(self) -> None:
        """Count an update."""
        self._updates += 1
        if self._bar is not None:
            self._bar.update()

    def log_update(self, means: Mapping[str, float], lr: float, speed: float, waited: float, corrupt: int) -> None:
        """One log line, and its values to the trackers.

        Args:
            means: over the log interval and all processes; `loss_perturbed` and `loss_two_pass`, the loss at w, over
                the updates with two passes.
            lr: learning rate of the update.
            speed: images per second over all processes.
            waited: fraction of time spent waiting for data.
            corrupt: samples skipped by all processes.
        """
        if not self._writes:
            return
        run, progress = self.run, self.run.progress
        scalars = dict(means) | {"lr": lr, "images_per_second": speed, "data_wait": waited}
        scalars |= {"skipped_steps": progress.skipped, "skipped_samples": corrupt}
        values = f"loss {means.get('loss', float('nan')):.4f}"
        if "loss_perturbed" in means:
            values += f" at w+eps {means['loss_perturbed']:.4f}"
        if "loss_two_pass" in means:
            scalars["sharpness"] = means["loss_perturbed"] - scalars.pop("loss_two_pass")
        values += f" lr {lr:.4g}"
        if run.sam is not None:
            scalars["rho"] = run.sam.rho
            values += f" rho {run.sam.rho:.4g}" if run.rho_schedule is not None else ""
        values += f" {speed:.0f} img/s data {100 * waited:.0f}%"
        values += f" skipped {progress.skipped}" if progress.skipped else ""
        self._track({f"train/{name}": value for name, value in scalars.items()}, run.update)
        if self._bar is not None:
            self._bar.set_postfix_str(values)
        pace = (time.monotonic() - self._first_epoch) / max(self._updates, 1)  # validation included
        left = tqdm.format_interval(pace * (run.stop * run.updates_per_epoch - run.update))
        where = f"Train {progress.epoch} [{progress.updates}/{run.updates_per_epoch}]"
        log.info("%s %s eta %s", where, values, left, extra={"shown": self._bar is not None})

    def log_images(self, batch: Tensor) -> None:
        """The run's first input batch to TensorBoard; with --save-images also one per log interval to a file."""
        if not self._writes:
            return
        tensorboard = self._trackers.get("tensorboard")
        if isinstance(tensorboard, TensorBoard) and not self._images_logged:
            self._images_logged = True
            grid = make_grid(batch[:16].detach().float().cpu(), nrow=4, normalize=True)
            tensorboard.writer.add_image("input", grid, self.run.update)
        if self.config.save_images and self.run.progress.updates % self.config.log_interval == 0:
            path = self.directory / f"train-batch-{self.run.update}.jpg"
            save_image(batch.detach().float().cpu(), path, padding=0, normalize=True)

    # --- after an epoch -------------------------------------------------------------------------------------------

    def log_epoch(self, train: Metrics, evaluated: dict[str, float] | None) -> None:
        """A row of summary.csv, a log line, metrics to the trackers, normalization parameters as histograms."""
        if not self._writes:
            return
        row: Metrics = {"epoch": self.run.progress.epoch}
        row |= {f"train_{name}": value for name, value in train.items()}
        row |= {f"eval_{name}": evaluated[name] for name in ("loss", "top1", "top5")} if evaluated else {}
        row["lr"] = mean_lr(self.run.optimizer)
        append_summary(self.directory / "summary.csv", self.run.progress.epoch, row)
        step = (self.run.progress.epoch + 1) * self.run.updates_per_epoch
        self._track(row | {f"eval/{name}": value for name, value in (evaluated or {}).items()}, step)
        tensorboard = self._trackers.get("tensorboard")
        if isinstance(tensorboard, TensorBoard):
            for depth, (name, parameter) in enumerate(norm_parameters(self.run.model).items()):
                if bool(parameter.isfinite().all()):
                    tag = f"{'gamma' if name.endswith('weight') else 'beta'}/{depth:03d} {name}"
                    tensorboard.writer.add_histogram(tag, parameter.detach().float().cpu(), step)
            tensorboard.writer.flush()
        log.info(" ".join(f"{k} {v:{metric_format(k)}}" for k, v in row.items() if v is not None).capitalize())

    def last_epoch(self) -> Metrics:
        """Metrics of the last epoch in summary.csv."""
        rows = summary_rows(self.directory / "summary.csv") if self._writes else []
        row: Metrics = {key: float(value) for key, value in rows[-1].items() if value and key != "lr"} if rows else {}
        return row | ({"epoch": int(rows[-1]["epoch"])} if rows else {})

    def finish(self, metrics: Metrics) -> None:
        """Write run.json; print where the results are, what to do next, and the metrics as the last line of stdout."""
        if not self._writes:
            return
        self._completed = True
        if self._bar is not None:
            self._bar.close()
        where, checkpoint = shlex.quote(str(self.directory)), self.directory / "model_best.pth.tar"
        best = f" (best: {checkpoint.name})" if checkpoint.exists() else ""
        print(f"\nResults      {where}: summary.csv, log.txt, checkpoints{best}")
        if "tensorboard" in self._trackers:
            print(f"TensorBoard  tensorboard --logdir {shlex.quote(str(self.directory / 'tb'))}")
        print(f"Next         {VALIDATE.get(program(), 'python validate.py')} --checkpoint {where}")
        print(f"             samon-report {where} -o report.html\n")
        seconds = round(time.monotonic() - self.start, 1)
        record = {"metrics": metrics, "seconds": seconds} | self._record()
        write_text(self.directory / "run.json", json.dumps(record, indent=1) + "\n")
        print(json.dumps({**metrics, "output": str(self.directory), "seconds": seconds}), flush=True)

    def _record(self) -> dict[str, object]:
        """How the run was made and what it cost, for `samon-report`.

        `cpu_seconds` is the processor time of rank 0 and its ended children; if `resumed`, since the last start only.
        """
        run, cpuinfo, names = self.run, Path("/proc/cpuinfo"), []
        if cpuinfo.exists():
            names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        epochs = run.progress.epoch - run.progress.start
        return {
            "cpu_seconds": round(sum(os.times()[:4]), 2),
            "resumed": self.resumed,
            "command": f"{program()} {shlex.join(sys.argv[1:])}".rstrip(),
            "recipe": self.config.config,
            "processes": run.dist_info.size,
            "versions": {"samon": samon.__version__, "torch": str(torch.__version__), "timm": timm.__version__},
            "machine": {"system": platform.platform(), "processor": processor, "cores": os.cpu_count(), "gpus": gpus},
            "updates": epochs * run.updates_per_epoch,
            "step_flops": step_flops(run),
            "micro_batches": epochs * len(run.train_loader),
        }


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the step, averaged over the parameter groups."""
    rates, sam = [group["lr"] for group in optimizer.param_groups], samon.sam_of(optimizer)
    return float(sum(rates) / len(rates)) * (1.0 if sam is None else sam.lr_ratio)


def summary_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a summary.csv; none if it does not exist."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def append_summary(path: Path, epoch: int, row: Metrics) -> None:
    """Add the row of an epoch; remove rows of this epoch and later, left by an earlier attempt.

    Unlike timm's `update_summary`, which appends, it replaces the file atomically and keeps columns of earlier rows.
    """
    earlier = [old for old in summary_rows(path) if int(old["epoch"]) < epoch]
    text = io.StringIO()
    columns = dict.fromkeys([*(earlier[0] if earlier else ()), *row])
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows([*earlier, row])
    write_text(path, text.getvalue())
