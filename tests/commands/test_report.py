"""samon-report: what it reads, its tables, and its page in a real browser."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from samon import UserError
from samon.commands import report
from samon.report.content import FORMAT, Content, Run, Score, export, name_methods
from samon.report.cost import step_flops
from samon.report.figures import figures
from samon.report.page import data_of, script_json
from samon.report.read import _placeless, gather
from samon.report.tables import tables
from tests.browser import chromium
from tests.runs import ROOT, run

ENDING = "</script><script>document.title='owned'</script><b>.pth.tar"
EXPORTS = [path for path in (ROOT / "docs/results").rglob("*.json") if FORMAT in path.read_text()[:100]]
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


def test_every_figure_of_the_issue(content: Content) -> None:
    drawn = {figure.name: figure for figure in figures(content)}
    wanted = {"cost-cpu_seconds-0", "cost-seconds-1", "cost-flops-1", "rho-0", "curve-eval_top1", "curve-train_loss"}
    wanted |= {"norms-gamma", "norms-beta", "sharpness-0", "robust-0", "robust-1", "train-grad_norm", "train-sharpness"}
    assert wanted <= drawn.keys()
    robust = drawn["robust-0"].traces[0]
    assert (robust["x"], robust["y"]) == ([0.0, 0.25, 0.5], [80.0, 60.0, 40.0])
    swept = {trace["name"]: trace for trace in drawn["rho-0"].traces}
    assert (swept["samon"]["x"], swept["samon"]["y"]) == ([0.1, 0.5], [pytest.approx(84.2), 70.5])
    assert swept["sgd"]["x"] == [0.1, 0.5]  # has no rho: a level line


def test_seeds_of_a_method_are_one_curve() -> None:
    found = Content(evaluations=[*rows("a", method="samon"), *rows("b", method="samon")])
    for row in found.evaluations[-4:-1]:
        row["value"] += 2
    curve = next(figure for figure in figures(found) if figure.name == "robust-0").traces
    assert [trace["y"] for trace in curve] == [[80.0, 61.0, 41.0]]
    assert curve[0]["error_y"]["array"] == pytest.approx([0, 2**0.5, 2**0.5])
    points = next(figure for figure in figures(found) if figure.name == "sharpness-0").traces
    assert [trace["showlegend"] for trace in points] == [True, False]


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
    assert next(figure for figure in figures(found) if figure.name == "rho").traces[0]["y"] == [70.0, 71.0]


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


def test_data_cannot_end_their_script() -> None:
    assert json.loads(script_json({"a": ENDING})) == {"a": ENDING}
    assert "<" not in script_json(ENDING)


def test_cells_that_look_like_formulas_or_tex() -> None:
    found = tables(Content(scores=[Score("=1+1 & 50 %_{x}", -0.5, [50.0], "samon", metric="eval_top1")]))[0]
    assert "'=1+1 & 50 %_{x},-0.5" in found.csv()
    assert r"=1+1 \& 50 \%\_\{x\}" in found.latex()


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.stem)
def test_committed_results_make_a_page(path: Path, tmp_path: Path) -> None:
    """With SCREENSHOTS=DIR the figures against cost and rho are also kept as pictures, of both themes."""
    page_file = tmp_path / f"{path.stem}.html"
    report.main([str(path), "-o", str(page_file), "--title", path.stem])
    with chromium() as browser:
        for scheme in ("light", "dark"):
            page = browser.new_context(viewport={"width": 800, "height": 600}, color_scheme=scheme).new_page()
            page.set_default_timeout(120_000)  # a page of megabytes on a machine that has other work
            said: list[str] = []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.goto(page_file.as_uri())
            page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
            assert page.query_selector("[id^=rho] .scatterlayer path")
            assert said == []
            for figure in (
                page.query_selector_all("figure[id^=cost], figure[id^=rho]") if os.environ.get("SCREENSHOTS") else []
            ):
                name = f"{path.stem}-{figure.get_attribute('id')}-{scheme}.png"
                figure.screenshot(path=Path(os.environ["SCREENSHOTS"]) / name)


@pytest.mark.skipif(not EXPORTS, reason="no results are committed")
def test_the_committed_page_is_current() -> None:
    page = (ROOT / "docs/results/report.html").read_text()
    assert script_json(data_of(figures(gather(sorted(EXPORTS))))) in page, "run: make results"


def test_the_page_in_a_browser(everything: Path, tmp_path: Path) -> None:
    """No console message, marks in every figure, names as text, both themes, and nothing wider than a telephone."""
    path = tmp_path / "report.html"
    sources = [str(everything / "runs"), str(everything / "evaluations.json"), str(everything / "sweep")]
    report.main([*sources, "-o", str(path), "--title", HOSTILE])
    with chromium() as browser:
        page = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark").new_page()
        page.set_default_timeout(120_000)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
        marks = "[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.scatterlayer path').length)"
        counts = page.evaluate(marks)
        assert len(counts) >= 13
        assert all(counts)
        assert page.title() == HOSTILE
        assert page.query_selector("img, main b, table script") is None
        assert HOSTILE in page.inner_text("#settings")
        assert ENDING in page.text_content("#sharpness-0 .legend")  # Plotly would read markup in names too
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        background = "getComputedStyle(document.body).backgroundColor"
        text = "document.querySelector('.plot .xtitle').style.fill"
        dark = page.evaluate(background), page.evaluate(text)
        page.click("#theme")
        light = page.evaluate(background), page.evaluate(text)
        assert dark == ("rgb(22, 24, 27)", "rgb(236, 236, 236)")
        assert light == ("rgb(255, 255, 255)", "rgb(28, 28, 28)")
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
