"""A run that was stopped and continued ends with the very bits of one that was not."""

import shutil
from pathlib import Path

import pytest
import torch

from samon.errors import UserError
from samon.trainer.state import find_newest
from tests.runs import BASE, assert_same, run, run_stopped, weights

CASES = {
    "sgd-ema": ["--opt", "sgd", "--model-ema", "--model-ema-decay", "0.9"],
    "adamw-mixup": ["--opt", "adamw", "--lr", "0.001", "--mixup", "0.2", "--cutmix", "1.0", "--clip-grad", "1"],
    "samon-lion-dropout-accumulation": [
        "--opt",
        "samon-lion",
        "--lr",
        "1e-4",
        "--model",
        "test_vit",
        "--drop",
        "0.2",
        "--drop-path",
        "0.2",
        "--grad-accum-steps",
        "2",
        "-b",
        "8",
    ],
    "sam-host-mixup-erasing": ["--opt", "sam", "--no-prefetcher", "--mixup", "0.5", "--reprob", "0.5"],
    "momentum-erasing-workers": ["--opt", "samon-layerl2-momentum", "--reprob", "0.5", "-j", "1"],
    "masked": ["--opt", "ssam-d", "--opt-kwargs", "mask_every=3"],
    "lookahead": ["--opt", "lookahead_samon-eleml2"],
    "late-layers-replayed": ["--opt", "samon", "--perturb", "layer4|stages.3", "--same-noise", "--drop", "0.1"],
    "every-other": ["--opt", "samon", "--sam-every", "2", "--sched", "wsd", "--sched-on-updates"],
    "previous": ["--opt", "samon", "--ascent", "previous"],
    "momentum": ["--opt", "sam-layerl2-adamw", "--lr", "0.001", "--ascent", "momentum"],
    "friendly-accumulation": ["--opt", "samon", "--ascent", "friendly", "--grad-accum-steps", "2", "-b", "8"],
    "every": ["--opt", "samon", "--ascent", "every:3", "--clip-grad", "1"],
    "adaptive": ["--opt", "samon", "--ascent", "adaptive"],
    "tail": ["--opt", "samon", "--sam-tail", "0.6", "--rho-sched", "lr", "--rho-min", "0.01", "--sched-on-updates"],
    "ramp": ["--opt", "samon", "--rho-sched", "linear", "--rho-warmup", "5", "--radius", "raw"],
    "gsam-small-ascent": ["--opt", "samon", "--gsam-alpha", "0.3", "--ascent-size", "24"],
    "esam": ["--opt", "sam", "--esam-beta", "0.5"],
    "bf16": ["--opt", "samon", "--amp", "--amp-dtype", "bfloat16"],
    "bf16-average": ["--opt", "samon", "--model-dtype", "bfloat16", "--model-ema", "--model-ema-decay", "0.9"],
    "fp16-scaler": ["--opt", "samon", "--amp"],
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_within_an_epoch(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [*CASES[case], "--epochs", "2"]
    _, whole = run(tmp_path, *args, name="whole")
    stopped = run_stopped(tmp_path, 1, 2, *args)
    assert find_newest(stopped)[0] == stopped / "recovery-1-2.pth.tar"
    metrics, _ = run(tmp_path, *args, "--resume", str(stopped), name="stopped")
    assert metrics["epoch"] == 1
    assert_same(weights(whole), weights(stopped))
    assert (whole / "summary.csv").read_text() == (stopped / "summary.csv").read_text()


@pytest.mark.parametrize("updates", [1, 4])
def test_stopped_in_the_first_and_after_the_last_update(
    updates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--opt", "samon", "--epochs", "2", "--model-ema", "--drop", "0.1"]
    _, whole = run(tmp_path, *args, name="whole")
    stopped = run_stopped(tmp_path, 0, updates, *args)
    run(tmp_path, *args, "--resume", str(stopped), name="stopped")
    assert_same(weights(whole), weights(stopped))


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler:FutureWarning")  # timm retires it, its flag stays
def test_resume_from_the_file_of_an_epoch(tmp_path: Path) -> None:
    args = ["--opt", "samon-adamw", "--lr", "0.001", "--epochs", "3", "--sched", "plateau"]
    _, whole = run(tmp_path, *args, name="whole")
    _, other = run(tmp_path, *args, "--resume", str(whole / "checkpoint-0.pth.tar"), name="other")
    assert_same(weights(whole), weights(other))


def test_damaged_and_foreign_files_are_named_and_passed_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = ["--opt", "samon", "--epochs", "3"]
    _, whole = run(tmp_path, *args, name="whole")
    shutil.copytree(whole, tmp_path / "other")
    other = tmp_path / "other"
    newest_bytes = (other / "checkpoint-2.pth.tar").read_bytes()
    for name in ("checkpoint-2", "last"):
        (other / f"{name}.pth.tar").write_bytes(newest_bytes[: len(newest_bytes) // 2])
    (other / "model_best.pth.tar").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, other / "checkpoint-9.pth.tar")
    run(tmp_path, *args, "--resume", str(other), name="other")
    told = capfd.readouterr().err
    for name in ("checkpoint-2", "last", "model_best", "checkpoint-9"):
        assert f"{name}.pth.tar" in told
    assert "checkpoint-1.pth.tar at epoch 2" in told
    assert_same(weights(whole), weights(other))


def test_nothing_to_resume(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no complete training state"):
        run(tmp_path, "--resume", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path, "--resume", str(tmp_path / "missing.pth.tar"))


def test_a_state_of_another_model_or_optimizer_does_not_fit(tmp_path: Path) -> None:
    _, done = run(tmp_path, "--opt", "sgd")
    with pytest.raises(UserError, match="does not fit --model test_vit"):
        run(tmp_path, "--model", "test_vit", "--resume", str(done / "last.pth.tar"), name="other")


def test_weights_alone(tmp_path: Path) -> None:
    """--no-resume-opt takes the weights and the epoch, not the momentum."""
    _, done = run(tmp_path, "--opt", "momentum", "--epochs", "2")
    _, kept = run(tmp_path, "--opt", "momentum", "--epochs", "3", "--resume", str(done), name="kept")
    _, dropped = run(tmp_path, "--opt", "momentum", "--epochs", "3", "--resume", str(done), "--no-resume-opt", name="d")
    assert any(not torch.equal(v, weights(dropped)[k]) for k, v in weights(kept).items())


def test_timms_own_checkpoint_continues(tmp_path: Path) -> None:
    """One without this program's keys, holding an argparse.Namespace: the next epoch begins."""
    import argparse

    _, done = run(tmp_path, "--opt", "sgd")
    content = torch.load(done / "last.pth.tar", weights_only=True)
    timms = {k: content[k] for k in ("state_dict", "optimizer", "epoch", "arch", "version")}
    torch.save(timms | {"args": argparse.Namespace(model="x")}, tmp_path / "timm.pth.tar")
    metrics, _ = run(tmp_path, "--epochs", "2", "--resume", str(tmp_path / "timm.pth.tar"), name="next")
    assert metrics["epoch"] == 1


def test_base_is_what_the_tests_think() -> None:
    assert BASE[BASE.index("-b") + 1] == "16"
