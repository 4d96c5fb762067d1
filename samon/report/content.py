"""Content of a report: runs, scores and evaluation results, which `--export` writes as JSON."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from samon.errors import UserError
from samon.evals.results import Result, model_label
from samon.files import write_text
from samon.progress import metric_format
from samon.registry import variant_of
from samon.trainer.config import FLAGS, RECIPES
from samon.trainer.flags import Settings, rename_old

FORMAT = "samon-report 2"
EARLY_STOPPED = "early_stopped_top1"  # test accuracy at the epoch that the held-out images choose
DEFAULTS = {key: flag.default for key, flag in FLAGS.items()} | {"processes": 1}  # which the batch grows with
Points = list[list[float]]  # [[x, y], ...]
Json = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What runs must share to be compared with each other. Without a recipe, `recipe` is the data set."""

    recipe: str
    model: str
    metric: str = "eval_top1"

    @property
    def title(self) -> str:
        other = "" if self.metric == "eval_top1" else self.metric
        return ", ".join(filter(None, (self.recipe, self.model, other))) or "Runs"

    @property
    def measure(self) -> str:
        names = {"eval_top1": "accuracy, %", EARLY_STOPPED: "early-stopped accuracy, %"}
        return names.get(self.metric, self.metric)


@dataclass
class Run:
    """One training run.

    Attributes:
        epochs: rows of summary.csv.
        scalars: [[update, value], ...] by TensorBoard tag.
        norms: distributions of gamma and beta: [[value, share of the parameters], ...].
        metrics: the final metrics; empty if the run has not ended.
        cost: `cpu_seconds`, `seconds` and `flops` of the whole run, if known.
        origin: recipe, command, versions and machine.
        method: the name of its curve and of its row.
        folder: its directory, unless it comes from an export.
    """

    name: str
    settings: Settings
    epochs: list[dict[str, float | None]]
    scalars: dict[str, Points] = field(default_factory=dict)
    norms: dict[str, Points] = field(default_factory=dict)
    metrics: Json = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    origin: Json = field(default_factory=dict)
    method: str = ""
    folder: Path | None = None

    @property
    def opt(self) -> str:
        return str(self.settings["opt"])

    @property
    def data(self) -> str:
        """Name of its data set, or else of the folder of its images or shards, which may have moved."""
        name = str(self.settings.get("dataset") or "").rstrip("/")
        return Path(self.settings.get("data_dir") or "").name if name in ("", "wds") else name

    @property
    def setting(self) -> Setting:
        return Setting(str(self.origin.get("recipe") or self.data), str(self.settings.get("model", "")))


@dataclass
class Score:
    """Final values of a metric for one method and rho, one value per seed.

    Attributes:
        held_out: measured on the held-out images that choose rho, not on the test set.
        base_opt: base optimizer of a sharpness-aware one, if it is not the one its name implies.
        seeds: the seed of each value; empty if unknown.
        differences: to the baseline with the same seed, which starts from the same weights and sees the same batches;
            empty for the baseline itself, or if unknown.
        epoch: the epoch of the values, from 0; None for the last one.
    """

    method: str
    rho: float | None
    values: list[float]
    opt: str
    model: str = ""
    recipe: str = ""
    metric: str = "eval_top1"
    costs: dict[str, list[float]] = field(default_factory=dict)
    held_out: bool = False
    base_opt: str = ""
    seeds: list[int] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    epoch: int | None = None

    @property
    def base(self) -> str:
        """The optimizer that applies the gradient; costs are compared with its own."""
        variant = variant_of(self.opt)
        return (self.opt if variant is None else self.base_opt or variant.base).lower()

    @property
    def setting(self) -> Setting:
        return Setting(self.recipe, self.model, self.metric)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        return deviation(self.values)

    @property
    def num_seeds(self) -> int:
        return len(set(self.seeds) or self.values)

    @property
    def merit(self) -> float:
        """The mean, negated for losses: larger is better. NaN, the loss of a run that diverged, is the worst."""
        merit = -self.mean if "loss" in self.metric else self.mean
        return -math.inf if math.isnan(merit) else merit

    @property
    def text(self) -> str:
        return mean_text(self.values, metric_format(self.metric))


def deviation(values: list[float]) -> float | None:
    """Sample standard deviation; None for one value, NaN if one is not finite."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def mean_text(values: list[float], form: str = ".2f") -> str:
    """`mean ± standard deviation`; the value alone if there is one."""
    numbers = (statistics.fmean(values), deviation(values))
    return " ± ".join(f"{number:{form}}" for number in numbers if number is not None)


@dataclass
class Content:
    runs: list[Run] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    evaluations: list[Result] = field(default_factory=list)  # rows of validate.py

    def add(self, other: "Content") -> None:
        self.runs += other.runs
        self.scores += other.scores
        self.evaluations += other.evaluations

    def best(self) -> list[Score]:
        """The rho with the best mean for each setting and method, in order of appearance; without held-out scores."""
        best: dict[tuple[Setting, str], Score] = {}
        for score in self.scores:
            key = (score.setting, score.method)
            if not score.held_out and (key not in best or score.merit > best[key].merit):
                best[key] = score
        return list(best.values())

    def baseline(self, score: Score) -> Score | None:
        """The best score of the base optimizer alone in the same setting, without further options."""
        same = [s for s in self.best() if (s.setting, s.opt.lower()) == (score.setting, score.base)]
        return min(same, key=lambda s: len(s.method), default=None)

    def cost_ratio(self, score: Score, cost: str) -> float | None:
        """A score's mean cost over its baseline's; None if one of them is unknown."""
        base = self.baseline(score)
        if base is None or not (score.costs.get(cost) and base.costs.get(cost)):
            return None
        return statistics.fmean(score.costs[cost]) / statistics.fmean(base.costs[cost])

    @property
    def items(self) -> list[Score | Run]:
        return [*self.scores, *self.runs]

    def settings(self) -> list[Setting]:
        """In order of appearance."""
        return list(dict.fromkeys(item.setting for item in self.items))

    def of_setting(self, setting: Setting) -> "Content":
        """The runs and scores of one setting."""
        runs = [run for run in self.runs if run.setting == setting]
        return Content(runs, [score for score in self.scores if score.setting == setting])

    def style_numbers(self) -> dict[str, tuple[int, int]]:
        """For each method, in order of appearance: the number of its family (the same first word), and its own."""
        names = [item.method for item in self.items] + [model_label(row) for row in self.evaluations]
        methods = list(dict.fromkeys(names))
        families = list(dict.fromkeys(name.split()[0] for name in methods))
        return {name: (families.index(name.split()[0]), number) for number, name in enumerate(methods)}


@cache
def paper_results(recipe: str, model: str) -> dict[str, list[float]]:
    """The paper's [mean] or [mean, standard deviation] in % by optimizer name; empty if it has none for this pair."""
    block = yaml.safe_load((RECIPES / "paper_results.yaml").read_text()).get(recipe, {})
    if model not in block.get("models", []):
        return {}
    column = block["models"].index(model)
    return {opt: row[column] for opt, row in block.items() if opt != "models"}


# --- JSON -------------------------------------------------------------------------------------------------------------


def export(content: Content, path: Path) -> None:
    """Write the content as compact JSON: numbers with 6 significant digits, settings that are not defaults, and the
    distributions of each method's first run."""
    data = {"format": FORMAT, **asdict(content)}
    for row in data["runs"]:
        del row["folder"]
    data = json.loads(json.dumps(data), parse_float=_round)
    methods = set()
    for run, row in zip(content.runs, data["runs"], strict=True):
        row["settings"] = {key: value for key, value in sorted(run.settings.items()) if value != DEFAULTS.get(key)}
        if (run.setting, run.method) in methods:
            row["norms"] = {}
        methods.add((run.setting, run.method))
    write_text(path, json.dumps(data, separators=(",", ":")) + "\n")


def _round(digits: str) -> float:
    """A number of the JSON text with 6 significant digits, or as an integer."""
    value = float(digits)
    number = float(f"{value:.6g}") if abs(value) < 1e6 else round(value)
    return int(number) if number == int(number) else number


def load(data: Json, path: Path) -> Content:
    """The content of an export; UserError if the file is of another version or damaged."""
    if data.get("format") != FORMAT:
        raise UserError(f"{path} is {data.get('format')!r}, this program reads {FORMAT!r}; export it again")
    try:
        runs, scores = [Run(**run) for run in data["runs"]], [Score(**score) for score in data["scores"]]
        for run in runs:
            run.settings = with_defaults(run.settings)
        return Content(runs, scores, list(data["evaluations"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no export of samon-report: {error}; export it again") from None


def with_defaults(settings: Settings) -> Settings:
    """Settings of train.py under the flags' current names, with defaults; those of other programs as they are."""
    return DEFAULTS | rename_old(settings, FLAGS) if "model" in settings else settings


# --- names ------------------------------------------------------------------------------------------------------------

_NOT_COMPARED = {"seed", "rho", "opt", "data_dir", "wandb_resume_id", "workers"}


def differing_keys(runs: Iterable[Run]) -> list[str]:
    """Keys of the settings in which runs differ. A flag that an earlier version did not have has its default; a key
    that is no flag is compared among the runs that have it."""
    settings = [DEFAULTS | run.settings for run in runs]
    keys = dict.fromkeys(key for row in settings for key in row)
    return [key for key in keys if len({repr(row[key]) for row in settings if key in row}) > 1]


def name_methods(runs: list[Run]) -> None:
    """Name each run's method by its optimizer and by the settings, other than seed and rho, in which the optimizer's
    runs of one setting differ: `samon ascent=previous`. The default, or else the most frequent value, is not named.
    A recipe with several data sets is as many settings, `RECIPE on DATA`."""
    data = {run.setting: {other.data for other in runs if other.setting == run.setting} for run in runs}
    for run in [run for run in runs if len(data[run.setting]) > 1]:
        run.origin = run.origin | {"recipe": f"{run.setting.recipe} on {run.data}"}
    for setting, opt in dict.fromkeys((run.setting, run.opt) for run in runs):
        same = [run for run in runs if (run.setting, run.opt) == (setting, opt)]
        usual: Settings = {}
        for key in differing_keys(same):
            values = [run.settings.get(key) for run in same]
            default = DEFAULTS.get(key)
            usual[key] = default if default in values else max(values, key=values.count)
        for run in same:
            keys = [key for key in usual if key not in _NOT_COMPARED and run.settings.get(key) != usual[key]]
            run.method = " ".join([opt, *(f"{key}={run.settings.get(key)}" for key in keys)])


def score_runs(runs: list[Run]) -> list[Score]:
    """Accuracies of finished runs by setting, method and rho."""
    scores: dict[tuple[Setting, str, float | None], Score] = {}
    for run in (run for run in runs if run.metrics.get("eval_top1") is not None):
        rho, base = run.settings.get("rho"), str(run.settings.get("base_opt") or "")
        new = Score(run.method, rho, [], run.opt, run.setting.model, run.setting.recipe, base_opt=base)
        score = scores.setdefault((run.setting, run.method, rho), new)
        score.values.append(float(run.metrics["eval_top1"]))
        score.seeds += [run.settings["seed"]] if "seed" in run.settings else []
        for cost, value in run.cost.items():
            score.costs.setdefault(cost, []).append(value)
    return list(scores.values())
