"""Replay changes no gradient: float64, 1e-12 relative (the loss sums in the same order, most differ by nothing)."""

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samon
from samon import rng
from samon.engines.replay import PLANS
from tests.nets import BatchNormNet, LayerNormNet, Peek, batch, randomized
from tests.steps import assert_same_step, count_flops, loss_of, optimizer_of

# One of each way to be built: plain and fused norms, class tokens, relative positions, windows, dense and multi-branch
# connections, attention that is not a module call, squeeze-excite, reparametrized convolutions.
NAMES = """resnet18 resnet26 resnetv2_18 convnext_atto vit_tiny_patch16_224 deit3_small_patch16_224
swin_tiny_patch4_window7_224 efficientnet_b0 mobilenetv3_small_050 densenet121 regnety_002 mixer_s32_224 poolformer_s12
xcit_nano_12_p16_224 cait_xxs24_224 coatnet_pico_rw_224 edgenext_xx_small hrnet_w18_small repvgg_a0 test_vit
test_efficientnet"""
MODELS = NAMES.split()
LARGE = {"swin_tiny_patch4_window7_224", "hrnet_w18_small", "densenet121", "mixer_s32_224", "efficientnet_b0"}
LARGE |= {"resnet26", "coatnet_pico_rw_224"}
SHALLOW = {"cait_xxs24_224", "xcit_nano_12_p16_224", "deit3_small_patch16_224"}  # built with 4 blocks
SIZES = {"resnet18": 64, "swin_tiny_patch4_window7_224": 56, "edgenext_xx_small": 64, "hrnet_w18_small": 64}  # else 32
RESIZABLE = re.compile("vit|deit|swin|mixer|xcit|cait|coatnet")


def build(name: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    size = SIZES.get(name, 32)
    kwargs: dict = {"img_size": size} if RESIZABLE.search(name) else {}
    kwargs |= {"depth": 4} if name in SHALLOW else {}
    kwargs |= {} if name.startswith(("densenet", "hrnet")) else {"drop_path_rate": 0.1}
    return timm.create_model(name, num_classes=5, **kwargs).double().train(), size


class Twins:
    """A network with replay and a copy without it, each with its optimizer."""

    def __init__(self, model: nn.Module, perturb: str, rho: float = 0.5, x: Tensor | None = None) -> None:
        self.models = model, copy.deepcopy(model)
        self.opts = [optimizer_of(m, rho=rho, perturb=perturb) for m in self.models]
        self.data = batch() if x is None else (x, torch.arange(len(x)))

    @property
    def plan(self) -> Any:
        return PLANS[self.opts[0]]

    def step(self, **options: Any) -> None:
        """One step each: equal gradients and buffers."""
        for model, opt, replay in zip(self.models, self.opts, (True, False), strict=True):
            model.zero_grad()
            torch.manual_seed(7)
            samon.two_pass(opt, loss_of(model, *self.data), replay=replay, **options)
        assert_same_step(*self.models, 1e-12)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in MODELS])
def test_timm_models(name: str) -> None:
    """The last 30 % of the normalization parameters perturbed; the same noise, so that stochastic depth before the
    boundary does not differ."""
    model, size = build(name)
    names = list(optimizer_of(model).perturbed_parameters())
    late = "^(" + "|".join(map(re.escape, names[int(len(names) * 0.7) :])) + ")$"
    twins = Twins(model, late, 0.1, batch(2, image=size)[0])
    for _ in range(2):  # the first step records the order of modules, the second replays
        twins.step(same_noise=True)
    assert twins.plan.prefix


@pytest.mark.parametrize("bn_stats", ["first", "second", "both"])
@pytest.mark.parametrize("perturb", ["blocks.2", "blocks.1.bn2", "blocks.2.bn2.bias"])
def test_in_place_code_after_a_kept_output(perturb: str, bn_stats: str) -> None:
    """Residual blocks add and activate in place: a kept output that later code overwrites is detected and copied."""
    twins = Twins(randomized(BatchNormNet()), perturb)
    for _ in range(4):
        twins.step(bn_stats=bn_stats)
    assert (twins.opts[0] in PLANS) == (bn_stats == "first")


class Halves(nn.Linear):
    def forward(self, x: Tensor) -> list[Tensor]:
        return list(super().forward(x).chunk(2, -1))


class Awkward(nn.Module):
    """A module called twice before the boundary and one called on both sides of it, tied weights, an in-place change of
    a kept output, a kept list that later code empties, parameters of the root itself."""

    def __init__(self, activates: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(8))
        self.first, self.twice, self.tied = Halves(12, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.twice.weight
        self.both = nn.Linear(8, 8)
        self.early, self.late = nn.LayerNorm(8), nn.LayerNorm(8)
        self.act = nn.ReLU(inplace=True) if activates else None
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.first(F.pixel_unshuffle(x, 2).flatten(2).mT)
        x = self.both((halves.pop() + halves.pop()) * self.token)
        y = self.early(self.twice(self.twice(x)))
        y += x  # overwrites what `early` returned
        y = y if self.act is None else self.act(y)
        y = self.late(y) + self.tied(y) + self.both(y)
        return self.head((y * self.token).mean(1))


@pytest.mark.parametrize("activates", [True, False])
def test_awkward_model(activates: bool) -> None:
    """Without the activation no module keeps the sum that overwrites what `early` returned."""
    model = randomized(Awkward(activates))
    twins = Twins(model, "late")
    for _ in range(4):  # recorded, detected, replayed with a copy
        twins.step()
    assert {model.first, model.twice, model.early} <= set(twins.plan.prefix)
    assert twins.plan.cloned == {model.early}
    assert not {model.tied, model.both} & set(twins.plan.prefix)


class Ordered(nn.Module):
    """Layers in the order of their names in `order`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.other, self.norm, self.head = nn.Linear(3, 3), nn.LayerNorm(3), nn.LayerNorm(3), nn.Linear(3, 5)
        self.order = ""

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        for name in self.order.split():
            x = F.dropout(x) if name == "dropout" else getattr(self, name)(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("first", "then", "prefix"),
    [
        ("other a norm", "other norm a", ["other"]),
        ("other norm a", "a other norm", ["other"]),  # `a` runs again, but the gradient reaches it through `other`
        ("other a norm", "other dropout a norm", []),
    ],
)
def test_a_changed_forward_is_noticed(first: str, then: str, prefix: list[str]) -> None:
    twins = Twins(randomized(Ordered()), "^norm")
    for order in (first, first, then, then, then, first):
        for model in twins.models:
            model.order = order
        twins.step()
    assert twins.plan.prefix == [getattr(twins.models[0], name) for name in prefix]


@pytest.mark.parametrize(
    ("net", "perturb"), [(Peek, "^norm"), (lambda: LayerNormNet(dropout=0.5), r"norms\.3")], ids=["peek", "dropout"]
)
def test_functional_use_of_a_perturbed_parameter_and_dropout(net: Callable[[], nn.Module], perturb: str) -> None:
    """Nothing that depends on a perturbed parameter is kept; noise before and after the boundary follows same_noise."""
    twins = Twins(randomized(net()), perturb)
    for same_noise in (True, True, True, False, False):
        twins.step(same_noise=same_noise)
        assert bool(twins.plan.prefix) == (same_noise and net is not Peek)


class RandomInputs(nn.Module):
    """Draws random numbers before the perturbed layer, outside any module that runs there as a whole."""

    def __init__(self, generator: str) -> None:
        super().__init__()
        self.generator, self.first, self.second = generator, nn.Linear(192, 6), nn.Linear(6, 5)
        self.other, self.norm = nn.LayerNorm(192), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        draw = {"torch": torch.rand(()).item, "numpy": np.random.rand, "python": random.random}[self.generator]
        return self.norm(self.second(draw() * self.first(self.other(x.flatten(1)) + draw())))


@pytest.mark.parametrize("generator", ["torch", "numpy", "python"])
def test_nothing_is_replayed_if_code_between_modules_draws_random_numbers(generator: str) -> None:
    torch.manual_seed(0)
    twins = Twins(RandomInputs(generator).double(), "^norm")
    for _ in range(2):
        for model, opt, replay in zip(twins.models, twins.opts, (True, False), strict=True):
            rng.seed(7)
            model.zero_grad()
            samon.two_pass(opt, loss_of(model, *twins.data), replay=replay)
        assert_same_step(*twins.models, 1e-12)
    assert not twins.plan.prefix


def test_the_prefix_runs_once() -> None:
    """Exact operation counts: everything before the boundary runs forward once, and its ascent backward never."""
    model = timm.create_model("resnet18", num_classes=5).train()
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    opt, forward = optimizer_of(model, perturb="layer4"), loss_of(model, x, y)
    full = count_flops(lambda: samon.two_pass(opt, forward, replay=False))
    for _ in range(2):  # recorded, verified
        samon.two_pass(opt, forward)
    calls = []
    model.layer1[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    replayed = count_flops(lambda: samon.two_pass(opt, forward))
    assert len(calls) == 1
    stages = (model.conv1, model.bn1, model.maxpool, model.layer1, model.layer2, model.layer3)
    with torch.no_grad():  # the first convolution of layer4 runs before its first norm too
        once = count_flops(lambda: nn.Sequential(*stages, model.layer4[0].conv1)(x))
    assert full - replayed == once > 0


def test_parameters_unfrozen_before_the_boundary_move_it() -> None:
    twins = Twins(randomized(BatchNormNet()), r"blocks\.[02]")
    for frozen in (True, True, False, False, True, True):  # recorded, replayed, each
        for m in twins.models:
            m.blocks[0].requires_grad_(not frozen)
        twins.step()
        assert twins.plan.prefix
        assert (twins.models[0].blocks[0] in twins.plan.prefix) == frozen


class Penalized(nn.Linear):
    """Appends an auxiliary loss to a list, as layers of mixtures of experts do."""

    def __init__(self, losses: list[Tensor]) -> None:
        super().__init__(3, 3)
        self.losses = losses

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.losses.append(output.square().mean())
        return output


class Collecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.first, self.other, self.norm = Penalized(self.losses), nn.LayerNorm(3), nn.LayerNorm(3)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.losses.clear()
        return self.head(self.norm(self.other(self.first(x.mean((2, 3)))).tanh())) * sum(self.losses)


def test_layers_with_effects_besides_their_outputs_are_not_replayed() -> None:
    twins = Twins(randomized(Collecting()), "^norm")
    twins.step()
    assert twins.plan.prefix
    with pytest.warns(UserWarning, match="replay is off") as warned:
        twins.step()
    assert warned[0].filename == __file__  # the line that calls `two_pass`
    twins.step()
    assert not twins.plan.prefix


class Rescaled(nn.Module):
    """Between replayed layers, its own forward multiplies by a buffer, which the stored graph then contains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.norm = nn.Linear(3, 4), nn.LayerNorm(4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.other(self.first(x.mean((2, 3))).tanh() * self.scale).tanh()))


def test_verification_leaves_the_stored_graph_and_gradients_inside_the_loss_usable() -> None:
    model = randomized(Rescaled())
    opt, x, y = optimizer_of(model, "samon", perturb="^norm"), *batch()

    def forward() -> Tensor:
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        (slope,) = torch.autograd.grad(loss, logits, create_graph=True)  # a penalty
        return loss + slope.square().sum()

    for _ in range(3):
        opt.zero_grad()
        samon.two_pass(opt, forward)
    assert PLANS[opt].prefix
