"""What both passes of a step need: freezing, the same noise twice, other forwards for a while."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from samon.errors import UserError


@contextmanager
def frozen(parameters: Iterable[Parameter]) -> Iterator[None]:
    """No gradients for these parameters inside: neither computed nor are activations kept for them."""
    thawed = [p for p in parameters if p.requires_grad]
    for p in thawed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in thawed:
            p.requires_grad_(True)


@contextmanager
def swapped_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """The modules run these instead of their own `forward` inside; their hooks run as ever.

    A compiled model runs eagerly inside: its graphs were made of the modules' own forwards.
    """
    before = {m: m.__dict__["forward"] for m in forwards if "forward" in m.__dict__}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]
            if module in before:
                module.__dict__["forward"] = before[module]


class Noise:
    """The random state (CPU and one accelerator) that dropout and stochastic depth draw from."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def all_reduce_mean(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The tensors averaged over the processes, in one message."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def refuse_checkpointing(model: nn.Module, purpose: str) -> None:
    """Raises:
    UserError: the model runs parts of its forward again in the backward pass (timm's `set_grad_checkpointing`).
    """
    for name, module in model.named_modules():
        if getattr(module, "grad_checkpointing", False) is True:
            raise UserError(
                f"{purpose}, but gradient checkpointing is on in {name or type(module).__name__!r} and runs the "
                "forward again; turn one of the two off"
            )
