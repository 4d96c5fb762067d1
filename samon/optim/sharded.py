"""Parameters of which every process holds a part (DTensor, as `torch.distributed.fsdp.fully_shard` makes them).

All arithmetic of a perturbation is elementwise, so it runs on the parts; only norms need the other processes.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor, in the same memory; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def shard_groups(tensor: Tensor) -> list[dist.ProcessGroup]:
    """The processes among which a tensor is cut up; none for a whole one."""
    if not isinstance(tensor, DTensor):
        return []
    mesh, placements = tensor.device_mesh, enumerate(tensor.placements)
    return [mesh.get_group(dim) for dim, placement in placements if placement.is_shard()]


def is_cut(tensor: Tensor) -> bool:
    return bool(shard_groups(tensor))


class WholeNorms:
    """Norms of whole tensors from those of their parts, in one message of one number a tensor.

    Args:
        tensors: [T], some of them cut up, all of these among the same processes.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        groups = [shard_groups(t) for t in tensors]
        self.cut = [bool(found) for found in groups]
        self.groups = next((found for found in groups if found), [])

    def __call__(self, norms: Tensor) -> Tensor:
        """2-norms [T] of the parts to those of the tensors."""
        if not self.groups:
            return norms
        squares = norms.square()
        for group in self.groups:
            dist.all_reduce(squares, group=group)
        return torch.where(torch.tensor(self.cut, device=norms.device), squares.sqrt(), norms)


def whole_norms(tensors: Sequence[Tensor]) -> WholeNorms | None:
    """None where no tensor is cut up: the norms of the parts are those of the tensors."""
    norms = WholeNorms(tensors)
    return norms if norms.groups else None
