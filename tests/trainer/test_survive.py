"""Runs that are killed, starved of disk or diverge: real processes and real signals.

`tools/check_interruptions.py` runs the whole matrix; a few of its cells are here.
"""

import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from samon.cli.program import run_script
from samon.data import DataError
from samon.data.corrupt import WorkerError
from samon.data.loader import Loader
from samon.errors import RunError, Stopped
from samon.trainer.checkpoint import CheckpointManager
from samon.trainer.state import find_newest, load_state
from tests.disks import fill, small_disk
from tests.processes import context, run_all
from tests.runs import BASE, ROOT, assert_same, at, last, run, stop_at, train, watch_batches, weights
from tests.sets import write_set
from tools import check_interruptions as matrix

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # scripts in tmp_path import tests.runs
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the matrix forks and signals as on Linux")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The directory of a run without interruptions, by number of processes."""
    folder = tmp_path_factory.mktemp("runs")
    for world in (1, 2):
        matrix.prepare(world)
        argv = [*matrix.ARGS, "--output", str(folder), "--experiment", f"whole-{world}"]
        assert matrix.launch(argv, world, folder / f"whole-{world}.log") == [0] * world
    return {world: folder / f"whole-{world}" for world in (1, 2)}


CELLS = [
    (1, "term", 2),
    (2, "kill-one", 3),
    pytest.param(1, "kill-worker", 1, marks=pytest.mark.slow),
    pytest.param(2, "kill-all", 5, marks=pytest.mark.slow),
    pytest.param(2, "kill-worker", 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "kind", "moment"), CELLS)
def test_interrupted_and_resumed(world: int, kind: str, moment: int, uninterrupted: dict[int, Path]) -> None:
    whole = uninterrupted[world]
    matrix.prepare(world)
    directory = whole.parent / f"{kind}-{world}"
    assert matrix.interrupted(directory, world, matrix.MOMENTS[moment], kind) == ""
    assert matrix.same(whole, directory)


def test_another_number_of_processes_resumes_at_the_sample(tmp_path: Path) -> None:
    """From 2 processes to 1, within an epoch: the rest of its samples are seen, and the log names what differs."""
    matrix.prepare(2)
    directory, log = tmp_path / "run", tmp_path / "resumed.log"
    argv = [*matrix.ARGS, "--output", str(tmp_path), "--experiment", "run"]
    matrix.launch(argv, 2, tmp_path / "run.log", ("update", 1, 3), "kill-all")
    path = find_newest(directory)
    assert path is not None
    progress = load_state(path).progress
    assert (progress.epoch, progress.samples) == (1, 64)
    assert matrix.launch([*argv, "--resume", str(directory)], 1, log) == [0]
    assert "saved by 2 processes and continues on 1" in log.read_text()
    assert "Train 1 [12/12]" in log.read_text()  # 192 samples in updates of 16; 4 of them were done
    assert last(directory)["progress"]["samples"] == 192


def train_slowly(argv: list[str], reached: Any) -> None:
    """Train; after the first update, set the event and wait for a minute."""

    def slow(*_: object) -> None:
        reached.set()
        end = time.time() + 60
        while time.time() < end:
            time.sleep(0.05)

    run_script(lambda: train(argv, slow))


def test_second_signal_exits_at_once(tmp_path: Path) -> None:
    """The first one is waiting for the update to end, which here takes a minute."""
    reached = context.Event()
    process = context.Process(target=train_slowly, args=([*BASE, "--output", str(tmp_path)], reached))
    process.start()
    assert reached.wait(60)
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.3)
    assert process.is_alive()
    process.terminate()
    process.join(5)
    assert process.exitcode == 128 + signal.SIGTERM


def test_workers_that_die_at_the_start_of_a_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch is saved, so that the resumed run begins with its validation."""
    iterate = Loader.__iter__

    def die(loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        if not loader.dataset.is_training:
            raise WorkerError("a loader worker was killed")
        return iterate(loader)

    monkeypatch.setattr(Loader, "__iter__", die)
    with pytest.raises(RunError, match="a loader worker was killed"):
        run(tmp_path)
    path = find_newest(tmp_path / "run")
    assert path is not None
    assert load_state(path).progress.samples == 64


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_status_names_the_signal(number: int, tmp_path: Path) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with pytest.raises(Stopped) as stop:
        run(tmp_path, "--opt", "samon", on_update=stop_at(0, 2, number))
    assert stop.value.status == 128 + number
    assert str(tmp_path / "run") in str(stop.value)
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_state(tmp_path: Path) -> None:
    """A rank dies by SIGKILL in mid-epoch; the agent starts all again and they find their state by themselves."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\nfrom samon.cli.program import run_script\nfrom tests.runs import train\n"
        "def on_update(run, p, two_pass):\n"
        "    first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "    if first and os.environ['RANK'] == '1' and (p.epoch, p.updates) == (1, 3):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "run_script(lambda: train(sys.argv[1:], on_update))\n"
    )
    flags = "--opt samon --epochs 2 --device cpu -b 8 --checkpoint-interval 2 --model-ema --drop 0.1"
    argv = [*BASE, *flags.split(), "--output", str(tmp_path)]
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", str(script), *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 0, done.stderr
    (restarted,) = [path for path in tmp_path.iterdir() if (path / "last.pth.tar").exists()]  # one directory for both
    assert "recovery-1-2.pth.tar at epoch 1, update 2" in done.stderr
    whole = [*torchrun, str(ROOT / "train.py"), *argv, "--experiment", "whole"]
    subprocess.run(whole, capture_output=True, env=ENV, check=True)
    assert_same(weights(tmp_path / "whole"), weights(restarted))


def test_timed_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--checkpoint-interval in minutes: here a thousandth of a second, so after every update."""
    saved: list[int] = []
    original = CheckpointManager.save_recovery

    def save_recovery(self: CheckpointManager) -> None:
        saved.append(self.run.progress.updates)
        original(self)

    monkeypatch.setattr(CheckpointManager, "save_recovery", save_recovery)
    metrics, directory = run(tmp_path, "--opt", "sgd", "--checkpoint-interval", "0.00001m")
    assert saved == [1, 2, 3]
    assert f"[4/4] loss {metrics['train_loss']:.4f} " in (directory / "log.txt").read_text()  # the mean of all updates
    assert not list(directory.glob("recovery-*"))  # the epoch's checkpoint replaces them
    saved.clear()
    with pytest.raises(Stopped):
        run(tmp_path, "--opt", "sgd", "-b", "8", "--recovery-interval", "2", on_update=stop_at(0, 7))
    assert saved == [2, 4, 6, 7]
    assert sorted(path.name for path in directory.glob("*.pth.tar")) == ["recovery-0-6.pth.tar", "recovery-0-7.pth.tar"]


def train_on_a_full_disk(argv: list[str], limit: int, log: Path) -> None:
    """As train.py, on a disk on which no file can be longer than the limit."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run_script(lambda: train(argv))


def test_disk_full(tmp_path: Path) -> None:
    """Writes past a limit fail as on a full disk: status 1, one line, the last good checkpoint kept and named."""
    run(tmp_path, "--opt", "sgd", "--epochs", "1")
    whole = (tmp_path / "run" / "last.pth.tar").read_bytes()
    argv = [*BASE, "--opt", "sgd", "--epochs", "2", "--output", str(tmp_path), "--experiment", "run"]
    argv += ["--resume", str(tmp_path / "run")]
    log = tmp_path / "log.txt"
    process = context.Process(target=train_on_a_full_disk, args=(argv, len(whole) // 2, log))
    run_all([process], 60)
    assert process.exitcode == 1
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert "cannot write" in line
    assert "the last good checkpoint is" in line
    assert "checkpoint-0.pth.tar" in line or "last.pth.tar" in line
    assert (tmp_path / "run" / "last.pth.tar").read_bytes() == whole
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.filterwarnings("ignore:Exception in thread")
def test_a_disk_that_fills_up_ends_the_run_in_one_line(tmp_path: Path) -> None:
    """In a log, where `test_disk_full` ends it in a state."""
    (tmp_path / "run").mkdir()
    with small_disk(tmp_path / "run", "20m"):
        on_update = at(1, 2, lambda: fill(tmp_path / "run/fill"))
        with pytest.raises(RunError, match=r"run.*: No space left on device.*; the last good checkpoint is .*--resume"):
            run(tmp_path, "--epochs", "3", "--log-interval", "1", on_update=on_update)
        assert last(tmp_path / "run")["epoch"] == 0


@pytest.mark.filterwarnings("ignore:Exception in thread")
def test_a_deleted_directory_ends_the_run_with_the_documented_status(tmp_path: Path) -> None:
    """1, as on a full disk; a checkpoint that is gone too is not recommended."""
    on_update = at(1, 2, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(RunError, match="No such file or directory; no checkpoint was written before it"):
        run(tmp_path, "--epochs", "3", on_update=on_update)


def spoil_batches(monkeypatch: pytest.MonkeyPatch, value: float, numbers: Collection[int]) -> None:
    """Fill the training batches of these numbers with a value."""
    count = itertools.count()

    def spoil(images: Tensor, target: Tensor) -> None:
        if next(count) in numbers:
            images.fill_(value)

    watch_batches(monkeypatch, spoil)


@pytest.mark.parametrize("extra", [[], ["--amp"]], ids=["no scaler", "scaler"])
def test_divergence_ends_at_the_last_good_state(
    extra: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that are not finite are skipped and leave the weights alone; too many in a row end the run."""
    spoil_batches(monkeypatch, float("nan"), range(4, 12))  # from the second epoch on
    with pytest.raises(RunError, match=r"3 updates in a row.*the last good checkpoint is .*last\.pth\.tar"):
        run(tmp_path, "--opt", "samon", "--epochs", "3", "--max-nonfinite-steps", "3", *extra)
    assert last(tmp_path / "run")["epoch"] == 0


def test_too_many_corrupt_samples_name_the_last_checkpoint(tmp_path: Path) -> None:
    """Half of the second epoch's shards are unreadable by then; the first epoch's state stays."""
    root = Path(write_set(tmp_path / "data", lengths=(16, 16), num_classes=32))
    own = ["--data-dir", str(root), "--dataset", "wds/test", "--num-classes", "32", "--val-split", ""]
    own += ["--in-chans", "3", "--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.2", "--train-num-samples", "32"]
    run(tmp_path, *own, "--epochs", "1")
    state = tmp_path / "run/last.pth.tar"
    unreadable = {i: {"jpg": b"not an image"} for i in range(16)}
    write_set(root, lengths=(16, 16), num_classes=32, replace=unreadable)
    with pytest.raises(DataError, match=r"(?i)corrupt.*the last good checkpoint is .*pth\.tar"):  # as in a first epoch
        run(tmp_path, *own, "--epochs", "2", "--resume", str(tmp_path / "run"))
    assert state.exists()
    assert last(tmp_path / "run")["epoch"] == 0


def test_a_single_bad_batch_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_batches(monkeypatch, float("inf"), [1])
    metrics, directory = run(tmp_path, "--opt", "samon-adamw", "--bn-stats", "second", "--model", "test_vit")
    assert metrics["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in weights(directory).values())
    assert metrics["train_loss"] == metrics["train_loss"]  # the skipped update is not in the mean


@pytest.mark.slow
def test_two_agents_on_one_host(tmp_path: Path) -> None:
    """docs/multi_node.md: one torchrun per host; here both on this one. They train as two processes of one agent do."""
    argv = [*BASE, "--opt", "samon", "--device", "cpu", "-b", "8", "--global-batch-size", "16"]
    argv += ["--output", str(tmp_path), "--experiment", "nodes"]
    nodes = "--nnodes 2 --nproc-per-node 1 --rdzv-id t --rdzv-backend c10d --rdzv-endpoint"
    command = [*TORCHRUN, *nodes.split(), f"localhost:{matrix.free_port()}", str(ROOT / "train.py"), *argv]
    pipe, stdout = subprocess.PIPE, subprocess.STDOUT
    agents = [subprocess.Popen(command, stdout=pipe, stderr=stdout, text=True, env=ENV) for _ in range(2)]
    printed = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert sum('"eval_top1"' in text for text in printed) == 1  # rank 0 alone reports
    log = tmp_path / "one-agent.log"
    assert matrix.launch([*argv, "--experiment", "one"], 2, log) == [0, 0]
    assert_same(weights(tmp_path / "nodes"), weights(tmp_path / "one"))
