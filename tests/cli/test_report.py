"""samon-report: what it reads, its tables, and its page in a real browser."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from samon import UserError
from samon.cli import report
from samon.report.content import FORMAT, Content, Run, Score, export, name_methods
from samon.report.cost import step_flops
from samon.report.draw import STYLE, canvas, side_by_side
from samon.report.figures import Figure, Series, figures
from samon.report.page import render
from samon.report.read import _placeless, gather
from samon.report.tables import tables
from samon.trainer.config import FLAGS
from tests.browser import chromium
from tests.runs import ROOT, run

ENDING = "</script><script>document.title='owned'</script><b>.pth.tar"
EXPORTS = [path for path in (ROOT / "docs/results").rglob("*.json") if FORMAT in path.read_text()[:100]]
IMAGE = re.compile(r"images/([\w-]+\.\w+)")
HOSTILE = "<img src=x onerror=document.title='owned'><b>$data & 'q'"


def rows(checkpoint: str, **how: Any) -> list[dict[str, Any]]:
    """As validate.py writes them."""
    about = {"model": "net", "checkpoint": checkpoint, "dataset": "wds/x", "split": "validation", "num_samples": 10}
    found = [
        {"eval": "accuracy", "metric": "top1", "value": 80.0},
        {"eval": "accuracy", "metric": "loss", "value": 1.0},
    ]
    for norm, eps, value in (("l2", 0.25, 60.0), ("l2", 0.5, 40.0), ("linf", 0.001, 70.0)):
        setting = f"{norm} {eps}"
        found.append(
            {"eval": "apgd", "metric": "robust_top1", "value": value, "norm": norm, "eps": eps, "setting": setting}
        )
    found.append({"eval": "sharpness", "metric": "worst", "value": 0.03, "setting": "worst-linf@0.003"})
    return [{**about, **row, **how} for row in found]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real runs, one with a hostile name, evaluations, and a sweep's table with the paper's recipe and model."""
    base = tmp_path_factory.mktemp("report")
    run(base / "runs", "--opt", "samon", "--rho", "0.1", "--epochs", "2", "--log-interval", "1", name=HOSTILE)
    run(base / "runs", "--opt", "sgd", name="sgd")
    found = rows(str(base / "runs" / HOSTILE / "model_best.pth.tar"))
    found += rows(ENDING)
    (base / "evaluations.json").write_text(json.dumps(found))
    (base / "sweep").mkdir()
    cells = [
        ("sgd", None, [80.0, 81.0]),
        ("samon", 0.1, [84.1, 84.3]),
        ("samon", 0.5, [70.0, 71.0]),
        ("sam", 0.1, [90.0]),
    ]
    lines = [{"opt": opt, "rho": rho, "values": v, "cpu_seconds": [3.0, None][: len(v)]} for opt, rho, v in cells]
    table = {
        "config": "hparams/cifar/cifar100_resnet.yaml",
        "model": "wrn28_10_cifar",
        "metric": "eval_top1",
        "rows": lines,
    }
    (base / "sweep/table.json").write_text(json.dumps(table))
    return base


@pytest.fixture(scope="module")
def content(everything: Path) -> Content:
    return gather([everything / "runs", everything / "evaluations.json", everything / "sweep"])


def test_a_run_is_read_whole(content: Content) -> None:
    samon = next(run for run in content.runs if run.name == HOSTILE)
    assert samon.method == "samon"
    assert [row["epoch"] for row in samon.epochs] == [0, 1]
    assert len(samon.scalars["train/sharpness"]) == 8  # 64 images in batches of 16, two epochs
    assert samon.cost["updates"] == 8
    assert 1.6 < samon.cost["step_flops"] < 1.7
    assert samon.cost["seconds"] > 0
    assert samon.cost["cpu_seconds"] > 0
    assert sum(share for _, share in samon.norms["gamma"]) == pytest.approx(1)
    assert samon.made["machine"]["cores"]
    assert "output" not in samon.settings
    assert samon.made["versions"].keys() == {"samon", "torch", "timm"}
    plain = next(run for run in content.runs if run.name == "sgd")
    assert samon.cost["flops"] / plain.cost["flops"] == pytest.approx(2 * samon.cost["step_flops"], rel=1e-3)
    assert {row["method"] for row in content.evaluations if "method" in row} == {"samon"}


def test_the_papers_figures_stand_beside(content: Content) -> None:
    accuracy = next(table for table in tables(content) if table.name == "accuracy")
    swept = [dict(zip(accuracy.head, row, strict=True)) for row in accuracy.rows if row[0] == "cifar100_resnet"]
    assert [row["difference"] for row in swept] == ["≈ -0.21", "≈ +0.01", "▼ -13.69", "▲ +6.89"]
    assert [row["paper, %"] for row in swept][:2] == ["80.71 ± 0.20", "84.19 ± 0.20"]
    assert [row[""] for row in swept] == ["best", "best", "", "best"]


def drawn(content: Content) -> dict[str, Figure]:
    return {figure.name: figure for part in figures(content).values() for figure in part}


def test_every_figure_has_its_data(content: Content) -> None:
    found = drawn(content)
    wanted = {"cost-cpu_seconds", "cost-seconds-1", "cost-flops-1", "rho", "curve-eval_top1-1", "curve-train_loss-1"}
    wanted |= {"norms-gamma-1", "norms-beta-1", "sharpness-0", "robust-0", "robust-1"}
    assert wanted | {"train-grad_norm-1", "train-sharpness-1"} <= found.keys()
    robust = found["robust-0"].series[0]
    assert (robust.x, robust.y) == ([0.0, 0.25, 0.5], [80.0, 60.0, 40.0])
    swept = {series.method: series for series in found["rho"].series}
    assert (swept["samon"].x, swept["samon"].y) == ([0.1, 0.5], [pytest.approx(84.2), 70.5])
    assert swept["sgd"].x == [0.1, 0.5]  # has no rho: a level line
    assert found["rho"].ticks == [0.1, 0.5]  # those that were tried


def test_seeds_of_a_method_are_one_curve() -> None:
    found = Content(evaluations=[*rows("a", method="samon"), *rows("b", method="samon")])
    for row in found.evaluations[-4:-1]:
        row["value"] += 2
    (curve,) = drawn(found)["robust-0"].series
    assert curve.y == [80.0, 61.0, 41.0]
    assert curve.y_error == pytest.approx([0, 2**0.5, 2**0.5])
    assert [series.method for series in drawn(found)["sharpness-0"].series] == ["samon", "samon"]


def score(method: str, opt: str, values: list[float], recipe: str = "r", **more: Any) -> Score:
    return Score(method, more.pop("rho", None), values, opt, "net", recipe, **more)


def test_costs_are_compared_within_a_recipe_with_the_base_optimizer() -> None:
    """Once they were divided by the first row of the whole page: a quickstart's SGD seemed to cost 0.26."""
    found = Content(
        scores=[
            score("SAM-ON", "samon", [80.0], costs={"cpu_seconds": [180.0]}),
            score("SGD", "sgd", [79.0], costs={"cpu_seconds": [100.0]}),
            score("sgd", "sgd", [70.0], "other", costs={"cpu_seconds": [10.0]}),
            score("samon-adamw", "samon-adamw", [70.0], "other", costs={"cpu_seconds": [20.0]}),
            score("samon base_opt=sgd", "samon-adamw", [70.0], "other", costs={"cpu_seconds": [15.0]}, base_opt="sgd"),
        ]
    )
    table = next(table for table in tables(found) if table.name == "cost")
    ratios = [dict(zip(table.head, row, strict=True))["CPU time, ratio"] for row in table.rows]
    assert ratios == ["1.80", "1.00", "1.00", "", "1.50"]  # no AdamW ran in the other recipe
    assert drawn(found)["cost-cpu_seconds"].series[0].x == [1.8]
    assert drawn(found)["cost-cpu_seconds"].x == "CPU time, relative to SGD"


def test_a_single_point_is_no_comparison_and_units_go_by_size() -> None:
    def made(*flops: float) -> Content:
        return Content(scores=[score(f"samon {i}", "samon", [80.0], costs={"flops": [n]}) for i, n in enumerate(flops)])

    assert drawn(made(3e9)) == {}
    figure = drawn(made(3e9, 5e9))["cost-flops"]
    assert figure.x == "FLOPs of a run, GFLOP"
    assert [series.x for series in figure.series] == [[3.0], [5.0]]


def test_a_method_has_one_color_under_all_its_names() -> None:
    names = [("SGD", "sgd"), ("sgd", "sgd"), ("SAM-ON previous", "samon"), ("samon ascent=previous", "samon")]
    names += [("SAM no-norm", "samnn"), ("samnn", "samnn"), ("SAM-ON momentum", "samon")]
    names += [("samon-momentum", "samon-momentum"), ("SAM-ON every 5th", "samon"), ("samon ascent=every:5", "samon")]
    looks = Content(scores=[score(name, opt, [1.0]) for name, opt in names]).looks()
    assert list(looks.values()) == [0, 0, 1, 1, 2, 2, 3, 4, 5, 5]


def test_the_summary_says_who_is_ahead_and_whether_it_can_be_told() -> None:
    found = Content(
        scores=[
            score("SGD", "sgd", [79.0, 79.2], costs={"flops": [1e12] * 2}),
            score("SAM-ON", "samon", [81.0, 81.2], rho=0.1, costs={"flops": [1.66e12] * 2}),
            score("SAM-ON", "samon", [90.0], rho=0.5, held_out=True),
            score("SAM", "sam", [80.0, 80.2]),
            score("sgd", "sgd", [79.0, 81.0], "close"),
            score("samon", "samon", [80.0, 82.0], "close"),
            score("sgd", "sgd", [79.0], "one"),
            score("samon", "samon", [78.0], "one"),
            score("sgd", "sgd", [0.5, 0.51], "loss", metric="eval_loss"),
            score("samon", "samon", [0.6, 0.61], "loss", metric="eval_loss"),
        ]
    )
    table = tables(found)[0]
    assert table.name == "summary"
    first = ["Recipe r, net", "2 methods against SGD, 2 seeds", "+2.00 ± 0.28: SAM-ON ahead"]
    assert table.rows[0] == [*first, "SAM-ON, rho 0.1: 81.10 ± 0.14", "SGD: 79.10 ± 0.14", "1.66 x the FLOPs"]
    told = [row[2] for row in table.rows[1:]]
    assert told == ["+1.00 ± 2.83: too close to call", "-1.00; one seed does not tell", "+0.1000 ± 0.0141: sgd ahead"]


def test_settings_that_differ_are_those_of_one_recipe_without_later_flags(tmp_path: Path) -> None:
    new = {key: flag.default for key, flag in FLAGS.items()} | {"opt": "samon", "model": "net", "rho": 0.1}
    old = {key: value for key, value in new.items() if key not in ("shard_cache", "sparsity")} | {"lr": 0.3}
    runs = [Run("a", new, [], made={"recipe": "r"}), Run("b", old, [], made={"recipe": "r"})]
    runs.append(Run("c", new | {"epochs": 7}, [], made={"recipe": "other"}))
    (table,) = [table for table in tables(Content(runs)) if table.name == "settings"]
    assert [row[-1] for row in table.rows] == ["", "lr 0.3"]


def test_points_at_one_place_can_all_be_seen() -> None:
    points = [Series(name, [x], [1.0], "points") for name, x in (("a", 1.0), ("b", 1.0), ("c", 2.0))]
    moved = [series.x[0] for series in side_by_side(points)]
    assert moved == [pytest.approx(0.99), pytest.approx(1.01), 2.0]
    assert [series.x for series in points] == [[1.0], [1.0], [2.0]]


@pytest.mark.parametrize("length", [4, 30, 200])
def test_legends_cover_neither_points_nor_axes(length: int) -> None:
    names = [f"{i} " + "samon-layerl2 x/" * (length // 16) + "sam" for i in range(9)]
    figure = Figure("f", "t", "", [Series(name, [0.1, 0.5], [1.0, 2.0]) for name in names], "rho", "y", [0.1, 0.5])
    with matplotlib.rc_context(STYLE):
        shown = canvas(figure, {name: i for i, name in enumerate(names)})
        shown.draw_without_rendering()
    (legend,), (axes,) = shown.legends, shown.axes
    assert axes.get_legend() is None
    box = legend.get_window_extent()
    assert not box.overlaps(axes.get_tightbbox())
    assert box.x0 >= 0
    assert box.x1 <= shown.bbox.x1


def test_figures_are_files_too(tmp_path: Path) -> None:
    row = {"method": "SAM", "opt": "sam", "train": [], "rho": "0.1", "choose": {"0.025": 70.0, "0.1": 71.0}}
    (tmp_path / "results.json").write_text(json.dumps([row]))
    report.main([str(tmp_path / "results.json"), "--figures", str(tmp_path / "figures")])
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"rho-light.svg", "rho-dark.svg", "rho.pdf"}
    light = (tmp_path / "figures/rho-light.svg").read_text()
    assert ">0.025<" in light  # a rho that was tried, not 2 3 4 5, and not rounded
    assert "#1c1c1c" in light
    assert "#010101" not in light


def test_commands_do_not_say_where_they_wrote() -> None:
    command = "samon-train -c quickstart --output /a/b --experiment 'x y' --resume=/a/b --lr 0.1"
    assert _placeless(command) == "samon-train -c quickstart --lr 0.1"


def test_runs_of_other_programs_are_not_taken_for_train_pys(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.yaml").write_text("opt: adamw\nlayers: 2\n")
    (tmp_path / "run/summary.csv").write_text("epoch,train_loss\n0,1.5\n")
    found = gather([tmp_path])
    assert [(run.method, run.cost, run.metrics) for run in found.runs] == [("adamw", {}, {})]


def test_methods_are_named_by_what_sets_them_apart() -> None:
    def made(name: str, **settings: Any) -> Run:
        return Run(name, {"opt": "samon", "rho": 0.1, "seed": 0, "ascent": "batch", "lr": 1, **settings}, [])

    runs = [
        made("a"),
        made("b", seed=1, rho=0.5),
        made("c", ascent="previous"),
        made("d", opt="sgd", ascent="batch", lr=2),
    ]
    name_methods(runs)
    assert [run.method for run in runs] == ["samon", "samon", "samon ascent=previous", "sgd"]


def test_flops_of_other_steps() -> None:
    about = {
        "model": "resnet20_cifar",
        "num_classes": 10,
        "input_size": [3, 32, 32],
        "batch_size": 8,
        "opt": "samon-momentum",
    }

    def ratio(**settings: Any) -> float | None:
        found = step_flops(Run("x", {**about, **settings}, []))
        return found and found[0] / found[1]

    full = ratio()
    assert full is not None
    assert 1.6 < full < 1.7
    assert ratio(ascent="previous") == 1
    assert ratio(ascent="every:4") == pytest.approx(1 + (full - 1) / 4, abs=0.01)
    assert ratio(m_sharpness=2) == pytest.approx(full, abs=0.02)
    assert ratio(opt="sam") == pytest.approx(2, abs=0.02)
    assert ratio(ascent_fraction=0.5) == pytest.approx(1 + (full - 1) / 2, abs=0.01)
    assert ratio(ascent="adaptive") is None  # known only while it runs


def test_an_export_makes_the_same_page(everything: Path, tmp_path: Path) -> None:
    sources = [str(everything / "runs"), str(everything / "sweep"), str(everything / "evaluations.json")]
    report.main([*sources, "--export", str(tmp_path / "a.json"), "--tables", str(tmp_path / "a")])
    report.main([str(tmp_path / "a.json"), "--export", str(tmp_path / "b.json"), "--tables", str(tmp_path / "b")])
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    for path in (tmp_path / "a").iterdir():
        assert path.read_text() == (tmp_path / "b" / path.name).read_text()
    table = list(csv.DictReader((tmp_path / "a/accuracy.csv").read_text().splitlines()))
    assert {row["method"] for row in table} == {"sgd", "sam", "samon"}
    assert r"84.20 $\pm$ 0.14 & 2 & best & 84.19 $\pm$ 0.20" in (tmp_path / "a/accuracy.tex").read_text()


def test_a_tradeoff_keeps_its_own_names_and_held_out_images(tmp_path: Path) -> None:
    row = {
        "method": "SAM-ON previous",
        "opt": "samon",
        "train": [],
        "rho": "0.1",
        "choose": {"0.02": 70.0, "0.1": 71.0},
    }
    (tmp_path / "results.json").write_text(json.dumps([row | {"top1": [80.0, 82.0], "cpu_seconds": [5.0, None]}]))
    found = gather([tmp_path])
    assert [(s.rho, s.held_out, s.mean) for s in found.scores] == [(0.02, True, 70), (0.1, True, 71), (0.1, False, 81)]
    assert found.best() == [found.scores[2]]
    assert found.scores[2].costs == {"cpu_seconds": [5.0]}
    assert drawn(found)["rho"].series[0].y == [70.0, 71.0]


def test_a_tradeoff_takes_the_cost_of_its_own_recipe_alone(tmp_path: Path) -> None:
    row = {"method": "SGD", "opt": "sgd", "train": [], "rho": "", "choose": {}, "top1": [80.0], "recipe": "noise"}
    (tmp_path / "results.json").write_text(json.dumps([row, row | {"recipe": "tradeoff"}]))
    run = Run("a", {"opt": "sgd"}, [], method="SGD", made={"recipe": "tradeoff"})
    run.metrics, run.cost = {"eval_top1": 80.0}, {"flops": 5.0}
    export(Content(runs=[run]), tmp_path / "a.json")
    found = gather([tmp_path / "results.json", tmp_path / "a.json"])
    assert {s.recipe: s.costs for s in found.scores} == {"noise": {}, "tradeoff": {"flops": [5.0]}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "holds no run"),
        ('{"format": "samon-report 9"}', "this program reads"),
        (None, "exist"),
    ],
)
def test_mistakes(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        report.main([str(path), "-o", str(tmp_path / "x.html")])
    assert not (tmp_path / "x.html").exists()


def test_cells_that_look_like_formulas_or_tex() -> None:
    found = tables(Content(scores=[Score("=1+1 & 50 %_{x}", -0.5, [50.0], "samon", metric="eval_top1")]))[0]
    assert "'=1+1 & 50 %_{x},-0.5" in found.csv()
    assert r"=1+1 \& 50 \%\_\{x\}" in found.latex()


def without_figures(page: str) -> str:
    """Text and tables, which do not depend on matplotlib's version, and not the line that says how it was made."""
    return re.sub(r'<svg.*?</svg>|<p class="about">.*?</p>', "", page, flags=re.DOTALL)


@pytest.mark.skipif(not EXPORTS, reason="no results are committed")
def test_the_committed_page_is_current_and_small() -> None:
    page = (ROOT / "docs/results/report.html").read_text()
    fresh = render(gather(sorted(EXPORTS)), "Committed results", "")
    assert without_figures(page) == without_figures(fresh), "run: make results"
    assert len(page) < 1_200_000
    used = {
        name
        for path in (ROOT / "README.md", ROOT / "docs/results/tradeoff.md")
        for name in IMAGE.findall(path.read_text())
    }
    assert used == {path.name for path in (ROOT / "docs/images").iterdir()}


OVERLAPS = """plot => {
  const boxes = [...plot.querySelectorAll('text')].map(text => text.getBoundingClientRect());
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => meet(a, b))).length;
}"""
BEYOND = """plot => {
  const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll('text')].map(text => text.getBoundingClientRect())
    .filter(t => t.left < box.left - 4 || t.right > box.right + 4).length;
}"""


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_the_page_in_a_browser(width: int, scheme: str, everything: Path, tmp_path: Path) -> None:
    """No console message, names as text, both themes, no text on another one and nothing wider than the screen."""
    path = tmp_path / "report.html"
    sources = [str(everything / "runs"), str(everything / "evaluations.json"), str(everything / "sweep")]
    report.main([*sources, *map(str, EXPORTS), "-o", str(path), "--title", HOSTILE])
    with chromium() as browser:
        page = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme).new_page()
        page.set_default_timeout(120_000)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        plots = page.query_selector_all(".plot")
        assert len(plots) >= 13
        assert all(plot.query_selector("path") for plot in plots)
        assert [plot.evaluate(OVERLAPS) for plot in plots] == [0] * len(plots)
        assert [plot.evaluate(BEYOND) for plot in plots] == [0] * len(plots)
        assert page.title() == HOSTILE
        assert page.query_selector("img, main b, table script, svg script") is None
        assert HOSTILE in page.text_content("#made")
        assert ENDING in page.text_content("#sharpness-0 .plot").replace("\n", "")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.querySelector('nav').querySelectorAll('a').length") <= 6
        background = "getComputedStyle(document.body).backgroundColor"
        text = "getComputedStyle(document.querySelector('.plot text')).fill"
        shown = {scheme: (page.evaluate(background), page.evaluate(text))}
        page.click("#theme")
        shown["light" if scheme == "dark" else "dark"] = page.evaluate(background), page.evaluate(text)
        assert shown["dark"] == ("rgb(22, 24, 27)", "rgb(236, 236, 236)")
        assert shown["light"] == ("rgb(255, 255, 255)", "rgb(28, 28, 28)")
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
