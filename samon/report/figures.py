"""The figures of a report as numbers; captions name the paper's figure. `draw.py` draws them."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from samon.evals.results import Result, model_label
from samon.progress import PREFIXES, format_quantity
from samon.report.content import Content, Run, Score, deviation

XY = Sequence[Sequence[float]]  # points
COST_NAMES = {"flops": "FLOPs", "cpu_seconds": "CPU time", "seconds": "time"}


@dataclass
class Series:
    """Points of a method, with standard deviations where there are several seeds."""

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
    integer: bool = False  # x counts something


def figures(content: Content) -> dict[str, list[Figure]]:
    """The figures with data by heading: one heading per setting, as only runs of one setting can be compared, and one
    for the evaluations."""
    sections: dict[str, list[Figure]] = {}
    for i, setting in enumerate(content.settings()):
        part = content.of_setting(setting)
        section = [*(cost(part, kind) for kind in COST_NAMES), rho(part), *curves(part)]
        section += [distribution(part, kind) for kind in ("gamma", "beta")]
        for figure in section if i else []:
            figure.name += f"-{i}"
        sections.setdefault(setting.title, []).extend(section)
    sections["Evaluations"] = [*sharpness(content), *robustness(content)]
    with_data = {title: [figure for figure in section if figure.series] for title, section in sections.items()}
    return {title: section for title, section in with_data.items() if section}


def cost(content: Content, kind: str) -> Figure:
    """Figure 3: a point for each method at its best rho, with a standard deviation in both directions."""
    scores = [score for score in content.best() if score.costs.get(kind)]
    scores = scores if len(scores) > 1 else []  # a single point compares nothing
    bases = {s.method: base for s in scores if (base := content.baseline(s)) and base.costs.get(kind)}
    name, caption = COST_NAMES[kind], ""
    if len(bases) == len(scores):
        costs = {base.method: mean_cost(base, kind) for base in bases.values()}
        axis = f"{name}, relative to {' or '.join(costs)}"
        caption = "; ".join(f"{method}: {cost} for a run" for method, cost in costs.items()) + ". "
        unit = {method: statistics.fmean(base.costs[kind]) for method, base in bases.items()}
    else:
        largest = max(max(score.costs[kind]) for score in scores)
        power = min((len(f"{largest:.0f}") - 1) // 3, len(PREFIXES[1000]) - 1) if kind == "flops" else 0
        axis = f"{name} of a run, {PREFIXES[1000][power]}{'FLOP' if kind == 'flops' else 's'}"
        unit = dict.fromkeys((score.method for score in scores), 1000.0**power)
    series = []
    for score in scores:
        values = [value / unit[score.method] for value in score.costs[kind]]
        x_error = [statistics.stdev(values)] if len(values) > 1 and kind != "flops" else []
        y_error = [score.std] if score.std is not None else []
        series.append(Series(score.method, [statistics.fmean(values)], [score.mean], "points", x_error, y_error))
    chosen = "held-out images" if any(score.held_out for score in content.scores) else "these images themselves"
    caption += f"Each method at its best rho, chosen on {chosen}; bars: a standard deviation over seeds. "
    caption += "Points of equal cost are drawn side by side. Compare the paper's Figure 3."
    measure = content.settings()[0].measure
    return Figure(f"cost-{kind}", f"Accuracy against {name}", caption, series, axis, measure)


def mean_cost(score: Score, kind: str) -> str:
    """A score's mean cost with its unit."""
    mean = statistics.fmean(score.costs[kind])
    return format_quantity(mean, "FLOP") if kind == "flops" else f"{mean:,.0f} s"


def rho(content: Content) -> Figure:
    """Figures 1, 6 and 7, on the images held out to choose rho if there are any."""
    held_out = any(score.held_out for score in content.scores)
    scores = [score for score in content.scores if score.held_out == held_out]
    points = defaultdict(list)
    for score in scores:
        if score.rho is not None:
            points[score.method].append((score.rho, score.values))
    tried = sorted({rho for row in points.values() for rho, _ in row})
    series = []
    if max(map(len, points.values()), default=0) > 1:
        series = [means(method, row) for method, row in points.items()]
        ends = [tried[0], tried[-1]]  # a level line for methods without rho
        series += [Series(s.method, ends, [s.mean, s.mean], "line") for s in scores if s.rho is None]
    where = "held-out images" if held_out else "the evaluated images"
    caption = f"Measured on {where}, mean and standard deviation over seeds. Compare the paper's Figures 1, 6 and 7."
    return Figure("rho", "Accuracy against rho", caption, series, "rho", content.settings()[0].measure, tried)


def means(method: str, points: Iterable[tuple[float, list[float]]]) -> Series:
    """The mean and standard deviation of the values at each x, in order of x."""
    points = sorted(points, key=lambda point: point[0])
    errors = [deviation(values) or 0.0 for _, values in points]
    xs, ys = [x for x, _ in points], [statistics.fmean(values) for _, values in points]
    return Series(method, xs, ys, y_error=errors if any(errors) else [])


def curves(content: Content) -> list[Figure]:
    """Metrics by epoch, and TensorBoard's scalars by update: a line for each run."""
    section = []
    for key, y in (("eval_top1", "accuracy, %"), ("eval_loss", "evaluation loss"), ("train_loss", "training loss")):
        lines: list[tuple[str, XY]] = [
            (run.method, [(row["epoch"] or 0, value) for row in run.epochs if (value := row.get(key)) is not None])
            for run in content.runs
        ]
        title = f"{y.split(',')[0].capitalize()} by epoch"
        series = to_series(lines, "line")
        section.append(Figure(f"curve-{key}", title, "A line for each run.", series, "epoch", y, integer=True))
    scalars = {
        "train/sharpness": ("Sharpness", "L(w + eps) - L(w)"),
        "train/grad_norm": ("Gradient norm", "gradient norm"),
        "train/ascent_grad_norm": ("Ascent gradient norm", "ascent gradient norm"),
    }
    caption = "Means between two log lines, a line for each run. The sharpness is that of the updates with two passes. "
    caption += "The ascent gradient is the perturbed parameters' at w."
    for tag, (title, y) in scalars.items():
        series = to_series([(run.method, run.scalars.get(tag, [])) for run in content.runs], "line")
        name, title = tag.replace("/", "-"), f"{title} during training"
        section.append(Figure(name, title, caption, series, "update", y, integer=True))
    return section


def to_series(lines: Iterable[tuple[str, XY]], kind: str) -> list[Series]:
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
    return Figure(f"norms-{kind}", f"Distribution of {kind}", caption, to_series(lines, "steps"), kind, y)


def sharpness(content: Content) -> list[Figure]:
    """Table 6: a figure for each measure and split of a data set, a point for each evaluated model."""
    top1: dict[tuple[object, ...], dict[str, float]] = defaultdict(dict)
    measures, subject = defaultdict(list), subject_of(content)
    for row in evaluated(content, "accuracy", "top1"):  # the data set's own scoring comes first
        top1[row.get("checkpoint"), row.get("ema"), row["dataset"]].setdefault(subject(row), row["value"])
    for row in content.evaluations:
        if row["eval"] == "sharpness" and row["value"] is not None and row.get("checkpoint"):
            name = str(row.get("setting", row["metric"])) + (f", m {row['m']}" if "m" in row else "")
            for where, value in top1[row["checkpoint"], row.get("ema"), row["dataset"]].items():
                measures[name, where].append((model_label(row), [(row["value"], value)]))
    caption = "A point for each evaluated model. Compare the paper's Table 6."
    section = []
    for i, ((name, where), points) in enumerate(measures.items()):
        series = to_series(points, "points") if len(points) > 1 else []
        title = f"Accuracy against sharpness: {name}, {where}"
        section.append(Figure(f"sharpness-{i}", title, caption, series, name, "accuracy, %"))
    return section


def robustness(content: Content) -> list[Figure]:
    """Tables 14 and 15 as curves, a figure for each norm and split of a data set; radius 0 is the accuracy on the same
    images without an attack. Means over seeds."""
    curves: dict[tuple[str, str], dict[str, dict[float, dict[str, float]]]] = defaultdict(dict)
    subject = subject_of(content)
    for row in evaluated(content, "apgd", "robust_top1"):
        points = curves[row["norm"], subject(row)].setdefault(model_label(row), defaultdict(dict))
        for radius, key in ((0.0, "clean_top1"), (float(row["eps"]), "value")):
            if key in row:
                points[radius][str(row.get("checkpoint", row["model"]))] = row[key]
    caption = "Accuracy under APGD-CE and APGD-T, mean and deviation over the evaluated models of a method. "
    caption += "Compare the paper's Tables 14 and 15."
    section = []
    for i, ((norm, where), models) in enumerate(curves.items()):
        series = [means(name, [(x, [*y.values()]) for x, y in points.items()]) for name, points in models.items()]
        title = f"Robust accuracy against the {norm} radius: {where}"
        section.append(Figure(f"robust-{i}", title, caption, series, f"{norm} radius", "accuracy, %"))
    return section


def subject_of(content: Content) -> Callable[[Result], str]:
    """A function that returns an evaluation's images, with its model if several models have methods of one name."""
    models = {(model_label(row), row["model"]) for row in content.evaluations}
    ambiguous = len(models) > len({label for label, _ in models})
    return lambda row: f"{row['dataset']} {row['split']}".rstrip() + f", {row['model']}" * ambiguous


def evaluated(content: Content, evaluation: str, metric: str) -> list[Result]:
    """The rows of an evaluation's metric that have a value."""
    rows = [row for row in content.evaluations if (row["eval"], row["metric"]) == (evaluation, metric)]
    return [row for row in rows if row["value"] is not None]
