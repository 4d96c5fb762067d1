"""The examples with the real libraries, scaled down: they learn, and their steps are the ones they say."""

import importlib
import runpy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import samon
from tests import efficientnet_lite0

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports an example as a user starts it: with its own folder first on the path."""
    monkeypatch.syspath_prepend(EXAMPLES)
    torch.manual_seed(0)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_plain_loop(example: Any) -> None:
    assert example("plain_loop").main(epochs=2, samples=1500) > 35  # chance: 10


@pytest.mark.filterwarnings("ignore")  # Lightning's own: few workers, short epochs
def test_lightning_trains(example: Any) -> None:
    assert example("lightning_module").main(epochs=2, samples=1500) > 35


@pytest.mark.filterwarnings("ignore")
def test_lightnings_step_is_the_two_pass_step(example: Any) -> None:
    """Automatic optimization over three batches against samon.two_pass, equal to rounding."""
    import lightning

    module = example("lightning_module").Classifier("samon", rho=0.1).double()
    twin = example("lightning_module").Classifier("samon", rho=0.1).double()
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
    expected = dict(twin.named_parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.filterwarnings("ignore")  # Accelerate's own
def test_accelerate_loop(example: Any) -> None:
    assert example("accelerate_loop").main(epochs=2, samples=1500) > 35


@pytest.mark.filterwarnings("ignore")
def test_accelerate_prints_once(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is printed goes through Accelerate, which prints on the main process alone."""
    fashion, printed = example("fashion"), []
    monkeypatch.setattr("accelerate.Accelerator.print", lambda self, *words: printed.extend(words))
    monkeypatch.setattr(fashion, "batches", partial(lambda load, *a, **how: load(*a, samples=50), fashion.batches))
    runpy.run_path(str(EXAMPLES / "accelerate_loop.py"), run_name="__main__")
    assert len(printed) == 1
    assert capsys.readouterr().out == ""


def test_finetune_pretrained(example: Any, tmp_path: Path) -> None:
    """From real ImageNet weights, 20 updates are enough to be far above chance."""
    path = tmp_path / "lite0.pth"
    torch.save(efficientnet_lite0.state_dict(), path)
    assert example("finetune_pretrained").main(weights=str(path), epochs=1, samples=400) > 20


@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_other_networks_are_fine_tuned_too(name: str, example: Any, tmp_path: Path) -> None:
    torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pth")
    tuned = example("finetune_pretrained")
    assert 0 <= tuned.main(name, str(tmp_path / "weights.pth"), epochs=1, samples=20) <= 100


def test_plain_loop_is_short() -> None:
    """What a user copies: the loop itself, from `def main` to `return`."""
    lines = (EXAMPLES / "plain_loop.py").read_text().splitlines()
    body = lines[next(i for i, line in enumerate(lines) if line.startswith("def main")) :]
    assert body.index('if __name__ == "__main__":') <= 20
    assert timm.optim.list_optimizers("samon-layerl2")
