"""Argument checks of `two_pass`, and clear messages for PyTorch's errors that a wrong `forward` causes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from samon.errors import UserError
from samon.sam import SAM, sam_of
from samon.scope import refuse_fsdp1

if TYPE_CHECKING:
    from samon.two_pass import StepOptions

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by their size in bytes
_checked_weights: WeakSet[SAM] = WeakSet()
REENTRANT = (
    "torch.utils.checkpoint(use_reentrant=True) hides {} from the ascent pass, which differentiates with respect to "
    "the perturbed parameters only; pass use_reentrant=False (timm: timm.layers.set_reentrant_ckpt(False))"
)


def require_sam(optimizer: object) -> SAM:
    """The SAM optimizer inside `optimizer`."""
    if (sam := sam_of(optimizer)) is None:
        raise UserError(
            f"two_pass needs one of samon's optimizers, got {type(optimizer).__name__}; create one with "
            "timm.optim.create_optimizer_v2(model, 'samon-layerl2', ...)"
        )
    if sam is not optimizer and "rho" in vars(optimizer):
        raise UserError(f"{type(optimizer).__name__} keeps rho to itself; set samon.sam_of(optimizer).rho instead")
    return sam


def check_options(sam: SAM, options: "StepOptions") -> None:
    """Raise UserError for arguments of `two_pass` that are wrong, or exclude each other or the optimizer."""
    groups, reduce, bn_stats = options.groups, options.reduce, options.bn_stats
    if torch.is_inference_mode_enabled():
        raise UserError("two_pass cannot run under torch.inference_mode(); call it outside")
    if not options.num_forwards:
        raise UserError("forward is an empty sequence; pass one function, or one per micro-batch")
    if reduce not in ("device", "global"):
        raise UserError(f"reduce must be 'device' or 'global', got {reduce!r}")
    if bn_stats not in ("first", "second", "both"):
        raise UserError(f"bn_stats must be 'first', 'second' or 'both', got {bn_stats!r}")
    if groups < 1:
        raise UserError(f"groups must be at least 1, got {groups}")
    if groups > 1 and (reduce == "global" or options.num_forwards > 1 or options.partial_ascent):
        raise UserError(
            f"groups={groups} gives each sub-batch its own perturbation, so it does not combine with reduce='global', "
            "several forwards or ascent_forward, where sub-batches share one"
        )
    if sam.ascent.single_pass and (groups > 1 or reduce == "global" or options.partial_ascent):
        raise UserError(
            f"ascent={sam.ascent.name!r} makes no ascent pass; drop groups and reduce='global' (--m-sharpness), and "
            "ascent_forward (--ascent-fraction, --ascent-size)"
        )
    if options.num_forwards > 1 and options.partial_ascent:
        raise UserError("ascent_forward requires a single forward")
    if (bn_stats != "first" or options.partial_ascent) and sam.model is None:
        argument = "ascent_forward" if options.partial_ascent else f"bn_stats={bn_stats!r}"
        raise UserError(f"{argument} must know the BatchNorm layers; create the optimizer from the model")


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
    refused: AbstractContextManager[None] = nullcontext()
    if dist.is_initialized():
        from samon.engines.diagnostics import refuse_static_graph

        refused = refuse_static_graph(sam)
    try:
        with refused:
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


@contextmanager
def refuse_weight_changes(sam: SAM, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Around the descent pass of the first step: raise UserError if it changes values of parameters. The ascent pass
    has then changed them too, and the perturbed ones are restored. Not around the ascent pass, in which layers may
    initialize parameters from the first batch."""
    before = {} if sam in _checked_weights else _checksums(modules)
    yield
    if not before:
        return
    after = _checksums(modules)
    if changed := [name for name, old in before.items() if after.get(name, old) != old]:
        raise UserError(
            f"a pass of the model changes {changed[0][1]}, and the other pass would change it again; update momentum "
            "encoders, clip weights and run optimizers after the step, not in forward or in hooks"
        )
    _checked_weights.add(sam)


@torch.no_grad()
def _checksums(modules: Iterable[nn.Module]) -> dict[tuple[int, str], int]:
    """The sum of the bits of each dense parameter, read on the host. Embeddings with `max_norm` are left out: they
    change theirs, but equally in every pass."""
    return {
        (id(m), f"{type(m).__name__}.{name}"): int(p.view(BITS[p.itemsize]).sum())
        for m in modules
        for name, p in (m._parameters.items() if not hasattr(m, "max_norm") else ())
        if type(p) is Parameter and p.layout == torch.strided and p.itemsize in BITS and not p.is_meta
    }
