"""What PyTorch does not report: gradients lost on the way, a static graph, perturbations lost to rounding."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.parallel import DistributedDataParallel

from samon import rng
from samon.checks import REENTRANT, raise_no_gradient
from samon.contexts import global_forward_pre_hook, modules_of, preserve_buffers_in_pass
from samon.errors import UserError
from samon.geometry import LOW_PRECISION, NormReduction, global_norm
from samon.sam import SAM, Grads
from samon.scope import NamedParameters

_unused: WeakKeyDictionary[SAM, set[int]] = WeakKeyDictionary()  # ids of parameters known to be in no loss
_checked_ddp: WeakSet[SAM] = WeakSet()
_checked_rounding: WeakSet[SAM] = WeakSet()


def explain_missing_gradients(
    sam: SAM, named: NamedParameters, grads: Grads, loss: Tensor, forward: Callable[[], object]
) -> None:
    """Distinguish perturbed parameters that the loss does not use from those whose gradient got lost on the way.

    A gradient gets lost if the module that owns the parameter runs under no_grad. To see that, the forward runs once
    more, without side effects, the first time that a parameter's gradient is missing; no other step pays for it.

    Raises:
        UserError: a gradient got lost, or the loss depends on no perturbed parameter.
    """
    missing = {id(p): n for (n, p), g in zip(named.items(), grads, strict=True) if g is None}
    unrelated = not loss.requires_grad or (len(missing) == len(grads) and sam.ascent.keep_probability == 1)
    unused = _unused.setdefault(sam, set())
    if not unrelated and missing.keys() <= unused:
        return
    lost: list[str] = []

    def record_lost(module: nn.Module, args: object) -> None:
        if not torch.is_grad_enabled():
            lost.extend(missing[id(p)] for p in module.parameters(recurse=False) if id(p) in missing)

    buffers = preserve_buffers_in_pass(sam, modules_of(sam, sam.model))
    with buffers, rng.fork(loss.device), global_forward_pre_hook(record_lost):
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


def record_rounding(
    sam: SAM, weights: Sequence[Tensor], eps: Sequence[Tensor], saved: Sequence[Tensor] | None, reduce: NormReduction
) -> Sequence[Tensor]:
    """Record in `stats` the fraction of the perturbation that half-precision weights lost to rounding, and warn once
    if it is more than half. Returns the perturbation as the weights took it.

    Args:
        saved: the weights before eps was added; without them nothing was rounded.
    """
    applied = eps
    if saved is not None:
        triples = zip(weights, saved, eps, strict=True)
        applied = [w.float() - s.float() if w.dtype in LOW_PRECISION else e for w, s, e in triples]
    lost = global_norm([e - a for e, a in zip(eps, applied, strict=True)], reduce=reduce)
    sam.stats["eps_lost"] = lost / global_norm(eps, reduce=reduce).clamp(min=torch.finfo(lost.dtype).tiny)
    if sam in _checked_rounding or lost.is_meta or isinstance(lost, FakeTensor):
        return applied
    _checked_rounding.add(sam)  # one read on the host, in the first step
    if (fraction := sam.stats["eps_lost"].item()) > 0.5:
        warnings.warn(
            f"rounding to half-precision weights loses {fraction:.0%} of the perturbation (rho={sam.rho}); keep "
            "float32 weights (--amp instead of --model-dtype) or raise rho",
            stacklevel=2,
        )
    return applied
