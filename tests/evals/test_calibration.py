"""Calibration, intervals, classes, corruption errors and means over checkpoints, against values worked out by hand."""

import csv
import os
import statistics

import pytest
import timm
import torch
import torch.nn.functional as F

from samon.errors import UserError
from samon.evals import corruptions, results
from samon.evals.accuracy import details
from samon.evals.calibration import confusion, expected_calibration_error, interval
from samon.evals.main import main
from tests.evals.test_shifts import SYNSETS, write
from tests.sets import RANDOM_MODEL

FLAGS = [*RANDOM_MODEL]
FASHION = ["--dataset", "wds/fashion-mnist", "--data-dir", "data/fashion-mnist", "--num-samples", "40"]


def test_calibration_error_is_the_weighted_gap_of_the_bins():
    confidence = torch.tensor([0.9, 0.95, 0.93, 0.55, 0.6, 0.2])  # bins (14/15, 1], (13/15, 14/15], (8/15, 9/15], ...
    right = torch.tensor([1.0, 0, 1, 1, 0, 1])
    gaps = [abs(2 - 1.83), abs(0 - 0.95), abs(1 - 1.15), abs(1 - 0.2)]
    assert expected_calibration_error(confidence, right) == pytest.approx(100 * sum(gaps) / 6, rel=1e-6)
    seven = (torch.arange(10) < 7).float()
    assert expected_calibration_error(torch.full((10,), 0.7), seven) == pytest.approx(0, abs=1e-5)
    assert expected_calibration_error(torch.ones(4), torch.zeros(4)) == 100
    # Two of four right at confidence 0.5 and 0.999 alike: one bin would hide what two tell.
    apart = torch.tensor([0.5, 0.5, 0.999, 0.999]), torch.tensor([1.0, 1, 0, 0])
    assert expected_calibration_error(*apart) == pytest.approx(74.95, abs=1e-3)
    assert expected_calibration_error(*apart, bins=1) == pytest.approx(24.95, abs=1e-3)


def test_details_of_a_batch():
    logits = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    target = torch.arange(12) % 7
    found = details(logits, target, None, None)
    p = logits.double().softmax(1)
    assert torch.allclose(found[:, 2], -p[torch.arange(12), target].log(), atol=1e-6)
    assert torch.allclose(found[:, 4], p.amax(1), atol=1e-6)
    assert found[:, 5].tolist() == logits.argmax(1).tolist()
    assert found[:, 6].tolist() == target.tolist()
    table = F.one_hot(target, 7).bool()
    assert torch.allclose(details(logits, torch.arange(12), None, table), found, atol=1e-6)
    table[3] = False
    uncounted = details(logits, torch.arange(12), None, table)
    assert uncounted[3, :4].tolist() == [0, 0, 0, 0]


def test_bootstrap_interval_is_that_of_a_share():
    """Resampled counts of k in n are binomial: 2.5 % and 97.5 % of Binomial(400, 0.8) / 400 are 0.76 and 0.8375."""
    hits = (torch.arange(400) < 320).double()
    low, high = interval(hits, 4000, seed=1)
    assert low == pytest.approx(0.76, abs=0.004)
    assert high == pytest.approx(0.8375, abs=0.004)
    assert interval(hits, 50, seed=1) == interval(hits, 50, seed=1) != interval(hits, 50, seed=2)


def test_confusion_has_the_true_class_in_its_rows():
    matrix = confusion(torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 2, 0]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]


def test_class_report_agrees_with_the_accuracy_and_rows_have_bounds(tmp_path):
    torch.manual_seed(0)
    rows = main([*FLAGS, *FASHION, "--class-report", str(tmp_path / "report"), "--bootstrap", "40"])
    found = {row["metric"]: row for row in rows}
    assert list(found) == ["top1", "top5", "loss", "ece"]
    for metric in ("top1", "top5", "loss"):
        assert found[metric]["low"] <= found[metric]["value"] <= found[metric]["high"]
    (name,) = [p for p in (tmp_path / "report").iterdir() if p.name.endswith("-per_class.csv")]
    with name.open() as file:
        classes = list(csv.DictReader(file))
    assert sum(int(row["images"]) for row in classes) == 40
    hits = sum(int(row["images"]) * float(row["top1"]) for row in classes if row["top1"])
    assert hits / 40 == pytest.approx(found["top1"]["value"])
    with name.with_name(name.name.replace("per_class", "confusion")).open() as file:
        matrix = [list(map(int, row[1:])) for row in list(csv.reader(file))[1:]]
    assert sum(map(sum, matrix)) == 40
    assert [sum(row) for row in matrix] == [int(row["images"]) for row in classes]


def test_class_reports_of_two_splits_and_odd_names(tmp_path):
    odd = os.fsdecode(b"caf\xe9")  # Latin-1
    for split in ("train", "val"):
        for name, number in (("a", 0), (odd, 1)):
            write(tmp_path / "set" / split, {name: [number] * (2 if split == "train" else 1)})
    suite = "".join(f"- {{data_dir: {tmp_path}/set, split: {split}}}\n" for split in ("train", "val"))
    (tmp_path / "suite.yaml").write_text(suite)
    flags = [
        "--model",
        "test_resnet",
        "--no-pretrained",
        "--num-classes",
        "2",
        "--img-size",
        "32",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    rows = main([*flags, "--suite", str(tmp_path / "suite.yaml"), "--class-report", str(tmp_path / "report")])
    assert [row["dataset"] for row in rows if row["metric"] == "top1"] == ["set train", "set val"]
    for split, count in (("train", 2), ("val", 1)):
        text = (tmp_path / f"report/test_resnet-set {split}-per_class.csv").read_bytes()
        assert text.splitlines()[2].startswith(b"1,caf\xe9,%d," % count)


def test_mean_corruption_error_is_relative_to_alexnet():
    """A network that errs as AlexNet does has mCE 100; half its errors is 50 (Hendrycks & Dietterich 2019)."""
    # AlexNet's errors as the paper prints them: noise (3), blur (4), weather (4), digital (4).
    printed = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7]
    assert list(corruptions.ALEXNET.values()) == pytest.approx(printed, abs=0.051)
    rows = []
    for name, error in corruptions.ALEXNET.items():
        for severity in range(1, 6):
            value = 100 - error * (0.5 if name == "fog" else 1.0) - 3 * (severity - 3)  # only the mean counts
            about = {"model": "m", "dataset": f"c/{name}/{severity}", "split": "", "num_samples": 4}
            about |= {"corruption": name, "severity": severity, "whole": "c", "eval": "accuracy"}
            rows += [{**about, "metric": "top1", "value": value}, {**about, "metric": "loss", "value": 1.0}]
    # AlexNet's errors in the order of the paper's table, as its authors' code has them.
    errors = [88.6428, 89.4468, 92.264, 81.988, 82.6268, 78.5948, 79.836, 86.6816, 82.6572, 81.9324, 56.4592, 85.3204]
    assert list(corruptions.ALEXNET.values()) == [*errors, 64.6056, 71.784, 60.65]
    found = corruptions.errors(rows)
    mean, *each = found
    assert mean["metric"] == "mce"
    assert mean["value"] == pytest.approx((14 * 100 + 50) / 15)
    assert {row["setting"]: round(row["value"], 6) for row in each}["fog"] == 50
    assert {row["dataset"] for row in found} == {"c"}
    assert corruptions.errors([{"eval": "accuracy", "metric": "top1", "value": 1.0}]) == []


def test_imagenet_c_is_one_entry_of_a_suite(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corruptions, "ALEXNET", {"fog": 81.9324, "snow": 86.6816})
    for name in ("fog", "snow"):
        for severity in range(1, 6):
            write(tmp_path / "c" / name / str(severity), {SYNSETS[i]: [i] for i in (1, 2)})
    (tmp_path / "suite.yaml").write_text(f"- {{set: imagenet-c, data_dir: {tmp_path / 'c'}}}\n")
    flags = ["--model", "test_resnet", "--no-pretrained", "--workers", "0", "--device", "cpu", "--img-size", "32"]
    rows = main([*flags, "--suite", str(tmp_path / "suite.yaml"), "--results-file", str(tmp_path / "rows.csv")])
    (mean,) = [row for row in rows if row["metric"] == "mce"]
    assert mean["preprocessing"].startswith("images of 32x32 as they are, others bilinear, crop_pct ")
    tops = [row for row in rows if row["metric"] == "top1" and row["setting"] == "1000 classes"]
    assert len(tops) == 10
    assert mean["num_samples"] == 20
    error = {n: statistics.fmean(100 - r["value"] for r in tops if r["corruption"] == n) for n in ("fog", "snow")}
    assert mean["value"] == pytest.approx(50 * (error["fog"] / 81.9324 + error["snow"] / 86.6816))
    table = capsys.readouterr().out
    assert "| imagenet-c | accuracy fog |" in table
    assert "; images of 32x32 as they are, others" in table
    assert "imagenet-c/fog" not in table.replace("imagenet-c/fog/1: 2 classes", "")


def test_group_is_mean_and_sample_deviation():
    base = {"model": "m", "dataset": "d", "eval": "accuracy", "metric": "top1", "num_samples": 9}
    rows = [base | {"checkpoint": name, "value": value} for name, value in (("a", 1.0), ("b", 2.0), ("c", 6.0))]
    (row, other) = results.grouped([*rows, base | {"model": "n", "value": 5.0}])
    assert row == base | {"value": 3.0, "std": pytest.approx(7**0.5), "checkpoints": 3}
    assert (other["model"], other["std"]) == ("n", None)
    assert "3.00 ± 2.65" in results.markdown([row])
    rows[1]["note"] = "vanished"
    (row,) = results.grouped(rows)
    assert (row["checkpoints"], row["note"]) == (3, "of 1 of 3 checkpoints, such as: vanished")
    assert "such as: vanished |" in results.markdown([row])


def test_checkpoints_given_together_are_one_column(tmp_path, capsys):
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        paths.append(str(tmp_path / f"{seed}.pth"))
        torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), paths[-1])
    single = main([*FLAGS, *FASHION, "--checkpoint", *paths])
    capsys.readouterr()
    rows = main([*FLAGS, *FASHION, "--checkpoint", *paths, "--group"])
    tops = [row["value"] for row in single if row["metric"] == "top1"]
    assert rows[0]["value"] == pytest.approx(statistics.fmean(tops))
    assert rows[0]["std"] == pytest.approx(statistics.stdev(tops))
    assert "±" in capsys.readouterr().out
    for several in ([], ["--checkpoint", paths[0], paths[0]]):  # the same one twice has no deviation
        with pytest.raises(UserError, match="--group: give several checkpoints"):
            main([*FLAGS, *FASHION, "--group", *several])
    with pytest.raises(UserError, match=r"--group gives .* --bootstrap an interval for each: drop one"):
        main([*FLAGS, *FASHION, "--checkpoint", *paths, "--group", "--bootstrap", "10"])
