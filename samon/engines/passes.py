"""What both passes of a step need: freezing, other forwards for a while, gradients that are missing for a reason."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from samon import rng
from samon.engines.closure import raise_no_gradient
from samon.engines.norm_stats import kept
from samon.errors import UserError
from samon.sam import SAM

REENTRANT = (
    "torch.utils.checkpoint(use_reentrant=True) hides {} from the ascent pass, which differentiates with respect to "
    "the perturbed parameters only; pass use_reentrant=False (timm: timm.layers.set_reentrant_ckpt(False))"
)


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


def unperturbed(sam: SAM, modules: Iterable[nn.Module]) -> list[Parameter]:
    """All parameters that are not perturbed; `modules` are all of the model's."""
    perturbed = {id(p) for p in sam.perturbed_parameters().values()}
    found = {id(p): p for group in sam.param_groups for p in group["params"]}
    for module in modules:
        if module._parameters:
            found |= {id(p): p for p in module._parameters.values() if p is not None}
    return [p for key, p in found.items() if key not in perturbed]


@contextmanager
def changed(attributes: Mapping[Any, Mapping[str, Any]]) -> Iterator[None]:
    """The objects have these attributes inside, and afterwards the ones of their own that these hid, if any."""
    before = {item: {n: vars(item)[n] for n in values if n in vars(item)} for item, values in attributes.items()}
    for item, values in attributes.items():
        vars(item).update(values)
    try:
        yield
    finally:
        for item, own in before.items():
            for name in attributes[item].keys() - own.keys():
                del vars(item)[name]
            vars(item).update(own)


@contextmanager
def swapped_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """The modules run these instead of their own `forward` inside; their hooks run as ever.

    A compiled model runs eagerly inside: its graphs were made of the modules' own forwards.
    """
    with changed({m: {"forward": f} for m, f in forwards.items()}), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def watched(modules: Iterable[nn.Module], start: Callable, end: Callable | None = None) -> Iterator[None]:
    """The hooks see these modules run inside; compiled ones run eagerly, for compiled graphs call none."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_pre_hook(start))
            if end is not None:
                stack.enter_context(module.register_forward_hook(end))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


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


def gradients(loss: Tensor, inputs: Sequence[Tensor], scaler: Any = None) -> list[Tensor | None]:
    """Unscaled gradients of the loss, None where it does not depend on an input.

    Raises:
        UserError: reentrant checkpointing lies between the loss and the inputs.
    """
    if not loss.requires_grad:
        return [None] * len(inputs)
    scaled = loss if scaler is None else scaler.scale(loss)
    try:
        found = torch.autograd.grad(scaled, list(inputs), allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise UserError(REENTRANT.format("layers")) from error
        raise
    grads = [g.to_dense() if g is not None and g.is_sparse else g for g in found]
    if scaler is not None:
        torch._foreach_div_([g for g in grads if g is not None], scaler.scale(torch.ones((), device=loss.device)))
    return list(grads)


def explain_missing(sam: SAM, grads: Sequence[Tensor | None], loss: Tensor, forward: Callable[[], Any]) -> None:
    """Tell perturbed parameters that the loss does not use from those whose gradient got lost on the way.

    The owner of a lost one runs with gradients disabled. To see it, the forward runs once more, without a trace, the
    first time that a parameter's gradient is missing; no other step pays for it.

    Raises:
        UserError: a gradient got lost, or the loss depends on nothing that is perturbed.
    """
    missing = {id(p): n for (n, p), g in zip(sam.perturbed_parameters().items(), grads, strict=True) if g is None}
    unrelated = not loss.requires_grad or (len(missing) == len(grads) and sam.esam_beta == 1)
    if not unrelated and missing.keys() <= sam.unused:
        return
    lost: list[str] = []

    def look(module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():
            lost.extend(missing[id(p)] for p in module.parameters(recurse=False) if id(p) in missing)

    everywhere = register_module_forward_pre_hook(look) if sam.model is None else watched(sam.model.modules(), look)
    with kept(sam.modules()), rng.kept(loss.device), everywhere:
        forward()
    if lost:
        raise UserError(REENTRANT.format(lost[0]) + "; what runs under torch.no_grad() on purpose: freeze it")
    if unrelated:
        raise_no_gradient(sam)
    sam.unused |= missing.keys()


def losses_of(forward: Any) -> list[Callable[[], Tensor]]:
    """Each of the forwards, checked to return a loss.

    Raises:
        UserError: what is given, or later returned, is something else.
    """
    forwards = [forward] if callable(forward) or not isinstance(forward, Sequence) else list(forward)
    if wrong := [f for f in forwards if not callable(f)]:
        raise UserError(
            "forward must be a function that two_pass calls in each pass, such as lambda: loss_fn(model(x), y), got "
            + type(wrong[0]).__name__
        )
    return [partial(_loss, f) for f in forwards]


def _loss(forward: Callable[[], Any]) -> Tensor:
    loss = forward()
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise UserError(f"forward must return the mean loss and nothing else, a tensor of one element, got {got}")


@contextmanager
def backward_errors() -> Iterator[None]:
    """Raises:
    UserError: in place of PyTorch's error where a graph has been used up.
    """
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise UserError(
            "forward must not run backward, which two_pass does itself (step(closure) takes a closure that does), nor "
            "use a graph that was built outside of it"
        ) from error


@contextmanager
def refuse_static_graph(ran: list[bool]) -> Iterator[None]:
    """No DistributedDataParallel that runs inside may have `static_graph`, which takes for granted that every backward
    is the same one; the ascent pass is another. The class is patched since global hooks make compiled models compile
    anew, and nothing but the user's forward knows the wrapped model. The first one that runs is noted in `ran`."""
    plain = DistributedDataParallel.forward

    def forward(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
        if self.static_graph:
            raise UserError(
                "two_pass runs two different backward passes, which DistributedDataParallel(static_graph=True) does "
                "not allow; drop static_graph"
            )
        ran.append(True)
        return plain(self, *args, **kwargs)

    DistributedDataParallel.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        DistributedDataParallel.forward = plain  # type: ignore[method-assign]
