"""Adam, SAM and SAM-ON side by side: `python -m experiments.translation.compare --output output/translation`.

Rho is chosen by the validation BLEU of seed 0 after half of the epochs; then every seed runs to the end and the test
split is translated once, with a beam of 5. A second start resumes, without finished runs. `--only SAM` runs one method;
`results.json` in --output has the finished ones.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.translation import train
from experiments.translation.evaluate import evaluate
from experiments.translation.settings import load_settings
from samon.cli.program import run_script
from samon.files import write_text

METHODS: dict[str, tuple[str, tuple[float, ...]]] = {  # optimizer, and candidates of rho
    "Adam": ("adamw", ()),
    "SAM": ("sam-adamw", (0.01, 0.05)),
    "SAM-ON": ("samon-adamw", (0.02, 0.1)),
}


def log_of(directory: Path) -> list[dict[str, Any]]:
    path = directory / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained(directory: Path, args: argparse.Namespace, opt: str, rho: float | None, seed: int, epochs: int) -> None:
    """Start or resume a run and train it to the given epoch."""
    done = len(log_of(directory))
    if done < epochs:
        how = ["--rho", str(rho)] if rho is not None else []
        fresh = ["-c", str(args.config), "--opt", opt, *how, "--seed", str(seed), "--output", str(directory)]
        going = ["--resume", str(directory)] if (directory / "last.pt").exists() else fresh
        train.main([*going, "--epochs", str(epochs)])


def method(name: str, args: argparse.Namespace, epochs: int) -> dict[str, Any]:
    """The row of a method, after its missing runs (none with --table)."""
    opt, rhos = METHODS[name]
    held: dict[str, float] = {}
    for rho in rhos:
        directory = args.output / f"{name}-rho{rho:g}-seed0"
        if not args.table:
            trained(directory, args, opt, rho, 0, epochs // 2)
        lines = [line for line in log_of(directory) if line["epoch"] + 1 == epochs // 2]
        held |= {f"{rho:g}": line["valid_bleu"] for line in lines}
    row: dict[str, Any] = {"method": name, "opt": opt, "valid_bleu_by_rho": held, "test_bleu": []}
    if len(held) < len(rhos):
        return row
    chosen: float | None = float(max(held, key=held.__getitem__)) if held else None
    row["rho"] = chosen
    for seed in range(args.seeds):
        directory = args.output / (f"{name}-rho{chosen:g}-seed{seed}" if chosen is not None else f"{name}-seed{seed}")
        if not args.table:
            trained(directory, args, opt, chosen, seed, epochs)
        if len(log_of(directory)) < epochs:
            continue
        scored = directory / "test.json"
        if not scored.exists():
            write_text(scored, json.dumps(evaluate(directory / "best.pt", "test", 5, None), indent=1))
        found = json.loads(scored.read_text())
        row["test_bleu"].append(found["bleu"])
        row["bleu_of_copying"], row["pairs"] = found["bleu_of_copying"], found["pairs"]
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
    rows = [method(name, args, epochs) for name in METHODS if name in args.only.split(",")]
    args.output.mkdir(parents=True, exist_ok=True)
    if set(args.only.split(",")) == set(METHODS):
        write_text(args.output / "results.json", json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    run_script(main)
