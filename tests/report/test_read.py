"""What is read from the directory of a run."""

from pathlib import Path

import pytest

from samon.report.content import Content
from samon.report.read import _without_location, read_sources
from tests.report.conftest import HOSTILE


def test_a_run_is_read_with_its_cost_and_origin(content: Content) -> None:
    samon = next(run for run in content.runs if run.name == HOSTILE)
    assert samon.method == "samon"
    assert [row["epoch"] for row in samon.epochs] == [0, 1]
    assert len(samon.scalars["train/sharpness"]) == 8  # 64 images in batches of 16, two epochs
    assert samon.cost["updates"] == 8
    assert 1.6 < samon.cost["step_flops"] < 1.7
    assert samon.cost["seconds"] > 0
    assert samon.cost["cpu_seconds"] > 0
    assert sum(share for _, share in samon.norms["gamma"]) == pytest.approx(1)
    assert samon.origin["machine"]["cores"]
    assert samon.origin["versions"].keys() == {"samon", "torch", "timm"}
    assert "output" not in samon.settings
    plain = next(run for run in content.runs if run.name == "sgd")
    assert samon.cost["flops"] / plain.cost["flops"] == pytest.approx(2 * samon.cost["step_flops"], rel=1e-3)
    assert {row["method"] for row in content.evaluations if "method" in row} == {"samon"}


def test_runs_of_other_programs_have_no_default_settings(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.yaml").write_text("opt: adamw\nlayers: 2\n")
    (tmp_path / "run/summary.csv").write_text("epoch,train_loss\n0,1.5\n")
    (run,) = read_sources([tmp_path]).runs
    assert (run.method, run.cost, run.metrics, run.settings) == ("adamw", {}, {}, {"opt": "adamw", "layers": 2})


def test_commands_do_not_say_where_they_wrote() -> None:
    command = "samon-train -c quickstart --output /a/b --experiment 'x y' --resume=/a/b --lr 0.1"
    assert _without_location(command) == "samon-train -c quickstart --lr 0.1"
