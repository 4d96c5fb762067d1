"""What is read from the directory of a run."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import HistogramValue
from torch.utils.tensorboard import SummaryWriter

from samon.report.content import Content
from samon.report.read import _pooled, _without_location, read_sources
from tests.report.conftest import HOSTILE, evaluation_rows


def test_a_run_is_read_with_its_cost_and_origin(content: Content) -> None:
    samon = next(run for run in content.runs if run.name == HOSTILE)
    assert samon.method == "samon"
    assert [row["epoch"] for row in samon.epochs] == [0, 1]
    assert len(samon.scalars["train/sharpness"]) == 8  # 64 images in batches of 16, two epochs
    assert samon.cost["seconds"] > 0
    assert samon.cost["cpu_seconds"] > 0
    assert sum(share for _, share in samon.norms["gamma"]) == pytest.approx(1)
    assert samon.origin["machine"]["cores"]
    assert samon.origin["versions"].keys() == {"samon", "torch", "timm"}
    assert "output" not in samon.settings
    plain = next(run for run in content.runs if run.name == "sgd")
    assert 2 * 1.6 < samon.cost["flops"] / plain.cost["flops"] < 2 * 1.7  # two epochs instead of one
    assert {row["method"] for row in content.evaluations if "method" in row} == {"samon"}


def write_run(directory: Path, settings: str, summary: str = "epoch,train_loss\n0,1.5\n") -> Path:
    directory.mkdir(parents=True)
    (directory / "args.yaml").write_text(settings)
    (directory / "summary.csv").write_text(summary)
    return directory


def test_runs_of_other_programs_have_no_default_settings(tmp_path: Path) -> None:
    (run,) = read_sources([write_run(tmp_path / "run", "opt: adamw\nlayers: 2\n")]).runs
    assert (run.method, run.cost, run.metrics, run.settings) == ("adamw", {}, {}, {"opt": "adamw", "layers": 2})


def test_a_run_that_was_extended_has_not_ended(tmp_path: Path) -> None:
    """Its run.json is that of the end before."""
    run = write_run(tmp_path / "run", "opt: sgd\nmodel: net\nepochs: 4\n", "epoch,eval_top1\n0,1\n1,50\n2,60\n")
    (run / "run.json").write_text(json.dumps({"metrics": {"eval_top1": 50.0, "epoch": 1}}))
    assert read_sources([run]).scores == []


@pytest.mark.parametrize(("cooldown", "ended"), [(0, True), (3, False)])
def test_a_run_ends_with_its_cooldown(cooldown: int, ended: bool, tmp_path: Path) -> None:
    settings = f"opt: sgd\nmodel: net\nepochs: 2\ncooldown_epochs: {cooldown}\n"
    content = read_sources([write_run(tmp_path / "run", settings, "epoch,eval_top1\n0,1\n1,50\n")])
    assert [score.values for score in content.scores] == [[50.0]] * ended


@pytest.mark.parametrize(("recipe", "dataset"), [("", ""), ("r.yaml", ""), ("r.yaml", "wds")])
def test_runs_on_different_data_are_not_compared(recipe: str, dataset: str, tmp_path: Path) -> None:
    for name in ("cars", "pets", "moved/cars"):
        settings = f"opt: sgd\nmodel: net\nepochs: 1\ndata_dir: /data/{name}\ndataset: '{dataset}'\n"
        run = write_run(tmp_path / name, settings, "epoch,eval_top1\n0,50\n")
        (run / "run.json").write_text(json.dumps({"recipe": recipe}))
    scores = [(score.setting.title, score.method, score.values) for score in read_sources([tmp_path]).scores]
    on = "r on " if recipe else ""
    assert scores == [(f"{on}cars, net", "sgd", [50.0] * 2), (f"{on}pets, net", "sgd", [50.0])]


def test_runs_with_other_numbers_of_processes_are_not_seeds_of_one_method(tmp_path: Path) -> None:
    for count in (1, 8):
        run = write_run(tmp_path / str(count), "opt: sgd\nmodel: net\nepochs: 1\n", "epoch,eval_top1\n0,50\n")
        (run / "run.json").write_text(json.dumps({"processes": count}))
    assert [score.method for score in read_sources([tmp_path]).scores] == ["sgd", "sgd processes=8"]


def test_updates_that_a_run_repeats_count_once(tmp_path: Path) -> None:
    """After a crash it goes back to its last checkpoint."""
    run = write_run(tmp_path / "run", "opt: sgd\n")
    for steps in ((1, 2, 3, 4), (3,)):
        with SummaryWriter(str(run / "tb"), filename_suffix=str(len(steps))) as writer:
            for step in steps:
                writer.add_scalar("train/grad_norm", step / len(steps), step)
    (found,) = read_sources([run]).runs
    assert found.scalars["train/grad_norm"] == [[1, 0.25], [2, 0.5], [3, 3.0]]


def test_an_evaluation_belongs_to_the_run_in_whose_directory_its_checkpoint_is(tmp_path: Path) -> None:
    """Runs of two sweeps have the same names."""
    for name, opt in (("A", "sam"), ("B", "samon")):
        write_run(tmp_path / name / "run", f"opt: {opt}\n")
    path = tmp_path / "evaluations.json"
    for parent, methods in ((tmp_path / "B/run", ["samon", None]), (Path("B/run"), ["samon", None])):
        path.write_text(json.dumps(evaluation_rows(str(parent / "model_best.pth.tar"))))
        found = [read_sources([*sources, path]) for sources in ([tmp_path / "A", tmp_path / "B"], [tmp_path / "A"])]
        assert [content.evaluations[0].get("method") for content in found] == methods
    path.write_text(json.dumps(evaluation_rows("run/model_best.pth.tar")))  # of which of them?
    assert "method" not in read_sources([tmp_path / "A", tmp_path / "B", path]).evaluations[0]


def test_a_run_in_two_sources_is_one_run(tmp_path: Path) -> None:
    settings = "opt: sgd\nmodel: net\nepochs: 1\nseed: 7\n"
    run = write_run(tmp_path / "runs/run", settings, "epoch,eval_top1\n0,50\n")
    (run.parent / "results.json").write_text(json.dumps(evaluation_rows("a.pth")))
    content = read_sources([run.parent, run, run.parent / "results.json"])
    assert [(score.values, score.seeds) for score in content.scores] == [([50.0], [7])]
    assert len(content.evaluations) == len(evaluation_rows("a.pth"))


def test_equal_values_are_one_bin_around_them() -> None:
    ones = HistogramValue(min=1.0, max=1.0, num=5, sum=5.0, sum_squares=5.0, bucket_limit=[0.9, 1.1], bucket=[0, 5])
    assert [x for x, share in _pooled([ones]) if share] == [pytest.approx(1.0, abs=0.02)]


def test_commands_do_not_say_where_they_wrote() -> None:
    command = "samon-train -c quickstart --output /a/b --experiment 'x y' --resume=/a/b --lr 0.1"
    assert _without_location(command) == "samon-train -c quickstart --lr 0.1"
