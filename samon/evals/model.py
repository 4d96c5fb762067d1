"""The models of validate.py: which --model names, their pretrained weights, and test-time pooling."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import apply_test_time_pool
from torch import nn

from samon.errors import UserError
from samon.trainer import model as models
from samon.trainer.config import Config


def model_names(model: str | None) -> list[str | None]:
    """The models that --model stands for: all with ImageNet weights, those of a pattern or of a file, or itself.

    Raises:
        UserError: the pattern or file names none.
    """
    if model == "all":
        pretrained = timm.list_models(pretrained=True)
        return [name for name in pretrained if getattr(timm.get_pretrained_cfg(name), "num_classes", 0) == 1000]
    if model is None or timm.is_model(model):
        return [model]
    if any(sign in model for sign in "*?["):
        names = timm.list_models(model, pretrained=True)
    elif Path(model).is_file():
        names = Path(model).read_text().split()
    else:
        return [model]
    if not names:
        raise UserError(f"--model {model}: no model with pretrained weights; timm.list_models lists them")
    return [*names]


def create(config: Config, pretrained: bool) -> nn.Module:
    """The model of the settings.

    Raises:
        UserError: there are no pretrained weights for it, or they leave its classifier at random.
    """
    otherwise = "give --checkpoint FILE, or --no-pretrained for random weights"
    if pretrained and ":" not in config.model:  # without a source of its own, such as hf-hub:
        known = timm.get_pretrained_cfg(config.model)
        if known is None or not known.has_weights:
            raise UserError(f"--model {config.model} has no pretrained weights; {otherwise}")
        if config.num_classes not in (None, 0, known.num_classes):
            what = f"the pretrained weights of {config.model} have {known.num_classes}, its classifier would be random"
            raise UserError(f"--num-classes {config.num_classes}: {what}; {otherwise}")
    try:
        return models.create_model(config, pretrained=pretrained)
    except UserError as error:
        if pretrained and isinstance(error.__cause__, OSError):
            raise UserError(f"{error}; {otherwise}") from error
        raise


@torch.no_grad()
def test_time_pooling(config: Config, model: Any, data_config: dict[str, Any]) -> nn.Module:
    """timm's head for images larger than the model's own, which classifies in every place where those would lie.

    On images of the model's own size it must change nothing.

    Raises:
        UserError: it does.
    """
    classes, channels, size = model.num_classes, data_config["input_size"][0], model.pretrained_cfg["input_size"][1:]
    image = torch.linspace(-2, 2, channels * size[0] * size[1]).sin().reshape(1, channels, *size)
    try:
        before = model.eval()(image)
        pooled, larger = apply_test_time_pool(model, data_config)
        fits = not larger or torch.allclose(before, pooled.eval()(image), rtol=1e-3, atol=1e-3)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
        fits = False
    if not fits:
        raise UserError(f"--test-pool: {config.model} has no plain average pooling before its classifier; drop it")
    if larger:
        pooled.num_classes = classes
        data_config["crop_pct"] = 1.0
    return pooled
