"""Calibration, intervals and confusion matrices against values worked out by hand."""

import pytest
import torch
import torch.nn.functional as F

from samon.evals.metrics import Scoring, bootstrap_interval, expected_calibration_error, per_sample_metrics


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


@pytest.mark.parametrize("restricted", [False, True])
def test_any_class_of_a_label_is_right_and_a_label_without_one_is_left_out(restricted):
    """Restricted as in timm's validate: a label without a set is an index among the classes."""
    logits = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    sets = torch.zeros(3, 9, dtype=torch.bool)
    sets[0, [2, 5]] = sets[1, 7] = True  # row 2 has no class
    target, classes = torch.arange(12) % 3, [1, 2, 5, 6, 7, 8] if restricted else list(range(9))
    found = per_sample_metrics(logits, target, Scoring(classes if restricted else None, sets))
    some, valid = logits[:, classes], target < 2
    right = sets[target][:, classes]
    assert torch.equal(found[:, 3] > 0, valid)
    assert torch.equal(found[valid, 0] > 0, right.gather(1, some.argmax(1, keepdim=True))[valid, 0])
    assert torch.equal(found[valid, 1] > 0, right.gather(1, some.topk(5).indices)[valid].any(1))
    assert torch.allclose(found[valid, 2].exp(), 1 / (some.double().softmax(1) * right).sum(1)[valid], rtol=1e-5)
    assert not found[~valid, :4].any()
    by_index = per_sample_metrics(logits, target, Scoring(classes))
    assert by_index[:, 2].tolist() == pytest.approx(F.cross_entropy(some, target, reduction="none").tolist(), rel=1e-6)


def test_bootstrap_interval_is_that_of_a_proportion():
    """Resampled counts of k in n are binomial: 2.5 % and 97.5 % of Binomial(400, 0.8) / 400 are 0.76 and 0.8375."""
    hits = (torch.arange(400) < 320).double()
    low, high = bootstrap_interval(hits, 4000, seed=1).values()
    assert low == pytest.approx(0.76, abs=0.004)
    assert high == pytest.approx(0.8375, abs=0.004)
    assert bootstrap_interval(hits, 50, seed=1) == bootstrap_interval(hits, 50, seed=1)
    assert bootstrap_interval(hits, 50, seed=1) != bootstrap_interval(hits, 50, seed=2)
