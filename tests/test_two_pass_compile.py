"""torch.compile on the CPU: of the model (two graphs, no breaks, no weight gradients in the ascent graph), and of the
arithmetic of the perturbation (the eager numbers, one graph per function)."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils.flop_counter import flop_registry

import samon
from samon import UserError
from tests import reference
from tests.nets import BatchNormNet, ShallowNet, batch
from tests.steps import (
    assert_gradients,
    assert_same,
    closure_of,
    gradients,
    loss_of,
    losses_of,
    make,
    optimizer_of,
    update,
)

MODELS: dict[str, dict[str, Any]] = {
    "resnet10t": {"channels": [16, 32, 64, 128], "stem_width": 16},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
}


class Graphs:
    """A compiler backend that runs graphs as they are, counts FLOPs and records what the backward graphs contain."""

    def __init__(self) -> None:
        self.forward = self.flops = 0
        self.backward: list[Counter[str]] = []

    def counted(self, graph: Any) -> Callable:
        """The graph's own callable, which adds its FLOPs at every run."""
        flops = 0
        for node in graph.graph.nodes:
            if (formula := flop_registry.get(getattr(node.target, "overloadpacket", None))) is not None:
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                flops += formula(*args, **kwargs, out_val=node.meta["val"])

        def run(*args: Any) -> Any:
            self.flops += flops
            return graph(*args)

        return make_boxed_func(run)

    def backend(self) -> Any:
        def forward(graph: Any, inputs: Any) -> Callable:
            self.forward += 1
            return self.counted(graph)

        def backward(graph: Any, inputs: Any) -> Callable:
            counts: Counter[str] = Counter()
            for node in graph.graph.nodes:
                if node.target is torch.ops.aten.convolution_backward.default:
                    counts["weight gradients"] += bool(node.args[-1][1])
                elif node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                    counts["products"] += 1
            self.backward.append(counts)
            return self.counted(graph)

        return aot_autograd(fw_compiler=forward, bw_compiler=backward)


@pytest.fixture(autouse=True)
def reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(name: str) -> tuple[nn.Module, Any, Graphs]:
    """(model, the same model compiled, its graphs); with fullgraph a graph break is an error."""
    torch.manual_seed(0)
    model, graphs = timm.create_model(name, num_classes=5, **MODELS[name]).double().train(), Graphs()
    return model, torch.compile(model, backend=graphs.backend(), fullgraph=True), graphs


CASES = [*((name, 1) for name in MODELS), ("vit_tiny_patch16_224", 2)]


@pytest.mark.parametrize(("name", "groups"), [*CASES, pytest.param("resnet10t", 2, marks=pytest.mark.slow)])
def test_two_graphs_and_equal_weights(name: str, groups: int) -> None:
    """Four steps: two graphs, no recompilation, and what the eager loop over the groups does (1e-9: four steps amplify
    another order of summation; one step is held to 1e-10 in test_two_pass)."""
    model, fast, graphs = build(name)
    twin = copy.deepcopy(model)
    opt, eager = (optimizer_of(m, "samon-layerl2", lr=0.01, rho=0.2) for m in (model, twin))
    data = batch(4, image=64)
    for _ in range(4):
        graphs.flops = 0
        update(opt, loss_of(fast, *data), groups=groups)
        update(eager, *losses_of(twin, *data, groups))
        assert graphs.forward == len(graphs.backward) == 2
    assert counters["stats"]["unique_graphs"] == 2
    step = graphs.flops
    assert_same(model, twin, 1e-9)
    ascent, descent = graphs.backward
    assert ascent["weight gradients"] == 0
    assert descent["weight gradients"] == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    # Every linear layer has one product for its input's gradient and one for its weight's.
    assert descent["products"] - ascent["products"] == sum(isinstance(m, nn.Linear) for m in model.modules())

    # A plain step on the same compiled model is a plain one and invalidates no graph; after groups it has its own.
    graphs.flops = 0
    for m in (fast, twin):
        m.zero_grad()
        loss_of(m, *data)().backward()
    assert_gradients(model, gradients(twin), 1e-9)
    assert 1.6 < step / graphs.flops <= 1.67
    update(opt, loss_of(fast, *data), groups=groups)
    assert graphs.forward == (2 if groups == 1 else 3)


def test_replay_runs_the_model_eagerly() -> None:
    """Compiled graphs do not contain replaced layers, so they are not used, and stay valid."""
    model, fast, _ = build("vit_tiny_patch16_224")
    opt = optimizer_of(model, rho=0.5, perturb=r"blocks\.1")
    data = batch(4, image=64)
    plain = loss_of(fast, *data)().item()
    for _ in range(3):
        grads = []
        for m in (fast, model):
            opt.zero_grad()
            samon.two_pass(opt, loss_of(m, *data))
            grads.append(gradients(model))
        for name, g in grads[0].items():
            torch.testing.assert_close(g, grads[1][name], rtol=1e-9, atol=1e-11)
    assert loss_of(fast, *data)().item() == pytest.approx(plain, rel=1e-12)


# -- the arithmetic of the perturbation (SAM.compile) ------------------------------------------------------------------
def train_both(name: str, backend: str, steps: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A network after this many steps with compiled arithmetic, and one after as many with the eager one."""
    (model, opt), (twin, eager) = make(ShallowNet, name), make(ShallowNet, name)
    opt.compile(backend)
    for _ in range(steps):
        for o, m in ((opt, model), (eager, twin)):
            update(o, loss_of(m, *batch()), **options)
    assert opt.stats.keys() == eager.stats.keys()
    return model, twin


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("geometry", reference.GEOMETRIES)
def test_compiled_arithmetic_equals_the_eager_one(geometry: str, groups: int) -> None:
    """The same kernels in the same order: bit for bit. Four steps make one graph of the ascent, and one each of adding
    and of copying back, which groups do without."""
    assert_same(*train_both(f"samon-{geometry}".strip("-"), "aot_eager", 4, groups=groups))
    assert counters["stats"]["unique_graphs"] == (3 if groups == 1 else 1)
    assert not counters["graph_break"]


@pytest.mark.parametrize(("radius", "groups"), [("ball", 1), ("raw", 1), ("loss", 1), (0.5, 2)])
def test_a_schedule_of_rho_recompiles_once(radius: str | float, groups: int) -> None:
    """When rho first changes, it becomes an input of the graph; the results stay the eager ones, also at 0 and 1."""
    (model, opt), (twin, eager) = (make(ShallowNet, "samon-layerl2", radius=radius) for _ in range(2))
    opt.compile("aot_eager")
    for rho in (0.0, 0.1, 0.3, 1.0, 0.0, 0.7):
        for o, m in ((opt, model), (eager, twin)):
            o.rho = rho
            update(o, loss_of(m, *batch()), groups=groups)
    assert_same(model, twin)
    assert counters["stats"]["unique_graphs"] == (4 if groups == 1 else 2)


@pytest.mark.slow
def test_inductor() -> None:
    """Fused loops sum in another order: 1e-12 in float64 for one step, 1e-9 after three."""
    assert_same(*train_both("samon-layerl2", "inductor", 3), 1e-9)
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("bn_stats", ["first", "both"])
def test_inductor_with_groups(bn_stats: str) -> None:
    """A compiled backward reuses memory of its forward; the running statistics must not come from it."""
    (model, opt), (twin, eager) = (make(lambda: BatchNormNet(depth=0)) for _ in range(2))
    for o, m in ((opt, torch.compile(model)), (eager, twin)):
        update(o, loss_of(m, *batch()), groups=2, bn_stats=bn_stats)
    assert_same(model, twin, 1e-9)


def test_a_random_subset_is_refused() -> None:
    """Another ascent graph at each update: one step took 40 times a plain one's time."""
    with pytest.raises(UserError, match=r"--esam-beta.* would be recompiled each time; drop it or --torchcompile"):
        make(ShallowNet, esam_beta=0.5)[1].compile()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch's own wrapper around `step`
@pytest.mark.parametrize("closure", [False, True])
def test_a_compiled_training_step(closure: bool) -> None:
    (model, opt), (twin, other) = make(ShallowNet), make(ShallowNet)

    @torch.compile(backend="eager")
    def step() -> None:
        loss = loss_of(model, *batch())
        opt.step(closure_of(opt, loss)) if closure else update(opt, loss)

    for _ in range(2):
        step()
        update(other, loss_of(twin, *batch()))
    assert_same(model, twin, 1e-10)
