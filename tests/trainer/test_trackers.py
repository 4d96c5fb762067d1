"""Trackers: trackio and MLflow are the real ones (`pip install trackio mlflow`), writing to local files."""

import importlib.machinery
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from samon.errors import Stopped, UserError
from samon.trainer import trackers
from tests.runs import last_line, run, stop_at

SHORT = ["--opt", "samon", "--log-interval", "2", "--epochs", "2"]  # 4 updates per epoch
FROM_SUMMARY = {"epoch", "train_loss", "train_loss_perturbed", "eval_loss", "eval_top1", "eval_top5", "lr"}


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Metrics at their updates; a resumed run goes on under its name; stdout still ends with the metrics."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    log = ["--log", "trackio", "--wandb-project", "p"]
    with pytest.raises(Stopped):
        run(tmp_path, *SHORT, *log, on_update=stop_at(1, 2))
    metrics, directory = run(tmp_path, *SHORT, *log, "--resume", str(tmp_path / "run"))
    assert last_line(capfd.readouterr().out)["eval_top1"] == metrics["eval_top1"]
    (recorded,) = trackio.Api().runs("p")
    assert (recorded.name, recorded.config["model"]) == ("run", "test_resnet")
    rows = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage.get_logs("p", "run")
    assert sorted({row["step"] for row in rows if "train/loss" in row}) == [2, 4, 6, 8]
    ends = [row for row in rows if "eval_top1" in row]
    assert [row["step"] for row in ends] == [4, 8]
    assert ends[-1].keys() >= FROM_SUMMARY
    assert ends[-1]["eval/top1"] == ends[-1]["eval_top1"] == metrics["eval_top1"]
    assert not (directory / "tb").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # between MLflow and SQLAlchemy
@pytest.mark.parametrize("completed", [True, False])
def test_mlflow(completed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, metrics at their updates, and whether the run came to its end."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    args = [*SHORT, "--trackers", "tensorboard,mlflow"]
    if completed:
        metrics, directory = run(tmp_path, *args)
        assert (directory / "tb").exists()
    else:
        with pytest.raises(Stopped):
            run(tmp_path, *args, on_update=stop_at(0, 3))
    (recorded,) = mlflow.search_runs(experiment_names=["samon"], output_format="list")
    assert recorded.info.status == ("FINISHED" if completed else "FAILED")
    assert recorded.data.params["model"] == "test_resnet"
    history = mlflow.MlflowClient().get_metric_history(recorded.info.run_id, "train/loss")
    assert [point.step for point in history] == ([2, 4, 6, 8] if completed else [2])
    if completed:
        assert recorded.data.metrics["eval_top1"] == metrics["eval_top1"]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--log-wandb` as in timm: the settings once, then each epoch's row under timm's names."""
    wandb = MagicMock(__spec__=importlib.machinery.ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(tmp_path, "--opt", "samon", "--log-wandb", "--wandb-project", "p", "--wandb-tags", "a", "b")
    settings, session = wandb.init.call_args.kwargs, wandb.init.return_value
    assert (settings["project"], settings["name"], settings["tags"]) == ("p", "run", ["a", "b"])
    assert settings["config"]["model"] == "test_resnet"
    assert session.log.call_args.args[0].keys() >= FROM_SUMMARY
    assert session.log.call_args.kwargs == {"step": 4}
    session.finish.assert_called_once_with(exit_code=0)


def refuse(*_: object, **__: object) -> None:
    raise ConnectionError("connection\nrefused")


def test_a_tracker_that_fails_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for method in ("log", "finish"):
        monkeypatch.setattr(trackers.TensorBoard, method, refuse)
    run(tmp_path, *SHORT)
    printed = capfd.readouterr().err
    assert printed.count("--trackers tensorboard gets no more metrics: connection refused") == 1
    assert printed.count("--trackers tensorboard: the end of the run is not recorded: connection refused") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--trackers tensorbord", r"--trackers tensorbord is not none or one of .*; did you mean 'tensorboard'\?"),
        ("--trackers tensorboard,mlflow", "--trackers mlflow: mlflow is not installed; run: pip install mlflow"),
        ("--log-wandb", "run: pip install wandb"),
    ],
)
def test_mistakes_show_before_a_run(flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=message):
        run(tmp_path, *flags.split())
    assert not any(tmp_path.iterdir())


def test_a_tracker_that_cannot_start_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.TensorBoard, "__init__", refuse)
    with pytest.raises(UserError, match=r"^--trackers tensorboard: connection refused$"):
        run(tmp_path)
