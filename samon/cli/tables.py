"""The tables of samon-sweep: every optimizer and rho with mean +- std over seeds, and the paper's Table 1 layout."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from samon.files import csv_text, write_text
from samon.geometry import GEOMETRIES
from samon.progress import metric_format
from samon.registry import VARIANTS
from samon.report.paper import paper_figures
from samon.scope import SCOPES


@dataclass
class Cell:
    """The runs of one optimizer and rho."""

    opt: str
    rho: float | None
    values: list[float]
    cpu_seconds: list[float | None] = field(default_factory=list)  # processor time of each run; None if it was resumed
    metric: str = "eval_top1"

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation; 0 for one run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def merit(self) -> float:
        """The larger the better: the mean, negated for losses."""
        return -self.mean if "loss" in self.metric else self.mean

    def __str__(self) -> str:
        form = metric_format(self.metric)
        return f"{self.mean:{form}}" + (f"±{self.std:{form}}" if len(self.values) > 1 else "")


def best_by_opt(cells: list[Cell]) -> dict[str, Cell]:
    """For every optimizer the rho with the best mean."""
    best: dict[str, Cell] = {}
    for cell in cells:
        if cell.opt not in best or cell.merit > best[cell.opt].merit:
            best[cell.opt] = cell
    return best


def paper_results(recipe: str, model: str) -> dict[str, str]:
    """The paper's figures for this recipe and model by optimizer name, empty if it has none."""
    return {opt: "±".join(map(str, figures)) for opt, figures in paper_figures(recipe, model).items()}


def markdown(cells: list[Cell], paper: dict[str, str]) -> str:
    """Table 1's layout: variants down, what they perturb across; the better scope bold, the best of all underlined.

    Optimizers that perturb nothing stand in a column of their own, those with a mask under all parameters."""
    best = best_by_opt(cells)
    top = max(cell.merit for cell in best.values())
    rows: dict[str, dict[str, Cell]] = {}
    for opt, cell in best.items():
        variant = VARIANTS.get(opt)
        if variant is None or variant.mask:
            rows[opt] = {"sam" if variant else "": cell}
        else:
            base = "" if variant.base == "sgd" else f" ({variant.base})"
            rows.setdefault(GEOMETRIES[variant.geometry].label + base, {})[variant.scope] = cell
    labels = {"": "none"} | {name: scope.label for name, scope in SCOPES.items()}
    scopes = [scope for scope in labels if any(scope in row for row in rows.values())]
    header = ["variant", *(labels[s] for s in scopes), *(f"paper, {labels[s]}" for s in scopes if paper)]
    lines = [header, ["---"] * len(header)]
    for name, row in rows.items():
        line = [row.get(scope) for scope in scopes]
        highest = max(cell.merit for cell in row.values())
        theirs = [paper.get(cell.opt, "") if cell else "" for cell in line] if paper else []
        lines.append([name, *(show(cell, len(row) > 1, highest, top) for cell in line), *theirs])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(cell: Cell | None, compared: bool, highest: float, top: float) -> str:
    if cell is None:
        return ""
    text = str(cell)
    text = f"**{text}**" if compared and cell.merit == highest else text
    text = f"<u>{text}</u>" if cell.merit == top else text
    return text if cell.rho is None else f"{text} (rho {cell.rho:g})"


def write_tables(output: Path, cells: list[Cell], about: dict[str, Any]) -> str:
    """table.csv, table.json and table.md in the directory; returns the Markdown.

    about: `config`, `model`, `metric` and `train`, kept in table.json."""
    rows: list[dict[str, Any]] = [
        {"opt": c.opt, "rho": c.rho, "runs": len(c.values), "mean": c.mean, "std": c.std} | asdict(c) for c in cells
    ]
    columns = ["opt", "rho", "runs", "mean", "std"]
    write_text(output / "table.csv", csv_text([columns, *([row[name] for name in columns] for row in rows)]))
    paper = paper_results(Path(about["config"]).stem, about["model"])
    best = {opt: cell.rho for opt, cell in best_by_opt(cells).items()}
    write_text(output / "table.json", json.dumps({**about, "rows": rows, "best": best, "paper": paper}, indent=1))
    every = [["optimizer", "rho", about["metric"], "runs"], ["---"] * 4]
    every += [[c.opt, "" if c.rho is None else f"{c.rho:g}", str(c), str(len(c.values))] for c in cells]
    text = markdown(cells, paper) + "\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in every) + "\n"
    write_text(output / "table.md", text)
    return text
