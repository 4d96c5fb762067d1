"""Read runs, sweeps, results of validate.py and exports."""

import argparse
import json
import logging
import math
import shlex
from collections import defaultdict
from pathlib import Path

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, HistogramValue

from samon.errors import UserError
from samon.report.content import Content, Json, Points, Run, load, name_methods, score_runs, with_defaults
from samon.trainer.logging import summary_rows

TAGS = ("train/sharpness", "train/grad_norm", "train/ascent_grad_norm")
MAX_POINTS = 150  # per curve
BINS = 40
LOCATION_FLAGS = ("output", "experiment", "resume")
EPOCH_COLUMNS = ("epoch", "train_loss", "eval_loss", "eval_top1")


def read_sources(paths: list[Path]) -> Content:
    """Everything in the given runs, sweeps and files; raise UserError for a path that holds nothing to report."""
    content = Content()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; name a run, a sweep's directory or a results file")
        source = read_directory(path) if path.is_dir() else read_file(path)
        if source == Content():
            raise UserError(f"{path} holds no run (args.yaml, summary.csv), table of a sweep or results of validate.py")
        content.add(source)
    # Sources may overlap, such as a sweep and one of its runs.
    content.runs = [*{run.folder or id(run): run for run in content.runs}.values()]
    content.evaluations = [*{json.dumps(row): row for row in content.evaluations}.values()]
    unnamed = [run for run in content.runs if not run.method]  # those of exports have names
    name_methods(unnamed)
    content.scores += score_runs(unnamed)
    for row in content.evaluations:  # a checkpoint in the directory of a reported run belongs to that run
        if "checkpoint" in row and "method" not in row:
            parent = Path(row["checkpoint"]).parent  # a relative one may have been named from another directory
            runs = [r for r in content.runs if parent.resolve() == r.folder or f"{r.folder}".endswith(f"/{parent}")]
            row |= {"method": runs[0].method} if len(runs) == 1 else {}
    return content


def read_directory(path: Path) -> Content:
    """The results of an experiment, or else the runs at any depth and the result files in the directory itself."""
    content, experiment = Content(), path / "results.json"
    if experiment.exists() and "format" in _json(experiment):
        return read_file(experiment)
    for results in sorted(path.glob("*.json")):
        if results.name not in ("run.json", "result.json"):
            content.add(read_file(results))
    content.runs = [read_run(settings.parent, path) for settings in sorted(path.rglob("args.yaml"))]
    if content.runs:
        content.scores = []  # a sweep's table.json repeats the results of its runs
    return content


def read_file(path: Path) -> Content:
    """The content of a JSON file, whose kind its keys tell; empty for other kinds."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if isinstance(data, dict) and "format" in data:
        return load(data, path)
    if isinstance(data, list) and data and all(isinstance(row, dict) for row in data) and "eval" in data[0]:
        return Content(evaluations=data)
    return Content()


def read_run(folder: Path, root: Path) -> Run:
    """The run in a directory, named by its path below `root`."""
    name = folder.name if folder == root else str(folder.relative_to(root))
    settings = with_defaults(yaml.safe_load((folder / "args.yaml").read_text()) or {})
    settings = {"opt": "unknown optimizer"} | {k: v for k, v in settings.items() if k not in LOCATION_FLAGS}
    record = _json(folder / "run.json")
    settings |= {"processes": record["processes"]} if "processes" in record else {}
    rows = summary_rows(folder / "summary.csv")
    epochs = [{key: float(value) if value else None for key, value in row.items()} for row in rows]
    curves = [{key: row[key] for key in EPOCH_COLUMNS if key in row} for row in epochs]
    run = Run(name, settings, curves, folder=folder.resolve())
    run.metrics = record.get("metrics", {})
    if epochs and run.metrics.get("epoch", epochs[-1]["epoch"]) != epochs[-1]["epoch"]:
        run.metrics = {}  # those before the run was extended
    planned = settings.get("epochs", math.inf) + settings.get("cooldown_epochs", 0)
    if not run.metrics and epochs and (epochs[-1]["epoch"] or 0) + 1 >= planned:
        run.metrics = dict(epochs[-1])
    _read_events(folder / "tb", run)
    if not record.get("resumed"):  # a resumed run took longer than was measured
        times = record | _json(folder / "result.json")  # a sweep measures the processor time of all processes
        run.cost |= {key: times[key] for key in ("cpu_seconds", "seconds") if key in times}
    if (flops := record.get("step_flops")) and record["micro_batches"]:
        run.cost["flops"] = flops["step"] * record["micro_batches"] * record["processes"]
    run.origin = {key: record[key] for key in ("command", "versions", "machine") if key in record}
    if "command" in run.origin:
        run.origin["command"] = _without_location(run.origin["command"])
    scores = _json(folder.parent / "table.json").get("scores", [])  # of the sweep that an unfinished run belongs to
    run.origin["recipe"] = Path(record.get("recipe") or next((score["recipe"] for score in scores), "")).stem
    return run


def _without_location(command: str) -> str:
    """A command without the flags that say where it writes, which change no result."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for key in LOCATION_FLAGS:
        parser.add_argument(f"--{key}", nargs="?")
    return shlex.join(parser.parse_known_args(shlex.split(command))[1])


def _json(path: Path) -> Json:
    return json.loads(path.read_text()) if path.exists() else {}


def _read_events(folder: Path, run: Run) -> None:
    """Add the scalars during training and the last distributions of gamma and beta."""
    if not folder.is_dir():
        return
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 1, "images": 1})
    events.Reload()
    scalars, histograms = events.Tags()["scalars"], events.Tags()["histograms"]
    for tag in [tag for tag in TAGS if tag in scalars]:
        points = _points(events, tag)
        run.scalars[tag] = points[:: max(1, len(points) // MAX_POINTS)]
    layers: dict[str, list[HistogramValue]] = defaultdict(list)
    for tag in histograms:
        layers[tag.split("/")[0]].append(events.Histograms(tag)[-1].histogram_value)
    run.norms = {kind: _pooled(layers[kind]) for kind in ("gamma", "beta") if kind in layers}


def _points(events: EventAccumulator, tag: str) -> Points:
    """[[update, value], ...] of a scalar, without what a run that went back to a checkpoint has computed again."""
    points: Points = []
    for event in events.Scalars(tag):
        while points and points[-1][0] >= event.step:
            points.pop()
        points.append([event.step, event.value])
    return points


def _pooled(histograms: list[HistogramValue]) -> Points:
    """[[center of a bin, share of all parameters in it], ...] of all layers together."""
    middles, counts = [], []
    for h in histograms:  # TensorBoard's first bucket begins, and its last one ends, far from the values
        edges = np.clip([h.min, *h.bucket_limit], h.min, h.max)
        middles.append((edges[:-1] + edges[1:]) / 2)
        counts.append(h.bucket)
    span = min(h.min for h in histograms), max(h.max for h in histograms)
    shares, edges = np.histogram(np.concatenate(middles), BINS, span, weights=np.concatenate(counts))
    return np.stack([(edges[:-1] + edges[1:]) / 2, shares / shares.sum()], 1).tolist()
