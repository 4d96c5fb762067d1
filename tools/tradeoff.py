#!/usr/bin/env python3
"""Accuracy against cost on CIFAR-10: every method with rho chosen on held-out images, then three seeds on the test set.

    python tools/tradeoff.py --data-dir DIR --output output/tradeoff [--jobs 2] [--only SAM-ON,SGD] [--table]

DIR/cifar10.npz holds the arrays (hparams/tradeoff.yaml). First the last 5,000 training images choose rho (one
seed), then all 50,000 train and the 10,000 test images are scored once a run. Each method is a sweep of its own under
--output: start it again to go on. `--table` prints what is finished.

hparams/tradeoff_noise.yaml is a second experiment, and says how it is run.
"""

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samon.cli import sweep
from samon.cli.program import run_script
from samon.cli.tables import Cell
from samon.errors import UserError
from samon.files import write_text

RECIPE = Path(__file__).resolve().parents[1] / "hparams/tradeoff.yaml"


@dataclass(frozen=True)
class Method:
    """A row of the table: its optimizer, the values of rho to choose from, and what else train.py gets."""

    opt: str
    rhos: str = ""  # as sweep.py's --rho; nothing to choose where it is empty
    train: tuple[str, ...] = ()
    rho_of: str = ""  # the method whose choice it takes, where it perturbs as that one does


ON = "0.02,0.1,0.5"
METHODS = {
    "SGD": Method("sgd"),
    "SAM": Method("sam", "0.02,0.05"),
    "SAM-ON": Method("samon", ON),
    "SAM no-norm": Method("samnn", "0.02,0.05"),
    "SAM-ON previous": Method("samon", ON, ("--ascent", "previous")),
    "SAM-ON momentum": Method("samon", ON, ("--ascent", "momentum")),
    "SAM-ON every 5th": Method("samon", "", ("--ascent", "every:5"), rho_of="SAM-ON"),
    "SAM-ON adaptive": Method("samon", "", ("--ascent", "adaptive"), rho_of="SAM-ON"),
}


def swept(name: str, stage: str, rhos: str, seeds: int, args: argparse.Namespace, run: bool) -> list[Cell]:
    """The runs of a method in a stage, finished first if asked to."""
    method = METHODS[name]
    split = ["--train-split", args.choose_train, "--val-split", args.choose_val] if stage == "choose" else []
    words = ["-c", str(args.config), "--opts", method.opt, "--seeds", str(seeds), "--jobs", str(args.jobs)]
    words += ["--rho", rhos or "recipe", "--output", str(args.output / stage / name.replace(" ", "-"))]
    words += ["--", "--data-dir", str(args.data_dir), *split, *method.train, *args.train]
    if run:
        print(f"{name}: {stage}: {shlex.join(['python', 'tools/sweep.py', *words])}", flush=True)
        sweep.main(words)
    parsed = sweep.arguments(words)
    return sweep.collect(sweep.jobs_of(parsed), parsed)


def rhos_of(name: str, args: argparse.Namespace) -> str:
    """The values of rho to choose from."""
    return (args.rhos or METHODS[name].rhos) if METHODS[name].rhos else ""


def rho_of(name: str, args: argparse.Namespace, run: bool) -> str | None:
    """The rho that the held-out images choose; '' where there is nothing to choose, None before all are tried."""
    if METHODS[name].rho_of:
        return rho_of(METHODS[name].rho_of, args, run)
    rhos = rhos_of(name, args)
    if "," not in rhos:
        return rhos
    cells = swept(name, "choose", rhos, 1, args, run)
    if len(cells) < rhos.count(",") + 1:
        return None
    return f"{max(cells, key=lambda cell: cell.mean).rho:g}"


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is finished: a row for each method with its choice of rho, test accuracies and processor times."""
    found = []
    for name in METHODS:
        method, rho, rhos = METHODS[name], rho_of(name, args, run=False), rhos_of(name, args)
        chosen = swept(name, "choose", rhos, 1, args, False) if "," in rhos else []
        tested = [] if rho is None else swept(name, "test", rho, args.seeds, args, False)
        if chosen or tested:
            row: dict[str, Any] = {"method": name, "opt": method.opt, "train": list(method.train), "rho": rho}
            row["recipe"] = args.config.stem
            row["choose"] = {f"{cell.rho:g}": cell.mean for cell in chosen}
            row |= {"top1": tested[0].values, "cpu_seconds": tested[0].cpu_seconds} if tested else {}
            row |= {"mean": tested[0].mean, "std": tested[0].std} if tested else {}
            found.append(row)
    return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", type=Path, default=RECIPE)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("output/tradeoff"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", default=",".join(METHODS), help="methods, with commas")
    parser.add_argument("--rhos", help="values of rho to choose from, in place of the methods' own")
    parser.add_argument("--choose-train", default="train[:45000]", help="images to train on where rho is chosen")
    parser.add_argument("--choose-val", default="train[45000:]", help="images that choose rho")
    parser.add_argument("--choose-only", action="store_true", help="stop before the test set is touched")
    parser.add_argument("--table", action="store_true", help="run nothing; write results.json of what is finished")
    parser.add_argument("train", nargs="*", help="behind --: further arguments of every train.py")
    args = parser.parse_args(argv)
    strange = set(args.only.split(",")) - set(METHODS)
    if strange:
        raise UserError(f"--only: unknown {', '.join(sorted(strange))}; there are {', '.join(METHODS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if not args.table:
        chosen = {name: rho_of(name, args, run=True) for name in args.only.split(",")}
        for seeds in [] if args.choose_only else range(1, args.seeds + 1):  # a whole table as early as possible
            for name, rho in chosen.items():
                swept(name, "test", rho or "", seeds, args, run=True)
    args.output.mkdir(parents=True, exist_ok=True)
    found = rows(args)
    write_text(args.output / "results.json", json.dumps(found, indent=1) + "\n")
    for row in found:
        top1 = f"{row['mean']:.2f}±{row['std']:.2f} of {len(row['top1'])}" if "mean" in row else "-"
        print(f"{row['method']:24} rho {row['rho'] or '-':6} top1 {top1:20} {row['choose']}")


if __name__ == "__main__":
    run_script(main)
