"""The two-pass step: every engine against naive float64 loops, its arguments, its cost, and what it refuses."""

import copy
import re
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import samon
from samon import UserError
from samon.engines.replay import PLANS
from tests import reference
from tests.nets import LATE, NETS, BatchNormNet, LayerNormNet, OwnBatchNorm, batch, parametrized_norms, randomized
from tests.steps import (
    RHO,
    Forward,
    assert_gradients,
    assert_same,
    assert_unchanged,
    closure_of,
    count_flops,
    loss_of,
    losses_of,
    make,
    optimizer_of,
    same,
    two_steps,
    update,
    values,
)


def accumulate(opt: Any, forwards: list) -> Tensor:
    return torch.stack([samon.two_pass(opt, forward, loss_scale=1 / len(forwards)) for forward in forwards]).mean()


# Name: the step of (optimizer, network, x, y), the number of sub-batches, and whether these share one perturbation.
ENGINES: dict[str, Any] = {
    "WholeBatch": (lambda opt, *data: samon.two_pass(opt, loss_of(*data)), 1, True),
    "PerGroup, m = 4": (lambda opt, *data: samon.two_pass(opt, loss_of(*data), groups=2), 2, False),
    "PerGroup, m = 1": (lambda opt, *data: samon.two_pass(opt, loss_of(*data), groups=8), 8, False),
    "Replay": (lambda opt, *data: samon.two_pass(opt, loss_of(*data)), 1, True),
    "accumulated": (lambda opt, *data: accumulate(opt, losses_of(*data, 4)), 4, False),
    "micro-batches": (lambda opt, *data: samon.two_pass(opt, losses_of(*data, 4)), 4, True),
}


def freeze(model: nn.Module) -> nn.Module:
    """Only the head is trained."""
    model.requires_grad_(False).head.requires_grad_(True)
    return model


def check_engine(
    engine: str,
    scope: str,
    geometry: str,
    net: str,
    frozen: bool = False,
    device: str = "cpu",
    tolerance: float = 1e-10,
) -> None:
    """Two steps equal the naive loop on the CPU, up to float64 sums in another order."""
    step, parts, shared = ENGINES[engine]
    perturb = LATE[net] if engine == "Replay" else None
    twin, _ = make(NETS[net])
    model = copy.deepcopy(twin).to(device)
    if frozen:
        freeze(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    opt = optimizer_of(model, f"{scope}-{geometry}".strip("-"), perturb=perturb, perturb_frozen=frozen)
    before, data = values(model), [t.to(device) for t in batch()]
    if "PerGroup" in engine and scope != "samon":
        with pytest.raises(UserError, match=f"scope {scope}.*loop over the sub-batches"):
            step(opt, model, *data)
        return
    names = [name for name in reference.scope_names(twin, scope) if re.search(perturb or "", name)]
    gradient = reference.sam_gradient if shared else reference.m_sharpness_gradient
    clean, expected = gradient(twin, losses_of(twin, *batch(), parts), names, geometry, RHO)
    for _ in range(2):  # the first step of Replay records, the second replays
        opt.zero_grad()
        loss = step(opt, model, *data)
        assert loss.item() == pytest.approx(clean, rel=tolerance)
        assert not loss.requires_grad
        assert_gradients(model, {name: expected[name].to(device) for name in trained}, tolerance)
        assert opt.stats["loss_perturbed"] > opt.stats["loss"]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad == (name in trained)
    assert engine != "Replay" or PLANS[opt].prefix


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("geometry", reference.GEOMETRIES)
@pytest.mark.parametrize("scope", ["sam", "samon", "samnn"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_equals_the_reference(engine: str, scope: str, geometry: str, net: str) -> None:
    """The specification of the step."""
    check_engine(engine, scope, geometry, net)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("scope", "geometry"), [("samon", "layerl2"), ("sam", "fisher"), ("samnn", "elemlinf")])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradient_does_not_depend_on_what_is_frozen(engine: str, scope: str, geometry: str, net: str) -> None:
    """`perturb_frozen=True`: that of the trained parameters is the unfrozen model's; the others have none."""
    check_engine(engine, scope, geometry, net, frozen=True)


def test_a_source_records_frozen_parameters_over_micro_batches() -> None:
    states = []
    for frozen in (True, False):
        model, _ = make()
        opt = optimizer_of(freeze(model) if frozen else model, perturb_frozen=frozen, ascent="fsam")
        update(opt, *losses_of(model, *batch(), 2))
        states.append([*opt.ascent.state.values()])
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-12)


def test_ascent_from_a_part_of_the_batch() -> None:
    """Running statistics are those of the whole batch."""
    (model, opt), (twin, other), (probe, _) = (make(BatchNormNet) for _ in range(3))
    x, y = batch()
    part = loss_of(twin, x[:2], y[:2])
    with other.perturbed(torch.autograd.grad(part(), list(other.perturbed_parameters().values()))):
        loss_of(twin, x, y)().backward()
    loss = samon.two_pass(opt, loss_of(model, x, y), ascent_forward=loss_of(model, x[:2], y[:2]))
    assert loss.item() == pytest.approx(part().item(), rel=1e-12)
    assert_gradients(model, {n: p.grad for n, p in twin.named_parameters()})
    probe(x)
    torch.testing.assert_close(model.bn.running_mean, probe.bn.running_mean, rtol=1e-12, atol=0)
    assert model.bn.num_batches_tracked == 1
    bare = optimizer_of(list(model.parameters()), "sam")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="ascent_forward must know the BatchNorm layers"):
        samon.two_pass(bare, loss_of(model, x, y), ascent_forward=loss_of(model, x[:2], y[:2]))


@pytest.mark.parametrize("name", ["sam", "samon-layerl2"])
def test_cached_parametrizations_follow_the_weights(name: str) -> None:
    """`parametrize.cached` around a step: the second pass must compute its tensors anew, from w + eps."""
    ends = []
    for context in (nullcontext, parametrize.cached):
        model, opt = make(lambda: parametrized_norms(LayerNormNet()), name)
        with context():
            samon.two_pass(opt, loss_of(model, *batch()))
            opt.step(closure_of(opt, loss_of(model, *batch(seed=2))))
        ends.append(values(model))
    assert same(*ends)


# -- buffers and noise -------------------------------------------------------------------------------------------------
WITH_BUFFERS = {
    **{way: lambda way=way: OwnBatchNorm(3, way) for way in ("in place", "replaced", ".data")},
    "BatchNormAct2d": lambda: BatchNormAct2d(3),
    "cumulative average": lambda: nn.BatchNorm2d(3, momentum=None),
    "no statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "EvoNorm2dB0": lambda: EvoNorm2dB0(3),
    "spectral_norm": lambda: spectral_norm(nn.Conv2d(3, 3, 3)),
    "spectral_norm, old": lambda: nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)),
}


@pytest.mark.parametrize("way", ["first", "second", "both", "closure", "bare", "bare closure", "bare first_step"])
@pytest.mark.parametrize("layer", WITH_BUFFERS)
def test_every_buffer_is_written_by_the_pass_of_bn_stats(layer: str, way: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 3, 3), nn.GroupNorm(1, 3), WITH_BUFFERS[layer](), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(3, 5)).double().train()
    twin, probe = copy.deepcopy(model), copy.deepcopy(model)
    opt = create_optimizer_v2(model.parameters() if "bare" in way else model, "sam", lr=0.0, rho=RHO)
    other = optimizer_of(twin, "sam")
    x, y = batch()
    for _ in range(2):
        if "closure" in way:
            opt.step(closure_of(opt, loss_of(model, x, y)))
        elif "first_step" in way:
            two_steps(opt, loss_of(model, x, y))
        else:
            samon.two_pass(opt, loss_of(model, x, y), bn_stats="first" if way == "bare" else way)
        probe.load_state_dict(twin.state_dict())
        grads = torch.autograd.grad(F.cross_entropy(probe(x), y), list(probe.parameters()))
        if way != "second":
            twin(x)
        if way in ("second", "both"):
            with other.perturbed(grads):
                twin(x)
    for (name, got), want in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("bn_stats", ["first", "second"])
def test_an_exception_in_the_second_pass(bn_stats: str) -> None:
    """One pass counts in the statistics: the first, or the broken second one, as in a plain forward."""
    model, opt = make(BatchNormNet)
    x, y = batch()
    weights, calls = copy.deepcopy(dict(model.named_parameters())), []

    def forward() -> Tensor:
        calls.append(1)
        loss = F.cross_entropy(model(x), y)
        if len(calls) == 2:
            raise RuntimeError("second pass")
        return loss

    with pytest.raises(RuntimeError, match="second pass"):
        samon.two_pass(opt, forward, bn_stats=bn_stats)
    assert model.bn.num_batches_tracked == 1
    assert all(torch.equal(p, weights[n]) and p.requires_grad for n, p in model.named_parameters())


@pytest.mark.parametrize("same", [True, False])
def test_same_noise(same: bool) -> None:
    model, opt = make(lambda: LayerNormNet(dropout=0.5))
    masks: list[Tensor] = []
    model.drop.register_forward_hook(lambda module, args, out: masks.append(out == 0))
    samon.two_pass(opt, loss_of(model, *batch()), same_noise=same)
    assert all(torch.equal(a, b) for a, b in zip(masks[:4], masks[4:], strict=True)) == same


# -- cost --------------------------------------------------------------------------------------------------------------


@cache
def on_meta(name: str) -> tuple[nn.Module, Forward, int]:
    """(model on the meta device, its loss, the FLOPs of a plain step)."""
    with torch.device("meta"):
        model = timm.create_model(name).train()
        forward = loss_of(model, torch.empty(8, 3, 224, 224), torch.empty(8, dtype=torch.long))
    return model, forward, count_flops(lambda: forward().backward())


LAST_THIRD = r"blocks\.(8|9|10|11)\.|^norm"


@pytest.mark.parametrize(
    ("model", "name", "options", "bound"),
    [
        ("resnet50", "sam", {}, 2.00),
        ("resnet50", "samon", {}, 1.67),
        ("resnet50", "samon-layerl2", {"groups": 8}, 1.70),
        ("resnet50", "samon", {"perturb": "layer4"}, 1.13),
        ("resnet50", "samon", {"perturb": "layer4", "replay": False}, 1.39),
        ("vit_small_patch32_224", "sam", {}, 2.00),
        ("vit_small_patch32_224", "samon", {}, 1.67),
        ("vit_small_patch32_224", "samon", {"groups": 8}, 1.70),
        ("vit_small_patch32_224", "samon", {"perturb": LAST_THIRD}, 1.24),
    ],
)
def test_cost_over_a_plain_step(model: str, name: str, options: dict, bound: float) -> None:
    """Exact operation counts."""
    net, forward, plain = on_meta(model)
    options = dict(options)
    opt = optimizer_of(net, name, perturb=options.pop("perturb", None))
    for _ in range(2 * opt.selection.narrowed):  # what is replayed is recorded, then verified
        samon.two_pass(opt, forward, **options)
    assert bound - 0.05 < count_flops(lambda: samon.two_pass(opt, forward, **options)) / plain <= bound


# -- unusual models ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ascent", ["batch", "fsam", "looksam:2", "previous"])
@pytest.mark.parametrize("closure", [False, True])
def test_sparse_gradients(closure: bool, ascent: str) -> None:
    """As with dense ones; the last row is in no sample."""
    torch.manual_seed(0)
    sparse, dense = (
        nn.Sequential(nn.Embedding(9, 4, sparse=bool(s)), nn.Flatten(), nn.Linear(12, 5)).double() for s in (1, 0)
    )
    dense.load_state_dict(sparse.state_dict())
    x, y = torch.randint(8, (6, 3)), torch.randint(5, (6,))
    for model in (sparse, dense):
        opt = optimizer_of(model, "sam", ascent=ascent)
        for _ in range(4):
            if closure:
                opt.step(closure_of(opt, loss_of(model, x, y)))
            else:
                update(opt, [loss_of(model, x, y), loss_of(model, x[:3], y[:3])])
    assert_same(sparse, dense, 1e-12)


class Complex(nn.Module):
    """A complex layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 16, 5, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, :4, :4].flatten(1).to(torch.complex128) @ self.weight).abs()


class Pairs(Complex):
    """The same numbers as pairs of real ones."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.view_as_real(weight.detach()).clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, :4, :4].flatten(1).to(torch.complex128) @ torch.view_as_complex(self.weight)).abs()


@pytest.mark.parametrize("kwargs", [{}, {"ascent": "looksam:2"}, {"ascent": "fsam"}, {"gsam_alpha": 0.3}], ids=str)
@pytest.mark.parametrize("name", ["sam", "sam-layerl2"])
def test_complex_weights_are_pairs_of_real_ones(name: str, kwargs: dict) -> None:
    torch.manual_seed(0)
    model = Complex()
    pairs = Pairs(model.weight)
    for m in (model, pairs):
        opt = optimizer_of(m, name, **kwargs)
        for _ in range(4):
            update(opt, loss_of(m, *batch()))
    torch.testing.assert_close(torch.view_as_real(model.weight), pairs.weight, rtol=1e-12, atol=1e-13)


def test_bare_parameters_of_a_compiled_model() -> None:
    """Its modules are recorded in an eager first step, without a warning of torch."""
    model = randomized(BatchNormNet())
    opt = create_optimizer_v2(model.parameters(), "sam", lr=0.1)
    for _ in range(2):
        samon.two_pass(opt, loss_of(torch.compile(model, backend="eager"), *batch()))
    assert model.bn.num_batches_tracked == 2


# -- wrong uses --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bn_stats": "none"}, "bn_stats must be 'first', 'second' or 'both'"),
        ({"reduce": "mean"}, "reduce must be 'device' or 'global'"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"groups": 2, "reduce": "global"}, "does not combine with reduce='global'"),
        ({"groups": 2, "ascent_forward": lambda: None}, "does not combine with .*ascent_forward"),
        ({"forward": []}, "empty sequence"),
    ],
)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    model, opt = make()
    with pytest.raises(UserError, match=message):
        samon.two_pass(opt, **{"forward": loss_of(model, *batch())} | kwargs)
    assert all(p.grad is None for p in model.parameters())


def test_an_optimizer_without_sharpness_is_refused() -> None:
    model = randomized(BatchNormNet())
    with pytest.raises(UserError, match="two_pass needs one of samon's optimizers, got SGD"):
        samon.two_pass(torch.optim.SGD(model.parameters(), 0.1), loss_of(model, *batch()))


@pytest.mark.parametrize("ascent", ["batch", "previous"])
@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (torch.ones(()), r"function that two_pass calls in each pass.*got Tensor"),
        (None, "function that two_pass calls in each pass.*got NoneType"),
        ([torch.ones(())], "function that two_pass calls in each pass.*got Tensor"),
        (lambda loss, logits: (loss, logits), "mean loss and nothing else.*got tuple"),
        (lambda loss, logits: logits, r"mean loss and nothing else.*got a tensor of shape \[8, 5\]"),
        (lambda loss, logits: loss.item(), "mean loss and nothing else.*got float"),
        (lambda loss, logits: (loss.backward(), loss)[1], "must not run backward"),
        (lambda loss, logits: loss.detach(), "no parameter that samon perturbs.*with its graph attached"),
    ],
)
def test_a_forward_that_returns_no_loss_is_refused(forward: Any, text: str, ascent: str) -> None:
    model, opt = make(ascent=ascent)
    x, y = batch()

    def call() -> Any:
        logits = model(x)
        return forward(F.cross_entropy(logits, y), logits)

    wrong = call if callable(forward) and not isinstance(forward, Tensor) else forward
    before = values(model)
    with pytest.raises(UserError, match=text):
        samon.two_pass(opt, wrong)
    if ascent == "batch" and wrong is not None:
        with pytest.raises(UserError, match=text):
            samon.two_pass(opt, loss_of(model, x, y), ascent_forward=wrong)
    assert_unchanged(model, before)


class MomentumEncoder(nn.Module):
    """A frozen copy that every forward moves towards the network, by `way`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net, self.way = randomized(LayerNormNet()), way
        self.copy = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for p, q in zip(self.copy.parameters(), self.net.parameters(), strict=True):
                if self.way == "replaced":
                    p.data = p.data.lerp(q.data, 0.1)
                else:
                    (p if self.way == "in place" else p.data).lerp_(q, 0.1)
        return self.net(x)


def stepping_in_backward() -> nn.Module:
    model = randomized(LayerNormNet())
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: torch.optim.SGD([p], lr=0.1).step())
    return model


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(
    "build",
    [*(partial(MomentumEncoder, way) for way in ("in place", "data in place", "replaced")), stepping_in_backward],
    ids=["in place", "data in place", "replaced", "optimizer in backward"],
)
def test_a_pass_that_changes_weights_is_refused(build: Any, closure: bool) -> None:
    model = build()
    opt, loss = optimizer_of(model, "sam"), loss_of(model, *batch())
    with pytest.raises(UserError, match=r"changes \w+\.\w+, and the other pass would change it again"):
        opt.step(closure_of(opt, loss)) if closure else samon.two_pass(opt, loss)


class Initializing(nn.Module):
    """Sets its parameters from the first batch, and limits them in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.fixed = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.eye(4).to_sparse(), False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.shift.any():
            self.shift.data = -x.detach().mean(0)
        with torch.no_grad():
            self.shift.clamp_(-9, 9)
        return torch.sparse.mm(self.fixed, (x + self.shift).T).T


@pytest.mark.parametrize("closure", [False, True])
def test_layers_may_initialize_parameters_from_the_first_batch(closure: bool) -> None:
    model = nn.Sequential(Initializing(), nn.LayerNorm(4), nn.Linear(4, 5)).double()
    opt, loss = optimizer_of(model, "samon"), loss_of(model, torch.randn(3, 4).double(), torch.arange(3))
    for _ in range(2):
        opt.step(closure_of(opt, loss)) if closure else samon.two_pass(opt, loss)
        assert opt.stats["eps_norm"].item() == pytest.approx(opt.rho)


def test_embeddings_may_renormalize_themselves() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.1), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 5)).double()
    opt = optimizer_of(model, "sam")
    samon.two_pass(opt, loss_of(model, torch.arange(9).view(3, 3), torch.arange(3)))
    assert opt.stats["eps_norm"].item() == pytest.approx(opt.rho)


def test_a_graph_from_outside_is_refused() -> None:
    model, opt = make()
    loss = loss_of(model, *batch())()
    with pytest.raises(UserError, match="graph that was built outside"):
        samon.two_pass(opt, lambda: loss)


@pytest.mark.parametrize("name", ["sam", "sam-elemlinf", "sam-fisher", "sam-random", "ssam-f", "ssam-d"])
def test_perturbed_parameters_on_two_devices_are_refused(name: str) -> None:
    model = nn.ModuleDict({"here": nn.Linear(2, 2), "there": nn.Linear(2, 2, device="meta")})
    opt = optimizer_of(model, name)
    grads = [torch.ones_like(p) for p in model.parameters()]
    with pytest.raises(UserError, match=r"on cpu and meta.*one device"), opt.perturbed(grads):
        pass


@pytest.mark.parametrize("groups", [1, 4])
def test_no_grad_around_the_step_changes_nothing(groups: int) -> None:
    (one, opt), (two, other) = make(), make()
    with torch.no_grad():
        samon.two_pass(opt, loss_of(one, *batch()), groups=groups)
    samon.two_pass(other, loss_of(two, *batch()), groups=groups)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert not p.grad.requires_grad


def test_inference_mode_around_the_step_is_refused() -> None:
    model, opt = make()
    with torch.inference_mode():
        for step in (lambda f: samon.two_pass(opt, f), lambda f: opt.step(closure_of(opt, f))):
            with pytest.raises(UserError, match=r"under torch\.inference_mode"):
                step(loss_of(model, *batch()))
