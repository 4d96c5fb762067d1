"""Figures as SVG by matplotlib, in the colors of a light or dark page."""

import io
import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from samon.files import atomic_write, write_text
from samon.progress import wrap_path
from samon.report.content import Content
from samon.report.figures import Figure, Series, figures

# Okabe and Ito's palette with gray and violet for its yellow and black, which vanish on a white or a dark page.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C", "#9B7FD4")
MARKERS = ("o", "s", "D", "P", "^", "X", "*", "v")
# As many as there are markers: lines without markers, of methods of one family, differ in nothing else.
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (7, 2, 2, 2)))
TEXT, GRID = "#010101", "#020202"  # placeholders for the page's colors
THEMES = {"page": ("var(--front)", "var(--line)"), "light": ("#1c1c1c", "#d0d0d0"), "dark": ("#ececec", "#44474c")}
TEXT_KEYS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
Numbers = dict[str, tuple[int, int]]  # of each method: its family's, and its own
STYLE: Any = {
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text, in the page's own font
    "text.parse_math": False,  # names are shown as they are
}
WIDTH = 4.2  # inches; at this size 9 points can be read on a phone as well


def svg(figure: Figure, numbers: Numbers, theme: str = "page") -> str:
    """The figure as an `<svg>` element with the theme's colors.

    Args:
        numbers: the number of each method's family, which decides its color in every figure, and its own, which decides
            its symbol and dashes.
    """
    file = io.StringIO()
    save(figure, numbers, file, "svg", (TEXT, GRID))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|(?<=<g) id=\"[^\"]*\"", "", text, flags=re.DOTALL)
    text = re.sub(r'="[^"]*"', lambda value: re.sub(r"(\.\d\d)\d+", r"\1", value[0]), text)  # hundredths of a pixel
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")
    text_color, grid_color = THEMES[theme]
    return re.sub(r"\n\s*", "\n", text).replace(TEXT, text_color).replace(GRID, grid_color)


def save(figure: Figure, numbers: Numbers, file: IO[Any], form: str, colors: tuple[str, str]) -> None:
    """Write the figure in one of matplotlib's formats, with these colors for text and grid."""
    style = STYLE | dict.fromkeys(TEXT_KEYS, colors[0]) | {"grid.color": colors[1], "svg.hashsalt": figure.name}
    with matplotlib.rc_context(style):
        draw(figure, numbers).savefig(file, format=form, transparent=True)


def write_figures(content: Content, directory: Path) -> None:
    """Write every figure as NAME.pdf, NAME-light.svg and NAME-dark.svg."""
    for figure in itertools.chain.from_iterable(figures(content).values()):
        write_figure(figure, content.style_numbers(), directory)


def write_figure(figure: Figure, numbers: Numbers, directory: Path) -> None:
    for theme in ("light", "dark"):
        write_text(directory / f"{figure.name}-{theme}.svg", svg(figure, numbers, theme) + "\n")
    with atomic_write(directory / f"{figure.name}.pdf") as file:
        save(figure, numbers, file, "pdf", THEMES["light"])


def draw(figure: Figure, numbers: Numbers) -> Canvas:
    """matplotlib's figure: axes, and below them the legend, which covers nothing however many methods there are."""
    methods = sorted({series.method for series in figure.series}, key=numbers.__getitem__)
    names = {method: wrap_path(method, 56) for method in methods}
    longest = max(max(map(len, name.splitlines())) for name in names.values())
    columns = max(1, min(len(methods), int(72 * WIDTH / (5.5 * longest + 40))))  # points: text, and its line with gaps
    rows = sum(name.count("\n") + 1 for name in names.values()) / columns
    canvas = Canvas(figsize=(WIDTH, 2.8 + 0.22 * rows), layout="constrained")
    axes = canvas.subplots()
    axes.set(xlabel=figure.x, ylabel=figure.y)
    for series in side_by_side(figure.series):
        plot(axes, series, numbers[series.method])
    # At most six: the width of a label depends on its digits, and matplotlib's guess lets long ones overlap.
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=figure.integer))
    if len(figure.ticks) > 1:
        if 0 in figure.ticks:
            axes.set_xscale("symlog", linthresh=min(tick for tick in figure.ticks if tick > 0))
        else:
            axes.set_xscale("log")
        axes.set_xticks(figure.ticks, tick_labels(axes, figure.ticks), rotation=45 * (len(figure.ticks) > 6))
        axes.xaxis.set_minor_locator(NullLocator())
    kinds = {series.method: series.kind for series in figure.series}
    handles = [Line2D([], [], label=names[m], **line_style(numbers[m], kinds[m])) for m in methods]
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    return canvas


def tick_labels(axes: Axes, ticks: list[float]) -> list[str]:
    """The values of the ticks; '' where the label before leaves no room."""
    labels, places = [], axes.xaxis.get_transform().transform(ticks)
    last = -math.inf
    for tick, place in zip(ticks, places, strict=True):
        fits = place - last > 0.045 * (places[-1] - places[0])
        labels.append(f"{tick:g}" if fits else "")
        last = place if fits else last
    return labels


def side_by_side(all_series: list[Series]) -> list[Series]:
    """Move single points that would cover each other apart by their own width, in order of x."""
    points = [series for series in all_series if series.kind == "points" and len(series.x) == 1]
    points.sort(key=lambda series: series.x[0])
    width = 0.02 * (points[-1].x[0] - points[0].x[0] or 1.0) if points else 0.0
    rows: list[list[Series]] = []
    for series in points:
        if rows and series.x[0] - rows[-1][-1].x[0] < width / 2:
            rows[-1].append(series)
        else:
            rows.append([series])
    positions = {id(s): s.x[0] + width * (i - (len(row) - 1) / 2) for row in rows for i, s in enumerate(row)}
    return [replace(s, x=[positions[id(s)]]) if id(s) in positions else s for s in all_series]


def line_style(numbers: tuple[int, int], kind: str) -> dict[str, Any]:
    """matplotlib's properties of a line: the color shows a method's family, symbol and dashes show the method."""
    family, number = numbers
    marker = MARKERS[number % len(MARKERS)] if kind in ("both", "points") else ""
    dashes = "" if kind == "points" else DASHES[(number - family) % len(DASHES)]
    return {"color": COLORS[family % len(COLORS)], "marker": marker, "ls": dashes, "ms": 6, "lw": 1.5}


def plot(axes: Axes, series: Series, numbers: tuple[int, int]) -> None:
    style = line_style(numbers, series.kind) | ({"drawstyle": "steps-mid"} if series.kind == "steps" else {})
    x_error, y_error = series.x_error or None, series.y_error or None
    axes.errorbar(series.x, series.y, xerr=x_error, yerr=y_error, elinewidth=1, capsize=2, **style)
