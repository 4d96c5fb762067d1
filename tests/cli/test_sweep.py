"""samon-sweep: what it runs, and that it never runs anything twice."""

import io
import json
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from samon import UserError
from samon.cli import sweep as program
from samon.cli.sweep import Job, Sweep
from samon.errors import RunError, Stopped
from samon.report.content import Content
from samon.report.read import read_file
from tests.runs import BASE, ROOT

RECIPE = str(ROOT / "hparams/cifar/cifar100_resnet_aa.yaml")
# Stands in for train.py: counts its starts in a file, fails the first DIE of them, then prints a final line.
# It must inherit the lock of its run, so that the run keeps its directory when the sweep is killed.
FAKE = """
import json, os, sys
if not any(os.path.realpath(f'/proc/self/fd/{fd}').endswith('.lock') for fd in os.listdir('/proc/self/fd')): sys.exit(9)
where, die = sys.argv[1], int(sys.argv[2])
open(where, 'a').write('x')
if len(open(where).read()) <= die: sys.exit(int(sys.argv[3]))
print('words'); print(json.dumps({'eval_top1': 50.0, 'gpu': os.environ.get('CUDA_VISIBLE_DEVICES')}))
"""
JOB = Job("sgd", None, 0)


def make(tmp_path: Path, *more: str, recipe: str = RECIPE) -> Sweep:
    words = ["-c", recipe, "--opts", "sgd,samon", "--seeds", "1", "--output", str(tmp_path), *more]
    return program.parse_arguments(words)[0]


def run_all(sweep: Sweep) -> list[Path]:
    return program.run_jobs([(sweep, job) for job in sweep.jobs], sweep.parallel)


def fake_training(monkeypatch: pytest.MonkeyPatch, die: int = 0, status: int = 1) -> None:
    def command(sweep: Sweep, job: Job) -> list[str]:
        return [sys.executable, "-S", "-c", FAKE, str(sweep.output / job.name / "starts"), str(die), str(status)]

    monkeypatch.setattr(Sweep, "command", command)


def starts(output: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in output.glob("*/starts")}


@pytest.mark.parametrize(
    ("flags", "recipe", "rhos"),
    [
        ([], RECIPE, {"sgd": [None], "samon": [0.1, 0.5, 1, 5]}),
        (["--grid", "cifar10_resnet"], RECIPE, {"sgd": [None], "samon": [0.1, 0.5, 1]}),
        (["--opts", "samnn", "--rho", "0.3,0.4"], RECIPE, {"samnn": [0.3, 0.4]}),
        (["--rho", "recipe"], RECIPE, {"sgd": [None], "samon": [None]}),
        (["--opts", "SAMON"], RECIPE, {"samon": [0.1, 0.5, 1, 5]}),
        (["--opts", "lookahead_samon", "--grid", "cifar10_resnet"], RECIPE, {"lookahead_samon": [0.1, 0.5, 1]}),
        (["--opts", "samon-layerl2-adamw"], "cifar/cifar10_vit", {"samon-layerl2-adamw": [0.05, 0.1, 0.25, 0.5, 1]}),
    ],
)
def test_rho_is_the_papers_grid_by_the_recipes_name(
    flags: list[str], recipe: str, rhos: dict[str, list[float | None]], tmp_path: Path
) -> None:
    assert make(tmp_path, *flags, recipe=recipe).rhos == rhos


def test_jobs_are_every_combination_once(tmp_path: Path) -> None:
    sweep = make(tmp_path, "--opts", "sgd,sam,samon,sam-layerl2", "--seeds", "2", recipe="quickstart")
    jobs = sweep.jobs
    assert len(jobs) == len({job.name for job in jobs}) == 20
    assert [job.seed for job in jobs] == [0] * 10 + [1] * 10
    words = " ".join(sweep.command(jobs[1]))
    assert "-c quickstart --opt sam --rho 0.05 --seed 0" in words  # a recipe's name stays a name in the records
    assert words.endswith("--experiment sam-rho0.05-seed0 --overwrite")
    assert "--rho" not in sweep.command(jobs[0])
    by_path = make(tmp_path, recipe=str(ROOT / "hparams/quickstart.yaml"))
    assert sweep.fingerprint(jobs[1]) == by_path.fingerprint(jobs[1])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--opts", "sgd,smaon"], "did you mean 'samon'"),
        (["--opts", "sam-random"], "no values for sam-random"),
        (["--grid", "cifar"], "no grid 'cifar'"),
        (["--opts", "sam,sam"], "repeats"),
        (["--rho", "0.1,x"], "--rho '0.1,x'"),
        (["--jobs", "0"], "at least 1"),
        (["--seeds", "0"], "--seeds 0 leaves nothing to run"),
        (["--metric", "top1"], "invalid choice: 'top1'"),
        (["--", "--seed", "3"], "--seed after -- is set by the sweep"),
        (["--", "-cquickstart"], "-c after -- is set by the sweep"),
        (["--lr", "3"], "--lr 3: no flag of .* go after --, as in `... -- --lr 3`"),
        (["--", "--epocks", "3"], "--epocks"),
        (["--", "--val-split", ""], "--metric eval_top1 needs validation"),
    ],
)
def test_mistakes_show_before_anything_runs(
    tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((UserError, SystemExit)) as error:
        program.main(["-c", RECIPE, "--opts", "sgd,samon", "--output", str(tmp_path), *argv])
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")
    assert not list(tmp_path.glob("*/"))


def test_runs_once_then_skips_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_training(monkeypatch)
    command = ["-c", RECIPE, "--opts", "sgd,samon", "--rho", "0.1", "--seeds", "2", "--jobs", "2"]
    command += ["--output", str(tmp_path)]
    program.main(command)
    program.main(command)
    out = capsys.readouterr()
    assert "| samon | 0.1 | 50.00 ± 0.00 | 2 |" in out.out
    assert out.err.count("done") == out.err.count("skipped") == 4
    assert set(starts(tmp_path).values()) == {1}
    table = json.loads((tmp_path / "table.json").read_text())
    assert [(score["opt"], score["rho"], score["seeds"]) for score in table["scores"]] == [
        ("sgd", None, [0, 1]),
        ("samon", 0.1, [0, 1]),
    ]
    assert [0 < spent < 5 for spent in table["scores"][0]["costs"]["cpu_seconds"]] == [True, True]
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "sgd,,2,50.0,0.0"
    with pytest.raises(UserError, match="use another --output"):
        program.main([*command, "--", "--epochs", "3"])


def test_failed_runs_are_retried_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_training(monkeypatch, die=1)
    assert make(tmp_path).run_job(JOB) == "done"
    assert starts(tmp_path) == {JOB.name: 2}
    fake_training(monkeypatch, die=9, status=143)  # stopped by SIGTERM: no retry
    assert make(tmp_path).run_job(Job("sgd", None, 7)) == "stopped"
    assert starts(tmp_path)["sgd-seed7"] == 1
    fake_training(monkeypatch, die=9)
    with pytest.raises(RunError, match="1 of 1 runs did not finish"):
        program.main(["-c", RECIPE, "--opts", "sgd", "--seeds", "5,", "--output", str(tmp_path)])
    # On a full disk a run dies and its log stays empty.
    assert re.search(r"dead \(no message; [\d,]+ bytes are free for .*sweep.log\)", capsys.readouterr().err)


def test_ctrl_c_stops_at_once_and_prints_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The running one is asked to save, queued ones never start."""
    interrupt = "import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); os.kill(os.getppid(), 2)"
    fake_training(monkeypatch)
    finish = Sweep.command
    stop = [sys.executable, "-S", "-c", f"{interrupt}\nfor _ in range(1000): time.sleep(0.1)"]
    monkeypatch.setattr(Sweep, "command", lambda sweep, job: stop if job.seed else finish(sweep, job))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for background processes
    begin = time.monotonic()
    try:
        with pytest.raises(Stopped, match="stopped by signal 2; start the sweep again"):
            program.main(["-c", RECIPE, "--opts", "sgd", "--seeds", "4", "--output", str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 30
    out, err = capsys.readouterr()
    assert "| sgd |  | 50.00 | 1 |" in out
    assert "sgd-seed1: stopped" in err
    assert not list(tmp_path.glob("sgd-seed2/*"))


def test_two_sweeps_never_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_training(monkeypatch)
    monkeypatch.setattr(
        "tests.cli.test_sweep.FAKE", FAKE.replace("import json", "import time; time.sleep(1)\nimport json")
    )
    with ThreadPoolExecutor(6) as pool:
        states = list(pool.map(lambda _: make(tmp_path).run_job(JOB), range(6)))
    assert states.count("done") == 1
    assert set(states) <= {"done", "elsewhere", "skipped"}
    assert starts(tmp_path) == {JOB.name: 1}


def test_jobs_are_distributed_over_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_training(monkeypatch)
    sweep = make(tmp_path, "--opts", "sgd", "--seeds", "4", "--jobs", "2", "--gpus", "3,5")
    assert run_all(sweep) == []
    results = [sweep.result(job) for job in sweep.jobs]
    assert {result["metrics"]["gpu"] for result in results if result} == {"3", "5"}


def test_a_terminal_shows_a_bar_that_starts_at_the_finished_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", terminal)
    fake_training(monkeypatch)
    make(tmp_path).run_job(JOB)
    run_all(make(tmp_path, "--opts", "sgd", "--seeds", "3"))
    text = terminal.getvalue()
    assert "sweep:  33%|" in text
    assert "[3/3] sgd-seed" in text
    assert "4/3" not in text


def test_a_run_with_a_checkpoint_is_resumed(tmp_path: Path) -> None:
    """With the real train.py, whose final line is read."""
    sweep, job = make(tmp_path, "--rho", "0.1", "--", *BASE, recipe="quickstart"), Job("samon", 0.1, 3)
    assert sweep.run_job(job) == "done"
    result = sweep.result(job)
    assert result is not None
    assert 0 <= result["metrics"]["eval_top1"] <= 100
    assert not result["resumed"]
    command = sweep.command(job)
    assert command[command.index("--resume") + 1] == str(sweep.output / job.name)


def test_an_unfinished_run_of_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints: list[Path] = []  # those of an interrupted run
    monkeypatch.setattr(program, "find_newest", lambda directory: next(iter(checkpoints), None))
    words = ["-c", RECIPE, "--opts", "sgd", "--seeds", "1", "--output", str(tmp_path), "--"]
    fake_training(monkeypatch, die=9, status=143)
    before, after = make(tmp_path, "--", "--lr", "0.1"), make(tmp_path, "--", "--lr", "0.002")
    assert before.run_job(JOB) == "stopped"
    assert after.run_job(JOB) == "stopped"  # nothing to resume: it starts over
    assert before.run_job(JOB) == "stopped"
    checkpoints.append(tmp_path / JOB.name / "last.pth.tar")
    fake_training(monkeypatch)
    for act in ("--dry-run", ""):
        with pytest.raises(UserError, match=f"the run in .*{JOB.name} .* use another --output"):
            program.main([*words[:-1], *filter(None, [act]), "--", "--lr", "0.002"])
    assert starts(tmp_path) == {JOB.name: 3}
    assert before.run_job(JOB) == "done"
    result = json.loads((tmp_path / JOB.name / "result.json").read_text())
    assert list(result) == ["metrics", "cpu_seconds", "resumed"]
    (tmp_path / JOB.name / "result.json").unlink()  # its checkpoints are still those of the other settings
    with pytest.raises(UserError, match="use another --output"):
        after.run_job(JOB)


def test_a_recipe_that_changes_during_a_run_is_not_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("model: resnet18\nlr: 0.1\n")
    sweep = make(tmp_path / "out", "--opts", "sgd", recipe=str(recipe))
    change = f"open({str(recipe)!r}, 'a').write('epochs: 3')\n"
    monkeypatch.setattr("tests.cli.test_sweep.FAKE", FAKE.replace("where, die", f"{change}where, die"))
    fake_training(monkeypatch)
    assert sweep.run_job(JOB) == "done"
    with pytest.raises(UserError, match="use another --output"):
        sweep.result(JOB)


def test_scores_are_compared_with_the_recipes_base_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_training(monkeypatch)
    recipe = tmp_path / "own.yaml"
    recipe.write_text("model: resnet18\nlr: 0.1\nper_opt: {samon: {base_opt: adamw, rho: 0.5}}\n")
    words = ["--opts", "sgd,adamw,samon,samon-adamw", "--rho", "recipe"]
    sweep = make(tmp_path / "out", *words, recipe=str(recipe))
    assert run_all(sweep) == []
    text = program.write_tables(sweep.output, sweep.scores())
    rows = [line.split(" | ")[0] for line in text.partition("\n\n")[0].splitlines()[2:]]
    assert rows == ["| sgd", "| adamw", "| SAM (adamw)", "| samon-adamw"]  # the last two are not in one cell
    for content in (Content(scores=sweep.scores()), read_file(sweep.output / "table.json")):
        bases = [base.opt for score in content.scores if (base := content.baseline(score))]
        assert bases == ["sgd", "adamw", "adamw", "adamw"]


def test_a_change_of_the_base_recipe_is_another_run(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("lr: 0.1\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nmodel: resnet18\n")
    sweep = make(tmp_path, "--opts", "sgd", recipe=str(tmp_path / "own.yaml"))
    before = sweep.fingerprint(JOB)
    assert sweep.fingerprint(JOB) == before
    (tmp_path / "base.yaml").write_text("lr: 0.2\n")
    assert sweep.fingerprint(JOB) != before
