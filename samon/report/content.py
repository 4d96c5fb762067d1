"""What a page is made of. The same as JSON (`--export`), so that a page can be made again from a repository."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from samon.errors import UserError
from samon.files import write_text
from samon.settings.config import FLAGS

FORMAT = "samon-report 1"
COSTS = ("cpu_seconds", "seconds", "flops")


@dataclass
class Run:
    """One training run."""

    name: str
    settings: dict[str, Any]
    epochs: list[dict[str, float | None]]  # rows of summary.csv
    scalars: dict[str, list[list[float]]] = field(default_factory=dict)  # TensorBoard tag -> [[update, value], ...]
    norms: dict[str, list[list[float]]] = field(default_factory=dict)  # gamma, beta -> [[value, share of them], ...]
    metrics: dict[str, Any] = field(default_factory=dict)  # the final ones
    cost: dict[str, float] = field(default_factory=dict)  # COSTS of the whole run, `step_flops` over a plain step
    made: dict[str, Any] = field(default_factory=dict)  # recipe, command, versions, machine
    method: str = ""  # what its curve and its row are called


@dataclass
class Score:
    """The final accuracies of one method and rho, in %, one for each seed."""

    method: str
    rho: float | None
    values: list[float]
    opt: str
    model: str = ""
    recipe: str = ""
    metric: str = "eval_top1"
    costs: dict[str, list[float]] = field(default_factory=dict)
    held_out: bool = False  # of the images that chose rho, not of the test set

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for one run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass
class Content:
    runs: list[Run] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # rows of validate.py

    def add(self, other: "Content") -> None:
        self.runs += other.runs
        self.scores += other.scores
        self.evaluations += other.evaluations

    def best(self) -> list[Score]:
        """Of every method the rho with the highest mean, held-out images left aside, in order of appearance."""
        found: dict[tuple[str, str, str], Score] = {}
        for score in self.scores:
            key = (score.recipe, score.model, score.method)
            if not score.held_out and (key not in found or score.mean > found[key].mean):
                found[key] = score
        return list(found.values())

    def methods(self) -> list[str]:
        """All names, in order of appearance: a method has the same colour in every figure."""
        names = [run.method for run in self.runs] + [score.method for score in self.scores]
        return list(dict.fromkeys(names + [label(row) for row in self.evaluations]))


def label(row: dict[str, Any]) -> str:
    """What an evaluated model is called: its run, or its file, or the model."""
    return str(row.get("method") or row.get("checkpoint") or row["model"])


def export(content: Content, path: Path) -> None:
    write_text(path, json.dumps({"format": FORMAT, **asdict(content)}, indent=None, separators=(",", ":")) + "\n")


def load(found: dict[str, Any], path: Path) -> Content:
    """Raises:
    UserError: the file is of another version or damaged.
    """
    if found.get("format") != FORMAT:
        raise UserError(f"{path} is {found.get('format')!r}, this program reads {FORMAT!r}; export it again")
    try:
        runs, scores = [Run(**run) for run in found["runs"]], [Score(**score) for score in found["scores"]]
        return Content(runs, scores, list(found["evaluations"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no export of samon-report: {error}; export it again") from None


# --- naming -----------------------------------------------------------------------------------------------------------

_NOT_COMPARED = {"seed", "rho", "opt", "data_dir", "wandb_resume_id", "workers"}


def differing(runs: Iterable[Run]) -> list[str]:
    """Keys of the settings in which runs differ."""
    every = [run.settings for run in runs]
    keys = dict.fromkeys(key for settings in every for key in settings)
    return [key for key in keys if len({repr(settings.get(key)) for settings in every}) > 1]


def name_methods(runs: list[Run]) -> None:
    """`samon ascent=previous`: the optimizer, and what else sets runs of this optimizer apart but seed and rho.

    What is a flag's default, or else the same in most of them, goes without saying."""
    for opt in dict.fromkeys(str(run.settings["opt"]) for run in runs):
        same = [run for run in runs if str(run.settings["opt"]) == opt]
        keys = [key for key in differing(same) if key not in _NOT_COMPARED]
        usual = {key: _usual(key, [run.settings.get(key) for run in same]) for key in keys}
        for run in same:
            other = [f"{key}={run.settings.get(key)}" for key in keys if run.settings.get(key) != usual[key]]
            run.method = " ".join([opt, *other])


def _usual(key: str, values: list[Any]) -> Any:
    default = FLAGS[key].default if key in FLAGS else None
    return default if default in values else max(values, key=values.count)


def scores_of(runs: list[Run], metric: str = "eval_top1") -> list[Score]:
    """Finished runs by method and rho. rho is the one of the settings, for optimizers that have one."""
    found: dict[tuple[Any, ...], Score] = {}
    for run in (run for run in runs if run.metrics.get(metric) is not None):
        recipe, model, opt = str(run.made.get("recipe", "")), str(run.settings.get("model", "")), run.settings["opt"]
        rho = run.settings.get("rho")
        key = (recipe, model, run.method, rho)
        score = found.setdefault(key, Score(run.method, rho, [], opt, model, recipe, metric))
        score.values.append(float(run.metrics[metric]))
        for cost in COSTS:
            if cost in run.cost:
                score.costs.setdefault(cost, []).append(run.cost[cost])
    return list(found.values())
