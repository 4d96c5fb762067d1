"""What a resume takes of the optimizer: its state where it fits, its options as they are asked for now."""

from pathlib import Path
from typing import Any

import pytest
import torch

from samon.errors import UserError
from samon.trainer import loop
from samon.trainer.build import Run
from samon.trainer.state import Progress
from tests.runs import run


class Enough(Exception):
    """The state is put back: no need to train."""


def groups(done: Path, *args: str) -> list[dict[str, Any]]:
    """The optimizer's groups after a resume of a run with other arguments."""
    found: list[dict[str, Any]] = []

    def begun(job: Run, progress: Progress) -> None:
        found.extend(job.optimizer.param_groups)
        raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "renew_mask", begun)
        with pytest.raises(Enough):
            run(done.parent, *args, "--epochs", "3", "--resume", str(done / "last.pth.tar"), name="o")
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("done"), "--opt", "samon", "--weight-decay", "0.1")[1]


REFUSED = {
    "samon-adamw": "optimizer state of sgd, and adamw is asked for",
    "lion": "optimizer state of sgd, and lion is asked for",
    "momentum": "optimizer state of sgd, and momentum is asked for",
    "samon --base-opt lamb": "optimizer state of sgd, and lamb is asked for",
    "samon --freeze conv_stem|conv1": "other groups of parameters.*--freeze",
    "samon --layer-decay 0.7": "other groups of parameters.*--layer-decay",
    "samon --weight-decay-on non-norm": "other groups of parameters.*weight decay",
    "samon --weight-decay 0": "other groups of parameters.*weight decay",
}


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("now", REFUSED)
def test_the_state_of_another_optimizer_is_refused(now: str, forgets: bool, done: Path) -> None:
    """By what the checkpoint names; an earlier one names only its settings, and the sizes of the groups tell."""
    content = torch.load(done / "last.pth.tar", weights_only=True)
    if forgets:
        del content["optimizer_layout"]
    torch.save(content, path := done / "other.pth.tar")
    args = ["--weight-decay", "0.1", "--opt", *now.split(), "--resume", str(path)]
    with pytest.raises(UserError, match=f"{REFUSED[now]}.*--no-resume-opt"):
        run(done.parent, *args, name="other")


def test_groups_of_the_same_sizes_are_told_apart_by_name(done: Path) -> None:
    content = torch.load(done / "last.pth.tar", weights_only=True)
    names = content["optimizer_layout"]["groups"][0]
    names[0], names[-1] = "frozen.bias", names[0]
    torch.save(content, path := done / "other.pth.tar")
    with pytest.raises(UserError, match=r"other groups of parameters .* moved"):
        run(done.parent, "--opt", "samon", "--weight-decay", "0.1", "--resume", str(path), name="other")


def test_the_same_optimizer_under_another_name_goes_on(done: Path) -> None:
    for name in ("samon", "sgd", "nesterov", "lookahead_samnn-layerl2"):
        assert groups(done, "--opt", name, "--weight-decay", "0.1")
    assert groups(done, "--opt", "lion", "--weight-decay", "0.1", "--no-resume-opt")


def test_options_of_the_groups_are_those_asked_for_now(done: Path) -> None:
    args = ["--opt", "samon", "--weight-decay", "0.2", "--momentum", "0.8", "--opt-kwargs", "nesterov=False"]
    for group in groups(done, *args):
        assert group["weight_decay"] in (0, 0.2)
        assert (group["momentum"], group["nesterov"]) == (0.8, False)
    assert groups(done, "--opt", "samon", "--weight-decay", "0.1", "--lr", "0.02", "--sched", "none")[0]["lr"] == 0.02


def test_counts_of_the_groups_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    _, done = run(tmp_path, "--opt", "lookahead_samon", "--base-opt", "lamb", "--epochs", "2")
    for group in groups(done, "--opt", "lookahead_samon", "--base-opt", "lamb"):
        assert (group["step"], group["lookahead_step"]) == (8, 8)
