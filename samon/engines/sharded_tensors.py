"""Parameters of which every process holds a part (DTensor, as `torch.distributed.fsdp.fully_shard` makes them).

All arithmetic of a perturbation is elementwise, so it runs on the parts; only norms need the other processes.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from samon.engines.ascent import Ascent
from samon.engines.masks import Mask
from samon.errors import UserError
from samon.geometry import Norms


def local(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor, in the same memory; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def refuse_flat(parameters: Iterable[Tensor]) -> None:
    """Raises:
    UserError: FSDP1 has put a parameter into a flat one, of which each process holds a part without knowing which.
    """
    if any(getattr(p, "_fsdp_flattened", False) for p in parameters):
        raise UserError(
            "FullyShardedDataParallel (FSDP1) hides which part of a parameter a process holds; shard the model by "
            "torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )


def shard_groups(tensor: Tensor) -> list[dist.ProcessGroup]:
    """The processes among which a tensor is cut up; none for a whole one."""
    if not isinstance(tensor, DTensor):
        return []
    mesh, placements = tensor.device_mesh, enumerate(tensor.placements)
    return [mesh.get_group(dim) for dim, placement in placements if placement.is_shard()]


def is_cut(tensor: Tensor) -> bool:
    return bool(shard_groups(tensor))


def refuse_sharded(parameters: Iterable[Tensor], ascent: Ascent, mask: Mask | None) -> None:
    """Raises:
    UserError: the source of the ascent or the mask needs whole tensors, and a perturbed parameter is cut up.
    """
    if (mask is not None or ascent.keeps or ascent.gsam_alpha) and any(map(is_cut, parameters)):
        what = f"ascent={ascent.source!r} and gsam_alpha need" if mask is None else "sparse perturbations need"
        raise UserError(f"perturbed parameters are sharded (FSDP): {what} them whole")


def whole_norms(tensors: Iterable[Tensor]) -> Norms:
    """Makes the norms of whole tensors from those of their parts, in one message of one number a tensor; None where no
    tensor is cut up: the norms of the parts are those of the tensors.

    Args:
        tensors: [T], some of them cut up, all of these among the same processes.
    """
    groups = [shard_groups(t) for t in tensors]
    among = next(filter(None, groups), None)
    return None if among is None else partial(_whole, [bool(found) for found in groups], among)


def _whole(cut: Sequence[bool], groups: Sequence[dist.ProcessGroup], norms: Tensor) -> Tensor:
    """2-norms [T] of the parts to those of the tensors."""
    squares = norms.square()
    for group in groups:
        dist.all_reduce(squares, group=group)
    return torch.where(torch.tensor(cut, device=norms.device), squares.sqrt(), norms)
