"""Temporary changes to a model that only some engines make, each undone exactly; the leaves of its autograd graph."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node


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
def patch_forward(forwards: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """Replace the `forward` of these modules; their hooks still run. Compiled models run eagerly, since their graphs
    contain the original forwards."""
    with override_attrs({m: {"forward": f} for m, f in forwards.items()}), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def forward_hooks(
    modules: Iterable[nn.Module], before: Callable[..., object], after: Callable[..., object] | None = None
) -> Iterator[None]:
    """Call hooks before and after the forward of these modules; compiled models run eagerly: graphs call no hooks."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_pre_hook(before))
            if after is not None:
                stack.enter_context(module.register_forward_hook(after))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def graph_leaves(nodes: Iterable[Node | None]) -> Iterator[Tensor]:
    """The tensors that a backward from these autograd nodes accumulates gradients in."""
    seen, stack = set[Node](), list(nodes)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            yield leaf
        stack += [following for following, _ in node.next_functions]
