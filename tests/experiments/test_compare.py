"""experiments/compare.py: rho is chosen on held-out images, finished runs are skipped, results.json has all scores."""

import json
import os
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from experiments import compare
from experiments.compare import Experiment
from samon import UserError
from samon.cli.sweep import Job, Sweep
from samon.errors import Stopped
from samon.report.content import load
from samon.trainer.config import dump, parse
from tests.runs import ROOT

# Stands in for train.py: accuracy is best at rho 0.5; writes what a report reads of a run.
FAKE = """
import json, sys
folder, rho, choose = sys.argv[1], float(sys.argv[2]), sys.argv[3] == "choose"
open(f"{folder}/starts", "a").write("x")
json.dump({"recipe": sys.argv[4]}, open(f"{folder}/run.json", "w"))
top1 = 70 - abs(rho - 0.5) + choose
rows = [top1 - 1, top1 + 1, top1] if choose else [top1 + 5, top1 + 2, top1]
with open(f"{folder}/summary.csv", "w") as file:
    print("epoch,eval_top1", *(f"{i},{row}" for i, row in enumerate(rows)), "3,", sep="\\n", file=file)
print(json.dumps({"eval_top1": top1}))
"""


@pytest.fixture
def _fake_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(sweep: Sweep, job: Job) -> list[str]:
        folder = sweep.output / job.name
        (folder / "args.yaml").write_text(dump(sweep.resolve(job.opt).but(rho=job.rho, seed=job.seed)))
        words = [str(folder), str(job.rho or 0), sweep.output.parent.name, Path(sweep.config).stem]
        return [sys.executable, "-S", "-c", FAKE, *words]

    monkeypatch.setattr(Sweep, "command", command)


@pytest.mark.slow
@pytest.mark.usefixtures("_fake_training")
def test_rho_is_chosen_on_held_out_images_and_runs_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tradeoff", "--output", str(tmp_path), "--seeds", "2", "--only", "SGD,SAM-ON every 5th"]
    compare.main([*words, "--choose-only"])
    assert not (tmp_path / "test").exists()
    compare.main(words)
    compare.main([*words, "--table"])
    starts = {
        f"{path.parent.parent.parent.name}/{path.parent.name}": path.read_text() for path in tmp_path.rglob("starts")
    }
    tried = {f"choose/samon-rho{rho}-seed0" for rho in ("0.02", "0.1", "0.5")}
    tested = {f"test/{name}-seed{seed}" for name in ("sgd", "samon-rho0.5") for seed in (0, 1)}
    assert starts == dict.fromkeys(tried | tested, "x")
    content = load(json.loads((tmp_path / "results.json").read_text()), tmp_path)
    held_out = {score.rho: score.mean for score in content.scores if score.held_out}
    assert held_out == {0.02: 70.52, 0.1: 70.6, 0.5: 71.0}
    scores = [(s.method, s.rho, s.values, s.model, s.recipe) for s in content.scores if not s.held_out]
    common = ("resnet20_cifar", "tradeoff")
    assert scores == [("SGD", None, [69.5] * 2, *common), ("SAM-ON every 5th", 0.5, [70] * 2, *common)]
    assert [run.method for run in content.runs] == ["SGD", "SGD", "SAM-ON every 5th", "SAM-ON every 5th"]
    assert (tmp_path / "figures/rho-light.svg").exists()
    assert [s.differences for s in content.scores if not s.held_out] == [[], [0.5, 0.5]]  # with the same seed
    out = capsys.readouterr().out
    assert "SAM-ON every 5th      rho 0.5  eval_top1 70.00 ± 0.00 of 2  +0.50 ± 0.00" in out
    assert "SAM-ON                held out 0.02: 70.52, 0.1: 70.60, 0.5: 71.00\n" in out
    compare.main([*words[:3], "--only", "SAM-ON", "--seeds", "1"])
    assert "SAM-ON                rho 0.5 (edge of the grid)  eval_top1 70.00 of 1  +0.50" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("_fake_training")
def test_early_stopping_takes_the_best_epoch_of_held_out_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "early").mkdir()
    (tmp_path / "early/early.yaml").write_text(f"base: {ROOT / 'experiments/tradeoff/tradeoff.yaml'}\n")
    table = "choose: --val-split train[45000:]\nearly_stopping: true\nseeds: 2\nmethods:\n  SGD: {opt: sgd}\n"
    table += "  SAM: {opt: sam, rho: [0.1, 0.5, 0.9]}\n  tail: {opt: sam, rho_of: SAM, flags: --sam-tail 0.5}\n"
    (tmp_path / "early/methods.yaml").write_text(table)
    words = [str(tmp_path / "early"), "--output", str(tmp_path / "out"), "--jobs", "3"]
    compare.main(words)
    runs = sorted(str(path.parent.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("starts"))
    assert len(runs) == 5 + 6
    scores = load(json.loads((tmp_path / "out/results.json").read_text()), tmp_path).scores
    # FAKE: epoch 1 is best on the held-out images; on the test set it is 2 above the last one, and epoch 0 is 5 above.
    values = [(s.method, s.metric, s.rho, s.values) for s in scores if not s.held_out]
    assert values == [
        *(("SGD", "eval_top1", None, [69.5] * 2), ("SGD", "early_stopped_top1", None, [71.5] * 2)),
        *(("SAM", "eval_top1", 0.5, [70] * 2), ("SAM", "early_stopped_top1", 0.5, [72] * 2)),
        *(("tail", "eval_top1", 0.5, [70] * 2), ("tail", "early_stopped_top1", 0.5, [72] * 2)),
    ]
    assert "rho 0.5  eval_top1 70.00 ± 0.00 of 2  +0.50 ± 0.00  early_stopped_top1 72.00" in capsys.readouterr().out
    # On another machine: one more seed, one more value of rho, and a new method. Nothing else is trained.
    (tmp_path / "early/methods.yaml").write_text(table.replace("0.9]", "0.9, 2]") + "  new: {opt: sam, rho: [0.5]}\n")
    words[2] = str(tmp_path / "more")
    compare.main([*words, "--extend", str(tmp_path / "out/results.json"), "--seeds", "3", "--only", "SGD,SAM,new"])
    started = {str(path.parent.relative_to(tmp_path / "more")) for path in (tmp_path / "more").rglob("starts")}
    new = {"choose/new/sam-rho0.5-seed0", *(f"test/new/sam-rho0.5-seed{seed}" for seed in range(3))}
    assert started == new | {"test/SGD/sgd-seed2", "choose/SAM/sam-rho2-seed0", "test/SAM/sam-rho0.5-seed2"}
    content = load(json.loads((tmp_path / "more/results.json").read_text()), tmp_path)
    values = [(s.method, s.values, s.seeds, s.differences) for s in content.scores if s.metric == "eval_top1"]
    assert values[:2] == [("SGD", [69.5] * 3, [0, 1, 2], []), ("SAM", [70] * 3, [0, 1, 2], [0.5] * 3)]
    early = [s.values for s in content.scores if s.metric != "eval_top1" and not s.held_out]
    assert early[:2] == [[71.5] * 3, [72] * 3]
    assert len(content.runs) == 3 + 3 + 2 + 3
    with pytest.raises(UserError, match=r"sgd-seed0 was made with --lr 0\.1, this command has 0\.2"):
        compare.main([*words, "--extend", str(tmp_path / "out/results.json"), "--table", "--", "--lr", "0.2"])
    for key, unknown in (("epoch", None), ("seeds", [])):
        data = json.loads((tmp_path / "out/results.json").read_text())
        data["scores"] = [score | {key: unknown} for score in data["scores"]]
        (tmp_path / "old.json").write_text(json.dumps(data))
        with pytest.raises(UserError, match="without seeds or epochs"):
            compare.main([*words, "--extend", str(tmp_path / "old.json"), "--table"])
    (tmp_path / "early/methods.yaml").write_text(table.replace("SGD: {opt: sgd}", "SGD: {opt: adamw}"))
    with pytest.raises(UserError, match="sgd-seed0 was made with --opt sgd, this command has adamw"):
        compare.main([*words, "--extend", str(tmp_path / "out/results.json"), "--table"])


@pytest.mark.parametrize("while_starting", [False, True])
def test_sigterm_ends_the_runs_and_collects_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_starting: bool
) -> None:
    """In the pool, runs of several methods are stopped together, also if some are not submitted yet."""
    slow = "import glob, os, signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(143))\n"
    terminate = f"while len(glob.glob('{tmp_path}/**/sweep.log', recursive=True)) < 2: time.sleep(0.02)\n"
    terminate += "os.kill(os.getppid(), 15)\n"

    # Short sleeps: a signal right before a long one would be handled after it.
    wait, original = "for _ in range(1000): time.sleep(0.1)", ThreadPoolExecutor.submit
    submitted: list[Future] = []

    def command(sweep: Sweep, job: Job) -> list[str]:
        return [sys.executable, "-S", "-c", f"{slow}{terminate * (job.opt == 'sam' and not while_starting)}{wait}"]

    def submit(pool: ThreadPoolExecutor, *args: Any) -> Future:
        submitted.append(original(pool, *args))
        if while_starting and len(submitted) == 2:
            while len(list(tmp_path.rglob("sweep.log"))) < 2:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)
        return submitted[-1]

    monkeypatch.setattr(Sweep, "command", command)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    begin = time.monotonic()
    with pytest.raises(Stopped, match="stopped by signal 15"):
        compare.main(["tradeoff", "--output", str(tmp_path), "--jobs", "2", "--only", "SAM,SAM-ON"])
    assert time.monotonic() - begin < 60
    assert len(list(tmp_path.rglob("sweep.log"))) == 2  # the others never start
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("name", [path.parent.name for path in sorted((ROOT / "experiments").glob("*/methods.yaml"))])
def test_every_run_of_the_experiments_resolves(name: str, tmp_path: Path) -> None:
    experiment = Experiment(ROOT / "experiments" / name, tmp_path, ["--data-dir", "DIR"])
    for method, row in experiment.methods.items():
        for stage in ("choose", "test"):
            sweep = experiment.sweep(method, stage, row.rho, 1)
            words = sweep.command(sweep.jobs[0])
            config = parse([*words[words.index("-c") :], "--print-config"])
            assert (config.opt, config.val_split == "validation") == (row.opt, stage == "test")


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--only: unknown SAMON; known are SGD, SAM-ON"):
        compare.main(["noisy_labels", "--only", "SAMON", "--table"])
    with pytest.raises(UserError, match=r"methods\.yaml is no table of methods"):
        compare.main([str(tmp_path), "--table"])
