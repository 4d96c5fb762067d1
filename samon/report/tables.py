"""The tables of a page, as HTML, LaTeX (booktabs) and CSV."""

import html
import json
import math
from dataclasses import dataclass
from typing import Any

from samon.files import csv_text
from samon.progress import metric_format
from samon.report.content import Content, Score, differing, label
from samon.report.figures import COST_NAMES, absolute
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
    makers = (summary, accuracies, costs, evaluations, settings, made)
    return [table for table in (make(content) for make in makers) if table.rows]


def shown(score: Score) -> str:
    return with_std(score.mean, score.std, metric_format(score.metric))


def with_std(mean: float, std: float | None, form: str = ".2f") -> str:
    return f"{mean:{form}}" if std is None else f"{mean:{form}} ± {std:{form}}"


def paper(score: Score) -> tuple[float, float] | None:
    """The paper's [mean, deviation] for this recipe, model and optimizer."""
    found = paper_figures(score.recipe, score.model).get(score.opt)
    if found is None or score.method != score.opt or score.metric != "eval_top1":
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


def summary(content: Content) -> Table:
    """What was compared, who won by how much, at what cost: each setting's base optimizers and the best of the others
    on top of them."""
    rows = []
    for setting in content.settings():
        best = content.part(setting).best()
        pairs = [(score, content.base_of(score)) for score in best]
        for base in [score for score in best if score.opt.lower() == score.base]:
            others = [score for score, own in pairs if own is base and score is not base]
            if others:
                rows.append([setting.title, *_duel(content, max(others, key=lambda s: s.merit), base, len(others))])
    head = ["setting", "compared", "difference", "best", "base optimizer", "cost of the best"]
    caption = "The best of the compared methods at its best rho, its base optimizer, the difference with two standard "
    caption += "errors of it where both have several seeds, and the best method's cost over the base optimizer's. The "
    caption += "more methods are compared, the likelier the best of them is ahead by chance."
    return Table("summary", "Summary", caption, head, rows)


def _duel(content: Content, score: Score, base: Score, count: int) -> list[str]:
    """The cells of a row of `summary` behind the first."""
    form, difference = metric_format(score.metric), score.mean - base.mean
    seeds = f"{len(score.values)} seed{'s' * (len(score.values) > 1)}"
    compared = f"{count} method{'s' * (count > 1)} against {base.method}, {seeds}"
    if score.std is None or base.std is None:
        result = f"{difference:+{form}}; one seed does not tell"
    else:
        error = 2 * math.hypot(score.std / len(score.values) ** 0.5, base.std / len(base.values) ** 0.5)
        ahead = score if score.merit > base.merit else base
        verdict = f"{ahead.method} ahead" if abs(difference) > error else "too close to call"
        result = f"{difference:+{form}} ± {error:{form}}: {verdict}"
    ratios = {COST_NAMES[cost]: content.ratio(score, cost) for cost in ("flops", "cpu_seconds")}
    cost = ", ".join(f"{ratio:.2f} x the {name}" for name, ratio in ratios.items() if ratio is not None)
    rho = "" if score.rho is None else f", rho {score.rho:g}"
    names = [f"{score.method}{rho}: {shown(score)}", f"{base.method}: {shown(base)}"]
    return [compared, result, *names, cost]


def accuracies(content: Content) -> Table:
    best = content.best()
    rows = []
    for score in content.scores:
        theirs = paper(score)
        where = "chooses rho" if score.held_out else "best" if score in best else ""
        rho = "" if score.rho is None else f"{score.rho:g}"
        figures = [shown(score), str(len(score.values))]
        beside = [with_std(*theirs) if theirs else "", against(score, theirs)]
        rows.append([score.recipe, score.model, score.method, rho, *figures, where, *beside])
    head = ["recipe", "model", "method", "rho", "accuracy, %", "runs", "", "paper, %", "difference"]
    caption = "Mean ± standard deviation over seeds. ≈: within two standard deviations (both together) of the paper's "
    caption += "figure; ▲ above it, ▼ below it. The paper's figure is that of the recipe's full length."
    return Table("accuracy", "Accuracy", caption, *_filled(head, rows))


def costs(content: Content) -> Table:
    """Mean cost of a run of each method at its best rho, and its ratio to the base optimizer's."""
    rows = []
    for score in [score for score in content.best() if score.costs]:
        row = [score.recipe, score.model, score.method, shown(score)]
        for cost in COST_NAMES:
            ratio = content.ratio(score, cost)
            row += [absolute(score, cost) if score.costs.get(cost) else "", "" if ratio is None else f"{ratio:.2f}"]
        rows.append(row)
    head = ["recipe", "model", "method", "accuracy, %"]
    head += [name for unit in COST_NAMES.values() for name in (unit, f"{unit}, ratio")]
    caption = "Ratios are to the base optimizer of the same recipe and model. FLOPs are counted exactly, forward and "
    caption += "backward; times are as measured."
    return Table("cost", "Cost of a run", caption, *_filled(head, rows))


def evaluations(content: Content) -> Table:
    wanted = [r for r in content.evaluations if r["eval"] != "norm_params" or r.get("layer") == "all"]
    rows = []
    for r in wanted:
        value = "" if r["value"] is None else f"{r['value']:{metric_format(r['metric'])}}"
        what = f"{r['eval']} {r.get('setting', '')}".strip()
        rows.append([label(r), str(r["dataset"]), what, r["metric"], value, str(r["num_samples"])])
    head = ["model", "data", "evaluation", "metric", "value", "samples"]
    return Table("evaluations", "Evaluations", "Rows of validate.py.", *_filled(head, rows))


def settings(content: Content) -> Table:
    """A row for each run: what sets it apart from the others of its recipe and model."""
    rows = []
    for setting in content.settings():
        runs = content.part(setting).runs
        keys = differing(runs)
        for run in runs if keys else []:
            own = [f"{key} {plain(run.settings[key])}" for key in keys if run.settings.get(key) is not None]
            rows.append([setting.recipe, setting.model, run.name, ", ".join(own)])
    caption = "The other settings are the same in all runs of a recipe and model."
    head = ["recipe", "model", "run", "settings"]
    return Table("settings", "Settings that differ", caption, *_filled(head, rows))


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
