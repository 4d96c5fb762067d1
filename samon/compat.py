"""What older versions of torch lack or call otherwise. Each entry says which version makes it unnecessary."""

from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor
from torch.torch_version import TorchVersion


def check_requires_grad_in_compiled_code() -> None:
    """Let compiled functions notice that `requires_grad` of a parameter changed. torch 2.12: they do.

    Before (https://github.com/pytorch/pytorch/pull/177158), the second pass would run the graph of the first, in which
    the weights that are not perturbed have no gradient, without an error. Affects what is compiled afterwards.
    """
    if TorchVersion(torch.__version__) < "2.12":  # compares the numbers
        torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False


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
