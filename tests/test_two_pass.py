"""The two-pass step against naive loops. Tolerance 1e-10 relative: float64 sums in another order."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, EvoNorm2dB0, set_reentrant_ckpt
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

import samon
from samon import UserError
from tests import reference
from tests.nets import NETS, BatchNormNet, LayerNormNet, batch, randomized

RHO = 0.3


def setup(net, name: str, **kwargs):
    torch.manual_seed(0)
    model = randomized(net())
    return model, create_optimizer_v2(model, name, lr=0.1, rho=RHO, **kwargs)


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor):
    return lambda: F.cross_entropy(model(x), y)


def assert_gradients(model: nn.Module, expected: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    """Relative to the whole gradient: a bias in front of BatchNorm has a gradient of rounding noise only."""
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).norm() <= tolerance * size, name


@pytest.mark.parametrize("geometry", reference.GEOMETRIES)
@pytest.mark.parametrize("scope", ["sam", "samon", "samnn"])
@pytest.mark.parametrize("net", NETS.values())
def test_against_reference(net, scope: str, geometry: str) -> None:
    model, opt = setup(net, f"{scope}-{geometry}".strip("-"))
    x, y = batch()
    twin = copy.deepcopy(model)
    clean, expected = reference.sam_gradient(
        twin, [loss_of(twin, x, y)], reference.scope_names(twin, scope), geometry, RHO
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = samon.two_pass(opt, loss_of(model, x, y))
    assert loss.item() == pytest.approx(clean, rel=1e-12)
    assert not loss.requires_grad
    assert_gradients(model, expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert opt.stats["loss_perturbed"] > opt.stats["loss"]


def test_gradients_accumulate_and_the_ascent_pass_leaves_none() -> None:
    model, opt = setup(LayerNormNet, "samon")
    x, y = batch()
    samon.two_pass(opt, loss_of(model, x, y))
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    samon.two_pass(opt, loss_of(model, x, y))
    assert_gradients(model, {n: 2 * g for n, g in once.items()}, 1e-14)


@pytest.mark.parametrize("geometry", ["", "fisher"])
def test_accumulation_with_one_perturbation_each(geometry: str) -> None:
    """K micro-batches with loss_scale 1/K: m-sharpness with m = micro-batch. Fisher sees unscaled gradients."""
    model, opt = setup(LayerNormNet, f"samon-{geometry}".strip("-"))
    x, y = batch(9)
    twin = copy.deepcopy(model)
    losses = [loss_of(twin, a, b) for a, b in zip(x.chunk(3), y.chunk(3), strict=True)]
    names = reference.scope_names(twin, "samon")
    _, expected = reference.m_sharpness_gradient(twin, losses, names, geometry, RHO)
    for a, b in zip(x.chunk(3), y.chunk(3), strict=True):
        samon.two_pass(opt, loss_of(model, a, b), loss_scale=1 / 3)
    assert_gradients(model, expected)


@pytest.mark.parametrize("net", NETS.values())
def test_several_forwards_share_one_perturbation(net) -> None:
    model, opt = setup(net, "samon-layerl2")
    x, y = batch(9)
    twin = copy.deepcopy(model)
    losses = [loss_of(twin, a, b) for a, b in zip(x.chunk(3), y.chunk(3), strict=True)]
    names = reference.scope_names(twin, "samon")
    clean, expected = reference.sam_gradient(twin, losses, names, "layerl2", RHO)
    forwards = [loss_of(model, a, b) for a, b in zip(x.chunk(3), y.chunk(3), strict=True)]
    assert samon.two_pass(opt, forwards).item() == pytest.approx(clean, rel=1e-12)
    assert_gradients(model, expected)


@pytest.mark.parametrize("name", ["samon", "samon-fisher"])
def test_thirds_of_a_batch_climb_as_the_whole(name: str) -> None:
    """The mean gradient, not the sum: its direction alone would not tell, its norm and the Fisher geometry do."""
    x, y = batch(9)
    (model, opt), (twin, whole) = setup(LayerNormNet, name), setup(LayerNormNet, name)
    samon.two_pass(opt, [loss_of(model, a, b) for a, b in zip(x.chunk(3), y.chunk(3), strict=True)])
    samon.two_pass(whole, loss_of(twin, x, y))
    norms = [float(o.stats["ascent_grad_norm"]) for o in (opt, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    assert_gradients(model, {n: p.grad for n, p in twin.named_parameters()})


def test_ascent_from_a_part_of_the_batch() -> None:
    model, opt = setup(LayerNormNet, "samon")
    x, y = batch()
    twin = copy.deepcopy(model)
    twin_opt = create_optimizer_v2(twin, "samon", lr=0.1, rho=RHO)
    part = loss_of(twin, x[:2], y[:2])
    names = list(twin_opt.perturbed_parameters())
    grads = dict(zip(names, torch.autograd.grad(part(), twin_opt.perturbed_parameters().values()), strict=True))
    with twin_opt.perturbed(grads):
        loss_of(twin, x, y)().backward()
    loss = samon.two_pass(opt, loss_of(model, x, y), ascent_forward=loss_of(model, x[:2], y[:2]))
    assert loss.item() == pytest.approx(part().item(), rel=1e-12)
    assert_gradients(model, {n: p.grad for n, p in twin.named_parameters()})


class Norms(nn.Module):
    """timm's fused BatchNorm+activation, a cumulative average (momentum None) and one that tracks nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            BatchNormAct2d(4),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4, momentum=None),
            nn.Conv2d(4, 5, 3),
            nn.BatchNorm2d(5, track_running_stats=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean((2, 3))


@pytest.mark.parametrize("bn_stats", ["first", "second", "both"])
def test_running_statistics(bn_stats: str) -> None:
    model, opt = setup(Norms, "samon")
    x, y = batch()
    expected = copy.deepcopy(model)
    passes = []
    for _ in range(2):
        if bn_stats in ("first", "both"):
            expected(x)
        if bn_stats in ("second", "both"):
            twin_opt = create_optimizer_v2(expected, "samon", lr=0.1, rho=RHO)
            probe = copy.deepcopy(expected)
            names = list(twin_opt.perturbed_parameters())
            named = dict(probe.named_parameters())
            grads = torch.autograd.grad(F.cross_entropy(probe(x), y), [named[n] for n in names])
            with twin_opt.perturbed(grads):
                expected(x)
        samon.two_pass(opt, loss_of(model, x, y), bn_stats=bn_stats)
        passes.append(1)
    for (name, got), want in zip(model.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14, msg=name)
    count = 2 * len(passes) if bn_stats == "both" else len(passes)
    assert model.layers[1].num_batches_tracked == count


def test_running_statistics_after_an_exception() -> None:
    model, opt = setup(BatchNormNet, "samon")
    x, y = batch()
    buffers, weights = copy.deepcopy(dict(model.named_buffers())), copy.deepcopy(dict(model.named_parameters()))
    calls = []

    def forward() -> torch.Tensor:
        calls.append(1)
        loss = F.cross_entropy(model(x), y)
        if len(calls) == 2:
            raise RuntimeError("second pass")
        return loss

    with pytest.raises(RuntimeError, match="second pass"):
        samon.two_pass(opt, forward, bn_stats="second")
    # `second` undid the first pass; `num_batches_tracked` counts the broken second one, as a plain forward would.
    assert model.bn.num_batches_tracked == buffers["bn.num_batches_tracked"] + 1
    calls.clear()
    model.load_state_dict({**buffers}, strict=False)
    with pytest.raises(RuntimeError, match="second pass"):
        samon.two_pass(opt, forward, bn_stats="first")
    assert model.bn.num_batches_tracked == buffers["bn.num_batches_tracked"] + 1
    assert all(torch.equal(p, weights[n]) and p.requires_grad for n, p in model.named_parameters())


@pytest.mark.parametrize("same", [True, False])
def test_same_noise(same: bool) -> None:
    model, opt = setup(lambda: LayerNormNet(dropout=0.5), "samon")
    x, y = batch()
    masks = []
    model.drop.register_forward_hook(lambda m, args, out: masks.append(out == 0))
    torch.manual_seed(3)
    samon.two_pass(opt, loss_of(model, x, y), same_noise=same)
    first, second = masks[:4], masks[4:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) == same


@pytest.mark.parametrize("scope", ["sam", "samon"])
def test_no_host_synchronisation(scope: str) -> None:
    """Reading a tensor on the host dispatches aten::_local_scalar_dense; nothing in a step may."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    for net in NETS.values():
        for geometry in reference.GEOMETRIES:
            model, opt = setup(net, f"{scope}-{geometry}".strip("-"))
            x, y = batch()
            options = [{}, {"bn_stats": "both", "same_noise": True}] + ([{"groups": 4}] if scope == "samon" else [])
            for kwargs in options:
                with Reads() as reads:
                    samon.two_pass(opt, loss_of(model, x, y), **kwargs)
                assert reads.count == 0, (geometry, kwargs)
    with Reads() as reads:
        torch.ones(()).item()
    assert reads.count == 1


def test_gradient_checkpointing_composes() -> None:
    """timm's non-reentrant checkpointing: same gradients, with replay refused for a reason."""
    import timm

    set_reentrant_ckpt(False)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=5).double().train()
    twin = copy.deepcopy(model)
    model.set_grad_checkpointing(True)
    x, y = batch(image=32)
    for m in (model, twin):
        samon.two_pass(create_optimizer_v2(m, "samon", lr=0.1, rho=RHO), loss_of(m, x, y))
    assert_gradients(model, {n: p.grad for n, p in twin.named_parameters()}, 1e-12)
    opt = create_optimizer_v2(model, "samon", lr=0.1, perturb="norm$|^norm|blocks.[4-9]")
    with pytest.raises(ValueError, match=r"replay .*--no-replay.*gradient checkpointing is on"):
        samon.two_pass(opt, loss_of(model, x, y))
    samon.two_pass(opt, loss_of(model, x, y), replay=False)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bn_stats": "none"}, "bn_stats must be one of first, second, both"),
        ({"reduce": "mean"}, "reduce must be 'device' or 'global'"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"groups": 2, "reduce": "global"}, "does not combine with reduce='global'"),
        ({"groups": 2, "ascent_forward": lambda: None}, "does not combine with .*ascent_forward"),
    ],
)
def test_bad_options(kwargs: dict, message: str) -> None:
    model, opt = setup(LayerNormNet, "samon")
    with pytest.raises(ValueError, match=message):
        samon.two_pass(opt, loss_of(model, *batch()), **kwargs)
    assert all(p.grad is None for p in model.parameters())


class OwnBatchNorm(nn.Module):
    """A BatchNorm of one's own, in the ways that people update running statistics."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.scale = way, nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("table", torch.arange(3.0).expand(2, 3), persistent=False)  # cannot be written to

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((0, 2, 3))
        if self.way == "in place":
            self.mean.lerp_(mean.detach(), 0.1)
        elif self.way == "replaced":
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
        else:
            self.mean.data.lerp_(mean.data, 0.1)
        return (x - mean[:, None, None]) * self.scale[:, None, None]


WITH_BUFFERS = {
    **{way: lambda way=way: OwnBatchNorm(way) for way in ("in place", "replaced", ".data")},
    "EvoNorm2dB0": lambda: EvoNorm2dB0(3),
    "spectral_norm": lambda: spectral_norm(nn.Conv2d(3, 3, 3)),
    "spectral_norm, old": lambda: nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)),
}


@pytest.mark.parametrize("way", ["first", "second", "both", "closure", "bare", "bare closure"])
@pytest.mark.parametrize("layer", WITH_BUFFERS)
def test_every_buffer_is_written_by_the_pass_that_is_asked_for(layer: str, way: str) -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 3, 3), nn.GroupNorm(1, 3), WITH_BUFFERS[layer](), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*parts, nn.Linear(3, 5)).double().train()
    twin, probe = copy.deepcopy(model), copy.deepcopy(model)
    source = model.parameters() if "bare" in way else model
    opt = create_optimizer_v2(source, "sam", lr=0.0, weight_decay=0.0, rho=0.3)
    x, y = batch()

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        if "closure" in way:
            opt.step(closure)
        else:
            samon.two_pass(opt, loss_of(model, x, y), bn_stats="first" if way == "bare" else way)
    other = create_optimizer_v2(twin, "sam", lr=0.0, rho=0.3)
    for _ in range(2):
        probe.load_state_dict(twin.state_dict())
        grads = torch.autograd.grad(F.cross_entropy(probe(x), y), list(probe.parameters()))
        if way != "second":
            twin(x)
        if way in ("second", "both"):
            with other.perturbed(grads):
                twin(x)
    for (name, got), want in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("ascent", ["batch", "friendly", "every:2", "previous"])
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
        opt = create_optimizer_v2(model, "sam", lr=0.1, rho=0.3, ascent=ascent, weight_decay=0.0)
        for _ in range(4):
            opt.zero_grad()
            if closure:
                opt.step(lambda m=model, o=opt: (o.zero_grad(), (s := F.cross_entropy(m(x), y)).backward(), s)[-1])
            else:
                samon.two_pass(opt, [loss_of(model, x, y), loss_of(model, x[:3], y[:3])])
                opt.step()
    for p, q in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["sam", "sam-elemlinf", "sam-fisher", "sam-random", "ssam-f", "ssam-d"])
def test_perturbed_parameters_on_two_devices(name: str) -> None:
    model = nn.ModuleDict({"here": nn.Linear(2, 2), "there": nn.Linear(2, 2, device="meta")})
    opt = create_optimizer_v2(model, name, lr=0.1)
    grads = [torch.ones_like(p) for p in model.parameters()]
    with pytest.raises(samon.UserError, match=r"on cpu and meta.*one device"), opt.perturbed(grads):
        pass


class Complex(nn.Module):
    """A complex layer; `real` holds the same numbers as pairs of real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 16, 5, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, :, :4, :4].flatten(1).to(torch.complex128) @ self.weight).abs()


class Pairs(nn.Module):
    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.view_as_real(weight.detach()).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, :, :4, :4].flatten(1).to(torch.complex128) @ torch.view_as_complex(self.weight)).abs()


@pytest.mark.parametrize("kwargs", [{}, {"ascent": "every:2"}, {"ascent": "friendly"}, {"gsam_alpha": 0.3}], ids=str)
@pytest.mark.parametrize("name", ["sam", "sam-layerl2"])
def test_complex_weights_are_pairs_of_real_ones(name: str, kwargs: dict) -> None:
    torch.manual_seed(0)
    model = Complex()
    pairs = Pairs(model.weight)
    x, y = batch()
    for m in (model, pairs):
        opt = create_optimizer_v2(m, name, lr=0.1, rho=0.3, weight_decay=0.0, **kwargs)
        for _ in range(4):
            opt.zero_grad()
            samon.two_pass(opt, loss_of(m, x, y))
            opt.step()
    torch.testing.assert_close(torch.view_as_real(model.weight), pairs.weight, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["sam-random", "ssam-f", "ssam-d"])
def test_masks_of_complex_weights(name: str) -> None:
    model = Complex()
    opt = create_optimizer_v2(model, name, lr=0.1, mask_every=1)
    x, y = batch()
    for _ in range(2):
        samon.two_pass(opt, loss_of(model, x, y))
        opt.step()
    assert opt.mask.masks[0].sum() == model.weight.numel() / 2


def test_masks_follow_what_is_perturbed() -> None:
    model, opt = setup(LayerNormNet, "ssam-d")
    x, y = batch()
    for frozen in (True, False, True):
        model.norms.requires_grad_(not frozen)
        samon.two_pass(opt, loss_of(model, x, y))
        opt.step()
        assert [m.shape for m in opt.mask.masks] == [p.shape for p in model.parameters() if p.requires_grad]


def test_a_compiled_models_bare_parameters() -> None:
    """Its modules are found in an eager first step, without a warning of torch."""
    model = randomized(BatchNormNet())
    opt = create_optimizer_v2(model.parameters(), "sam", lr=0.1)
    x, y = batch()
    for _ in range(2):
        samon.two_pass(opt, loss_of(torch.compile(model, backend="eager"), x, y))
    assert model.bn.num_batches_tracked == 2


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
def test_what_is_no_forward_is_named(forward: Any, text: str, ascent: str) -> None:
    model = randomized(LayerNormNet())
    opt = create_optimizer_v2(model, "samon", lr=0.1, ascent=ascent)
    x, y = batch()

    def call() -> Any:
        logits = model(x)
        return forward(F.cross_entropy(logits, y), logits)

    given = call if callable(forward) and not isinstance(forward, torch.Tensor) else forward
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=text):
        samon.two_pass(opt, given)
    if ascent == "batch" and given is not None:
        with pytest.raises(UserError, match=text):
            samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), ascent_forward=given)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


def test_a_graph_from_outside_is_named() -> None:
    model = randomized(LayerNormNet())
    opt = create_optimizer_v2(model, "samon", lr=0.1)
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    with pytest.raises(UserError, match="graph that was built outside"):
        samon.two_pass(opt, lambda: loss)


@pytest.mark.parametrize("groups", [1, 4])
def test_no_grad_around_it_changes_nothing(groups: int) -> None:
    (one, opt), (two, other) = setup(LayerNormNet, "samon"), setup(LayerNormNet, "samon")
    with torch.no_grad():
        samon.two_pass(opt, loss_of(one, *batch()), groups=groups)
    samon.two_pass(other, loss_of(two, *batch()), groups=groups)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert not p.grad.requires_grad


def test_inference_mode_around_it_is_refused() -> None:
    model = randomized(LayerNormNet())
    opt = create_optimizer_v2(model, "samon", lr=0.1)
    with torch.inference_mode(), pytest.raises(UserError, match=r"under torch\.inference_mode"):
        samon.two_pass(opt, lambda: model(batch()[0]).sum())
    with torch.inference_mode(), pytest.raises(UserError, match=r"under torch\.inference_mode"):
        opt.step(lambda: model(batch()[0]).sum().backward())
