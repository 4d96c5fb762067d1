"""Mistakes are found before any work, finished work is kept, and the same command goes on."""

import io
import json
import shutil

import pytest
import timm
import torch

from samon.errors import Stopped, UserError
from samon.evals import accuracy
from samon.evals.main import checkpoints, different, main, parse
from tests.sets import RANDOM_MODEL

FLAGS = [*RANDOM_MODEL]
FLAGS += ["--num-samples", "16"]
GOOD = "{name: NAME, dataset: wds/fashion-mnist, data_dir: data/fashion-mnist, split: SPLIT}"


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "suite.yaml"
    entries = [GOOD.replace("NAME", name).replace("SPLIT", name) for name in ("train", "validation")]
    path.write_text("".join(f"- {entry}\n" for entry in entries))
    return path


@pytest.fixture
def scored(monkeypatch):
    """Names of the sets that were scored."""
    names, rows = [], accuracy.rows
    monkeypatch.setattr(accuracy, "rows", lambda target, entry: names.append(entry.name) or rows(target, entry))
    return names


def test_a_missing_second_set_is_told_before_the_first_is_scored(suite, scored, tmp_path):
    suite.write_text(suite.read_text() + "- {name: late, data_dir: elsewhere}\n")
    with pytest.raises(UserError, match="elsewhere: no such directory"):
        main([*FLAGS, "--suite", str(suite)])
    assert scored == []


def test_so_are_a_second_checkpoint_that_does_not_fit_and_a_path_that_cannot_be_written(suite, scored, tmp_path):
    for name, model in (("a", "test_resnet"), ("b", "test_byobnet")):
        torch.save(timm.create_model(model, num_classes=10).state_dict(), tmp_path / f"{name}.pth")
    both = ["--checkpoint", str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]
    with pytest.raises(UserError, match=r"b\.pth"):
        main([*FLAGS, *both, "--suite", str(suite)])
    for flag, name in (("--results-file", "results.json"), ("--norm-figure", "x.png"), ("--apgd-state", "state")):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=flag):
            main([*FLAGS, "--suite", str(suite), flag, str(tmp_path / "file" / name)])
    assert scored == []


def test_an_interrupted_command_goes_on_with_what_is_missing(suite, scored, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "results.json"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "net.pth")
    command = [*FLAGS, "--suite", str(suite), "--checkpoint", str(tmp_path / "net.pth"), "--results-file", str(path)]
    whole = main(command)
    expected = path.read_text()
    path.unlink()
    rows = accuracy.rows

    def stopped(target, entry):
        if entry.name == "validation":
            raise KeyboardInterrupt
        return rows(target, entry)

    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "rows", stopped)
        with pytest.raises(Stopped, match="signal 2; the same command goes on"):
            main(command)
    assert {row["dataset"] for row in json.loads(path.read_text())} == {"train"}  # finished rows are there
    scored.clear()
    assert main(command) == whole
    assert scored == ["validation"]
    assert path.read_text() == expected
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("end", ["stopped", "finished"])
def test_another_commands_results_are_kept(suite, scored, tmp_path, monkeypatch, end):
    """Whether it was stopped or has ended; --overwrite gives them up, and takes nothing of them up."""
    path = tmp_path / "results.json"
    with monkeypatch.context() as patch:
        if end == "stopped":
            patch.setattr("samon.evals.results.Results.finish", lambda self: None)
        main([*FLAGS, "--suite", str(suite), "--results-file", str(path)])
    scored.clear()
    before, other = path.read_text(), [*FLAGS, "--suite", str(suite), "--results-file", str(path), "--seed", "1"]
    with pytest.raises(UserError, match=r"results\.json holds results; name another file, or --overwrite"):
        main(other)
    assert scored == []
    assert path.read_text() == before
    main([*other, "--overwrite"])
    assert scored == ["train", "validation"]
    assert [p.name for p in tmp_path.glob("results*")] == ["results.json"]


def test_one_file_under_three_names_is_one(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "checkpoint-8.pth.tar")
    torch.save({"a": torch.ones(3)}, tmp_path / "checkpoint-9.pth.tar")
    shutil.copy(tmp_path / "checkpoint-9.pth.tar", tmp_path / "other.pth.tar")
    found = checkpoints([str(tmp_path)])
    assert found == [str(tmp_path / f"checkpoint-{n}.pth.tar") for n in (8, 9)]
    assert different([str(tmp_path / "other.pth.tar")] * 3) == [str(tmp_path / "other.pth.tar")]
    for name in ("last", "model_best"):
        shutil.copy(tmp_path / "checkpoint-9.pth.tar", tmp_path / f"{name}.pth.tar")
    assert checkpoints([str(tmp_path)]) == [str(tmp_path / "model_best.pth.tar")]


def test_a_text_file_is_told_as_such():
    with pytest.raises(UserError, match=r"^--checkpoint LICENSE is a text file"):
        main([*FLAGS, "--checkpoint", "LICENSE", "--data-dir", "data/fashion-mnist"])


def test_attacks_show_progress_within_a_batch(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    flags = ["--evals", "apgd", "--norm", "l2", "--eps", "0.01", "--apgd-iters", "3", "--apgd-targets", "1"]
    main([*FLAGS, *flags, "--dataset", "wds/fashion-mnist", "--data-dir", "data/fashion-mnist"])
    shown = terminal.getvalue()
    assert "apgd wds/fashion-mnist: " in shown
    assert "image/s" in shown


def test_the_shipped_suite_names_the_papers_sets_under_the_data_dir(tmp_path):
    flags = ["--model", "test_resnet", "--no-pretrained", "--suite", "suites", "--data-dir", str(tmp_path)]
    (job,) = parse(flags)
    v2 = [f"imagenetv2-{form}" for form in ("matched-frequency", "threshold0.7", "top-images")]
    others = ["imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet"]
    assert [entry.kind for entry in job.entries] == ["imagenet", "imagenet-real", *v2, *others]
    assert job.entries[0].root == str(tmp_path / "imagenet")
    assert job.entries[0].split == "validation"
    with pytest.raises(UserError, match="imagenet: no such directory"):
        main([*flags, "--device", "cpu", "--workers", "0"])
