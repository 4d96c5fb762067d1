"""Temporary changes to a model, each undone exactly, also after an exception."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from samon.compat import foreach_clone
from samon.errors import UserError


@contextmanager
def requires_grad(parameters: Iterable[Parameter], value: bool) -> Iterator[None]:
    """Set `requires_grad` to a value. Parameters that do not require it cost neither gradients nor activations."""
    changed = [p for p in parameters if p.requires_grad != value]
    for p in changed:
        p.requires_grad_(value)
    try:
        yield
    finally:
        for p in changed:
            p.requires_grad_(not value)


def find_bias_caches(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """timm's attention layers that compute their biases once in eval mode (LeViT, EfficientFormer, TinyViT)."""
    return [m for m in modules if "attention_bias_cache" in vars(m)]


@contextmanager
def uncached_biases(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let layers from `find_bias_caches` compute their biases in every forward, as in training mode. Those in the cache
    may be of other weights, and have no graph."""
    cached = [m for m in layers if not m.training]
    for m in cached:
        m.training = True  # not `train()`, which includes the children
    try:
        yield
    finally:
        for m in cached:
            m.training = False


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


def clear_weight_caches() -> None:
    """Forget what contexts around the step computed from the weights: autocast's copies in half precision, and the
    tensors of `torch.nn.utils.parametrize.cached`."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


# -- modules and running statistics ------------------------------------------------------------------------------------
_recorded_modules: WeakKeyDictionary[Optimizer, set[nn.Module]] = WeakKeyDictionary()


def all_modules(model: nn.Module) -> list[nn.Module]:
    """`model.modules()` without computing names, which takes 1.5 of a step's 10 ms for 600 small layers."""
    modules, seen = [model], {model}
    for module in modules:
        new = [m for m in module._modules.values() if m is not None and m not in seen]
        seen.update(new)
        modules += new
    return modules


def modules_of(optimizer: Optimizer, model: nn.Module | None) -> list[nn.Module]:
    """All modules of the model. For an optimizer created without one: those that ran in its first step."""
    return list(_recorded_modules.get(optimizer, ())) if model is None else all_modules(model)


def parameters_of(modules: Iterable[nn.Module]) -> dict[int, Parameter]:
    """The modules' own parameters by id."""
    return {id(p): p for m in modules if m._parameters for p in m._parameters.values() if p is not None}


@contextmanager
def preserve_buffers(modules: Iterable[nn.Module]) -> Iterator[Callable[[nn.Module], None]]:
    """Restore all buffers of the modules at the end. Yields a function that adds a module, before it runs.

    All, because any forward may write to any: running statistics of BatchNorm, EvoNorm and custom classes, the vectors
    of spectral normalization. Copying values works for every class, compiled or not. The copy back is an in-place
    write, so a forward that ran inside must have been backpropagated inside as well.
    """
    owners: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
    buffers, saved = list[Tensor](), list[Tensor]()

    def add(module: nn.Module) -> None:
        if module._buffers:
            owners.append((module._buffers, dict(module._buffers)))
            writable = [b for b in module._buffers.values() if b is not None and _is_writable(b)]
            buffers.extend(writable)
            saved.extend(b.clone() for b in writable)

    for module in modules:
        add(module)
    try:
        yield add
    finally:
        for current, before in owners:
            current.update(before)  # buffers that code replaced instead of writing to them
        if saved:
            with torch.no_grad():
                torch._foreach_copy_(buffers, saved)


@contextmanager
def preserve_buffers_in_pass(optimizer: Optimizer, modules: list[nn.Module]) -> Iterator[None]:
    """Restore the buffers of `modules_of(optimizer, ...)` at the end of a pass. If these are not known yet, record the
    modules that run inside, once (compiled ones run eagerly).

    Raises:
        UserError: one of these caches what it computes from its weights, so that the first pass was wrong.
    """
    recorded = set[nn.Module]()
    with preserve_buffers(modules) as add:

        def record(module: nn.Module, args: object) -> None:
            for m in module.modules():
                if not m.training and find_bias_caches([m]):
                    layer = type(m).__name__
                    raise UserError(f"{layer} caches its biases in eval mode; create the optimizer from the model")
                if m not in recorded:
                    add(m)
                    recorded.add(m)

        with nullcontext() if modules else global_forward_pre_hook(record):
            yield
    if recorded:
        _recorded_modules[optimizer] = recorded


@contextmanager
def global_forward_pre_hook(hook: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Call a hook before the forward of every module; compiled ones run eagerly, since graphs call no hooks."""
    with register_module_forward_pre_hook(hook), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile")  # of hooks, which see the wrapper too
        yield


def _is_writable(buffer: Tensor) -> bool:
    """Whether values can be copied into the buffer; a forward cannot write to the others either."""
    if buffer.layout != torch.strided or buffer.is_inference():
        return False
    return not any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
