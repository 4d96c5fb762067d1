"""Sharded checkpoints (--checkpoint-format dcp): every process writes its own shards while training continues.

A checkpoint is a directory NAME.dcp: `torch.distributed.checkpoint` writes all tensors there, and `state.pt` holds the
rest. It can be resumed with another number of processes, with or without FSDP. `.metadata` is written last, so a
directory without it is incomplete.
"""

import pickle
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_dtensor

from samon.errors import UserError
from samon.files import atomic_write
from samon.trainer.run_dir import remove_state
from samon.trainer.state import DCP_STATE, TrainState, load_file

SINGLE_PROCESS_WARNING = "torch.distributed is disabled"  # the beginning of PyTorch's warning
# What .metadata contains, by module. It is a pickle, so every other name is refused.
_METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta TensorProperties "
    "TensorStorageMetadata ChunkStorageMetadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    **{"torch": "Size", "torch.serialization": "_get_layout", "collections": "OrderedDict"},
    **{"pathlib": "PosixPath", "pathlib._local": "PosixPath"},  # Python 3.13 has the second
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 pickle the members of an Enum
            return _enum_member
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _METADATA_NAMES.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")


def _enum_member(kind: object, name: str) -> Enum:
    """The member of an Enum, in place of `getattr`, which would reach everything."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError("builtins.getattr is not allowed in a checkpoint")
    return kind[name]


class _SafeReader(dcp.FileSystemReader):
    """A reader that executes nothing that `.metadata` names."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def save_sharded(state: TrainState, path: Path, group: dist.ProcessGroup | None) -> Future[object]:
    """Start to write a checkpoint in the background; all processes call it. The future ends when it is complete.

    Args:
        group: gloo processes of its own, since a thread communicates while training does; None for one process.
    """
    assert state.optimizer is not None
    tensors = {f"state_dict/{name}": t for name, t in state.state_dict.items()}
    tensors |= {f"state_dict_ema/{name}": t for name, t in (state.state_dict_ema or {}).items()}
    values: dict[int, dict[str, object]] = {}
    for index, entries in state.optimizer["state"].items():
        tensors |= {f"optimizer/{index}/{key}": t for key, t in entries.items() if isinstance(t, Tensor)}
        values[index] = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
    if group is None or dist.get_rank() == 0:
        rest = replace(
            state,
            state_dict={},
            state_dict_ema=state.state_dict_ema and {},
            optimizer=state.optimizer | {"state": values},
        )
        remove_state(path)
        path.mkdir(parents=True)
        with atomic_write(path / DCP_STATE) as file:
            torch.save(rest.to_dict() | {"names": list(tensors)}, file)
    if group is not None:
        dist.barrier(group)
    # For good, because a thread of PyTorch's warns: about a single process, and torch 2.8 about its own code.
    warnings.filterwarnings("ignore", f"{SINGLE_PROCESS_WARNING}|TypedStorage is deprecated")
    # CPU tensors are written from where they are, and training goes on there.
    copies = {name: t.detach().clone() if t.device.type == "cpu" else t for name, t in tensors.items()}
    writer = dcp.FileSystemWriter(path)
    future: Any = dcp.async_save(copies, storage_writer=writer, process_group=group)
    return future


def load_sharded(path: Path, layout: Mapping[str, Tensor] | None = None) -> TrainState:
    """Read a checkpoint with its tensors.

    Args:
        layout: this run's tensors by name (`state_dict/NAME`, `state_dict_ema/NAME`, `optimizer/INDEX`); those that are
            sharded are read as shards. All processes must call it. Without it this process reads everything.
    """
    content, reader = load_file(path / DCP_STATE, "--resume"), _SafeReader(path)
    state = TrainState.from_dict(content)
    try:
        entries = reader.read_metadata().state_dict_metadata
        tensors = {name: _allocate(entries[name], name, layout or {}) for name in content["names"]}  # the model's order
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, KeyError) as error:
        raise UserError(f"--resume {path} is damaged or not a checkpoint ({error}); use another one") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SINGLE_PROCESS_WARNING)
        dcp.load(dict(tensors), storage_reader=reader, no_dist=layout is None or not dist.is_initialized())
    for name, tensor in tensors.items():
        tree, _, key = name.partition("/")
        if tree == "optimizer" and state.optimizer is not None:
            index, _, key = key.partition("/")
            state.optimizer["state"].setdefault(int(index), {})[key] = tensor
        else:
            getattr(state, tree)[key] = tensor
    return state


def _allocate(entry: object, name: str, layout: Mapping[str, Tensor]) -> Tensor:
    if not isinstance(entry, TensorStorageMetadata):
        raise AttributeError(f"{name} is not a tensor")
    like, dtype = layout.get("/".join(name.split("/")[:2])), entry.properties.dtype
    if isinstance(like, DTensor) and like.shape == entry.size:
        return empty_dtensor(*entry.size, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)
    return torch.empty(entry.size, dtype=dtype)


def convert_to_file(path: Path, target: Path) -> None:
    """Write a sharded checkpoint as a single file in timm's format."""
    content = load_sharded(path).to_dict()
    with atomic_write(target) as file:
        torch.save(content, file)
