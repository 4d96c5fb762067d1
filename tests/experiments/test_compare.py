"""experiments/compare.py: rho is chosen on held-out images, finished runs are kept, and results.json holds the rest."""

import json
import sys
from pathlib import Path

import pytest

from experiments import compare
from experiments.compare import Experiment
from samon import UserError
from samon.cli.sweep import Job, Sweep
from samon.report.content import load
from samon.trainer.config import parse
from tests.runs import ROOT

# Stands in for train.py: accuracy is best at rho 0.5; writes what a report reads of a run.
FAKE = """
import json, sys
folder, rho, choose = sys.argv[1], float(sys.argv[2]), sys.argv[3] == "choose"
open(f"{folder}/starts", "a").write("x")
open(f"{folder}/args.yaml", "w").write(f"opt: x\\nmodel: resnet20_cifar\\nrho: {rho}\\n")
json.dump({"recipe": "tradeoff"}, open(f"{folder}/run.json", "w"))
print(json.dumps({"eval_top1": 70 - abs(rho - 0.5) + choose}))
"""


@pytest.fixture
def _fake_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(sweep: Sweep, job: Job) -> list[str]:
        folder = sweep.output / job.name
        return [sys.executable, "-S", "-c", FAKE, str(folder), str(job.rho or 0), sweep.output.parent.name]

    monkeypatch.setattr(Sweep, "command", command)


@pytest.mark.usefixtures("_fake_training")
def test_rho_is_chosen_on_held_out_images_and_finished_runs_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert "SAM-ON every 5th         rho 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tradeoff", "noisy_labels"])
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
