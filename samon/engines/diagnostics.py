"""Why a step went wrong: wrong uses of `two_pass` that PyTorch reports badly, or not at all."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from samon import rng
from samon.contexts import forward_hooks, modules_of, preserve_buffers
from samon.errors import UserError
from samon.sam import SAM, Grads
from samon.scope import Named
from samon.two_pass import raise_no_gradient

REENTRANT = (
    "torch.utils.checkpoint(use_reentrant=True) hides {} from the ascent pass, which differentiates with respect to "
    "the perturbed parameters only; pass use_reentrant=False (timm: timm.layers.set_reentrant_ckpt(False))"
)
_unused: WeakKeyDictionary[SAM, set[int]] = WeakKeyDictionary()  # ids of parameters known to be in no loss
_checked_ddp: WeakSet[SAM] = WeakSet()


def explain_error(error: RuntimeError) -> None:
    """Raises:
    UserError: in place of PyTorch's error, if it is one of these two.
    """
    if "use_reentrant" in str(error):
        raise UserError(REENTRANT.format("layers")) from error
    if "backward through the graph a second time" in str(error):
        raise UserError(
            "forward must not run backward, which two_pass does itself (step(closure) takes a closure that does), nor "
            "use a graph that was built outside of it"
        ) from error


def explain_missing_gradients(sam: SAM, named: Named, grads: Grads, loss: Tensor, forward: Callable[[], Any]) -> None:
    """Distinguish perturbed parameters that the loss does not use from those whose gradient got lost on the way.

    The owner of a lost one runs with gradients disabled. To see it, the forward runs once more, without side effects,
    the first time that a parameter's gradient is missing; no other step pays for it.

    Raises:
        UserError: a gradient got lost, or the loss depends on no perturbed parameter.
    """
    missing = {id(p): n for (n, p), g in zip(named.items(), grads, strict=True) if g is None}
    unrelated = not loss.requires_grad or (len(missing) == len(grads) and sam.ascent.keep_probability == 1)
    unused = _unused.setdefault(sam, set())
    if not unrelated and missing.keys() <= unused:
        return
    lost: list[str] = []

    def record_lost(module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():
            lost.extend(missing[id(p)] for p in module.parameters(recurse=False) if id(p) in missing)

    hooks: AbstractContextManager[Any]
    if sam.model is None:
        hooks = register_module_forward_pre_hook(record_lost)
    else:
        hooks = forward_hooks(sam.model.modules(), record_lost)
    with preserve_buffers(modules_of(sam, sam.model)), rng.fork(loss.device), hooks:
        forward()
    if lost:
        raise UserError(REENTRANT.format(lost[0]) + "; if it runs under torch.no_grad() on purpose, freeze it")
    if unrelated:
        raise_no_gradient(sam)
    unused.update(missing)


@contextmanager
def refuse_static_graph(sam: SAM) -> Iterator[None]:
    """Refuse DistributedDataParallel with `static_graph`, which assumes that every backward is the same one; the ascent
    pass is another. Once a model has run, later steps do not check.

    The class is patched, because global hooks make compiled models recompile, and only the user's forward knows the
    wrapped model.
    """
    if sam in _checked_ddp:
        yield
        return
    original = DistributedDataParallel.forward

    def forward(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
        if self.static_graph:
            raise UserError(
                "two_pass runs two different backward passes, which DistributedDataParallel(static_graph=True) does "
                "not allow; drop static_graph"
            )
        _checked_ddp.add(sam)
        return original(self, *args, **kwargs)

    DistributedDataParallel.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        DistributedDataParallel.forward = original  # type: ignore[method-assign]
