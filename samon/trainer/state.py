"""The state of a training run: what a checkpoint contains, and how it is read without unpickling code."""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from samon.errors import UserError, error_line
from samon.trainer.config import FLAGS
from samon.trainer.flags import rename_old

log = logging.getLogger("samon")
Tree = dict[str, Any]  # nested tensors and plain values, which `torch.load(weights_only=True)` reads
Metrics = dict[str, float | None]

SUFFIX = ".pth.tar"
DCP_SUFFIX = ".dcp"  # sharded checkpoints (samon.trainer.dcp)
DCP_STATE = "state.pt"  # the file of a sharded checkpoint that holds everything but the tensors
FORMAT = 1  # version of the keys beyond timm's


@dataclass
class Progress:
    """The position of a run. `epoch` is in progress, or complete if `epoch_done`."""

    epoch: int = 0
    start: int = 0  # the first epoch of the run (--start-epoch)
    updates: int = 0  # optimizer steps of this epoch, skipped ones included
    samples: int = 0  # samples of this epoch that all processes together have consumed
    epoch_done: bool = False
    skipped: int = 0  # optimizer steps skipped for a non-finite gradient, over the whole run
    bad_in_a_row: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # running sums of this epoch's training metrics
    layouts: list[list[int]] = field(default_factory=list)  # `ReaderLayout`s by which this epoch's shards were read

    def next_epoch(self) -> "Progress":
        """The start of the next epoch."""
        return Progress(self.epoch + 1, self.start, skipped=self.skipped, bad_in_a_row=self.bad_in_a_row)


@dataclass
class TrainState:
    """The content of a checkpoint. The keys up to `version` are timm's, with timm's meaning."""

    state_dict: dict[str, Tensor]
    epoch: int = 0
    arch: str = ""
    args: Tree = field(default_factory=dict)  # the resolved configuration
    metric: float | None = None
    optimizer: Tree | None = None
    state_dict_ema: dict[str, Tensor] | None = None
    amp_scaler: Tree | None = None
    version: int = 2  # of timm's format

    scheduler: Tree | None = None
    progress: Progress = field(default_factory=Progress)
    ranks: list[Tree] = field(default_factory=list)  # per process: `rng`, BatchNorm `buffers` and `ema_buffers`
    best: Tree = field(default_factory=dict)  # metric and epoch of the best, and the `kept` [file, metric] pairs
    started: str = ""  # identifies the run: a directory may hold states of an earlier one
    optimizer_layout: Tree = field(default_factory=dict)  # base optimizer and parameter names of its groups
    class_names: list[str] | None = None  # in the order of the model's outputs, if the data set has names
    class_map_digest: str = ""  # of the labels that --class-map gives, if there is one
    samon: int = FORMAT

    def to_dict(self) -> Tree:
        """The keys to save. Absent values are left out, because timm looks for keys, not for None."""
        return {k: v for k, v in vars(self).items() if v is not None} | {"progress": asdict(self.progress)}

    @classmethod
    def from_dict(cls, content: Tree) -> "TrainState":
        """Accept our own checkpoints and timm's, which store the number of a complete epoch."""
        known = {f.name for f in fields(cls)}
        state = cls(**{"version": 1, "samon": 0} | {k: v for k, v in content.items() if k in known})
        state.args = stored_args(content)
        if "progress" in content:
            state.progress = Progress(**content["progress"])
        else:
            state.progress = Progress(epoch=int(state.epoch) - (state.version < 2), epoch_done=True)
        return state


def load_file(path: Path, flag: str) -> Tree:
    """Read a file of weights or a checkpoint, its tensors mapped from the file; nothing in it is executed.

    Args:
        flag: the command-line flag that names the file, for error messages.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    name = f"{flag} {path}".strip()
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own checkpoints hold one
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; check {flag}") from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        with open(path, "rb") as file:
            start = file.read(60)
        if start.isascii() and not start.startswith(b"PK"):
            text = " ".join(start.decode().split())[:30]
            raise UserError(f"{name} is a text file ({text!r} ...); name a .pth.tar file") from None
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise UserError(f"{name} is damaged or not a checkpoint ({reason[:90]}); use another one") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} contains a {type(content).__name__}, not weights; use another one")
    return content


def load_state(path: Path, flag: str = "--resume") -> TrainState:
    """Read a checkpoint; of a sharded one everything but the tensors (`dcp.load_sharded` reads those too).

    Raises:
        UserError: the checkpoint is missing, damaged, incomplete, or not a training checkpoint.
    """
    file = path
    if path.suffix == DCP_SUFFIX:
        if not (path / ".metadata").is_file():
            raise UserError(f"{path} is incomplete: its run ended while writing it; use another one")
        file = path / DCP_STATE
    content = load_file(file, flag)
    if "state_dict" not in content:
        raise UserError(f"{path} is not a training checkpoint: it has no 'state_dict'; use one written by train.py")
    try:
        return TrainState.from_dict(content)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error_line(error)}); use another one") from None


def list_states(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, of any run."""
    paths = sorted(path for suffix in (SUFFIX, DCP_SUFFIX) for path in directory.glob(f"*{suffix}"))
    return [path for path in paths if path.suffix != DCP_SUFFIX or (path / ".metadata").is_file()]


def find_newest(directory: Path, started: str | None = None) -> Path | None:
    """Find the newest complete checkpoint of a directory, or of the run there that `started` identifies; None if there
    is none. Logs which files are skipped, and why."""
    usable: dict[Path, tuple[int, bool, int]] = {}
    for path in list_states(directory):
        try:
            state = load_state(path, "")
            if state.samon != FORMAT:
                raise UserError(f"{path} is not a training state of this program")
            if started in (None, state.started):
                usable[path] = state.progress.epoch, state.progress.epoch_done, state.progress.samples
        except UserError as error:
            log.warning("Skipped: %s", error)
    return max(usable, key=usable.__getitem__, default=None)


def stored_args(content: Tree) -> Tree:
    """The settings that a checkpoint was trained with, by the current names; empty for bare weights."""
    args = content.get("args") or {}
    return rename_old(args if isinstance(args, Mapping) else vars(args), FLAGS)


def validated_with_ema(content: Tree) -> bool:
    """Whether the run that wrote a checkpoint validated, and chose its best, by the averaged weights."""
    args = stored_args(content)
    ema = bool(args.get("model_ema")) and not args.get("model_ema_force_cpu") and bool(args.get("val_split", True))
    return ema and "state_dict_ema" in content


def load_weights(model: nn.Module, path: str, use_ema: bool) -> None:
    """Load the weights of a file or a checkpoint into the model, strictly, except the auxiliary layers of --split-bn,
    which only training uses."""
    own = model.state_dict().keys()

    def drop_auxiliary(state_dict: Tree, model: nn.Module) -> Tree:
        return {name: value for name, value in state_dict.items() if name in own or ".aux_bn." not in name}

    try:
        timm.models.load_checkpoint(model, path, use_ema, filter_fn=drop_auxiliary)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise UserError(f"--checkpoint {path}: {type(error).__name__}: {error_line(error)}") from error
