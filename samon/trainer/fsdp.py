"""Models shared out among processes by FSDP2 (--fsdp): where they are cut, how their state is taken and put back.

Normalization parameters, about 0.1 % of a model, stay whole on every process (`samon.engines.fsdp` says why). Each
block of the model, by timm's own `group_matcher`, is gathered and freed by itself; the root holds the rest.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from samon.errors import UserError
from samon.scope import norm_parameters
from samon.trainer.config import Config
from samon.trainer.distributed import DistInfo
from samon.trainer.model import parse_dtype


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a timm model by name: the modules whose names its `group_matcher` numbers.

    Raises:
        UserError: the model names none.
    """
    match: Any = getattr(model, "group_matcher", None)
    groups = {} if match is None else match(coarse=False)
    rules = [rule for value in groups.values() for rule in ([value] if isinstance(value, str) else value)]
    patterns = [rule if isinstance(rule, str) else rule[0] for rule in rules]
    numbered = [pattern.lstrip("^") for pattern in patterns if r"\d" in pattern]
    named = {name: m for name, m in model.named_modules() if any(re.fullmatch(p, name) for p in numbered)}
    found = {name: m for name, m in named.items() if next(m.parameters(), None) is not None}
    if not found:
        raise UserError(
            f"--fsdp: {type(model).__name__} has no group_matcher that numbers its blocks, so there is nothing to "
            "gather one by one; train it without --fsdp, or add the method"
        )
    return found


def make_mesh(config: Config, world: DistInfo) -> DeviceMesh:
    """All processes, or rows of --fsdp-replicate replicas that are each shared out.

    Raises:
        UserError: one process, or a number of replicas that does not divide the processes.
    """
    if world.size == 1:
        raise UserError("--fsdp shares a model out among processes, and this is one; start several with torchrun")
    replicas = config.fsdp_replicate
    if world.size % replicas or replicas == world.size:
        raise UserError(f"--fsdp-replicate {replicas}: {world.size} processes do not make so many rows of two or more")
    kind = world.device.type
    if replicas == 1:
        return init_device_mesh(kind, (world.size,))
    return init_device_mesh(kind, (replicas, world.size // replicas), mesh_dim_names=("replicate", "shard"))


def shard_model(config: Config, model: nn.Module, world: DistInfo, mesh: DeviceMesh) -> None:
    """Share the model out, in place: the weights of rank 0, a block at a time on the device."""
    _agree(model, world)
    whole = set(norm_parameters(model).values())
    how: dict[str, Any] = {"mesh": mesh, "ignored_params": whole}
    if config.amp:
        # Activations keep the types that autocast gives them, as without sharding.
        precision = {"param_dtype": parse_dtype(config.amp_dtype), "reduce_dtype": torch.float32}
        how["mp_policy"] = MixedPrecisionPolicy(**precision, cast_forward_inputs=False)
    if config.fsdp_reshard_after_forward == "never":
        how["reshard_after_forward"] = False
    for block in blocks(model).values():
        fully_shard(block, **how)
    fully_shard(model, **how)
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(world.device)


@torch.no_grad()
def _agree(model: nn.Module, world: DistInfo) -> None:
    for tensor in model.state_dict().values():
        on_device = tensor.to(world.device)
        dist.broadcast(on_device, 0)
        tensor.copy_(on_device)


def gather_full(state: Any, world: DistInfo) -> Any:
    """A tree of tensors with the sharded ones whole, on rank 0; all processes take part."""

    def whole(tensor: DTensor) -> Tensor | None:
        full = tensor.full_tensor()
        return full.cpu() if world.is_rank_zero else None

    return tree_map_only(DTensor, whole, state)


def shard_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's whole state as this process holds it, for `load_state_dict`."""
    return {name: _part(value, own[name]) if name in own else value for name, value in state.items()}


def shard_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's whole state as this process holds it: what is shaped like a sharded parameter is cut as it is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = {
        index: {name: _part(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": held}


def _part(value: Any, like: Tensor) -> Any:
    whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not whole or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    # Every process has the whole value: nothing is sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def pad_batches(batches: Iterator[Any], length: int, model: nn.Module, image: Tensor, autocast: Any) -> Iterator[Any]:
    """This process's `length` batches, and then as many forwards of one image [1, C, H, W] as the longest process has
    more: each gathers parameters together with all others."""
    longest = torch.tensor([length], device=image.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    done = 0
    for batch in batches:
        yield batch
        done += 1
    for _ in range(int(longest) - done):
        with autocast():
            model(image)
