"""Scores, their names and costs, and the export."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from samon import UserError
from samon.cli import report
from samon.report.content import DEFAULTS, FORMAT, Content, Run, export, load, name_methods
from tests.report.conftest import score
from tests.runs import ROOT

EXPORTS = [path for path in ROOT.glob("experiments/*/results.json") if FORMAT in path.read_text()[:100]]


def test_costs_are_compared_with_the_base_optimizer_of_the_same_recipe() -> None:
    content = Content(
        scores=[
            score("SAM-ON", "samon", [80.0], costs={"cpu_seconds": [180.0]}),
            score("SGD", "sgd", [79.0], costs={"cpu_seconds": [100.0]}),
            score("sgd", "sgd", [70.0], "other", costs={"cpu_seconds": [10.0]}),
            score("samon-adamw", "samon-adamw", [70.0], "other", costs={"cpu_seconds": [20.0]}),
            score("samon base_opt=sgd", "samon-adamw", [70.0], "other", costs={"cpu_seconds": [15.0]}, base_opt="sgd"),
        ]
    )
    ratios = [content.cost_ratio(item, "cpu_seconds") for item in content.scores]
    assert ratios == [1.8, 1.0, 1.0, None, 1.5]  # no AdamW ran in the other recipe


def test_a_run_that_diverged_is_the_worst_and_can_be_exported(tmp_path: Path) -> None:
    found = [score("a", "sam", values, rho=i, metric="eval_loss") for i, values in enumerate(([math.nan, 0.1], [0.5]))]
    content = Content([Run("a", {"opt": "sgd"}, [{"train_loss": math.nan}])], found)
    assert content.best() == found[1:]
    assert (found[0].text, found[1].text) == ("nan ± nan", "0.5000")
    export(content, tmp_path / "x.json")
    again = load(json.loads((tmp_path / "x.json").read_text()), tmp_path)
    assert math.isnan(again.scores[0].values[0])
    assert math.isnan(again.runs[0].epochs[0]["train_loss"] or 0)


def test_methods_are_named_by_the_settings_that_differ() -> None:
    def run(name: str, **settings: Any) -> Run:
        return Run(name, {"opt": "samon", "rho": 0.1, "seed": 0, "ascent": "batch", "lr": 1, **settings}, [])

    runs = [run("a"), run("b", seed=1, rho=0.5), run("c", ascent="previous"), run("d", opt="sgd", lr=2)]
    name_methods(runs)
    assert [run.method for run in runs] == ["samon", "samon", "samon ascent=previous", "sgd"]


def test_an_export_makes_the_same_tables(sources: list[Path], tmp_path: Path) -> None:
    words = [*map(str, sources), "--export", str(tmp_path / "a.json"), "--tables", str(tmp_path / "a")]
    report.main(words)
    report.main([str(tmp_path / "a.json"), "--export", str(tmp_path / "b.json"), "--tables", str(tmp_path / "b")])
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    for path in (tmp_path / "a").iterdir():
        assert path.read_text() == (tmp_path / "b" / path.name).read_text()
    text = (tmp_path / "a/accuracy.tex").read_text()
    assert r"84.20 $\pm$ 0.14 & 2 & best, edge of the grid & 84.19 $\pm$ 0.20" in text


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.parent.name)
def test_committed_results_are_compact_and_current(path: Path) -> None:
    content = load(json.loads(path.read_text()), path)
    assert path.stat().st_size < 100_000
    assert content.settings()[0].model
    unknown = {key for run in content.runs for key in run.settings} - DEFAULTS.keys()
    assert not unknown, "flags of an earlier version"


def test_there_are_committed_results() -> None:
    assert {path.parent.name for path in EXPORTS} >= {"tradeoff", "noisy_labels", "fashion_mnist", "vit_scratch"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[1, 2]", "holds no run"), ('{"format": "samon-report 9"}', "reads"), (None, "exist")],
)
def test_mistakes(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        report.main([str(path), "-o", str(tmp_path / "x.html")])
    assert not (tmp_path / "x.html").exists()
