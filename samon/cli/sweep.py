#!/usr/bin/env python3
"""Train a recipe over optimizers x rho x seeds and tabulate the accuracies as the paper's Table 1 does.

    samon-sweep -c hparams/cifar/cifar100_resnet.yaml --opts sgd,sam,samon --seeds 3 -- --data-dir DIR
    samon-sweep -c hparams/quickstart.yaml --opts sgd,sam,samon --rho 0.05,0.1 --jobs 2 -- --epochs 3

What follows `--` goes to every train.py. rho is taken from the recipe's grid in hparams/rho_grids.yaml (`--grid`),
from `--rho 0.1,0.5`, or left to the recipe with `--rho recipe`. Every run has its own directory under --output.
Start it again after an interruption: finished runs are skipped, dead ones continue from their last state, and runs
that another sweep is doing are left to it.
"""

import argparse
import fcntl
import hashlib
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import yaml

from samon import UserError, is_sam_name
from samon.cli.dashes import parse_up_to_dashes
from samon.cli.program import run_script
from samon.cli.tables import Cell, write_tables
from samon.errors import RunError, Stopped
from samon.files import write_text
from samon.progress import is_terminal, metric_format, progress_bar
from samon.registry import VARIANTS
from samon.trainer.config import RECIPES, Config, load_yaml, parse, recipe
from samon.trainer.state import find_newest


@dataclass(frozen=True)
class Job:
    """One training run."""

    opt: str
    rho: float | None
    seed: int

    @property
    def name(self) -> str:
        rho = "" if self.rho is None else f"-rho{self.rho:g}"
        return f"{self.opt}{rho}-seed{self.seed}"

    def arguments(self, args: argparse.Namespace) -> list[str]:
        rho = [] if self.rho is None else ["--rho", str(self.rho)]
        given = ["-c", args.config, "--opt", self.opt, *rho, "--seed", str(self.seed), *args.train]
        return [*given, "--output", str(args.output), "--experiment", self.name]


# --- what to run ------------------------------------------------------------------------------------------------------


def split_list(text: str, kind: Callable[[str], Any], flag: str) -> list[Any]:
    try:
        values = [kind(part) for part in text.split(",") if part]
    except ValueError:
        raise UserError(f"{flag} {text!r} is not a list such as 1,2,3") from None
    if not values or len(set(values)) != len(values):
        raise UserError(f"{flag} {text!r} is empty or names something twice")
    return values


def grid_of(opt: str, args: argparse.Namespace) -> list[float | None]:
    """The values of rho to try for an optimizer: one None for those that have none, or whose recipe says it."""
    if not is_sam_name(opt) or args.rho == "recipe":
        return [None]
    if args.rho:
        return list(split_list(args.rho, float, "--rho"))
    grids = load_yaml(args.grids, "--grids")
    stem = Path(args.config).stem
    name = args.grid or max((key for key in grids if stem.startswith(key)), key=len, default="")
    if name not in grids:
        raise UserError(f"{args.grids} has no grid {args.grid or stem!r} but {', '.join(grids)}; use --grid or --rho")
    variant = VARIANTS[opt]
    row = "-".join(part for part in (variant.scope, variant.geometry) if part)
    if row not in grids[name] or variant.mask:
        raise UserError(f"grid {name} of {args.grids} has no values for {opt}; use --rho")
    return list(grids[name][row])


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """All runs of the sweep, seeds outermost, so that a table of all columns exists as early as possible."""
    opts = split_list(args.opts, str, "--opts")
    seeds = list(range(int(args.seeds))) if args.seeds.isdigit() else split_list(args.seeds, int, "--seeds")
    if not seeds:
        raise UserError("--seeds 0 leaves nothing to run; give a number of seeds, or a list such as 5,7,")
    for opt in opts:
        settings(args, opt)
    grids = {opt: grid_of(opt, args) for opt in opts}
    return [Job(opt, rho, seed) for seed in seeds for opt in opts for rho in grids[opt]]


def settings(args: argparse.Namespace, opt: str) -> Config:
    """The resolved configuration of a run: a mistake in recipe or arguments shows before anything is started."""
    return parse(["-c", args.config, "--opt", opt, *args.train, "--print-config"])


# --- running ----------------------------------------------------------------------------------------------------------


def recipe_text(path: Path) -> str:
    """The recipe, and the one that it is based on."""
    text = path.read_text()
    base = (yaml.safe_load(text) or {}).get("base")
    return text if base is None else text + recipe_text(path.parent / base)


def fingerprint(job: Job, args: argparse.Namespace) -> str:
    """What decides a run's result: the recipe's text and train.py's arguments, not where it writes."""
    content = [recipe_text(recipe(args.config)), job.opt, str(job.rho), str(job.seed), str(args.nproc), *args.train]
    return hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]


def finished(job: Job, args: argparse.Namespace) -> dict[str, Any] | None:
    """The run's metrics if it has ended; an error if they come from other settings."""
    result = result_of(job, args)
    return None if result is None else result["metrics"]


def result_of(job: Job, args: argparse.Namespace) -> dict[str, Any] | None:
    """What `run_job` has kept of a run: its metrics and what it cost."""
    path = args.output / job.name / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if result["fingerprint"] != fingerprint(job, args):
        raise UserError(f"{path} comes from another recipe or other arguments; use another --output or remove it")
    return result


def command(job: Job, args: argparse.Namespace) -> list[str]:
    """train.py alone, or under torchrun; continuing if a state of this run is there."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.nproc)]
    start = start if args.nproc > 1 else [sys.executable]
    directory = args.output / job.name
    resume = ["--resume", str(directory)] if find_newest(directory)[0] else ["--overwrite"]
    return [*start, "-m", "samon.cli.train", *job.arguments(args), *resume]


class Processes:
    """Process ids of the runs that are going on, so that all of them can be asked to save and end."""

    def __init__(self) -> None:
        self.ids: set[int] = set()
        self.stopping = False

    def stop(self) -> None:
        """Send SIGTERM: a run saves its state and ends; sent again, it ends at once."""
        self.stopping = True
        for process_id in tuple(self.ids):
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGTERM)


def run_job(job: Job, args: argparse.Namespace, gpus: "queue.Queue[str] | None", processes: Processes) -> str:
    """Run to the end, with retries. Returns: 'done', 'skipped', 'elsewhere', 'stopped' (by a signal) or 'dead'."""
    directory = args.output / job.name
    directory.mkdir(parents=True, exist_ok=True)
    with (args.output / f"{job.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "elsewhere"
        if finished(job, args) is not None:
            return "skipped"
        gpu = gpus.get() if gpus else None
        try:
            for _ in range(1 + args.retries):
                status, result = attempt(job, args, gpu, lock.fileno(), processes)
                if result is not None:
                    content = {"fingerprint": fingerprint(job, args), **result}
                    write_text(directory / "result.json", json.dumps(content, indent=1))
                    return "done"
                if status > 128 or processes.stopping:
                    return "stopped"
        finally:
            if gpus and gpu is not None:
                gpus.put(gpu)
    return "dead"


def attempt(
    job: Job, args: argparse.Namespace, gpu: str | None, lock: int, processes: Processes
) -> tuple[int, dict[str, Any] | None]:
    """One start of train.py: its exit status, its last line's metrics and what it cost, or None if it died.

    The run inherits the lock, so a sweep that is killed while its run lives on does not free the directory. It has a
    session of its own: a terminal's Ctrl-C reaches it through `Processes` alone, as a second signal would end it
    before its state is saved."""
    env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    words = command(job, args)
    how: dict[str, Any] = {"text": True, "env": env, "pass_fds": [lock], "start_new_session": True}
    with (
        (args.output / job.name / "sweep.log").open("a") as log,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, **how) as process,
    ):
        processes.ids.add(process.pid)
        if processes.stopping:
            process.terminate()
        assert process.stdout is not None
        lines = process.stdout.read().strip().splitlines()
        _, status, used = os.wait4(process.pid, 0)  # the processor time of this run alone, however busy the machine is
        processes.ids.remove(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not lines:
        return process.returncode, None
    cost = {"cpu_seconds": round(used.ru_utime + used.ru_stime, 2), "resumed": "--resume" in words}
    return 0, {"metrics": json.loads(lines[-1]), **cost}


def run_all(jobs: list[Job], args: argparse.Namespace) -> list[str]:
    """Run all jobs, --jobs at a time; returns the names of those that died or were stopped."""
    gpus: queue.Queue[str] | None = queue.Queue() if args.gpus else None
    if gpus:
        for gpu in islice(cycle(args.gpus.split(",")), args.jobs):
            gpus.put(gpu)
    states: dict[str, str] = {}
    processes = Processes()
    before = sum(finished(job, args) is not None for job in jobs)
    shown = progress_bar(
        "sweep", len(jobs), "run", initial=before, show=is_terminal()
    )  # elsewhere the lines below are enough

    def one(job: Job) -> None:
        state = run_job(job, args, gpus, processes)
        with shown.external_write_mode(file=sys.stderr):  # one thread at a time
            states[job.name] = state
            shown.update(state != "skipped")
            metric = finished(job, args) if state in ("done", "skipped") else None
            value = f" {args.metric} {metric[args.metric]:{metric_format(args.metric)}}" if metric else ""
            if state == "dead":
                value = f" ({last_line(args.output / job.name / 'sweep.log')})"
            print(f"[{len(states)}/{len(jobs)}] {job.name}: {state}{value}", file=sys.stderr, flush=True)

    with shown, ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # Ctrl-C, or a directory that cannot be written to
            stop(pool, processes)
            raise
    return [name for name, state in states.items() if state in ("dead", "stopped")]


def stop(pool: ThreadPoolExecutor, processes: Processes) -> None:
    """Start nothing more and wait until the runs have saved their states; at another Ctrl-C they end at once."""
    pool.shutdown(wait=False, cancel_futures=True)
    processes.stop()
    try:
        pool.shutdown()
    except KeyboardInterrupt:
        processes.stop()


def last_line(path: Path) -> str:
    """Why a run died, from its log; a full disk leaves the log empty."""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"no message; {shutil.disk_usage(path).free:,} bytes are free for {path}"


def collect(jobs: list[Job], args: argparse.Namespace) -> list[Cell]:
    """Finished runs by optimizer and rho, in the sweep's order."""
    cells: dict[tuple[str, float | None], Cell] = {}
    for job in jobs:
        result = result_of(job, args)
        if result is not None:
            cell = cells.setdefault((job.opt, job.rho), Cell(job.opt, job.rho, [], metric=args.metric))
            cell.values.append(float(result["metrics"][args.metric]))
            cell.cpu_seconds.append(None if result.get("resumed", True) else result["cpu_seconds"])
    return list(cells.values())


# --- the command ------------------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-c", "--config", required=True, help="recipe, as for train.py")
    add("--opts", required=True, help="optimizer names, with commas")
    add("--seeds", default="3", help="number of seeds (0, 1, ...), or a list such as 5,7,")
    add("--rho", default="", help="values for every sharpness-aware optimizer; `recipe` for its own")
    add("--grid", default="", help="name of a grid; the one the recipe's name begins with if not given")
    add("--grids", default=str(RECIPES / "rho_grids.yaml"), help="file of grids")
    add("--output", type=Path, default=None, help="default: output/sweep/<recipe>")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--gpus", default="", help="GPUs to spread the jobs over, such as 0,1,2,3")
    add("--nproc", type=int, default=1, help="processes of each run (torchrun)")
    add("--retries", type=int, default=1, help="further starts of a run that dies")
    metrics = ("eval_top1", "eval_top5", "eval_loss", "train_loss")
    add("--metric", default="eval_top1", choices=metrics, help="which of the final metrics to tabulate")
    add("--dry-run", action="store_true", help="print the commands and which are finished")
    args = parse_up_to_dashes(parser, argv, "samon-train")
    args.train = args.after
    args.output = (args.output or Path("output/sweep") / Path(args.config).stem).resolve()
    for flag in ("--opt", "--rho", "--seed", "--output", "--experiment", "--resume", "-c", "--config"):
        if flag in [word.split("=")[0] for word in args.train]:
            raise UserError(f"{flag} after -- is the sweep's to set")
    if args.jobs < 1 or args.nproc < 1:
        raise UserError("--jobs and --nproc must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    jobs = jobs_of(args)
    if args.dry_run:
        for job in jobs:
            print(f"{'finished' if finished(job, args) else 'to run':8}  {shlex.join(command(job, args))}")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        dead = run_all(jobs, args)
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, "start the sweep again to go on") from None
    finally:
        if cells := collect(jobs, args):
            about = {"config": args.config, "model": settings(args, jobs[0].opt).model, "metric": args.metric}
            print(write_tables(args.output, cells, about | {"train": args.train}), end="")
    if dead:
        logs = args.output / dead[0] / "sweep.log"
        raise RunError(f"{len(dead)} of {len(jobs)} runs did not end, see {logs}; start the sweep again to go on")


if __name__ == "__main__":
    run_script(main)
