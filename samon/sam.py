"""The sharpness-aware optimizer: a shell around any base optimizer that knows how to perturb the weights."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from timm.optim import Lookahead
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

from samon.engines.ascent import Ascent
from samon.engines.closure import run_passes
from samon.engines.masks import Mask
from samon.engines.norm_stats import modules_of
from samon.engines.perturb import CAPTURING, Arithmetic, Parts
from samon.engines.sharded_tensors import local, refuse_flat, refuse_sharded, whole_norms
from samon.errors import UserError, refuse
from samon.geometry import GEOMETRIES, HALF, Norms, global_norm, radius, widened
from samon.scope import SCOPES, Selection, select, select_bare

# What a copy takes along.
STATE = {"base", "selection", "rho", "eta", "geometry", "mask", "ascent", "esam_beta", "defaults", "distributed"}
Grads = Sequence[Tensor | None]  # in the order of `perturbed_parameters`


def _of_base(name: str) -> property:
    return property(lambda sam: getattr(sam.base, name), lambda sam, value: setattr(sam.base, name, value))


class SAM(Optimizer):
    """Sharpness-aware minimization over a selection of parameters (Eqs. 2 to 5).

    The base optimizer applies the gradient; this one shares its `param_groups`, `state` and `defaults`, so schedulers,
    gradient scalers, checkpoints and Lookahead see a plain optimizer. `samon.two_pass` is the fast way to fill `.grad`
    with the gradient at w + eps; `step(closure)` does the same for any trainer that passes a standard closure.

    Args:
        base: optimizer over all trained parameters.
        selection: the parameters to perturb.
        geometry: row of Table 9; `rho` radius of its ball; `eta` its constant (the row's own by default).
        mask: sparse perturbation of section 5.1.
        ascent: where the direction of the perturbation comes from, and what is made of the final gradient.
        esam_beta: each update perturbs every tensor with this probability and scales the perturbation by its inverse:
            the stochastic weight perturbation of ESAM (Du et al. 2022, Eq. 6). The draw depends on the number of the
            update alone, so it is the same on all processes and after a restart.

    Attributes:
        stats: of the last step, as 0-dim tensors on the device: loss, loss_perturbed, ascent_grad_norm, and eps_norm,
            the length of the perturbation that the weights took (the mean over groups). With half-precision weights
            also eps_lost: the length of what rounding kept from them, as a share of the intended one.

    Raises:
        UserError: rho or eta is not a finite number >= 0, the base optimizer needs second derivatives or a closure, or
            esam_beta is not in (0, 1] or combined with a mask, another ascent or gsam_alpha.
    """

    def __init__(
        self,
        base: Optimizer,
        selection: Selection,
        *,
        rho: float,
        geometry: str = "",
        eta: float | None = None,
        mask: Mask | None = None,
        ascent: Ascent | None = None,
        esam_beta: float = 1.0,
    ):
        if isinstance(base, SAM | Lookahead):
            name = f"lookahead_{selection.scope}"
            raise UserError(f"{type(base).__name__} cannot be the base optimizer; Lookahead goes around it: use {name}")
        closure = inspect.signature(base.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise UserError(
                f"{type(base).__name__} evaluates the loss several times in its step, which two passes do not cover; "
                "choose a base optimizer that applies a gradient, such as adamw"
            )
        ascent = ascent or Ascent()
        mistakes = {
            f"{type(base).__name__} needs second derivatives, which neither pass computes; choose a first-order base "
            "optimizer such as adamw": getattr(base, "is_second_order", False),
            f"esam_beta must be in (0, 1], got {esam_beta}; 1 perturbs every tensor": not 0 < esam_beta <= 1,
            "esam_beta draws other tensors at every update and combines with ascent='batch' alone": (
                esam_beta < 1 and (mask is not None or ascent.kind != "batch" or ascent.gsam_alpha)
            ),
        }
        refuse(mistakes)
        self.base, self.geometry, self.mask, self.ascent, self.esam_beta = base, geometry, mask, ascent, esam_beta
        self.rho, self.eta = radius("rho", rho), radius("eta", GEOMETRIES[geometry].eta if eta is None else eta)
        trained = {id(p) for group in base.param_groups for p in group["params"]}
        selection.parameters = {n: p for n, p in selection.parameters.items() if id(p) in trained}
        self.selection, self.defaults = selection, base.defaults
        self._start()

    def _start(self) -> None:
        """What a new instance and a copy begin with. `Optimizer.__init__` would empty the base's state and groups."""
        super().__setstate__({})
        vars(self).update({name: hooks for name, hooks in vars(self.base).items() if "state_dict" in name})
        self.stats: dict[str, Tensor] = {}
        self.plan: Any = None  # the replay plan that samon.step keeps between steps
        self.grouped: list[Any] = []  # the layers of m-sharpness that samon.step keeps between steps
        self.found: set[torch.nn.Module] | None = None  # without a model: the modules that ran in the first step
        self.replicas_ran: list[bool] = []  # not empty: samon.step has seen how DistributedDataParallel was made
        self.unused: set[int] = set()  # ids of perturbed parameters found to be in no loss, and rightly so
        self.arithmetic, self.captured = Arithmetic(), False
        self._rounding_checked = self._warned = self._plain = False
        self._drawn: dict[str, Parameter] | None = None  # inside a step

    # -- one set of groups and one state with the base ---------------------------------------------------------------
    param_groups: Any = _of_base("param_groups")
    state: Any = _of_base("state")

    @property
    def scope(self) -> str:
        return self.selection.scope

    @property
    def model(self) -> torch.nn.Module | None:
        return self.selection.model

    @cached_property
    def distributed(self) -> bool:
        """Whether processes share parameters out among them (FSDP), perturbed ones or others."""
        return any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"])

    @property
    def can_group(self) -> bool:
        """Whether each group of a batch can carry a perturbation of its own (`groups` of `samon.two_pass`)."""
        return SCOPES[self.scope].norms_only and self.model is not None and self.mask is None

    def __repr__(self) -> str:
        eta = f", eta={self.eta:g}" if self.eta else ""
        ascent = "" if self.ascent.source == "batch" else f", ascent={self.ascent.source}"
        about = f"{self.scope}, geometry={self.geometry or 'l2'}, rho={self.rho:g}{eta}{ascent}"
        return f"SAM({about}, {len(self.selection.parameters)} tensors perturbed)\n{self.base!r}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the group to the base; those of its parameters that fall into the scope are perturbed from now on."""
        self.base.add_param_group(param_group)
        old, added = self.selection, {id(p) for p in self.base.param_groups[-1]["params"]}
        again = partial(select_bare, self.base.param_groups) if old.model is None else partial(select, old.model)
        found = again(old.scope, old.perturb)
        known = {id(p) for p in old.parameters.values()}
        if new := {n: p for n, p in found.parameters.items() if id(p) in added - known}:
            old.parameters |= new

    def compile(self, backend: Any = "inductor", mode: str | None = None) -> None:
        """Beside a model compiled like this: the arithmetic of the perturbation in compiled functions too. Where the
        mode captures CUDA graphs (reduce-overhead, max-autotune), `samon.two_pass` copies what outlives a pass out of
        their memory. A copy of this optimizer is not compiled.

        Raises:
            UserError: esam_beta below 1.
        """
        if self.esam_beta < 1:
            raise UserError(
                "esam_beta (--esam-beta) perturbs other tensors at every update, for which a compiled model would be "
                "compiled anew each time; drop it or --torchcompile"
            )
        self.arithmetic, self.captured = Arithmetic(backend), mode in CAPTURING

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's own state, which it can load alone, with that of the ascent and the mask beside it."""
        state = self.base.state_dict()
        if self.ascent.source != "batch" or self.esam_beta < 1:
            state["ascent"] = self.ascent.state_dict()
        return state if self.mask is None else {**state, "mask": self.mask.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state written by this class or by the base optimizer alone."""
        self.base.load_state_dict(state_dict)
        if self.mask is not None and "mask" in state_dict:
            self.mask.load_state_dict(state_dict["mask"], self.perturbed_weights())
        if "ascent" in state_dict:
            device = next(iter(self.selection.parameters.values())).device  # of frozen ones too
            self.ascent.load_state_dict(state_dict["ascent"], device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; outside a step this also ends an update that was skipped."""
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self) -> None:
        """Discard what a skipped update has recorded."""
        if self._drawn is None:  # a closure that clears the gradients is a part of the update
            self.ascent.clean, self.ascent.used = [], False
        if self.mask is not None:
            self.mask.stale = True

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k in STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    # -- modules -----------------------------------------------------------------------------------------------------
    def modules(self) -> list[torch.nn.Module]:
        """All modules of the model, or those that ran in the first step where the optimizer was made without one."""
        return list(self.found or ()) if self.model is None else list(modules_of(self.model))

    def others(self) -> list[Parameter]:
        """The model's trainable parameters that another optimizer may hold."""
        own = {id(p) for group in self.param_groups for p in group["params"]}
        found = {id(p): p for m in self.modules() for p in m._parameters.values() if p is not None and p.requires_grad}
        return [p for key, p in found.items() if key not in own]

    @contextmanager
    def finding_modules(self) -> Iterator[None]:
        """Around a first pass: without a model, note in the first step which modules run (compiled ones eagerly)."""
        if self.model is not None or self.found is not None:
            yield
            return
        found = set[torch.nn.Module]()
        note = register_module_forward_pre_hook(lambda module, args: found.add(module))
        with note, torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile")  # of hooks, which see the wrapper too
            yield
        self.found = found or None  # a closure that does nothing is no first pass

    # -- perturbation ------------------------------------------------------------------------------------------------
    def perturbed_parameters(self) -> dict[str, Parameter]:
        """The perturbed parameters that are trainable now, by qualified name."""
        if self._drawn is not None:
            return self._drawn
        return {name: p for name, p in self.selection.parameters.items() if p.requires_grad}

    def perturbed_weights(self) -> list[Tensor]:
        """What this process holds of the perturbed parameters: all of them, or its parts where they are sharded."""
        return [local(p) for p in self.perturbed_parameters().values()]

    def whole_norms(self) -> Norms:
        return whole_norms(list(self.perturbed_parameters().values())) if self.distributed else None

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """A step: inside, `perturbed_parameters` stays what it is at the begin, and with `esam_beta` only this update's
        random part of it is perturbed, at least one tensor.

        Raises:
            UserError: there is none to perturb, or FSDP hides which part of one a process holds.
        """
        named = self.perturbed_parameters()
        if not named:
            raise UserError(f"all parameters that {self.scope} perturbs are frozen; unfreeze some")
        if all(p.grad is None for p in named.values()):  # cleared by the model or by Lookahead, not by `zero_grad`
            self._forget()
        if self.esam_beta < 1:
            chance = torch.rand(len(named), generator=torch.Generator().manual_seed(self.ascent.updates)).tolist()
            limit = max(self.esam_beta, min(chance, default=0) + 1e-12)
            named = {name: p for (name, p), number in zip(named.items(), chance, strict=True) if number < limit}
        refuse_flat(named.values())
        if self.distributed:
            refuse_sharded(named.values(), self.ascent, self.mask)
        self._drawn = named
        try:
            yield
        finally:
            self._drawn = None

    def is_weight(self) -> list[bool]:
        """For `eleml2orig`: which perturbed tensors are weights, by their own name as in the authors' code."""
        return [name.rpartition(".")[2] == "weight" for name in self.perturbed_parameters()]

    @torch.no_grad()
    def perturbation(self, grads: Grads, grouped: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
        """`(eps, ||T g||_2, finite)` for ascent gradients in the order of `perturbed_parameters`; a missing gradient
        counts as zero, and a non-finite one anywhere makes eps zero and `finite` (bool, []) false. With `grouped` the
        gradients have a leading dimension [G], and so has everything else."""
        weights = self.perturbed_weights()
        if len(devices := {str(w.device) for w in weights}) > 1:
            raise UserError(
                f"the perturbed parameters are on {' and '.join(sorted(devices))}, but a perturbation needs all of "
                "them on one device; move the model to one, or let perturb=... choose parameters of one"
            )
        pairs = zip(weights, grads, strict=True)
        dense = widened([torch.zeros_like(w) if g is None else local(g) for w, g in pairs])
        dense = dense if self.mask is None else self.mask(dense)
        is_weight = self.is_weight() if GEOMETRIES[self.geometry].by_kind else []
        settings = (self.rho, self.eta, is_weight, grouped, self.esam_beta, self.whole_norms())
        eps, norm, finite = self.arithmetic.perturbation(self.geometry, weights, dense, *settings)
        return Parts(eps[0], dense) if len(eps) == 1 else eps, norm, finite

    def displacement(self, grads: Grads | None, grouped: bool = False) -> tuple[list[Tensor] | None, Tensor | None]:
        """`(eps, whether the gradients are finite)` along what the ascent makes of gradients at w or, without any, has
        kept; `(None, None)` for a step at w."""
        ascent, named = self.ascent, self.perturbed_parameters()
        ascent.used = True
        direction = ascent.stored(named, self.state) if grads is None else ascent.direction(named, grads)
        if direction is None:
            self.stats = {}
            return None, None
        eps, norm, finite = self.perturbation(direction, grouped)
        self.stats = {"ascent_grad_norm": norm.mean() if grouped else norm}
        return eps, finite.all() if grouped else finite

    @contextmanager
    def perturbed(self, grads: Mapping[str, Tensor | None] | Grads) -> Iterator[None]:
        """w + eps inside, w bit-exactly outside, also after an exception.

        Args:
            grads: ascent gradients by qualified name, or in the order of `perturbed_parameters`.
        """
        if not isinstance(grads, Mapping):
            grads = dict(zip(self.perturbed_parameters(), grads, strict=True))
        with self.drawn():
            self.ascent.used = True
            eps, _, _ = self.perturbation([grads.get(name) for name in self.perturbed_parameters()])
            with self.moved(eps), torch.enable_grad():
                yield

    @contextmanager
    def moved(self, eps: Sequence[Tensor]) -> Iterator[None]:
        """w + eps inside, w outside: the saved values are copied back, since (w + eps) - eps is not w."""
        weights = self.perturbed_weights()
        half = any(w.dtype in HALF for w in weights)
        saved = self.arithmetic.shift(weights, list(eps))
        torch.clear_autocast_cache()  # of an autocast context around the step: half-precision copies of other weights
        try:
            with torch.no_grad():
                triples = zip(weights, saved, eps, strict=True)
                took = [n.float() - o.float() if n.dtype in HALF else e for n, o, e in triples] if half else eps
                self.measure(eps, took)
            yield
        finally:
            self.arithmetic.restore(weights, saved)
            torch.clear_autocast_cache()

    @torch.no_grad()
    def measure(self, eps: Sequence[Tensor], applied: Sequence[Tensor], grouped: bool = False) -> None:
        """Into the step's `stats` the size of the perturbation: intended, and as the weights really took it."""
        norms = self.whole_norms()
        vectors = [applied.flat] if isinstance(applied, Parts) and norms is None else applied
        self.stats["eps_norm"] = global_norm(vectors, grouped=grouped, whole=norms).mean()
        if not any(p.dtype in HALF for p in self.perturbed_parameters().values()):
            return
        missed = global_norm([e - a for e, a in zip(eps, applied, strict=True)], whole=norms)
        lost = missed / global_norm(eps, whole=norms).clamp(min=torch.finfo(missed.dtype).tiny)
        self.stats["eps_lost"] = lost
        if self._rounding_checked or lost.is_meta or isinstance(lost, FakeTensor):
            return
        self._rounding_checked = True  # one read on the host, in the first step
        if lost.item() > 0.5:
            warnings.warn(
                f"rounding to half-precision weights loses {lost.item():.0%} of the perturbation (rho={self.rho}); "
                "keep float32 weights (--amp instead of --model-dtype) or raise rho",
                stacklevel=2,
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The base step with the gradients that are there; with a closure, first the two passes that fill them.

        Args:
            closure: the standard one (zero the gradients, forward, backward, return the loss). It runs twice; the
                second run, at w + eps, leaves the gradient and does not update BatchNorm statistics. Where `two_pass`
                has filled the gradients, a trainer may still pass a closure that computes none: it runs once.

        Returns:
            The loss at w, or None without a closure.

        Raises:
            UserError: the closure computes no gradients, or there are some, not zero, that it does not clear.
        """
        loss = None
        if closure is None:
            self._expect_perturbed()
        else:
            filled, self._plain = self.ascent.used or self._plain, False
            with self.drawn():
                loss = run_passes(self, torch.enable_grad()(closure), filled)
        self.ascent.update(self.perturbed_parameters, self.state)
        if self.mask is not None:
            self.mask.advance()
        result = self.base.step()
        torch.clear_autocast_cache()
        return result if closure is None else loss

    def plainly(self) -> None:
        """The next step is a plain one on purpose: no warning that nothing was perturbed."""
        if (sam := sam_of(self)) is not None:  # the one inside where Lightning or Fabric lend their wrapper this method
            sam._plain, sam.ascent.used = True, False  # an update that was skipped may have left it

    def _expect_perturbed(self) -> None:
        """Without two passes before it, a step is silently the base optimizer's, bit for bit."""
        if not (self.ascent.used or self._plain or self._warned):
            self._warned = True
            warnings.warn(
                "this step's gradient was taken at w, so nothing is sharpness-aware about it; call "
                "samon.two_pass(optimizer, forward) instead of loss.backward(), or optimizer.step(closure)",
                stacklevel=4,
            )
        self._plain = False


def sam_of(optimizer: Any) -> SAM | None:
    """The SAM optimizer inside `optimizer` (itself, or inside wrappers: timm's Lookahead, Accelerate's, Lightning's and
    Fabric's optimizers); None where there is none."""
    # The last two imitate the class of what they wrap, attributes included, so `vars` tells them from it.
    names = ("_optimizer", "optimizer", "_base_optimizer")
    while inner := next((vars(optimizer)[name] for name in names if name in getattr(optimizer, "__dict__", {})), None):
        optimizer = inner
    return optimizer if isinstance(optimizer, SAM) else None
