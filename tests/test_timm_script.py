"""A timm-style script, unchanged, with our optimizers: rho = 0 is the base optimizer, rho > 0 our own loop."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.task.task import TrainingTask
from torch import nn

import samon
from samon import timm_script
from samon.errors import UserError
from samon.sam import SAM
from tests.nets import LayerNormNet, batch
from tests.processes import launch
from tests.runs import ROOT
from tests.steps import assert_unchanged, loss_of, make, same, values

SCRIPT = ROOT / "tests/scripts/timm_style.py"
Weights = dict[str, dict[str, torch.Tensor]]  # of the model and of its average


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `python -m samon.timm_script` installs, and removes again."""
    monkeypatch.setattr(SAM, "__init__", SAM.__init__)
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", torch.amp.GradScaler.__init__)
    monkeypatch.setattr(TrainingTask, "__call__", TrainingTask.__call__)
    for module, name in timm_script.CLIPPING:
        monkeypatch.setattr(module, name, getattr(module, name))
    timm_script.install()
    yield
    timm_script._sams.clear()
    timm_script._scalers.clear()


def script(path: Path, *args: str) -> Weights:
    """Run the script in this process; return what it saved."""
    argv, sys.argv = sys.argv, [str(SCRIPT), "--save", str(path), *args]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = argv
    return torch.load(path, weights_only=True)


CASES = {
    "plain": [],
    "clipped": ["--clip-grad", "0.5"],
    "accumulated": ["--grad-accum-steps", "2"],
    "bfloat16": ["--amp-dtype", "bfloat16"],
    "float16": ["--amp-dtype", "float16", "--clip-grad", "1"],
    "transformer": ["--model", "test_vit"],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("opt", "base"), [("samon-layerl2", "sgd"), ("sam-adamw", "adamw")])
def test_rho_zero_is_the_base_optimizer(case: str, opt: str, base: str, tmp_path: Path, installed: None) -> None:
    args = [*CASES[case], "--lr", "0.01"]
    plain = script(tmp_path / "a", "--opt", base, *args)
    sharp = script(tmp_path / "b", "--opt", opt, "--opt-kwargs", "rho=0.0", *args)
    assert same(plain, sharp)


def own_loop(opt: str, options: dict[str, float], args: list[str]) -> dict[str, torch.Tensor]:
    """The same training by samon.two_pass."""
    value = dict(zip(args[::2], args[1::2], strict=True))
    torch.manual_seed(0)
    model = timm.create_model(value.get("--model", "test_resnet"), num_classes=10, in_chans=1)
    optimizer = create_optimizer_v2(model, opt, lr=0.05, momentum=0.9, weight_decay=1e-4, **options)
    criterion = LabelSmoothingCrossEntropy(0.1)
    count = int(value.get("--grad-accum-steps", 1))
    dtype = getattr(torch, value.get("--amp-dtype", "float32"))
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    amp = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    generator = torch.Generator().manual_seed(100)
    for _ in range(3):
        for _ in range(count):
            images = torch.randn(8, 1, 32, 32, generator=generator)
            target = torch.randint(0, 10, (8,), generator=generator)

            def forward(images: torch.Tensor = images, target: torch.Tensor = target) -> torch.Tensor:
                with amp:
                    return criterion(model(images), target)

            samon.two_pass(optimizer, forward, loss_scale=1 / count, scaler=scaler)
        scaler.unscale_(optimizer)
        optimizer.correct_gradients()
        if clip := value.get("--clip-grad"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), float(clip))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return dict(model.state_dict())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("opt", "options"), [("samon-layerl2", {"rho": 0.05}), ("sam", {"rho": 0.05, "gsam_alpha": 0.4})]
)
def test_equal_to_our_own_loop(case: str, opt: str, options: dict[str, float], tmp_path: Path, installed: None) -> None:
    kwargs = [f"{key}={value}" for key, value in options.items()]
    theirs = script(tmp_path / "a", "--opt", opt, *CASES[case], "--opt-kwargs", *kwargs)["model"]
    ours = own_loop(opt, options, CASES[case])
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_a_loss_without_backward_leaves_no_trace(tmp_path: Path, installed: None) -> None:
    """The script drops a loss and continues: nothing that it sees afterwards is at w + eps."""
    args = ["--opt", "sam", "--opt-kwargs", "rho=5.0", "--lr", "0"]
    done = script(tmp_path / "a", *args, "--skip-backward-at", "2", "--weight-decay", "0")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(done["model"][name], parameter), name
        assert torch.equal(done["ema"][name], parameter), name


def test_weights_are_perturbed_until_the_backward_pass_and_in_training_alone(installed: None) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10, in_chans=1)
    task = ClassificationTask(model, criterion=LabelSmoothingCrossEntropy(0.1), verbose=False)
    optimizer = create_optimizer_v2(model, "samon", lr=0.1, rho=0.3)
    before, data = values(model), (torch.randn(8, 1, 160, 160), torch.randint(0, 10, (8,)))
    result = task(*data)
    moved = torch.cat([(p - before[name]).detach().flatten() for name, p in model.named_parameters()])
    assert moved.norm().item() == pytest.approx(0.3, rel=1e-4)
    assert result["loss"].item() == pytest.approx(optimizer.stats["loss_perturbed"].item())
    assert all(p.grad is None for p in model.parameters())
    result["loss"].backward()
    assert_unchanged(model, before)
    task.eval()
    with torch.no_grad():
        task(*data)
    assert_unchanged(model, before)


def gsam_task(**how: Any) -> tuple[nn.Module, Any, ClassificationTask]:
    model, opt = make(LayerNormNet, "sam", **how)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False)
    return model, opt, task.train()


@pytest.mark.parametrize("how", [{"gsam_alpha": 0.4}, {"ascent": "fsam"}])
@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_at_w_have_the_weights_of_their_losses(how: dict[str, Any], mixed: bool, installed: None) -> None:
    """Micro-batches of unequal weights, one by `two_pass` if mixed; a loss that is dropped, and an update that is not
    applied, whose gradients the script clears between the next forward and backward."""
    ends = []
    for by_task in (True, False):
        model, opt, task = gsam_task(**how)
        for update in range(4):
            if by_task:
                task(*batch(seed=99))
            for part, weight in enumerate((0.2, 0.5, 0.3)):
                data = batch(seed=3 * update + part)
                if by_task and not (mixed and part):
                    loss = weight * task(*data)["loss"]
                    if not part:
                        opt.zero_grad()
                    loss.backward()
                else:
                    if not part:
                        opt.zero_grad()
                    samon.two_pass(opt, loss_of(model, *data), loss_scale=weight)
            if update != 1:
                opt.step()
        ends.append(values(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-12, atol=1e-14)


def test_a_loss_of_the_scripts_own_has_an_unknown_weight(installed: None) -> None:
    _, opt, task = gsam_task(gsam_alpha=0.4)
    task(*batch())["output"].sum().backward()
    with pytest.raises(UserError, match="does not differentiate the loss that its task returns"):
        opt.step()


def test_a_script_without_a_task_is_refused(installed: None) -> None:
    model = timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=32)
    optimizer = create_optimizer_v2(model, "samon", lr=0.1)
    model(torch.randn(2, 1, 32, 32)).sum().backward()
    with pytest.raises(UserError, match=r"does not take its loss from a timm\.task"):
        optimizer.step()


def test_two_processes(tmp_path: Path) -> None:
    """rho = 0 is the base optimizer also under DDP, with accumulation."""
    common = ["--grad-accum-steps", "2", "--save"]
    zero = ["--opt", "samon", "--opt-kwargs", "rho=0.0"]
    for name, args in {"base": ["--opt", "sgd"], "zero": zero, "sharp": ["--opt", "samon"]}.items():
        launch(timm_script.main, 2, [str(SCRIPT), *common, str(tmp_path / name), *args])
    base, zero, sharp = (torch.load(tmp_path / name, weights_only=True) for name in ("base", "zero", "sharp"))
    assert same(base, zero)
    assert not same(zero, sharp)


def test_no_script_named() -> None:
    with pytest.raises(UserError, match="no script named; usage"):
        timm_script.main([])
    with pytest.raises(UserError, match=r"no script /nowhere\.py"):
        timm_script.main(["/nowhere.py"])
