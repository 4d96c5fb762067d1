"""The tables of a page, as HTML, LaTeX (booktabs) and CSV."""

import html
import json
import math
from dataclasses import dataclass
from typing import Any

from samon.files import csv_text
from samon.report.content import Content, Score, differing, label
from samon.report.paper import paper_figures


@dataclass
class Table:
    """Cells are text; numbers are already rounded."""

    name: str
    title: str
    caption: str
    head: list[str]
    rows: list[list[str]]

    def csv(self) -> str:
        return csv_text([self.head, *(map(_harmless, row) for row in self.rows)])

    def latex(self) -> str:
        lines = [" & ".join(map(tex, row)) + r" \\" for row in [self.head, *self.rows]]
        columns = "l" * len(self.head)
        body = [lines[0], r"\midrule", *lines[1:]]
        return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}", ""])

    def html(self) -> str:
        def row(cells: list[str], kind: str) -> str:
            return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        return f"<table><thead>{row(self.head, 'th')}</thead><tbody>{body}</tbody></table>"


def _harmless(cell: str) -> str:
    """Spreadsheets run cells that begin like a formula; numbers stay as they are."""
    try:
        float(cell)
    except ValueError:
        return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell
    return cell


_NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater"}
_TEX = {c: rf"\{c}" for c in "&%$#_{}"} | {c: rf"\text{name}{{}}" for c, name in _NAMED.items()} | {"±": r"$\pm$"}


def tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


def tables(content: Content) -> list[Table]:
    """Those that have rows."""
    makers = (accuracies, costs, evaluations, settings, made)
    return [table for table in (make(content) for make in makers) if table.rows]


def shown(mean: float, std: float | None) -> str:
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def paper(score: Score) -> tuple[float, float] | None:
    """The paper's [mean, deviation] for this recipe, model and optimizer."""
    found = paper_figures(score.recipe, score.model).get(score.opt)
    if found is None or score.method != score.opt:
        return None
    return found[0], found[1] if len(found) > 1 else 0.0


def against(score: Score, theirs: tuple[float, float] | None) -> str:
    """Ours minus the paper's, and whether it lies outside two standard errors of the deviations together."""
    if theirs is None:
        return ""
    difference = score.mean - theirs[0]
    spread = 2 * math.hypot(score.std or 0.0, theirs[1])
    mark = "≈" if abs(difference) <= spread else "▲" if difference > 0 else "▼"
    return f"{mark} {difference:+.2f}"


def accuracies(content: Content) -> Table:
    best = content.best()
    rows = []
    for score in content.scores:
        theirs = paper(score)
        where = "chooses rho" if score.held_out else "best" if score in best else ""
        rho = "" if score.rho is None else f"{score.rho:g}"
        figures = [shown(score.mean, score.std), str(len(score.values))]
        beside = [shown(*theirs) if theirs else "", against(score, theirs)]
        rows.append([score.recipe, score.model, score.method, rho, *figures, where, *beside])
    head = ["recipe", "model", "method", "rho", "accuracy, %", "runs", "", "paper, %", "difference"]
    caption = "Mean ± standard deviation over seeds. ≈: within two standard deviations (both together) of the paper's "
    caption += "figure; ▲ above it, ▼ below it. The paper's figure is that of the recipe's full length."
    return Table("accuracy", "Accuracy", caption, *_filled(head, rows))


def costs(content: Content) -> Table:
    """Mean cost of a run of each method at its best rho, and over the first method's."""
    best = [score for score in content.best() if score.costs]
    units = {"flops": "training PFLOPs", "seconds": "seconds", "cpu_seconds": "CPU seconds"}
    rows = []
    for score in best:
        row = [score.recipe, score.model, score.method, shown(score.mean, score.std)]
        for cost in units:
            mean, first = average(score.costs.get(cost)), average(best[0].costs.get(cost))
            scaled = None if mean is None else mean / 1e15 if cost == "flops" else mean
            ratio = "" if mean is None or not first else f"{mean / first:.2f}"
            row += ["" if scaled is None else f"{scaled:.4g}", ratio]
        rows.append(row)
    head = ["recipe", "model", "method", "accuracy, %"]
    head += [name for unit in units.values() for name in (unit, f"{unit}, ratio")]
    caption = "Ratios are over the first row. FLOPs are counted exactly, forward and backward; times are as measured."
    return Table("cost", "Cost of a run", caption, *_filled(head, rows))


def average(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def evaluations(content: Content) -> Table:
    wanted = [r for r in content.evaluations if r["eval"] != "norm_params" or r.get("layer") == "all"]
    rows = []
    for r in wanted:
        value = "" if r["value"] is None else f"{r['value']:.5g}"
        what = f"{r['eval']} {r.get('setting', '')}".strip()
        rows.append([label(r), str(r["dataset"]), what, r["metric"], value, str(r["num_samples"])])
    head = ["model", "data", "evaluation", "metric", "value", "samples"]
    return Table("evaluations", "Evaluations", "Rows of validate.py.", *_filled(head, rows))


def settings(content: Content) -> Table:
    keys = differing(content.runs)
    rows = [[run.name, *(plain(run.settings.get(key)) for key in keys)] for run in content.runs] if keys else []
    return Table("settings", "Settings that differ", "The others are the same in all runs.", ["run", *keys], rows)


def made(content: Content) -> Table:
    rows = []
    for run in content.runs:
        machine = run.made.get("machine", {})
        cpu = f"{machine['processor']}, {machine['cores']} cores" if machine else ""
        where = "; ".join(filter(None, [cpu, *machine.get("gpus", []), machine.get("system", "")]))
        versions = ", ".join(f"{name} {number}" for name, number in run.made.get("versions", {}).items())
        rows.append([run.name, run.made.get("command") or "not recorded", versions, where])
    head = ["run", "command", "versions", "machine"]
    return Table("made", "How each run was made", "As train.py recorded it in run.json.", *_filled(head, rows))


def plain(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _filled(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns that are empty in every row."""
    keep = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return [head[i] for i in keep], [[row[i] for i in keep] for row in rows]
