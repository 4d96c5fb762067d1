"""Calibration, intervals and confusion matrices against values worked out by hand."""

import pytest
import torch
import torch.nn.functional as F

from samon.evals.metrics import (
    Scoring,
    bootstrap_interval,
    confusion_matrix,
    expected_calibration_error,
    per_sample_metrics,
)


def test_calibration_error_is_the_weighted_gap_of_the_bins():
    confidence = torch.tensor([0.9, 0.95, 0.93, 0.55, 0.6, 0.2])  # bins (14/15, 1], (13/15, 14/15], (8/15, 9/15], ...
    right = torch.tensor([1.0, 0, 1, 1, 0, 1])
    gaps = [abs(2 - 1.83), abs(0 - 0.95), abs(1 - 1.15), abs(1 - 0.2)]
    assert expected_calibration_error(confidence, right) == pytest.approx(100 * sum(gaps) / 6, rel=1e-6)
    assert expected_calibration_error(torch.ones(4), torch.zeros(4)) == 100
    # Two of four right at confidence 0.5 and 0.999 alike: one bin would hide what two show.
    apart = torch.tensor([0.5, 0.5, 0.999, 0.999]), torch.tensor([1.0, 1, 0, 0])
    assert expected_calibration_error(*apart) == pytest.approx(74.95, abs=1e-3)
    assert expected_calibration_error(*apart, bins=1) == pytest.approx(24.95, abs=1e-3)


def test_one_right_class_per_label_gives_the_metrics_of_the_labels():
    logits = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    target = torch.arange(12) % 7
    found = per_sample_metrics(logits, target, Scoring())
    assert torch.allclose(found[:, 4], logits.double().softmax(1).amax(1), atol=1e-6)
    assert found[:, 5:].tolist() == torch.stack([logits.argmax(1), target], 1).tolist()
    as_sets = Scoring(None, F.one_hot(target, 7).bool())
    assert torch.allclose(per_sample_metrics(logits, torch.arange(12), as_sets), found, atol=1e-6)


def test_bootstrap_interval_is_that_of_a_proportion():
    """Resampled counts of k in n are binomial: 2.5 % and 97.5 % of Binomial(400, 0.8) / 400 are 0.76 and 0.8375."""
    hits = (torch.arange(400) < 320).double()
    low, high = bootstrap_interval(hits, 4000, seed=1)
    assert low == pytest.approx(0.76, abs=0.004)
    assert high == pytest.approx(0.8375, abs=0.004)
    assert bootstrap_interval(hits, 50, seed=1) == bootstrap_interval(hits, 50, seed=1)
    assert bootstrap_interval(hits, 50, seed=1) != bootstrap_interval(hits, 50, seed=2)


def test_confusion_matrix_has_a_row_per_true_class():
    matrix = confusion_matrix(torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 2, 0]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
