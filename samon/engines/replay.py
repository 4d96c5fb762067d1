"""Replay: modules that run before the first perturbed parameter have the same outputs in both passes, so they run once.

The first pass stores their outputs, with the autograd graph; the second pass returns them. The order in which modules
run determines which ones: a module belongs to the prefix if every call of it ends before the first module with
perturbed parameters starts. Code between modules runs again on equal inputs, so parameters that belong to no child
module (class token, position embedding) receive their gradient through the stored graph, once. If such code draws
random numbers (mixup, random masks), nothing is replayed, since the second pass would see other inputs; with
`same_noise` only if it draws them from NumPy or Python.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.graph import Node
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from samon import rng
from samon.contexts import parameters_of
from samon.engines.groups import refuse_checkpointing
from samon.engines.patches import forward_hooks, graph_leaves, patch_forward
from samon.sam import SAM
from samon.scope import Named
from samon.two_pass import StepOptions, WholeBatch


@dataclass
class Trace:
    """What happens in one pass: events, the starts and ends of the calls of modules, numbered from 1.

    Attributes:
        calls: [start, end] of every call of each module.
        nodes: the autograd nodes of its outputs.
        draws: events before which, since the event before, a random number generator was used. With `same_noise` those
            of torch do not count: the second pass draws the same numbers from them.
    """

    device: torch.device
    same_noise: bool
    calls: dict[nn.Module, list[list[int]]] = field(default_factory=lambda: defaultdict(list))
    nodes: dict[nn.Module, list[Node]] = field(default_factory=lambda: defaultdict(list))
    draws: list[int] = field(default_factory=list)
    clock: int = 0

    def __post_init__(self) -> None:
        self.generators = self._generator_states()

    def start(self, module: nn.Module, args: object) -> None:
        self._next_event()
        self.calls[module].append([self.clock, -1])

    def end(self, module: nn.Module, args: object, output: object) -> None:
        self._next_event()
        next(call for call in reversed(self.calls[module]) if call[1] < 0)[1] = self.clock
        self.nodes[module] += [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]

    def _next_event(self) -> None:
        self.clock += 1
        if (generators := self._generator_states()) != self.generators:
            self.draws.append(self.clock)
            self.generators = generators

    def _generator_states(self) -> tuple[object, ...]:
        with unset_fake_temporarily():  # so that a step can be traced with fake tensors
            state = rng.get_state(self.device)
            kind, keys, *rest = state["numpy"]
            own = (keys,) if self.same_noise else (keys, state["torch"], state["device"])
            return state["python"], kind, *rest, *(t.numpy().tobytes() for t in own if t is not None)

    def draws_before(self, modules: Sequence[nn.Module]) -> bool:
        """Whether code outside these modules draws random numbers before the last of their calls, which may use it."""
        inside = [call for module in modules for call in self.calls[module]]
        last = max((end for _, end in inside), default=0)
        return any(t <= last and not any(start < t <= end for start, end in inside) for t in self.draws)


@dataclass
class ReplayPlan:
    """Which activations of a model are reused.

    Attributes:
        prefix: outermost modules whose outputs are stored; empty if none can be.
        suffix: unperturbed parameters used only after the boundary, frozen in the ascent pass.
        perturbed_modules: modules that own perturbed parameters.
        perturbed: ids of these parameters; with others the plan is void.
        same_noise: the option of that name; with another value the plan is void.
        cloned: prefix modules whose outputs later code overwrites in place, so that a copy is returned.
    """

    prefix: list[nn.Module]
    suffix: list[Parameter]
    perturbed_modules: list[nn.Module]
    perturbed: set[int]
    same_noise: bool
    cloned: set[nn.Module] = field(default_factory=set)


PLANS: WeakKeyDictionary[SAM, ReplayPlan] = WeakKeyDictionary()


def make_plan(model: nn.Module, perturbed: set[int], trace: Trace) -> ReplayPlan:
    """The plan for these perturbed parameters (ids), from one recorded pass."""
    starts = {module: _first_start(model, name, trace) for name, module in model.named_modules()}
    perturbed_modules = [m for m in starts if any(id(p) in perturbed for p in m.parameters(recurse=False))]
    boundary = min([trace.clock, *(starts[m] for m in perturbed_modules)])

    def outermost(parent: nn.Module) -> Iterator[nn.Module]:
        for module in parent.children():
            calls = trace.calls.get(module, [])
            in_prefix = calls != [] and all(0 <= end < boundary for _, end in calls)
            yield from [module] if in_prefix else outermost(module)

    prefix = list(outermost(model))
    # Functional code can pass a parameter to an output without calling its module: the graph decides.
    reached = any(id(leaf) in perturbed for m in prefix for leaf in graph_leaves(trace.nodes[m]))
    random = trace.draws_before(prefix)
    if reached or random or not parameters_of(chain.from_iterable(m.modules() for m in prefix)):  # or nothing is saved
        prefix = []
    early = {id(p) for module, start in starts.items() if start < boundary for p in module.parameters(recurse=False)}
    suffix = [p for p in model.parameters() if id(p) not in early and id(p) not in perturbed]
    return ReplayPlan(prefix, suffix, perturbed_modules, perturbed, trace.same_noise)


def _first_start(model: nn.Module, name: str, trace: Trace) -> int:
    """When the module's parameters can first have been used: its own first call, or that of the nearest parent that was
    called (attention reads its output projection's weight without calling it)."""
    if calls := trace.calls.get(model.get_submodule(name)):
        return calls[0][0]
    return _first_start(model, name.rpartition(".")[0], trace) if name else 0


class ActivationCache:
    """The outputs stored in one first pass.

    Attributes:
        valid: whether they may be reused. Not if a prefix module ran after the boundary this time (`reordered`), or if
            code that the second pass runs again has overwritten a stored output in place.
    """

    def __init__(self, plan: ReplayPlan, device: torch.device, same_noise: bool):
        self.plan, self.device, self.same_noise = plan, device, same_noise
        self.outputs: dict[nn.Module, list[tuple[object, dict[str, Any] | None]]] = defaultdict(list)
        self.versions: list[tuple[nn.Module, Tensor, int]] = []
        self.valid, self.boundary_reached, self.reordered = True, False, False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the first pass's forward."""

        def reach_boundary(*_: object) -> None:
            self.boundary_reached = True

        recorders = {m: self._recorder(m, m.forward) for m in self.plan.prefix}
        with forward_hooks(self.plan.perturbed_modules, reach_boundary), patch_forward(recorders):
            yield
        self._check_versions()

    def _recorder(self, module: nn.Module, forward: Callable[..., object]) -> Callable[..., object]:
        def record(*args: object, **kwargs: object) -> object:
            self._check_versions()
            output = forward(*args, **kwargs)
            if self.boundary_reached:
                self.valid, self.reordered = False, True
            self.outputs[module].append((output, rng.get_torch_state(self.device) if self.same_noise else None))
            # If this module overwrote an earlier output in place (activations do), its own stored output replaces it.
            self.versions = [(m, t, t._version) for m, t, _ in self.versions]
            self.versions += [(module, t, t._version) for t in _tensors(output)]
            return self._returned(module, output)

        return record

    def _check_versions(self) -> None:
        overwritten = {m for m, t, version in self.versions if t._version != version}
        self.plan.cloned |= overwritten  # from the next step on
        self.valid &= not overwritten

    def _returned(self, module: nn.Module, output: object) -> object:
        if module not in self.plan.cloned:
            return output
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, output)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Around the second pass's forward."""

        def player(module: nn.Module, forward: Callable[..., object]) -> Callable[..., object]:
            remaining = iter(self.outputs[module])

            def play(*args: object, **kwargs: object) -> object:
                output, noise = next(remaining, (None, None))
                if output is None:  # not called in the first pass
                    return forward(*args, **kwargs)
                if noise is not None:
                    rng.set_torch_state(noise, self.device)
                return self._returned(module, output)

            return play

        with patch_forward({m: player(m, m.forward) for m in self.plan.prefix}):
            yield


def _tensors(output: object) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


class Replay(WholeBatch):
    """Reuse activations of the first pass in the second. The first step records the order of modules.

    Raises:
        UserError: the model uses gradient checkpointing.
    """

    def __init__(self, sam: SAM, named: Named, options: StepOptions):
        super().__init__(sam, named, options)
        assert sam.model is not None
        refuse_checkpointing(sam.model, "replay (replay=True; --no-replay) keeps activations")
        self.model, self.perturbed_ids = sam.model, {id(p) for p in named.values()}
        plan = PLANS.get(sam)
        known = plan is not None and (plan.perturbed, plan.same_noise) == (self.perturbed_ids, options.same_noise)
        self.plan = plan if known else None
        self.cache: ActivationCache | None = None
        if self.plan is not None and self.plan.prefix:
            self.cache = ActivationCache(self.plan, self.device, options.same_noise)

    def frozen_parameters(self) -> list[Parameter]:
        if self.plan is None:  # the trace needs the whole graph
            return []
        return self.plan.suffix if self.plan.prefix else super().frozen_parameters()

    @contextmanager
    def each_pass(self) -> Iterator[None]:
        with super().each_pass():
            if self.plan is None and not self.in_descent_pass:
                trace = Trace(self.device, self.options.same_noise)
                with forward_hooks(self.model.modules(), trace.start, trace.end):
                    yield
                PLANS[self.sam] = make_plan(self.model, self.perturbed_ids, trace)
            elif self.cache is None or not self.cache.valid:
                yield
            else:
                with self.cache.replaying() if self.in_descent_pass else self.cache.recording():
                    yield

    @contextmanager
    def perturbed(self, eps: list[Tensor]) -> Iterator[None]:
        try:
            with super().perturbed(eps):
                yield
        finally:
            if self.cache is not None:
                if self.cache.reordered:
                    PLANS.pop(self.sam, None)  # modules ran in another order: record again
                self.cache.outputs.clear()
