"""Accuracy over a loader equals its definition; its rows, intervals and class reports."""

import csv
import math
import os

import pytest
import torch
import torch.nn.functional as F

from samon.cli.validate import main
from samon.evals.accuracy import accuracy
from tests.eval_sets import FASHION, write_folders
from tests.sets import RANDOM_MODEL

LOGITS = torch.randn(37, 9, generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(0, 9, (37,), generator=torch.Generator().manual_seed(1))


class Table(torch.nn.Module):
    """Gives the logits that its input names by row."""

    def forward(self, rows):
        assert not self.training
        return LOGITS[rows]


def test_figures_equal_their_definition_and_the_mode_is_restored():
    model = Table().train()
    found = accuracy(model, zip(torch.arange(37).split(10), TARGET.split(10), strict=True), device="cpu")
    order = LOGITS.argsort(1, descending=True)
    assert found["num_samples"] == 37
    assert found["top1"] == pytest.approx(100 * (order[:, 0] == TARGET).double().mean().item())
    assert found["top5"] == pytest.approx(100 * (order[:, :5] == TARGET[:, None]).any(1).double().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(LOGITS, TARGET).item(), rel=1e-6)
    assert model.training
    assert math.isnan(accuracy(Table(), [], device="cpu")["loss"])


def test_class_report_agrees_with_the_accuracy_and_rows_have_intervals(tmp_path):
    torch.manual_seed(0)
    flags = [*RANDOM_MODEL, *FASHION, "--num-samples", "40", "--bootstrap", "40"]
    rows = {row["metric"]: row for row in main([*flags, "--class-report", str(tmp_path / "report")])}
    assert list(rows) == ["top1", "top5", "loss", "ece"]
    for metric in ("top1", "top5", "loss"):
        assert rows[metric]["low"] <= rows[metric]["value"] <= rows[metric]["high"]
    (name,) = [p for p in (tmp_path / "report").iterdir() if p.name.endswith("-per_class.csv")]
    classes = list(csv.DictReader(name.read_text().splitlines()))
    assert sum(int(row["images"]) for row in classes) == 40
    hits = sum(int(row["images"]) * float(row["top1"]) for row in classes if row["top1"])
    assert hits / 40 == pytest.approx(rows["top1"]["value"])
    text = name.with_name(name.name.replace("per_class", "confusion")).read_text()
    matrix = [list(map(int, row[1:])) for row in list(csv.reader(text.splitlines()))[1:]]
    assert [sum(row) for row in matrix] == [int(row["images"]) for row in classes]


def test_class_reports_of_two_splits_and_of_names_that_are_not_utf8(tmp_path):
    for split, count in (("train", 2), ("val", 1)):
        write_folders(tmp_path / "set" / split, {"a": [0] * count, os.fsdecode(b"caf\xe9"): [1] * count})
    suite = "".join(f"- {{data_dir: {tmp_path}/set, split: {split}}}\n" for split in ("train", "val"))
    (tmp_path / "suite.yaml").write_text(suite)
    flags = [*RANDOM_MODEL, "--num-classes", "2", "--suite", str(tmp_path / "suite.yaml")]
    rows = main([*flags, "--class-report", str(tmp_path / "report")])
    assert [row["dataset"] for row in rows if row["metric"] == "top1"] == ["set train", "set val"]
    for split, count in (("train", 2), ("val", 1)):
        text = (tmp_path / f"report/test_resnet-set {split}-per_class.csv").read_bytes()
        assert text.splitlines()[2].startswith(b"1,caf\xe9,%d," % count)
