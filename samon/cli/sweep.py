"""Train a recipe over optimizers x rho x seeds and tabulate the accuracies in the layout of the paper's Table 1.

    samon-sweep -c hparams/cifar/cifar100_resnet.yaml --opts sgd,sam,samon --seeds 3 -- --data-dir DIR
    samon-sweep -c hparams/quickstart.yaml --opts sgd,sam,samon --rho 0.05,0.1 --jobs 2 -- --epochs 3

Flags after `--` go to every train.py. rho comes from the recipe's grid in hparams/rho_grids.yaml (`--grid`), from
`--rho 0.1,0.5`, or from the recipe itself with `--rho recipe`. Every run has its own directory under --output. After
an interruption, start the sweep again: it skips finished runs, resumes interrupted ones from their last checkpoint,
leaves runs of another sweep alone, and refuses a directory that has a run of another recipe or other flags.
"""

import argparse
import hashlib
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from types import FrameType
from typing import TypeVar

import yaml

from samon.cli.program import parse_before_dashes
from samon.cli.tables import write_tables
from samon.errors import RunError, Stopped, UserError, require_package
from samon.files import write_text
from samon.progress import is_terminal, metric_format, progress_bar
from samon.registry import variant_of
from samon.report.content import Json, Score
from samon.trainer.config import RECIPES, Config, find_recipe, load_yaml, parse
from samon.trainer.state import find_newest

T = TypeVar("T")
METRICS = ("eval_top1", "eval_top5", "eval_loss", "train_loss")
FINGERPRINT = "fingerprint.txt"  # of the settings with which the run in a directory was started last
SWEEP_FLAGS = {"--opt", "--rho", "--seed", "--output", "--experiment", "--resume", "-c", "--config"}


@dataclass(frozen=True)
class Job:
    """One training run of a sweep."""

    opt: str
    rho: float | None
    seed: int

    @property
    def name(self) -> str:
        rho = "" if self.rho is None else f"-rho{self.rho:g}"
        return f"{self.opt}{rho}-seed{self.seed}"


@dataclass
class Sweep:
    """Training runs of a recipe over optimizers, rho and seeds, each in its own directory under `output`.

    Attributes:
        rhos: values of rho to try for each optimizer; None leaves rho to the recipe.
        train: further flags of train.py.
        parallel: runs at a time, distributed over `gpus` if any are given.
        nproc: processes of each run.
    """

    config: str
    rhos: Mapping[str, Sequence[float | None]]
    seeds: Sequence[int]
    output: Path
    train: list[str] = field(default_factory=list)
    metric: str = "eval_top1"
    parallel: int = 1
    gpus: Sequence[str] = ()
    nproc: int = 1
    retries: int = 1

    def __post_init__(self) -> None:
        self.output = self.output.resolve()
        self._process_ids: set[int] = set()
        self._stopping = False
        self._devices: queue.Queue[str] = queue.Queue()
        for gpu in islice(cycle(self.gpus), self.parallel):
            self._devices.put(gpu)

    @property
    def jobs(self) -> list[Job]:
        """Seeds are the outer loop, so that a table with all columns exists as early as possible."""
        return [Job(opt, rho, seed) for seed in self.seeds for opt, rhos in self.rhos.items() for rho in rhos]

    def resolve(self, opt: str) -> Config:
        """The configuration of an optimizer's runs; a UserError of the recipe or the flags shows before any run."""
        return parse(["-c", self.config, "--opt", opt, *self.train, "--print-config"])

    def command(self, job: Job) -> list[str]:
        """The command of a run; it resumes if the run has a checkpoint."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.nproc)]
        words = [sys.executable, *(launcher if self.nproc > 1 else []), "-m", "samon.cli.train"]
        words += ["-c", self.config, "--opt", job.opt, *([] if job.rho is None else ["--rho", str(job.rho)])]
        words += ["--seed", str(job.seed), *self.train, "--output", str(self.output), "--experiment", job.name]
        directory = self.output / job.name
        return [*words, *(["--resume", str(directory)] if find_newest(directory) else ["--overwrite"])]

    def fingerprint(self, job: Job) -> str:
        """Hash of everything that decides a run's result: the text of the recipe and train.py's flags."""
        content = [_recipe_text(find_recipe(self.config)), job.opt, str(job.rho), str(job.seed), str(self.nproc)]
        return hashlib.sha256("\0".join([*content, *self.train]).encode()).hexdigest()[:16]

    def result(self, job: Job) -> Json | None:
        """`metrics`, `cpu_seconds` and `resumed` of a finished run, otherwise None.

        Raises:
            UserError: the run, finished or to be resumed, was made with other settings.
        """
        directory = self.output / job.name
        path, started = directory / "result.json", directory / FINGERPRINT
        result: Json | None = json.loads(path.read_text()) if path.exists() else None
        differs = not started.exists() or started.read_text().strip() != self.fingerprint(job)
        if differs and (result is not None or find_newest(directory)):  # without a checkpoint it starts over
            source = "comes from another recipe or other arguments"
            raise UserError(f"the run in {directory} {source}; use another --output or remove it")
        return result

    def scores(self) -> list[Score]:
        """Finished runs by optimizer and rho."""
        scores: dict[tuple[str, float | None], Score] = {}
        for job in self.jobs:
            if (result := self.result(job)) is not None:
                config, stem = self.resolve(job.opt), Path(self.config).stem
                base = config.base_opt or ""
                new = Score(job.opt, job.rho, [], job.opt, config.model, stem, self.metric, base_opt=base)
                score = scores.setdefault((job.opt, job.rho), new)
                score.values.append(float(result["metrics"][self.metric]))
                score.seeds.append(job.seed)
                if not result.get("resumed", True):  # a resumed run has spent more than was measured
                    score.costs.setdefault("cpu_seconds", []).append(result["cpu_seconds"])
        return list(scores.values())

    def stop(self) -> None:
        """Send SIGTERM to all runs: they save a checkpoint and end; sent again, they end at once."""
        self._stopping = True
        for process_id in tuple(self._process_ids):
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGTERM)

    def run_job(self, job: Job) -> str:
        """Run with retries. Returns 'done', 'skipped', 'elsewhere' (another sweep runs it), 'stopped' or 'dead'."""
        fcntl = require_package(
            "fcntl", "samon-sweep needs the file locks of Linux or macOS; start runs by samon-train"
        )
        directory = self.output / job.name
        directory.mkdir(parents=True, exist_ok=True)
        with (self.output / f"{job.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "elsewhere"
            if self.result(job) is not None:
                return "skipped"
            gpu = self._devices.get() if self.gpus else None
            try:
                for _ in range(1 + self.retries):
                    self.result(job)  # raises if the recipe was changed before a retry
                    status, result = self._start(job, gpu, lock.fileno())
                    if result is not None:
                        write_text(directory / "result.json", json.dumps(result, indent=1))
                        return "done"
                    if status > 128 or self._stopping:
                        return "stopped"
            finally:
                if gpu is not None:
                    self._devices.put(gpu)
        return "dead"

    def _start(self, job: Job, gpu: str | None, lock: int) -> tuple[int, Json | None]:
        """Run train.py once: its exit status, and the content of result.json if it succeeded.

        The run inherits the lock, so it keeps its directory even if the sweep is killed. It gets its own session, so
        that Ctrl-C reaches it only through `stop`: a second signal would end it before it has saved its state."""
        words = self.command(job)
        write_text(self.output / job.name / FINGERPRINT, self.fingerprint(job) + "\n")
        env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        with (
            (self.output / job.name / "sweep.log").open("a") as log,
            subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=log, text=True, env=env, pass_fds=[lock], start_new_session=True
            ) as process,
        ):
            self._process_ids.add(process.pid)
            if self._stopping:
                process.terminate()
            assert process.stdout is not None
            lines = process.stdout.read().strip().splitlines()
            _, status, used = os.wait4(process.pid, 0)  # the processor time of this run alone
            self._process_ids.remove(process.pid)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not lines:
            return process.returncode, None
        cost = {"cpu_seconds": round(used.ru_utime + used.ru_stime, 2), "resumed": "--resume" in words}
        return 0, {"metrics": json.loads(lines[-1]), **cost}


def run_jobs(jobs: Sequence[tuple[Sweep, Job]], parallel: int) -> list[Path]:
    """Run jobs of any sweeps in one pool, in this order; returns the directories of those that failed or were stopped.

    Raises:
        KeyboardInterrupt, Stopped: after Ctrl-C or SIGTERM, once all runs have saved a checkpoint and ended.
    """
    sweeps = list({id(sweep): sweep for sweep, _ in jobs}.values())
    for sweep in sweeps:
        sweep.output.mkdir(parents=True, exist_ok=True)
    states: dict[Path, str] = {}
    finished = sum(sweep.result(job) is not None for sweep, job in jobs)
    # Without a terminal the lines below are enough.
    bar = progress_bar("sweep", len(jobs), "run", initial=finished, show=is_terminal())

    def run_one(sweep: Sweep, job: Job) -> None:
        state = sweep.run_job(job)
        with bar.external_write_mode(file=sys.stderr):  # one thread at a time
            states[sweep.output / job.name] = state
            bar.update(state != "skipped")
            text = ""
            if state == "dead":
                text = f" ({last_line(sweep.output / job.name / 'sweep.log')})"
            elif state in ("done", "skipped") and (result := sweep.result(job)) is not None:
                text = f" {sweep.metric} {result['metrics'][sweep.metric]:{metric_format(sweep.metric)}}"
            title = f"{sweep.output.name}/{job.name}" if len(sweeps) > 1 else job.name
            print(f"[{len(states)}/{len(jobs)}] {title}: {state}{text}", file=sys.stderr, flush=True)

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number, "start it again to continue")

    before = signal.signal(signal.SIGTERM, stop)  # by default it would leave the runs behind
    with bar, ThreadPoolExecutor(parallel) as pool:
        try:
            for future in as_completed([pool.submit(run_one, sweep, job) for sweep, job in jobs]):
                future.result()
        except BaseException:  # Ctrl-C, SIGTERM, or a directory that cannot be written
            pool.shutdown(wait=False, cancel_futures=True)
            for sweep in sweeps:
                sweep.stop()
            with suppress(KeyboardInterrupt, Stopped):  # another signal ends the runs without saving
                pool.shutdown()
            for sweep in sweeps:
                sweep.stop()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    return [path for path, state in states.items() if state in ("dead", "stopped")]


def _recipe_text(path: Path) -> str:
    """The text of a recipe and of the recipes it is based on."""
    text = path.read_text()
    base = (yaml.safe_load(text) or {}).get("base")
    return text if base is None else text + _recipe_text(path.parent / base)


def last_line(path: Path) -> str:
    """The last line of a failed run's log, which a full disk leaves empty."""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"no message; {shutil.disk_usage(path).free:,} bytes are free for {path}"


def rho_grid(opt: str, config: str, rho: str, grid: str, grids_file: str) -> list[float | None]:
    """Values of rho to try for an optimizer, [None] if it has no rho or the recipe sets it."""
    variant = variant_of(opt)
    if variant is None or rho == "recipe":
        return [None]
    if rho:
        return list(split_list(rho, float, "--rho"))
    grids = load_yaml(grids_file, "--grids")
    stem = Path(config).stem
    name = grid or max((key for key in grids if stem.startswith(key)), key=len, default="")
    if name not in grids:
        raise UserError(f"{grids_file} has no grid {grid or stem!r} but {', '.join(grids)}; use --grid or --rho")
    row = "-".join(part for part in (variant.scope, variant.geometry) if part)
    if row not in grids[name] or variant.mask:
        raise UserError(f"grid {name} of {grids_file} has no values for {opt}; use --rho")
    return list(grids[name][row])


def split_list(text: str, kind: Callable[[str], T], flag: str) -> list[T]:
    """Parse a comma-separated list of different values."""
    try:
        values = [kind(part) for part in text.split(",") if part]
    except ValueError:
        raise UserError(f"{flag} {text!r} is not a list such as 1,2,3") from None
    if not values or len(set(values)) != len(values):
        raise UserError(f"{flag} {text!r} is empty or repeats a value")
    return values


def parse_arguments(argv: list[str] | None) -> tuple[Sweep, bool]:
    """The sweep, and whether --dry-run was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-c", "--config", required=True, help="recipe, as for train.py")
    add("--opts", required=True, help="comma-separated optimizer names")
    add("--seeds", default="3", help="number of seeds (0, 1, ...), or a list such as 5,7,")
    add("--rho", default="", help="values for every sharpness-aware optimizer; `recipe` for the recipe's own")
    add("--grid", default="", help="name of a grid (default: the grid whose name the recipe's name starts with)")
    add("--grids", default=str(RECIPES / "rho_grids.yaml"), help="file of grids")
    add("--output", type=Path, default=None, help="default: output/sweep/<recipe>")
    add("--jobs", type=int, default=1, help="number of runs at a time")
    add("--gpus", default="", help="GPUs to distribute the runs over, such as 0,1,2,3")
    add("--nproc", type=int, default=1, help="processes of each run (torchrun)")
    add("--retries", type=int, default=1, help="how often to restart a run that fails")
    add("--metric", default="eval_top1", choices=METRICS, help="which of the final metrics to tabulate")
    add("--dry-run", action="store_true", help="print the commands and which runs are finished")
    args = parse_before_dashes(parser, argv, "samon-train")
    # argparse takes `-cRECIPE` as one word, too
    if clash := SWEEP_FLAGS & {word.split("=")[0] if word.startswith("--") else word[:2] for word in args.after}:
        raise UserError(f"{min(clash)} after -- is set by the sweep; remove it")
    if args.jobs < 1 or args.nproc < 1:
        raise UserError("--jobs and --nproc must be at least 1")
    seeds = list(range(int(args.seeds))) if args.seeds.isdigit() else split_list(args.seeds, int, "--seeds")
    if not seeds:
        raise UserError("--seeds 0 leaves nothing to run; give a number of seeds, or a list such as 5,7,")
    opts = split_list(args.opts, str.lower, "--opts")
    output, gpus = args.output or Path("output/sweep") / Path(args.config).stem, [g for g in args.gpus.split(",") if g]
    settings = (args.metric, args.jobs, gpus, args.nproc, args.retries)
    sweep = Sweep(args.config, {}, seeds, output, args.after, *settings)
    validated = [bool(sweep.resolve(opt).val_split) for opt in opts]  # a mistake in any of the settings shows here
    if args.metric.startswith("eval_") and not all(validated):
        raise UserError(f"--metric {args.metric} needs validation; add --val-split, or use --metric train_loss")
    sweep.rhos = {opt: rho_grid(opt, args.config, args.rho, args.grid, args.grids) for opt in opts}
    return sweep, args.dry_run


def main(argv: list[str] | None = None) -> None:
    sweep, dry_run = parse_arguments(argv)
    if dry_run:
        for job in sweep.jobs:
            print(f"{'finished' if sweep.result(job) else 'to run':8}  {shlex.join(sweep.command(job))}")
        return
    try:
        unfinished = run_jobs([(sweep, job) for job in sweep.jobs], sweep.parallel)
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, "start the sweep again to continue") from None
    finally:
        if scores := sweep.scores():
            print(write_tables(sweep.output, scores), end="")
    if unfinished:
        log = unfinished[0] / "sweep.log"
        raise RunError(
            f"{len(unfinished)} of {len(sweep.jobs)} runs did not finish, see {log}; start the sweep again to continue"
        )
