"""The evaluation of robust accuracy: what the attacks see, counts, stored outcomes, threats, rows."""

import argparse

import pytest
import torch

from samon.cli.validate import main, prepare
from samon.errors import UserError
from samon.evals import apgd, attacks
from samon.evals.apgd import attack_batches, parse_threats
from samon.evals.attacks import ROBUST, Threat
from samon.evals.datasets import EvalSpec
from tests.eval_sets import FASHION, SYNSETS, DifferentiableReader, make_context, save_model, write_folders
from tests.nets import two_logits
from tests.sets import RANDOM_MODEL

FLAGS = [*RANDOM_MODEL, *FASHION, "--evals", "apgd", "--norm", "linf", "--apgd-targets", "1"]


@pytest.fixture
def linear():
    torch.manual_seed(0)
    net, x, y, radii = two_logits(24, 4)
    return net, x, y, Threat("l2", float(radii["l2"].median()), n_iter=10)


def test_images_and_columns_of_the_evaluation(monkeypatch):
    """Attacks see images in [0, 1] and the model normalized ones; each figure has its attack's name."""
    seen = []

    def outcomes(model, batches, threats, *_):
        _, images, _ = next(iter(batches))
        inside = []
        handle = model.model.register_forward_pre_hook(lambda _, args: inside.append(args[0]))
        model(images)
        handle.remove()
        assert torch.allclose(inside[0], (images - 0.286) / 0.353, atol=1e-6)
        seen.append((float(images.min()), float(images.max()), len(threats)))
        return {threat: torch.tensor([-1, 0, 0, 0, 1, 1, *[ROBUST] * 4]) for threat in threats}

    monkeypatch.setattr(apgd, "attack_batches", outcomes)
    flags = ["--in-chans", "1", "--mean", "0.286", "--std", "0.353", "--num-samples", "10", "--eps", "1/255"]
    rows = {row["metric"]: row["value"] for row in main([*FLAGS, *flags])}
    assert rows == {"robust_top1_apgd-ce": 60, "robust_top1_apgd-t": 40, "robust_top1": 40}
    ((low, high, threats),) = seen
    assert (low, threats) == (0, 1)
    assert 0.9 < high <= 1


def test_outcomes_do_not_depend_on_batches_and_are_stored(linear, tmp_path):
    net, x, y, threat = linear
    index = torch.arange(len(x))

    def outcomes(size):
        batches = [(index[i : i + size], x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
        return attack_batches(net, batches, [threat], tmp_path)[threat]

    whole = outcomes(24)
    assert 0 < (whole >= ROBUST).sum() < len(x)
    assert torch.equal(whole, outcomes(12))
    assert len(list(tmp_path.glob("*.npy"))) == 3

    def fail(*_):
        raise AssertionError("attacked again")

    handle = net.register_forward_pre_hook(fail)
    assert torch.equal(outcomes(12), whole)
    handle.remove()
    net[1].bias.data[0] += 1  # other weights: nothing stored fits
    outcomes(12)
    assert len(list(tmp_path.glob("*.npy"))) == 5


def test_vanished_gradients_are_noted_in_rows_and_log(tmp_path, caplog):
    root = write_folders(tmp_path, {SYNSETS[i]: [i] for i in (1, 2, 4, 6)})  # of ImageNet-R
    context = make_context(DifferentiableReader(), norm="linf", eps="0.001", apgd_iters=1, apgd_targets=1)
    rows = apgd.evaluate(*prepare(context, EvalSpec("r", "", str(root), "", ["apgd"], "imagenet-r"), "apgd"))
    assert {row["metric"]: row["value"] for row in rows}["robust_top1"] == 100
    note = "gradients of 4 images are exactly zero: accuracy may be overstated"  # this model rounds what it sees
    assert {row["note"] for row in rows} == {note}
    assert f"apgd r, linf 0.255/255: {note}" in caplog.text


def test_plain_radii_are_for_l2_if_fractions_are_among_them():
    budget = {"apgd_iters": 5, "apgd_targets": 2, "apgd_restarts": 1, "seed": 3, "attack": "apgd"}

    def threats(norm, eps):
        return [(t.norm, t.eps) for t in parse_threats(argparse.Namespace(norm=norm, eps=eps, **budget))]

    assert threats("l2,linf", "0.5, 1/255") == [("l2", 0.5), ("linf", 1 / 255)]
    assert threats("l2,Linf,l2", "0.5,0.25,0.50") == [("l2", 0.5), ("l2", 0.25), ("linf", 0.5), ("linf", 0.25)]
    for wrong in ("0", "-1", "nan", "inf", "1/0", "a/255"):
        with pytest.raises(UserError, match="write positive numbers"):
            threats("l2", wrong)
    with pytest.raises(UserError, match="--norm l1: use l2, linf"):
        threats("l1", "1")


def test_program_reports_every_attack():
    pytest.importorskip("pyautoattack")
    flags = ["--attack", "standard", "--eps", "0.001", "--apgd-iters", "2", "--bootstrap", "20", "--num-samples", "6"]
    rows = main([*FLAGS, *flags])
    names = [f"robust_top1_{name}" for name in ("apgd-ce", "apgd-t", "fab-t", "square")]
    assert [row["metric"] for row in rows] == [*names, "robust_top1"]
    values = [row["value"] for row in rows]
    assert values == sorted(values, reverse=True)
    assert values[-1] == values[-2]
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)


def test_an_interrupted_attack_of_the_same_model_resumes(tmp_path, monkeypatch):
    """Another number of attention heads is another model, although its weights have the same shapes."""
    weights = save_model(tmp_path / "net.pth", "vit_tiny_cifar", depth=1)
    flags = [*FLAGS, "--model", "vit_tiny_cifar", "--eps", "1/255", "--apgd-iters", "1", "--num-samples", "20"]
    flags += ["--checkpoint", weights, "--apgd-state", str(tmp_path / "state")]
    flags += ["--apgd-batch-size", "10", "--model-kwargs", "depth=1"]
    attacked, attack = [], attacks.attack
    monkeypatch.setattr(attacks, "attack", lambda *args: attacked.append(args) or attack(*args))
    first = main(flags)
    next((tmp_path / "state").iterdir()).unlink()  # as if stopped after one batch
    assert main(flags) == first
    assert len(attacked) == 2 + 1
    main([*flags, "num_heads=6"])
    assert len(attacked) == 2 + 1 + 2
