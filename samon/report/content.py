"""What a page is made of. The same as JSON (`--export`), so that a page can be made again from a repository."""

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from samon.errors import UserError
from samon.files import write_text
from samon.registry import variant_of
from samon.trainer.config import FLAGS
from samon.trainer.flags import rename_old

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
    base_opt: str = ""  # of a sharpness-aware optimizer, where it is not its name's

    @property
    def base(self) -> str:
        """The optimizer that applies the gradient: its own cost is what others are compared with."""
        variant = variant_of(self.opt)
        return (self.opt if variant is None else self.base_opt or variant.base).lower()

    @property
    def merit(self) -> float:
        """The larger the better: the mean, negated for losses."""
        return -self.mean if "loss" in self.metric else self.mean

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for one run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Setting:
    """What runs have in common that are compared with each other."""

    recipe: str
    model: str
    metric: str = "eval_top1"

    @property
    def title(self) -> str:
        other = "" if self.metric == "eval_top1" else self.metric
        return ", ".join(filter(None, (self.recipe and f"Recipe {self.recipe}", self.model, other))) or "Runs"

    @property
    def measure(self) -> str:
        return "accuracy, %" if self.metric == "eval_top1" else self.metric


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
        """Of every method the rho with the best mean, held-out images left aside, in order of appearance."""
        found: dict[tuple[Setting, str], Score] = {}
        for score in self.scores:
            key = (setting_of(score), score.method)
            if not score.held_out and (key not in found or score.merit > found[key].merit):
                found[key] = score
        return list(found.values())

    def base_of(self, score: Score) -> Score | None:
        """The best score of the same setting's base optimizer alone, without options that set it apart."""
        same = [s for s in self.best() if (setting_of(s), s.opt.lower()) == (setting_of(score), score.base)]
        return min(same, key=lambda s: len(s.method), default=None)

    def ratio(self, score: Score, cost: str) -> float | None:
        """A score's mean cost over its base optimizer's; None where one of them is not known."""
        base = self.base_of(score)
        if base is None or not (score.costs.get(cost) and base.costs.get(cost)):
            return None
        return statistics.fmean(score.costs[cost]) / statistics.fmean(base.costs[cost])

    def settings(self) -> list[Setting]:
        """In order of appearance."""
        return list(dict.fromkeys([*map(setting_of, self.scores), *map(setting_of, self.runs)]))

    def part(self, setting: Setting) -> "Content":
        """The runs and scores of one setting."""
        runs = [run for run in self.runs if setting_of(run) == setting]
        return Content(runs, [score for score in self.scores if setting_of(score) == setting])

    def looks(self) -> dict[str, int]:
        """{name: number of its method}: names of one method ('SAM-ON previous', 'samon ascent=previous') share it."""
        named = [(score.method, score.opt) for score in self.scores]
        named += [(run.method, str(run.settings["opt"])) for run in self.runs]
        known = dict(named)
        named += [(name, name) for name in map(label, self.evaluations) if name not in known]
        numbers: dict[tuple[str, str], int] = {}
        return {name: numbers.setdefault(_identity(name, opt), len(numbers)) for name, opt in named}


def setting_of(item: Run | Score) -> Setting:
    if isinstance(item, Score):
        return Setting(item.recipe, item.model, item.metric)
    return Setting(str(item.made.get("recipe", "")), str(item.settings.get("model", "")))


def _identity(name: str, opt: str) -> tuple[str, str]:
    """(optimizer, what else its name says)."""
    text, own = (re.sub(r"ascent=|[^a-z0-9=.]|(?<=\d)th\b", "", word.lower()) for word in (name, opt))
    return own, text.replace("samnonorm", "samnn").removeprefix(own)


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
        runs = [Run(**run | {"settings": rename_old(run["settings"], FLAGS)}) for run in found["runs"]]
        scores = [Score(**score) for score in found["scores"]]
        return Content(runs, scores, list(found["evaluations"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no export of samon-report: {error}; export it again") from None


# --- naming -----------------------------------------------------------------------------------------------------------

_NOT_COMPARED = {"seed", "rho", "opt", "data_dir", "wandb_resume_id", "workers"}


def differing(runs: Iterable[Run]) -> list[str]:
    """Keys of the settings in which runs differ. A flag that a run of an earlier version did not have has its default,
    and what is no flag counts among the runs that have it."""
    every = [{key: flag.default for key, flag in FLAGS.items()} | run.settings for run in runs]
    keys = dict.fromkeys(key for settings in every for key in settings)
    return [key for key in keys if len({repr(settings[key]) for settings in every if key in settings}) > 1]


def name_methods(runs: list[Run]) -> None:
    """`samon ascent=previous`: the optimizer, and what else but seed and rho sets its runs of one setting apart.

    What is a flag's default, or else the same in most of them, goes without saying."""
    for setting, opt in dict.fromkeys((setting_of(run), str(run.settings["opt"])) for run in runs):
        same = [run for run in runs if (setting_of(run), str(run.settings["opt"])) == (setting, opt)]
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
        base = str(run.settings.get("base_opt") or "")
        score = found.setdefault(key, Score(run.method, rho, [], opt, model, recipe, metric, base_opt=base))
        score.values.append(float(run.metrics[metric]))
        for cost in COSTS:
            if cost in run.cost:
                score.costs.setdefault(cost, []).append(run.cost[cost])
    return list(found.values())
