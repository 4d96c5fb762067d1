"""What matplotlib makes of the figures."""

from pathlib import Path

import matplotlib
import pytest

from samon.report.content import Content
from samon.report.draw import STYLE, draw, line_style, side_by_side, write_figures
from samon.report.figures import Figure, Series
from tests.report.conftest import score


def test_points_at_one_place_can_all_be_seen() -> None:
    for given, wanted in (
        ([1.0, 1.0, 2.0], [0.99, 1.01, 2.0]),
        ([1.0, 1.511, 1.509, 2.0], [1.0, 1.521, 1.499, 2.0]),
        ([1.0, 1.0, 1.0], [0.98, 1.0, 1.02]),
    ):
        points = [Series(f"{i}", [x], [1.0], "points") for i, x in enumerate(given)]
        assert [series.x[0] for series in side_by_side(points)] == pytest.approx(wanted)
        assert [series.x[0] for series in points] == given


@pytest.mark.parametrize("length", [4, 30, 200])
def test_legends_cover_neither_points_nor_axes(length: int) -> None:
    names = [f"{i} " + "samon-layerl2 x/" * (length // 16) + "sam" for i in range(9)]
    figure = Figure("f", "t", "", [Series(name, [0.1, 0.5], [1.0, 2.0]) for name in names], "rho", "y", [0.1, 0.5])
    with matplotlib.rc_context(STYLE):
        canvas = draw(figure, {name: (i, i) for i, name in enumerate(names)})
        canvas.draw_without_rendering()
    (legend,), (axes,) = canvas.legends, canvas.axes
    assert axes.get_legend() is None
    box = legend.get_window_extent()
    assert not box.overlaps(axes.get_tightbbox())
    assert box.x0 >= 0
    assert box.x1 <= canvas.bbox.x1


def test_figures_are_files_too(tmp_path: Path) -> None:
    scores = [score("SAM", "sam", [y], rho=x, held_out=True) for x, y in ((0.025, 70.0), (0.1, 71.0))]
    write_figures(Content(scores=scores), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"rho-light.svg", "rho-dark.svg", "rho.pdf"}
    light = (tmp_path / "rho-light.svg").read_text()
    assert ">0.025<" in light  # a rho that was tried, not 2 3 4 5, and not rounded
    assert "#1c1c1c" in light
    assert "#010101" not in light


def test_a_family_of_methods_has_one_color() -> None:
    numbers = Content(
        scores=[score(name, "sam", [1.0]) for name in ("SGD", "SAM-ON", "SAM", "SAM-ON tail")]
    ).style_numbers()
    styles = {name: line_style(numbers[name], "both") for name in numbers}
    assert styles["SAM-ON tail"]["color"] == styles["SAM-ON"]["color"] != styles["SAM"]["color"]
    assert len({style["marker"] for style in styles.values()}) == 4
    assert len({line_style((2, number), "line")["ls"] for number in range(2, 10)}) == 8  # lines have no marker


def test_labels_of_near_ticks_are_left_out() -> None:
    tried = [0.02, 0.1, 0.5, 2.0, 4.0, 5.0, 10.0, 20.0]
    axes = draw(Figure("f", "t", "", [Series("a", tried, tried)], "rho", "y", tried), {"a": (0, 0)}).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.02", "0.1", "0.5", "2", "4", "", "10", "20"]
