"""Results, `{"model", "dataset", "split", "eval", "metric", "value", "num_samples", ...}`, in a file and as a table."""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from samon.errors import UserError
from samon.evals import EVALS
from samon.files import csv_text, markdown_table, write_text
from samon.progress import metric_format

Result = dict[str, Any]  # a row: columns differ by evaluation
FORMATS = ("json", "csv", "md")
_PER_CHECKPOINT = ("checkpoint", "value", "low", "high", "clean_top1", "note")
_HEADINGS = {"top1": "top-1", "top5": "top-5", "robust_top1": "top-1", "ce": "mce"}


class ResultsFile:
    """The results of a command by task; its file is rewritten after every task.

    Until the command is done, `NAME.partial` holds the results and the hash of the command, so that the same command
    resumes with the missing tasks.

    Args:
        path: file to write; empty for none.
        results_format: --results-format.
        command: hash of the command's settings.
        group: write the mean over checkpoints instead of a result per checkpoint.
    """

    def __init__(self, path: str, results_format: str, command: str, group: bool = False) -> None:
        self.path, self.command, self.group = Path(path) if path else None, command, group
        self.tasks: dict[str, list[Result]] = {}
        if not self.path:
            return
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        suffix = self.path.suffix.removeprefix(".")
        if results_format == "timm":
            self.format = "timm json" if suffix == "json" else "timm csv"
        else:
            self.format = suffix if suffix in FORMATS else results_format
        if not self.format:
            raise UserError(f"--results-file {path}: name it .json, .csv or .md, or give --results-format")
        if results_format not in ("", "timm", self.format):
            raise UserError(f"--results-file {path} contradicts --results-format {results_format}; drop one of them")

    def load(self, overwrite: bool = False) -> dict[str, list[Result]]:
        """Results of an interrupted run of the same command, by task; raise UserError if the file holds complete
        ones, or another command's, and `overwrite` is false."""
        if not self.path:
            return {}
        if self.partial.exists():
            content = json.loads(self.partial.read_text())
            if content["command"] == self.command:
                return content["tasks"]
        for path in (self.path, self.partial):
            if path.exists() and not overwrite:
                raise UserError(f"--results-file: {path} holds results; name another file, or --overwrite")
        return {}

    def write(self) -> None:
        """Write the results so far."""
        if self.path:
            write_text(self.partial, json.dumps({"command": self.command, "tasks": self.tasks}))
            write_text(self.path, render(self.results, self.format))

    def finish(self) -> None:
        """Write all results, and remove the partial file."""
        self.write()
        if self.path:
            self.partial.unlink()

    @property
    def results(self) -> list[Result]:
        """All results so far, or their means over checkpoints."""
        results = [result for task in self.tasks.values() for result in task]
        return mean_over_checkpoints(results) if self.group else results


def render(results: list[Result], results_format: str) -> str:
    """Content of a results file: json, csv, md, or timm's columns as `timm json` or `timm csv`.

    Numbers that are not finite become null, as JSON has none.
    """
    results = [{key: _finite(value) for key, value in result.items()} for result in results]
    if results_format == "md":
        return markdown(results)
    if results_format.startswith("timm"):
        results = timm_rows(results)
    if results_format == "timm json":
        return json.dumps(results[0] if len(results) == 1 else results, indent=4) + "\n"
    if results_format == "json":
        return json.dumps(results, indent=1) + "\n"
    keys = list(dict.fromkeys(key for result in results for key in result))
    return csv_text([keys, *([result.get(key) for key in keys] for result in results)])


def timm_rows(results: list[Result]) -> list[Result]:
    """timm's columns, a row per model (and checkpoint, and data set if there are several), the best first."""
    several = len({result["dataset"] for result in results}) > 1
    id_columns = ("model", "checkpoint", *(["dataset"] if several else []))
    model_columns = ("param_count", "img_size", "crop_pct", "interpolation")
    rows: dict[tuple[str, ...], Result] = {}
    for result in results:
        ids = {key: result[key] for key in id_columns if key in result}
        row = rows.setdefault(tuple(ids.values()), ids)
        if result["metric"] in ("top1", "top5") and result["metric"] not in row:
            value = result["value"]
            row |= {result["metric"]: round(value, 4), f"{result['metric']}_err": round(100 - value, 4)}
        row |= {key: result[key] for key in model_columns}
    order = ("model", "top1", "top1_err", "top5", "top5_err", *model_columns, *id_columns[1:])
    ordered = [{key: row[key] for key in order if key in row} for row in rows.values()]
    return sorted(ordered, key=lambda row: -row["top1"])


def mean_over_checkpoints(results: list[Result]) -> list[Result]:
    """Mean over the checkpoints of a model, standard deviation `std` (n - 1) and number of `checkpoints`."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        shared = {key: value for key, value in result.items() if key not in _PER_CHECKPOINT}
        groups.setdefault(json.dumps(shared), []).append(result)
    means: list[Result] = []
    for key, members in groups.items():
        values = [result["value"] for result in members]
        std = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
        means.append(json.loads(key) | {"value": statistics.fmean(values), "std": std, "checkpoints": len(values)})
        if notes := [result["note"] for result in members if "note" in result]:
            means[-1]["note"] = f"{len(notes)} of {len(values)} checkpoints, such as: {notes[0]}"
    return means


def markdown(results: list[Result]) -> str:
    """A table like the paper's Table 4: data sets and attacks down, models across, each with its metrics."""
    shown = [row for row in results if row["eval"] != "norm_params" and "corruption" not in row]
    shown += [row for row in results if row.get("layer") == "all" and row["metric"].endswith("_abs_mean")]
    columns = list(dict.fromkeys((model_label(row), _heading(row)) for row in shown))
    names = shorten_paths(model for model, _ in columns)
    lines: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for row in shown:
        what = f"{row['eval']} {row.get('setting', '')}".strip()
        notes = "; ".join(row[key] for key in ("mismatch", "note", "preprocessing") if row.get(key))
        cells = lines.setdefault((row["dataset"], row["split"], what, str(row["num_samples"]), notes), {})
        cells[model_label(row), _heading(row)] = _format_value(row)
    metrics = [f"{metric} ({names[model]})" if len(names) > 1 else metric for model, metric in columns]
    table = [["data set", "split", "evaluation", *metrics, "n", "note"]]
    for (*labels, count, notes), cells in lines.items():
        table.append([*labels, *(cells.get(column, "") for column in columns), count, notes])
    return markdown_table(table) + "\n"


def shorten_paths(paths: Iterable[str]) -> dict[str, str]:
    """The last two parts of each path, or as many as distinguish all paths, by path."""
    parts, length = {path: Path(path).parts for path in paths}, 2
    while len({p[-length:] for p in parts.values()}) < len(set(parts.values())):
        length += 1
    return {path: "/".join(p[-length:]) for path, p in parts.items()}


def file_stem(*names: str) -> str:
    """Part of a file's name from names of models and data sets, which may contain slashes."""
    return "-".join(filter(None, names)).replace("/", "_")


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def model_label(result: Result) -> str:
    """The name of an evaluated model: its run's method, its checkpoint, or the model; EMA for averaged weights."""
    return str(result.get("method") or result.get("checkpoint") or result["model"]) + " EMA" * result.get("ema", False)


def _heading(result: Result) -> str:
    """The table's column of a result."""
    metric = str(result["metric"])
    column = EVALS[result["eval"]].column
    return column or _HEADINGS.get(metric, metric.removeprefix("robust_top1_"))


def _format_value(result: Result) -> str:
    if result["value"] is None:
        return ""
    spec = metric_format(result["metric"])
    text = f"{result['value']:{spec}}"
    if result.get("std") is not None:
        text += f" ± {result['std']:{spec}}"
    return text + (f" [{result['low']:{spec}}, {result['high']:{spec}}]" if "low" in result else "")
