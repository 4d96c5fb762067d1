#!/usr/bin/env python3
"""Kill training runs at every kind of moment and check that the resumed run ends with identical bits.

    python tools/check_interruptions.py  # 10 moments x {SIGTERM, SIGKILL one, all, a loader worker} x {1, 2} processes
    python tools/check_interruptions.py --processes 2 --kinds kill-one --moments 3 7

Real processes on the CPU, forked from one that has imported everything. A run that dies is started again with
`--resume DIR` (or from the start if it died before its first state), as a scheduler or torchrun would.
"""

import argparse
import faulthandler
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import torch
from torch.utils._pytree import tree_flatten

from samon.cli.program import run_script
from samon.trainer import checkpoint, logging, loop
from samon.trainer.build import Run
from samon.trainer.config import parse
from samon.trainer.main import train
from samon.trainer.run_dir import load_run_settings
from samon.trainer.state import Progress, Tree

ROOT = Path(__file__).resolve().parent.parent
# Processes are forked from a server that has imported what takes seconds to import.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["samon.trainer.main", "samon.cli.validate", "torch.utils.tensorboard", "webdataset"])
UPDATES = 6  # per epoch
FLAGS = f"""
--data-dir {ROOT}/data/fashion-mnist --dataset wds/fashion-mnist --num-classes 10 --in-chans 1 --img-size 32
--mean 0.286 --std 0.353 --val-num-samples 40 -j 1 -b 8 --grad-accum-steps 2 --epochs 3 --warmup-epochs 1 --lr 0.02
--sched-on-updates --model test_resnet --opt samon-layerl2-momentum --drop 0.1 --mixup 0.2 --reprob 0.2
--model-ema --model-ema-decay 0.9 --checkpoint-interval 2 --device cpu --sample-split"""
ARGS = FLAGS.split()
Moment = tuple[str, int, int]  # (event, epoch, update)
# Before the first update, right after an update, while a file is written, in validation.
MOMENTS: list[Moment] = [("start", 0, 0), ("update", 0, 1), ("update", 0, 3), ("write", 0, 4), ("update", 0, 6)]
MOMENTS += [("validate", 0, 6), ("write", 1, 0), ("update", 1, 2), ("update", 1, 5), ("validate", 2, 6)]
KINDS = ("term", "kill-one", "kill-all", "kill-worker")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _process(rank: int, world: int, port: int, argv: list[str], log: str, moment: Moment | None, number: int) -> None:
    """One training process; at `moment` it sends itself the signal, or with 0 kills its loader workers."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR2)  # prints where a process hangs
    multiprocessing.set_start_method("fork", force=True)  # for the data workers, which would inherit forkserver
    vars(torch.utils.data._utils)["MP_STATUS_CHECK_INTERVAL"] = 0.2  # seconds between checks for dead workers
    run_script(lambda: _train(argv, moment, lambda: _signal_group(number) if number else _kill_workers()))


def _signal_group(number: int) -> None:
    """Signal this process and its data workers from outside, as torchrun or Slurm would."""
    subprocess.run(["/bin/kill", f"-{number}", "--", f"-{os.getpgid(0)}"], start_new_session=True, check=True)


def _kill_workers() -> None:
    """Kill the data workers, as the system does when memory runs out."""
    for worker in multiprocessing.active_children():
        worker.kill()


def _train(argv: list[str], moment: Moment | None, fire: Callable[[], None]) -> None:
    """Train, and call `fire` when training reaches the moment."""
    where, epoch, update = moment or ("", -1, -1)

    def reach(kind: str, progress: Progress) -> None:
        if where == kind and (progress.epoch, progress.updates) == (epoch, update):
            fire()

    def reach_before(kind: str, function: Callable[..., object]) -> Callable[..., object]:
        """`function(run, ...)` that reaches the moment first."""

        def reaching(run: Run, *args: object) -> object:
            reach(kind, run.progress)
            return function(run, *args)

        return reaching

    def on_write(content: Tree, file: IO[bytes]) -> None:
        done = content["progress"]["epoch_done"]
        here = (content["epoch"] + 1, 0) if done else (content["epoch"], content["progress"]["updates"])
        if where == "write" and here == (epoch, update):
            file.write(b"half a file")
            file.flush()
            fire()
        torch.save(content, file)

    vars(logging)["step_flops"] = lambda run: None  # the count takes longer than the run
    if moment is not None:
        vars(checkpoint).update(torch=SimpleNamespace(**vars(torch) | {"save": on_write}))  # a fault in the writer
        for kind, name in (("start", "renew_mask"), ("validate", "validate")):
            vars(loop)[name] = reach_before(kind, vars(loop)[name])
    for _, progress, _ in train(parse(argv, load_run_settings)):
        reach("update", progress)


def launch(argv: list[str], world: int, log: Path, moment: Moment | None = None, kind: str = "") -> list[int | None]:
    """Exit codes of a run's processes. The last rank is hit by a kind of one (rank 0 where it is in a write)."""
    port = free_port()
    number = {"term": signal.SIGTERM, "kill-worker": 0}.get(kind, signal.SIGKILL)
    one = 0 if moment and moment[0] == "write" else world - 1
    victims = {one} if kind in ("kill-one", "kill-worker") else set(range(world))
    moments = [moment if rank in victims else None for rank in range(world)]
    args = [(rank, world, port, argv, str(log), moments[rank], number) for rank in range(world)]
    group = [CONTEXT.Process(target=_process, args=values) for values in args]
    for process in group:
        process.start()
    _watch(group)
    return [process.exitcode for process in group]


def _watch(group: Sequence[BaseProcess], limit: float = 240.0) -> None:
    """Wait for all; once one has died abnormally the others get a few seconds, as torchrun gives them."""
    end = time.monotonic() + limit
    while any(process.is_alive() for process in group) and time.monotonic() < end:
        if any(process.exitcode not in (None, 0) for process in group):
            end = min(end, time.monotonic() + 15)
        time.sleep(0.02)
    for process in group:
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGUSR2)
            time.sleep(0.5)
            process.kill()
        process.join()


def interrupted(directory: Path, world: int, moment: Moment, kind: str) -> str:
    """Run, die at the moment, continue to the end; returns what went wrong, or nothing."""
    argv = [*ARGS, "--output", str(directory.parent), "--experiment", directory.name]
    codes = launch(argv, world, directory.with_suffix(".log"), moment, kind)
    if all(code == 0 for code in codes):  # new workers can finish the last validation
        return "" if kind == "kill-worker" else "the run was not interrupted"
    if kind == "term" and set(codes) != {128 + signal.SIGTERM}:
        return f"exit codes {codes} after SIGTERM"
    if kind == "kill-worker" and set(codes) != {1}:
        return f"exit codes {codes} after a loader worker was killed"
    has_state = any(directory.glob("*.pth.tar"))
    codes = launch([*argv, "--resume", str(directory)] if has_state else argv, world, directory.with_suffix(".log"))
    return "" if all(code == 0 for code in codes) else f"exit codes {codes} of the continued run"


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same weights, averages and optimizer state, bit for bit."""
    first, second = (torch.load(path / "last.pth.tar", weights_only=True) for path in (a, b))
    return all(trees_equal(first[key], second[key]) for key in ("state_dict", "state_dict_ema", "optimizer"))


def trees_equal(a: object, b: object) -> bool:
    (leaves, spec), (others, other_spec) = tree_flatten(a), tree_flatten(b)
    return spec == other_spec and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else bool(x == y)
        for x, y in zip(leaves, others, strict=True)
    )


def prepare(world: int) -> None:
    """Choose the number of training samples that gives UPDATES per epoch."""
    ARGS.extend(["--train-num-samples", str(UPDATES * 2 * 8 * world)])  # the last one counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--moments", type=int, nargs="+", default=range(len(MOMENTS)), help="numbers from 0")
    chosen = parser.parse_args()
    failures = total = 0
    with tempfile.TemporaryDirectory() as folder:
        for world in chosen.processes:
            prepare(world)
            reference = Path(folder) / f"reference-{world}"
            log = reference.with_suffix(".log")
            codes = launch([*ARGS, "--output", folder, "--experiment", reference.name], world, log)
            if any(codes):
                print(log.read_text())
                raise SystemExit(f"the uninterrupted run ended with {codes}")
            for kind in chosen.kinds:
                for number in chosen.moments:
                    directory = Path(folder) / f"{kind}-{number}-{world}"
                    problem = interrupted(directory, world, MOMENTS[number], kind)
                    problem = problem or ("" if same(reference, directory) else "the final weights differ")
                    total, failures = total + 1, failures + bool(problem)
                    print(f"{world} process(es), {kind:8}, {MOMENTS[number]}: {problem or 'identical'}", flush=True)
                    if problem:
                        print(directory.with_suffix(".log").read_text()[-3000:])
                    shutil.rmtree(directory, ignore_errors=True)
    print(f"{total - failures} of {total} ended bit-identical")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
