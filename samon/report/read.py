"""Content from directories and files: runs, sweeps, results of validate.py, exports."""

import csv
import json
import logging
import math
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from samon.errors import UserError
from samon.report.content import Content, Run, Score, load, name_methods, scores_of
from samon.report.cost import add_flops
from samon.trainer.config import FLAGS
from samon.trainer.flags import rename_old

KEPT = ("train/loss", "train/loss_perturbed", "train/sharpness", "train/grad_norm", "train/ascent_grad_norm")
POINTS = 150  # of a curve
BINS = 40
PLACE = ("output", "experiment", "resume")


def gather(paths: list[Path]) -> Content:
    """Everything under the given runs, sweeps and files.

    Raises:
        UserError: a path holds nothing to report.
    """
    content = Content()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; name a run, a sweep's directory or a results file")
        found = directory(path) if path.is_dir() else file(path)
        if found is None or not (found.runs or found.scores or found.evaluations):
            raise UserError(f"{path} holds no run (args.yaml, summary.csv), table of a sweep or results of validate.py")
        content.add(found)
    fresh = [run for run in content.runs if not run.method]  # exports and trade-offs have their names already
    name_methods(fresh)
    for run in content.runs:
        add_flops(run)
    content.scores += scores_of(fresh)
    for score in content.scores:  # a trade-off's file has no model
        models = {str(run.settings.get("model", "")) for run in content.runs if run.made.get("recipe") == score.recipe}
        if not score.model and len(models) == 1:
            score.model = models.pop()
    _add_flops_of_runs(content)
    _name_evaluations(content)
    return content


def _add_flops_of_runs(content: Content) -> None:
    """To the scores of a trade-off, whose file has the times alone."""
    for score in content.scores:
        own = [r for r in content.runs if (r.method, r.made.get("recipe")) == (score.method, score.recipe)]
        runs = [run for run in own if run.metrics and "flops" in run.cost]
        if runs and "flops" not in score.costs and not score.held_out:
            score.costs["flops"] = [run.cost["flops"] for run in runs]


def directory(path: Path) -> Content:
    """A run, or whatever lies under a directory. What a trade-off's results.json scores is not scored again."""
    content = Content()
    for results in sorted(path.glob("*.json")):
        if (found := file(results)) is not None and results.name not in ("run.json", "result.json"):
            content.add(found)
    tradeoff = [score.method for score in content.scores if not score.held_out]
    for folder in sorted(args.parent for args in path.rglob("args.yaml")):
        run = read_run(folder, path)
        method = next((name for name in tradeoff if name.replace(" ", "-") == folder.parent.name), "")
        if tradeoff and (path / "results.json").exists():
            if not method or "choose" in folder.relative_to(path).parts:
                continue
            run.method = method
        content.runs.append(run)
    if any(not run.method for run in content.runs):
        content.scores = [score for score in content.scores if score.held_out]  # table.json repeats the runs' figures
    return content


def file(path: Path) -> Content | None:
    """A JSON file by what it holds; None if it is something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if isinstance(found, dict) and "format" in found:
        return load(found, path)
    if isinstance(found, dict) and {"rows", "metric", "config"} <= found.keys():
        return Content(scores=_table(found))
    if isinstance(found, list) and found and all(isinstance(row, dict) for row in found):
        if "eval" in found[0]:
            return Content(evaluations=found)
        if {"method", "opt", "rho"} <= found[0].keys():
            return Content(scores=[score for row in found for score in _tradeoff(row)])
    return None


def _table(found: dict[str, Any]) -> list[Score]:
    """table.json of a sweep."""
    about = found["model"], Path(found["config"]).stem, found["metric"]
    rows = [row for row in found["rows"] if row["values"]]
    return [Score(row["opt"], row["rho"], row["values"], row["opt"], *about, _seconds(row)) for row in rows]


def _tradeoff(row: dict[str, Any]) -> list[Score]:
    """A method's row of tools/tradeoff.py's results.json."""
    method, opt, recipe = row["method"], row["opt"], row.get("recipe", "tradeoff")
    rows = [Score(method, float(rho), [mean], opt, recipe=recipe, held_out=True) for rho, mean in row["choose"].items()]
    if row.get("top1"):
        rho = float(row["rho"]) if row["rho"] else None
        rows.append(Score(method, rho, row["top1"], opt, recipe=recipe, costs=_seconds(row)))
    return rows


def _seconds(row: dict[str, Any]) -> dict[str, list[float]]:
    """Processor times of the runs that were made in one go."""
    known = [spent for spent in row.get("cpu_seconds", []) if spent is not None]
    return {"cpu_seconds": known} if known else {}


# --- a run ------------------------------------------------------------------------------------------------------------


def read_run(folder: Path, root: Path) -> Run:
    """A run's directory; its name is the path below the directory that was named."""
    name = folder.name if folder == root else str(folder.relative_to(root))
    settings = yaml.safe_load((folder / "args.yaml").read_text()) or {}
    if "model" in settings:  # train.py's, and what an earlier version of it did not know yet
        settings = {key: flag.default for key, flag in FLAGS.items()} | rename_old(settings, FLAGS)
    settings = {key: value for key, value in settings.items() if key not in PLACE}
    settings.setdefault("opt", "unknown optimizer")
    summary = folder / "summary.csv"
    lines = summary.read_text().splitlines() if summary.exists() else []
    epochs = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(lines)]
    run, swept, made = Run(name, settings, epochs), _json(folder / "result.json"), _json(folder / "run.json")
    run.metrics = made.get("metrics") or swept.get("metrics") or {}
    if not run.metrics and epochs and (epochs[-1]["epoch"] or 0) + 1 >= settings.get("epochs", math.inf):
        run.metrics = dict(epochs[-1])
    run.metrics.pop("output", None)
    times = {"cpu_seconds": swept.get("cpu_seconds", made.get("cpu_seconds")), "seconds": made.get("seconds")}
    times["seconds"] = times["seconds"] or run.metrics.get("seconds")
    if not (made.get("resumed") or swept.get("resumed")):
        run.cost = {key: value for key, value in times.items() if value is not None}
    keys = ("recipe", "command", "versions", "machine", "processes")
    run.made = {key: made[key] for key in keys if key in made}
    if "command" in run.made:
        run.made["command"] = _placeless(run.made["command"])
    recipe = run.made.get("recipe") or _json(folder.parent / "table.json").get("config", "")
    run.made["recipe"] = Path(recipe).stem
    read_events(folder / "tb", run)
    return run


def _placeless(command: str) -> str:
    """A command without where it wrote, which changes no figure and is nobody's business."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word.removeprefix("--") in PLACE:
            next(words, None)
        elif not word.startswith(tuple(f"--{key}=" for key in PLACE)):
            kept.append(word)
    return shlex.join(kept)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def read_events(folder: Path, run: Run) -> None:
    """Scalars during training, the number of updates, and the last distributions of gamma and beta."""
    if not folder.is_dir():
        return
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 1, "images": 1})
    events.Reload()
    tags = events.Tags()
    for tag in [tag for tag in KEPT if tag in tags["scalars"]]:
        points = events.Scalars(tag)
        kept = points[:: max(1, len(points) // POINTS)]
        run.scalars[tag] = [[point.step, point.value] for point in kept]
    evaluated = [tag for tag in tags["scalars"] if tag.startswith("eval/")]
    if evaluated:
        run.cost["updates"] = float(max(point.step for point in events.Scalars(evaluated[0])))
    layers: dict[str, list[Any]] = defaultdict(list)
    for tag in tags["histograms"]:
        layers[tag.split("/")[0]].append(events.Histograms(tag)[-1].histogram_value)
    run.norms = {kind: distribution(found) for kind, found in layers.items() if kind in ("gamma", "beta")}


def distribution(histograms: list[Any]) -> list[list[float]]:
    """[[middle of a bin, share of all parameters in it], ...] of all layers together."""
    low, high = min(h.min for h in histograms), max(h.max for h in histograms)
    width = (high - low) / BINS or 1.0
    counts, total = [0.0] * BINS, 0.0
    for histogram in histograms:
        lower = histogram.min
        for limit, count in zip(histogram.bucket_limit, histogram.bucket, strict=True):
            upper = min(limit, histogram.max)
            if count:
                counts[min(BINS - 1, max(0, int(((lower + upper) / 2 - low) / width)))] += count
                total += count
            lower = max(lower, upper)
    return [[low + (i + 0.5) * width, count / total] for i, count in enumerate(counts)]


def _name_evaluations(content: Content) -> None:
    """Rows of a checkpoint that lies in a reported run take the run's method, seed and rho with it."""
    for row in content.evaluations:
        parent = Path(str(row.get("checkpoint", ""))).parent
        near = [run for run in content.runs if parent.name and run.name in (parent.name, str(parent))]
        near += [run for run in content.runs if str(parent).endswith(f"/{run.name}")]
        if near and "method" not in row:
            row["method"] = near[0].method
