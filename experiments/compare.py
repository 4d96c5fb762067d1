#!/usr/bin/env python3
"""Compare methods on a recipe: rho is chosen on held-out images, then several seeds run on the test set.

    python experiments/compare.py tradeoff --data-dir DIR [--jobs 2] [--only SAM-ON,SGD] [--table] [-- --device cuda]
    python experiments/compare.py tradeoff --data-dir DIR --extend experiments/tradeoff/results.json --only MINE

An experiment is a directory with a recipe NAME.yaml and a table of methods, methods.yaml. Each method is a sweep of its
own below --output; --jobs runs of all of them train at a time. After an interruption, start the command again: finished
runs are skipped and interrupted ones resume. So are the runs of the results.json that --extend names: only a new row of
methods.yaml, or more seeds, are trained and compared with its results. Flags after `--` go to every train.py. Prints a
table and writes results.json, which samon-report reads, and the figures; `--table` only collects what is finished.
"""

import argparse
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

import yaml

from samon.cli.program import parse_before_dashes, run_script
from samon.cli.sweep import Job, Sweep, run_jobs
from samon.errors import RunError, UserError, require_matplotlib
from samon.report.content import EARLY_STOPPED, Content, Run, Score, export, mean_text
from samon.report.figures import mean_cost
from samon.report.read import read_file, read_run
from samon.trainer.config import FLAGS
from samon.trainer.logging import summary_rows
from samon.trainer.resume import NON_SEMANTIC_FLAGS

HERE = Path(__file__).resolve().parent
NOT_COMPARED = NON_SEMANTIC_FLAGS | {"seed", "rho", "pretrained_path"}  # between these runs and those of --extend


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        rho: values to choose from; the recipe's own if empty.
        rho_of: the method whose choice this one uses.
        flags: further flags of train.py.
        baseline: the method to compare with, seed by seed; by default the base optimizer alone.
    """

    opt: str
    rho: tuple[float, ...] = ()
    rho_of: str = ""
    flags: str = ""
    baseline: str = ""


class Experiment:
    """A recipe, a table of methods, and the finished runs of both stages.

    Args:
        directory: holds NAME.yaml, the recipe, and methods.yaml: `methods` by name, `choose` with the flags of the
            runs that choose rho (--train-split, --val-split), the number of `seeds` on the test set, and
            `early_stopping: true` if the held-out images also choose the epoch.
        output: directory of the runs, `choose/METHOD/` and `test/METHOD/`.
        train: further flags of train.py.
        parallel: runs at a time.
        known: results of earlier runs, made elsewhere.
    """

    def __init__(
        self, directory: Path, output: Path, train: list[str], parallel: int = 1, known: Content | None = None
    ) -> None:
        try:
            table = yaml.safe_load((directory / "methods.yaml").read_text())
            rows = {name: row | {"rho": tuple(row.get("rho", ()))} for name, row in table["methods"].items()}
            self.methods = {name: Method(**row) for name, row in rows.items()}
            self.choose_flags = shlex.split(table.get("choose", ""))
            self.seeds = int(table.get("seeds", 3))
            self.early_stopping = bool(table.get("early_stopping", False))
        except (OSError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{directory / 'methods.yaml'} is no table of methods: {error}") from None
        self.recipe = directory / f"{directory.name}.yaml"
        self.output, self.train, self.parallel = output.resolve(), train, parallel
        self.known = known or Content()
        held_out = [s for s in self.known.scores if s.held_out and s.method in self.methods]
        self.known_runs = {run.name for run in self.known.runs}
        sweeps = [self.sweep(s.method, "choose", (s.rho,), 1) for s in held_out]
        self.known_runs |= {self.run_name(sweep, sweep.jobs[0]) for sweep in sweeps}
        self._check_known()

    def _check_known(self) -> None:
        """Raise UserError if an earlier run is of this experiment, but was made with other settings, or if seeds or the
        epoch of early stopping are unknown, as in files of earlier versions."""
        scores = [score for score in self.known.scores if score.method in self.methods]
        chosen = {s.method: s.epoch for s in sorted(scores, key=lambda score: score.merit) if s.held_out}
        if any(not score.seeds for score in scores) or (self.early_stopping and None in chosen.values()):
            raise UserError("--extend: the file is of an earlier version, without seeds or epochs; drop --extend")
        for run in (run for run in self.known.runs if run.method in self.methods):
            config = vars(self.sweep(run.method, "test", (None,), 1).resolve(self.methods[run.method].opt))
            for key in config.keys() & run.settings.keys() - NOT_COMPARED:
                if config[key] != run.settings[key] and not FLAGS[key].refused:
                    setting = f"{FLAGS[key].flag} {run.settings[key]}, this command has {config[key]}"
                    raise UserError(
                        f"--extend: {run.name} was made with {setting}; change that after --, or drop --extend"
                    )

    def sweep(self, name: str, stage: str, rhos: tuple[float | None, ...], seeds: int) -> Sweep:
        method = self.methods[name]
        flags = [*(self.choose_flags if stage == "choose" else []), *shlex.split(method.flags), *self.train]
        place = self.output / stage / name.replace(" ", "-")
        tried = {method.opt: rhos or (None,)}
        return Sweep(str(self.recipe), tried, range(seeds), place, flags)

    def choices(self, name: str) -> Sweep | None:
        """The runs on held-out images; None if there is nothing to choose, or rho is not chosen yet."""
        method = self.methods[name]
        rhos = self.chosen_rho(method.rho_of) if method.rho_of else method.rho
        if rhos is None or not (self.early_stopping or len(rhos) > 1):
            return None
        return self.sweep(name, "choose", rhos, 1)

    def held_out_scores(self, name: str) -> list[Score]:
        """The scores on held-out images, at each run's best epoch with early stopping."""
        if (sweep := self.choices(name)) is None:
            return []
        scores = early_stopped(sweep) if self.early_stopping else sweep.scores()
        for score in scores:
            score.held_out, score.method = True, name
        tried = {job.rho for job in sweep.jobs} - {score.rho for score in scores}
        return scores + [s for s in self.known.scores if s.held_out and s.method == name and s.rho in tried]

    def chosen_rho(self, name: str) -> tuple[float | None, ...] | None:
        """The rho that the held-out images choose, () to leave it to the recipe, None before all values are tried."""
        method = self.methods[name]
        if method.rho_of:
            return self.chosen_rho(method.rho_of)
        if len(method.rho) < 2:
            return method.rho
        scores = self.held_out_scores(name)
        return None if len(scores) < len(method.rho) else (max(scores, key=lambda score: score.merit).rho,)

    def run(self, names: list[str], choose_only: bool = False) -> None:
        """Run what is missing: first whatever chooses rho, then the rest, each in one pool."""
        sources = dict.fromkeys(self.methods[name].rho_of or name for name in names)
        self._finish("held-out images", [self.choices(name) for name in sources])
        # Early stopping: a method with another's rho chooses its epoch only now.
        sweeps = [self.choices(name) for name in names]
        for name in [] if choose_only else names:
            rho = self.chosen_rho(name)
            assert rho is not None
            sweeps.append(self.sweep(name, "test", rho, self.seeds))
        self._finish("held-out images" if choose_only else "test set", sweeps)

    def _finish(self, title: str, sweeps: list[Sweep | None]) -> None:
        """Run what is missing of these sweeps; seeds are the outer loop, so that a complete table exists early.

        Raises:
            RunError: some runs failed or were stopped.
        """
        jobs = [(sweep, job) for sweep in sweeps if sweep is not None for job in sweep.jobs]
        jobs = [(sweep, job) for sweep, job in jobs if self.run_name(sweep, job) not in self.known_runs]
        jobs = [(sweep, job) for sweep, job in sorted(jobs, key=lambda pair: pair[1].seed) if not sweep.result(job)]
        print(f"{title}: {len(jobs)} runs in {self.output}", flush=True)
        if unfinished := run_jobs(jobs, self.parallel) if jobs else []:
            raise RunError(
                f"{len(unfinished)} of {len(jobs)} runs did not finish, see {unfinished[0] / 'sweep.log'}; start the "
                "command again to continue"
            )

    def run_name(self, sweep: Sweep, job: Job) -> str:
        """The name of a run in results.json."""
        return str((sweep.output / job.name).relative_to(self.output))

    def test_scores(self, name: str, sweep: Sweep, runs: list[Run]) -> list[Score]:
        """The scores on the test set with all costs, also with early stopping if it is asked for."""
        scores = sweep.scores()
        if choices := self.held_out_scores(name) if self.early_stopping else []:
            scores += early_stopped(sweep, max(choices, key=lambda score: score.merit).epoch)
        for score in scores:
            score.method = name
            score.costs["flops"] = [run.cost["flops"] for run in runs if "flops" in run.cost]
        rhos = {job.rho for job in sweep.jobs}
        known = [s for s in self.known.scores if (s.method, s.held_out) == (name, False) and s.rho in rhos]
        return [extended(score, known) for score in scores] or known

    def content(self) -> Content:
        """Finished runs on the test set, and the scores of both stages."""
        content = Content()
        for name in self.methods:
            content.scores += self.held_out_scores(name)
            if (rho := self.chosen_rho(name)) is not None:
                sweep = self.sweep(name, "test", rho, self.seeds)
                finished = [job.name for job in sweep.jobs if sweep.result(job) is not None]
                runs = [read_run(sweep.output / job, self.output) for job in finished]
                for run in runs:
                    run.method = name
                content.scores += self.test_scores(name, sweep, runs)
                names = {self.run_name(sweep, job) for job in sweep.jobs} - {run.name for run in runs}
                content.runs += [run for run in self.known.runs if run.name in names] + runs
        best = {(score.method, score.metric): score for score in content.best()}
        for (name, metric), score in best.items():
            own = self.methods[name].baseline
            score.differences = paired_differences(score, best.get((own, metric)) if own else content.baseline(score))
        return content


def paired_differences(score: Score, base: Score | None) -> list[float]:
    """A score's value minus the baseline's for each seed that both have; empty for the baseline itself."""
    if base is None or base is score:
        return []
    own, other = (dict(zip(s.seeds, s.values, strict=True)) for s in (score, base))
    return [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]


def extended(score: Score, known: list[Score]) -> Score:
    """A score with the values of other seeds from a known score of the same metric."""
    for other in (s for s in known if s.metric == score.metric):
        new = [i for i, seed in enumerate(other.seeds) if seed not in score.seeds]
        score.seeds = [other.seeds[i] for i in new] + score.seeds
        score.values = [other.values[i] for i in new] + score.values
        for cost, values in other.costs.items():
            score.costs[cost] = [values[i] for i in new if i < len(values)] + score.costs.get(cost, [])
    return score


def top1_by_epoch(directory: Path) -> dict[int, float]:
    """The accuracy after each evaluated epoch of a run, from 0."""
    rows = summary_rows(directory / "summary.csv")
    return {int(row["epoch"]): float(row["eval_top1"]) for row in rows if row["eval_top1"]}


def early_stopped(sweep: Sweep, epoch: int | None = None) -> list[Score]:
    """The scores of a sweep after `epoch`; if None, after the best one of the single run of each."""
    scores = sweep.scores()
    for score in scores:
        curves = [top1_by_epoch(sweep.output / Job(score.opt, score.rho, seed).name) for seed in score.seeds]
        score.epoch = max(curves[0], key=curves[0].__getitem__) if epoch is None else epoch
        score.values = [curve[score.epoch] for curve in curves]
        score.metric = EARLY_STOPPED
    return scores


def row_text(content: Content, name: str, method: Method) -> str:
    """A method's row: rho, accuracy, paired difference to the baseline, costs, and the held-out accuracies by rho."""
    held_out = [score for score in content.scores if score.method == name and score.held_out]
    tested = [score for score in content.scores if score.method == name and not score.held_out]
    words = [f"{name:20}"]
    if tested and tested[0].rho is not None:
        edge = len(method.rho) > 1 and tested[0].rho in (min(method.rho), max(method.rho))
        words.append(f"rho {tested[0].rho:g}" + " (edge of the grid)" * edge)
    for score in tested:
        words.append(f"{score.metric} {score.text} of {len(score.values)}")
        if score.differences:
            words.append("+" * (statistics.fmean(score.differences) >= 0) + mean_text(score.differences))
    if tested:
        ratio = content.cost_ratio(tested[0], "flops")
        words += [] if ratio is None else [f"{ratio:.2f}x FLOPs"]
        words += [mean_cost(tested[0], "cpu_seconds") + " of CPU time"] if tested[0].costs.get("cpu_seconds") else []
    choices = ", ".join(f"{s.mean:.2f}" if s.rho is None else f"{s.rho:g}: {s.mean:.2f}" for s in held_out)
    missing = f" ({len(held_out)} of {len(method.rho)})" if len(held_out) < len(method.rho) else ""
    return "  ".join([*words, *([f"held out {choices}{missing}"] if choices else [])])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiment", type=Path, help="directory below experiments/, such as few_images, or another path")
    add("--data-dir", type=Path, help="directory of the data set, as for train.py")
    add("--output", type=Path, help="default: output/experiments/NAME")
    add("--jobs", type=int, default=1, help="number of runs at a time")
    add("--seeds", type=int, help="seeds on the test set (default: those of methods.yaml)")
    add("--only", help="comma-separated methods (default: all)")
    add("--choose-only", action="store_true", help="stop before the test set is used")
    add("--extend", type=Path, help="results.json of earlier runs, which are not repeated")
    add("--table", action="store_true", help="run nothing; collect what is finished")
    args = parse_before_dashes(parser, argv, "samon-train")
    directory = args.experiment if args.experiment.is_dir() else HERE / args.experiment
    train = [*(["--data-dir", str(args.data_dir)] if args.data_dir else []), *args.after]
    output = args.output or Path("output/experiments") / directory.name
    known = read_file(args.extend) if args.extend else None
    if known is not None and not known.runs:
        raise UserError(f"--extend {args.extend} has no runs; name the results.json of an experiment")
    experiment = Experiment(directory.resolve(), output, train, args.jobs, known)
    experiment.seeds = args.seeds or experiment.seeds
    names = args.only.split(",") if args.only else list(experiment.methods)
    if unknown := set(names) - set(experiment.methods):
        raise UserError(f"--only: unknown {', '.join(sorted(unknown))}; known are {', '.join(experiment.methods)}")
    require_matplotlib()
    from samon.report.draw import write_figures

    try:
        if not args.table:
            experiment.run(names, args.choose_only)
    finally:  # also after Ctrl-C or SIGTERM
        content = experiment.content()
        (output / "figures").mkdir(parents=True, exist_ok=True)
        export(content, output / "results.json")
        write_figures(Content(scores=content.scores), output / "figures")
        for name in experiment.methods:
            print(row_text(content, name, experiment.methods[name]))


if __name__ == "__main__":
    run_script(main)
