"""The CIFAR networks: published sizes, initialization, and timm's model interface."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import samon.models.cifar as cifar
from samon.scope import norm_modules

# Exact counts for 10 classes, and the millions their papers (or the usual public definitions) state.
COUNTS = {
    "resnet20_cifar": (269_722, 0.27),
    "resnet20_gn_cifar": (269_722, 0.27),
    "resnet56_cifar": (853_018, 0.85),
    "resnext29_32x4d_cifar": (4_775_754, 4.8),
    "wrn28_10_cifar": (36_479_194, 36.5),
    "vgg13_bn_cifar": (9_416_010, 9.4),
    "vgg16_bn_cifar": (14_728_266, 14.7),
    "vgg19_bn_cifar": (20_040_522, 20.0),
    "densenet100_cifar": (769_162, 0.8),
    "resnet18_cifar": (11_173_962, 11.2),
    "resnet101_cifar": (42_512_970, 42.5),
    "vit_tiny_cifar": (5_362_762, 5.4),
    "vit_small_cifar": (21_342_346, 21.3),
}
CONV = [name for name in COUNTS if not name.startswith("vit")]


def small(name: str, **kwargs: object) -> nn.Module:
    """The network on the meta device: shapes and counts without the cost of initializing 40 M numbers."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    exact, millions = COUNTS[name]
    model = small(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == exact
    kind = nn.LayerNorm if name not in CONV else nn.GroupNorm if "_gn_" in name else nn.BatchNorm2d
    assert all(isinstance(norm, kind) for norm in norm_modules(model).values())
    digits = len(str(millions).split(".")[1])
    assert round(count / 1e6, digits) == millions


@pytest.mark.parametrize("name", COUNTS)
def test_timm_interface(name: str) -> None:
    assert timm.is_model(name)
    model = small(name, num_classes=100)
    assert model.default_cfg["input_size"] == (3, 32, 32)
    assert model.default_cfg["crop_pct"] == 1.0
    x = torch.empty(2, 3, 32, 32, device="meta")
    features = model.forward_features(x)
    assert model.forward_head(features).shape == model(x).shape == (2, 100)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    pool = model.default_cfg["pool_size"]
    assert pool is None or features.shape[-2:] == pool
    assert model.get_classifier().out_features == 100
    classifier = model.default_cfg["classifier"]
    assert model.get_submodule(classifier) is model.get_classifier()
    assert isinstance(model.get_submodule(model.default_cfg["first_conv"]), nn.Conv2d)
    with torch.device("meta"):
        model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", CONV)
def test_feature_taps(name: str) -> None:
    model = small(name, features_only=True)
    outputs = model(torch.empty(1, 3, 32, 32, device="meta"))
    assert [o.shape[1] for o in outputs] == model.feature_info.channels()
    assert [32 // o.shape[2] for o in outputs] == model.feature_info.reduction()


@pytest.mark.parametrize("name", ["resnet56_cifar", "densenet100_cifar"])
def test_initialization_is_he_fan_out(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert (model.fc.bias == 0).all()


def test_pad_shortcut_subsamples_and_pads() -> None:
    x = torch.randn(2, 4, 6, 6)
    y = cifar.PadShortcut(4, stride=2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_wide_block_projection_sees_the_activated_input() -> None:
    """WideResNet's projecting block applies its first BN-ReLU to both branches; others keep x."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    block = cifar.WideBlock(4, 8, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    assert block.shortcut is not None
    torch.testing.assert_close(block(x), block.shortcut(torch.relu(block.bn1(x))))
    same = cifar.WideBlock(4, 4, 1).eval()
    nn.init.zeros_(same.conv2.weight)
    assert torch.equal(same(x), x)


@pytest.mark.parametrize("name", ["resnet56_cifar", "wrn28_10_cifar", "densenet100_cifar", "vgg13_bn_cifar"])
def test_layer_decay_groups_follow_depth(name: str) -> None:
    model = small(name)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.9)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    by_name = {n: scale[id(p)] for n, p in model.named_parameters()}
    assert by_name["fc.weight"] == 1.0
    firsts = [next(s for n, s in by_name.items() if n.startswith(f"layer{i}.0.")) for i in (1, 2, 3)]
    assert firsts == sorted(firsts)
    assert firsts[0] < firsts[-1] < 1.0
    assert min(by_name.values()) == next(iter(by_name.values()))


def test_options_and_refusals() -> None:
    def resnet(**kwargs: object) -> nn.Module:
        return small("resnet56_cifar", **kwargs)

    assert sum(p.numel() for p in resnet(shortcut="B").parameters()) == 855_770
    assert resnet(in_chans=1).conv1.in_channels == 1
    rates = [m.drop_prob for m in resnet(drop_path_rate=0.2).modules() if type(m).__name__ == "DropPath"]
    assert len(rates) == 26
    assert rates[-1] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="shortcut='C'"):
        resnet(shortcut="C")
    with pytest.raises(ValueError, match="--grad-checkpointing"):
        resnet().set_grad_checkpointing()
