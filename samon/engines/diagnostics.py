"""Wrong uses of `two_pass`, refused or explained: PyTorch reports them badly, or not at all."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from samon import rng
from samon.contexts import modules_of, preserve_buffers
from samon.engines.patches import forward_hooks
from samon.errors import UserError
from samon.geometry import LOW_PRECISION, NormReduction, global_norm
from samon.sam import SAM, Grads, sam_of
from samon.scope import Named, refuse_fsdp1

if TYPE_CHECKING:
    from samon.two_pass import StepOptions

BN_STATS = ("first", "second", "both")  # the pass that updates running statistics
REENTRANT = (
    "torch.utils.checkpoint(use_reentrant=True) hides {} from the ascent pass, which differentiates with respect to "
    "the perturbed parameters only; pass use_reentrant=False (timm: timm.layers.set_reentrant_ckpt(False))"
)
_unused: WeakKeyDictionary[SAM, set[int]] = WeakKeyDictionary()  # ids of parameters known to be in no loss
_checked_ddp: WeakSet[SAM] = WeakSet()
_checked_rounding: WeakSet[SAM] = WeakSet()


def require_sam(optimizer: object) -> SAM:
    """The SAM optimizer inside `optimizer`."""
    if (sam := sam_of(optimizer)) is None:
        raise UserError(
            f"two_pass needs one of samon's optimizers, got {type(optimizer).__name__}; create one with "
            "timm.optim.create_optimizer_v2(model, 'samon-layerl2', ...)"
        )
    return sam


def check_options(sam: SAM, options: "StepOptions") -> None:
    """Raise UserError for arguments of `two_pass` that are wrong, or exclude each other or the optimizer."""
    groups, reduce, bn_stats = options.groups, options.reduce, options.bn_stats
    if torch.is_inference_mode_enabled():
        raise UserError("two_pass cannot run under torch.inference_mode(); call it outside")
    if not options.forwards:
        raise UserError("forward is an empty sequence")
    if reduce not in ("device", "global"):
        raise UserError(f"reduce must be 'device' or 'global', got {reduce!r}")
    if bn_stats not in BN_STATS:
        raise UserError(f"bn_stats must be one of {', '.join(BN_STATS)}, got {bn_stats!r}")
    if groups < 1:
        raise UserError(f"groups must be at least 1, got {groups}")
    if groups > 1 and (reduce == "global" or options.forwards > 1 or options.ascent_forward):
        raise UserError(
            f"groups={groups} gives each sub-batch its own perturbation, so it does not combine with reduce='global', "
            "several forwards or ascent_forward, where sub-batches share one"
        )
    if sam.ascent.single_pass and (groups > 1 or reduce == "global" or options.ascent_forward):
        raise UserError(
            f"ascent={sam.ascent.name!r} makes no ascent pass; drop groups and reduce='global' (--m-sharpness), and "
            "ascent_forward (--ascent-fraction, --ascent-size)"
        )
    if options.forwards > 1 and options.ascent_forward:
        raise UserError("ascent_forward requires a single forward")
    if bn_stats != "first" and sam.model is None:
        raise UserError(f"bn_stats={bn_stats!r} must know the BatchNorm layers; create the optimizer from the model")


def as_losses(forward: Any) -> list[Callable[[], Tensor]]:
    """Each of the forwards, checked to return a loss."""
    forwards = [forward] if callable(forward) or not isinstance(forward, Sequence) else list(forward)
    for f in forwards:
        if not callable(f):
            raise UserError(
                "forward must be a function that two_pass calls in each pass, such as lambda: loss_fn(model(x), y), "
                f"got {type(f).__name__}"
            )
    return [partial(_call_loss, f) for f in forwards]


def _call_loss(forward: Callable[[], object]) -> Tensor:
    loss = forward()
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise UserError(f"forward must return the mean loss and nothing else, a tensor of one element, got {got}")


def raise_no_gradient(sam: SAM) -> NoReturn:
    """Raise the error for a loss without a gradient for any perturbed parameter."""
    if sam.model is not None:
        refuse_fsdp1(sam.model.parameters())
    raise UserError(
        f"the loss depends on no parameter that {sam.scope} perturbs: return it with its graph attached (a closure "
        "clears the gradients, then runs backward), and create the optimizer after the model's last change"
    )


@contextmanager
def explained_errors(sam: SAM) -> Iterator[None]:
    """Around a step: raise PyTorch's errors that a wrong `forward` causes as UserError."""
    distributed = dist.is_available() and dist.is_initialized()
    try:
        with _refuse_static_graph(sam) if distributed else nullcontext():
            yield
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise UserError(REENTRANT.format("layers")) from error
        if "backward through the graph a second time" in str(error):
            raise UserError(
                "forward must not run backward, which two_pass does itself (step(closure) takes a closure that does), "
                "nor use a graph that was built outside of it"
            ) from error
        raise


def explain_missing_gradients(
    sam: SAM, named: Named, grads: Grads, loss: Tensor, forward: Callable[[], object]
) -> None:
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

    def record_lost(module: nn.Module, args: object) -> None:
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
def _refuse_static_graph(sam: SAM) -> Iterator[None]:
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
