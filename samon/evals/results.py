"""Results as rows, `{"model", "dataset", "split", "eval", "metric", "value", "num_samples", ...}`, and as a table."""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from samon.errors import UserError
from samon.files import csv_text, write_text
from samon.progress import metric_format

Row = dict[str, Any]
_SINGLE = ("checkpoint", "value", "low", "high", "clean_top1", "note")  # belong to one checkpoint
FORMATS = ("json", "csv", "md")


def result_format(path: str, wanted: str) -> str:
    """Of a results file: by its name, or as asked where the name does not tell; `timm` with what the name tells."""
    suffix = Path(path).suffix.removeprefix(".")
    if wanted == "timm":
        return "timm json" if suffix == "json" else "timm csv"
    form = suffix if suffix in FORMATS else wanted
    if not form:
        raise UserError(f"--results-file {path}: name it .json, .csv or .md, or give --results-format")
    return form


class Results:
    """The rows of a command by piece of work; the results file grows with every piece.

    Until all are there ``X.json.partial`` keeps them under the command's fingerprint, so that the same command goes
    on with what is missing; a finished command starts anew.
    """

    def __init__(self, path: str, wanted: str, command: str, group: bool = False) -> None:
        self.group = group
        self.path, self.command, self.pieces = Path(path) if path else None, command, dict[str, list[Row]]()
        self.form = result_format(path, wanted) if path else ""
        self.partial = self.path and self.path.with_name(f"{self.path.name}.partial")

    def load(self, overwrite: bool = False) -> dict[str, list[Row]]:
        """Rows that the same command found before it was stopped.

        Raises:
            UserError: the file holds finished results, or another command's, and `overwrite` is false.
        """
        if not self.path or not self.partial:
            return {}
        if self.partial.exists():
            content = json.loads(self.partial.read_text())
            if content["command"] == self.command:
                return content["pieces"]
        if not overwrite and (there := next((p for p in (self.path, self.partial) if p.exists()), None)):
            raise UserError(f"--results-file: {there} holds results; name another file, or --overwrite")
        return {}

    def write(self) -> None:
        """The pieces so far, each file whole or as it was."""
        if self.path and self.partial:
            write_text(self.partial, json.dumps({"command": self.command, "pieces": self.pieces}))
            write_text(self.path, render(self.rows, self.form))

    def finish(self) -> None:
        """All is there."""
        self.write()
        if self.partial:
            self.partial.unlink()

    @property
    def rows(self) -> list[Row]:
        """Every row so far, or with --group every mean over checkpoints."""
        single = [row for rows in self.pieces.values() for row in rows]
        return grouped(single) if self.group else single


def render(rows: list[Row], form: str) -> str:
    """The rows as the text of a file. Numbers that are not finite are written as nothing."""
    rows = [{**row, "value": row["value"] if math.isfinite(row["value"]) else None} for row in rows]
    if form.startswith("timm"):
        rows = as_timm(rows)
        if form == "timm json":
            return json.dumps(rows[0] if len(rows) == 1 else rows, indent=4) + "\n"
    if form == "json":
        return json.dumps(rows, indent=1) + "\n"
    if form == "md":
        return markdown(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return csv_text([keys, *([row.get(key) for key in keys] for row in rows)])


def as_timm(rows: list[Row]) -> list[Row]:
    """The columns of timm's results, a row for each model (or checkpoint, and data set where there are several)."""
    shared = ("model", "checkpoint", *(["dataset"] if len({row["dataset"] for row in rows}) > 1 else []))
    facts = ("param_count", "img_size", "crop_pct", "interpolation")
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        about = {key: row[key] for key in shared if key in row}
        line = found.setdefault(tuple(about.values()), about)
        if row["metric"] in ("top1", "top5") and row["metric"] not in line:
            value = row["value"]
            line |= {row["metric"]: round(value, 4), f"{row['metric']}_err": round(100 - value, 4)}
        line |= {key: row[key] for key in facts}
    order = ("model", "top1", "top1_err", "top5", "top5_err", *facts, *shared[1:])
    lines = [{key: line[key] for key in order if key in line} for line in found.values()]
    return sorted(lines, key=lambda line: -line["top1"])


def grouped(rows: list[Row]) -> list[Row]:
    """One row for the checkpoints of a model: the mean, ``std`` (with n - 1), and how many ``checkpoints``."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        shared = {key: value for key, value in row.items() if key not in _SINGLE}
        groups.setdefault(json.dumps(shared), []).append(row)
    found: list[Row] = []
    for key, members in groups.items():
        values = [row["value"] for row in members]
        std = statistics.stdev(values) if len(values) > 1 else None
        found.append(json.loads(key) | {"value": statistics.fmean(values), "std": std, "checkpoints": len(values)})
        if notes := [row["note"] for row in members if "note" in row]:
            found[-1]["note"] = f"of {len(notes)} of {len(values)} checkpoints, such as: {notes[0]}"
    return found


def line_of(row: Row) -> tuple[str, ...]:
    """What one line of the table is about: data set, evaluation with its setting, images, notes."""
    what = f"{row['eval']} {row.get('setting', '')}".strip()
    notes = "; ".join(row[key] for key in ("mismatch", "note", "preprocessing") if row.get(key))
    return row["dataset"], what, str(row["num_samples"]), notes


def markdown(rows: list[Row]) -> str:
    """A table in the manner of Table 4: data sets and attacks down, models across, each with its metrics."""
    every = [row for row in rows if row["eval"] != "norm_params" and "corruption" not in row]
    rows = every + [r for r in rows if r.get("layer") == "all" and r["metric"].endswith("_abs_mean")]
    columns = list(dict.fromkeys((name_of(row), short(row)) for row in rows))
    names = unique_tails(name for name, _ in columns)
    cells: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for row in rows:
        cells.setdefault(line_of(row), {})[name_of(row), short(row)] = _shown(row)
    head = ["data set", "evaluation", *(f"{m} ({names[n]})" if len(names) > 1 else m for n, m in columns), "n", "note"]
    lines = [head, ["---"] * len(head)]
    for (data, what, count, note), found in cells.items():
        lines.append([data, what, *(found.get(column, "") for column in columns), count, note])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def unique_tails(paths: Iterable[str]) -> dict[str, str]:
    """{path: its last directory and file, or as much of its end as sets it apart from the others}."""
    parts = {path: Path(path).parts for path in paths}

    def tail(path: str, length: int) -> str:
        return "/".join(parts[path][-length:])

    found = {}
    for path in parts:
        others = [other for other in parts if other != path]
        length = 2
        while length < len(parts[path]) and any(tail(path, length) == tail(other, length) for other in others):
            length += 1
        found[path] = tail(path, length)
    return found


def name_of(row: Row) -> str:
    return str(row.get("checkpoint") or row["model"])


def short(row: Row) -> str:
    """The table's column for a metric."""
    if row["eval"] in ("sharpness", "hessian", "feature_rank", "norm_params"):
        return "value"
    metric = str(row["metric"])
    names = {"top1": "top-1", "top5": "top-5", "robust_top1": "top-1", "ce": "mce"}
    return names.get(metric, metric.removeprefix("robust_top1_"))


def _shown(row: Row) -> str:
    if row["value"] is None:
        return ""
    form = metric_format(short(row))
    text = f"{row['value']:{form}}"
    if row.get("std") is not None:
        text += f" ± {row['std']:{form}}"
    return text + (f" [{row['low']:{form}}, {row['high']:{form}}]" if "low" in row else "")
