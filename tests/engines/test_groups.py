"""m-sharpness in one batched pass against the loop over sub-batches: float64, 1e-10 relative."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import samon
from samon import UserError, scope
from tests.nets import BatchNormNet, OwnBatchNorm, Peek, SharedGradients, batch, randomized
from tests.steps import assert_same_step, assert_unchanged, loss_of, losses_of, make, optimizer_of, values

Pair = tuple[nn.Module, nn.Module]
Data = tuple[Tensor, Tensor]


def step_both(models: Pair, opts: tuple[Any, Any], data: Data, groups: int, bn_stats: str = "first") -> None:
    """A step with groups for the first, the loop of single steps for the second."""
    (model, twin), (opt, single) = models, opts
    loss = samon.two_pass(opt, loss_of(model, *data), groups=groups, bn_stats=bn_stats)
    losses = [
        samon.two_pass(single, forward, loss_scale=1 / groups, bn_stats=bn_stats)
        for forward in losses_of(twin, *data, groups)
    ]
    assert loss.item() == pytest.approx(sum(losses).item() / groups, rel=1e-12)


def grouped_and_looped(
    build: Callable[[], nn.Module],
    name: str,
    groups: int,
    bn_stats: str = "first",
    data: Data | None = None,
    **how: Any,
) -> Pair:
    torch.manual_seed(0)
    model = build()
    models = (model, copy.deepcopy(model))
    opts = (optimizer_of(models[0], name, **how), optimizer_of(models[1], name, **how))
    step_both(models, opts, data or batch(), groups, bn_stats)
    return models


def batchnorm_net() -> nn.Module:
    return randomized(BatchNormNet())


@pytest.mark.parametrize("bn_stats", ["first", "second", "both"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_end_as_the_loops(bn_stats: str, momentum: float | None) -> None:
    def build() -> nn.Module:
        model = batchnorm_net()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = momentum
        return model

    model, twin = grouped_and_looped(build, "samon", 4, bn_stats)
    assert_same_step(model, twin)
    assert model.bn.num_batches_tracked == (8 if bn_stats == "both" else 4)


class Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


def channels_last(norm: nn.Module) -> nn.Module:
    return nn.Sequential(Permute(0, 2, 3, 1), norm, Permute(0, 3, 1, 2))


LAYERS = {
    "BatchNormAct2d": lambda: timm_layers.BatchNormAct2d(8, act_layer=nn.SiLU),
    "eval BatchNorm2d": lambda: nn.BatchNorm2d(8).eval(),
    "BatchNorm2d, not affine": lambda: nn.BatchNorm2d(8, affine=False),
    "BatchNorm2d, no statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "LayerNorm over CHW": lambda: nn.LayerNorm([8, 6, 6]),
    "LayerNorm, no bias": lambda: channels_last(nn.LayerNorm(8, bias=False)),
    "LayerNorm2d": lambda: timm_layers.LayerNorm2d(8),
    "LayerNormAct2d": lambda: timm_layers.LayerNormAct2d(8),
    "LayerNormExp2d": lambda: timm_layers.norm.LayerNormExp2d(8),
    "GroupNorm": lambda: nn.GroupNorm(4, 8),
    "GroupNorm1": lambda: timm_layers.GroupNorm1(8),
    "GroupNormAct": lambda: timm_layers.GroupNormAct(8, num_groups=2),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8, affine=True),
    "RMSNorm": lambda: channels_last(nn.RMSNorm(8)),
    "RmsNorm": lambda: channels_last(timm_layers.RmsNorm(8)),
    "RmsNorm2d": lambda: timm_layers.RmsNorm2d(8),
    "SimpleNorm2d": lambda: timm_layers.SimpleNorm2d(8),
}


def with_norm(norm: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), norm, nn.Tanh(), nn.Conv2d(8, 8, 3, groups=2), nn.GroupNorm(2, 8)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    training = [m.training for m in model.modules()]
    randomized(model)
    for m, mode in zip(model.modules(), training, strict=True):
        m.training = mode
    return model


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_that_can_be_grouped(layer: str) -> None:
    assert_same_step(*grouped_and_looped(lambda: with_norm(LAYERS[layer]()), "samon-eleml2", 4))


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("vit_tiny_patch16_224", 32),
        ("resnet18", 64),
        ("convnext_atto", 32),
        pytest.param("efficientnet_b0", 64, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", 56, marks=pytest.mark.slow),
        pytest.param("coatnet_pico_rw_224", 64, marks=pytest.mark.slow),
    ],
)
def test_timm_models(name: str, image: int) -> None:
    sized = {"img_size": image} if name.startswith(("vit", "swin", "coat")) else {}
    build = lambda: timm.create_model(name, num_classes=5, drop_path_rate=0.0, **sized).double().train()  # noqa: E731
    assert_same_step(*grouped_and_looped(build, "samon-layerl2", 2, data=batch(4, image=image)))


SPECIAL: dict[str, tuple[Callable[[], nn.Module], int, dict[str, Any]]] = {
    "channels_last, groups of 4": (lambda: batchnorm_net().to(memory_format=torch.channels_last), 2, {}),
    "channels_last, single samples": (lambda: batchnorm_net().to(memory_format=torch.channels_last), 8, {}),
    "gradients that autograd shares between layers": (lambda: randomized(SharedGradients()), 8, {}),
    # BatchNorms that are not perturbed still couple samples, so they are grouped too.
    "only some layers perturbed": (batchnorm_net, 4, {"perturb": "blocks.2"}),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_special_cases(case: str) -> None:
    build, groups, how = SPECIAL[case]
    x, y = batch()
    x = x.to(memory_format=torch.channels_last) if "channels_last" in case else x
    assert_same_step(*grouped_and_looped(build, "samon", groups, data=(x, y), **how))


def test_a_batch_that_does_not_divide_is_refused_and_layers_are_restored() -> None:
    model, opt = make(BatchNormNet)
    samon.two_pass(opt, loss_of(model, *batch()), groups=4)
    before = values(model)
    with pytest.raises(UserError, match=r"batch of 6 does not divide into 4 groups at BatchNorm2d"):
        samon.two_pass(opt, loss_of(model, *batch(6)), groups=4)
    assert_unchanged(model, before)
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None)
    assert all(p.requires_grad for p in model.parameters())


def test_layers_kept_between_steps_follow_the_model() -> None:
    """Another dtype, mode and activation than in the step before."""
    torch.manual_seed(0)
    model = batchnorm_net()
    model.bn = nn.Sequential(model.bn, timm_layers.BatchNormAct2d(model.bn.num_features, act_layer=nn.SiLU))
    model = model.float()
    opt, (x, y) = optimizer_of(model), batch()
    samon.two_pass(opt, loss_of(model, x.float(), y), groups=4)
    opt.zero_grad()
    model.double()
    model.bn[0].eval()
    model.bn[1].act = nn.Tanh()
    twin = copy.deepcopy(model)
    step_both((model, twin), (opt, optimizer_of(twin)), (x, y), 4)
    assert_same_step(model, twin)


def test_a_group_that_is_not_finite_changes_no_weight_and_makes_the_gradient_nan() -> None:
    model, opt = make()
    x, y = batch()
    x[0] = torch.inf
    before = values(model)
    samon.two_pass(opt, loss_of(model, x, y), groups=4)
    assert all(p.grad.isnan().any() for p in model.parameters())
    assert_unchanged(model, before)


# -- perturbed parameters outside their layer's call -------------------------------------------------------------------
PENALTIES = {
    "l1 on gammas": lambda m: sum(n.weight.abs().sum() for n in m.modules() if isinstance(n, nn.LayerNorm)),
    "l2 on all": lambda m: sum(p.square().sum() for p in m.parameters()),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_penalty_on_perturbed_parameters_is_refused(penalty: str) -> None:
    model, opt = make()
    forward = loss_of(model, *batch())
    with pytest.raises(UserError, match=r"'norms\.0\.weight' outside the call.*weight_decay.*groups=1"):
        samon.two_pass(opt, lambda: forward() + 0.01 * PENALTIES[penalty](model), groups=4)


@pytest.mark.parametrize("compiled", [False, True])
def test_functional_use_of_a_perturbed_parameter_is_refused(compiled: bool) -> None:
    model, opt = make(Peek)
    run = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(UserError, match=r"groups=4: .* 'norm\.weight' outside the call"):
        samon.two_pass(opt, loss_of(run, *batch()), groups=4)


def test_unperturbed_parameters_may_be_read_anywhere() -> None:
    """They are the same for all groups, those of a coupled BatchNorm included."""
    models = []
    for groups in (4, 1):
        model, opt = make(BatchNormNet, perturb="blocks")
        others = [model.bn.weight, model.bn.bias, model.stem.weight]
        for forward in losses_of(model, *batch(), 4 // groups):
            penalized = lambda f=forward, others=others: f() + sum(p.square().sum() for p in others)  # noqa: E731
            samon.two_pass(opt, penalized, groups=groups, loss_scale=groups / 4)
        models.append(model)
    assert_same_step(*models)


# -- classes of the user's own -----------------------------------------------------------------------------------------
class LlamaNorm(nn.Module):
    """An RMSNorm; `shift` makes it Gemma's, x * (1 + weight)."""

    def __init__(self, width: int, shift: float = 0.0):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.ones(width)), shift

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.weight + self.shift)


class GemmaNorm(nn.RMSNorm):
    """Derives from a known class, and multiplies by something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.weight + 1)


class OtherName(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.gamma[:, None, None]


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scope, "NORM_TYPES", dict(scope.NORM_TYPES))


def test_a_registered_class_is_grouped() -> None:
    samon.register_norm(LlamaNorm, dim=-1)
    model, twin = grouped_and_looped(lambda: with_norm(channels_last(LlamaNorm(8))), "samon", 4)
    assert_same_step(model, twin)
    assert model[1][1].weight.grad is not None


@pytest.mark.parametrize(
    ("norm", "dim", "last"),
    [(LlamaNorm(8, shift=1), -1, True), (LlamaNorm(8), 1, True), (OwnBatchNorm(8), 1, False), (GemmaNorm(8), -1, True)],
    ids=["1 + weight", "another dimension", "statistics of the batch", "subclass"],
)
@pytest.mark.parametrize("at_one", [False, True])
def test_a_class_whose_groups_would_be_wrong_is_refused(norm: nn.Module, dim: int, last: bool, at_one: bool) -> None:
    """Also where the weight is one: there x * (1 + weight) agrees up to a factor that the bare layer has too."""
    norm, cls = copy.deepcopy(norm), type(norm)
    if cls is not GemmaNorm:
        samon.register_norm(cls, dim=dim)
    model = with_norm(channels_last(norm) if last else norm)
    if at_one:
        nn.init.ones_(norm.weight)
    opt = optimizer_of(model)
    with pytest.raises(UserError, match=rf"{cls.__name__} is not .*register_norm\(.*dim=None\)"):
        samon.two_pass(opt, loss_of(model, *batch()), groups=4)
    samon.register_norm(cls, dim=None)
    with pytest.raises(UserError, match=rf"{cls.__name__} '1.*' cannot be grouped"):
        samon.two_pass(opt, loss_of(model, *batch()), groups=4)


def own_forward(norm: nn.Module) -> nn.Module:
    norm.forward = norm.forward
    return norm


UNGROUPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no formula": (lambda: timm_layers.EvoNorm2dS0(8, group_size=4), "EvoNorm2dS0 '1' cannot be grouped"),
    "synchronized": (lambda: nn.SyncBatchNorm(8), "SyncBatchNorm '1' cannot be grouped"),
    "running statistics": (
        lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        "InstanceNorm2d '1' cannot be grouped",
    ),
    "another name": (lambda: OtherName(8), "OtherName '1' cannot be grouped"),
    "own forward": (lambda: own_forward(nn.GroupNorm(2, 8)), "GroupNorm '1' cannot be grouped"),
    "batch second": (
        lambda: nn.TransformerEncoderLayer(8, 2, batch_first=False),
        "build the model with batch_first=True",
    ),
    "unknown class": (lambda: OwnBatchNorm(8), r"OwnBatchNorm is not known.*samon\.register_norm\(OwnBatchNorm"),
}


@pytest.mark.parametrize("case", UNGROUPED)
def test_layers_that_cannot_be_grouped_are_refused(case: str) -> None:
    build, message = UNGROUPED[case]
    samon.register_norm(OtherName, dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that look like normalization
        model = randomized(with_norm(build()))
        opt = optimizer_of(model)
    with pytest.raises(UserError, match=message):
        samon.two_pass(opt, loss_of(model, *batch()), groups=4)


@pytest.mark.parametrize("bn_stats", ["first", "second", "both"])
def test_other_buffers_are_written_by_the_pass_of_bn_stats(bn_stats: str) -> None:
    """Spectral normalization iterates once in each forward: a step with groups runs one or two."""
    torch.manual_seed(0)
    model = nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3)), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = model.double()
    twin, (x, y) = copy.deepcopy(model), batch()
    samon.two_pass(optimizer_of(model), loss_of(model, x, y), groups=4, bn_stats=bn_stats)
    for _ in range(2 if bn_stats == "both" else 1):
        twin(x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
