"""Results as rows, `{"model", "dataset", "split", "eval", "metric", "value", "num_samples", ...}`, and as a table."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from samon.errors import UserError

Row = dict[str, Any]
FORMATS = ("json", "csv", "md")


def result_format(path: str, wanted: str) -> str:
    """Of a results file: by its name, or as asked where the name does not tell."""
    suffix = Path(path).suffix.removeprefix(".")
    if suffix in FORMATS:
        return suffix
    if wanted:
        return wanted
    raise UserError(f"--results-file {path}: name it .json, .csv or .md, or give --results-format")


def render(rows: list[Row], form: str) -> str:
    """The rows as the text of a file. Numbers that are not finite are written as nothing."""
    rows = [{**row, "value": row["value"] if math.isfinite(row["value"]) else None} for row in rows]
    if form == "json":
        return json.dumps(rows, indent=1) + "\n"
    if form == "md":
        return markdown(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def line_of(row: Row) -> tuple[str, ...]:
    """What one line of the table is about: data set, evaluation with its setting, images, notes."""
    what = f"{row['eval']} {row.get('setting', '')}".strip()
    return row["dataset"], what, str(row["num_samples"]), row.get("mismatch", "")


def markdown(rows: list[Row]) -> str:
    """A table in the manner of Table 4: data sets and attacks down, models across, each with its metrics."""
    every = [row for row in rows if row["eval"] != "norm_params"]
    rows = every + [r for r in rows if r.get("layer") == "all" and r["metric"].endswith("_abs_mean")]
    columns = list(dict.fromkeys((name_of(row), short(row)) for row in rows))
    many = len({name for name, _ in columns}) > 1
    cells: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for row in rows:
        cells.setdefault(line_of(row), {})[name_of(row), short(row)] = _shown(row)
    head = ["data set", "evaluation", *(f"{m} ({n})" if many else m for n, m in columns), "n", "note"]
    lines = [head, ["---"] * len(head)]
    for (data, what, count, note), found in cells.items():
        lines.append([data, what, *(found.get(column, "") for column in columns), count, note])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def name_of(row: Row) -> str:
    return str(row.get("checkpoint") or row["model"])


def short(row: Row) -> str:
    """The table's column for a metric."""
    if row["eval"] in ("sharpness", "feature_rank", "norm_params"):
        return "value"
    metric = str(row["metric"])
    names = {"top1": "top-1", "top5": "top-5", "robust_top1": "top-1"}
    return names.get(metric, metric.removeprefix("robust_top1_"))


def _shown(row: Row) -> str:
    if row["value"] is None:
        return ""
    return f"{row['value']:.2f}" if short(row) in ("top-1", "top-5") else f"{row['value']:.4g}"
