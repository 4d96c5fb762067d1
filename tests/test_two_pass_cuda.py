"""The two-pass step on a GPU: exactness, no host synchronization, CUDA graphs, fused optimizers, skipped updates.

Everything is float64 where values are compared, so only the order of summation differs from the CPU: tolerance 1e-9.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samon
from tests import reference
from tests.engines.test_ascent import SOURCES, UPDATES, assert_close, losses, train
from tests.engines.test_cuda_graph import RUNS
from tests.nets import NETS, BatchNormNet, LayerNormNet, batch
from tests.steps import RHO, assert_same, loss_of, losses_of, make, optimizer_of, update, values
from tests.test_two_pass import ENGINES, check_engine

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
    # The compiler imports deprecated modules; autograd threads meet a device without a context.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


def on_gpu(net: Callable[[], nn.Module], name: str, **options: Any) -> tuple[nn.Module, Any]:
    """(network, optimizer) of tests.steps.make on the GPU."""
    model = make(net)[0].cuda()
    return model, optimizer_of(model, name, **options)


def data(size: int = 8, seed: int = 1) -> list[Tensor]:
    return [t.cuda() for t in batch(size, seed=seed)]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("geometry", reference.GEOMETRIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_equals_the_reference_on_the_cpu(engine: str, geometry: str, net: str) -> None:
    check_engine(engine, "samon", geometry, net, device="cuda", tolerance=1e-9)


@pytest.mark.parametrize("source", SOURCES)
def test_every_ascent_source_equals_the_reference_on_the_cpu(source: str) -> None:
    twin = make(BatchNormNet)[0]
    model, opt = on_gpu(BatchNormNet, "samon-layerl2-momentum", ascent=source, momentum=0.9)
    names = reference.scope_names(twin, "samon")
    reference.ascent_training(twin, losses(twin, 2), names, "layerl2", RHO, source)
    train(opt, [losses_of(model, *data(seed=10 + t), 2) for t in range(UPDATES)])
    assert_close(model.cpu(), twin)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 4},
        {"bn_stats": "both", "same_noise": True},
        {"perturb": "layer4"},
        {"radius": "raw"},
        {"radius": "loss"},
        *({"ascent": source} for source in SOURCES if source not in ("batch", "aesam")),  # aesam decides on the host
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["samon", "samon-layerl2-adamw", "sam-fisher", "sam-elemlinf"])
def test_no_host_synchronization(name: str, options: dict[str, Any]) -> None:
    options = dict(options)
    if "groups" in options and not name.startswith("samon"):
        pytest.skip("groups are for scope samon")
    model = timm.create_model("resnet18", num_classes=5).cuda().train()
    of_optimizer = {key: options.pop(key) for key in ("perturb", "radius", "ascent") if key in options}
    opt = optimizer_of(model, name, **of_optimizer)
    scaler = torch.amp.GradScaler("cuda")
    x, y = torch.randn(8, 3, 64, 64, device="cuda"), torch.randint(5, (8,), device="cuda")

    def forward() -> Tensor:
        with torch.autocast("cuda", torch.float16):
            return F.cross_entropy(model(x), y)

    for _ in range(3):
        samon.two_pass(opt, forward, scaler=scaler, **options)
        opt.step()
        opt.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        samon.two_pass(opt, forward, scaler=scaler, **options)
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("update", RUNS, ids=lambda f: f.__name__)
def test_cuda_graphs_equal_eager_training(update: Any) -> None:
    """Model and arithmetic compiled to CUDA graphs, whose memory the next run overwrites."""
    torch._dynamo.reset()
    (model, opt), (twin, eager) = (on_gpu(BatchNormNet, "samon-fisher") for _ in range(2))
    fast = torch.compile(lambda x, y: F.cross_entropy(model(x), y), mode="reduce-overhead")
    opt.compile("inductor", "reduce-overhead")
    for seed in range(4):  # the second run captures, the third replays
        x, y = data(seed=seed)
        for o, f in ((opt, fast), (eager, lambda x, y: F.cross_entropy(twin(x), y))):
            o.zero_grad()
            update(o, f, x, y)
            o.step()
    assert_same(model, twin, 1e-9)


@pytest.mark.parametrize("scope", ["sam", "samon"])
def test_a_compiled_step_equals_an_eager_one(scope: str) -> None:
    torch._dynamo.reset()
    (model, opt), (twin, eager) = (on_gpu(LayerNormNet, f"{scope}-layerl2") for _ in range(2))
    fast = torch.compile(model)
    opt.compile("inductor")
    for seed in range(3):
        x, y = data(seed=seed)
        for o, m in ((opt, fast), (eager, twin)):
            update(o, loss_of(m, x, y))
    assert_same(model, twin, 1e-9)


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_fused_optimizers_equal_the_loop(name: str) -> None:
    def trained(**options: Any) -> nn.Module:
        model, opt = on_gpu(
            LayerNormNet, f"samon-{name}", **({"momentum": 0.9} if name == "momentum" else {}), **options
        )
        for seed in range(3):
            update(opt, loss_of(model, *data(seed=seed)))
        return model

    assert_same(trained(fused=True), trained(foreach=False), 1e-9)


def test_an_update_that_overflows_is_skipped() -> None:
    """The GradScaler skips it, halves its scale, and the next update goes through."""
    model, opt = on_gpu(LayerNormNet, "samon-adamw")
    model.float()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    before, (x, y) = copy.deepcopy(values(model)), data()
    for factor, skipped in ((1e38, True), (1.0, False)):
        update(opt, lambda: loss_of(model, x.float(), y)() * factor, scaler=scaler)  # noqa: B023
        assert scaler.get_scale() == 2.0**7
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) == skipped
