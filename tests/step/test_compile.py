"""torch.compile on the CPU: two graphs, no breaks, the ascent graph without weight gradients."""

import copy
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from timm.optim import create_optimizer_v2
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import samon

NETS = {"resnet10t": {}, "vit_tiny_patch16_224": {"img_size": 64, "depth": 2}}


class Graphs:
    """A compiler backend that runs graphs as they are and keeps what the backward ones contain."""

    def __init__(self) -> None:
        self.forward = 0
        self.backward: list[Counter[str]] = []

    def backend(self):
        def forward(graph, inputs):
            self.forward += 1
            return make_boxed_func(graph)

        def backward(graph, inputs):
            counts: Counter[str] = Counter()
            for node in graph.graph.nodes:
                if node.target is torch.ops.aten.convolution_backward.default:
                    counts["weight gradients"] += bool(node.args[-1][1])
                elif node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                    counts["products"] += 1
            self.backward.append(counts)
            return make_boxed_func(graph)

        return aot_autograd(fw_compiler=forward, bw_compiler=backward)


@pytest.fixture
def compiled(request):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=5, **NETS[request.param]).train()
    graphs = Graphs()
    # fullgraph: a graph break would be an error.
    yield model, torch.compile(model, backend=graphs.backend(), fullgraph=True), graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", NETS, indirect=True)
def test_two_graphs_and_equal_gradients(compiled) -> None:
    model, fast, graphs = compiled
    twin = copy.deepcopy(model)
    opt, plain = (create_optimizer_v2(m, "samon-layerl2", lr=0.1, rho=0.5) for m in (model, twin))
    x, y = torch.randn(4, 3, 64, 64), torch.randint(5, (4,))
    for step in range(4):
        for o, m in ((opt, fast), (plain, twin)):
            o.zero_grad()
            samon.two_pass(o, lambda m=m: F.cross_entropy(m(x), y))
            o.step()
        assert graphs.forward == len(graphs.backward) == 2, step
    # Unfused graphs run the same kernels: 1e-4 only bounds what four steps could amplify of another summation order.
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", NETS, indirect=True)
def test_ascent_graph_has_no_weight_gradients(compiled) -> None:
    model, fast, graphs = compiled
    opt = create_optimizer_v2(model, "samon", lr=0.1)
    x, y = torch.randn(4, 3, 64, 64), torch.randint(5, (4,))
    samon.two_pass(opt, lambda: F.cross_entropy(fast(x), y))
    ascent, descent = graphs.backward
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    linears = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert ascent["weight gradients"] == 0
    assert descent["weight gradients"] == convolutions
    # Every linear layer has one product for its input's gradient and one for its weight's.
    assert descent["products"] - ascent["products"] == linears


@pytest.mark.parametrize("compiled", ["vit_tiny_patch16_224"], indirect=True)
@pytest.mark.parametrize("options", [{"groups": 2}, {"perturb": r"blocks\.1"}], ids=str)
def test_groups_and_replay_run_the_model_eagerly(compiled, options: dict) -> None:
    """Compiled graphs know nothing of replaced layers, so they must not be used; nor must they be spoilt."""
    model, fast, _ = compiled
    options = dict(options)
    perturb = options.pop("perturb", None)
    opt = create_optimizer_v2(model, "samon", lr=0.1, rho=0.5, perturb=perturb)
    x, y = torch.randn(4, 3, 64, 64), torch.randint(5, (4,))
    plain = F.cross_entropy(fast(x), y).item()
    for _ in range(3):
        grads = []
        for m in (fast, model):
            opt.zero_grad()
            samon.two_pass(opt, lambda m=m: F.cross_entropy(m(x), y), **options)
            grads.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert F.cross_entropy(fast(x), y).item() == pytest.approx(plain, rel=1e-6)
