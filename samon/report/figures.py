"""The figures of a page as Plotly's JSON; which of the paper's they answer to stands in the caption."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from samon.report.content import Content, Run, label

# Okabe and Ito's palette, without its yellow and black, which vanish on a white or a dark page.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot")
Trace = dict[str, Any]


@dataclass
class Figure:
    name: str
    title: str
    caption: str
    traces: list[Trace]
    x: dict[str, Any]  # Plotly's axes
    y: dict[str, Any]


def plain(text: str) -> str:
    """Plotly reads `<b>` and `&amp;` in names as markup: this is what shows the text as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class Style:
    """A method looks the same in every figure; colour is never alone, symbol and dash go with it."""

    def __init__(self, methods: list[str]) -> None:
        self.order = {method: i for i, method in enumerate(methods)}

    def trace(self, method: str, x: list[Any], y: list[Any], **more: Any) -> Trace:
        i = self.order[method]
        colour = COLOURS[i % len(COLOURS)]
        line = {"color": colour, "dash": DASHES[i // len(COLOURS) % len(DASHES)], "width": 2}
        marker = {"color": colour, "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 8}
        looks = {"type": "scatter", "mode": "lines+markers", "line": line, "marker": marker}
        return {**looks, "name": plain(method), "legendgroup": str(i), "x": x, "y": y, **more}


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def figures(content: Content) -> list[Figure]:
    """Those that have something to show."""
    style = Style(content.methods())
    found = [*compared(content, style), *curves(content, style), *inside(content, style)]
    found += [distribution(content, style, kind) for kind in ("gamma", "beta")]
    found += [*sharpness(content, style), *robustness(content, style)]
    return [figure for figure in found if figure.traces]


def compared(content: Content, style: Style) -> list[Figure]:
    """Accuracy against cost and rho: only runs of one recipe and model share a figure."""
    settings = list(dict.fromkeys((score.recipe, score.model) for score in content.scores))
    found = []
    for i, setting in enumerate(settings):
        part = Content(scores=[score for score in content.scores if (score.recipe, score.model) == setting])
        drawn = [cost(part, style, kind) for kind in ("cpu_seconds", "seconds", "flops")] + [rho(part, style)]
        if len(settings) > 1:
            where = ", ".join(filter(None, setting)) or "recipe not known"
            drawn = [replace(f, name=f"{f.name}-{i}", title=f"{f.title}: {where}") for f in drawn]
        found += drawn
    return found


def errors(values: list[float | None]) -> dict[str, Any]:
    return {"type": "data", "array": [value or 0.0 for value in values], "visible": any(values)}


def cost(content: Content, style: Style, kind: str) -> Figure:
    """Figure 3: a point for each method at its best rho, bars of a standard deviation both ways."""
    names = {"cpu_seconds": "CPU time of a run, s", "seconds": "time of a run, s", "flops": "training PFLOPs of a run"}
    unit = 1e15 if kind == "flops" else 1.0
    found = [(score, [value / unit for value in score.costs[kind]]) for score in content.best() if kind in score.costs]
    reach = [statistics.fmean(values) for _, values in found]
    traces = []
    for (score, values), x in zip(found, reach, strict=True):
        spread = statistics.stdev(values) if len(values) > 1 and kind != "flops" else None
        side = "top left" if x > (min(reach) + max(reach)) / 2 else "top right"  # names stay inside the figure
        looks = {"mode": "markers+text", "text": [plain(score.method)], "textposition": side}
        bars = {"error_x": errors([spread]), "error_y": errors([score.std])}
        traces.append(style.trace(score.method, [x], [score.mean], **looks, **bars))
    held_out = any(score.held_out for score in content.scores)
    where = "held-out images" if held_out else "these images themselves"
    caption = f"Each method at its best rho (rho chosen on {where}); bars: a standard deviation over seeds. "
    caption += "Compare the paper's Figure 3."
    axes = axis(names[kind]), axis("accuracy, %")
    return Figure(f"cost-{kind}", f"Accuracy against {names[kind]}", caption, traces, *axes)


def rho(content: Content, style: Style) -> Figure:
    """Figures 1, 6 and 7. Where some images were held out to choose rho, those."""
    held_out = any(score.held_out for score in content.scores)
    rows = defaultdict(list)
    for score in content.scores:
        if score.rho is not None and score.held_out == held_out:
            rows[score.method].append((score.rho, score.values))
    traces = [means(method, points, style) for method, points in rows.items()]
    reach = sorted({rho for points in rows.values() for rho, _ in points if rho})
    for score in content.scores:
        if score.rho is None and score.held_out == held_out and len(reach) > 1:
            level = [score.mean, score.mean]
            traces.append(style.trace(score.method, [reach[0], reach[-1]], level, mode="lines"))
    where = "held-out images" if held_out else "the evaluated images"
    caption = f"Accuracy on {where}, mean and standard deviation over seeds. Compare the paper's Figures 1, 6 and 7."
    return Figure("rho", "Accuracy against rho", caption, traces, axis("rho", type="log"), axis("accuracy, %"))


def means(method: str, points: list[tuple[float, list[float]]], style: Style) -> Trace:
    """The mean at each place, in order, with its standard deviation as a bar."""
    points = sorted(points, key=lambda point: point[0])
    bars = errors([statistics.stdev(values) if len(values) > 1 else None for _, values in points])
    return style.trace(method, [x for x, _ in points], [statistics.fmean(v) for _, v in points], error_y=bars)


def curves(content: Content, style: Style) -> list[Figure]:
    """A line for each run."""
    found = []
    for key, title in (("eval_top1", "accuracy, %"), ("eval_loss", "evaluation loss"), ("train_loss", "training loss")):
        lines = []
        for run in content.runs:
            points = [(row["epoch"], row[key]) for row in run.epochs if row.get(key) is not None]
            lines.append((run.method, run.name, points))
        traces = lines_of(lines, style)
        caption = "A line for each run; runs of a method share colour and symbol. Click the legend to hide one."
        found.append(Figure(f"curve-{key}", title.capitalize(), caption, traces, axis("epoch"), axis(title)))
    return found


def inside(content: Content, style: Style) -> list[Figure]:
    """What the steps saw: TensorBoard's scalars."""
    kinds = {
        "train/sharpness": ("Sharpness during training", "L(w + eps) - L(w)"),
        "train/grad_norm": ("Gradient norm during training", "gradient norm"),
        "train/ascent_grad_norm": ("Ascent gradient norm during training", "ascent gradient norm"),
    }
    caption = "Means between two log lines, a line for each run. The ascent gradient is the perturbed parameters' at w."
    found = []
    for tag, (title, name) in kinds.items():
        lines = [(run.method, run.name, run.scalars.get(tag, [])) for run in content.runs]
        traces = lines_of(lines, style, mode="lines")
        found.append(Figure(tag.replace("/", "-"), title, caption, traces, axis("update"), axis(name)))
    return found


def lines_of(lines: Iterable[tuple[str, str, Sequence[Any]]], style: Style, **more: Any) -> list[Trace]:
    """One trace for each (method, name, points [x, y]), one legend entry for each method."""
    traces: list[Trace] = []
    for method, name, points in lines:
        if points:
            first = all(trace["name"] != plain(method) for trace in traces)
            x, y = ([point[i] for point in points] for i in (0, 1))
            traces.append(style.trace(method, x, y, text=plain(name), showlegend=first, **more))
    return traces


def distribution(content: Content, style: Style, kind: str) -> Figure:
    """Figures 5 and 9: of the first run of each method."""
    first: dict[str, Run] = {}
    for run in content.runs:
        if run.norms.get(kind):
            first.setdefault(run.method, run)
    traces = []
    for method, run in first.items():
        x, y = [value for value, _ in run.norms[kind]], [100 * share for _, share in run.norms[kind]]
        traces.append(style.trace(method, x, y, mode="lines", text=plain(run.name)))
        traces[-1]["line"] |= {"shape": "hvh"}
    caption = f"All layers' {kind} after training, of each method's first run. Compare the paper's Figures 5 and 9."
    title = f"Distribution of {kind}"
    return Figure(f"norms-{kind}", title, caption, traces, axis(kind), axis("share of the parameters, %"))


def sharpness(content: Content, style: Style) -> list[Figure]:
    """Table 6: a figure for each measure, a point for each evaluated model."""
    top1 = {row["checkpoint"]: row["value"] for row in _rows(content, "accuracy", "top1") if "checkpoint" in row}
    measures = defaultdict(list)
    for row in content.evaluations:
        if row["eval"] == "sharpness" and row["value"] is not None and row.get("checkpoint") in top1:
            point = (row["value"], top1[row["checkpoint"]])
            measures[str(row.get("setting", row["metric"]))].append((label(row), row["checkpoint"], [point]))
    caption = "A point for each evaluated model. Compare the paper's Table 6."
    drawn = []
    for i, (name, points) in enumerate(measures.items()):
        traces, title = lines_of(points, style, mode="markers"), f"Accuracy against sharpness: {name}"
        drawn.append(Figure(f"sharpness-{i}", title, caption, traces, axis(name), axis("accuracy, %")))
    return drawn


def robustness(content: Content, style: Style) -> list[Figure]:
    """Tables 14 and 15 as curves, one figure for each norm; radius 0 is the clean accuracy. Means over seeds."""
    clean: dict[str, list[float]] = defaultdict(list)
    for row in _rows(content, "accuracy", "top1"):
        clean[label(row)].append(row["value"])
    found: dict[str, dict[str, dict[float, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in _rows(content, "apgd", "robust_top1"):
        found[row["norm"]][label(row)][float(row["eps"])].append(row["value"])
    drawn = []
    for i, (norm, models) in enumerate(found.items()):
        traces = []
        for name, values in models.items():
            points = ({0.0: clean[name]} if name in clean else {}) | values
            traces.append(means(name, list(points.items()), style))
        caption = "Accuracy under APGD-CE and APGD-T, mean and deviation over the evaluated models of a method. "
        caption += "Compare the paper's Tables 14 and 15."
        axes = axis(f"{norm} radius"), axis("accuracy, %")
        drawn.append(Figure(f"robust-{i}", f"Robust accuracy against the {norm} radius", caption, traces, *axes))
    return drawn


def _rows(content: Content, evaluation: str, metric: str) -> list[dict[str, Any]]:
    """The rows of an evaluation's metric that have a value."""
    rows = [row for row in content.evaluations if row["eval"] == evaluation and row["metric"] == metric]
    return [row for row in rows if row["value"] is not None]
