"""The tables of samon-sweep."""

from pathlib import Path

from samon.cli.tables import scope_table, write_tables
from samon.report.content import Content, Score, paper_results


def scores(**rows: list[tuple[float | None, list[float]]]) -> list[Score]:
    return [
        Score(opt, rho, values, opt)
        for name, row in rows.items()
        for opt, (rho, values) in ((name.replace("_", "-"), cell) for cell in row)
    ]


def test_the_better_scope_and_the_best_are_marked() -> None:
    found = scores(
        sgd=[(None, [70.0, 71.0])],
        sam=[(0.1, [75.0, 76.0]), (0.5, [74.0, 74.0])],
        samon=[(0.5, [76.0, 77.0])],
        sam_layerl2=[(0.01, [77.5, 77.5])],
        samon_layerl2=[(0.2, [77.0, 77.2])],
    )
    assert {score.opt: score.rho for score in Content(scores=found).best()}["sam"] == 0.1
    table = scope_table(found, {"sam": "75.07±0.6", "samon": "75.58±0.4"}).splitlines()
    assert table[0] == "| variant | none | all | ON | paper, none | paper, all | paper, ON |"
    assert table[2] == "| sgd | 70.50 ± 0.71 |  |  |  |  |  |"
    assert table[3] == "| SAM |  | 75.50 ± 0.71 (rho 0.1) | **76.50 ± 0.71** (rho 0.5) |  | 75.07±0.6 | 75.58±0.4 |"
    assert table[4].startswith("| layer. l2 |  | <u>**77.50 ± 0.00**</u> (rho 0.01) | 77.10 ± 0.14 (rho 0.2) |")


def test_only_what_perturbs_normalization_layers_is_listed_under_on() -> None:
    found = scores(sgd=[(None, [70.0])], samon=[(0.5, [71.0])], sam_random=[(0.1, [69.0])])
    table = scope_table([*found, Score("lookahead_samon", 0.1, [68.0], "lookahead_samon")], {})
    assert table.splitlines()[2:] == [
        "| sgd | 70.00 |  |  |",
        "| SAM |  |  | <u>71.00</u> (rho 0.5) |",
        "| sam-random |  | 69.00 (rho 0.1) |  |",
        "| lookahead_samon |  |  | 68.00 (rho 0.1) |",
    ]


def test_the_best_loss_is_the_lowest_and_has_four_decimals(tmp_path: Path) -> None:
    found = scores(samon=[(0.1, [0.51234, 0.5]), (0.5, [0.6])])
    for score in found:
        score.metric = "eval_loss"
    assert Content(scores=found).best()[0].rho == 0.1
    assert "| samon | 0.1 | 0.5062 ± 0.0087 | 2 |" in write_tables(tmp_path, found)


def test_the_papers_result_is_shown_beside_single_runs(tmp_path: Path) -> None:
    found = [Score("sgd", None, [70.0], "sgd", "resnet56_cifar", "cifar100_resnet_aa")]
    assert "| sgd | <u>70.00</u> | 75.26±0.2 |" in write_tables(tmp_path, found)


def test_paper_results_are_the_papers() -> None:
    assert paper_results("cifar100_resnet", "wrn28_10_cifar")["samon"] == [84.19, 0.2]
    assert paper_results("cifar100_resnet", "vgg16_bn_cifar")["samon-layerl2"] == [77.12, 0.2]
    assert paper_results("cifar10_vit", "vit_small_cifar")["samon-eleml2orig-adamw"] == [94.01, 0.5]
    assert paper_results("vit_s32_scratch", "vit_small_patch32_224")["samon-lion"] == [72.64, 0.14]
    assert paper_results("quickstart", "resnet10t") == {}
