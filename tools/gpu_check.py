#!/usr/bin/env python3
"""The stages of tools/gpu_check.sh: each one command with a time limit, a log and a stored result.

Args: see tools/gpu_check.sh.
"""

import argparse
import importlib.util
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch

from samon.cli.program import run_script
from samon.errors import RunError
from samon.files import markdown_table

STEP_ROWS = r"^SAM, all|^SAM-ON, m = \d+(, groups)?$|layer4|blocks|ascent previous"
COMPILED_ROWS = r"^SAM, all|^SAM-ON, m = {batch}$|ascent previous"  # every other variant compiles graphs of its own
MODELS = {"resnet50": 128, "vit_small_patch32_224": 256}  # batch sizes at 224 px; four times that from 40 GB
TESTS_SECONDS = 180.0


@dataclass(frozen=True)
class Stage:
    """A command, and how many seconds it may take."""

    name: str
    command: list[str]
    seconds: float


class Result(NamedTuple):
    """How a stage ended: the exit code and its time."""

    name: str
    code: int
    seconds: float


def stages(args: argparse.Namespace, seconds_of: dict[str, float]) -> Iterator[Stage]:
    """The stages in order.

    Args:
        seconds_of: how long the finished stages took; the training takes the time that is left.
    """
    device = "cpu" if args.dry_run else "cuda"
    marked = ["-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "tests/test_two_pass_cuda.py"]
    marked += ["-v", f"--session-timeout={TESTS_SECONDS - 15}"]  # what failed is reported
    if importlib.util.find_spec("xdist") is not None and not args.dry_run:
        marked += ["-n", "4", "-p", "no:benchmark"]  # compiling takes most of the time
    yield Stage("tests", [sys.executable, *marked], TESTS_SECONDS)
    large = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 40e9
    for model, smallest in MODELS.items():
        batch = 4 * smallest if large else smallest
        for compiled in (False, True):
            name = f"step-{model}{'-compiled' if compiled else ''}"
            rows = COMPILED_ROWS.format(batch=batch) if compiled else STEP_ROWS
            sizes = ["--model", model, "--img-size", "224", "--batch-size", str(batch)]
            sizes += ["--m", str(batch), str(batch // 8)]
            if args.dry_run:
                sizes = ["--model", "test_resnet", "--img-size", "32", "--batch-size", "4", "--m", "4", "2"]
                sizes += ["--rounds", "1", "--no-memory"]
                rows = "^$" if compiled else rows  # compiling for the CPU takes half a minute for each variant
            command = [sys.executable, "tools/bench_step.py", *sizes, "--device", device, "--amp", "--channels-last"]
            command += ["--rows", rows, "--json", str(args.directory / f"{name}.json")]
            yield Stage(name, command + ["--compile"] * compiled, 300 if args.dry_run else 180 if compiled else 90)
    images = ["--images", "500", "--workers", "0"] if args.dry_run else ["--workers", "8"]
    yield Stage("loader", [sys.executable, "tools/bench_in_memory.py", "--device", device, *images], 60)
    if args.cifar is None:
        return
    yield training(args, "train-one-epoch", "adamw", 1)
    left = 60 * args.minutes - (time.monotonic() - args.began)
    epochs = 1 if args.dry_run else max(1, int(left / (2.67 * seconds_of["train-one-epoch"])))  # SAM-ON costs 1.67
    for opt in ("adamw", "samon-adamw"):
        yield training(args, f"train-{opt}", opt, epochs)


def training(args: argparse.Namespace, name: str, opt: str, epochs: int) -> Stage:
    """ViT-T on CIFAR-10."""
    command = [sys.executable, "train.py", "-c", "hparams/cifar/cifar10_vit.yaml", "--dataset", "npz/cifar10"]
    command += ["--data-dir", str(args.cifar), "--opt", opt, "--epochs", str(epochs)]
    command += ["--output", str(args.directory), "--experiment", name, "--overwrite"]
    if args.dry_run:
        command += ["--device", "cpu", "--train-num-samples", "128", "--val-num-samples", "64", "--no-amp"]
    return Stage(name, command, max(120, 60 * args.minutes))


def run(stage: Stage, directory: Path) -> Result:
    """Run a stage, or return the result of an earlier run."""
    path = directory / f"{stage.name}.result.json"
    if path.exists():
        return Result(**json.loads(path.read_text()))
    print(f"{stage.name}: at most {stage.seconds:.0f} s", flush=True)
    began = time.monotonic()
    with open(directory / f"{stage.name}.log", "w") as log:
        try:
            code = subprocess.run(stage.command, stdout=log, stderr=subprocess.STDOUT, timeout=stage.seconds).returncode
        except subprocess.TimeoutExpired:
            code = 124
    result = Result(stage.name, code, round(time.monotonic() - began, 1))
    if code in (0, 5):  # pytest: no test was selected
        path.write_text(json.dumps(result._asdict()))
    return result


def table(results: list[Result], directory: Path) -> str:
    """One Markdown table of all that was measured."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    rows = [["what", "result", "time", "peak MiB"]]
    for name, code, seconds in results:
        log = (directory / f"{name}.log").read_text().rstrip().splitlines()
        if code not in (0, 5):
            rows.append([name, f"failed ({code}): {log[-1] if log else ''}", f"{seconds} s", ""])
        elif name.startswith("step"):
            for row in json.loads((directory / f"{name}.json").read_text()):
                if "time_ratio" in row:
                    flops = f"{row['flops_ratio']:.3f}x FLOPs" if row["flops_ratio"] else ""
                    peak = f"{row['peak_mib']:.0f}" if row["peak_mib"] is not None else ""
                    what = f"{name.removeprefix('step-')}: {row['variant']}"
                    rows.append([what, flops, f"{row['time_ratio']:.2f}x, {row['ms']:.1f} ms", peak])
        elif name.startswith("train"):
            final = json.loads(log[-1])
            score = f"top-1 {final['eval_top1']:.2f} after {final['epoch'] + 1} epochs"
            rows.append([name, score, f"{seconds} s", ""])
        else:
            shown = [line for line in log if re.search(r"img/s|\d (passed|skipped)", line)] or log[-1:]
            rows += [[name, line.strip(), f"{seconds} s", ""] for line in shown]
    return f"{card}; {versions}\n\n{markdown_table(rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--cifar", type=Path, metavar="DATA_DIR", help="with cifar10.npz; no training without it")
    parser.add_argument("--minutes", type=float, default=10, help="time for all stages together")
    parser.add_argument("--dry-run", action="store_true", help="the same commands on the CPU, at the smallest sizes")
    args = parser.parse_args(argv)
    args.began, args.directory = time.monotonic(), args.directory.resolve()
    args.directory.mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        args.cifar = args.directory
        write_random_cifar(args.directory / "cifar10.npz")
    elif not torch.cuda.is_available():
        raise RunError("torch sees no CUDA device; --dry-run runs the same commands on the CPU")
    results: list[Result] = []
    seconds_of: dict[str, float] = {}
    for stage in stages(args, seconds_of):
        results.append(run(stage, args.directory))
        seconds_of[stage.name] = results[-1].seconds
    text = table(results, args.directory)
    (args.directory / "table.md").write_text(text + "\n")
    print(text)
    if failed := [result.name for result in results if result.code not in (0, 5)]:
        raise RunError(f"failed: {', '.join(failed)}; logs are in {args.directory}")


def write_random_cifar(path: Path) -> None:
    """Random images in CIFAR-10's layout."""
    rng = np.random.default_rng(0)
    x_train, x_test = (rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for n in (256, 64))
    np.savez(path, x_train=x_train, y_train=np.arange(256) % 10, x_test=x_test, y_test=np.arange(64) % 10)


if __name__ == "__main__":
    run_script(main)
