"""SAM: an optimizer that holds a base optimizer, the parameters to perturb, and how far (Eqs. 2 to 5)."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from samon import contexts, geometry
from samon.ascent import AscentSource, Grads
from samon.errors import UserError
from samon.geometry import GEOMETRIES, FlatTensors, NormReduction, Tensors, validate_nonnegative, validate_radius_rule
from samon.scope import SCOPES, NamedParameters, Selection, refuse_fsdp1, select, select_bare
from samon.wrapper import OptimizerWrapper

if TYPE_CHECKING:
    from samon.engines.masks import Mask

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # modes of torch.compile
# Attribute set on gradients: their version counter, which in-place writes advance, when the last passes ended.
LAST_VERSION = "_samon_last_step"
# Attributes that copies and pickles contain. Compiled functions, `stats` and an open `first_step` are left out.
PICKLED = {"base", "name", "replacement", "selection", "rho", "eta", "radius", "geometry", "mask", "ascent"}


class SAM(OptimizerWrapper):
    """Sharpness-aware minimization over a selection of parameters.

    The base optimizer applies the gradient. `samon.two_pass` is the fast way to fill `.grad` with the gradient at
    w + eps; `step(closure)` does the same in any trainer that passes a standard closure.

    Args:
        base: optimizer over all trained parameters.
        selection: the parameters to perturb.
        geometry: row of Table 9, with radius `rho` and constant `eta` (default: the row's own). `rho` is an attribute
            that a schedule may set.
        radius: what rho measures: the length of the perturbation (`ball`), its ratio to the gradient (`raw`: eps =
            rho T^2 g), the rise of the linearized loss (`loss`), or a mix of ball and raw (a number in (0, 1)).
        mask: chooses the entries that a sparse perturbation changes (section 5.1).
        ascent: source of the perturbation's direction, by default this batch's gradient at w.

    Attributes:
        stats: values of the last step, 0-dim tensors on the device: loss, loss_perturbed, ascent_grad_norm, and
            eps_norm, the length of the applied perturbation (the mean over groups). With half-precision weights also
            eps_lost, the fraction of the perturbation lost to rounding.

    Raises:
        UserError: an argument is out of range, or the base optimizer cannot be used.
    """

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
        super().__init__(base, "-".join(filter(None, (selection.scope, geometry))))
        self.geometry, self.mask = geometry, mask
        self.ascent = ascent or AscentSource()
        self.ascent.check(mask, selection)
        self.rho = validate_nonnegative("rho", rho)
        self.eta = validate_nonnegative("eta", GEOMETRIES[geometry].eta if eta is None else eta)
        if self.eta and not GEOMETRIES[geometry].eta:
            raise UserError(f"eta={self.eta:g} has no effect: the geometry {geometry or 'l2'} has no eta; drop it")
        self.radius = validate_radius_rule(radius)
        # Parameters that the base optimizer does not hold are left out, except frozen ones with `perturb_frozen`.
        trained, frozen = set(self.parameters()), selection.perturb_frozen
        own = {n: p for n, p in selection.parameters.items() if p in trained or (frozen and not p.requires_grad)}
        self.selection = replace(selection, parameters=own)

    def _init_instance(self) -> None:
        """Initialize what a copy does not take over."""
        super()._init_instance()
        self.stats: dict[str, Tensor] = {}
        self.arithmetic = Arithmetic()
        self._manual: ExitStack | None = None  # undoes first_step, between it and second_step
        self._in_step = False  # the passes of a step are running
        self._expect_plain = self._warned_plain = False  # see `_warn_if_plain`

    def __setattr__(self, name: str, value: object) -> None:
        """Set the attribute; of a wrapper of Lightning or Fabric, which derive from this class, on the optimizer inside
        unless it is the wrapper's own (also `step`, which schedulers replace)."""
        own = name in vars(self) or hasattr(type(self), name)
        object.__setattr__(self if own else sam_of(self) or self, name, value)

    @property
    def scope(self) -> str:
        return self.selection.scope

    @property
    def model(self) -> Module | None:
        return self.selection.model

    @cached_property
    def sharded(self) -> bool:
        """Whether any parameter, perturbed or not, is sharded across processes (FSDP2)."""
        return any(isinstance(p, DTensor) for p in self.parameters())

    @cached_property
    def _bias_caches(self) -> list[Module]:
        return [] if self.model is None else contexts.find_bias_caches(self.model.modules())

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
        """Add the group to the base; those of its parameters that are in the scope are perturbed from now on. Scope
        `sam` includes parameters outside the model, such as a loss function's, unless `perturb` chooses by name.

        Raises:
            UserError: scope or geometry depend on the layers of parameters outside the model.
        """
        super().add_param_group(param_group)
        old, group = self.selection, self.base.param_groups[-1]
        added, selected = set(group["params"]), NamedParameters()
        if old.model is not None:
            selected = select(old.model, old.scope, old.perturb, old.perturb_frozen).parameters
        outside = added.difference(() if old.model is None else old.model.parameters())
        if outside and old.scope != "samon" and (old.model is None or old.perturb is None):
            by_name = GEOMETRIES[self.geometry].by_name and "param_names" not in group
            if old.scope == "samnn" or by_name:
                self.base.param_groups.pop()
                raise UserError(
                    f"{self.name} must know the layers of its parameters, but some of these are outside the model; "
                    "create the optimizer from a module that contains them, such as nn.ModuleList([model, loss])"
                )
            bare = select_bare(self.base.param_groups, old.scope, old.perturb).parameters
            selected |= {n: p for n, p in bare.items() if p in outside}
        added = added.difference(old.parameters.values())
        old.parameters |= {n: p for n, p in selected.items() if p in added}

    def compile(self, backend: str | Callable[..., object] = "inductor", mode: str | None = None) -> None:
        """Compile the arithmetic of the perturbation. A copy of this optimizer is not compiled.

        Args:
            backend: torch.compile's backend, usually that of the model.
            mode: the mode in which the model is compiled. If it captures CUDA graphs (reduce-overhead, max-autotune),
                `samon.two_pass` copies results that the next run of a graph would overwrite. The arithmetic itself is
                compiled without a mode.

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
        """The base optimizer's own state, which it can load alone, plus that of the ascent source and of the mask."""
        state = super().state_dict()
        if self.ascent.has_state or self.ascent.counts_updates:
            state["ascent"] = self.ascent.state_dict()
        return state if self.mask is None else {**state, "mask": self.mask.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this class or by the base optimizer alone.

        Raises:
            UserError: the state is that of another base optimizer, before or after `replace_base`.
        """
        super().load_state_dict(state_dict)
        if self.mask is not None and "mask" in state_dict:
            self.mask.load_state_dict(state_dict["mask"], _local(self.perturbed_parameters()))
        if "ascent" in state_dict:
            device = next(iter(self.selection.parameters.values())).device
            self.ascent.load_state_dict(state_dict["ascent"], device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and discard an update that was computed but not applied, as after an overflow."""
        super().zero_grad(set_to_none)
        self._discard_update()

    def _discard_update(self) -> None:
        if not self._in_step:  # otherwise a closure clears the gradients, as a part of its update
            self.ascent.discard_update()
        if self.mask is not None:
            self.mask.stale = True

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k in PICKLED}

    # -- perturbation ------------------------------------------------------------------------------------------------
    def perturbed_parameters(self) -> dict[str, Parameter]:
        """The perturbed parameters by qualified name: those that require gradients, or all with `perturb_frozen`."""
        return self.selection.current()

    @contextmanager
    def sampled_parameters(self) -> Iterator[NamedParameters]:
        """Context of the passes of a step. Yields the parameters that this step perturbs: `perturbed_parameters`, or a
        random sample of them (ESAM).

        Raises:
            UserError: all are frozen, FSDP does not let them be perturbed, or a parameter group has its own rho.
        """
        if self._manual is not None:
            raise UserError("first_step() has moved the weights to w + eps; call second_step() before another step")
        named = self.perturbed_parameters()
        if not named:
            raise UserError(f"all parameters that {self.scope} perturbs are frozen; unfreeze some")
        own = "rho" in self.base.defaults  # Adadelta's decay rate
        if not own and any(group.get("rho", self.rho) != self.rho for group in self.param_groups):
            raise UserError("a parameter group's rho has no effect; set optimizer.rho, which all groups share")
        trained = [p for p in named.values() if p.requires_grad] or self.parameters()
        if self._was_cleared(trained):  # by model.zero_grad() or Lookahead's, which do not call `SAM.zero_grad`
            self._discard_update()
        named = self.ascent.sample(named)
        refuse_fsdp1(named.values())
        if self.sharded:
            from samon.engines import fsdp

            fsdp.check_sharded_parameters(self, named)
        caches = self._bias_caches or contexts.find_bias_caches(contexts.modules_of(self, None))
        outer, self._in_step = self._in_step, True
        try:
            with contexts.uncached_biases(caches):
                yield named
        finally:
            self._in_step = outer
            for p in trained if self._has_update else ():
                if p.grad is not None:
                    setattr(p.grad, LAST_VERSION, p.grad._version)

    @property
    def _has_update(self) -> bool:
        """Whether the ascent source or the mask stores a part of an update that is not applied yet."""
        return bool(self.ascent.clean) or (self.mask is not None and not self.mask.stale)

    def _was_cleared(self, parameters: Sequence[Parameter]) -> bool:
        """Whether all gradients are None, or were zeroed since the last passes. Zeroing writes to all gradients, but so
        does the backward of an auxiliary loss; only if all were written to are their values read on the host."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads or not self._has_update:
            return not grads
        written = all(getattr(g, LAST_VERSION, g._version) != g._version for g in grads)
        return written and not any(to_local(g).to_dense().any() for g in grads)

    @torch.no_grad()
    def perturbation(
        self, named: NamedParameters, grads: Grads, grouped: bool = False
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The perturbation from ascent gradients in the order of `named` (Eq. 5): `(eps, ||T g||_2, finite)`.

        A gradient that is None counts as zero. If any is not finite, eps is zero and `finite` (bool, shape []) is
        false. If `grouped`, gradients and results have a leading dimension [G].
        """
        weights = _local(named)
        if len(devices := {str(w.device) for w in weights}) > 1:
            raise UserError(
                f"the perturbed parameters are on {' and '.join(sorted(devices))}, but a perturbation needs all of "
                "them on one device; move the model to one, or let perturb=... choose parameters of one"
            )
        pairs = zip(named.values(), grads, strict=True)
        dense = [geometry.to_float32(to_local(torch.zeros_like(p) if g is None else g)) for p, g in pairs]
        if self.mask is not None:
            dense = self.mask(dense)
        # The authors' rule for `eleml2orig`, which includes nn.MultiheadAttention's `in_proj_weight`.
        is_weight = ["weight" in name for name in named] if GEOMETRIES[self.geometry].by_name else []
        rho = self.rho / self.ascent.keep_probability  # ESAM divides the perturbation, which is linear in rho
        settings = (rho, self.eta, is_weight, grouped, self.norm_reduction(named), self.radius)
        eps, norm, finite = self.arithmetic.perturbation(self.geometry, weights, dense, *settings)
        # A single tensor is all of eps, flattened.
        return FlatTensors(eps[0], dense) if len(eps) == 1 else eps, norm, finite

    def step_perturbation(
        self, named: NamedParameters, grads: Grads | None, weight: float = 1.0, grouped: bool = False
    ) -> tuple[list[Tensor] | None, Tensor | None]:
        """The perturbation of a step, along the ascent source's direction: `(eps, finite)`, or `(None, None)` for a
        step at w.

        Args:
            grads: gradients at w in the order of `named`; None if the step makes no ascent pass.
            weight: weight of this micro-batch in the update's mean gradient at w, which some ascent sources store. It
                does not scale eps.
            grouped: gradients and perturbation have a leading dimension [G].
        """
        self.ascent.used, self.ascent.corrected = True, False  # so the next optimizer step is not a plain one
        if grads is not None and self.ascent.needs_clean_grad:
            dense = [torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), grads, strict=True)]
            self.ascent.accumulate_clean_grad([g.mean(0) for g in dense] if grouped else dense, weight)
        direction = self.ascent.direction(named, grads, self.state)
        if direction is None:
            self.stats = {}
            return None, None
        eps, norm, finite = self.perturbation(named, direction, grouped)
        self.stats = {"ascent_grad_norm": norm.mean() if grouped else norm}
        return eps, finite.all() if grouped else finite

    def norm_reduction(self, named: NamedParameters) -> NormReduction:
        """The function that turns norms of local shards into those of full parameters; None if nothing is sharded."""
        if not self.sharded:
            return None
        from samon.engines import fsdp

        return fsdp.norm_reduction(list(named.values()))

    @contextmanager
    def perturbed(self, grads: Mapping[str, Tensor | None] | Grads) -> Iterator[None]:
        """Perturb the weights: w + eps inside, w bit-exactly outside, also after an exception.

        Buffers are not restored: a forward in training mode updates running statistics.

        Args:
            grads: ascent gradients by qualified name, or in the order of `perturbed_parameters`. If one is not finite,
                eps is zero.

        Raises:
            UserError: `grads` contains the name of no perturbed parameter.
        """
        names = self.perturbed_parameters().keys()
        if not isinstance(grads, Mapping):
            grads = dict(zip(names, grads, strict=True))
        with self.sampled_parameters() as named:
            if not names & grads.keys():
                raise UserError(f"grads names no perturbed parameter: {[*grads][:1]} instead of {[*names][:1]}")
            self.ascent.used = True
            eps, _, _ = self.perturbation(named, [grads.get(name) for name in named])
            with self.add_perturbation(named, eps), torch.enable_grad():
                yield

    @contextmanager
    def add_perturbation(self, named: NamedParameters, eps: Tensors) -> Iterator[None]:
        """w + eps inside, w outside. Saved values are copied back, because (w + eps) - eps does not equal w."""
        weights = _local(named)
        saved = self.arithmetic.add(weights, list(eps))
        try:
            self._clear_weight_copies(named)
            self.record_perturbation(named, eps, saved)
            yield
        finally:
            self.arithmetic.restore(weights, saved)
            self._clear_weight_copies(named)

    def _clear_weight_copies(self, named: NamedParameters) -> None:
        """Drop what autocast, parametrizations and FSDP computed from weights that have just changed."""
        contexts.clear_weight_caches()
        if any(isinstance(p, DTensor) for p in named.values()):
            from samon.engines import fsdp

            fsdp.reshard(contexts.modules_of(self, self.model))

    @torch.no_grad()
    def record_perturbation(self, named: NamedParameters, eps: Tensors, saved: Tensors | None = None) -> None:
        """Record the length of the perturbation in `stats`.

        Args:
            saved: the weights before eps was added. None if eps has one row per group, [G, ...], which normalization
                layers add themselves.
        """
        reduce, applied = self.norm_reduction(named), eps
        if any(p.dtype in geometry.LOW_PRECISION for p in named.values()):
            from samon.engines.diagnostics import record_rounding

            applied = record_rounding(self, _local(named), eps, saved, reduce)
        vectors = [applied.flat] if isinstance(applied, FlatTensors) and reduce is None else applied
        self.stats["eps_norm"] = geometry.global_norm(vectors, grouped=saved is None, reduce=reduce).mean()

    # -- the step ----------------------------------------------------------------------------------------------------
    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the current gradients; with a closure, first run the two passes that compute them.

        Args:
            closure: PyTorch's standard closure (zero the gradients, forward, backward, return the loss). It runs twice:
                at w, then at w + eps without updating BatchNorm statistics; the second gradient is applied. If
                `two_pass` has filled the gradients, a closure that computes none, as some trainers pass, runs once.

        Returns:
            The loss at w, or None without a closure.

        Raises:
            UserError: the closure computes no gradients, or does not clear old ones that are not zero.
        """
        if self._in_step:
            raise UserError("step() during the passes would lose its update; call second_step(), or step() after them")
        if closure is None:
            self._warn_if_plain()
            return self._apply_gradients()
        from samon.engines.closure import run_closure

        filled = self.ascent.used or self._expect_plain  # the caller has filled the gradients, so a closure need not
        self._expect_plain = False
        with self.sampled_parameters() as named:
            loss = run_closure(self, named, torch.enable_grad()(closure), filled)
        self._apply_gradients()
        return loss

    def _apply_gradients(self) -> Any:
        """Let the ascent source correct `.grad` and store what the next update needs, then take the base step."""
        self.correct_gradients()
        if self.ascent.reads_gradients:
            self.ascent.before_step(self.perturbed_parameters(), self.state)
        self.ascent.finish_update()
        if self.mask is not None:
            self.mask.advance()
        result = self.step_base()
        contexts.clear_weight_caches()
        return result

    @torch.no_grad()
    def correct_gradients(self) -> None:
        """Let the ascent source change `.grad` (GSAM, LookSAM) or measure it (AE-SAM) before it is clipped; `step`
        does so unless this was called."""
        source = self.ascent
        if source.reads_gradients and not source.corrected:
            if source.clean and dist.is_initialized():
                source.clean = all_reduce_mean(source.clean)
            source.before_clipping(self.perturbed_parameters())
            source.corrected = True

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the weights to w + eps, from the gradients at w in `.grad` (the protocol of davda54/sam). Then compute
        the gradients there and call `second_step`. Only the first pass updates BatchNorm statistics.

        Args:
            zero_grad: clear the gradients, which the second backward must not add to.
        """
        from samon.engines.closure import manual_passes

        stack = ExitStack()
        stack.enter_context(manual_passes(self))
        self._manual = stack
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore w, and apply the gradients that were computed at w + eps.

        Args:
            zero_grad: clear the gradients at the end.

        Raises:
            UserError: `first_step` was not called, or its gradients were not cleared.
        """
        if self._manual is None:
            raise UserError("second_step() needs first_step() before it")
        passes, self._manual = self._manual, None
        passes.close()
        self._apply_gradients()
        if zero_grad:
            self.zero_grad()

    def expect_plain_step(self) -> None:
        """Declare that the next step is meant to be a plain one, so that it does not warn."""
        self._expect_plain = True
        self.ascent.discard_update()  # a skipped one, of which zero_grad() may not have told

    def _warn_if_plain(self) -> None:
        """Warn once if neither two passes nor `expect_plain_step` precede a step, which is then a plain base step."""
        if not (self.ascent.used or self._expect_plain or self._warned_plain):
            self._warned_plain = True
            warnings.warn(
                "this step's gradient was taken at w, so nothing is sharpness-aware about it; call "
                "samon.two_pass(optimizer, forward) instead of loss.backward(), or optimizer.step(closure)",
                stacklevel=5,
            )
        self._expect_plain = False


@dataclass
class Arithmetic:
    """The tensor functions of a step, eager or compiled.

    Attributes:
        cuda_graphs: whether the model runs as CUDA graphs, whose outputs the next run overwrites.
    """

    perturbation: Callable[..., tuple[list[Tensor], Tensor, Tensor]] = geometry.perturbation
    add: Callable[[list[Tensor], list[Tensor]], list[Tensor]] = contexts.add_perturbation
    restore: Callable[[list[Tensor], list[Tensor]], None] = contexts.restore_weights
    cuda_graphs: bool = False


def sam_of(optimizer: object) -> SAM | None:
    """The SAM optimizer that `optimizer` is, or that the wrappers of timm (Lookahead), Accelerate, Lightning and Fabric
    contain; None if there is none."""
    # Lightning's and Fabric's pretend to be of the wrapped class and have its attributes; only `vars` tells them apart.
    names = ("_optimizer", "optimizer", "_base_optimizer")
    while inner := next((vars(optimizer)[name] for name in names if name in getattr(optimizer, "__dict__", {})), None):
        optimizer = inner
    return optimizer if isinstance(optimizer, SAM) else None


def all_reduce_mean(tensors: list[Tensor]) -> list[Tensor]:
    """The replicated tensors averaged over the processes, in one message."""
    local = [to_local(t) for t in tensors]
    flat = torch.cat([t.flatten() for t in local])
    dist.all_reduce(flat)
    return FlatTensors(flat.div_(dist.get_world_size()), local)


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor, sharing its memory; any other tensor unchanged. Partial sums, as gradients of
    sequence-parallel layers are, are added up first."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():  # `to_local` is differentiable, and the shard must be writable
        if any(placement.is_partial() for placement in tensor.placements):
            tensor = tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])
        return tensor.to_local()


def _local(named: NamedParameters) -> list[Tensor]:
    return [to_local(p) for p in named.values()]
