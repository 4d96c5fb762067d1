"""Training states in parts (--checkpoint-format dcp): every process writes what it holds, while training goes on.

A state is a directory NAME.parts of `torch.distributed.checkpoint` with all tensors, and `state.pt` beside them with
the rest. It can be continued on another number of processes, sharded or not. `.metadata` is written last: a directory
without it is not complete.
"""

import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as sharded_empty

from samon.errors import UserError
from samon.files import atomic_write
from samon.trainer.checkpoint import PARTS, REST, SUFFIX, Checkpoints, TrainState, load, remove

ALONE = "torch.distributed is disabled"  # how PyTorch begins to warn of a single process
TREES = ("state_dict", "state_dict_ema")
_RECORDS = ("torch", "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_PLAIN = {("collections", "OrderedDict"), ("pathlib", "PosixPath"), ("torch.serialization", "_get_layout")}
_PLAIN |= {("torch", "Size"), *(("builtins", name) for name in ("set", "frozenset", "dict", "list", "tuple"))}
_TYPES = (torch.dtype, torch.layout, torch.memory_format)


class Reader(dcp.FileSystemReader):
    """Reads what a directory holds without executing what its metadata could name."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Plain(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Plain(pickle.Unpickler):
    """The records that `torch.distributed.checkpoint` writes, torch's types, plain containers; nothing that does."""

    def find_class(self, module: str, name: str) -> Any:
        plain = (module, name) in _PLAIN
        if plain or module in _RECORDS:
            found = super().find_class(module, name)
            if plain or isinstance(found, _TYPES if module == "torch" else type):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def flat(state: TrainState) -> tuple[dict[str, Tensor], TrainState]:
    """(tensors of model, average and optimizer by name, the state without them)."""
    tensors = {f"{tree}/{n}": t for tree in TREES for n, t in (getattr(state, tree) or {}).items()}
    rest: dict[str, Any] = {}
    for index, values in state.optimizer["state"].items():
        tensors |= {f"optimizer/{index}/{n}": t for n, t in values.items() if isinstance(t, Tensor)}
        rest[index] = {n: v for n, v in values.items() if not isinstance(v, Tensor)}
    without: Any = {"state_dict": {}, "state_dict_ema": None if state.state_dict_ema is None else {}}
    return tensors, replace(state, **without, optimizer={**state.optimizer, "state": rest})


def loaded(path: Path, like: Callable[[str], Tensor | None] | None = None) -> dict[str, Any]:
    """The content of a state as a single file would have it.

    Args:
        like: for a tensor's name in `flat` what this run has there, which says whether it is sharded and how; all
            processes read together. Without it this process reads everything by itself.

    Raises:
        UserError: the directory is damaged or no such state.
    """
    content = load(path / REST, "--resume")
    reader = Reader(path)
    try:
        found = reader.read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise UserError(f"--resume {path} is damaged or no checkpoint ({error}); use another one") from None
    names = content.pop("names")  # in the model's order
    target = {name: _room(found.get(name), None if like is None else like(name)) for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ALONE)  # one process is what is meant
        dcp.load(dict(target), storage_reader=reader, no_dist=like is None or not dist.is_initialized())
    for name, tensor in target.items():
        kind, _, rest = name.partition("/")
        if kind in TREES:
            content[kind][rest] = tensor
        else:
            index, _, key = rest.partition("/")
            content["optimizer"]["state"].setdefault(int(index), {})[key] = tensor
    return content


def _room(about: Any, like: Tensor | None) -> Tensor:
    if not isinstance(about, TensorStorageMetadata):
        raise UserError("a state in parts holds something that is no tensor; use another one")
    if isinstance(like, DTensor) and like.shape == about.size:
        how: Any = {"device_mesh": like.device_mesh, "placements": like.placements}
        return sharded_empty(*about.size, dtype=about.properties.dtype, **how)
    return torch.empty(about.size, dtype=about.properties.dtype)


class Parts(Checkpoints):
    """The states of a run, written in the background."""

    suffix = PARTS

    def __init__(self, directory: Path, keep: int, lower_is_better: bool) -> None:
        super().__init__(directory, keep, lower_is_better)
        warnings.filterwarnings("ignore", ALONE)  # for good: a thread of PyTorch's warns
        # Of its own, since threads write while the others are in use.
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.is_rank_zero = self.group is None or dist.get_rank() == 0
        self._pending: tuple[Any, Path] | None = None
        self._outdated: list[Path] = []

    def _write(self, state: TrainState, path: Path) -> None:
        self.settle()
        tensors, rest = flat(state)
        if self.is_rank_zero:
            remove(path)
            path.mkdir(parents=True)
            with atomic_write(path / REST) as file:
                torch.save(rest.as_dict() | {"names": list(tensors)}, file)
        if self.group is not None:
            dist.barrier(self.group)
        # What lies on the CPU is written from where it lies, and training goes on there.
        held = {name: t.detach().clone() if t.device.type == "cpu" else t for name, t in tensors.items()}
        how: dict[str, Any] = {"process_group": self.group, "no_dist": self.group is None}
        self._pending = dcp.async_save(held, storage_writer=dcp.FileSystemWriter(path), **how), path

    def _publish(self, path: Path, names: list[str]) -> None:
        self.last_good = path

    def _discard(self, paths: list[Path]) -> None:
        self._outdated += paths  # they go when what replaces them is complete

    def settle(self) -> None:
        """Wait for what is being written; what it replaces goes."""
        if self._pending is not None:
            (writing, path), self._pending = self._pending, None
            try:
                writing.result()
            except Exception as error:  # of a writing thread
                raise self._fault(path, error) from error
        outdated, self._outdated = self._outdated, []
        for path in outdated if self.is_rank_zero else []:
            remove(path)

    def finish(self) -> None:
        """The end of a run: the last state and the best one also as timm's single files."""
        self.settle()
        if not self.is_rank_zero or not self.best["kept"]:
            return
        best = self.directory / f"checkpoint-{self.best['epoch']}{PARTS}"
        for name, path in (("last", self.last_good), ("model_best", best)):
            if path is not None and path.is_dir():
                to_file(path, self.directory / f"{name}{SUFFIX}")


def to_file(path: Path, target: Path) -> None:
    """A state in parts as one file of timm's."""
    content = loaded(path)
    with atomic_write(target) as file:
        torch.save(content, file)
