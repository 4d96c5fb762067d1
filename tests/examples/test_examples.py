"""The examples run with the real libraries, scaled down: they learn, and their steps are two-pass steps."""

import importlib
import runpy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import samon
from tests import efficientnet_lite0

EXAMPLES = Path(__file__).parents[2] / "examples"
CHANCE = 10  # %


@pytest.fixture(autouse=True)
def example_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Imports work as for a user: the examples' folder is first on the path."""
    monkeypatch.syspath_prepend(EXAMPLES)
    torch.manual_seed(0)
    yield
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's and Accelerate's own
@pytest.mark.parametrize("name", ["plain_loop", "lightning_module", "accelerate_loop"])
def test_learns(name: str) -> None:
    assert importlib.import_module(name).main(epochs=2, samples=1500) > 35 > CHANCE


@pytest.mark.filterwarnings("ignore")
def test_lightnings_step_is_the_two_pass_step() -> None:
    """Automatic optimization over three batches equals samon.two_pass up to rounding."""
    import lightning

    example = importlib.import_module("lightning_module")
    module, twin = example.Classifier("samon", rho=0.1).double(), example.Classifier("samon", rho=0.1).double()
    twin.load_state_dict(module.state_dict())
    data = [(torch.randn(8, 1, 28, 28, dtype=torch.float64), torch.arange(8)) for _ in range(3)]
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", precision="64-true", **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    optimizer = twin.configure_optimizers()
    for x, y in data:
        optimizer.zero_grad()
        samon.two_pass(optimizer, lambda x=x, y=y: F.cross_entropy(twin.model.train()(x), y))
        optimizer.step()
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_accelerate_prints_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All output goes through Accelerate, which prints on the main process only."""
    fashion: Any = importlib.import_module("fashion")
    printed: list[str] = []
    monkeypatch.setattr("accelerate.Accelerator.print", lambda self, *text: printed.extend(text))
    few = partial(lambda load, *args, **options: load(*args, **options | {"samples": 50}), fashion.batches)
    monkeypatch.setattr(fashion, "batches", few)
    runpy.run_path(str(EXAMPLES / "accelerate_loop.py"), run_name="__main__")
    assert len(printed) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_hugging_face_trainer_accumulates_two_pass_steps(tmp_path: Path) -> None:
    """Two updates of two micro-batches each equal samon.two_pass with loss_scale=1/2 up to rounding."""
    pytest.importorskip("transformers")
    example = importlib.import_module("huggingface_trainer")
    model, twin = example.Classifier().double(), example.Classifier().double()
    twin.load_state_dict(model.state_dict())
    data = [{"x": torch.randn(1, 28, 28).double(), "labels": i % 10} for i in range(16)]
    args = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    exact = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    example.make_trainer(model, data, str(tmp_path), **args, **exact).train()
    optimizer: Any = timm.optim.create_optimizer_v2(twin, "samon-layerl2", lr=0.05, momentum=0.9, rho=0.05)
    for start in range(0, 16, 4):
        batch = torch.utils.data.default_collate(data[start : start + 4])
        samon.two_pass(optimizer, lambda b=batch: twin.train()(**b)["loss"], loss_scale=0.5)
        if start % 8 == 4:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_lora_perturbs_the_frozen_normalization_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pth")
    example = importlib.import_module("lora")
    assert 0 <= example.main("test_vit", str(tmp_path / "weights.pth"), samples=20) <= 100
    model = example.lora_model("test_vit", str(tmp_path / "weights.pth"))
    sizes = [p.numel() for name, p in model.named_parameters() if "norm" in name and not p.requires_grad]
    assert f" {sum(sizes):,} others are perturbed" in capsys.readouterr().out


@pytest.mark.slow
def test_finetune_pretrained(tmp_path: Path) -> None:
    """From real ImageNet weights, 40 updates are enough to be far above chance: 31 to 67 % for five seeds."""
    torch.save(efficientnet_lite0.state_dict(), tmp_path / "lite0.pth")
    example = importlib.import_module("finetune_pretrained")
    assert example.main(weights=str(tmp_path / "lite0.pth"), epochs=1, samples=800) > 20 > CHANCE


@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_finetunes_other_models(name: str, tmp_path: Path) -> None:
    torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pth")
    example = importlib.import_module("finetune_pretrained")
    assert 0 <= example.main(name, str(tmp_path / "weights.pth"), epochs=1, samples=20) <= 100


def test_plain_loop_is_short() -> None:
    """What a user copies: the loop itself, from `def main` to `return`."""
    lines = (EXAMPLES / "plain_loop.py").read_text().splitlines()
    body = lines[next(i for i, line in enumerate(lines) if line.startswith("def main")) :]
    assert body.index('if __name__ == "__main__":') <= 20
