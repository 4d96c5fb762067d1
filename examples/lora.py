"""LoRA on a pretrained ViT with SAM-ON: python examples/lora.py [MODEL] [WEIGHTS]

The normalization layers are frozen with the rest of the backbone, so SAM-ON would have nothing to perturb;
`perturb_frozen=True` perturbs them although they are not trained, and restores them exactly. WEIGHTS is a local file
with timm's parameter names; without it, timm downloads the model's weights.
"""

import sys
from typing import Any

import timm.optim
from finetune_pretrained import create_pretrained, train
from peft import LoraConfig, get_peft_model

import samon  # noqa: F401  registers its optimizers with timm
from samon.cli.program import run_script


def lora_model(name: str, weights: str = "") -> Any:
    """The model with LoRA on the projections to queries, keys and values, and a new classifier; the rest is frozen."""
    model = create_pretrained(name, weights)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["qkv"], modules_to_save=["head"]))


def main(name: str = "vit_tiny_patch16_224", weights: str = "", epochs: int = 1, samples: int | None = None) -> float:
    model = lora_model(name, weights)
    size = model.pretrained_cfg["input_size"][-1]
    optimizer: Any = timm.optim.create_optimizer_v2(model, "samon-adamw", lr=1e-3, rho=0.5, perturb_frozen=True)
    perturbed = optimizer.perturbed_parameters().values()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained:,} parameters are trained, {sum(p.numel() for p in perturbed):,} others are perturbed")
    return train(model, optimizer, epochs, samples, size)


if __name__ == "__main__":
    arguments = dict(zip(("name", "weights"), sys.argv[1:], strict=False))
    run_script(lambda: print(f"test accuracy {main(**arguments):.1f} %"))  # type: ignore[arg-type]
