"""The tables of a report, as HTML, LaTeX (booktabs) and CSV."""

import html
import json
import math
from dataclasses import dataclass

from samon.evals.results import model_label
from samon.files import csv_text
from samon.progress import metric_format, plural
from samon.report.content import Content, Score, differing_keys, paper_results
from samon.report.figures import COST_NAMES, mean_cost

_TEX_NAMES = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater"}
_TEX = {c: rf"\{c}" for c in "&%$#_{}"} | {c: rf"\text{name}{{}}" for c, name in _TEX_NAMES.items()} | {"±": r"$\pm$"}


@dataclass
class Table:
    """Cells are text. Columns that are empty in every row are left out."""

    name: str
    title: str
    caption: str
    head: list[str]
    rows: list[list[str]]

    def __post_init__(self) -> None:
        columns = [i for i in range(len(self.head)) if any(row[i] for row in self.rows)]
        self.head = [self.head[i] for i in columns]
        self.rows = [[row[i] for i in columns] for row in self.rows]

    def csv(self) -> str:
        return csv_text([self.head, *(map(_escape_formula, row) for row in self.rows)])

    def latex(self) -> str:
        cells = [["".join(_TEX.get(c, c) for c in cell) for cell in row] for row in [self.head, *self.rows]]
        head, *rows = (" & ".join(row) + r" \\" for row in cells)
        begin, end = rf"\begin{{tabular}}{{{'l' * len(self.head)}}}", r"\end{tabular}"
        return "\n".join([begin, r"\toprule", head, r"\midrule", *rows, r"\bottomrule", end, ""])

    def html(self) -> str:
        def row(cells: list[str], kind: str) -> str:
            return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        return f"<table><thead>{row(self.head, 'th')}</thead><tbody>{body}</tbody></table>"


def _escape_formula(cell: str) -> str:
    """Quote cells that a spreadsheet would run as a formula; numbers stay as they are."""
    try:
        float(cell)
    except ValueError:
        return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell
    return cell


def tables(content: Content) -> list[Table]:
    """The tables that have rows."""
    makers = (summary, accuracy, costs, evaluations, settings, origins)
    return [table for table in (make(content) for make in makers) if table.rows]


def summary(content: Content) -> Table:
    """For each setting, the best method of each base optimizer against that optimizer alone."""
    rows = []
    for setting in content.settings():
        best = content.of_setting(setting).best()
        pairs = [(score, content.baseline(score)) for score in best]
        for base in [score for score in best if score.opt.lower() == score.base]:
            others = [score for score, own in pairs if own is base and score is not base]
            if others:
                winner = max(others, key=lambda s: s.merit)
                rows.append([setting.title, *_comparison(content, winner, base, len(others))])
    head = ["setting", "compared", "difference", "best", "base optimizer", "cost of the best"]
    caption = (
        "The best of the compared methods at its best rho, its base optimizer, the difference with two standard errors "
        "where both have several seeds, and the best method's cost over the base optimizer's. The more methods are "
        "compared, the likelier the best of them is ahead by chance."
    )
    return Table("summary", "Summary", caption, head, rows)


def _comparison(content: Content, score: Score, base: Score, count: int) -> list[str]:
    """The cells of a row of `summary` after the first."""
    form, difference = metric_format(score.metric), score.mean - base.mean
    compared = f"{plural(count, 'method')} against {base.method}, {plural(score.num_seeds, 'seed')}"
    if score.std is None or base.std is None or 1 in (score.num_seeds, base.num_seeds):
        result = f"{difference:+{form}}; one seed is not enough to tell"
    else:
        error = 2 * math.hypot(score.std / len(score.values) ** 0.5, base.std / len(base.values) ** 0.5)
        ahead = score if score.merit > base.merit else base
        verdict = f"{ahead.method} ahead" if abs(difference) > error else "too close to call"
        result = f"{difference:+{form}} ± {error:{form}}: {verdict}"
    ratios = {COST_NAMES[cost]: content.cost_ratio(score, cost) for cost in ("flops", "cpu_seconds")}
    cost = ", ".join(f"{ratio:.2f} x the {name}" for name, ratio in ratios.items() if ratio is not None)
    rho = "" if score.rho is None else f", rho {score.rho:g}"
    return [compared, result, f"{score.method}{rho}: {score.text}", f"{base.method}: {base.text}", cost]


def accuracy(content: Content) -> Table:
    best, rows = content.best(), []
    for score in content.scores:
        paper = paper_results(score.recipe, score.model).get(score.opt)
        paper_cells = ["", ""]
        if paper is not None and score.method == score.opt and score.metric == "eval_top1":
            difference = score.mean - paper[0]
            close = abs(difference) <= 2 * math.hypot(score.std or 0.0, *paper[1:])
            sign = "≈" if close else "▲" if difference > 0 else "▼"
            paper_cells = [" ± ".join(f"{number:.2f}" for number in paper), f"{sign} {difference:+.2f}"]
        role = "chooses rho" if score.held_out else "best" if score in best else ""
        role += ", edge of the grid" * (role == "best" and _is_at_edge(score, content))
        rho = "" if score.rho is None else f"{score.rho:g}"
        row = [score.recipe, score.model, score.method, rho, _other_measure(score), score.text, str(len(score.values))]
        rows.append([*row, role, *paper_cells])
    head = ["recipe or data", "model", "method", "rho", "measure", "accuracy, %", "runs", "", "paper, %", "difference"]
    caption = (
        "Mean ± standard deviation over seeds. ≈: within two standard deviations (both together) of the paper's "
        "result; ▲ above it, ▼ below it. The paper's result is that of the recipe's full length."
    )
    return Table("accuracy", "Accuracy", caption, head, rows)


def _is_at_edge(score: Score, content: Content) -> bool:
    """Whether a score's rho is the smallest or the largest that was tried, so that one outside may be better."""
    own = score.recipe, score.model, score.method  # held-out images may have chosen it by another metric
    tried = {s.rho for s in content.scores if (s.recipe, s.model, s.method) == own and s.rho is not None}
    return len(tried) > 1 and score.rho in (min(tried), max(tried))


def _other_measure(score: Score) -> str:
    """What a score is, if not the accuracy after the last epoch."""
    return "" if score.metric == "eval_top1" else score.setting.measure


def costs(content: Content) -> Table:
    """Mean cost of a run of each method at its best rho, and its ratio to the base optimizer's."""
    rows = []
    for score in [score for score in content.best() if score.costs]:
        row = [score.recipe, score.model, score.method, _other_measure(score), score.text]
        for cost in COST_NAMES:
            ratio = content.cost_ratio(score, cost)
            row += [mean_cost(score, cost) if score.costs.get(cost) else "", "" if ratio is None else f"{ratio:.2f}"]
        rows.append(row)
    head = ["recipe or data", "model", "method", "measure", "accuracy, %"]
    head += [name for unit in COST_NAMES.values() for name in (unit, f"{unit}, ratio")]
    caption = (
        "Ratios are to the base optimizer of the same recipe and model. FLOPs are counted exactly, forward and "
        "backward; times are as measured."
    )
    return Table("cost", "Cost of a run", caption, head, rows)


def evaluations(content: Content) -> Table:
    rows = []
    for r in content.evaluations:
        if r["eval"] != "norm_params" or r.get("layer") == "all":
            value = "" if r["value"] is None else f"{r['value']:{metric_format(r['metric'])}}"
            kind = f"{r['eval']} {r.get('setting', '')}".strip()
            labels = [model_label(r), r["dataset"], r["split"], kind, r["metric"]]
            rows.append([*labels, value, str(r["num_samples"])])
    head = ["model", "data", "split", "evaluation", "metric", "value", "samples"]
    return Table("evaluations", "Evaluations", "Rows of validate.py.", head, rows)


def settings(content: Content) -> Table:
    """The settings in which the runs of a recipe and model differ, a row for each run."""
    rows = []
    for setting in content.settings():
        runs = content.of_setting(setting).runs
        keys = differing_keys(runs)
        for run in runs if keys else []:
            values = {key: value for key in keys if (value := run.settings.get(key)) is not None}
            own = [f"{key} {v if isinstance(v, str) else json.dumps(v)}" for key, v in values.items()]
            rows.append([setting.recipe, setting.model, run.name, ", ".join(own)])
    caption = "The other settings are the same in all runs of a recipe and model."
    return Table("settings", "Settings that differ", caption, ["recipe or data", "model", "run", "settings"], rows)


def origins(content: Content) -> Table:
    rows = []
    for run in content.runs:
        machine = run.origin.get("machine", {})
        cpu = f"{machine['processor']}, {machine['cores']} cores" if machine else ""
        where = "; ".join(filter(None, [cpu, *machine.get("gpus", []), machine.get("system", "")]))
        versions = ", ".join(f"{name} {number}" for name, number in run.origin.get("versions", {}).items())
        rows.append([run.name, run.origin.get("command") or "not recorded", versions, where])
    head = ["run", "command", "versions", "machine"]
    return Table("origin", "How each run was made", "As train.py recorded it in run.json.", head, rows)
