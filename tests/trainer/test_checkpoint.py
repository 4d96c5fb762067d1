"""A run's checkpoint brings along all that its figure depends on; checkpoints of earlier versions still serve."""

import errno
import logging
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from samon.cli.validate import main as validate
from samon.cli.validate import parse
from samon.errors import RunError
from samon.trainer import checkpoint, loop
from samon.trainer.logging import summary_rows
from samon.trainer.state import TrainState, load_state
from tests.runs import BASE, ROOT, run, train

OLD = Path(__file__).parent / "runs_of_format_1"  # written before training and evaluation shared their entrance
QUIET = ["--workers", "0", "--device", "cpu"]


def figures(*argv: str) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in validate([*argv, *QUIET])}


# --- the printed command --------------------------------------------------------------------------------------------
RUNS = [
    ["--opt", "samon", "--model-ema", "--model-ema-decay", "0.5"],
    ["--opt", "samon", "--model", "resnet10t", "--gp", "max", "--model-kwargs", "channels=[8,8,8,8]", "stem_width=8"],
    ["--opt", "samon", "--amp", "--amp-dtype", "bfloat16", "--channels-last", "--crop-pct", "0.8"],
    ["--model", "test_vit", "--img-size", "64"],  # without --model-kwargs img_size
    ["--in-chans", "3", "--mean", "0.3", "--std", "0.4", "--interpolation", "nearest"],
]


@pytest.mark.parametrize("args", RUNS, ids=["average", "model", "precision", "size", "input"])
def test_the_printed_command_has_the_figure(args: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    metrics, _ = run(tmp_path, *args, "--epochs", "2", "--lr", "0.1", "--val-num-samples", "200")
    printed = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("Next"))
    words = shlex.split(printed.removeprefix("Next"))
    assert words[:3] == ["python", "validate.py", "--checkpoint"]
    found = figures(*words[2:])
    assert 0 <= found.pop("ece") <= 100  # which training does not compute
    row = summary_rows(tmp_path / "run/summary.csv")[metrics["best_epoch"]]
    top1, top5, loss = (float(row[f"eval_{key}"]) for key in ("top1", "top5", "loss"))
    # the loss is summed in another order; top-1 and top-5 are counts
    assert found == {"top1": top1, "top5": top5, "loss": pytest.approx(loss, rel=1e-4)}


def test_the_average_is_scored_where_it_decided(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics, directory = run(tmp_path, "--opt", "samon", "--model-ema", "--model-ema-decay", "0.5", "--lr", "0.2")
    with caplog.at_level(logging.INFO, "samon"):
        ways = ([], ["--use-ema"], ["--no-ema"])
        own, again, raw = (figures("--checkpoint", str(directory), *flags) for flags in ways)
    assert own == again != raw
    for key in ("top1", "top5", "loss"):
        assert own[key] == pytest.approx(metrics[f"eval_{key}"], rel=1e-4)
    said = [record.getMessage() for record in caplog.records if "model_best" in record.getMessage()]
    assert ["the averaged weights of" in line for line in said] == [True, True, False]


def test_the_command_line_overrides_what_is_stored(tmp_path: Path) -> None:
    _, directory = run(tmp_path, "--opt", "sgd", "--amp", "--amp-dtype", "bfloat16")
    (job,) = parse(["--checkpoint", str(directory), "--mean", "0.9", "--split", "train"])
    assert (job.config.mean, job.config.std, job.config.split, job.config.num_classes) == ([0.9], [0.353], "train", 10)
    assert (job.specs[0].limit, job.config.amp) == (None, True)
    for moved in ([], ["--data-dir", "moved"]):  # --val-num-samples of the run
        assert parse(["--checkpoint", str(directory), *moved])[0].specs[0].limit == 40
    (job,) = parse(["--checkpoint", str(directory), "--evals", "feature_rank"])
    assert not job.config.amp  # only accuracy is measured in lower precision


# --- sharded checkpoints ----------------------------------------------------------------------------------------------
def test_the_newest_sharded_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no `last` beside it while the run goes on. An incomplete one is not named as the last good one."""
    monkeypatch.setattr(loop, "validate", lambda *_: dict.fromkeys(("loss", "top1", "top5"), 1.0))
    args = ["--opt", "sgd", "--epochs", "2", "--checkpoint-format", "dcp", "--checkpoint-hist", "1"]
    _, directory = run(tmp_path, *args)
    assert {path.name for path in directory.glob("*.dcp")} == {"checkpoint-0.dcp", "checkpoint-1.dcp"}
    assert [load_state(directory / f"{name}.pth.tar").epoch for name in ("model_best", "last")] == [0, 1]

    def fail(state: TrainState, path: Path, group: object) -> None:
        path.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_sharded", fail)
    with pytest.raises(RunError, match="No space left on device; no checkpoint was written before it"):
        run(tmp_path, *args, name="full")


# --- args.yaml ------------------------------------------------------------------------------------------------------
def test_args_yaml_says_what_ran(tmp_path: Path) -> None:
    args = ["--opt", "samon", "--num-classes", "10", "--lr-base", "0.3", "--perturb", "layer4|stages.3|blocks.1"]
    argv = [word for word in BASE if word not in ("--lr", "0.05")]
    metrics = train([*argv, "--output", str(tmp_path), "--experiment", "a", *args, "--grad-checkpointing"])
    written = yaml.safe_load((tmp_path / "a/args.yaml").read_text())
    assert (written["lr"], written["rho"], written["num_classes"]) == (pytest.approx(0.3 * 16 / 256), 0.5, 10)
    assert written["no_replay"] is True
    again = train(["-c", str(tmp_path / "a/args.yaml"), "--experiment", "b"])
    assert again["train_loss"] == metrics["train_loss"]
    assert load_state(tmp_path / "a/last.pth.tar").args["lr"] == written["lr"]


def test_a_kill_while_args_yaml_is_written_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, directory = run(tmp_path, "--opt", "sgd")
    before = (directory / "args.yaml").read_bytes()

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("samon.files.os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--opt", "sgd", "--epochs", "2", "--resume", str(directory))
    assert (directory / "args.yaml").read_bytes() == before


# --- checkpoints of earlier versions --------------------------------------------------------------------------------
def test_an_old_checkpoint_still_validates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by the version before: 2 epochs on 256 images, validated on the first 200 by the averaged weights."""
    monkeypatch.chdir(ROOT)
    last = summary_rows(OLD / "ema/summary.csv")[-1]
    found = figures("--checkpoint", str(OLD / "ema"))
    # other releases of torch round differently; a figure of other weights is 11 points away
    assert found["top1"] == pytest.approx(float(last["eval_top1"]), abs=1.0)
    assert found["loss"] == pytest.approx(float(last["eval_loss"]), rel=1e-3)
    drawn = ["--checkpoint", str(OLD / "ema"), "--num-samples", "200", "--crop-pct", "0.95"]
    for flags, top1, loss in (("--no-ema", 24.5, 2.102), ("--use-ema", 13.0, 2.331)):  # what that version printed
        found = figures(*drawn, flags)
        assert (found["top1"], found["loss"]) == (pytest.approx(top1, abs=1.0), pytest.approx(loss, rel=1e-3))


def test_an_old_mid_epoch_state_still_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    directory = tmp_path / "mid"
    shutil.copytree(OLD / "mid", directory)
    settings = ["-c", str(directory / "args.yaml"), "--output", str(tmp_path), "--experiment", "mid"]
    train([*settings, "--resume", str(directory)])
    assert torch.load(directory / "last.pth.tar", weights_only=True)["progress"]["epoch"] == 1
