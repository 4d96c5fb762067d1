"""The tables of a report."""

from samon.report.content import DEFAULTS, EARLY_STOPPED, Content, Run, Score
from samon.report.tables import tables
from tests.report.conftest import score


def test_the_papers_results_are_shown_beside_ours(content: Content) -> None:
    accuracy = next(table for table in tables(content) if table.name == "accuracy")
    swept = [dict(zip(accuracy.head, row, strict=True)) for row in accuracy.rows if row[0] == "cifar100_resnet"]
    assert [row["difference"] for row in swept] == ["≈ -0.21", "≈ +0.01", "▼ -13.69", "▲ +6.89"]
    assert [row["paper, %"] for row in swept][:2] == ["80.71 ± 0.20", "84.19 ± 0.20"]
    assert [row[""] for row in swept] == ["best", "best, edge of the grid", "", "best"]
    tuned = Score("sgd", None, [81.0], "sgd", "vit_small_patch16_224.augreg_in21k", "vit_s16_in21k_ft")
    [accuracy, *_] = tables(Content(scores=[tuned]))
    assert accuracy.rows[0][-2:] == ["81.62", "▼ -0.62"]  # the paper has no deviation of it


def test_the_summary_says_who_is_ahead_and_whether_that_is_certain() -> None:
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
            score("sgd", "sgd", [79.0, 79.0], "repeated", seeds=[42, 42]),
            score("samon", "samon", [79.5, 79.5], "repeated", seeds=[42, 42]),
            score("sgd", "sgd", [0.5, 0.51], "loss", metric="eval_loss"),
            score("samon", "samon", [0.6, 0.61], "loss", metric="eval_loss"),
        ]
    )
    table = tables(found)[0]
    assert table.name == "summary"
    first = ["r, net", "2 methods against SGD, 2 seeds", "+2.00 ± 0.28: SAM-ON ahead"]
    assert table.rows[0] == [*first, "SAM-ON, rho 0.1: 81.10 ± 0.14", "SGD: 79.10 ± 0.14", "1.66 x the FLOPs"]
    results = [row[2] for row in table.rows[1:]]
    assert results[0] == "+1.00 ± 2.83: too close to call"
    assert results[1].startswith("-1.00; one seed")
    assert table.rows[3][1:3] == ["1 method against sgd, 1 seed", "+0.50; one seed is not enough to tell"]
    assert results[3] == "+0.1000 ± 0.0141: sgd ahead"


def test_rows_say_what_else_than_accuracy_they_are_and_whether_rho_is_at_the_edge() -> None:
    held_out = [score("SAM", "sam", [7.0], rho=rho, held_out=True, metric=EARLY_STOPPED) for rho in (0.1, 0.5)]
    tested = [score("SAM", "sam", [80.0], rho=0.5, metric=metric) for metric in ("eval_top1", EARLY_STOPPED)]
    accuracy = next(table for table in tables(Content(scores=[*held_out, *tested])) if table.name == "accuracy")
    rows = [dict(zip(accuracy.head, row, strict=True)) for row in accuracy.rows[2:]]
    assert [row["measure"] for row in rows] == ["", "early-stopped accuracy, %"]
    assert [row[""] for row in rows] == ["best, edge of the grid"] * 2


def test_settings_that_differ_are_those_within_a_recipe() -> None:
    """A flag that an earlier version did not have has its default."""
    new = DEFAULTS | {"opt": "samon", "model": "net", "rho": 0.1}
    old = {key: value for key, value in new.items() if key not in ("shard_cache", "sparsity")} | {"lr": 0.3}
    runs = [Run("a", new, [], origin={"recipe": "r"}), Run("b", old, [], origin={"recipe": "r"})]
    runs.append(Run("c", new | {"epochs": 7}, [], origin={"recipe": "other"}))
    (table,) = [table for table in tables(Content(runs)) if table.name == "settings"]
    assert [row[-1] for row in table.rows] == ["", "lr 0.3"]


def test_cells_that_look_like_formulas_or_tex() -> None:
    found = tables(Content(scores=[score("=1+1 & 50 %_{x}", "samon", [50.0], rho=-0.5)]))[0]
    assert "'=1+1 & 50 %_{x},-0.5" in found.csv()
    assert r"=1+1 \& 50 \%\_\{x\}" in found.latex()
