#!/usr/bin/env python3
"""APGD-CE and APGD-T of this project and of pyautoattack 0.2.0 side by side: seconds and robust points.

    python tools/bench_attack.py [--images 50] [--train-images 2000] [--batch-size 50]

A small network learns Fashion-MNIST (some seconds); both attack the same images in [0, 1], with 100 iterations, 9
target classes and one restart, in turns, so that other load on the machine hits both alike. The starting points differ,
so single images at the edge of the ball may as well. Needs `pip install pyautoattack==0.2.0`.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from samon.data.decode import decode_pil
from samon.data.shards import RawSample
from samon.data.source_factory import open_source
from samon.evals.attacks import ROBUST, Threat, attack, without_marks
from samon.evals.context import evaluating
from samon.files import markdown_table

THREATS = (("l2", 0.25), ("l2", 0.5), ("linf", 2 / 255), ("linf", 4 / 255))


def images(split: str, count: int) -> tuple[Tensor, Tensor]:
    """([N, 3, 28, 28] in [0, 1], [N]) of the embedded Fashion-MNIST."""
    source = open_source("wds/fashion-mnist", "data/fashion-mnist", split)
    samples = [s for s in source.read(range(count)) if isinstance(s, RawSample)]
    return torch.stack([to_tensor(decode_pil(s.image)) for s in samples]), torch.tensor([s.label for s in samples])


def train_network(count: int) -> nn.Module:
    """A network of two convolutions after 8 epochs on `count` images."""
    x, y = images("train", count)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 10))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(8):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


def ours(net: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, size: int) -> Tensor:
    """[N] bool: robust by this project's attacks."""
    batches = torch.arange(len(x)).split(size)
    with evaluating(net, requires_grad=False):
        results = [attack(net, x[i], y[i], i, Threat(norm, eps)) for i in batches]
    return without_marks(torch.cat(results)) == ROBUST


def theirs(net: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, size: int) -> Tensor:
    """[N] bool: robust by pyautoattack's."""
    name, names = {"l2": "L2", "linf": "Linf"}[norm], ["apgd-ce", "apgd-t"]
    attacks = AutoAttack(net, norm=name, eps=eps, version="custom", attacks=names, seed=0, device="cpu")
    attacks.apgd.n_restarts = 1  # as in AutoAttack's standard version
    adversarial, _ = attacks.run_standard_evaluation(x, y, batch_size=size)
    return net(adversarial).argmax(1) == y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50, help="images attacked")
    parser.add_argument("--train-images", type=int, default=2000, help="images that the network learns from")
    parser.add_argument("--batch-size", type=int, default=50, help="images at once")
    args = parser.parse_args()
    torch.manual_seed(0)
    net = train_network(args.train_images)
    x, y = images("validation", args.images)
    rows = [["threat", "robust, theirs", "robust, ours", "decided alike", "s, theirs", "s, ours", "ratio"]]
    for norm, eps in THREATS:
        robust, seconds = [], []
        for run in (theirs, ours):
            start = time.perf_counter()
            robust.append(run(net, x, y, norm, eps, args.batch_size))
            seconds.append(time.perf_counter() - start)
        counts = [str(int(images.sum())) for images in robust]
        alike, ratio = f"{int((robust[0] == robust[1]).sum())}/{len(x)}", f"{seconds[1] / seconds[0]:.2f}"
        rows.append([f"{norm} {eps:.4g}", *counts, alike, *(f"{s:.1f}" for s in seconds), ratio])
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
