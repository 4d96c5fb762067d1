"""tools/sweep.py: what it runs, that it never runs a thing twice, and the table."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samon import UserError
from samon.cli import sweep
from samon.cli.tables import Cell, best_by_opt, markdown, paper_results, write_tables
from samon.errors import RunError, Stopped

ROOT = Path(__file__).parents[2]


RECIPE = str(ROOT / "hparams/cifar/cifar100_resnet_aa.yaml")
# Stands for train.py: counts its starts in a file, fails the first DIE of them, then prints a final line.
FAKE = """
import json, os, sys, time
where, die = sys.argv[1], int(sys.argv[2])
open(where, 'a').write('x')
time.sleep(0.2)
if len(open(where).read()) <= die: sys.exit(int(sys.argv[3]))
print('words'); print(json.dumps({'eval_top1': 50.0, 'gpu': os.environ.get('CUDA_VISIBLE_DEVICES')}))
"""


def args_of(tmp_path: Path, *more: str, recipe: str = RECIPE) -> Namespace:
    return sweep.arguments(["-c", recipe, "--opts", "sgd,samon", "--seeds", "1", "--output", str(tmp_path), *more])


def fake_training(monkeypatch: pytest.MonkeyPatch, die: int = 0, status: int = 1) -> None:
    def command(job: sweep.Job, args: Namespace) -> list[str]:
        return [sys.executable, "-c", FAKE, str(args.output / job.name / "starts"), str(die), str(status)]

    monkeypatch.setattr(sweep, "command", command)


def starts(args: Namespace) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in args.output.glob("*/starts")}


def test_grid_is_the_papers_by_the_recipes_name(tmp_path: Path) -> None:
    args = args_of(tmp_path)
    assert sweep.grid_of("sgd", args) == [None]
    assert sweep.grid_of("samon", args) == [0.1, 0.5, 1, 5]
    vit = args_of(tmp_path, recipe=str(ROOT / "hparams/cifar/cifar10_vit.yaml"))
    assert sweep.grid_of("samon-layerl2-adamw", vit) == [0.05, 0.1, 0.25, 0.5, 1]
    assert sweep.grid_of("samon", args_of(tmp_path, "--grid", "cifar10_resnet")) == [0.1, 0.5, 1]
    assert sweep.grid_of("samnn", args_of(tmp_path, "--rho", "0.3,0.4")) == [0.3, 0.4]
    own = args_of(tmp_path, "--rho", "recipe")
    assert [job.name for job in sweep.jobs_of(own)] == ["sgd-seed0", "samon-seed0"]
    assert "--rho" not in sweep.command(sweep.jobs_of(own)[1], own)


def test_jobs_are_every_combination_once(tmp_path: Path) -> None:
    args = sweep.arguments(
        [
            "-c",
            str(ROOT / "hparams/quickstart.yaml"),
            "--seeds",
            "2",
            "--output",
            str(tmp_path),
            "--opts",
            "sgd,sam,samon,sam-layerl2,samon-layerl2",
        ]
    )
    jobs = sweep.jobs_of(args)
    assert len(jobs) == len({job.name for job in jobs}) == 26
    assert [job.seed for job in jobs] == [0] * 13 + [1] * 13
    command = sweep.command(jobs[1], args)
    assert command[command.index("--rho") + 1] == "0.05"
    assert command[command.index("--experiment") + 1] == "sam-rho0.05-seed0"
    assert "--resume" not in command


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--opts", "sgd,smaon"], "did you mean 'samon'"),
        (["--opts", "sam-random"], "no values for sam-random"),
        (["--opts", "sam", "--grid", "cifar"], "no grid 'cifar'"),
        (["--opts", "sam,sam"], "twice"),
        (["--opts", "sam", "--rho", "0.1,x"], "--rho '0.1,x'"),
        (["--opts", "sam", "--jobs", "0"], "at least 1"),
        (["--opts", "sgd", "--", "--seed", "3"], "--seed after -- is the sweep's"),
        (["--opts", "sgd", "--lr", "3"], "--lr 3: no flag of .* go after --, as in `... -- --lr 3`"),
        (["--opts", "sgd", "--", "--epocks", "3"], "--epocks"),
    ],
)
def test_mistakes_show_before_anything_runs(tmp_path: Path, argv: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sweep.main(["-c", RECIPE, "--output", str(tmp_path), *argv])
    assert not list(tmp_path.glob("*/"))


def test_runs_once_then_skips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_training(monkeypatch)
    command = ["-c", RECIPE, "--opts", "sgd,samon", "--rho", "0.1", "--seeds", "2", "--jobs", "2"]
    command += ["--output", str(tmp_path)]
    sweep.main(command)
    sweep.main(command)
    out = capsys.readouterr()
    assert "| samon | 0.1 | 50.00±0.00 | 2 |" in out.out
    assert out.err.count("done") == out.err.count("skipped") == 4
    assert set(starts(sweep.arguments(command)).values()) == {1}
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["best"] == {"sgd": None, "samon": 0.1}
    seconds = table["rows"][0]["cpu_seconds"]  # a Python that starts and sleeps: little processor time, but some
    assert len(seconds) == 2
    assert all(0 < spent < 5 for spent in seconds)
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "sgd,,2,50.0,0.0"


def test_other_settings_are_not_mistaken_for_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_training(monkeypatch)
    command = ["-c", RECIPE, "--opts", "sgd", "--seeds", "1", "--output", str(tmp_path)]
    sweep.main(command)
    with pytest.raises(UserError, match="use another --output"):
        sweep.main([*command, "--", "--epochs", "3"])


def test_a_metric_that_no_run_has_is_refused_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once a KeyError after all of the training."""
    fake_training(monkeypatch)
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["-c", RECIPE, "--opts", "sgd", "--output", str(tmp_path), "--metric", "top1"])
    assert "invalid choice: 'top1'" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/"))


def test_no_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--seeds 0 leaves nothing to run"):
        sweep.main(["-c", RECIPE, "--opts", "sgd", "--seeds", "0", "--output", str(tmp_path)])


def test_dead_runs_are_retried_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_training(monkeypatch, die=1)
    args = args_of(tmp_path)
    job = sweep.Job("sgd", None, 0)
    assert sweep.run_job(job, args, None, sweep.Processes()) == "done"
    assert starts(args) == {job.name: 2}
    fake_training(monkeypatch, die=9)
    with pytest.raises(RunError, match="1 of 1 runs did not end"):
        sweep.main(["-c", RECIPE, "--opts", "sgd", "--seeds", "5,", "--output", str(tmp_path)])
    fake_training(monkeypatch, die=9, status=143)  # ended by SIGTERM: no retry
    other = sweep.Job("sgd", None, 7)
    assert sweep.run_job(other, args, None, sweep.Processes()) == "stopped"
    assert starts(args)[other.name] == 1


def test_ctrl_c_stops_at_once_and_prints_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The running one is told to save, queued ones never start; a second signal would end it at once."""
    slow = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print(1, file=sys.stderr, flush=True)"
    )

    def command(job: sweep.Job, args: Namespace) -> list[str]:
        if job.seed == 0:
            return [sys.executable, "-c", FAKE, str(args.output / job.name / "starts"), "0", "1"]
        return [sys.executable, "-c", f"{slow}; time.sleep(60)"]

    def interrupt() -> None:
        log = tmp_path / "sgd-seed1/sweep.log"
        while not (log.exists() and log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sweep, "command", command)
    thread = threading.Thread(target=interrupt)
    begin = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs behind &
    try:
        thread.start()
        with pytest.raises(Stopped, match="stopped by signal 2; start the sweep again"):
            sweep.main(["-c", RECIPE, "--opts", "sgd", "--seeds", "4", "--output", str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 30
    thread.join()
    out, err = capsys.readouterr()
    assert "| sgd |  | 50.00 | 1 |" in out
    assert "sgd-seed1: stopped" in err
    assert not list(tmp_path.glob("sgd-seed2/*"))


def test_a_dead_run_without_a_word_tells_the_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a full disk a run dies and its log stays empty."""
    fake_training(monkeypatch, die=9)
    with pytest.raises(RunError):
        sweep.main(["-c", RECIPE, "--opts", "sgd", "--seeds", "1", "--output", str(tmp_path), "--retries", "0"])
    assert re.search(r"dead \(no message; [\d,]+ bytes are free for .*sweep.log\)", capsys.readouterr().err)


def test_a_recipe_by_name_stays_a_name(tmp_path: Path) -> None:
    """So the commands in the records say `-c quickstart`, whatever the place of the installation."""
    named = args_of(tmp_path, recipe="quickstart")
    job = sweep.jobs_of(named)[0]
    assert job.arguments(named)[:2] == ["-c", "quickstart"]
    by_path = args_of(tmp_path, recipe=str(ROOT / "hparams/quickstart.yaml"))
    assert sweep.fingerprint(job, named) == sweep.fingerprint(job, by_path)


def test_two_sweeps_never_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_training(monkeypatch)
    args, job = args_of(tmp_path), sweep.Job("samon", 0.5, 0)
    with ThreadPoolExecutor(6) as pool:
        states = list(pool.map(lambda _: sweep.run_job(job, args, None, sweep.Processes()), range(6)))
    assert states.count("done") == 1
    assert set(states) == {"done", "elsewhere"}
    assert starts(args) == {job.name: 1}


def test_a_run_keeps_its_lock_when_the_sweep_is_gone(tmp_path: Path) -> None:
    """The training process inherits the lock's descriptor, which is what pass_fds does in `attempt`."""
    with (tmp_path / "x.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=[lock.fileno()], stdin=subprocess.PIPE)
    with (tmp_path / "x.lock").open("w") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.communicate(b"\n")
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_jobs_are_spread_over_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_training(monkeypatch)
    args = args_of(tmp_path, "--jobs", "2", "--gpus", "3,5")
    jobs = [sweep.Job("sgd", None, seed) for seed in range(4)]
    assert sweep.run_all(jobs, args) == []
    used = [sweep.finished(job, args) for job in jobs]
    assert {metrics["gpu"] for metrics in used if metrics} == {"3", "5"}


def cells(**rows: Any) -> list[Cell]:
    return [Cell(name.replace("_", "-"), rho, values) for name, many in rows.items() for rho, values in many]


def test_table_marks_the_better_scope_and_the_best() -> None:
    found = cells(
        sgd=[(None, [70.0, 71.0])],
        sam=[(0.1, [75.0, 76.0]), (0.5, [74.0, 74.0])],
        samon=[(0.5, [76.0, 77.0])],
        sam_layerl2=[(0.01, [77.5, 77.5])],
        samon_layerl2=[(0.2, [77.0, 77.2])],
    )
    assert best_by_opt(found)["sam"].rho == 0.1
    table = markdown(found, {"sam": "75.07±0.6", "samon": "75.58±0.4"}).splitlines()
    assert table[0] == "| variant | none | all | ON | paper, none | paper, all | paper, ON |"
    assert table[2] == "| sgd | 70.50±0.71 |  |  |  |  |  |"
    assert table[3] == "| SAM |  | 75.50±0.71 (rho 0.1) | **76.50±0.71** (rho 0.5) |  | 75.07±0.6 | 75.58±0.4 |"
    assert table[4].startswith("| layer. l2 |  | <u>**77.50±0.00**</u> (rho 0.01) | 77.10±0.14 (rho 0.2) |")


def test_only_what_perturbs_normalization_layers_stands_under_on() -> None:
    table = markdown(cells(sgd=[(None, [70.0])], samon=[(0.5, [71.0])], sam_random=[(0.1, [69.0])]), {}).splitlines()
    assert table[0] == "| variant | none | all | ON |"
    assert table[2] == "| sgd | 70.00 |  |  |"
    assert table[3] == "| SAM |  |  | <u>71.00</u> (rho 0.5) |"
    assert table[4] == "| sam-random |  | 69.00 (rho 0.1) |  |"


def test_the_best_loss_is_the_lowest_and_has_four_decimals(tmp_path: Path) -> None:
    found = [Cell("samon", 0.1, [0.51234, 0.5]), Cell("samon", 0.5, [0.6])]
    for cell in found:
        cell.metric = "eval_loss"
    assert best_by_opt(found)["samon"].rho == 0.1
    about = {"config": RECIPE, "model": "resnet10t", "metric": "eval_loss", "train": []}
    assert "| samon | 0.1 | 0.5062±0.0087 | 2 |" in write_tables(tmp_path, found, about)


def test_single_runs_have_no_deviation(tmp_path: Path) -> None:
    about = {"config": RECIPE, "model": "resnet56_cifar", "metric": "eval_top1", "train": []}
    text = write_tables(tmp_path, cells(sgd=[(None, [70.0])]), about)
    assert "| sgd | <u>70.00</u> | 75.26±0.2 |" in text  # the paper's own figure beside it


def test_paper_results_are_the_papers() -> None:
    assert paper_results("cifar100_resnet", "wrn28_10_cifar")["samon"] == "84.19±0.2"
    assert paper_results("cifar100_resnet", "vgg16_bn_cifar")["samon-layerl2"] == "77.12±0.2"
    assert paper_results("cifar10_vit", "vit_small_cifar")["samon-eleml2orig-adamw"] == "94.01±0.5"
    assert paper_results("vit_s32_scratch", "vit_small_patch32_224")["samon-lion"] == "72.64±0.14"
    assert paper_results("quickstart", "resnet10t") == {}


def test_a_real_run_and_its_continuation(tmp_path: Path) -> None:
    """train.py behind it: the final line is read; a run that left a state is continued, not started over."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(32) % 10
    np.savez(tmp_path / "tiny.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"dataset: npz/tiny\ndata_dir: {tmp_path}\nmodel: resnet10t\nnum_classes: 10\ninput_size: [3, 32, 32]\n"
        "model_kwargs: {channels: [4, 4, 8, 8], stem_width: 4}\nbatch_size: 16\nepochs: 2\nwarmup_epochs: 0\nlr: 0.01\n"
        "data_resident: true\ntrain_crop_mode: pad\ncolor_jitter: 0.0\nworkers: 0\n"
    )
    args = sweep.arguments(["-c", str(recipe), "--opts", "samon", "--output", str(tmp_path / "out")])
    job = sweep.Job("samon", 0.1, 3)
    assert sweep.run_job(job, args, None, sweep.Processes()) == "done"
    metrics = sweep.finished(job, args)
    assert metrics is not None
    assert 0 <= metrics["eval_top1"] <= 100
    assert metrics["epoch"] == 1
    command = sweep.command(job, args)
    assert command[command.index("--resume") + 1] == str(args.output / job.name)


def test_a_change_of_the_base_recipe_is_another_run(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("lr: 0.1\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nmodel: resnet18\n")
    args = args_of(tmp_path, recipe=str(tmp_path / "own.yaml"))
    job = sweep.Job("sgd", None, 0)
    before = sweep.fingerprint(job, args)
    assert sweep.fingerprint(job, args) == before
    (tmp_path / "base.yaml").write_text("lr: 0.2\n")
    assert sweep.fingerprint(job, args) != before
