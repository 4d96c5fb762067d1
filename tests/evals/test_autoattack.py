"""FAB-T and Square after APGD, and the search for a batch size."""

import pytest
import torch

from samon.evals import autoattack, main
from samon.evals.attacks import ATTACKS, ROBUST, Threat, attack, seeded_noise, unmarked
from samon.evals.batch_size import fastest
from tests.nets import two_logits
from tests.sets import RANDOM_MODEL

FLAGS = [*RANDOM_MODEL]
FLAGS += ["--dataset", "wds/fashion-mnist", "--data-dir", "data/fashion-mnist", "--num-samples", "6"]


@pytest.fixture
def linear():
    torch.manual_seed(0)
    net, *others = two_logits(32, 6)
    return net.requires_grad_(False), *others


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_fab_finds_the_closed_form_of_a_linear_model_and_square_never_more(linear, norm):
    pytest.importorskip("pyautoattack")
    net, x, y, radii = linear
    eps = float(radii[norm].median())
    clear = (radii[norm] - eps).abs() > 0.02 * eps
    state = torch.get_rng_state()
    with torch.no_grad():
        threat = Threat(norm, eps, n_iter=20, n_targets=3)
        fab, square = (autoattack.fooled(name, net, x, y, threat) for name in ("fab-t", "square"))
    assert torch.equal(fab[clear], (radii[norm] < eps)[clear])
    assert square.any()
    assert not (square & (radii[norm] > 1.02 * eps)).any()
    assert torch.equal(torch.get_rng_state(), state)


def test_each_attack_sees_what_the_ones_before_left(linear, monkeypatch):
    net, x, y, radii = linear
    seen = []

    def fooled(name, model, images, label, threat):
        seen.append((name, len(images), threat))
        return torch.arange(len(images)) < 2

    monkeypatch.setattr(autoattack, "fooled", fooled)
    eps = float(radii["l2"].median())
    threat = Threat("l2", eps, n_iter=20, standard=True)
    plain = unmarked(attack(net, x, y, torch.arange(32), Threat("l2", eps, n_iter=20), seeded_noise(0)))
    outcome = unmarked(attack(net, x, y, torch.arange(32), threat, seeded_noise(0)))
    left = int((plain == ROBUST).sum())
    budget = Threat("l2", eps, n_iter=20, n_targets=3, standard=True)
    assert seen == [("fab-t", left, budget), ("square", left - 2, budget)]
    assert (outcome == ATTACKS.index("fab-t")).sum() == (outcome == ATTACKS.index("square")).sum() == 2
    assert (outcome == ROBUST).sum() == left - 4


def test_program_reports_every_attack():
    pytest.importorskip("pyautoattack")
    flags = ["--evals", "apgd", "--attack", "standard", "--norm", "linf", "--eps", "0.001", "--apgd-iters", "2"]
    rows = main.main([*FLAGS, *flags, "--apgd-targets", "1", "--bootstrap", "20"])
    names = [f"robust_top1_{name}" for name in ("apgd-ce", "apgd-t", "fab-t", "square")]
    assert [row["metric"] for row in rows] == [*names, "robust_top1"]
    values = [row["value"] for row in rows]
    assert values == sorted(values, reverse=True)
    assert values[-1] == values[-2]
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)


def test_the_fastest_batch_size():
    rates = {1: 10.0, 2: 19.0, 4: 36.0, 8: 60.0, 16: 61.0, 32: 60.0, 64: 900.0}
    assert fastest(rates.get, 1024) == 8  # two doublings without 5 % end it
    assert fastest({1: 10.0, 2: 19.0, 4: 19.5, 8: 30.0}.get, 1024) == 8  # one alone does not; 16 does not fit
    assert fastest(rates.get, 5) == 4
    assert fastest({}.get, 8) == 1


def test_program_searches_the_batch_size(monkeypatch):
    tried = []
    monkeypatch.setattr("samon.evals.robustness.fastest", lambda rate, most: tried.append((rate(1) > 0, most)) or 4)
    flags = ["--evals", "apgd", "--norm", "linf", "--eps", "0.001", "--apgd-iters", "1", "--apgd-targets", "1"]
    rows = main.main([*FLAGS, *flags, "--apgd-batch-size", "0"])
    assert tried == [(True, 6)]
    assert rows[0]["num_samples"] == 6
