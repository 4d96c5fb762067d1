"""m-sharpness in one batched pass against the loop over sub-batches: float64, 1e-10 relative."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    EvoNorm2dS0,
    GroupNorm1,
    GroupNormAct,
    LayerNorm2d,
    LayerNormAct2d,
    RmsNorm2d,
    SimpleNorm2d,
)
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import samon
from samon import scope
from tests import reference
from tests.nets import NETS, BatchNormNet, LayerNormNet, batch, randomized

RHO = 0.3


def grouped_and_looped(make, name: str, groups: int, bn_stats: str = "first", size: int = 8, image: int = 8, **kwargs):
    """Gradients and models after the grouped step and after the loop of single steps."""
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    opt, single = (create_optimizer_v2(m, name, lr=0.1, rho=RHO, **kwargs) for m in (model, twin))
    x, y = batch(size, image=image)
    loss = samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), groups=groups, bn_stats=bn_stats)
    losses = [
        samon.two_pass(single, lambda a=a, b=b: F.cross_entropy(twin(a), b), loss_scale=1 / groups, bn_stats=bn_stats)
        for a, b in zip(x.chunk(groups), y.chunk(groups), strict=True)
    ]
    assert loss.item() == pytest.approx(sum(losses).item() / groups, rel=1e-12)
    return model, twin


def assert_same(model: nn.Module, twin: nn.Module, tolerance: float = 1e-10) -> None:
    size = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]).norm()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (p.grad - q.grad).norm() <= tolerance * size, name
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("geometry", reference.GEOMETRIES)
@pytest.mark.parametrize("net", NETS.values())
def test_against_reference(net, geometry: str, groups: int) -> None:
    torch.manual_seed(0)
    model = randomized(net())
    twin = copy.deepcopy(model)
    opt = create_optimizer_v2(model, f"samon-{geometry}".strip("-"), lr=0.1, rho=RHO)
    x, y = batch()
    losses = [
        lambda a=a, b=b: F.cross_entropy(twin(a), b) for a, b in zip(x.chunk(groups), y.chunk(groups), strict=True)
    ]
    names = reference.scope_names(twin, "samon")
    clean, expected = reference.m_sharpness_gradient(twin, losses, names, geometry, RHO)
    loss = samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), groups=groups)
    assert loss.item() == pytest.approx(clean, rel=1e-12)
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert all((p.grad - expected[n]).norm() <= 1e-10 * size for n, p in model.named_parameters())


@pytest.mark.parametrize("bn_stats", ["first", "second", "both"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_end_as_the_loops(bn_stats: str, momentum: float | None) -> None:
    def make() -> nn.Module:
        model = randomized(BatchNormNet())
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = momentum
        return model

    model, twin = grouped_and_looped(make, "samon", 4, bn_stats)
    assert_same(model, twin)
    assert model.bn.num_batches_tracked == (8 if bn_stats == "both" else 4)


LAYERS = {
    "BatchNormAct2d": lambda: BatchNormAct2d(8, act_layer=nn.SiLU),
    "eval BatchNorm2d": lambda: nn.BatchNorm2d(8).eval(),
    "BatchNorm2d, not affine": lambda: nn.BatchNorm2d(8, affine=False),
    "BatchNorm2d, no statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "LayerNorm over CHW": lambda: nn.LayerNorm([8, 6, 6]),
    "LayerNorm, no bias": lambda: nn.Sequential(ToLast(), nn.LayerNorm(8, bias=False), ToFirst()),
    "LayerNorm2d": lambda: LayerNorm2d(8),
    "LayerNormAct2d": lambda: LayerNormAct2d(8),
    "GroupNorm": lambda: nn.GroupNorm(4, 8),
    "GroupNorm1": lambda: GroupNorm1(8),
    "GroupNormAct": lambda: GroupNormAct(8, num_groups=2),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8, affine=True),
    "RMSNorm": lambda: nn.Sequential(ToLast(), nn.RMSNorm(8), ToFirst()),
    "RmsNorm": lambda: nn.Sequential(ToLast(), timm.layers.RmsNorm(8), ToFirst()),
    "RmsNorm2d": lambda: RmsNorm2d(8),
    "SimpleNorm2d": lambda: SimpleNorm2d(8),
}


class ToLast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


class ToFirst(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_groupable_layer(layer: str) -> None:
    def make() -> nn.Module:
        parts = [nn.Conv2d(3, 8, 3), LAYERS[layer](), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=2), nn.GroupNorm(2, 8)]
        model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        training = [m.training for m in model.modules()]
        randomized(model)
        for m, mode in zip(model.modules(), training, strict=True):
            m.training = mode
        return model

    assert_same(*grouped_and_looped(make, "samon-eleml2", 4))


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("vit_tiny_patch16_224", 32),
        ("resnet18", 64),
        ("convnext_atto", 32),
        ("efficientnet_b0", 64),
        ("swin_tiny_patch4_window7_224", 56),
        ("coatnet_pico_rw_224", 64),
    ],
)
def test_timm_models(name: str, image: int) -> None:
    sized = {"img_size": image} if name.startswith(("vit", "swin", "coat")) else {}
    make = lambda: timm.create_model(name, num_classes=5, drop_path_rate=0.0, **sized).double().train()  # noqa: E731
    assert_same(*grouped_and_looped(make, "samon-layerl2", 2, size=4, image=image))


def test_one_group_is_the_plain_step() -> None:
    model, twin = grouped_and_looped(lambda: randomized(BatchNormNet()), "samon", 1)
    assert_same(model, twin, 0.0)


def test_only_some_layers_perturbed() -> None:
    """BatchNorms that are not perturbed still couple samples, so they are grouped too."""
    assert_same(*grouped_and_looped(lambda: randomized(BatchNormNet()), "samon", 4, perturb="blocks.2"))


def test_layers_are_left_as_they_were() -> None:
    model, _ = grouped_and_looped(lambda: randomized(BatchNormNet()), "samon", 4)
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None)
    x, y = batch(6)
    opt = create_optimizer_v2(model, "samon", lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"batch of 6 does not divide into 4 groups at BatchNorm2d"):
        samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), groups=4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_layers_kept_between_steps_follow_the_model() -> None:
    """Another dtype, mode and activation than in the step before."""
    torch.manual_seed(0)
    model = randomized(BatchNormNet())
    model.bn = nn.Sequential(model.bn, BatchNormAct2d(model.bn.num_features, act_layer=nn.SiLU))
    model = model.float()
    opt = create_optimizer_v2(model, "samon", lr=0.1, rho=RHO)
    x, y = batch()
    samon.two_pass(opt, lambda: F.cross_entropy(model(x.float()), y), groups=4)
    model.double()
    model.bn[0].eval()
    model.bn[1].act = nn.Tanh()
    twin = copy.deepcopy(model)
    single = create_optimizer_v2(twin, "samon", lr=0.1, rho=RHO)
    for o in (opt, single):
        o.zero_grad()
    samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), groups=4)
    for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
        samon.two_pass(single, lambda a=a, b=b: F.cross_entropy(twin(a), b), loss_scale=1 / 4)
    assert_same(model, twin)


def test_what_cannot_be_grouped() -> None:
    x, y = batch()
    evo = nn.Sequential(nn.Conv2d(3, 8, 3), EvoNorm2dS0(8, group_size=4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    cases = [
        (evo, "samon", "EvoNorm2dS0 '1' cannot be grouped"),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.SyncBatchNorm(5)), "samon", "SyncBatchNorm '1' cannot be grouped"),
        (LayerNormNet(), "sam", "scope sam.*loop over the sub-batches"),
        (LayerNormNet(), "samnn", "scope samnn.*loop over the sub-batches"),
    ]
    for model, name, message in cases:
        model = randomized(model)
        opt = create_optimizer_v2(model, name, lr=0.1)
        with pytest.raises(ValueError, match=message):
            samon.two_pass(opt, lambda m=model: F.cross_entropy(m(x), y), groups=2)


def test_non_finite_group_leaves_weights_and_poisons_the_gradient() -> None:
    model = randomized(LayerNormNet())
    opt = create_optimizer_v2(model, "samon", lr=0.1)
    x, y = batch()
    x[0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), groups=4)
    assert all(p.grad.isnan().any() for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Functional(nn.Module):
    """Reads a layer's parameters without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.n, self.norm, self.head = nn.Linear(12, 8), nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(F.pixel_unshuffle(x, 2).flatten(2).mT)
        x = F.layer_norm(x, (8,), self.n.weight, self.n.bias)
        return self.head(self.norm(x).tanh().mean(1))


PENALTIES = {
    "l1 on gammas": lambda m: sum(n.weight.abs().sum() for n in m.modules() if isinstance(n, nn.LayerNorm)),
    "l2 on all": lambda m: sum(p.square().sum() for p in m.parameters()),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalty_on_perturbed_parameters_is_refused(penalty: str) -> None:
    model = randomized(LayerNormNet())
    opt = create_optimizer_v2(model, "samon", lr=0.1, rho=RHO)
    x, y = batch()
    with pytest.raises(samon.UserError, match=r"'norms\.0\.weight' outside the call.*weight_decay.*groups=1"):
        samon.two_pass(opt, lambda: F.cross_entropy(model(x), y) + 0.01 * PENALTIES[penalty](model), groups=4)


@pytest.mark.parametrize("compiled", [False, True])
def test_functional_use_of_a_perturbed_parameter_is_refused(compiled: bool) -> None:
    model = randomized(Functional())
    opt = create_optimizer_v2(model, "samon", lr=0.1, rho=RHO)
    run = torch.compile(model, backend="eager") if compiled else model
    x, y = batch()
    with pytest.raises(samon.UserError, match=r"groups=4: .* 'n\.weight' outside the call"):
        samon.two_pass(opt, lambda: F.cross_entropy(run(x), y), groups=4)


def test_unperturbed_parameters_may_be_read_anywhere() -> None:
    """As the loop sees them: what is not perturbed is the same for all groups, a coupled BatchNorm's included."""
    model = randomized(BatchNormNet())
    models = [model, copy.deepcopy(model)]
    for model, groups in zip(models, (4, 1), strict=True):
        opt = create_optimizer_v2(model, "samon", lr=0.1, rho=RHO, perturb="blocks")

        def loss(x, y, model=model) -> torch.Tensor:
            rest = [model.bn.weight, model.bn.bias, model.stem.weight]
            return F.cross_entropy(model(x), y) + sum(p.square().sum() for p in rest)

        x, y = batch()
        for a, b in zip(x.chunk(4 // groups), y.chunk(4 // groups), strict=True):
            samon.two_pass(opt, lambda a=a, b=b, loss=loss: loss(a, b), groups=groups, loss_scale=groups / 4)
    assert_same(*models)


class LlamaNorm(nn.Module):
    """An RMSNorm of one's own; `shift` makes it Gemma's, x * (1 + weight)."""

    def __init__(self, width: int, shift: float = 0.0):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.ones(width)), shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.weight + self.shift)


class OwnBatchNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach().flatten()
        return (x - mean) * self.weight[:, None, None] + self.bias[:, None, None]


class GemmaNorm(nn.RMSNorm):
    """Derives from a class that is known, and multiplies by something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.weight + 1)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(scope, "NORM_TYPES", dict(scope.NORM_TYPES))


def with_norm(norm: nn.Module, last: bool) -> nn.Module:
    around = (ToLast(), norm, ToFirst()) if last else (norm,)
    parts = [nn.Conv2d(3, 8, 3), *around, nn.Tanh(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)]
    return randomized(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))


def test_a_registered_class_is_grouped(registry) -> None:
    samon.register_norm(LlamaNorm, dim=-1)
    model, twin = grouped_and_looped(lambda: with_norm(LlamaNorm(8), last=True), "samon", 4)
    assert_same(model, twin)
    assert model[2].weight.grad is not None


@pytest.mark.parametrize(
    ("norm", "dim", "last"),
    [(LlamaNorm(8, shift=1), -1, True), (LlamaNorm(8), 1, True), (OwnBatchNorm(8), 1, False), (GemmaNorm(8), -1, True)],
    ids=["1 + weight", "another dimension", "statistics of the batch", "subclass"],
)
def test_a_class_that_the_groups_would_get_wrong_is_refused(registry, norm: nn.Module, dim: int, last: bool) -> None:
    if not isinstance(norm, GemmaNorm):
        samon.register_norm(type(norm), dim=dim)
    model = with_norm(norm, last)
    opt = create_optimizer_v2(model, "samon", lr=0.1)
    x, y = batch()
    with pytest.raises(samon.UserError, match=rf"{type(norm).__name__} is not .*register_norm\(.*dim=None\)"):
        samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), groups=4)
    samon.register_norm(type(norm), dim=None)
    with pytest.raises(samon.UserError, match=rf"{type(norm).__name__} '.' cannot be grouped"):
        samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), groups=4)


def test_one_plus_weight_is_refused_also_where_the_weight_is_one(registry) -> None:
    """There both formulas agree up to a factor that the bare layer has too."""
    samon.register_norm(LlamaNorm, dim=-1)
    model = with_norm(LlamaNorm(8, shift=1), last=True)
    nn.init.ones_(model[2].weight)
    opt = create_optimizer_v2(model, "samon", lr=0.1)
    x, y = batch()
    with pytest.raises(samon.UserError, match="LlamaNorm is not "):
        samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), groups=4)


def test_more_that_cannot_be_grouped(registry) -> None:
    """Running statistics that a loop would update G times, parameters of other names, a forward of the instance's own,
    a class that nobody knows and that may look at the whole batch."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.normalize(x, dim=1) * self.gamma[:, None, None]

    samon.register_norm(Named, dim=1)
    x, y = batch()
    patched = nn.GroupNorm(2, 8)
    patched.forward = patched.forward
    for norm, message in (
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), "InstanceNorm2d '1' cannot be grouped"),
        (Named(), "Named '1' cannot be grouped"),
        (patched, "GroupNorm '1' cannot be grouped"),
        (OwnBatchNorm(8), r"OwnBatchNorm is not known.*samon\.register_norm\(OwnBatchNorm"),
    ):
        model = with_norm(norm, last=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt = create_optimizer_v2(model, "samon", lr=0.1)
        with pytest.raises(samon.UserError, match=message):
            samon.two_pass(opt, lambda m=model: F.cross_entropy(m(x), y), groups=4)


@pytest.mark.parametrize("bn_stats", ["first", "second", "both"])
def test_other_buffers_are_written_by_the_pass_that_is_asked_for(bn_stats: str) -> None:
    """Spectral normalization iterates once in each forward: a step with groups runs one or two."""
    torch.manual_seed(0)
    model = nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3)), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = model.double()
    twin = copy.deepcopy(model)
    opt = create_optimizer_v2(model, "samon", lr=0.1)
    x, y = batch()
    samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), groups=4, bn_stats=bn_stats)
    for _ in range(2 if bn_stats == "both" else 1):
        twin(x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
