"""Replay: modules in front of the first perturbed parameter compute the same in both passes, so they run once.

The first pass keeps their outputs, autograd graph included; in the second pass they return them. What is in front is
found from the order in which modules actually run: a module is in front if every call of it has ended before the first
owner of a perturbed parameter starts. Code between modules is run again, on equal inputs, so parameters that belong to
no child module (class token, position embedding) receive their gradient through the kept graph, once.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from samon import rng
from samon.engines.norm_stats import kept
from samon.engines.passes import frozen, gradients, refuse_checkpointing, swapped_forwards, unperturbed, watched
from samon.sam import SAM


@dataclass
class Trace:
    """When each module ran: [start, end] event numbers of every call, and what autograd node its outputs came from."""

    calls: dict[nn.Module, list[list[int]]] = field(default_factory=lambda: defaultdict(list))
    nodes: dict[nn.Module, list[Any]] = field(default_factory=lambda: defaultdict(list))
    clock: int = 0

    def start(self, module: nn.Module, args: Any) -> None:
        self.clock += 1
        self.calls[module].append([self.clock, -1])

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.clock += 1
        next(call for call in reversed(self.calls[module]) if call[1] < 0)[1] = self.clock
        self.nodes[module] += [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]


@dataclass
class Plan:
    """What a model's replay keeps.

    Attributes:
        front: modules whose outputs are kept, none inside another.
        late: parameters used only behind the cut; the ascent pass freezes them.
        owners: modules that own perturbed parameters.
        perturbed: the ids of these; with others, for instance after some were unfrozen, the plan is void.
        cloned: front modules whose outputs later code overwrites in place, so that a copy is handed out.
    """

    front: list[nn.Module]
    late: list[Parameter]
    owners: list[nn.Module]
    perturbed: set[int]
    cloned: set[nn.Module] = field(default_factory=set)


def make_plan(sam: SAM, trace: Trace) -> Plan:
    """The plan for the perturbed parameters from one recorded pass. An empty `front` means nothing can be kept."""
    model = sam.model
    assert model is not None
    perturbed = perturbed_ids(sam)
    starts = {module: _first_start(model, name, trace) for name, module in model.named_modules()}
    owners = [m for m in starts if any(id(p) in perturbed for p in m.parameters(recurse=False))]
    cut = min([trace.clock, *(starts[m] for m in owners)])

    def in_front(module: nn.Module) -> bool:
        calls = trace.calls.get(module, [])
        return calls != [] and all(0 <= end < cut for _, end in calls)

    def outermost(around: nn.Module) -> Iterator[nn.Module]:
        for module in around.children():
            yield from [module] if in_front(module) else outermost(module)

    front = list(outermost(model))
    # A parameter can also reach an output by functional code that calls no owner: the graph has the last word.
    if any(_reaches(trace.nodes[m], perturbed) for m in front):
        front = []
    early = {id(p) for module, start in starts.items() if start < cut for p in module.parameters(recurse=False)}
    late = [p for p in model.parameters() if id(p) not in early and id(p) not in perturbed]
    return Plan(front if any(True for m in front for _ in m.parameters()) else [], late, owners, perturbed)


def _first_start(model: nn.Module, name: str, trace: Trace) -> int:
    """When the module's parameters can first have been used: its own first call, or that of the nearest module
    around it that was called (attention reads its output projection's weight without calling it)."""
    if calls := trace.calls.get(model.get_submodule(name)):
        return calls[0][0]
    return _first_start(model, name.rpartition(".")[0], trace) if name else 0


def perturbed_ids(sam: SAM) -> set[int]:
    return {id(p) for p in sam.perturbed_parameters().values()}


def _reaches(nodes: list[Any], perturbed: set[int]) -> bool:
    seen, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in perturbed:
            return True
        stack += [following for following, _ in node.next_functions]
    return False


class Tape:
    """The outputs kept from one first pass.

    `whole` turns false when they must not be used: a front module ran behind the cut this time (`reordered`), or code
    that the second pass runs again has overwritten a kept output in place.
    """

    def __init__(self, plan: Plan, device: torch.device, same_noise: bool):
        self.plan, self.device, self.same_noise = plan, device, same_noise
        self.outputs: dict[nn.Module, list[tuple[Any, dict[str, Any] | None]]] = defaultdict(list)
        self.versions: list[tuple[nn.Module, Tensor, int]] = []
        self.whole, self.cut_reached, self.reordered = True, False, False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the first pass's forward."""

        def reached(*_: Any) -> None:
            self.cut_reached = True

        recorders = {m: self._recorder(m, m.forward) for m in self.plan.front}
        with watched(self.plan.owners, reached), swapped_forwards(recorders):
            yield
        self._check_versions()

    def _recorder(self, module: nn.Module, forward: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            self._check_versions()
            output = forward(*args, **kwargs)
            if self.cut_reached:
                self.whole, self.reordered = False, True
            self.outputs[module].append((output, rng.take_torch(self.device) if self.same_noise else None))
            # Whatever this module wrote over in place (activations do), its own kept output stands for.
            self.versions = [(m, t, t._version) for m, t, _ in self.versions]
            self.versions += [(module, t, t._version) for t in _tensors(output)]
            return self._handed_out(module, output)

        return record

    def _check_versions(self) -> None:
        overwritten = {m for m, t, version in self.versions if t._version != version}
        self.plan.cloned |= overwritten  # from the next step on
        self.whole &= not overwritten

    def _handed_out(self, module: nn.Module, output: Any) -> Any:
        if module not in self.plan.cloned:
            return output
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, output)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Around the second pass's forward."""

        def player(module: nn.Module, forward: Any) -> Any:
            remaining = iter(self.outputs[module])

            def play(*args: Any, **kwargs: Any) -> Any:
                output, noise = next(remaining, (None, None))
                if output is None:  # not called in the first pass
                    return forward(*args, **kwargs)
                if noise is not None:
                    rng.put_torch(noise, self.device)
                return self._handed_out(module, output)

            return play

        with swapped_forwards({m: player(m, m.forward) for m in self.plan.front}):
            yield


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


class Plain:
    """Both passes with one perturbation for the whole batch. Of replay they use nothing, record the order of modules
    for a plan, or follow the plan.

    Args:
        replay: whether replay is wanted and possible: one forward, the same in both passes.

    Attributes:
        inputs: the perturbed parameters.

    Raises:
        UserError: replay meets gradient checkpointing.
    """

    groups = 1

    def __init__(self, sam: SAM, bn_stats: str = "first", *, replay: bool = False, same_noise: bool = False):
        self.sam, self.bn_stats = sam, bn_stats
        self.inputs: list[Tensor] = list(sam.perturbed_parameters().values())
        self.device = self.inputs[0].device
        self.modules = sam.modules()
        self.tape: Tape | None = None
        # What the second pass is to write to buffers, it writes where it runs.
        usable = replay and sam.selection.narrowed and bn_stats == "first"
        plan = sam.plan if usable and sam.plan is not None and sam.plan.perturbed == perturbed_ids(sam) else None
        self.traced = sam.model if usable and plan is None else None  # the model where a plan is to be made
        if usable and sam.model is not None:
            refuse_checkpointing(sam.model, "replay (replay=True; --no-replay) keeps activations")
            if plan is not None and plan.front:
                self.tape = Tape(plan, self.device, same_noise)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the first pass."""
        if self.tape is not None:
            late = self.tape.plan.late
        else:
            late = [] if self.traced is not None or self.sam.distributed else unperturbed(self.sam, self.modules)
        with frozen(late), kept(self.modules if self.bn_stats == "second" else []):
            yield

    def gradients(self, loss: Tensor, scaler: Any) -> list[Tensor | None]:
        """Unscaled gradients of a loss of the first pass with respect to `inputs`."""
        return gradients(loss, self.inputs, scaler)

    @contextmanager
    def each_first(self) -> Iterator[None]:
        """Around each forward of the first pass."""
        if self.traced is not None:
            trace = Trace()
            with watched(self.traced.modules(), trace.start, trace.end):
                yield
            self.sam.plan = make_plan(self.sam, trace)
        else:
            with self.tape.recording() if self.tape is not None else self.sam.finding_modules():
                yield

    @contextmanager
    def second(self, eps: list[Tensor]) -> Iterator[None]:
        """Around the second pass: the weights are at w + eps."""
        try:
            modules = self.modules or self.sam.modules()
            with kept(modules if self.bn_stats == "first" else []), self.sam.moved(eps):
                yield
        finally:
            if self.tape is not None:
                if self.tape.reordered:
                    self.sam.plan = None  # modules ran in another order: look again
                self.tape.outputs.clear()

    def each_second(self) -> AbstractContextManager[None]:
        """Around each forward and backward of the second pass."""
        return self.tape.replaying() if self.tape is not None and self.tape.whole else nullcontext()
