"""How runs start and end: directories that hold a run, --resume, what a resumed run takes over, --start-epoch."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from samon.cli.validate import main as validate
from samon.errors import Stopped, UserError
from samon.trainer.build import Run
from samon.trainer.flags import Settings
from samon.trainer.run_dir import load_run_settings
from samon.trainer.state import Metrics, Progress
from tests.runs import BASE, assert_same, run, run_stopped, stop_at, train, watch_batches, weights
from tests.sets import write_set


def start(tmp_path: Path, *args: str) -> Metrics:
    """As `run`, without --overwrite."""
    return train([*BASE, "--output", str(tmp_path), "--experiment", "run", *args])


def settings(directory: Path) -> Settings:
    return yaml.safe_load((directory / "args.yaml").read_text())


def epochs(directory: Path) -> list[int]:
    return [int(row["epoch"]) for row in csv.DictReader((directory / "summary.csv").read_text().splitlines())]


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch."""
    return run(tmp_path_factory.mktemp("finished"), "--opt", "samon")[1]


@pytest.fixture
def whole(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- the same directory again -----------------------------------------------------------------------------------------
def test_a_finished_run_is_not_overwritten(whole: Path) -> None:
    before = files(whole)
    with pytest.raises(UserError, match=r"run holds a run \(checkpoint-0.*--resume .*--overwrite"):
        start(whole.parent)
    assert files(whole) == before
    start(whole.parent, "--overwrite", "--val-split", "")
    names = sorted(path.name for path in whole.glob("*.pth.tar"))
    assert names == ["checkpoint-0.pth.tar", "last.pth.tar", "model_best.pth.tar"]
    assert "eval_loss" not in (whole / "summary.csv").read_text()  # nothing of the old run
    assert len(list((whole / "tb").glob("events*"))) == 1
    assert settings(whole)["overwrite"] is False  # or -c args.yaml would delete it


@pytest.mark.parametrize(
    "wrong",
    [
        "--data-dir elsewhere",
        "--model resnet_of_nobody",
        "--opt samon --perturb nothing",
        "-b 4096",
        "--initial-checkpoint RUN/summary.csv",
        "--sched step --decay-milestones x",
    ],
)
def test_a_mistake_costs_no_run_that_would_be_replaced(whole: Path, wrong: str) -> None:
    before = files(whole)
    with pytest.raises(UserError):
        start(whole.parent, "--overwrite", *wrong.replace("RUN", str(whole)).split())
    assert files(whole) == before


def test_a_run_can_start_from_the_one_that_it_replaces(whole: Path) -> None:
    start(whole.parent, "--overwrite", "--initial-checkpoint", str(whole / "last.pth.tar"), "--lr", "1e-9")
    assert not (whole / "overwritten").exists()
    assert settings(whole)["lr"] == 1e-9


@pytest.mark.parametrize("form", ["file", "dcp"])
def test_the_old_run_is_deleted_after_the_first_state_of_the_new(whole: Path, form: str) -> None:
    """A failure before it, such as a batch that does not fit into memory, brings the old run back."""
    before, seen = files(whole), list[list[str]]()

    def fail(run: Run, progress: Progress, two_pass: bool) -> None:
        seen.append(sorted(files(whole / "overwritten")))
        raise torch.OutOfMemoryError

    argv = [*BASE, "--output", str(whole.parent), "--experiment", "run", "--overwrite", "--checkpoint-format", form]
    with pytest.raises(torch.OutOfMemoryError):
        train(argv, fail)
    assert seen == [sorted(before)]
    assert files(whole) == before
    with pytest.raises(Stopped):
        train(argv, stop_at(0, 2))
    assert not (whole / "overwritten").exists()
    (state,) = whole.glob("recovery-*")
    assert state.name.startswith("recovery-0-2")


def test_a_run_killed_before_its_first_state_leaves_the_old_one(whole: Path) -> None:
    before = files(whole)
    (whole / "overwritten").mkdir()
    for path in [path for path in whole.iterdir() if path.name != "overwritten"]:
        path.rename(whole / "overwritten" / path.name)
    (whole / "args.yaml").write_text("# started later \nlr: 1\n")
    with pytest.raises(UserError, match=r"overwritten holds the run that --overwrite .* move its files back"):
        start(whole.parent)
    assert files(whole / "overwritten") == before
    start(whole.parent, "--overwrite")
    assert not (whole / "overwritten").exists()


def test_a_failed_resume_leaves_the_settings(whole: Path) -> None:
    before = files(whole)
    with pytest.raises(UserError, match=r"does not fit --model test_vit .*Error\(s\) in loading .*: Missing key"):
        train(["--resume", str(whole), "--model", "test_vit", "--epochs", "2"])
    assert files(whole) == before


def test_a_run_that_saved_nothing_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.yaml").write_text("# started long ago\nlr: 1\n")
    (tmp_path / "run/log.txt").write_text("old\n")
    start(tmp_path)
    assert "old" not in (tmp_path / "run/log.txt").read_text()


def test_another_runs_state_does_not_open_a_third_runs_directory(whole: Path) -> None:
    other = shutil.copytree(whole, whole.parent / "other")
    (other / "args.yaml").write_text("# started elsewhere\n" + (other / "args.yaml").read_text())
    with pytest.raises(UserError, match="holds a run"):
        start(whole.parent, "--resume", str(other / "last.pth.tar"), "--epochs", "2")


# --- --resume ---------------------------------------------------------------------------------------------------------
def test_resume_alone_takes_the_runs_settings(tmp_path: Path) -> None:
    args = ("--opt", "samon-adamw", "--rho", "0.3", "--epochs", "2", "--smoothing", "0.2")
    _, whole = run(tmp_path, *args, name="whole")
    stopped = run_stopped(tmp_path, 1, 2, *args)
    moved = tmp_path / "elsewhere"
    shutil.move(stopped, moved)
    train(["--resume", str(moved)])
    assert_same(weights(moved), weights(whole))
    ours, theirs = settings(moved), settings(whole)
    assert {key for key in ours if ours[key] != theirs[key]} <= {"output", "experiment"}
    again = train(["-c", str(moved / "args.yaml"), "--output", str(tmp_path), "--experiment", "again", "--epochs", "1"])
    assert again["epoch"] == 0  # the settings of a resumed run make a new run


def test_resume_without_args_yaml_takes_the_states_settings(whole: Path) -> None:
    (whole / "args.yaml").unlink()
    assert load_run_settings(str(whole))["opt"] == "samon"


@pytest.mark.parametrize("more", [[], ["-c", "quickstart"]])
def test_a_missing_run_to_resume_is_the_one_mistake(tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(UserError, match=r"^--resume .*gone: no such file or directory"):
        train(["--resume", str(tmp_path / "gone"), "--output", str(tmp_path), *more])
    with pytest.raises(UserError, match=r"^no complete training state in"):
        train(["--resume", str(tmp_path), "--output", str(tmp_path), *more])


def test_other_settings_are_logged_and_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = ("--opt", "samon", "--rho", "0.1", "--weight-decay", "0.01", "--epochs", "1", "--sched", "none")
    stopped = run_stopped(tmp_path, 0, 2, *args)
    capfd.readouterr()
    seen: list[Settings] = []
    other = ["--rho", "0.4", "--weight-decay", "0.2", "--lr", "0.07", "--epochs", "2"]
    train(["--resume", str(stopped), *other], lambda run, *_: seen.append(run.optimizer.param_groups[1]))
    line = next(line for line in capfd.readouterr().err.splitlines() if "settings differ" in line)
    for part in ("rho 0.1 -> 0.4", "weight_decay 0.01 -> 0.2", "lr 0.05 -> 0.07"):
        assert part in line
    assert (seen[0]["lr"], seen[0]["weight_decay"]) == (0.07, 0.2)
    assert settings(stopped)["rho"] == 0.4


def test_other_workers_read_the_samples_that_are_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the run is stopped again; sample i of these shards has label i."""
    root = write_set(tmp_path / "set", [4] * 7)
    argv = [*BASE, "--data-dir", root, "--num-classes", "28", "--train-num-samples", "28", "--val-split", "", "-b", "2"]
    place, seen = ["--output", str(tmp_path), "--experiment", "run"], list[int]()
    watch_batches(monkeypatch, lambda images, target: seen.extend(target.tolist()))
    with pytest.raises(Stopped):
        train([*argv, *place, "-j", "2"], stop_at(0, 5))
    with pytest.raises(Stopped):
        train(["--resume", str(tmp_path / "run"), "-j", "1"], stop_at(0, 8))
    train(["--resume", str(tmp_path / "run"), "-j", "2"])
    assert len(seen) == len(set(seen)) == 28
    logged = capfd.readouterr().err
    assert logged.count("share the remaining samples") == 2
    assert "workers 2 -> 1" in logged


def test_resume_auto(tmp_path: Path) -> None:
    """The same command starts, resumes, and finds nothing left to do."""
    args = [*BASE, "--opt", "sgd", "--epochs", "3", "--output", str(tmp_path), "--experiment", "run"]
    train([*args, "--resume", "auto", "--stop-epoch", "2"])
    assert epochs(tmp_path / "run") == [0, 1]
    train([*args, "--resume", "auto"])
    assert epochs(tmp_path / "run") == [0, 1, 2]
    before = (tmp_path / "run/last.pth.tar").read_bytes()
    assert train([*args, "--resume", "auto"])["epoch"] == 2
    assert (tmp_path / "run/last.pth.tar").read_bytes() == before
    (tmp_path / "other").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "other/last.pth.tar")
    with pytest.raises(UserError, match="holds a run"):  # another program's states are neither resumed nor deleted
        train([*args, "--experiment", "other", "--resume", "auto"])


# --- the first and the last epoch -------------------------------------------------------------------------------------
@pytest.mark.parametrize("extra", [[], ["--sched-on-updates"]], ids=str)
def test_start_epoch_moves_the_schedule(extra: list[str], tmp_path: Path) -> None:
    """Each update has the learning rate that it has in an uninterrupted run."""
    rates: dict[tuple[int, int], float] = {}

    def on_update(run: Run, progress: Progress, two_pass: bool) -> None:
        rates[progress.epoch, progress.updates] = run.optimizer.param_groups[0]["lr"]

    args = ["--epochs", "3", "--opt", "sgd", "--min-lr", "0.001", "--val-split", "", *extra]
    _, whole = run(tmp_path, *args, name="whole", on_update=on_update)
    expected = dict(rates)
    assert len({expected[epoch, 1] for epoch in range(3)}) == 3
    for start, resume in ((2, []), (0, ["--resume", str(whole / "checkpoint-1.pth.tar")])):
        rates.clear()
        more = ["--start-epoch", str(start), "--stop-epoch", str(start + 1)]
        run(tmp_path, *args, *resume, *more, on_update=on_update)
        assert rates == pytest.approx({at: rate for at, rate in expected.items() if at[0] == start})


def test_stop_epoch_and_milestones(tmp_path: Path) -> None:
    args = ["--epochs", "4", "--opt", "sgd", "--val-interval", "3", "--save-epochs", "1", "2"]
    _, whole = run(tmp_path, *args, name="whole")
    assert epochs(whole) == [0, 1, 2, 3]  # a milestone is evaluated, as is each third and the last
    _, directory = run(tmp_path, *args, "--stop-epoch", "2")
    assert epochs(directory) == [0, 1]
    names = {path.name for path in directory.glob("milestone-*")}
    assert names == {"milestone-1.pth.tar", "milestone-2.pth.tar"}
    assert [torch.load(directory / f"milestone-{n}.pth.tar", weights_only=True)["epoch"] for n in (1, 2)] == [0, 1]
    assert settings(directory)["epochs"] == 4
    train(["--resume", str(directory)])  # the schedule is that of four epochs, and so is the rest of the run
    assert (whole / "summary.csv").read_text() == (directory / "summary.csv").read_text()
    assert_same(weights(whole), weights(directory))


def test_a_finished_run_ends_as_it_did(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (row,) = csv.DictReader((whole / "summary.csv").read_text().splitlines())
    metrics = train(["--resume", str(whole)])
    out, err = capfd.readouterr()
    assert "nothing is left to do" in err
    assert metrics["eval_loss"] == pytest.approx(float(row["eval_loss"]), rel=1e-6)
    assert str(whole) in out


@pytest.mark.parametrize("args", ["--start-epoch 3", "--start-epoch 1 --epochs 1", "--resume RUN/last.pth.tar"])
def test_a_start_after_the_end(whole: Path, args: str) -> None:
    with pytest.raises(UserError, match=r"at epoch \d of 1: nothing is left to train; raise --epochs"):
        run(whole.parent, *args.replace("RUN", str(whole)).split(), name="new")


# --- and validate.py --------------------------------------------------------------------------------------------------


def test_an_average_that_was_not_kept_cannot_be_evaluated(whole: Path) -> None:
    with pytest.raises(UserError, match=r"--use-ema: .*model_best\.pth\.tar has no averaged weights; drop it"):
        validate(["--checkpoint", str(whole), "--use-ema"])
