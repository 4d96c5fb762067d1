"""LoRA on a pretrained ViT with SAM-ON: python examples/lora.py [MODEL] [WEIGHTS]

The normalization layers are frozen with the rest of the backbone, so SAM-ON would have nothing to perturb;
`perturb_frozen=True` perturbs them although they are not trained, and restores them exactly. WEIGHTS is a local file
with timm's parameter names; without it, timm downloads the model's weights.
"""

import sys
from functools import partial
from typing import Any

import timm
import torch.nn.functional as F
from fashion import accuracy, batches
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import samon
from samon.cli.program import run_script
from samon.errors import reraise_as_user_error


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def lora_model(name: str, weights: str = "") -> Any:
    """The model with LoRA on the projections to queries, keys and values, and a new classifier; the rest is frozen."""
    overlay = {"file": weights} if weights else None
    with reraise_as_user_error(f"pretrained weights of {name}"):
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=10)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["qkv"], modules_to_save=["head"]))


def main(name: str = "vit_tiny_patch16_224", weights: str = "", epochs: int = 1, samples: int | None = None) -> float:
    model = lora_model(name, weights)
    size = model.pretrained_cfg["input_size"][-1]
    optimizer: Any = timm.optim.create_optimizer_v2(model, "samon-adamw", lr=1e-3, rho=0.5, perturb_frozen=True)
    perturbed = optimizer.perturbed_parameters().values()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained:,} parameters are trained, {sum(p.numel() for p in perturbed):,} others are perturbed")
    for _ in range(epochs):
        model.train()
        for x, y in batches("train", 20, samples, size):
            optimizer.zero_grad()
            samon.two_pass(optimizer, partial(loss_fn, model, x, y))
            optimizer.step()
    return accuracy(model, samples=samples, size=size)


if __name__ == "__main__":
    arguments = dict(zip(("name", "weights"), sys.argv[1:], strict=False))
    run_script(lambda: print(f"test accuracy {main(**arguments):.1f} %"))  # type: ignore[arg-type]
