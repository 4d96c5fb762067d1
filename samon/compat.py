"""What older versions of torch lack or call otherwise. Each entry says which version makes it unnecessary."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def foreach_clone(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors, by one kernel on a GPU. torch 2.13: `torch._foreach_clone`."""
    if hasattr(torch, "_foreach_clone"):
        return list(torch._foreach_clone(list(tensors)))
    copies = [torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies


def fsdp_param_groups(state: Any) -> list[Any]:
    """The parameter groups of an FSDP2 module's state. torch 2.12: always `_fsdp_param_groups`, a list."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
