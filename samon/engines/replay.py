"""Replay: modules that run before the first perturbed parameter have the same outputs in both passes, so they run once.

The first pass stores their outputs, with the autograd graph; the second pass returns them. The order in which modules
run determines which ones: a module belongs to the prefix if every call of it ends before the first module with
perturbed parameters starts. Code between modules runs again on equal inputs, so parameters that belong to no child
module (class token, position embedding) receive their gradient through the stored graph, once. If such code draws
random numbers (mixup, random masks), nothing is replayed, since the second pass would see other inputs; with
`same_noise` only if it draws them from NumPy or Python.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd.graph import Node
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from samon import rng
from samon.contexts import parameters_of, preserve_buffers
from samon.engines.groups import refuse_checkpointing
from samon.engines.patches import forward_hooks, graph_leaves, patch_forward
from samon.sam import SAM
from samon.scope import NamedParameters
from samon.two_pass import Forward, StepOptions, WholeBatch


class Trace:
    """The starts and ends of the calls of modules in one pass, events that are numbered from 1.

    Args:
        generator_states: function whose value changes if a random number is drawn that the second pass draws anew.

    Attributes:
        calls: [start, end] of every call of each module.
        nodes: the autograd nodes of its outputs.
        draws: events since whose predecessor random numbers were drawn.
    """

    def __init__(self, generator_states: Callable[[], object]) -> None:
        self.calls: dict[nn.Module, list[list[int]]] = defaultdict(list)
        self.nodes: dict[nn.Module, list[Node]] = defaultdict(list)
        self.draws: list[int] = []
        self.clock, self.generator_states, self._states = 0, generator_states, generator_states()

    def start(self, module: nn.Module, args: object) -> None:
        self._next_event()
        self.calls[module].append([self.clock, -1])

    def end(self, module: nn.Module, args: object, output: object) -> None:
        self._next_event()
        next(call for call in reversed(self.calls[module]) if call[1] < 0)[1] = self.clock
        self.nodes[module] += [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]

    def _next_event(self) -> None:
        self.clock += 1
        if (states := self.generator_states()) != self._states:
            self.draws.append(self.clock)
            self._states = states

    def draws_before(self, modules: Sequence[nn.Module]) -> bool:
        """Whether code outside these modules draws random numbers before the last of their calls, which may use it."""
        inside = [call for module in modules for call in self.calls.get(module, [])]
        last = max((end for _, end in inside), default=0)
        return any(t <= last and not any(start < t <= end for start, end in inside) for t in self.draws)


def generator_states(device: torch.device, same_noise: bool, only_torch: bool = False) -> list[object]:
    """States of the generators from which the second pass draws other numbers; with `same_noise` not torch's."""
    with unset_fake_temporarily():  # so that a step can be traced with fake tensors
        tensors = () if same_noise else rng.get_torch_state(device).values()
        states: list[object] = [t.numpy().tobytes() for t in tensors if t is not None]
        if not only_torch:  # NumPy's state takes 0.2 ms
            state = rng.get_state()
            _, keys, *rest = state["numpy"]
            states += [state["python"], keys.numpy().tobytes(), *rest]
        return states


@dataclass
class ReplayPlan:
    """Which activations of a model are reused.

    Attributes:
        prefix: outermost modules whose outputs are stored; empty if none can be.
        perturbed_modules: modules that own perturbed parameters.
        perturbed: ids of these parameters; with others the plan is void.
        same_noise: the option of that name; with another value the plan is void.
        verified: `Replay.verify` has run.
        cloned: prefix modules whose outputs later code overwrites in place, so that a copy is returned.
    """

    prefix: list[nn.Module]
    perturbed_modules: list[nn.Module]
    perturbed: set[int]
    same_noise: bool
    cloned: set[nn.Module] = field(default_factory=set)
    verified: bool = False


PLANS: WeakKeyDictionary[SAM, ReplayPlan] = WeakKeyDictionary()


def make_plan(model: nn.Module, perturbed: set[int], trace: Trace, same_noise: bool) -> ReplayPlan:
    """The plan for these perturbed parameters (ids), from one recorded pass."""
    names = {module: name for name, module in model.named_modules()}
    perturbed_modules = [m for m in names if any(id(p) in perturbed for p in m.parameters(recurse=False))]
    boundary = min([trace.clock, *(_first_start(model, names[m], trace) for m in perturbed_modules)])

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
    return ReplayPlan(prefix, perturbed_modules, perturbed, same_noise)


def _first_start(model: nn.Module, name: str, trace: Trace) -> int:
    """When the module's parameters can first have been used: its own first call, or that of the nearest parent that was
    called (attention reads its output projection's weight without calling it)."""
    if calls := trace.calls.get(model.get_submodule(name)):
        return calls[0][0]
    return _first_start(model, name.rpartition(".")[0], trace) if name else 0


class ActivationCache:
    """The outputs stored in one first pass.

    Attributes:
        valid: whether they may be reused. Not if this pass did not follow the plan (`outdated`), or if code that the
            second pass runs again has overwritten a stored output in place.
        outdated: a prefix module ran after the boundary, or code between modules drew random numbers from torch.
    """

    def __init__(self, plan: ReplayPlan, device: torch.device):
        self.plan, self.device = plan, device
        self.outputs: dict[nn.Module, list[tuple[object, rng.State | None]]] = defaultdict(list)
        self.versions: list[tuple[nn.Module, Tensor, int]] = []
        self.valid, self.outdated = True, False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the first pass's forward."""
        plan, trace = self.plan, Trace(partial(generator_states, self.device, self.plan.same_noise, only_torch=True))
        recorders = {m: self._recorder(m, m.forward) for m in plan.prefix}
        with forward_hooks([*plan.prefix, *plan.perturbed_modules], trace.start, trace.end), patch_forward(recorders):
            yield
        self._check_versions()
        boundary = min((trace.calls[m][0][0] for m in plan.perturbed_modules if m in trace.calls), default=math.inf)
        late = any(end > boundary for m in plan.prefix for _, end in trace.calls.get(m, []))
        self.outdated = late or trace.draws_before(plan.prefix)
        self.valid &= not self.outdated

    def _recorder(self, module: nn.Module, forward: Callable[..., object]) -> Callable[..., object]:
        def record(*args: object, **kwargs: object) -> object:
            self._check_versions()
            output = forward(*args, **kwargs)
            self.outputs[module].append((output, self._noise()))
            # If this module overwrote an earlier output in place (activations do), its own stored output replaces it.
            self.versions = [(m, t, t._version) for m, t, _ in self.versions]
            self.versions += [(module, t, t._version) for t in _tensors(output)]
            return self._returned(module, output)

        return record

    def _noise(self) -> rng.State | None:
        """What the second pass needs in order to draw the same random numbers."""
        if not self.plan.verified:
            return rng.get_state(self.device)
        return rng.get_torch_state(self.device) if self.plan.same_noise else None

    def _check_versions(self) -> None:
        overwritten = {m for m, t, version in self.versions if t._version != version}
        self.plan.cloned |= overwritten  # from the next step on
        self.valid &= not overwritten

    def _returned(self, module: nn.Module, output: object) -> object:
        """The output in lists and dictionaries of its own, which code between modules may change as well."""
        cloned = module in self.plan.cloned
        return tree_map(lambda t: t.clone() if cloned and isinstance(t, Tensor) else t, output)

    @contextmanager
    def replaying(self, set_noise: Callable[..., None] | None) -> Iterator[None]:
        """Around the second pass's forward. `set_noise(state, device)` restores the random state after each output."""

        def player(module: nn.Module, forward: Callable[..., object]) -> Callable[..., object]:
            remaining = iter(self.outputs[module])

            def play(*args: object, **kwargs: object) -> object:
                output, noise = next(remaining, (None, None))
                if output is None:  # not called in the first pass
                    return forward(*args, **kwargs)
                if set_noise is not None:
                    set_noise(noise, self.device)
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

    def __init__(self, sam: SAM, named: NamedParameters, options: StepOptions):
        super().__init__(sam, named, options)
        assert sam.model is not None
        refuse_checkpointing(sam.model, "replay (replay=True; --no-replay) keeps activations")
        self.model, self.perturbed_ids = sam.model, {id(p) for p in named.values()}
        plan = PLANS.get(sam)
        known = plan is not None and (plan.perturbed, plan.same_noise) == (self.perturbed_ids, options.same_noise)
        self.plan = plan if known else None
        self.cache = ActivationCache(self.plan, self.device) if self.plan is not None and self.plan.prefix else None

    def frozen_parameters(self) -> list[Parameter]:
        """None while the whole graph is traced or stored: `torch.autograd.grad(inputs=...)` skips the gradients of
        other weights anyway."""
        return super().frozen_parameters() if self.plan is not None and self.cache is None else []

    @contextmanager
    def each_pass(self) -> Iterator[None]:
        with super().each_pass():
            if self.plan is None and not self.in_descent_pass:
                same_noise = self.options.same_noise
                trace = Trace(partial(generator_states, self.device, same_noise))
                with forward_hooks(self.model.modules(), trace.start, trace.end):
                    yield
                PLANS[self.sam] = make_plan(self.model, self.perturbed_ids, trace, same_noise)
            elif self.cache is None or not self.cache.valid:
                yield
            else:
                set_noise = rng.set_torch_state if self.options.same_noise else None
                with self.cache.replaying(set_noise) if self.in_descent_pass else self.cache.recording():
                    yield

    def ascent_gradient(self, forwards: Sequence[Forward]) -> tuple[Tensor, list[Tensor]]:
        loss, grads = super().ascent_gradient(forwards)
        if self.cache is not None and self.cache.valid and not self.cache.plan.verified:
            self.verify(self.cache, forwards[0], loss)
        return loss, grads

    def verify(self, cache: ActivationCache, forward: Forward, loss: Tensor) -> None:
        """Run the forward once more, at w, with the stored outputs and the same random numbers. If it has another loss
        than the first pass, nothing is replayed: modules of the prefix have effects besides their outputs (they append
        auxiliary losses to a list), or `forward` reads another batch each time."""
        cache.plan.verified = True
        if loss.is_meta or isinstance(loss, FakeTensor):
            return
        buffers = [b for m in self.modules for b in m._buffers.values() if b is not None and not b.is_inference()]
        unwritten = torch.autograd._unsafe_preserve_version_counter(tuple(buffers))  # for the stored graph
        restored, replaying = preserve_buffers(self.modules), cache.replaying(rng.set_state)
        with unwritten, restored, rng.fork(self.device), replaying, self.no_sync():
            again = forward().detach()  # not under no_grad: it may compute gradients itself, for a penalty
        if not torch.allclose(again.mean(), loss, rtol=1e-4, equal_nan=True):
            warnings.warn(
                f"replay is off: with the stored outputs of the first layers, the loss is {again.item():g} instead of "
                f"{loss.item():g}. These layers must have no effects besides their outputs, and forward must use one "
                "batch; pass replay=False",
                stacklevel=7,
            )
            cache.plan.prefix, self.cache = [], None

    @contextmanager
    def perturbed(self, eps: list[Tensor]) -> Iterator[None]:
        try:
            with super().perturbed(eps):
                yield
        finally:
            if self.cache is not None:
                if self.cache.outdated:
                    PLANS.pop(self.sam, None)  # record again
                self.cache.outputs.clear()
