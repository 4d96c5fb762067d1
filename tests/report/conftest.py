"""Two real runs, one with a hostile name, evaluations, and a sweep's table with the paper's recipe and model."""

import json
from pathlib import Path
from typing import Any

import pytest

from samon.evals.results import Result
from samon.report.content import Content, Score, export
from samon.report.figures import Figure, figures
from samon.report.read import read_sources
from tests.runs import run

ENDING = "</script><script>document.title='owned'</script><b>.pth.tar"
HOSTILE = "<img src=x onerror=document.title='owned'><b>$data & 'q'"


def evaluation_rows(checkpoint: str, **more: str) -> list[Result]:
    """As validate.py writes them."""
    common = {"model": "net", "checkpoint": checkpoint, "dataset": "wds/x", "split": "validation", "num_samples": 10}
    rows: list[Result] = [{"eval": "accuracy", "metric": "top1", "value": 80.0}]
    for norm, eps, value in (("l2", 0.25, 60.0), ("l2", 0.5, 40.0), ("linf", 0.001, 70.0)):
        attack = {"eval": "apgd", "metric": "robust_top1", "value": value, "norm": norm, "eps": eps}
        rows.append(attack | {"clean_top1": 80.0, "setting": f"{norm} {eps}"})
    rows.append({"eval": "sharpness", "metric": "worst", "value": 0.03, "setting": "worst-linf@0.003"})
    return [{**common, **row, **more} for row in rows]


def score(method: str, opt: str, values: list[float], recipe: str = "r", **more: Any) -> Score:
    return Score(method, more.pop("rho", None), values, opt, "net", recipe, **more)


def by_name(content: Content) -> dict[str, Figure]:
    return {figure.name: figure for section in figures(content).values() for figure in section}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("report")
    flags = ["--opt", "samon", "--rho", "0.1", "--epochs", "2", "--log-interval", "1"]
    run(base / "runs", *flags, name=HOSTILE, flops=True)
    run(base / "runs", "--opt", "sgd", name="sgd", flops=True)
    rows = evaluation_rows(str(base / "runs" / HOSTILE / "model_best.pth.tar")) + evaluation_rows(ENDING)
    (base / "evaluations.json").write_text(json.dumps(rows))
    (base / "sweep").mkdir()
    cells = [("sgd", None, [80.0, 81.0]), ("samon", 0.1, [84.1, 84.3]), ("samon", 0.5, [70.0, 71.0])]
    setting = ("wrn28_10_cifar", "cifar100_resnet")
    scores = [
        Score(opt, rho, values, opt, *setting, costs={"cpu_seconds": [3.0]})
        for opt, rho, values in [*cells, ("sam", 0.1, [90.0])]
    ]
    export(Content(scores=scores), base / "sweep/table.json")
    return [base / "runs", base / "evaluations.json", base / "sweep"]


@pytest.fixture(scope="session")
def content(sources: list[Path]) -> Content:
    return read_sources(sources)
