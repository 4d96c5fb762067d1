"""The 11 networks of the paper's CIFAR experiments (A.1, B.1, B.2) and two small ones, registered with timm.

`timm.create_model('wrn28_10_cifar', num_classes=100)`; inputs are [B, 3, 32, 32]. The convolutional ones are
chains of named modules ending in global average pooling and one linear layer, initialized by He et al.'s rule
with fan-out, as the authors' code of ResNet, WideResNet, ResNeXt and DenseNet does. Parameter counts below
are for 10 classes; `docs/recipes.md` says which one is built where a published name has several meanings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, create_classifier
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import Tensor, nn
from torchvision.models.resnet import conv3x3

# Channel statistics of the training set, as the paper's code normalizes them.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


Norm = Any  # Callable[[int], nn.Module], the normalization layer for this number of channels; timm asks for a type


class CifarNet(nn.Module):
    """Named modules applied one after the other, then global pooling, dropout and a linear classifier.

    `stages` are the names of the modules that timm's feature extraction taps (channels, reduction)."""

    def __init__(
        self,
        features: dict[str, nn.Module],
        stages: dict[str, tuple[int, int]],
        num_features: int,
        num_classes: int = 10,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.feature_names = tuple(features)
        for name, module in features.items():
            self.add_module(name, module)
        self.feature_info = [{"num_chs": c, "reduction": r, "module": name} for name, (c, r) in stages.items()]
        self.num_features = self.head_hidden_size = num_features
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.global_pool, self.fc = create_classifier(num_features, num_classes, pool_type=global_pool)
        for module in self.modules():  # N(0, 2 / fan_out) for convolutions, normalization (1, 0) as PyTorch has it
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, num_features, H', W']"""
        for name in self.feature_names:
            x = getattr(self, name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, num_features, H', W'] -> logits [B, num_classes], or the pooled features with `pre_logits`"""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, num_classes]"""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        pool = global_pool or self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Depth groups for layer-wise learning-rate decay: the stem, then stages (coarse) or their blocks."""
        block = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": [(block, None), (r"^norm\.", (99_999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise ValueError("the CIFAR networks have no gradient checkpointing; remove --grad-checkpointing")


class PadShortcut(nn.Module):
    """Option A of the ResNet paper: subsample; new channels are zero, half before and half after."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.before, self.after, self.stride = new_channels // 2, new_channels - new_channels // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def resnet(
    block: type[BasicBlock] | type[Bottleneck],
    layers: tuple[int, ...],
    channels: tuple[int, ...],
    stem_width: int,
    *,
    shortcut: str = "B",
    cardinality: int = 1,
    base_width: int = 64,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    norm: Norm = nn.BatchNorm2d,
    **head: Any,
) -> CifarNet:
    """Residual network: 3 x 3 stem, then stages i of `layers[i]` blocks of `channels[i]` planes, stride 2 between."""
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut={shortcut!r}: use 'A' (zero padding) or 'B' (1x1 convolution)")
    features = {"conv1": conv3x3(in_chans, stem_width), "bn1": norm(stem_width), "act1": nn.ReLU(inplace=True)}
    stages = {"act1": (stem_width, 1)}
    inplanes, index, stride = stem_width, 0, 1
    for i, (depth, planes) in enumerate(zip(layers, channels, strict=True), 1):
        outplanes = planes * block.expansion
        step, blocks = 1 if i == 1 else 2, []
        stride *= step
        for _ in range(depth):
            downsample: nn.Module | None = None
            if step != 1 or inplanes != outplanes:
                if shortcut == "A":
                    downsample = PadShortcut(outplanes - inplanes, step)
                else:
                    downsample = downsample_conv(inplanes, outplanes, 1, step, norm_layer=norm)
            rate = drop_path_rate * index / max(1, sum(layers) - 1)  # deeper blocks are dropped more often
            path = DropPath(rate) if rate else None
            kwargs: dict[str, Any] = {"drop_path": path, "norm_layer": norm}
            blocks.append(block(inplanes, planes, step, downsample, cardinality, base_width, **kwargs))
            inplanes, step, index = outplanes, 1, index + 1
        features[f"layer{i}"] = nn.Sequential(*blocks)
        stages[f"layer{i}"] = (outplanes, stride)
    return CifarNet(features, stages, inplanes, **head)


class WideBlock(nn.Module):
    """Pre-activation block of the WideResNet paper; a projection takes the first BN-ReLU's output."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_chs), conv3x3(in_chs, out_chs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out_chs), conv3x3(out_chs, out_chs)
        project = stride != 1 or in_chs != out_chs
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + shortcut


def wide_resnet(depth: int, widen: int, *, in_chans: int = 3, **head: Any) -> CifarNet:
    """WRN-depth-widen: (depth - 4) / 6 blocks in each of three stages of (16, 32, 64) x `widen`."""
    features: dict[str, nn.Module] = {"conv1": conv3x3(in_chans, 16)}
    stages, in_chs = {"conv1": (16, 1)}, 16
    for i, (width, stride) in enumerate(((16, 1), (32, 2), (64, 2)), 1):
        chs = [in_chs] + [width * widen] * ((depth - 4) // 6)
        blocks = [WideBlock(a, b, 1 if j else stride) for j, (a, b) in enumerate(pairwise(chs))]
        features[f"layer{i}"], in_chs = nn.Sequential(*blocks), chs[-1]
        stages[f"layer{i}"] = (in_chs, 2 ** (i - 1))
    features |= {"norm": nn.BatchNorm2d(in_chs), "act": nn.ReLU(inplace=True)}
    return CifarNet(features, stages, in_chs, **head)


def vgg(depths: tuple[int, ...], *, in_chans: int = 3, **head: Any) -> CifarNet:
    """VGG with batch norm for 32 px: five stages of 3 x 3 convolutions and 2 x 2 max-pooling."""
    features: dict[str, nn.Module] = {}
    stages, in_chs = {}, in_chans
    for i, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512, 512), strict=True), 1):
        modules: list[nn.Module] = []
        for _ in range(depth):
            modules += [nn.Conv2d(in_chs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            in_chs = width
        features[f"layer{i}"] = nn.Sequential(*modules, nn.MaxPool2d(2))
        stages[f"layer{i}"] = (width, 2**i)
    return CifarNet(features, stages, in_chs, **head)


class DenseLayer(nn.Module):
    """BN-ReLU-1x1 (4k)-BN-ReLU-3x3 (k), the result appended to the input's channels."""

    def __init__(self, in_chs: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_chs), nn.Conv2d(in_chs, 4 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(out)))], 1)


def densenet_bc(depth: int, growth: int, *, in_chans: int = 3, **head: Any) -> CifarNet:
    """DenseNet-BC: three blocks of (depth - 4) / 6 layers, transitions halve channels and resolution."""
    chs = 2 * growth
    features: dict[str, nn.Module] = {"conv1": conv3x3(in_chans, chs)}
    stages = {"conv1": (chs, 1)}
    for i in (1, 2, 3):
        modules: list[nn.Module] = []
        if i > 1:  # the transition: BN-ReLU-1x1 to half the channels, 2 x 2 average pooling
            conv = nn.Conv2d(chs, chs // 2, 1, bias=False)
            modules.append(nn.Sequential(nn.BatchNorm2d(chs), nn.ReLU(inplace=True), conv, nn.AvgPool2d(2)))
            chs //= 2
        for _ in range((depth - 4) // 6):
            modules.append(DenseLayer(chs, growth))
            chs += growth
        features[f"layer{i}"] = nn.Sequential(*modules)
        stages[f"layer{i}"] = (chs, 2 ** (i - 1))
    features |= {"norm": nn.BatchNorm2d(chs), "act": nn.ReLU(inplace=True)}
    return CifarNet(features, stages, chs, **head)


# What all have in common for timm, and what differs with the last feature map or the architecture.
_CFG = {"url": "", "num_classes": 10, "input_size": (3, 32, 32), "pool_size": (8, 8), "mean": CIFAR10_MEAN}
_CFG |= {"std": CIFAR10_STD, "crop_pct": 1.0, "interpolation": "bicubic", "first_conv": "conv1", "classifier": "fc"}
_POOL4, _VGG = {"pool_size": (4, 4)}, {"pool_size": (1, 1), "first_conv": "layer1.0"}
_VIT = {"pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True}
_STAGES4 = (64, 128, 256, 512)


class Row(NamedTuple):
    """A registered network: how it is built, how many stages feature extraction taps, timm's cfg, what it is."""

    net: Callable[..., nn.Module]
    taps: int
    cfg: dict[str, Any]
    doc: str


def _vit(width: int, heads: int) -> Callable[..., nn.Module]:
    return partial(VisionTransformer, img_size=32, patch_size=4, embed_dim=width, depth=12, num_heads=heads)


_RESNET20, _RESNET56 = (partial(resnet, BasicBlock, (n, n, n), (16, 32, 64), 16, shortcut="A") for n in (3, 9))
_RESNET20_GN = partial(_RESNET20, norm=partial(nn.GroupNorm, 8))
_RESNEXT29 = partial(resnet, Bottleneck, (3, 3, 3), (64, 128, 256), 64, cardinality=32, base_width=4)
_RESNET18 = partial(resnet, BasicBlock, (2, 2, 2, 2), _STAGES4, 64)
_RESNET101 = partial(resnet, Bottleneck, (3, 4, 23, 3), _STAGES4, 64)
_WRN28, _DENSENET100 = partial(wide_resnet, 28, 10), partial(densenet_bc, 100, 12)
_VGG13, _VGG16, _VGG19 = (partial(vgg, depths) for depths in ((2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4)))

NETS = {
    "resnet20_cifar": Row(_RESNET20, 4, {}, "ResNet-20 (He et al. 2016, 4.2), 0.270 M: for small experiments."),
    # The statistics of GroupNorm (Wu & He 2018), unlike BatchNorm's, do not depend on the other images: m-sharpness 1.
    "resnet20_gn_cifar": Row(
        _RESNET20_GN, 4, {}, "ResNet-20 with GroupNorm of 8 groups instead of BatchNorm, 0.270 M."
    ),
    "resnet56_cifar": Row(_RESNET56, 4, {}, "ResNet-56 (He et al. 2016, 4.2), 0.853 M; shortcut='B': 0.856 M."),
    "resnext29_32x4d_cifar": Row(_RESNEXT29, 4, {}, "ResNeXt-29, 32 x 4d (Xie et al. 2017, 5.3), 4.78 M."),
    "resnet18_cifar": Row(_RESNET18, 5, _POOL4, "ResNet-18 with a 3 x 3 stem and no max-pooling, 11.17 M."),
    "resnet101_cifar": Row(_RESNET101, 5, _POOL4, "ResNet-101 with a 3 x 3 stem and no max-pooling, 42.51 M."),
    "wrn28_10_cifar": Row(_WRN28, 4, {}, "WideResNet-28-10 (Zagoruyko & Komodakis 2016), 36.48 M."),
    "vgg13_bn_cifar": Row(_VGG13, 5, _VGG, "VGG-13 with batch norm and one linear layer, 9.42 M."),
    "vgg16_bn_cifar": Row(_VGG16, 5, _VGG, "VGG-16 with batch norm and one linear layer, 14.73 M."),
    "vgg19_bn_cifar": Row(_VGG19, 5, _VGG, "VGG-19 with batch norm and one linear layer, 20.04 M."),
    # Without bottlenecks and compression it would have 7.0 M.
    "densenet100_cifar": Row(_DENSENET100, 4, {}, "DenseNet-BC-100, k = 12 (Huang et al. 2017), 0.77 M."),
    # timm's initialization; 12 layers.
    "vit_tiny_cifar": Row(_vit(192, 3), 0, _VIT, "ViT-T (width 192, 3 heads), 4 x 4 patches of 32 px, 5.36 M."),
    "vit_small_cifar": Row(_vit(384, 6), 0, _VIT, "ViT-S (width 384, 6 heads), 4 x 4 patches of 32 px, 21.34 M."),
}
default_cfgs = generate_default_cfgs({name: _CFG | row.cfg for name, row in NETS.items()})  # timm looks for this name


def _register(name: str, row: Row) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if row.taps:
            kwargs["feature_cfg"] = {"out_indices": tuple(range(row.taps)), "flatten_sequential": False}
        return build_model_with_cfg(row.net, name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = row.doc
    register_model(create)


for _name, _row in NETS.items():
    _register(_name, _row)
