"""Fine-tune a pretrained timm model with SAM-ON: python examples/finetune_pretrained.py [MODEL] [WEIGHTS]

WEIGHTS is a local file with timm's parameter names; without it, timm downloads the model's weights. Uses layer-wise
learning rate decay, a frozen stem and a new classifier, like train.py's --layer-decay, --freeze and --num-classes.
"""

import sys
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from fashion import accuracy, batches
from torch import nn

import samon
from samon.cli.program import run_script
from samon.errors import reraise_as_user_error

SIZE = 48  # upsampled from 28 px, which is too small for an ImageNet model; models of fixed input size use their own


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def create_pretrained(name: str, weights: str) -> Any:
    """The pretrained model, with a new classifier for 10 classes of gray images."""
    overlay = {"file": weights} if weights else None
    with reraise_as_user_error(f"pretrained weights of {name}"):
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=10)


def train(model: nn.Module, optimizer: Any, epochs: int, samples: int | None, size: int) -> float:
    """Train by two-pass steps; returns the test accuracy in %."""
    loader = batches("train", 20, samples, size)
    for _ in range(epochs):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            samon.two_pass(optimizer, partial(loss_fn, model, x, y))
            optimizer.step()
    return accuracy(model, samples=samples, size=size)


def main(name: str = "tf_efficientnet_lite0", weights: str = "", epochs: int = 2, samples: int | None = None) -> float:
    model = create_pretrained(name, weights)
    config: Any = model.pretrained_cfg
    model.get_submodule(config["first_conv"]).requires_grad_(False)
    size = config["input_size"][-1] if config.get("fixed_input_size") else SIZE
    optimizer: Any = timm.optim.create_optimizer_v2(
        model, "samon", lr=0.02, momentum=0.9, weight_decay=1e-4, layer_decay=0.75, rho=0.1
    )
    perturbed = optimizer.perturbed_parameters().values()
    print(f"{sum(p.numel() for p in perturbed):,} parameters in {len(perturbed)} tensors are perturbed")
    return train(model, optimizer, epochs, samples, size)


if __name__ == "__main__":
    arguments = dict(zip(("name", "weights"), sys.argv[1:], strict=False))
    run_script(lambda: print(f"test accuracy {main(**arguments):.1f} %"))  # type: ignore[arg-type]
