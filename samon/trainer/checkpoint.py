"""Checkpoints in timm's format that hold all a run needs, written atomically, read without unpickling code."""

import argparse
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from samon.errors import RunError, UserError
from samon.files import atomic_write, link_or_copy
from samon.trainer.config import FLAGS
from samon.trainer.flags import rename_old

SUFFIX = ".pth.tar"
PARTS, REST = ".parts", "state.pt"  # a state as a directory (samon.trainer.dcp), and its file of all but tensors
OVERWRITTEN = "overwritten"  # directory of the run that --overwrite replaces, until there is a state of the new one
FORMAT = 1  # of the keys beyond timm's
_DAMAGED = (RuntimeError, ValueError, KeyError, AttributeError, TypeError)  # found while looking into a state


@dataclass
class Progress:
    """Where a run is. `epoch` is in progress, or complete if `epoch_done`."""

    epoch: int = 0
    updates: int = 0  # optimizer steps done in this epoch, skipped ones included
    samples: int = 0  # samples of this epoch consumed by all processes
    epoch_done: bool = False
    skipped: int = 0  # optimizer steps skipped so far for a non-finite gradient
    bad_in_a_row: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # running sums behind this epoch's training metrics
    layouts: list[list[int]] = field(default_factory=list)  # plan.Layouts by which shards were read in this epoch


@dataclass
class TrainState:
    """Everything saved: tensors and plain types only, so `weights_only=True` reads it.

    The first block are the keys of timm's checkpoints, with timm's meaning.
    """

    state_dict: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    epoch: int
    arch: str
    args: dict[str, Any]  # the resolved configuration, seeds of the workers among it
    metric: float | None
    state_dict_ema: dict[str, torch.Tensor] | None
    amp_scaler: dict[str, Any] | None

    scheduler: dict[str, Any] | None
    progress: dict[str, Any]  # a Progress
    ranks: list[dict[str, Any]]  # of each process: `rng` and BatchNorm buffers of model and EMA (`buffers`)
    best: dict[str, Any]  # metric and epoch of the best, and the kept [file, metric] pairs
    started: str  # identifies the run: states of another run in the same directory are not this run's
    optimizer_layout: dict[str, Any] = field(default_factory=dict)  # which optimizer, over which groups of parameters
    class_names: list[str] | None = None  # in the order of the outputs, where the data told them
    version: int = 2  # of timm's format
    samon: int = FORMAT

    def as_dict(self) -> dict[str, Any]:
        """Without absent parts: timm looks for keys, not for None."""
        return {key: value for key, value in vars(self).items() if value is not None}


# --- writing ----------------------------------------------------------------------------------------------------------


def _numbers(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)]


class Checkpoints:
    """The files of one run in its directory: kept history, last, best, and the two newest mid-epoch states."""

    suffix = SUFFIX

    def __init__(self, directory: Path, keep: int, lower_is_better: bool) -> None:
        self.directory, self.keep, self.lower_is_better = directory, keep, lower_is_better
        self.best: dict[str, Any] = {"metric": None, "epoch": None, "kept": []}
        self.last_good: Path | None = None

    def save_epoch(self, state: TrainState) -> None:
        """Write `checkpoint-N`, also as `last` and, where due, `model_best` and `milestone-N`; drop the worst ones."""
        epoch, metric = state.epoch, state.metric
        name = f"checkpoint-{epoch}{self.suffix}"
        pairs = [pair for pair in self.best["kept"] if pair[0] != name] + [[name, metric]]
        pairs.sort(key=lambda pair: self._rank(pair[1]))
        improved = metric is not None and self._rank(metric) < self._rank(self.best["metric"])
        best = {"metric": metric, "epoch": epoch} if improved else {}
        self.best = state.best = {**self.best, **best, "kept": pairs[: self.keep]}
        path = self.directory / name
        self._write(state, path)
        milestone = epoch + 1 in state.args.get("save_epochs", ())
        self._publish(path, ["last"] + ["model_best"] * improved + [f"milestone-{epoch + 1}"] * milestone)
        recoveries = self.directory.glob(f"recovery-*{self.suffix}")
        outdated = [self.directory / old for old, _ in pairs[self.keep :]]
        self._discard([*outdated, *recoveries, self.directory / OVERWRITTEN])

    def save_recovery(self, state: TrainState) -> None:
        """A mid-epoch state; the one before it is kept until the next."""
        state.best = self.best
        progress = state.progress
        path = self.directory / f"recovery-{progress['epoch']}-{progress['updates']}{self.suffix}"
        self._write(state, path)
        outdated = sorted(self.directory.glob(f"recovery-*{self.suffix}"), key=_numbers)[:-2]
        self._discard([*outdated, self.directory / OVERWRITTEN])
        self.last_good = path

    def _publish(self, path: Path, names: list[str]) -> None:
        try:
            for name in names:
                link_or_copy(path, self.directory / f"{name}{SUFFIX}")
        except OSError as error:
            raise self._fault(path, error) from error
        self.last_good = self.directory / f"last{SUFFIX}"

    def _discard(self, paths: list[Path]) -> None:
        for path in paths:
            remove(path)

    def settle(self) -> None:
        """Wait for what is being written; here nothing is."""

    def finish(self) -> None:
        """The end of a run."""

    def _rank(self, metric: float | None) -> float:
        if metric is None or metric != metric:
            return float("inf")
        return metric if self.lower_is_better else -metric

    def _write(self, state: TrainState, path: Path) -> None:
        try:
            with atomic_write(path) as file:
                torch.save(state.as_dict(), file)
        except OSError as error:
            raise self._fault(path, error) from error

    def _fault(self, path: Path, error: Exception) -> RunError:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        return RunError(f"cannot write {path}: {reason}; {self.describe_last_good()}")

    def describe_last_good(self) -> str:
        """What to resume from; the processes that do not write look for it."""
        written = self.last_good or max(self.directory.glob(f"*{self.suffix}"), key=_numbers, default=None)
        if written is None or not written.exists():
            return "no checkpoint was written before it"
        return f"the last good checkpoint is {written}; free the cause and use --resume {self.directory}"


def remove(path: Path) -> None:
    """A state, file or directory; one that is cut off in the middle is not complete."""
    if path.is_dir():
        (path / ".metadata").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- reading --------------------------------------------------------------------------------------------------------


def read(path: Path, flag: str = "--resume") -> dict[str, Any]:
    """A checkpoint's content, tensors mapped from the file; UserError naming the file if it is damaged or foreign."""
    if path.suffix == PARTS:
        if not (path / ".metadata").is_file():
            raise UserError(f"{path} is not complete: it was being written when its run ended; use another one")
        path = path / REST
    content = load(path, flag)
    if "state_dict" not in content:
        raise UserError(f"{path} is not a training checkpoint: it has no 'state_dict'; use one written by train.py")
    return content


def load(path: Path, flag: str) -> dict[str, Any]:
    """What a file of weights or of a training state holds, tensors mapped from it; nothing in it is executed."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own checkpoints hold one
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; check {flag}") from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        named = f"{flag} {path}".strip()
        with open(path, "rb") as file:
            start = file.read(60)
        if start.isascii() and not start.startswith(b"PK"):
            said = " ".join(start.decode().split())[:30]
            raise UserError(f"{named} is text ({said!r} ...), no checkpoint; name a .pth.tar file") from None
        raise UserError(f"{named} is damaged or no checkpoint ({reason[:90]}); use another one") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path} holds no weights but a {type(content).__name__}; use another one")
    return content


def class_names(path: Path) -> list[str] | None:
    """Return the classes that a training state was trained on, in the order of the outputs; None if it has no names."""
    return read(path).get("class_names")


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a training state was made with, by today's names; empty for bare weights."""
    stored = content.get("args") or {}
    return rename_old(stored if isinstance(stored, Mapping) else vars(stored), FLAGS)


def averaged(content: Mapping[str, Any]) -> bool:
    """Whether the run was validated, and its best chosen, by the averaged weights."""
    stored = settings_of(content)
    chosen = stored.get("model_ema") and not stored.get("model_ema_force_cpu") and stored.get("val_split", True)
    return "state_dict_ema" in content and bool(chosen)


def load_weights(model: torch.nn.Module, path: str, use_ema: bool) -> None:
    """Load a file of weights or a checkpoint into the model, strictly."""
    try:
        timm.models.load_checkpoint(model, path, use_ema)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        text = " ".join(str(error).split())[:300]
        raise UserError(f"--checkpoint {path}: {type(error).__name__}: {text}") from error


def progress_of(content: Mapping[str, Any]) -> Progress:
    """Where a checkpoint stops; one of timm's own stops after a whole epoch."""
    if "progress" in content:
        return Progress(**content["progress"])
    return Progress(epoch=int(content.get("epoch", 0)) - (content.get("version", 1) < 2), epoch_done=True)


def newest(directory: Path, started: str | None = None) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest complete state of a directory: (file, content, what was passed over and why).

    `started`: only states of that run count, so that files of an earlier run there are not taken for it.
    """
    found: tuple[tuple[int, bool, int], Path, dict[str, Any]] | None = None
    passed: list[str] = []
    for path in sorted([*directory.glob(f"*{SUFFIX}"), *directory.glob(f"*{PARTS}")]):
        try:
            content = read(path, "")
            if content.get("samon") != FORMAT:
                raise UserError(f"{path} is not a training state of this program")
            if started is not None and content["started"] != started:
                continue
            progress = progress_of(content)
            order = (progress.epoch, progress.epoch_done, progress.updates)
            if found is None or order > found[0]:
                found = (order, path, content)
        except UserError as error:
            passed.append(str(error))
        except _DAMAGED as error:
            passed.append(f"{path} is damaged ({error})")
    return (None, {}, passed) if found is None else (*found[1:], passed)
