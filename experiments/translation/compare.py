"""Adam, SAM and SAM-ON side by side: `python -m experiments.translation.compare --output output/translation`.

Rho is chosen by the validation BLEU of seed 0 after half of the epochs; then every seed runs to the end and the test
split is translated once, with a beam of 5. A second start resumes, without finished runs; it refuses runs of another
recipe. `--only SAM` runs one method; `results.json` in --output has the finished ones.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from experiments.translation import train
from experiments.translation.evaluate import evaluate, read_checkpoint
from experiments.translation.settings import Settings, load_settings
from samon import UserError
from samon.cli.program import run_script
from samon.files import write_text

METHODS: dict[str, tuple[str, tuple[float, ...]]] = {  # optimizer, and candidates of rho
    "Adam": ("adamw", ()),
    "SAM": ("sam-adamw", (0.01, 0.05)),
    "SAM-ON": ("samon-adamw", (0.02, 0.1)),
}


def read_log(directory: Path) -> list[dict[str, float]]:
    """A row for each finished epoch."""
    path = directory / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_settings(directory: Path, settings: Settings) -> None:
    """Check that the run in a directory, if there is one, has these settings; it may have fewer epochs.

    Raises:
        UserError: it was made with others.
    """
    checkpoints = (directory / "last.pt", directory / "best.pt")  # the last one may be deleted after the run
    for path in [path for path in checkpoints if path.exists()][:1]:
        stored, _, _ = read_checkpoint(path)
        if replace(stored, epochs=settings.epochs) != settings or stored.epochs > settings.epochs:
            source = "comes from another recipe or other arguments"
            raise UserError(f"the run in {directory} {source}; use another --output or remove it")


def train_until(directory: Path, args: argparse.Namespace, opt: str, rho: float | None, seed: int, epochs: int) -> None:
    """Start or resume a run and train it to the given epoch, unless --table."""
    check_settings(directory, load_settings(str(args.config), {"opt": opt, "rho": rho, "seed": seed}))
    if args.table or len(read_log(directory)) >= epochs:
        return
    (directory / "test.json").unlink(missing_ok=True)  # of the run before it is extended
    words = ["-c", str(args.config), "--opt", opt, "--seed", str(seed), "--output", str(directory)]
    words += [] if rho is None else ["--rho", str(rho)]
    words = ["--resume", str(directory)] if (directory / "last.pt").exists() else words
    train.main([*words, "--epochs", str(epochs)])


def method(name: str, args: argparse.Namespace, epochs: int) -> dict[str, object]:
    """The row of a method, after its missing runs."""
    opt, rhos = METHODS[name]
    valid_bleu: dict[float | None, float] = {}
    for rho in rhos:
        directory = args.output / f"{name}-rho{rho:g}-seed0"
        train_until(directory, args, opt, rho, 0, epochs // 2)
        for line in read_log(directory):
            if line["epoch"] + 1 == epochs // 2:
                valid_bleu[rho] = line["valid_bleu"]
    test_bleu: list[float] = []
    row: dict[str, object] = {"method": name, "opt": opt}
    row |= {"valid_bleu_by_rho": {f"{rho:g}": bleu for rho, bleu in valid_bleu.items()}, "test_bleu": test_bleu}
    if len(valid_bleu) < len(rhos):
        return row
    row["rho"] = chosen = max(valid_bleu, key=valid_bleu.__getitem__, default=None)
    for seed in range(args.seeds):
        directory = args.output / ("-".join([name, *([] if chosen is None else [f"rho{chosen:g}"]), f"seed{seed}"]))
        train_until(directory, args, opt, chosen, seed, epochs)
        if len(read_log(directory)) < epochs:
            continue
        path = directory / "test.json"
        if not path.exists():
            write_text(path, json.dumps(evaluate(directory / "best.pt", "test", 5), indent=1))
        result = json.loads(path.read_text())
        test_bleu.append(result["bleu"])
        row |= {"bleu_of_copying": result["bleu_of_copying"], "pairs": result["pairs"]}
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", type=Path, default=Path(__file__).with_name("django.yaml"))
    parser.add_argument("--output", type=Path, default=Path("output/translation"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default=",".join(METHODS), help="methods, with commas")
    parser.add_argument("--table", action="store_true", help="only write results.json from the finished runs")
    args = parser.parse_args(arguments)
    epochs = load_settings(str(args.config), {}).epochs
    names = set(args.only.split(","))
    if unknown := names - METHODS.keys():
        raise UserError(f"--only: unknown {', '.join(sorted(unknown))}; known are {', '.join(METHODS)}")
    rows = [method(name, args, epochs) for name in METHODS if name in names]
    args.output.mkdir(parents=True, exist_ok=True)
    if names == set(METHODS):
        write_text(args.output / "results.json", json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    run_script(main)
