"""FSDP2 training (--fsdp): how a model is sharded, and how its state is gathered and sharded again.

Normalization parameters, about 0.1 % of a model, stay replicated (`samon.engines.fsdp` says why). Each block of the
model, by timm's own `group_matcher`, is gathered and freed separately; the root holds the rest.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

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
from samon.trainer.state import Tree

T = TypeVar("T")


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a timm model by name: the modules that its `group_matcher` numbers."""
    groups = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else {}  # type: ignore[operator]
    rules = [rule for value in groups.values() for rule in ([value] if isinstance(value, str) else value)]
    patterns = [rule if isinstance(rule, str) else rule[0] for rule in rules]
    numbered = [pattern.lstrip("^") for pattern in patterns if r"\d" in pattern]
    blocks = {
        name: module
        for name, module in model.named_modules()
        if any(re.fullmatch(pattern, name) for pattern in numbered) and any(True for _ in module.parameters())
    }
    if not blocks:
        raise UserError(
            f"--fsdp: {type(model).__name__} has no group_matcher that numbers its blocks, so no part of it can be "
            "gathered separately; train it without --fsdp, or add the method"
        )
    return blocks


def make_mesh(config: Config, dist_info: DistInfo) -> DeviceMesh:
    """All processes, or `--fsdp-replicate` replicas of the model that are each sharded."""
    if dist_info.size == 1:
        raise UserError("--fsdp shards a model across processes, but there is only one; start several with torchrun")
    replicas, kind = config.fsdp_replicate, dist_info.device.type
    if dist_info.size % replicas or replicas == dist_info.size:
        raise UserError(
            f"--fsdp-replicate {replicas} needs a multiple of {replicas} processes, at least {2 * replicas}; got "
            f"{dist_info.size}"
        )
    if replicas == 1:
        return init_device_mesh(kind, (dist_info.size,))
    return init_device_mesh(kind, (replicas, dist_info.size // replicas), mesh_dim_names=("replicate", "shard"))


@torch.no_grad()
def shard_model(config: Config, model: nn.Module, dist_info: DistInfo, mesh: DeviceMesh) -> None:
    """Shard the model in place, with the weights of rank 0; one block at a time is on the device."""
    for tensor in model.state_dict().values():
        on_device = tensor.to(dist_info.device)
        dist.broadcast(on_device, 0)
        tensor.copy_(on_device)
    norms = set(norm_parameters(model).values())
    policy = MixedPrecisionPolicy()
    if config.amp:  # activations keep the types that autocast gives them, as without sharding
        dtype = parse_dtype(config.amp_dtype)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    reshard = False if config.fsdp_reshard_after_forward == "never" else None
    for module in (*find_blocks(model).values(), model):
        fully_shard(module, mesh=mesh, ignored_params=norms, mp_policy=policy, reshard_after_forward=reshard)
    for tensor in (*norms, *model.buffers()):
        tensor.data = tensor.data.to(dist_info.device)


def gather_full(state: T, dist_info: DistInfo) -> T:
    """A tree of tensors with the full tensors in place of sharded ones, on rank 0; all processes take part."""

    def gather(tensor: DTensor) -> Tensor | None:
        full = tensor.full_tensor()
        return full.cpu() if dist_info.is_rank_zero else None

    return tree_map_only(DTensor, gather, state)


def shard_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's full state sharded like its `own` state, for `load_state_dict`."""
    return {name: _shard_like(value, own[name]) if name in own else value for name, value in state.items()}


def shard_optimizer(state: Tree, optimizer: torch.optim.Optimizer) -> Tree:
    """An optimizer's full state, with what is shaped like a sharded parameter sharded as that is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shards = {
        index: {name: _shard_like(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": shards}


def _shard_like(value: T, like: Tensor) -> T | DTensor:
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != like.shape:
        return value
    # Every process has the full value, so nothing is sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
