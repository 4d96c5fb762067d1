"""Temporary changes to a model, each undone exactly, also after an exception."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

from samon.compat import foreach_clone


# -- parameters and attributes -----------------------------------------------------------------------------------------
@contextmanager
def frozen(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Compute no gradients for these parameters, and store no activations for them."""
    trainable = [p for p in parameters if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextmanager
def trainable(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Compute gradients for these frozen parameters."""
    frozen_now = [p for p in parameters if not p.requires_grad]
    for p in frozen_now:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen_now:
            p.requires_grad_(False)


@contextmanager
def scaled_learning_rates(param_groups: list[dict[str, Any]], ratio: float) -> Iterator[None]:
    """Multiply the learning rates of the groups, whatever scheduler sets them."""
    if ratio == 1:
        yield
        return
    rates = [group["lr"] for group in param_groups]
    try:
        for group in param_groups:
            group["lr"] = ratio * group["lr"]
        yield
    finally:
        for group, rate in zip(param_groups, rates, strict=True):
            group["lr"] = rate


@torch.no_grad()
def add_perturbation(weights: list[Tensor], eps: list[Tensor]) -> list[Tensor]:
    """Add eps in place; float32 eps on half-precision weights is rounded once. Returns copies of the old weights."""
    saved = foreach_clone(weights)
    torch._foreach_add_(weights, eps)
    return saved


@torch.no_grad()
def restore_weights(weights: list[Tensor], saved: list[Tensor]) -> None:
    """Copy the saved values back: (w + eps) - eps is not w."""
    torch._foreach_copy_(weights, saved)


@contextmanager
def override_attrs(overrides: Mapping[Any, Mapping[str, Any]]) -> Iterator[None]:
    """Temporarily override instance attributes: {object: {name: value}}."""
    before = {item: {n: vars(item)[n] for n in values if n in vars(item)} for item, values in overrides.items()}
    for item, values in overrides.items():
        vars(item).update(values)
    try:
        yield
    finally:
        for item, own in before.items():
            for name in overrides[item].keys() - own.keys():
                del vars(item)[name]
            vars(item).update(own)


@contextmanager
def patch_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the `forward` of these modules; their hooks still run. Compiled models run eagerly, since their graphs
    contain the original forwards."""
    with override_attrs({m: {"forward": f} for m, f in forwards.items()}), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def forward_hooks(
    modules: Iterable[nn.Module], before: Callable[..., Any], after: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Call hooks before and after the forward of these modules; compiled models run eagerly, since graphs call none."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_pre_hook(before))
            if after is not None:
                stack.enter_context(module.register_forward_hook(after))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


# -- modules and running statistics ------------------------------------------------------------------------------------
_recorded_modules: WeakKeyDictionary[Optimizer, set[nn.Module]] = WeakKeyDictionary()


def iterate_modules(model: nn.Module) -> Iterator[nn.Module]:
    """`model.modules()` without computing names, which takes 1.5 of a step's 10 ms for 600 small layers."""
    seen, stack = {model}, [model]
    while stack:
        module = stack.pop()
        yield module
        new = [m for m in module._modules.values() if m is not None and m not in seen]
        seen.update(new)
        stack += new


def modules_of(optimizer: Optimizer, model: nn.Module | None) -> list[nn.Module]:
    """All modules of the model, or those recorded in the first step if the optimizer was created without a model."""
    return list(_recorded_modules.get(optimizer, ()) if model is None else iterate_modules(model))


@contextmanager
def record_modules(optimizer: Optimizer, model: nn.Module | None) -> Iterator[None]:
    """Around a first pass: without a model, record which modules run, once (compiled ones run eagerly)."""
    if model is not None or optimizer in _recorded_modules:
        yield
        return
    modules = set[nn.Module]()
    hook = register_module_forward_pre_hook(lambda module, args: modules.add(module))
    with hook, torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile")  # of hooks, which see the wrapper too
        yield
    if modules:  # a closure that computes nothing is not a first pass
        _recorded_modules[optimizer] = modules


@contextmanager
def preserve_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore all buffers of the modules at the end.

    All, because any forward may write to any: running statistics of BatchNorm, EvoNorm and custom classes, the vectors
    of spectral normalization. Copying values works for every class, compiled or not. The copy back is an in-place
    write, so a forward that ran inside must have been backpropagated inside as well.
    """
    owners = [(m._buffers, dict(m._buffers)) for m in modules if m._buffers]
    buffers = [b for _, before in owners for b in before.values() if b is not None and _is_writable(b)]
    saved = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for current, before in owners:
            current.update(before)  # buffers that code replaced instead of writing to them
        if saved:
            with torch.no_grad():
                torch._foreach_copy_(buffers, saved)


def _is_writable(buffer: Tensor) -> bool:
    """Whether values can be copied in; no forward writes in place to a buffer in which they cannot."""
    if buffer.layout != torch.strided or buffer.is_inference():
        return False
    return not any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
