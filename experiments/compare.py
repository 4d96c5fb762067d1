#!/usr/bin/env python3
"""Compare methods on a recipe: rho is chosen on held-out images, then several seeds run on the test set.

    python experiments/compare.py tradeoff --data-dir DIR [--jobs 2] [--only SAM-ON,SGD] [--table]

An experiment is a directory with a recipe NAME.yaml and a table of methods, methods.yaml. Each method is a sweep of its
own below --output: start the command again to continue. Flags after `--` go to every train.py. Writes results.json,
which samon-report reads, and the figures; `--table` only collects what is finished.
"""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

from samon.cli.program import parse_before_dashes, run_script
from samon.cli.sweep import Sweep
from samon.errors import RunError, UserError, require_matplotlib
from samon.report.content import Content, Score, export
from samon.report.read import read_run

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        rho: values to choose from; the recipe's own if empty.
        rho_of: the method whose choice this one uses.
        flags: further flags of train.py.
    """

    opt: str
    rho: tuple[float, ...] = ()
    rho_of: str = ""
    flags: str = ""


class Experiment:
    """A recipe, a table of methods, and the finished runs of both stages.

    Args:
        directory: holds NAME.yaml, the recipe, and methods.yaml: `methods` by name, `choose` with the flags of the
            runs that choose rho (--train-split, --val-split), and the number of `seeds` on the test set.
        output: directory of the runs, `choose/METHOD/` and `test/METHOD/`.
        train: further flags of train.py.
    """

    def __init__(self, directory: Path, output: Path, train: list[str], parallel: int = 1) -> None:
        try:
            table = yaml.safe_load((directory / "methods.yaml").read_text())
            rows = {name: row | {"rho": tuple(row.get("rho", ()))} for name, row in table["methods"].items()}
            self.methods = {name: Method(**row) for name, row in rows.items()}
            self.choose_flags = shlex.split(table.get("choose", ""))
            self.seeds = int(table.get("seeds", 3))
        except (OSError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{directory / 'methods.yaml'} is no table of methods: {error}") from None
        self.recipe = directory / f"{directory.name}.yaml"
        self.output, self.train, self.parallel = output.resolve(), train, parallel

    def sweep(self, name: str, stage: str, rhos: tuple[float | None, ...], seeds: int) -> Sweep:
        method = self.methods[name]
        flags = [*(self.choose_flags if stage == "choose" else []), *shlex.split(method.flags), *self.train]
        place = self.output / stage / name.replace(" ", "-")
        tried = {method.opt: rhos or (None,)}
        return Sweep(str(self.recipe), tried, range(seeds), place, flags, parallel=self.parallel)

    def choices(self, name: str) -> Sweep | None:
        """The runs on held-out images; None if there is nothing to choose."""
        rhos = self.methods[name].rho
        return self.sweep(name, "choose", rhos, 1) if len(rhos) > 1 else None

    def chosen_rho(self, name: str) -> tuple[float | None, ...] | None:
        """The rho that the held-out images choose, () to leave it to the recipe, None before all values are tried."""
        method = self.methods[name]
        if method.rho_of:
            return self.chosen_rho(method.rho_of)
        if (sweep := self.choices(name)) is None:
            return method.rho
        scores = sweep.scores()
        return None if len(scores) < len(method.rho) else (max(scores, key=lambda score: score.merit).rho,)

    def run(self, names: list[str], choose_only: bool = False) -> None:
        """Run what is missing. Seeds are the outer loop, so that a complete table exists as early as possible."""
        for name in dict.fromkeys(self.methods[name].rho_of or name for name in names):
            if (sweep := self.choices(name)) is not None:
                finish(f"{name}: choosing rho", sweep)
        for seeds in [] if choose_only else range(1, self.seeds + 1):
            for name in names:
                rho = self.chosen_rho(name)
                assert rho is not None
                finish(f"{name}: test set", self.sweep(name, "test", rho, seeds))

    def content(self) -> Content:
        """Finished runs on the test set, and the scores of both stages."""
        content = Content()
        for name in self.methods:
            choices, rho = self.choices(name), self.chosen_rho(name)
            scores = choices.scores() if choices is not None else []
            for score in scores:
                score.held_out = True
            if rho is not None:
                sweep = self.sweep(name, "test", rho, self.seeds)
                finished = [job.name for job in sweep.jobs if sweep.result(job) is not None]
                runs = [read_run(sweep.output / job, self.output) for job in finished]
                for run in runs:
                    run.method = name
                tested = sweep.scores()
                for score in tested:
                    score.costs["flops"] = [run.cost["flops"] for run in runs if "flops" in run.cost]
                content.runs += runs
                scores += tested
            for score in scores:
                score.method = name
            content.scores += scores
        return content


def finish(title: str, sweep: Sweep) -> None:
    print(f"{title}: {sweep.output}", flush=True)
    if unfinished := sweep.run():
        log = sweep.output / unfinished[0] / "sweep.log"
        raise RunError(f"{len(unfinished)} runs did not finish, see {log}; start the command again to continue")


def row_text(name: str, scores: list[Score]) -> str:
    test = next((score for score in scores if not score.held_out), None)
    rho = "-" if test is None or test.rho is None else f"{test.rho:g}"
    result = "-" if test is None else f"{test.text} of {len(test.values)}"
    choices = ", ".join(f"{score.rho:g}: {score.mean:.2f}" for score in scores if score.held_out)
    return f"{name:24} rho {rho:6} {result:24} {choices}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiment", type=Path, help="tradeoff, noisy_labels, or the directory of another experiment")
    add("--data-dir", type=Path, help="directory of the data set, as for train.py")
    add("--output", type=Path, help="default: output/experiments/NAME")
    add("--jobs", type=int, default=1, help="number of runs at a time")
    add("--seeds", type=int, help="seeds on the test set (default: those of methods.yaml)")
    add("--only", help="comma-separated methods (default: all)")
    add("--choose-only", action="store_true", help="stop before the test set is used")
    add("--table", action="store_true", help="run nothing; collect what is finished")
    args = parse_before_dashes(parser, argv, "samon-train")
    directory = args.experiment if args.experiment.is_dir() else HERE / args.experiment
    train = [*(["--data-dir", str(args.data_dir)] if args.data_dir else []), *args.after]
    output = args.output or Path("output/experiments") / directory.name
    experiment = Experiment(directory.resolve(), output, train, args.jobs)
    experiment.seeds = args.seeds or experiment.seeds
    names = args.only.split(",") if args.only else list(experiment.methods)
    if unknown := set(names) - set(experiment.methods):
        raise UserError(f"--only: unknown {', '.join(sorted(unknown))}; known are {', '.join(experiment.methods)}")
    require_matplotlib()
    from samon.report.draw import write_figures

    if not args.table:
        experiment.run(names, args.choose_only)
    content = experiment.content()
    (output / "figures").mkdir(parents=True, exist_ok=True)
    export(content, output / "results.json")
    write_figures(Content(scores=content.scores), output / "figures")
    for name in experiment.methods:
        print(row_text(name, [score for score in content.scores if score.method == name]))


if __name__ == "__main__":
    run_script(main)
