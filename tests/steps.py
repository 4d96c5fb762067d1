"""What the tests of a step share: optimizers of small float64 networks, losses, and comparisons."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

import samon
from tests.nets import LayerNormNet, randomized

RHO = 0.3
Forward = Callable[[], Tensor]


def make(net: Callable[[], nn.Module] = LayerNormNet, name: str = "samon", **kwargs: Any) -> tuple[nn.Module, Any]:
    """(network, optimizer), the same numbers at every call."""
    torch.manual_seed(0)
    model = randomized(net())
    return model, optimizer_of(model, name, **kwargs)


def optimizer_of(model: nn.Module, name: str = "samon", **kwargs: Any) -> Any:
    return create_optimizer_v2(model, name, **({"lr": 0.1, "weight_decay": 0.0, "rho": RHO} | kwargs))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Forward:
    return lambda: F.cross_entropy(model(x), y)


def losses_of(model: nn.Module, x: Tensor, y: Tensor, parts: int) -> list[Forward]:
    """The losses of `parts` equal micro-batches."""
    return [loss_of(model, a, b) for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)]


def closure_of(opt: Any, forward: Forward, backward: Callable[[Tensor], object] = Tensor.backward) -> Forward:
    """The standard closure: clear the gradients, forward, backward, return the loss."""

    def closure() -> Tensor:
        opt.zero_grad()
        loss = forward()
        backward(loss)
        return loss

    return closure


def two_steps(opt: samon.SAM, forward: Forward) -> None:
    """The protocol of davda54/sam."""
    forward().backward()
    opt.first_step(zero_grad=True)
    forward().backward()
    opt.second_step(zero_grad=True)


def update(
    opt: Any, *forwards: Forward | list[Forward], scaler: torch.amp.GradScaler | None = None, **options: Any
) -> Tensor:
    """One update by `two_pass` from these micro-batches (a list shares one perturbation); returns their mean loss."""
    opt.zero_grad()
    scale = 1 / len(forwards)
    losses = [samon.two_pass(opt, forward, loss_scale=scale, scaler=scaler, **options) for forward in forwards]
    if scaler is None:
        opt.step()
    else:
        scaler.step(opt)
        scaler.update()
    return torch.stack(losses).mean()


def error_of(act: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The message of the UserError that the call raises; empty if it raises none."""
    try:
        act(*args, **kwargs)
    except samon.UserError as error:
        return str(error)
    return ""


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in gradients(model).values()])


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers."""
    return copy.deepcopy(model.state_dict())


def assert_gradients(model: nn.Module, expected: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Relative to the whole gradient: a bias before BatchNorm has a gradient of rounding noise only."""
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    found = gradients(model)
    assert {n for n, g in expected.items() if g.any()} <= found.keys()
    for name, g in found.items():
        assert (g - expected[name]).norm() <= tolerance * size, name


def assert_same_step(model: nn.Module, twin: nn.Module, tolerance: float = 1e-10) -> None:
    """Equal gradients (`assert_gradients`), missing ones included, and buffers (1e-12)."""
    assert gradients(model).keys() == gradients(twin).keys()
    assert_gradients(model, gradients(twin), tolerance)
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-13, msg=name)


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    """Equal parameters and buffers: bit for bit, or within a relative tolerance."""
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance / 10, msg=name)


def same(a: Any, b: Any) -> bool:
    """Whether two trees of tensors and other values are equal, tensors bit for bit."""
    (ours, how), (theirs, other) = tree_flatten(a), tree_flatten(b)
    pairs = zip(ours, theirs, strict=True)
    return how == other and all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def assert_unchanged(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def count_flops(function: Callable[[], Any], times: int = 1) -> int:
    with FlopCounterMode(display=False) as counter:
        for _ in range(times):
            function()
    return counter.get_total_flops()


class HostReads(TorchDispatchMode):
    """Count the tensors that are read on the host: each dispatches aten::_local_scalar_dense."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
