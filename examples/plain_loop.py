"""SAM-ON in a plain training loop: python examples/plain_loop.py"""

from functools import partial

import timm
import torch
import torch.nn.functional as F
from fashion import accuracy, batches, small_resnet

import samon  # registers the optimizers with timm


def loss_fn(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def main(epochs: int = 3, samples: int | None = None) -> float:
    model = small_resnet()
    optimizer = timm.optim.create_optimizer_v2(model, "samon-layerl2", lr=0.05, momentum=0.9, rho=0.05)
    loader = batches("train", samples=samples)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = samon.two_pass(optimizer, partial(loss_fn, model, x, y))  # in place of loss.backward()
            optimizer.step()
        print(f"loss of the last batch {loss:.3f}")
    return accuracy(model)


if __name__ == "__main__":
    print(f"test accuracy {main():.1f} %")
