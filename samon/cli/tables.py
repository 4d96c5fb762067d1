"""Tables of samon-sweep: mean and deviation over seeds for every optimizer and rho, and the layout of Table 1."""

from pathlib import Path

from samon.files import csv_text, markdown_table, write_text
from samon.geometry import GEOMETRIES
from samon.registry import variant_of
from samon.report.content import Content, Score, export, paper_results
from samon.scope import SCOPES


def scope_table(scores: list[Score], paper: dict[str, str]) -> str:
    """Table 1's layout: a row per variant, a column per scope; the better scope bold, the best of all underlined.

    Optimizers that perturb nothing have their own column; those with a mask are listed under all parameters.

    Args:
        paper: the paper's results by optimizer name, shown in columns of their own.
    """
    rows: dict[str, dict[str, Score]] = {}
    for score in Content(scores=scores).best():
        variant = variant_of(score.opt)
        if variant is None or variant.mask:
            rows[score.opt] = {"sam" if variant else "": score}
        else:
            name = GEOMETRIES[variant.geometry].label + ("" if score.base == "sgd" else f" ({score.base})")
            if variant.scope in rows.get(name, {}):  # samon with base_opt=adamw beside samon-adamw
                name = score.opt
            rows.setdefault(name, {})[variant.scope] = score
    labels = {"": "none"} | {name: scope.label for name, scope in SCOPES.items()}
    scopes = [scope for scope in labels if any(scope in row for row in rows.values())]
    lines = [["variant", *(labels[s] for s in scopes), *(f"paper, {labels[s]}" for s in scopes if paper)]]
    top = max(score.merit for score in scores)
    for name, row in rows.items():
        cells, row_top = dict.fromkeys(scopes, ""), max(score.merit for score in row.values())
        for scope, score in row.items():
            text = f"**{score.text}**" if len(row) > 1 and score.merit == row_top else score.text
            text = f"<u>{text}</u>" if score.merit == top else text
            cells[scope] = text if score.rho is None else f"{text} (rho {score.rho:g})"
        results = [paper.get(row[scope].opt, "") if scope in row else "" for scope in scopes if paper]
        lines.append([name, *cells.values(), *results])
    return markdown_table(lines)


def write_tables(output: Path, scores: list[Score]) -> str:
    """Write table.csv, table.json (an export of samon-report) and table.md; returns the Markdown."""
    paper = {opt: "±".join(map(str, row)) for opt, row in paper_results(scores[0].recipe, scores[0].model).items()}
    export(Content(scores=scores), output / "table.json")
    rows = [(s.opt, s.rho, len(s.values), s.mean, s.std or 0.0) for s in scores]
    write_text(output / "table.csv", csv_text([("opt", "rho", "runs", "mean", "std"), *rows]))
    lines = [["optimizer", "rho", scores[0].metric, "runs"]]
    lines += [[s.opt, "" if s.rho is None else f"{s.rho:g}", s.text, str(len(s.values))] for s in scores]
    text = scope_table(scores, paper) + "\n\n" + markdown_table(lines) + "\n"
    write_text(output / "table.md", text)
    return text
