"""The attacks against the original authors' implementation, and what surrounds them."""

import argparse

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import to_tensor

from samon.data.sources import open_source
from samon.errors import UserError
from samon.evals.apgd import StepSize, checkpoints
from samon.evals.attacks import ROBUST, VANISHED, Normalized, Threat, apgd, attack, project, seeded_noise, unmarked
from samon.evals.entry import EvalImages
from samon.evals.robustness import robust_outcomes, summarize, threats
from tests.nets import two_logits


@pytest.fixture(scope="module")
def trained():
    """(a small network that has learnt Fashion-MNIST, 24 of its images, their labels)."""
    torch.manual_seed(0)
    source = open_source("wds/fashion-mnist", "data/fashion-mnist", "validation")
    images, labels = zip(*EvalImages(source).__getitems__(list(range(600))), strict=True)
    x, y = torch.stack([to_tensor(image) for image in images]), torch.tensor(labels)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 49, 10),
    )
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(8):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    net.eval()
    assert (net(x).argmax(1) == y).float().mean() > 0.8
    return net, x[:24], y[:24]


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.25), ("l2", 0.5), ("linf", 2 / 255), ("linf", 4 / 255)])
def test_same_points_are_robust_as_by_the_authors_code(trained, norm, eps):
    autoattack = pytest.importorskip("pyautoattack").AutoAttack
    net, x, y = trained
    theirs = autoattack(
        net, norm={"l2": "L2", "linf": "Linf"}[norm], eps=eps, version="custom", attacks=["apgd-ce", "apgd-t"], seed=0
    )
    theirs.apgd.n_restarts = 1  # as in AutoAttack's standard version
    fooling, _ = theirs.run_standard_evaluation(x, y, batch_size=len(x))
    expected = net(fooling).argmax(1) == y

    state = {}

    def same_starts(name, target, restart, index, shape, norm):
        """The draws that their global generator, seeded with 0 for each attack, gives."""
        if state.get("attack") != name:
            state.update(attack=name, generator=torch.Generator().manual_seed(0))
        draw = torch.rand if norm == "linf" else torch.randn
        noise = draw(len(index), *shape, generator=state["generator"])
        return 2 * noise - 1 if norm == "linf" else noise

    index = torch.arange(len(x))
    robust = attack(net, x, y, index, Threat(norm, eps), same_starts) == ROBUST
    assert torch.equal(robust, expected)
    assert 0 < robust.sum() < len(x)  # a setting where the attack decides
    ours = attack(net, x, y, index, Threat(norm, eps), seeded_noise(0)) == ROBUST
    assert abs(int(ours.sum() - expected.sum())) <= 1  # other starting points


def test_fooling_images_lie_in_the_ball_and_fool(trained):
    net, x, y = trained
    for norm, eps in (("l2", 0.5), ("linf", 4 / 255)):

        def loss(logits, rows):
            return F.cross_entropy(logits, y[rows], reduction="none")

        fooled, found, vanished = apgd(net, x, y, loss, x, Threat(norm, eps, n_iter=20))
        assert not vanished.any()
        distance = (found - x).flatten(1).norm(dim=1, p=2 if norm == "l2" else float("inf"))
        assert fooled.any()
        assert (distance <= eps * (1 + 1e-5)).all()
        assert (found >= 0).all()
        assert (found <= 1).all()
        assert (net(found).argmax(1)[fooled] != y[fooled]).all()
        assert torch.equal(found[~fooled], x[~fooled])


def test_outcome_does_not_depend_on_batches_and_is_taken_up_again(trained, tmp_path):
    net, x, y = trained
    threat = Threat("linf", 4 / 255, n_iter=20)
    index = torch.arange(len(x))

    def batches(size):
        return [(index[i : i + size], x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]

    whole = robust_outcomes(net, batches(24), [threat], state=tmp_path)[threat]
    halves = robust_outcomes(net, batches(12), [threat], state=tmp_path)[threat]
    assert torch.equal(whole, halves)
    assert len(list(tmp_path.glob("*.npy"))) == 3

    def fail(*_):
        raise AssertionError("attacked again")

    handle = net.register_forward_pre_hook(fail)
    again = robust_outcomes(net, batches(12), [threat], state=tmp_path)[threat]
    handle.remove()
    assert torch.equal(again, whole)
    net[6].bias.data[0] += 1  # other weights: nothing stored fits
    try:
        robust_outcomes(net, batches(12), [threat], state=tmp_path)
    finally:
        net[6].bias.data[0] -= 1
    assert len(list(tmp_path.glob("*.npy"))) == 5


def test_counts_are_of_images_that_are_still_robust():
    outcome = torch.tensor([-1, 0, 0, 1 + VANISHED, ROBUST, ROBUST, ROBUST + VANISHED])
    found = summarize(outcome, ("apgd-ce", "apgd-t"))
    assert found == {"clean": 6, "robust_apgd-ce": 4, "robust_apgd-t": 3, "vanished": 2, "num_samples": 7}


def test_gradients_that_are_exactly_zero_are_counted(trained):
    """Of logits this large, softmax leaves nothing to follow: cross-entropy fools no image that it fools otherwise."""
    net, x, y = trained
    threat, index = Threat("linf", 8 / 255, n_iter=10, n_targets=1), torch.arange(len(x))
    large = nn.Sequential(net, nn.Linear(10, 10, bias=False)).eval()
    large[1].weight.data = 1e5 * torch.eye(10)
    plain = summarize(attack(net, x, y, index, threat, seeded_noise(0)), threat.attacks)
    found = summarize(attack(large, x, y, index, threat, seeded_noise(0)), threat.attacks)
    assert plain["vanished"] == 0
    assert plain["robust_apgd-ce"] < found["robust_apgd-ce"] == found["vanished"] == found["clean"]
    assert found["robust_apgd-t"] == plain["robust_apgd-t"]  # a ratio of logits, whatever their size


def test_plain_radii_are_for_l2_where_fractions_are_mixed_in():
    budget = {"apgd_iters": 5, "apgd_targets": 2, "apgd_restarts": 1, "seed": 3, "attack": "apgd"}

    def balls(norm, eps):
        return [(t.norm, t.eps) for t in threats(argparse.Namespace(norm=norm, eps=eps, **budget))]

    assert balls("l2,linf", "0.5, 1/255") == [("l2", 0.5), ("linf", 1 / 255)]
    assert balls("l2,Linf", "0.5,0.25") == [("l2", 0.5), ("l2", 0.25), ("linf", 0.5), ("linf", 0.25)]
    for wrong in ("0", "-1", "nan", "inf", "1/0", "a/255"):
        with pytest.raises(UserError, match="write positive numbers"):
            balls("l2", wrong)


def test_a_model_with_three_classes_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.rand(2, 3, 2, 2)
    with pytest.raises(UserError, match="at least 4 classes"):
        attack(net, x, torch.zeros(2, dtype=torch.long), torch.arange(2), Threat("l2", 1), seeded_noise(0))


def test_linear_model_has_the_robust_radius_of_closed_form():
    torch.manual_seed(0)
    net, x, y, radii = two_logits(64, 2)
    for norm, radius in radii.items():
        eps = float(radius.median())
        outcome = attack(net, x, y, torch.arange(64), Threat(norm, eps), seeded_noise(0))
        clear = (radius - eps).abs() > 1e-3 * eps
        assert torch.equal((unmarked(outcome) == ROBUST)[clear], (radius > eps)[clear])


def test_step_size_rule():
    assert checkpoints(100) == {21: 22, 40: 19, 56: 16, 69: 13, 79: 10, 86: 7, 92: 6, 98: 6}
    step = StepSize(torch.tensor([1.0, 1.0]), torch.zeros(2), {3: 4, 5: 2})
    for i in range(4):  # first problem: 3 of 4 steps improve (at most 0.75: halved); second: all
        halved = step.update(i, torch.tensor([i > 0, True]), torch.tensor([3.0, 4.0]))
    assert halved.tolist() == [True, False]
    assert step.size.tolist() == [0.5, 1.0]
    for i in (4, 5):  # both improve always, but the second's best stands still after an interval without halving
        halved = step.update(i, torch.tensor([True, True]), torch.tensor([3.0, 4.0]))
    assert halved.tolist() == [False, True]


def test_projection_and_normalisation_inside_the_model():
    centre = torch.full((1, 1, 1, 2), 0.5)
    far = torch.tensor([[[[0.5 + 3.0, 0.5 + 4.0]]]])
    assert torch.allclose(project(far, centre, "l2", 0.5), centre + torch.tensor([0.3, 0.4]))
    assert torch.allclose(project(far, centre, "linf", 0.6), torch.tensor(1.0))
    model = Normalized(nn.Identity(), [0.5], [0.25])
    assert torch.allclose(model(far), (far - 0.5) / 0.25)
