"""What a run writes: files, TensorBoard, log lines and progress bars."""

import io
import json
import os
import pty
import re
import sys
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from samon.trainer import config, main
from samon.trainer.logging import RunLogger, summary_rows
from samon.trainer.run_dir import RunDir
from tests.runs import BASE, built, last_line, run


def read_events(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory / "tb")).Reload()


def scalars(directory: Path, name: str) -> list[float]:
    return [event.value for event in read_events(directory).Scalars(f"train/{name}")]


def test_outputs(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samon.trainer.logging.program", lambda: "samon-train")
    args = ["--opt", "samon", "--epochs", "2", "--log-interval", "2", "--save-images"]
    metrics, directory = run(tmp_path, *args)
    printed = capfd.readouterr()
    line = last_line(printed.out)
    assert line == json.loads(json.dumps(metrics)) | {key: line[key] for key in ("output", "seconds")}
    assert "tensorboard --logdir" in printed.out
    assert f"samon-validate --checkpoint {directory}" in printed.out
    assert printed.err.count(" are decoded ") == 1
    assert "perturbs 2,080 parameters in 30 tensors" in printed.err
    assert "\r" not in printed.err  # no progress bar without a terminal
    names = "args.yaml summary.csv log.txt tb last.pth.tar model_best.pth.tar checkpoint-0.pth.tar checkpoint-1.pth.tar"
    images = {f"train-batch-{update}.jpg" for update in (0, 2, 4, 6)}  # one per log interval
    assert {path.name for path in directory.iterdir()} == {*names.split(), *images, "run.json"}
    assert "eval_top1" in (directory / "log.txt").read_text()
    table = summary_rows(directory / "summary.csv")
    columns = "epoch,train_loss,train_loss_perturbed,eval_loss,eval_top1,eval_top5,lr"
    assert ",".join(table[0]) == columns
    assert float(table[1]["eval_top1"]) == metrics["eval_top1"]
    assert float(table[0]["train_loss_perturbed"]) > float(table[0]["train_loss"])
    saved = yaml.safe_load((directory / "args.yaml").read_text())
    assert saved["opt"] == "samon"
    assert saved.keys() >= config.FLAGS.keys() - {"config", "print_config", "data"}
    check_tensorboard(directory)


def check_tensorboard(directory: Path) -> None:
    tags = read_events(directory).Tags()
    train = "loss loss_perturbed sharpness eps_norm ascent_grad_norm grad_norm lr rho images_per_second data_wait "
    train += "skipped_steps skipped_samples"
    evaluated = {f"eval/{name}" for name in ("loss", "top1", "top5", "num_samples")}
    assert set(tags["scalars"]) == {f"train/{name}" for name in train.split()} | evaluated
    assert tags["images"] == ["input"]
    for kind in ("gamma/", "beta/"):
        assert sum(tag.startswith(kind) for tag in tags["histograms"]) == 15
    names = ("loss", "loss_perturbed", "sharpness", "eps_norm")
    value = {name: scalars(directory, name)[-1] for name in names}
    assert value["sharpness"] == pytest.approx(value["loss_perturbed"] - value["loss"], rel=1e-4)
    assert value["eps_norm"] == pytest.approx(0.5, rel=1e-4)  # rho


def test_the_log_has_warnings_about_flags(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config._warn_once.cache_clear()
    place = ["--output", str(tmp_path), "--experiment", "run", "--trackers", "none", "--val-split", ""]
    main.main([*BASE, *place, "--opt", "sgd", "--amp-dtype", "bfloat16"])
    for text in (capfd.readouterr().err, (tmp_path / "run/log.txt").read_text()):
        assert text.count("--amp-dtype has no effect without --amp") == 1


SOME_UPDATES = ["--sam-every 2", "--sam-tail 0.4", "--ascent looksam:2 --grad-accum-steps 2 -b 8", ""]


@pytest.mark.parametrize("args", SOME_UPDATES)
def test_the_sharpness_is_that_of_the_updates_with_two_passes(args: str, tmp_path: Path) -> None:
    """A plain update's loss would change it by far more than L(w + eps) - L(w)."""
    words = ["--opt", "samon", "--rho", "0.005", *args.split(), "--val-split", "", "--log-interval"]
    each, (mean,) = (scalars(run(tmp_path, *words, n, name=n)[1], "sharpness") for n in ("1", "4"))
    assert len(each) == (2 if args else 4)
    assert mean == pytest.approx(sum(each) / len(each), rel=1e-4)


@pytest.mark.parametrize("args", ["--ascent-fraction 0.5", "--ascent-size 24", "--ascent previous"])
def test_no_sharpness_where_the_losses_are_of_different_images(args: str, tmp_path: Path) -> None:
    _, directory = run(tmp_path, "--opt", "samon", *args.split(), "--val-split", "", "--log-interval", "2")
    tags = read_events(directory).Tags()["scalars"]
    assert "train/loss" in tags
    assert ("train/loss_perturbed" in tags) == ("previous" not in args)
    assert not {"train/sharpness", "train/loss_two_pass"}.intersection(tags)


def test_rho_and_the_learning_rate_of_the_tail_are_logged(tmp_path: Path) -> None:
    args = "--opt samon --sam-tail 0.5 --tail-opt lion --tail-lr 0.25 --rho-sched linear --rho-warmup 2 --sched poly "
    args += "--decay-rate 1 --sched-on-updates --log-interval 1"  # every update has its own
    _, directory = run(tmp_path, *args.split(), "--val-split", "")
    assert scalars(directory, "rho") == [0, 0, 0, 0.25]
    assert scalars(directory, "lr") == pytest.approx([0.05, 0.0375, 0.00625, 0.003125])
    text = (directory / "log.txt").read_text()
    assert "lion takes over there, at 0.25 times the learning rate" in text
    assert "update 2, the start of the tail: --tail-opt lion replaces SGD, with the momentum of " in text
    assert " lr 0.003125 rho 0.25 " in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bar for the whole run; log.txt has every line as well."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run(tmp_path, "--opt", "samon", "--log-interval", "1", "--epochs", "2")
    shown = terminal.getvalue()
    for part in ("epoch 0: ", "epoch 1: ", "8/8", "at w+eps", "img/s data", "validation 1: "):
        assert part in shown, part
    assert "Train 0 [" not in shown  # no plain lines beside it
    assert "Epoch 1 train_loss" in shown
    text = (tmp_path / "run/log.txt").read_text()
    assert len(re.findall(r"Train [01] \[[1-4]/4\] loss .* img/s data \d+% eta \d\d:\d\d\n", text)) == 8


def test_a_terminal_without_rows_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pty.openpty()  # 0 x 0 unless its size is set
    with open(follower, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        assert sys.stderr.isatty()
        run(tmp_path, "--log-interval", "1", "--val-split", "")
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert shown.count("Train 0 [") == 4
    assert "%|" not in shown


@pytest.mark.parametrize(
    ("args", "warns"), [("--warmup-epochs 1", True), ("--warmup-epochs 1 --warmup-prefix", False), ("", False)]
)
def test_a_warm_up_that_never_ends(args: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(RunLogger(built(*args.split()), RunDir(tmp_path))) as logger:
        logger.log_setup()
    assert ("--warmup-epochs 1 of 1 epoch: the learning rate never reaches its schedule" in caplog.text) is warns
