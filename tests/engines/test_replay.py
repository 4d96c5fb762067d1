"""Replay changes no gradient: float64, 1e-12 relative (the loss sums in the same order, most differ by nothing)."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import samon
from samon.engines.replay import PLANS
from tests.nets import BatchNormNet, LayerNormNet, batch, randomized

# One of each way to be built: plain and fused norms, class tokens, relative positions, windows, dense and multi-branch
# connections, attention that is not a module call, squeeze-excite, re-parametrised convolutions.
MODELS = {
    "resnet18": 64,
    "resnet26": 32,
    "resnetv2_18": 32,
    "convnext_atto": 32,
    "vit_tiny_patch16_224": 32,
    "deit3_small_patch16_224": 32,
    "swin_tiny_patch4_window7_224": 56,
    "efficientnet_b0": 32,
    "mobilenetv3_small_050": 32,
    "densenet121": 32,
    "regnety_002": 32,
    "mixer_s32_224": 32,
    "poolformer_s12": 32,
    "xcit_nano_12_p16_224": 32,
    "cait_xxs24_224": 32,
    "coatnet_pico_rw_224": 32,
    "edgenext_xx_small": 64,
    "hrnet_w18_small": 64,
    "repvgg_a0": 32,
    "test_vit": 32,
    "test_efficientnet": 32,
}
RESIZABLE = re.compile("vit|deit|swin|mixer|xcit|cait|coatnet")


def build(name: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    size = MODELS[name]
    kwargs: dict = {"img_size": size} if RESIZABLE.search(name) else {}
    kwargs |= {} if name.startswith(("densenet", "hrnet")) else {"drop_path_rate": 0.1}
    return timm.create_model(name, num_classes=5, **kwargs).double().train(), size


def last_part(model: nn.Module, share: float = 0.3) -> str:
    """A regular expression for the last norm parameters in model order."""
    names = list(create_optimizer_v2(model, "samon", lr=0.1).perturbed_parameters())
    return "^(" + "|".join(map(re.escape, names[int(len(names) * (1 - share)) :])) + ")$"


def step(model: nn.Module, opt, forward, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    samon.two_pass(opt, forward, **kwargs)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(a: dict, b: dict, tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    size = torch.cat([g.flatten() for g in b.values()]).norm()
    assert all((a[n] - b[n]).norm() <= tolerance * size for n in b)


@pytest.mark.parametrize("name", MODELS)
def test_timm_models(name: str) -> None:
    model, size = build(name)
    twin = copy.deepcopy(model)
    x, y = batch(2, image=size)
    perturb = last_part(model)
    opt, plain = (create_optimizer_v2(m, "samon", lr=0.1, rho=0.1, perturb=perturb) for m in (model, twin))
    # The same noise, so that stochastic depth in front of the cut does not tell them apart.
    for _ in range(2):  # the first step records the order of modules, the second replays
        got = step(model, opt, lambda: F.cross_entropy(model(x), y), same_noise=True)
        want = step(twin, plain, lambda: F.cross_entropy(twin(x), y), same_noise=True, replay=False)
        assert_equal(got, want)
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert PLANS[opt].prefix


@pytest.mark.parametrize("bn_stats", ["first", "second", "both"])
@pytest.mark.parametrize("perturb", ["blocks.2", "blocks.1.bn2", "blocks.2.bn2.bias"])
def test_in_place_code_behind_a_kept_output(perturb: str, bn_stats: str) -> None:
    """Residual blocks add and activate in place: a kept output that later code overwrites is found and copied."""
    model = randomized(BatchNormNet())
    twin = copy.deepcopy(model)
    x, y = batch()
    opt, plain = (create_optimizer_v2(m, "samon", lr=0.1, rho=0.5, perturb=perturb) for m in (model, twin))
    for _ in range(4):
        got = step(model, opt, lambda: F.cross_entropy(model(x), y), bn_stats=bn_stats)
        want = step(twin, plain, lambda: F.cross_entropy(twin(x), y), bn_stats=bn_stats, replay=False)
        assert_equal(got, want)
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Awkward(nn.Module):
    """A module called twice, tied weights, an in-place change of a kept output, parameters of the root itself."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(8))
        self.first, self.twice, self.tied = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.twice.weight
        self.early, self.late = nn.LayerNorm(8), nn.LayerNorm(8)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(F.pixel_unshuffle(x, 2).flatten(2).mT)
        x = x * self.token
        y = self.early(self.twice(self.twice(x)))
        y += x  # overwrites what `early` returned
        y = self.act(y)
        y = self.late(y) + self.tied(y)
        return self.head((y * self.token).mean(1))


def test_awkward_model() -> None:
    model = randomized(Awkward())
    twin = copy.deepcopy(model)
    x, y = batch()
    opt, plain = (create_optimizer_v2(m, "samon", lr=0.1, rho=0.5, perturb="late") for m in (model, twin))
    for _ in range(4):
        got = step(model, opt, lambda: F.cross_entropy(model(x), y))
        assert_equal(got, step(twin, plain, lambda: F.cross_entropy(twin(x), y), replay=False))
    assert {model.first, model.twice, model.early} <= set(PLANS[opt].prefix)
    assert PLANS[opt].cloned == {model.early}
    assert model.tied not in PLANS[opt].prefix


class Overwriting(nn.Module):
    """Code of the root's own adds in place to a kept output, and no module behind it keeps the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.early, self.late, self.head = (
            nn.Linear(12, 8),
            nn.LayerNorm(8),
            nn.LayerNorm(8),
            nn.Linear(8, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(F.pixel_unshuffle(x, 2).flatten(2).mT)
        y = self.early(x)
        y += x
        return self.head(self.late(y).mean(1))


def test_an_output_overwritten_after_it_was_kept_is_not_used() -> None:
    model = randomized(Overwriting())
    twin = copy.deepcopy(model)
    x, y = batch()
    opt, plain = (create_optimizer_v2(m, "samon", lr=0.1, rho=0.5, perturb="late") for m in (model, twin))
    for _ in range(4):  # recorded, found out, replayed with a copy
        got = step(model, opt, lambda: F.cross_entropy(model(x), y))
        assert_equal(got, step(twin, plain, lambda: F.cross_entropy(twin(x), y), replay=False))
    assert PLANS[opt].cloned == {model.early}


def test_changed_order_is_noticed() -> None:
    """A module that ran in front and now runs behind the cut is not replayed."""

    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.head = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 5)
            self.other = nn.LayerNorm(3)
            self.swapped = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.other(x.mean((2, 3)))
            x = self.a(self.norm(x)) if self.swapped else self.norm(self.a(x))
            return self.head(x)

    model = randomized(Switch())
    twin = copy.deepcopy(model)
    x, y = batch()
    opt, plain = (create_optimizer_v2(m, "samon", lr=0.1, rho=0.5, perturb="^norm") for m in (model, twin))
    for swapped in (False, False, True, True, True, False):
        model.swapped = twin.swapped = swapped
        got = step(model, opt, lambda: F.cross_entropy(model(x), y))
        assert_equal(got, step(twin, plain, lambda: F.cross_entropy(twin(x), y), replay=False))


def test_functional_use_of_a_perturbed_parameter() -> None:
    """Code that reads a late norm's weight early, without calling it: nothing that depends on it is kept."""

    class Peek(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.other = nn.Linear(3, 3), nn.Linear(3, 5), nn.LayerNorm(3)
            self.norm = nn.LayerNorm(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(self.other(x.mean((2, 3)))) * self.norm.weight[:3]
            return self.norm(self.second(x))

    model = randomized(Peek())
    twin = copy.deepcopy(model)
    x, y = batch()
    opt, plain = (create_optimizer_v2(m, "samon", lr=0.1, rho=0.5, perturb="^norm") for m in (model, twin))
    for _ in range(3):
        got = step(model, opt, lambda: F.cross_entropy(model(x), y))
        assert_equal(got, step(twin, plain, lambda: F.cross_entropy(twin(x), y), replay=False))


def test_dropout_in_front_is_the_same_in_both_passes_and_late_noise_follows_the_option() -> None:
    model = randomized(LayerNormNet(dropout=0.5))
    twin = copy.deepcopy(model)
    x, y = batch()
    opt, plain = (create_optimizer_v2(m, "samon", lr=0.1, rho=0.5, perturb=r"norms\.3") for m in (model, twin))
    for _ in range(3):
        got = step(model, opt, lambda: F.cross_entropy(model(x), y), same_noise=True)
        want = step(twin, plain, lambda: F.cross_entropy(twin(x), y), same_noise=True, replay=False)
        assert_equal(got, want)


def test_front_runs_once() -> None:
    """Exact operation counts: everything in front of the cut runs forward once, and its ascent backward never."""
    model = timm.create_model("resnet18", num_classes=5).train()
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])

    def count(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    opt = create_optimizer_v2(model, "samon", lr=0.1, perturb="layer4")
    full = count(lambda: samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), replay=False))
    samon.two_pass(opt, lambda: F.cross_entropy(model(x), y))
    ran = []
    model.layer1[0].conv1.register_forward_hook(lambda *_: ran.append(1))
    replayed = count(lambda: samon.two_pass(opt, lambda: F.cross_entropy(model(x), y)))
    assert len(ran) == 1
    stages = (model.conv1, model.bn1, model.maxpool, model.layer1, model.layer2, model.layer3)
    with torch.no_grad():  # the first convolution of layer4 is in front of its first norm too
        once = count(lambda: nn.Sequential(*stages, model.layer4[0].conv1)(x))
    assert full - replayed == once > 0


def test_parameters_unfrozen_in_front_of_the_cut_move_it() -> None:
    model = randomized(BatchNormNet())
    twin = copy.deepcopy(model)
    x, y = batch()
    perturb = r"blocks\.[02]"
    opt, plain = (create_optimizer_v2(m, "samon", lr=0.1, rho=0.5, perturb=perturb) for m in (model, twin))
    for frozen in (True, True, False, False, True, True):  # recorded, replayed, each
        for m in (model, twin):
            m.blocks[0].requires_grad_(not frozen)
        got = step(model, opt, lambda: F.cross_entropy(model(x), y))
        assert_equal(got, step(twin, plain, lambda: F.cross_entropy(twin(x), y), replay=False))
        assert PLANS[opt].prefix
        assert (model.blocks[0] in PLANS[opt].prefix) == frozen
