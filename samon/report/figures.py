"""The figures of a page as numbers; which of the paper's they answer to stands in the caption. `draw.py` draws them."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from samon.progress import format_quantity
from samon.report.content import Content, Run, Score, label

COST_NAMES = {"flops": "FLOPs", "cpu_seconds": "CPU time", "seconds": "time"}


@dataclass
class Series:
    """Points of a method, with their standard deviations where there are several seeds."""

    method: str
    x: list[float]
    y: list[float]
    kind: str = "both"  # points, line, both, or steps
    x_error: list[float] = field(default_factory=list)
    y_error: list[float] = field(default_factory=list)


@dataclass
class Figure:
    name: str
    title: str
    caption: str
    series: list[Series]
    x: str  # axis titles
    y: str
    ticks: list[float] = field(default_factory=list)  # of a logarithmic x axis


def figures(content: Content) -> dict[str, list[Figure]]:
    """{heading: its figures}: a heading for each setting, as only runs of one setting can be compared, and one for
    the evaluations. Figures that have nothing to show are left out."""
    found: dict[str, list[Figure]] = {}
    for i, setting in enumerate(content.settings()):
        part = content.part(setting)
        drawn = [*(cost(part, kind) for kind in COST_NAMES), rho(part), *curves(part)]
        drawn += [*inside(part), *(distribution(part, kind) for kind in ("gamma", "beta"))]
        for figure in drawn if i else []:
            figure.name += f"-{i}"
        found.setdefault(setting.title, []).extend(drawn)
    found["Evaluations"] = [*sharpness(content), *robustness(content)]
    shown = {title: [figure for figure in drawn if figure.series] for title, drawn in found.items()}
    return {title: drawn for title, drawn in shown.items() if drawn}


def cost(content: Content, kind: str) -> Figure:
    """Figure 3: a point for each method at its best rho, bars of a standard deviation both ways."""
    found = [score for score in content.best() if score.costs.get(kind)]
    found = found if len(found) > 1 else []  # a single point compares nothing
    bases = {score.method: score for score in map(content.base_of, found) if score is not None}
    name, told = COST_NAMES[kind], ""
    if found and all(content.ratio(score, kind) for score in found):
        axis = f"{name}, relative to {' or '.join(bases)}"
        told = "; ".join(f"{method}: {absolute(score, kind)} for a run" for method, score in bases.items()) + ". "
        unit = {s.method: statistics.fmean(s.costs[kind]) / (content.ratio(s, kind) or 1) for s in found}
    else:
        largest = max((max(score.costs[kind]) for score in found), default=1.0)
        power = max((p for p in range(0, 19, 3) if largest >= 10**p), default=0) if kind == "flops" else 0
        axis = f"{name} of a run, {['', 'k', 'M', 'G', 'T', 'P', 'E'][power // 3]}{'FLOP' if kind == 'flops' else 's'}"
        unit = dict.fromkeys((score.method for score in found), 10.0**power)
    series = []
    for score in found:
        values = [value / unit[score.method] for value in score.costs[kind]]
        series.append(Series(score.method, [statistics.fmean(values)], [score.mean], "points"))
        series[-1].x_error = [statistics.stdev(values)] if len(values) > 1 and kind != "flops" else []
        series[-1].y_error = [score.std] if score.std is not None else []
    held_out = any(score.held_out for score in content.scores)
    chosen = "held-out images" if held_out else "these images themselves"
    caption = f"{told}Each method at its best rho, chosen on {chosen}; bars: a standard deviation over seeds. "
    caption += "Points of equal cost stand side by side. "
    caption += "Compare the paper's Figure 3."
    return Figure(f"cost-{kind}", f"Accuracy against {name}", caption, series, axis, measure(content))


def absolute(score: Score, kind: str) -> str:
    """A score's mean cost with its unit."""
    mean = statistics.fmean(score.costs[kind])
    return format_quantity(mean, "FLOP") if kind == "flops" else f"{mean:,.0f} s"


def measure(content: Content) -> str:
    return next((setting.measure for setting in content.settings()), "accuracy, %")


def rho(content: Content) -> Figure:
    """Figures 1, 6 and 7. Where some images were held out to choose rho, those."""
    held_out = any(score.held_out for score in content.scores)
    rows = defaultdict(list)
    for score in content.scores:
        if score.rho is not None and score.held_out == held_out:
            rows[score.method].append((score.rho, score.values))
    series = [means(method, points) for method, points in rows.items()]
    tried = sorted({rho for points in rows.values() for rho, _ in points})
    if max(map(len, rows.values()), default=0) < 2:
        series = []
    for score in content.scores if series else []:
        if score.rho is None and score.held_out == held_out:
            series.append(Series(score.method, [tried[0], tried[-1]], [score.mean, score.mean], "line"))
    where = "held-out images" if held_out else "the evaluated images"
    caption = f"Measured on {where}, mean and standard deviation over seeds. Compare the paper's Figures 1, 6 and 7."
    return Figure("rho", "Accuracy against rho", caption, series, "rho", measure(content), tried)


def means(method: str, points: list[tuple[float, list[float]]]) -> Series:
    """The mean at each place, in order, with its standard deviation."""
    points = sorted(points, key=lambda point: point[0])
    bars = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
    found = Series(method, [x for x, _ in points], [statistics.fmean(values) for _, values in points])
    found.y_error = bars if any(bars) else []
    return found


def curves(content: Content) -> list[Figure]:
    """A line for each run."""
    found = []
    for key, title in (("eval_top1", "accuracy, %"), ("eval_loss", "evaluation loss"), ("train_loss", "training loss")):
        lines = [
            (run.method, [(row["epoch"], row[key]) for row in run.epochs if row.get(key) is not None])
            for run in content.runs
        ]
        name = f"{title.split(',')[0].capitalize()} by epoch"
        found.append(Figure(f"curve-{key}", name, "A line for each run.", lines_of(lines, "line"), "epoch", title))
    return found


def inside(content: Content) -> list[Figure]:
    """What the steps saw: TensorBoard's scalars."""
    kinds = {
        "train/sharpness": ("Sharpness during training", "L(w + eps) - L(w)"),
        "train/grad_norm": ("Gradient norm during training", "gradient norm"),
        "train/ascent_grad_norm": ("Ascent gradient norm during training", "ascent gradient norm"),
    }
    caption = "Means between two log lines, a line for each run. The ascent gradient is the perturbed parameters' at w."
    found = []
    for tag, (title, name) in kinds.items():
        lines = [(run.method, run.scalars.get(tag, [])) for run in content.runs]
        found.append(Figure(tag.replace("/", "-"), title, caption, lines_of(lines, "line"), "update", name))
    return found


def lines_of(lines: Iterable[tuple[str, Sequence[Any]]], kind: str) -> list[Series]:
    """A series for each (method, points [x, y]) that has points."""
    return [Series(method, [x for x, _ in points], [y for _, y in points], kind) for method, points in lines if points]


def distribution(content: Content, kind: str) -> Figure:
    """Figures 5 and 9: of the first run of each method."""
    first: dict[str, Run] = {}
    for run in content.runs:
        if run.norms.get(kind):
            first.setdefault(run.method, run)
    lines = [(method, [(x, 100 * share) for x, share in run.norms[kind]]) for method, run in first.items()]
    caption = f"All layers' {kind} after training, of each method's first run. Compare the paper's Figures 5 and 9."
    y = "share of the parameters, %"
    return Figure(f"norms-{kind}", f"Distribution of {kind}", caption, lines_of(lines, "steps"), kind, y)


def sharpness(content: Content) -> list[Figure]:
    """Table 6: a figure for each measure, a point for each evaluated model."""
    top1 = {row["checkpoint"]: row["value"] for row in _rows(content, "accuracy", "top1") if "checkpoint" in row}
    measures = defaultdict(list)
    for row in content.evaluations:
        if row["eval"] == "sharpness" and row["value"] is not None and row.get("checkpoint") in top1:
            point = (row["value"], top1[row["checkpoint"]])
            measures[str(row.get("setting", row["metric"]))].append((label(row), [point]))
    caption = "A point for each evaluated model. Compare the paper's Table 6."
    drawn = []
    for i, (name, points) in enumerate(measures.items()):
        series = lines_of(points, "points") if len(points) > 1 else []
        title = f"Accuracy against sharpness: {name}"
        drawn.append(Figure(f"sharpness-{i}", title, caption, series, name, "accuracy, %"))
    return drawn


def robustness(content: Content) -> list[Figure]:
    """Tables 14 and 15 as curves, one figure for each norm; radius 0 is the clean accuracy. Means over seeds."""
    clean: dict[str, list[float]] = defaultdict(list)
    for row in _rows(content, "accuracy", "top1"):
        clean[label(row)].append(row["value"])
    found: dict[str, dict[str, dict[float, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in _rows(content, "apgd", "robust_top1"):
        found[row["norm"]][label(row)][float(row["eps"])].append(row["value"])
    drawn = []
    for i, (norm, models) in enumerate(found.items()):
        series = []
        for name, values in models.items():
            points = ({0.0: clean[name]} if name in clean else {}) | values
            series.append(means(name, list(points.items())))
        caption = "Accuracy under APGD-CE and APGD-T, mean and deviation over the evaluated models of a method. "
        caption += "Compare the paper's Tables 14 and 15."
        title, x = f"Robust accuracy against the {norm} radius", f"{norm} radius"
        drawn.append(Figure(f"robust-{i}", title, caption, series, x, "accuracy, %"))
    return drawn


def _rows(content: Content, evaluation: str, metric: str) -> list[dict[str, Any]]:
    """The rows of an evaluation's metric that have a value."""
    rows = [row for row in content.evaluations if row["eval"] == evaluation and row["metric"] == metric]
    return [row for row in rows if row["value"] is not None]
