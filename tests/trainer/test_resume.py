"""A run that was stopped and resumed ends with bits identical to those of one that was not."""

import argparse
import json
import pickle
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch

from samon.cli import export, validate
from samon.errors import Stopped, UserError
from samon.trainer.build import Run
from samon.trainer.config import parse
from samon.trainer.logging import summary_rows
from samon.trainer.main import train
from samon.trainer.state import find_newest, load_state
from tests.runs import BASE, assert_same, last, run, run_stopped, stop_at, weights

# Each case combines settings with states of their own.
CASES = {
    "lion-fsam-dropout-accumulation": "--opt samon-lion --lr 1e-4 --model test_vit --drop 0.2 --drop-path 0.2 -b 8 "
    "--grad-accum-steps 2 --ascent fsam",
    "sam-host-mixup-erasing": "--opt sam --no-prefetcher --mixup 0.5 --reprob 0.5",
    "adamw-masked-by-epochs-mixup": "--opt ssam-d-adamw --lr 0.001 --sparsity 0.9 --mask-epochs 1 --mixup 0.2 "
    "--cutmix 1.0 --clip-grad 1",
    "masked-by-fisher-momentum-workers": "--opt ssam-f-momentum --sparsity 0.9 --mask-epochs 1 --fisher-samples 20 "
    "--reprob 0.5 -j 1",
    "lookahead-every-other": "--opt lookahead_samon-eleml2 --sam-every 2 --sched wsd --sched-on-updates",
    "half-mixed-late-layers-replayed": "--opt samon --perturb layer4|stages.3 --same-noise --drop 0.1 --mixup 0.2 "
    "--mixup-mode half",
    "previous-fp16-scaler": "--opt samon --ascent previous --amp",
    "msam-ramp": "--opt sam-layerl2-adamw --lr 0.001 --ascent msam --rho-sched linear --rho-warmup 5 --radius raw",
    "looksam-bf16-average": "--opt samon --ascent looksam:3 --clip-grad 1 --model-dtype bfloat16 --model-ema "
    "--model-ema-decay 0.9",
    "aesam-jsd": "--opt samon --ascent aesam --aa rand-m5-inc1 --aug-splits 3 --jsd-loss",
    "esam-tail": "--opt sam --esam-beta 0.5 --sam-tail 0.6 --rho-sched lr --rho-min 0.01 --sched-on-updates",
    "gsam-small-ascent-bf16": "--opt samon --gsam-alpha 0.3 --ascent-size 24 --model-dtype bfloat16",
    "first-and-last-update": "--opt samon --model-ema --drop 0.1",
    # another optimizer takes over after update 2 of epoch 0
    "sgd-muon": "--opt samon --tail-opt muon --sched-on-updates --weight-decay 0.1 --model-ema --model-ema-decay 0.9 "
    "--sam-tail 0.75 --tail-lr 0.3",
    "adamw-sgd": "--opt samon-adamw --lr 0.001 --tail-opt sgd --amp --sched none --grad-accum-steps 2 -b 8 "
    "--sam-tail 0.75 --tail-lr 0.3",
    "sgd-adamw": "--opt samon --tail-opt adamw --ascent msam --clip-grad 1 --layer-decay 0.7 --sam-tail 0.75",
}
# (epoch, updates) after which a case is stopped, if not at (1, 2)
MOMENTS = {"first-and-last-update": [(0, 1), (0, 4)], "sgd-muon": [(0, 2), (0, 3)]}
SLOW = {"adamw-sgd": [(0, 2), (0, 3)], "sgd-adamw": [(0, 2), (0, 3)]}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES])
def test_stopped_within_an_epoch(case: str, tmp_path: Path) -> None:
    args = [*CASES[case].split(), "--epochs", "2"]
    _, whole = run(tmp_path, *args, name="whole")
    for epoch, updates in (MOMENTS | SLOW).get(case, [(1, 2)]):
        stopped = run_stopped(tmp_path, epoch, updates, *args)
        assert find_newest(stopped) == stopped / f"recovery-{epoch}-{updates}.pth.tar"
        run(tmp_path, *args, "--resume", str(stopped), name="stopped")
        assert_same(weights(whole), weights(stopped))
        assert (whole / "summary.csv").read_text() == (stopped / "summary.csv").read_text()


@pytest.mark.parametrize(
    ("changed", "updates", "samples"),
    [
        ("-b 32", 2, 64),
        ("-b 8", 8, 64),
        ("-b 8 --grad-accum-steps 3", 3, 64),
        ("-b 64 --in-memory --no-aug", 1, 96),  # whole batches: the first 32 samples are used again
    ],
)
def test_another_batch_size_continues_at_the_sample(changed: str, updates: int, samples: int, tmp_path: Path) -> None:
    """The update, which decides the learning rate, and the epoch's mean are those of the samples."""
    args = ["--opt", "sgd", "--sched-on-updates", "--val-split", ""]
    stopped = run_stopped(tmp_path, 0, 2, *args)
    rates: list[float] = []
    run(tmp_path, *args, *changed.split(), "--resume", str(stopped), name="other",
        on_update=lambda run, *_: rates.append(run.optimizer.param_groups[0]["lr"]))  # fmt: skip
    assert rates[-1] == 0  # the schedule has ended with the epoch
    progress = last(tmp_path / "other")["progress"]
    assert (progress["updates"], progress["sums"]["loss/n"]) == (updates, samples)


def test_figures_of_another_metric_do_not_decide_the_best_epoch(tmp_path: Path) -> None:
    """Losses are smaller than percentages; after the change, the epochs before it are the first to be deleted."""
    args = ["--opt", "sgd", "--lr", "1e-9", "--checkpoint-hist", "2"]
    run(tmp_path, *args, "--epochs", "2", "--eval-metric", "loss")
    again = ["--eval-metric", "top1", "--resume", str(tmp_path / "run")]
    metrics, directory = run(tmp_path, *args, *again, "--epochs", "3")
    assert (metrics["best_epoch"], metrics["best_metric"]) == (2, metrics["eval_top1"])
    metrics, _ = run(tmp_path, *args, *again, "--epochs", "4", "--val-num-samples", "20", name="run")
    assert metrics["best_epoch"] == 3
    metrics, _ = run(tmp_path, *args, *again, "--epochs", "5", "--val-split", "")
    assert (metrics["best_epoch"], metrics["best_metric"]) == (4, metrics["train_loss"])
    assert {path.name for path in directory.glob("checkpoint-*")} == {"checkpoint-3.pth.tar", "checkpoint-4.pth.tar"}
    assert [bool(row["eval_top1"]) for row in summary_rows(directory / "summary.csv")] == [True] * 4 + [False]


def test_the_newest_state_has_most_samples(tmp_path: Path) -> None:
    args = ["--opt", "sgd", "-b", "8", "--val-split", ""]
    stopped = run_stopped(tmp_path, 0, 2, *args)
    larger = [*args, "--grad-accum-steps", "4", "--resume", str(stopped)]
    with pytest.raises(Stopped):
        run(tmp_path, *larger, name="stopped", on_update=stop_at(0, 1))
    assert find_newest(stopped) == stopped / "recovery-0-1.pth.tar"


def test_a_run_that_goes_back_leaves_its_first_attempt_behind(tmp_path: Path) -> None:
    """Neither its later states nor its best one are those of the run, whose loss rises."""
    args = ["--opt", "sgd", "--epochs", "3", "--eval-metric", "loss"]
    _, directory = run(tmp_path, *args)
    args += ["--lr", "3", "--resume"]
    with pytest.raises(Stopped):
        run(tmp_path, *args, str(directory / "checkpoint-0.pth.tar"), on_update=stop_at(1, 2))
    metrics, _ = run(tmp_path, *args, str(directory))
    assert metrics["eval_loss"] > 10
    assert metrics["best_epoch"] == load_state(directory / "model_best.pth.tar").epoch == 0


@pytest.mark.parametrize("resume", [[], ["--resume", "RUN"]])
def test_a_restart_goes_on_after_start_epoch(
    resume: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither goes back to --start-epoch again nor finds a later state of the run that it went back in."""
    args = ["--opt", "sgd", "--epochs", "3", "--start-epoch", "1"]
    if resume:
        run(tmp_path, "--opt", "sgd", "--epochs", "3")
        args += ["--resume", str(tmp_path / "run")]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "id")
    with pytest.raises(Stopped):
        run(tmp_path, *args, on_update=stop_at(2, 2))
    seen: list[tuple[int, int]] = []
    _, directory = run(tmp_path, *args, on_update=lambda run, p, _: seen.append((p.epoch, p.updates)))
    assert seen == [(2, 3), (2, 4)]
    assert json.loads((directory / "run.json").read_text())["resumed"]  # its time is that since the restart


TAIL = ["--opt", "samon", "--tail-opt", "adamw", "--sam-tail", "0.75", "--tail-lr", "0.3", "--epochs", "2"]


def test_a_state_after_the_switch_does_not_fit_a_run_before_it(tmp_path: Path) -> None:
    _, whole = run(tmp_path, *TAIL, name="whole")
    again = [*TAIL, "--resume", str(whole)]
    for changed, message in (
        (["--tail-opt", "lion", "--epochs", "3"], r"state of adamw, and lion is asked for; .*--no-resume-opt"),
        (["--epochs", "6", "--sam-tail", "0.25"], "update 8, before its tail starts at 18; keep --epochs, --sam-tail"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path, *again, *changed, name="other")
    run(tmp_path, *again, "--epochs", "3", "--tail-opt", "lion", "--no-resume-opt", name="other")
    assert last(tmp_path / "other")["optimizer"]["replacement"]["opt"] == "lion"
    # without --tail-opt, the state of the same optimizer goes on at the full learning rate
    config = tmp_path / "config.yaml"  # with -c, the settings of the stopped run (--tail-opt) are not taken over
    config.write_text("opt: samon-adamw")
    run(tmp_path, "-c", str(config), "--resume", str(whole / "last.pth.tar"), "--epochs", "3", name="other")
    assert "replacement" not in last(tmp_path / "other")["optimizer"]


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler:FutureWarning")  # timm deprecates it, its flag stays
def test_resume_from_the_file_of_an_epoch(tmp_path: Path) -> None:
    args = ["--opt", "samon-adamw", "--lr", "0.001", "--epochs", "3", "--sched", "plateau"]
    _, whole = run(tmp_path, *args, name="whole")
    _, other = run(tmp_path, *args, "--resume", str(whole / "checkpoint-0.pth.tar"), name="other")
    assert_same(weights(whole), weights(other))


def test_damaged_and_foreign_files_are_named_and_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = ["--opt", "samon", "--epochs", "3"]
    _, whole = run(tmp_path, *args, name="whole")
    other = Path(shutil.copytree(whole, tmp_path / "other"))
    content = (other / "checkpoint-2.pth.tar").read_bytes()
    for name in ("checkpoint-2", "last"):
        (other / f"{name}.pth.tar").write_bytes(content[: len(content) // 2])
    (other / "model_best.pth.tar").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, other / "checkpoint-9.pth.tar")
    run(tmp_path, *args, "--resume", str(other), name="other")
    log = capfd.readouterr().err
    for name in ("checkpoint-2", "last", "model_best", "checkpoint-9"):
        assert f"{name}.pth.tar" in log
    assert "checkpoint-1.pth.tar at epoch 2" in log
    assert_same(weights(whole), weights(other))


def test_a_class_map_may_move_but_not_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its classes have no names, by which labels could be numbered as before; validate.py takes the run's file."""
    path, moved = tmp_path / "map.pkl", tmp_path / "moved.pkl"
    path.write_bytes(pickle.dumps({label: label for label in range(10)}))
    moved.write_bytes(pickle.dumps({label: label for label in reversed(range(10))}))
    _, begun = run(tmp_path, "--opt", "sgd", "--class-map", str(path))
    again = ["--opt", "sgd", "--epochs", "2", "--resume", str(begun), "--class-map"]
    path.write_bytes(pickle.dumps({label: 9 - label for label in range(10)}))
    for command in (lambda: run(tmp_path, *again, str(path)), lambda: validate.main(["--checkpoint", str(begun)])):
        with pytest.raises(UserError, match=r"--class-map: .* other labels than th"):
            command()
    path.unlink()
    export.main([str(begun), "--timm", str(tmp_path / "exported")])  # needs no labels
    run(tmp_path, *again, str(moved))
    assert "differ from those" in caplog.text
    assert "map.pkl ->" not in caplog.text


# --- what of a finished run is restored -------------------------------------------------------------------------------
def resume(done: Path, *args: str, source: str = "last.pth.tar") -> Run:
    """The run after the first update of a resume with other arguments."""
    place = ["--output", str(done.parent), "--experiment", "other", "--overwrite"]
    with closing(train(parse([*BASE, *place, *args, "--epochs", "3", "--resume", str(done / source)]))) as training:
        return next(training).run


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("done"), "--opt", "samon", "--weight-decay", "0.1")[1]


def test_weights_alone(done: Path) -> None:
    """--no-resume-opt restores the weights and the epoch, not the momentum."""
    args = ["--opt", "samon", "--weight-decay", "0.1"]
    one, two = (resume(done, *args, *more).model.state_dict() for more in ([], ["--no-resume-opt"]))
    assert any(not torch.equal(value, two[key]) for key, value in one.items())


def test_timms_own_checkpoint_continues(done: Path) -> None:
    """One without this program's keys, with an argparse.Namespace: the next epoch begins."""
    content = last(done)
    timms = {key: content[key] for key in ("state_dict", "optimizer", "epoch", "arch", "version")}
    torch.save(timms | {"args": argparse.Namespace(model="x")}, done / "timm.pth.tar")
    assert resume(done, "--opt", "samon", "--weight-decay", "0.1", source="timm.pth.tar").progress.epoch == 1


OTHER_OPTIMIZERS = {
    "samon-adamw": "optimizer state of sgd, .* adamw",
    "momentum": "optimizer state of sgd, .* momentum",
    "samon --base-opt lamb": "optimizer state of sgd, .* lamb",
    "samon --freeze conv_stem|conv1": "other groups of parameters.*--freeze",
    "samon --layer-decay 0.7": "other groups of parameters.*--layer-decay",
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("opt", OTHER_OPTIMIZERS)
def test_the_state_of_another_optimizer_is_refused(opt: str, named: bool, done: Path) -> None:
    """By the names in the checkpoint; earlier ones have only their settings, and the sizes of the groups tell."""
    content = last(done)
    if not named:
        del content["optimizer_layout"]
    torch.save(content, path := done / "other.pth.tar")
    args = ["--weight-decay", "0.1", "--opt", *opt.split(), "--resume", str(path)]
    with pytest.raises(UserError, match=f"{OTHER_OPTIMIZERS[opt]}.*--no-resume-opt"):
        run(done.parent, *args, name="other")


def test_groups_of_the_same_sizes_are_told_apart_by_name(done: Path) -> None:
    content = last(done)
    names = content["optimizer_layout"]["groups"][0]
    names[0], names[-1] = "frozen.bias", names[0]
    torch.save(content, path := done / "other.pth.tar")
    with pytest.raises(UserError, match="other groups of parameters"):
        run(done.parent, "--opt", "samon", "--weight-decay", "0.1", "--resume", str(path), name="other")


def test_the_same_optimizer_under_another_name_continues(done: Path) -> None:
    for name in ("samon", "sgd", "nesterov", "lookahead_samnn-layerl2"):
        assert resume(done, "--opt", name, "--weight-decay", "0.1")
    assert resume(done, "--opt", "lion", "--weight-decay", "0.1", "--no-resume-opt")


def test_options_of_the_groups_are_those_of_the_resumed_run(done: Path) -> None:
    args = ["--opt", "samon", "--weight-decay", "0.2", "--momentum", "0.8", "--opt-kwargs", "nesterov=False"]
    for group in resume(done, *args).optimizer.param_groups:
        assert group["weight_decay"] in (0, 0.2)
        assert (group["momentum"], group["nesterov"]) == (0.8, False)
    args = ["--opt", "samon", "--weight-decay", "0.1", "--lr", "0.02", "--sched", "none"]
    assert resume(done, *args).optimizer.param_groups[0]["lr"] == 0.02


def test_settings_replace_those_of_the_state(done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint is at the end of a cosine, at learning rate 0; its gammas are not 1."""
    head = ["--head-init-scale", "2"]
    resumed = resume(done, "--opt", "samon", "--weight-decay", "0.1", "--sched", "none", *head)
    assert {group["lr"] for group in resumed.optimizer.param_groups} == {0.05}
    assert "head_init_scale None -> 2.0 (no effect" in caplog.text
    fixed = resume(done, "--opt", "sgd", "--fix-norm", "--no-resume-opt")
    assert all((p == 1).all() for name, p in fixed.model.named_parameters() if name.endswith("bn1.weight"))


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler:FutureWarning")
def test_a_resumed_plateau_has_the_settings_of_its_command(tmp_path: Path) -> None:
    _, done = run(tmp_path, "--opt", "sgd", "--sched", "plateau")
    changed = ["--patience-epochs", "3", "--decay-rate", "0.5", "--min-lr", "1e-4"]
    plateau = resume(done, "--opt", "sgd", "--sched", "plateau", *changed).scheduler.lr_scheduler
    assert (plateau.patience, plateau.factor, plateau.min_lrs[0]) == (3, 0.5, 1e-4)
    assert plateau.best == last(done)["metric"]
    plateau = resume(done, "--opt", "sgd", "--sched", "plateau", "--eval-metric", "loss").scheduler.lr_scheduler
    assert (plateau.mode, plateau.best) == ("min", float("inf"))


def test_counts_of_the_groups_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    args = ["--opt", "lookahead_samon", "--base-opt", "lamb"]
    _, begun = run(tmp_path, *args, "--epochs", "2")
    for group in resume(begun, *args).optimizer.param_groups:
        assert (group["step"], group["lookahead_step"]) == (9, 9)
