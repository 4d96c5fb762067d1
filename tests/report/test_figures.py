"""The figures as numbers."""

import pytest

from samon.report.content import Content
from tests.report.conftest import by_name, evaluation_rows, score


def test_every_figure_has_its_data(content: Content) -> None:
    found = by_name(content)
    wanted = {"cost-cpu_seconds", "cost-seconds-1", "cost-flops-1", "rho", "curve-eval_top1-1", "curve-train_loss-1"}
    wanted |= {"norms-gamma-1", "norms-beta-1", "sharpness-0", "robust-0", "robust-1"}
    assert wanted | {"train-grad_norm-1", "train-sharpness-1"} <= found.keys()
    robust = found["robust-0"].series[0]
    assert (robust.x, robust.y) == ([0.0, 0.25, 0.5], [80.0, 60.0, 40.0])
    swept = {series.method: series for series in found["rho"].series}
    assert (swept["samon"].x, swept["samon"].y) == ([0.1, 0.5], [pytest.approx(84.2), 70.5])
    assert swept["sgd"].x == [0.1, 0.5]  # no rho: a level line
    assert found["rho"].ticks == [0.1, 0.5]  # those that were tried


def test_seeds_of_a_method_are_one_curve() -> None:
    content = Content(evaluations=[*evaluation_rows("a", method="samon"), *evaluation_rows("b", method="samon")])
    for row in content.evaluations[-4:-1]:
        row["value"] += 2
    (curve,) = by_name(content)["robust-0"].series
    assert curve.y == [80.0, 61.0, 41.0]
    assert curve.y_error == pytest.approx([0, 2**0.5, 2**0.5])
    assert [series.method for series in by_name(content)["sharpness-0"].series] == ["samon", "samon"]


def test_evaluations_of_different_images_or_models_are_not_mixed() -> None:
    """The accuracy of a model on other images is neither its clean accuracy nor that of its sharpness."""
    rows = [*evaluation_rows("a", method="samon"), *evaluation_rows("b", method="samon")]
    rows.append(rows[0] | {"setting": "clean subset of imagenet-a", "value": 9.0})
    other = [row | {"split": "test", "value": 1.0, "clean_top1": 2.0} for row in rows]
    other = [row for row in other if row["eval"] != "sharpness"]  # of the training split
    average = [row | {"ema": True, "value": 4.0, "clean_top1": 5.0} for row in rows]
    third = [row | {"model": "vit", "value": 3.0} for row in evaluation_rows("c", method="samon")]
    figures = by_name(Content(evaluations=[*rows, *other, *third, *average]))
    curves = {f.title: {s.method: s.y for s in f.series} for f in figures.values() if f.x == "l2 radius"}
    start = "Robust accuracy against the l2 radius: "
    assert curves[f"{start}wds/x validation, net"] == {"samon": [80.0, 60.0, 40.0], "samon EMA": [5.0, 4.0, 4.0]}
    assert curves[f"{start}wds/x test, net"] == {"samon": [2.0, 1.0, 1.0]}
    assert curves[f"{start}wds/x validation, vit"] == {"samon": [80.0, 3.0, 3.0]}
    points = [[s.y for s in f.series] for f in figures.values() if f.x.startswith("worst")]
    assert points == [[*[[80.0]] * 2, *[[4.0]] * 2], [[1.0]] * 2]


def test_the_cost_figure_is_relative_to_the_baseline() -> None:
    costs = {"cpu_seconds": [180.0]}
    content = Content(scores=[score("SAM-ON", "samon", [80.0], costs=costs)])
    assert by_name(content) == {}  # a single point compares nothing
    content.scores.append(score("SGD", "sgd", [79.0], costs={"cpu_seconds": [100.0]}))
    figure = by_name(content)["cost-cpu_seconds"]
    assert figure.series[0].x == [1.8]
    assert figure.x == "CPU time, relative to SGD"


def test_units_go_by_size_without_a_baseline() -> None:
    scores = [score(f"samon {n}", "samon", [80.0], costs={"flops": [n]}) for n in (3e9, 5e9)]
    figure = by_name(Content(scores=scores))["cost-flops"]
    assert figure.x == "FLOPs of a run, GFLOP"
    assert [series.x for series in figure.series] == [[3.0], [5.0]]
    for one in scores:
        one.costs["flops"] = [1e22]
    assert by_name(Content(scores=scores))["cost-flops"].x.endswith("EFLOP")  # the largest unit


def test_rho_is_shown_on_the_held_out_images() -> None:
    scores = [score("SAM", "sam", [y], rho=x, held_out=True) for x, y in ((0.02, 70.0), (0.1, 71.0))]
    content = Content(scores=[*scores, score("SAM", "sam", [80.0, 82.0], rho=0.1)])
    assert content.best() == [content.scores[2]]
    assert by_name(content)["rho"].series[0].y == [70.0, 71.0]
