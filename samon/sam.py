"""SAM: a base optimizer, the parameters to perturb, and how far (Eqs. 2 to 5)."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from timm.optim import Lookahead
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from samon import contexts, geometry
from samon.errors import UserError
from samon.geometry import (
    GEOMETRIES,
    LOW_PRECISION,
    FlatTensors,
    NormReduction,
    global_norm,
    to_float32,
    validate_radius,
    validate_radius_rule,
)
from samon.scope import SCOPES, Named, Selection, refuse_fsdp1, select, select_bare

if TYPE_CHECKING:
    from samon.engines.closure import ManualPasses
    from samon.engines.masks import Mask

Grads = Sequence[Tensor | None]  # in the order of the perturbed parameters
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile
COPIED = {"base", "selection", "rho", "eta", "radius", "geometry", "mask", "ascent", "defaults", "sharded"}
COPIED |= {"replacement"}


class AscentSource:
    """Where the direction of the perturbation comes from. This one is SAM (Eq. 3): g, this batch's gradient at w.

    h below is the gradient at w + eps as it is applied: averaged over micro-batches and processes, unscaled, clipped.
    Subclasses are in `samon.engines.ascent`.

    Attributes:
        name: its value of `ascent=`; `former_name` is found in older checkpoints.
        single_pass: no update makes an ascent pass.
        needs_clean_grad: g is used when the optimizer steps.
        uses_final_gradient: what is applied or kept depends on h of the perturbed parameters.
        has_state: tensors are carried from update to update.
        counts_updates: what comes next depends on the number of updates.
        keep_probability: fraction of the tensors that an update perturbs.
        updates: two-pass updates applied.
        used: the current update has been perturbed (or would have been, by a step at w).
    """

    name = former_name = "batch"
    single_pass = needs_clean_grad = uses_final_gradient = has_state = counts_updates = False
    keep_probability = 1.0

    def __init__(self) -> None:
        self.updates, self.used = 0, False
        self.clean: list[Tensor] = []  # g of the current update
        self.state: dict[str, Tensor] = {}  # by parameter name
        self.moments: list[Tensor] = []
        self.total: int | None = None  # updates of the whole training, if known

    def needs_ascent_pass(self) -> bool:
        """Whether the current update takes the gradient at w first."""
        return not self.single_pass

    def sample(self, named: Named) -> Named:
        """The parameters that the current update perturbs."""
        return named

    def direction(self, named: Named, grads: Grads | None, base_state: Mapping[Parameter, Any]) -> Grads | None:
        """The direction from g, or without an ascent pass (None) from the state; None for a step at w."""
        return grads

    def accumulate_clean_grad(self, grads: Sequence[Tensor], weight: float) -> None:
        """Add a micro-batch's g, which counts for `weight` in the update's mean."""
        terms = [weight * to_float32(g) for g in grads]
        self.clean = [a + b for a, b in zip(self.clean, terms, strict=True)] if self.clean else terms

    def before_step(self, named: Named, base_state: Mapping[Parameter, Any]) -> None:
        """Change `.grad` if the method says so, and keep what the next update needs. `clean` is the mean over the
        update's samples on all processes, empty if no ascent pass was made."""

    def finish_update(self, sam: "SAM") -> None:
        """End the current update, just before the base optimizer's step."""
        if self.needs_clean_grad or self.has_state:
            if self.clean and dist.is_available() and dist.is_initialized():
                self.clean = all_reduce_mean(self.clean)
            self.before_step(sam.perturbed_parameters(), sam.state)
        self.updates += self.used
        self.discard_update()

    def discard_update(self) -> None:
        """Forget an update that is not applied."""
        self.used, self.clean = False, []

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.name, "updates": self.updates, "kept": dict(self.state), "moments": list(self.moments)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Load the state of the same source; that of another one is ignored."""
        if state["source"] in (self.name, self.former_name):
            self.updates = state["updates"]
            self.state = {name: tensor.to(device) for name, tensor in state["kept"].items()}
            self.moments = [tensor.to(device) for tensor in state["moments"]]


def _of_base(name: str) -> property:
    return property(lambda sam: getattr(sam.base, name), lambda sam, value: setattr(sam.base, name, value))


class SAM(Optimizer):
    """Sharpness-aware minimization over a selection of parameters.

    The base optimizer applies the gradient; SAM shares its `param_groups`, `state` and `defaults`, so schedulers,
    gradient scalers, checkpoints and Lookahead see a plain optimizer. `samon.two_pass` is the fast way to fill `.grad`
    with the gradient at w + eps; `step(closure)` does the same in any trainer that passes a standard closure.

    Args:
        base: optimizer over all trained parameters.
        selection: the parameters to perturb.
        geometry: row of Table 9, with radius `rho` and constant `eta` (default: the row's own). `rho` is a plain
            attribute, which a schedule may set.
        radius: what rho measures (`samon.geometry.radius_scale`): `ball`, `raw`, `loss`, or a number in (0, 1).
        mask: sparse perturbation (section 5.1).
        ascent: where the direction of the perturbation comes from.

    Attributes:
        stats: of the last step, 0-dim tensors on the device: loss, loss_perturbed, ascent_grad_norm, and eps_norm, the
            length of the applied perturbation (the mean over groups). With half-precision weights also eps_lost, the
            fraction of the perturbation lost to rounding.
        replacement: arguments of `replace_base` if it was called.

    Raises:
        UserError: an argument is out of range, or the base optimizer cannot be used.
    """

    replacement: dict[str, Any] | None = None

    def __init__(
        self,
        base: Optimizer,
        selection: Selection,
        *,
        rho: float,
        geometry: str = "",
        eta: float | None = None,
        radius: str | float = "ball",
        mask: "Mask | None" = None,
        ascent: AscentSource | None = None,
    ):
        check_base(base, "-".join(filter(None, (selection.scope, geometry))))
        self.base, self.geometry, self.mask, self.selection = base, geometry, mask, selection
        self.replace_ascent(ascent or AscentSource())
        self.rho = validate_radius("rho", rho)
        self.eta = validate_radius("eta", GEOMETRIES[geometry].eta if eta is None else eta)
        self.radius = validate_radius_rule(radius)
        trained = {id(p) for group in base.param_groups for p in group["params"]}
        selection.parameters = {
            n: p
            for n, p in selection.parameters.items()
            if id(p) in trained or (selection.perturb_frozen and not p.requires_grad)
        }
        self.defaults = base.defaults
        self._init_instance()

    def replace_ascent(self, ascent: AscentSource) -> None:
        """Change where the direction of the perturbation comes from.

        Raises:
            UserError: the source does not combine with the mask or the frozen parameters.
        """
        if self.mask is not None and ascent.keep_probability < 1:
            raise UserError("esam_beta samples other tensors at every update, so it does not combine with a mask")
        if self.selection.perturb_frozen and ascent.uses_final_gradient:
            raise UserError(
                "perturb_frozen excludes ascent sources that use the gradient at w + eps, which frozen parameters do "
                "not have; use ascent='batch' or 'fsam', without gsam_alpha"
            )
        self.ascent = ascent

    def replace_base(self, opt: str, lr_ratio: float = 1.0, **options: Any) -> int:
        """Hand over to another base optimizer, with the momentum that both have (`samon.engines.handover`).

        `state_dict` records the arguments, with which `load_state_dict` of a new optimizer does the same first.

        Args:
            opt: timm's name of it.
            lr_ratio: it steps at this multiple of the groups' learning rates, which stay the scheduler's.
            options: further arguments of timm's factory, plain values. Weight decay stays that of the groups.

        Returns:
            The number of tensors whose momentum was carried.

        Raises:
            UserError: an argument is wrong, or the optimizer is inside Lookahead.
        """
        from samon.engines.handover import carry_momentum, create_base

        base = create_base(self, opt, lr_ratio, options)
        carried = carry_momentum(self.base, base)
        self.base, self.defaults = base, base.defaults
        self.replacement = {"opt": opt.lower(), "lr_ratio": float(lr_ratio), "options": options}
        return carried

    @property
    def lr_ratio(self) -> float:
        """What multiplies the groups' learning rates in a step."""
        return 1.0 if self.replacement is None else self.replacement["lr_ratio"]

    def _init_instance(self) -> None:
        """Initialize a new instance or a copy. `Optimizer.__init__` would empty the base's state and groups."""
        super().__setstate__({})
        vars(self).update({name: hooks for name, hooks in vars(self.base).items() if "state_dict" in name})
        self.stats: dict[str, Tensor] = {}
        self.arithmetic = Arithmetic()
        self._manual: ManualPasses | None = None  # between first_step and second_step
        self._in_step = self._expect_plain = self._warned_plain = self._checked_rounding = False

    # -- one set of groups and one state with the base ---------------------------------------------------------------
    param_groups: Any = _of_base("param_groups")
    state: Any = _of_base("state")

    @property
    def scope(self) -> str:
        return self.selection.scope

    @property
    def model(self) -> Module | None:
        return self.selection.model

    @cached_property
    def sharded(self) -> bool:
        """Whether any parameter, perturbed or not, is sharded across processes (FSDP2)."""
        return any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"])

    @property
    def can_group(self) -> bool:
        """Whether each group of a batch can have its own perturbation (`groups` of `samon.two_pass`)."""
        return SCOPES[self.scope].norms_only and self.model is not None and self.mask is None

    def __repr__(self) -> str:
        eta = f", eta={self.eta:g}" if self.eta else ""
        ascent = "" if self.ascent.name == "batch" else f", ascent={self.ascent.name}"
        radius = "" if self.radius == "ball" else f", radius={self.radius}"
        settings = f"{self.scope}, geometry={self.geometry or 'l2'}, rho={self.rho:g}{eta}{radius}{ascent}"
        return f"SAM({settings}, {len(self.selection.parameters)} tensors perturbed)\n{self.base!r}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the group to the base; those of its parameters that are in the scope are perturbed from now on."""
        self.base.add_param_group(param_group)
        old, added = self.selection, {id(p) for p in self.base.param_groups[-1]["params"]}
        reselect = partial(select_bare, self.base.param_groups) if old.model is None else partial(select, old.model)
        known = {id(p) for p in old.parameters.values()}
        selected = reselect(old.scope, old.perturb).parameters
        old.parameters |= {n: p for n, p in selected.items() if id(p) in added - known}

    def compile(self, backend: Any = "inductor", mode: str | None = None) -> None:
        """Compile the arithmetic of the perturbation, for a model compiled with these arguments. In the modes that
        capture CUDA graphs (reduce-overhead, max-autotune), `samon.two_pass` copies what outlives a pass out of their
        memory. A copy of this optimizer is not compiled.

        Raises:
            UserError: the ascent source is ESAM.
        """
        if self.ascent.keep_probability < 1:
            raise UserError(
                "esam_beta (--esam-beta) perturbs other tensors at every update, for which a compiled model would be "
                "recompiled each time; drop it or --torchcompile"
            )
        compiled = partial(torch.compile, backend=backend)
        self.arithmetic = Arithmetic(
            compiled(geometry.perturbation),
            compiled(contexts.add_perturbation),
            compiled(contexts.restore_weights),
            cuda_graphs=mode in CUDA_GRAPH_MODES,
        )

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's own state, which it can load alone, plus that of the ascent source and the mask."""
        state = self.base.state_dict()
        if self.replacement is not None:
            state["replacement"] = self.replacement
        if self.ascent.has_state or self.ascent.counts_updates:
            state["ascent"] = self.ascent.state_dict()
        return state if self.mask is None else {**state, "mask": self.mask.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state written by this class or by the base optimizer alone.

        Raises:
            UserError: the state is that of another base optimizer, before or after `replace_base`.
        """
        stored, own = state_dict.get("replacement"), self.replacement
        if stored is not None and own is None:
            self.replace_base(stored["opt"], stored["lr_ratio"], **stored["options"])
        elif (stored and stored["opt"]) != (own and own["opt"]):
            what = f"after replace_base({stored['opt']!r})" if stored else "before replace_base"
            raise UserError(f"the state was saved {what}; create the optimizer anew to load it")
        self.base.load_state_dict(state_dict)
        if self.mask is not None and "mask" in state_dict:
            self.mask.load_state_dict(state_dict["mask"], _local(self.perturbed_parameters()))
        if "ascent" in state_dict:
            device = next(iter(self.selection.parameters.values())).device  # of frozen ones too
            self.ascent.load_state_dict(state_dict["ascent"], device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; outside a step this also ends an update that was skipped."""
        super().zero_grad(set_to_none)
        self._discard_update()

    def _discard_update(self) -> None:
        if not self._in_step:  # a closure that clears the gradients is a part of the update
            self.ascent.discard_update()
        if self.mask is not None:
            self.mask.stale = True

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k in COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._init_instance()

    # -- perturbation ------------------------------------------------------------------------------------------------
    def perturbed_parameters(self) -> dict[str, Parameter]:
        """The perturbed parameters by qualified name: those that are trainable now, or all with `perturb_frozen`."""
        return self.selection.current()

    @contextmanager
    def sampled_parameters(self) -> Iterator[Named]:
        """Around a step: the parameters that this update perturbs.

        Raises:
            UserError: all are frozen, or FSDP does not let them be perturbed.
        """
        if self._manual is not None:
            raise UserError("first_step() has moved the weights to w + eps; call second_step() before another step")
        named = self.perturbed_parameters()
        if not named:
            raise UserError(f"all parameters that {self.scope} perturbs are frozen; unfreeze some")
        trained = [p for p in named.values() if p.requires_grad] or [p for g in self.param_groups for p in g["params"]]
        if all(p.grad is None for p in trained):  # cleared by the model or by Lookahead, not by `zero_grad`
            self._discard_update()
        named = self.ascent.sample(named)
        refuse_fsdp1(named.values())
        if self.sharded:
            from samon.engines import fsdp

            fsdp.check_sharded_parameters(self, named)
        outer, self._in_step = self._in_step, True
        try:
            yield named
        finally:
            self._in_step = outer

    @torch.no_grad()
    def perturbation(self, named: Named, grads: Grads, grouped: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
        """The perturbation from ascent gradients in the order of `named` (Eq. 5): `(eps, ||T g||_2, finite)`.

        A missing gradient counts as zero. A non-finite one anywhere makes eps zero and `finite` (bool, []) false. If
        `grouped`, gradients and results have a leading dimension [G].
        """
        weights = _local(named)
        if len(devices := {str(w.device) for w in weights}) > 1:
            raise UserError(
                f"the perturbed parameters are on {' and '.join(sorted(devices))}, but a perturbation needs all of "
                "them on one device; move the model to one, or let perturb=... choose parameters of one"
            )
        pairs = zip(weights, grads, strict=True)
        dense = [to_float32(torch.zeros_like(w) if g is None else to_local(g)) for w, g in pairs]
        if self.mask is not None:
            dense = self.mask(dense)
        # For `eleml2orig`: weights by their own name, as in the authors' code.
        is_weight = [n.rpartition(".")[2] == "weight" for n in named] if GEOMETRIES[self.geometry].by_name else []
        settings = (self.rho, self.eta, is_weight, grouped, self.ascent.keep_probability)
        eps, norm, finite = self.arithmetic.perturbation(
            self.geometry, weights, dense, *settings, self.norm_reduction(named), self.radius
        )
        return FlatTensors(eps[0], dense) if len(eps) == 1 else eps, norm, finite

    def ascend(
        self, named: Named, grads: Grads | None, grouped: bool = False
    ) -> tuple[list[Tensor] | None, Tensor | None]:
        """The perturbation along the ascent source's direction: `(eps, finite)`, or `(None, None)` for a step at w.

        Args:
            grads: gradients at w in the order of `named`; None if the update makes no ascent pass.
        """
        self.ascent.used = True
        direction = self.ascent.direction(named, grads, self.state)
        if direction is None:
            self.stats = {}
            return None, None
        eps, norm, finite = self.perturbation(named, direction, grouped)
        self.stats = {"ascent_grad_norm": norm.mean() if grouped else norm}
        return eps, finite.all() if grouped else finite

    def norm_reduction(self, named: Named) -> NormReduction:
        """For `geometry.global_norm`: what completes norms of sharded parameters; None if none is sharded."""
        if not self.sharded:
            return None
        from samon.engines import fsdp

        return fsdp.norm_reduction(list(named.values()))

    @contextmanager
    def perturbed(self, grads: Mapping[str, Tensor | None] | Grads) -> Iterator[None]:
        """w + eps inside, w bit-exactly outside, also after an exception.

        Args:
            grads: ascent gradients by qualified name, or in the order of `perturbed_parameters`.
        """
        if not isinstance(grads, Mapping):
            grads = dict(zip(self.perturbed_parameters(), grads, strict=True))
        with self.sampled_parameters() as named:
            self.ascent.used = True
            eps, _, _ = self.perturbation(named, [grads.get(name) for name in named])
            with self.add_perturbation(named, eps), torch.enable_grad():
                yield

    @contextmanager
    def add_perturbation(self, named: Named, eps: Sequence[Tensor]) -> Iterator[None]:
        """w + eps inside, w outside: saved values are copied back, since (w + eps) - eps is not w."""
        weights = _local(named)
        saved = self.arithmetic.add(weights, list(eps))
        torch.clear_autocast_cache()  # an autocast context around the step caches half-precision copies of the weights
        try:
            with torch.no_grad():
                applied = eps
                if any(w.dtype in LOW_PRECISION for w in weights):
                    triples = zip(weights, saved, eps, strict=True)
                    applied = [w.float() - s.float() if w.dtype in LOW_PRECISION else e for w, s, e in triples]
                self.record_perturbation(named, eps, applied)
            yield
        finally:
            self.arithmetic.restore(weights, saved)
            torch.clear_autocast_cache()

    @torch.no_grad()
    def record_perturbation(
        self, named: Named, eps: Sequence[Tensor], applied: Sequence[Tensor], grouped: bool = False
    ) -> None:
        """Record in `stats` the length of the perturbation, as intended and as the weights took it."""
        reduce = self.norm_reduction(named)
        vectors = [applied.flat] if isinstance(applied, FlatTensors) and reduce is None else applied
        self.stats["eps_norm"] = global_norm(vectors, grouped=grouped, reduce=reduce).mean()
        if not any(p.dtype in LOW_PRECISION for p in named.values()):
            return
        lost = global_norm([e - a for e, a in zip(eps, applied, strict=True)], reduce=reduce)
        fraction = lost / global_norm(eps, reduce=reduce).clamp(min=torch.finfo(lost.dtype).tiny)
        self.stats["eps_lost"] = fraction
        if self._checked_rounding or fraction.is_meta or isinstance(fraction, FakeTensor):
            return
        self._checked_rounding = True  # one read on the host, in the first step
        if fraction.item() > 0.5:
            warnings.warn(
                f"rounding to half-precision weights loses {fraction.item():.0%} of the perturbation (rho={self.rho}); "
                "keep float32 weights (--amp instead of --model-dtype) or raise rho",
                stacklevel=2,
            )

    # -- the step ----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The base step with the current gradients; with a closure, first the two passes that compute them.

        Args:
            closure: the standard one (zero the gradients, forward, backward, return the loss). It runs twice; the
                second run, at w + eps, leaves the gradient and does not update BatchNorm statistics. After `two_pass`
                has filled the gradients, a trainer may still pass a closure that computes none: it runs once.

        Returns:
            The loss at w, or None without a closure.

        Raises:
            UserError: the closure computes no gradients, or does not clear old ones that are not zero.
        """
        loss = None
        if self._manual is not None:
            raise UserError("first_step() has moved the weights to w + eps; call second_step() instead of step()")
        if closure is None:
            self._warn_if_plain()
        else:
            from samon.engines.closure import run_closure

            filled, self._expect_plain = self.ascent.used or self._expect_plain, False
            with self.sampled_parameters() as named:
                loss = run_closure(self, named, torch.enable_grad()(closure), filled)
        result = self._apply_gradients()
        return result if closure is None else loss

    def _apply_gradients(self) -> Any:
        self.ascent.finish_update(self)
        if self.mask is not None:
            self.mask.advance()
        with contexts.scaled_learning_rates(self.param_groups, self.lr_ratio):
            result = self.base.step()
        torch.clear_autocast_cache()
        return result

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the weights to w + eps along the gradients at w: the protocol of davda54/sam. Compute the gradients
        there, then call `second_step`. Buffers such as BatchNorm statistics are updated by the first pass only.

        Args:
            zero_grad: clear the gradients, which the second backward must not add to.
        """
        from samon.engines.closure import ManualPasses

        self._manual = ManualPasses(self)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights, and apply the gradients at w + eps there.

        Args:
            zero_grad: clear the gradients at the end.

        Raises:
            UserError: `first_step` was not called, or its gradients were not cleared.
        """
        if self._manual is None:
            raise UserError("second_step() needs first_step() before it")
        passes, self._manual = self._manual, None
        passes.finish()
        self._apply_gradients()
        if zero_grad:
            self.zero_grad()

    def expect_plain_step(self) -> None:
        """Say that the next step is a plain one on purpose: no warning that nothing was perturbed."""
        if (sam := sam_of(self)) is not None:  # Lightning and Fabric give their wrappers this method
            sam._expect_plain, sam.ascent.used = True, False  # a skipped update may have left `used` set

    def _warn_if_plain(self) -> None:
        """Without two passes before it, a step is silently the base optimizer's, bit for bit."""
        if not (self.ascent.used or self._expect_plain or self._warned_plain):
            self._warned_plain = True
            warnings.warn(
                "this step's gradient was taken at w, so nothing is sharpness-aware about it; call "
                "samon.two_pass(optimizer, forward) instead of loss.backward(), or optimizer.step(closure)",
                stacklevel=4,
            )
        self._expect_plain = False


@dataclass
class Arithmetic:
    """The functions of tensors in a step, eager or compiled.

    Attributes:
        cuda_graphs: the model's graphs are captured as CUDA graphs, whose outputs the next run overwrites.
    """

    perturbation: Callable[..., tuple[list[Tensor], Tensor, Tensor]] = geometry.perturbation
    add: Callable[[list[Tensor], list[Tensor]], list[Tensor]] = contexts.add_perturbation
    restore: Callable[[list[Tensor], list[Tensor]], None] = contexts.restore_weights
    cuda_graphs: bool = False


def sam_of(optimizer: Any) -> SAM | None:
    """The SAM optimizer inside `optimizer`: itself, or inside timm's Lookahead, Accelerate's, Lightning's and Fabric's
    wrappers. None if there is none."""
    # The last two imitate the class of what they wrap, including its attributes; only `vars` distinguishes them.
    names = ("_optimizer", "optimizer", "_base_optimizer")
    while inner := next((vars(optimizer)[name] for name in names if name in getattr(optimizer, "__dict__", {})), None):
        optimizer = inner
    return optimizer if isinstance(optimizer, SAM) else None


def all_reduce_mean(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The tensors averaged over the processes, in one message."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def check_base(base: Optimizer, opt: str) -> None:
    """Raises:
    UserError: two passes, with the optimizer name `opt`, do not work with this base optimizer.
    """
    name = type(base).__name__
    if isinstance(base, SAM | Lookahead):
        raise UserError(f"{name} cannot be the base optimizer; Lookahead goes around it: use lookahead_{opt}")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(
            f"{name} evaluates the loss several times in its step, which two passes do not cover; choose a base "
            "optimizer that applies a gradient, such as adamw"
        )
    if getattr(base, "is_second_order", False):
        raise UserError(
            f"{name} needs second derivatives, which neither pass computes; choose a first-order base optimizer such "
            "as adamw"
        )


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor, sharing its memory; any other tensor unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def _local(named: Named) -> list[Tensor]:
    return [to_local(p) for p in named.values()]
