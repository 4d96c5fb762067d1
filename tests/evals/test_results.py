"""Tables, means over checkpoints, and results files that another command does not overwrite."""

import json
import math

import pytest

from samon.cli.validate import main
from samon.errors import Stopped, UserError
from samon.evals import accuracy
from samon.evals.results import ResultsFile, markdown, mean_over_checkpoints, render, shorten_paths
from tests.eval_sets import FASHION, save_model
from tests.sets import RANDOM_MODEL

FLAGS = [*RANDOM_MODEL, "--num-samples", "16"]


def test_headings_show_as_much_of_a_checkpoints_path_as_distinguishes_it():
    """Two checkpoints once made headings of 800 characters."""
    paths = [f"/a/long/way/to/{place}/run-{i}/model_best.pth.tar" for place, i in (("A", 1), ("A", 2), ("B", 1))]
    names = shorten_paths(paths)
    assert [names[path] for path in paths] == [
        "A/run-1/model_best.pth.tar",
        "A/run-2/model_best.pth.tar",
        "B/run-1/model_best.pth.tar",
    ]
    row = {"model": "net", "dataset": "d", "split": "s", "eval": "accuracy", "metric": "top1", "value": 50.0}
    row["num_samples"] = 4
    head = markdown([row | {"checkpoint": path, "ema": path == paths[1]} for path in paths[1:]]).splitlines()[0]
    columns = "top-1 (run-2/model_best.pth.tar EMA) | top-1 (run-1/model_best.pth.tar)"
    assert head == f"| data set | split | evaluation | {columns} | n | note |"


def test_mean_and_sample_deviation_over_checkpoints():
    base = {"model": "m", "dataset": "d", "split": "s", "eval": "accuracy", "metric": "top1", "num_samples": 9}
    rows = [base | {"checkpoint": name, "value": value} for name, value in (("a", 1.0), ("b", 2.0), ("c", 6.0))]
    row, one, diverged = mean_over_checkpoints(
        [*rows, base | {"model": "n", "value": 5.0}, *(base | {"metric": "loss", "value": v} for v in (1.0, math.nan))]
    )
    assert row == base | {"value": 3.0, "std": pytest.approx(7**0.5), "checkpoints": 3}
    assert (one["model"], one["std"], diverged["std"]) == ("n", None, None)
    assert math.isnan(diverged["value"])
    assert "3.00 ± 2.65" in markdown([row])
    rows[1]["note"] = "vanished"
    (row,) = mean_over_checkpoints(rows)
    assert (row["checkpoints"], row["note"]) == (3, "1 of 3 checkpoints, such as: vanished")
    assert "such as: vanished |" in markdown([row])


def test_figures_of_different_splits_are_in_different_rows():
    row = {"model": "net", "dataset": "d", "eval": "accuracy", "metric": "top1", "value": 50.0, "num_samples": 4}
    lines = markdown([row | {"checkpoint": split, "split": split} for split in ("test", "train[:4]")]).splitlines()
    assert lines[2:] == ["| d | test | accuracy | 50.00 |  | 4 |  |", "| d | train[:4] | accuracy |  | 50.00 | 4 |  |"]


def test_group_of_checkpoints_is_one_column(tmp_path, capsys):
    paths = [save_model(tmp_path / f"{seed}.pth", seed=seed) for seed in range(2)]
    flags = [*FLAGS, *FASHION]
    one, two = (main([*flags, "--checkpoint", path])[0]["value"] for path in paths)
    capsys.readouterr()
    (top1, *_) = main([*flags, "--checkpoint", *paths, "--group"])
    assert (top1["value"], top1["checkpoints"]) == (pytest.approx((one + two) / 2), 2)
    assert "±" in capsys.readouterr().out
    for several in ([], ["--checkpoint", paths[0], paths[0]]):  # the same one twice has no deviation
        with pytest.raises(UserError, match="--group: give several checkpoints"):
            main([*flags, "--group", *several])
    with pytest.raises(UserError, match=r"--group gives .* --bootstrap an interval for each: drop one"):
        main([*flags, "--checkpoint", *paths, "--group", "--bootstrap", "10"])


def test_json_has_null_for_numbers_that_are_not_finite():
    text = render([{"metric": "loss", "value": math.nan, "low": math.nan, "high": math.inf, "num_samples": 3}], "json")
    assert json.loads(text) == [{"metric": "loss", "value": None, "low": None, "high": None, "num_samples": 3}]


# --- results files --------------------------------------------------------------------------------------------------
@pytest.fixture
def suite(tmp_path):
    entry = "{{name: {0}, dataset: wds/fashion-mnist, data_dir: data/fashion-mnist, split: {0}}}"
    path = tmp_path / "suite.yaml"
    path.write_text("".join(f"- {entry.format(split)}\n" for split in ("train", "validation")))
    return path


@pytest.fixture
def evaluated(monkeypatch):
    """Names of the sets that accuracy was evaluated on."""
    names, evaluate = [], accuracy.evaluate
    monkeypatch.setattr(accuracy, "evaluate", lambda context, data: names.append(data.name) or evaluate(context, data))
    return names


def test_an_interrupted_command_resumes_with_what_is_missing(suite, evaluated, tmp_path, monkeypatch):
    path, weights = tmp_path / "deep" / "results.json", save_model(tmp_path / "net.pth")
    command = [*FLAGS, "--suite", str(suite), "--checkpoint", weights, "--results-file", str(path)]
    whole = main(command)
    expected = path.read_text()
    path.unlink()
    evaluate = accuracy.evaluate

    def stopped(context, dataset):
        if dataset.name == "validation":
            raise KeyboardInterrupt
        return evaluate(context, dataset)

    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "evaluate", stopped)
        with pytest.raises(Stopped, match="signal 2; the same command resumes"):
            main(command)
    assert {row["dataset"] for row in json.loads(path.read_text())} == {"train"}  # complete results are there
    evaluated.clear()
    assert main(command) == whole
    assert evaluated == ["validation"]
    assert path.read_text() == expected
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("end", ["stopped", "finished"])
def test_another_commands_results_are_kept(suite, evaluated, tmp_path, monkeypatch, end):
    """Whether it was stopped or has ended; --overwrite discards them."""
    path = tmp_path / "results.json"
    with monkeypatch.context() as patch:
        if end == "stopped":
            patch.setattr(ResultsFile, "finish", lambda self: None)
        main([*FLAGS, "--suite", str(suite), "--results-file", str(path)])
    evaluated.clear()
    before, other = path.read_text(), [*FLAGS, "--suite", str(suite), "--results-file", str(path), "--seed", "1"]
    with pytest.raises(UserError, match=r"results\.json holds results; name another file, or --overwrite"):
        main(other)
    assert evaluated == []
    assert path.read_text() == before
    main([*other, "--overwrite"])
    assert evaluated == ["train", "validation"]
    assert [p.name for p in tmp_path.glob("results*")] == ["results.json"]


@pytest.mark.parametrize("mistake", ["data set", "checkpoint", "--results-file", "--norm-figure", "--apgd-state"])
def test_mistakes_are_reported_before_any_work(suite, evaluated, tmp_path, mistake):
    flags, message = [*FLAGS, "--suite", str(suite)], mistake
    (tmp_path / "file").touch()
    if mistake == "data set":
        suite.write_text(suite.read_text() + "- {name: late, data_dir: elsewhere}\n")
        message = "elsewhere: no such directory"
    elif mistake == "checkpoint":
        flags += ["--checkpoint", save_model(tmp_path / "a.pth"), save_model(tmp_path / "b.pth", model="test_byobnet")]
        message = r"b\.pth"
    else:
        flags += [mistake, str(tmp_path / "file" / "x.json")]
    with pytest.raises(UserError, match=message):
        main(flags)
    assert evaluated == []
