"""The mean corruption error of ImageNet-C against values worked out by hand."""

import statistics

import pytest

from samon.cli.validate import main
from samon.evals import corruptions
from tests.eval_sets import SYNSETS, write_folders


def test_mean_corruption_error_is_relative_to_alexnet():
    """A network that errs as AlexNet does has mCE 100; half its errors is 50 (Hendrycks & Dietterich 2019)."""
    # AlexNet's errors in the order of the paper's table, as its authors' code has them.
    errors = [88.6428, 89.4468, 92.264, 81.988, 82.6268, 78.5948, 79.836, 86.6816, 82.6572, 81.9324, 56.4592, 85.3204]
    assert list(corruptions.ALEXNET.values()) == [*errors, 64.6056, 71.784, 60.65]
    rows = []
    for name, error in corruptions.ALEXNET.items():
        for severity in range(1, 6):
            value = 100 - error * (0.5 if name == "fog" else 1.0) - 3 * (severity - 3)  # only the mean counts
            metadata = {"model": "m", "dataset": f"c/{name}/{severity}", "split": "", "num_samples": 4}
            metadata |= {"corruption": name, "severity": severity, "eval": "accuracy"}
            rows += [metadata | {"metric": "top1", "value": value}, metadata | {"metric": "loss", "value": 1.0}]
    mean, *each = corruptions.corruption_errors(rows)
    assert (mean["metric"], mean["dataset"]) == ("mce", "c")
    assert mean["value"] == pytest.approx((14 * 100 + 50) / 15)
    assert {row["setting"]: round(row["value"], 6) for row in each}["fog"] == 50
    assert corruptions.corruption_errors([{"eval": "accuracy", "metric": "top1", "value": 1.0}]) == []


def test_imagenet_c_is_one_entry_of_a_suite(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corruptions, "ALEXNET", {"fog": 81.9324, "snow": 86.6816})
    for name in ("fog", "snow"):
        for severity in range(1, 6):
            write_folders(tmp_path / "c" / name / str(severity), {SYNSETS[i]: [i] for i in (1, 2)})
    (tmp_path / "suite.yaml").write_text(f"- {{set: imagenet-c, data_dir: {tmp_path / 'c'}}}\n")
    flags = ["--model", "test_resnet", "--no-pretrained", "--workers", "0", "--device", "cpu", "--img-size", "32"]
    rows = main([*flags, "--suite", str(tmp_path / "suite.yaml"), "--results-file", str(tmp_path / "rows.csv")])
    (mean,) = [row for row in rows if row["metric"] == "mce"]
    assert mean["preprocessing"].startswith("images of 32x32 as they are, others bilinear, crop_pct ")
    top1 = [row for row in rows if row["metric"] == "top1" and row["setting"] == "1000 classes"]
    assert (len(top1), mean["num_samples"]) == (10, 20)
    error = {n: statistics.fmean(100 - r["value"] for r in top1 if r["corruption"] == n) for n in ("fog", "snow")}
    assert mean["value"] == pytest.approx(50 * (error["fog"] / 81.9324 + error["snow"] / 86.6816))
    table = capsys.readouterr().out
    assert "| imagenet-c |  | accuracy fog |" in table
    assert "imagenet-c/fog" not in table.replace("imagenet-c/fog/1: 2 classes", "")
