"""Small networks for the tests, one for each kind of normalization, in float64."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Residual(nn.Module):
    """Two convolutions with BatchNorm, an in-place activation and an in-place addition."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y += x
        return self.act(y)


class BatchNormNet(nn.Module):
    def __init__(self, width: int = 6, classes: int = 5, depth: int = 3):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*[Residual(width) for _ in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


ShallowNet = partial(BatchNormNet, depth=1)  # where compiling or counting costs more than the fact needs


class LayerNormNet(nn.Module):
    """A class token and a position embedding that belong to no child module, pre-norm blocks."""

    def __init__(self, width: int = 8, classes: int = 5, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.mixes = nn.ModuleList(nn.Linear(17, 17) for _ in range(4))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, 2).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + self.drop(mix(norm(x).mT).mT.tanh())
        return self.head(x[:, 0])


class SharedGradients(nn.Module):
    """Sums whose terms get the same tensor from autograd as their gradient: `a` and `b`, and with one sample per group
    the biases of the two norms."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.a, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, : len(self.a)]
        return self.head((self.norms[0](x) + self.norms[1](x.square())) * (self.a + self.b))


class Peek(nn.Module):
    """Reads the weight of a late layer early, without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(3, 3), nn.Linear(3, 5), nn.LayerNorm(3)
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(self.other(x.mean((2, 3)))) * self.norm.weight[:3]))


class OwnBatchNorm(nn.Module):
    """A BatchNorm of the user's own, in the ways that people update running statistics."""

    def __init__(self, width: int, way: str = "replaced"):
        super().__init__()
        self.way = way
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("table", torch.arange(3.0).expand(2, 3), persistent=False)  # cannot be written to

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3))
        if self.way == "in place":
            self.mean.lerp_(mean.detach(), 0.1)
        elif self.way == "replaced":
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
        else:
            self.mean.data.lerp_(mean.data, 0.1)
        return (x - mean[:, None, None]) * self.weight[:, None, None] + self.bias[:, None, None]


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its special initial value, so that |w| and ||w|| matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.2)
    return model.double().train()


class Doubled(nn.Module):
    """A parametrization: the tensor is twice its parameter, for which no tensor is saved."""

    def forward(self, parameter: Tensor) -> Tensor:
        return 2 * parameter


def parametrized_norms(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.LayerNorm):
            parametrize.register_parametrization(module, "weight", Doubled())
    return model


def batch(size: int = 8, classes: int = 5, image: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, image, image, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (size,), generator=generator)


NETS = {"batchnorm": BatchNormNet, "layernorm": LayerNormNet}
LATE = {"batchnorm": r"blocks\.2", "layernorm": r"(norms|mixes)\.3"}  # as `perturb`


def two_logits(count: int, size: int) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    """(net, images [count, 3, size, size] far from the faces of [0, 1], labels, robust radii by norm) by torch's seed.

    Two logits +-w.x and others far below: robust to l2 (l_inf) exactly while margin / ||w|| (l1) > eps."""
    w = torch.rand(1, 3 * size**2) - 0.5
    net = nn.Sequential(nn.Flatten(), nn.Linear(w.numel(), 4))
    with torch.no_grad():
        net[1].weight.copy_(torch.cat([w, -w, 0 * w, 0 * w]))
        net[1].bias.copy_(torch.stack([-w.sum() / 2, w.sum() / 2, w.new_tensor(-50), w.new_tensor(-50)]))
    x = (torch.rand(count, 3, size, size) - 0.5) * 0.4 + 0.5
    margin = (net(x)[:, 0] - net(x)[:, 1]).detach().abs() / 2
    return net, x, net(x).argmax(1), {"l2": margin / w.norm(), "linf": margin / w.abs().sum()}
