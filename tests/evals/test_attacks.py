"""Auto-PGD step by step against a naive loop written after the paper (Croce & Hein 2020, Algorithm 1) and its released
first comparison (float64, 1e-9: forty steps of the same arithmetic in another order), the attacks against closed forms
and the authors' code."""

import pytest
import torch
from torch import Tensor, nn

from samon.evals import attacks
from samon.evals.attacks import (
    ATTACKS,
    ROBUST,
    VANISHED,
    Normalized,
    Threat,
    apgd,
    attack,
    checkpoints,
    dlr_targeted,
    project,
    without_marks,
)
from tests.nets import two_logits

N = 40


def attack_all(net, x, y, threat):
    return attack(net, x, y, torch.arange(len(x)), threat)


# --- one step after the other ---------------------------------------------------------------------------------------
def wiggly(z: Tensor) -> Tensor:
    """A loss [B] with ridges much narrower than the first step: most steps overshoot."""
    slopes = torch.linspace(15, 45, z.shape[1], dtype=z.dtype)
    return (torch.sin(slopes * z) * torch.linspace(1, 2, z.shape[1], dtype=z.dtype)).sum(1)


def loss_and_gradient(x: Tensor) -> tuple[float, Tensor]:
    x = x.clone().requires_grad_()
    loss = wiggly(x.flatten()[None])[0]
    (grad,) = torch.autograd.grad(loss, x)
    return loss.item(), grad


def naive_apgd(center: Tensor, start: Tensor, norm: str, eps: float) -> tuple[list[Tensor], int, int]:
    """One image: (every iterate, halvings, returns to a best point that was not the last one)."""
    ball = lambda x: project(x[None], center[None], norm, eps)[0]  # noqa: E731
    x = before = best_x = start
    loss, grad = loss_and_gradient(x)
    best, best_grad, best_at_check = loss, grad, loss
    size, halved_before, halvings, returns = 2 * eps, True, 0, 0
    interval, since, losses, path = int(0.22 * N), 0, [0.0], [x]
    for i in range(N):
        momentum = 1 if i == 0 else 0.75
        step = grad.sign() if norm == "linf" else grad / (grad.square().sum().sqrt() + 1e-12)
        z = ball(x + size * step)
        before, x = x, ball(x + momentum * (z - x) + (1 - momentum) * (x - before))
        loss, grad = loss_and_gradient(x)
        path.append(x)
        losses.append(loss)
        if loss > best:
            best, best_x, best_grad = loss, x, grad
        since += 1
        if since < interval:
            continue
        rises = sum(b > a for a, b in zip(losses[-since - 1 : -1], losses[-since:], strict=True))
        if rises <= 0.75 * since or (not halved_before and best_at_check >= best):
            size, halved_before, halvings = size / 2, True, halvings + 1
            returns += not torch.equal(x, best_x)
            x, grad = best_x, best_grad
        else:
            halved_before = False
        best_at_check, since = best, 0
        interval = max(interval - max(int(0.03 * N), 1), max(int(0.06 * N), 1))
    return path, halvings, returns


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.3)])
def test_every_iterate_is_the_papers(norm, eps):
    """The images are their own logits, so the loss sees every iterate; class 0 is never left."""
    torch.manual_seed(0)
    images = 0.3 + 0.2 * torch.rand(6, 1, 2, 4, dtype=torch.float64)
    images[:, 0, 0, 0] = 1.0
    start = (images + eps / 4 * torch.randn_like(images)).clamp(0, 1)
    start[:, 0, 0, 0] = 1.0
    seen = []

    def loss(logits, rows):
        seen.append(logits.detach().clone())
        return wiggly(logits)

    label = torch.zeros(6, dtype=torch.long)
    adversarial, *_ = apgd(nn.Flatten(), images, label, loss, start, Threat(norm, eps, N))
    assert not adversarial.any()
    assert len(seen) == N + 1
    halvings = returns = 0
    for i in range(6):
        path, halved, went_back = naive_apgd(images[i], start[i], norm, eps)
        halvings, returns = halvings + halved, returns + went_back
        for step, (x, logits) in enumerate(zip(path, seen, strict=True)):
            assert torch.allclose(logits[i], x.flatten(), rtol=0, atol=1e-9), (i, step)
    assert halvings > 6
    assert returns > 3


def test_checkpoints_projection_normalization_and_targeted_loss_by_hand():
    assert checkpoints(100) == {21: 22, 40: 19, 56: 16, 69: 13, 79: 10, 86: 7, 92: 6, 98: 6}
    center = torch.full((1, 1, 1, 2), 0.5)
    far = torch.tensor([[[[0.5 + 3.0, 0.5 + 4.0]]]])
    assert torch.allclose(project(far, center, "l2", 0.5), center + torch.tensor([0.3, 0.4]))
    assert torch.allclose(project(far, center, "linf", 0.6), torch.tensor(1.0))
    assert torch.allclose(Normalized(nn.Identity(), [0.5], [0.25])(far), (far - 0.5) / 0.25)
    logits = torch.tensor([[4.0, 3.0, 2.0, 0.0, -1.0]])  # z_y - z_t = 2, and 4 - (2 + 0) / 2 = 3
    assert dlr_targeted(logits, torch.tensor([0]), torch.tensor([2])).item() == pytest.approx(-2 / 3)


# --- all attacks ----------------------------------------------------------------------------------------------------
def test_targets_are_the_next_classes_in_turn(monkeypatch):
    """Of the clean logits, likeliest first, --apgd-targets of them; cross-entropy before all."""
    logits, targets = torch.tensor([[5.0, 1.0, 4.0, 0.0, 3.0, 2.0]]), []
    monkeypatch.setattr(attacks, "dlr_targeted", lambda z, y, t: targets.append(int(t)) or dlr_targeted(z, y, t))

    def unsuccessful(model, images, label, loss_fn, *_):
        loss_fn(logits, torch.arange(1))
        return torch.tensor([False]), torch.tensor([False])

    monkeypatch.setattr(attacks, "apgd", unsuccessful)
    outcome = attack_all(nn.Identity(), logits, torch.tensor([0]), Threat("linf", 0.1, 5, n_targets=3))
    assert targets == [2, 4, 5]
    assert outcome.tolist() == [ROBUST]


def test_the_targeted_loss_decides_where_cross_entropy_has_no_gradient():
    """It vanishes in float32 if the net is sure of itself, and is marked; ratios of logits are those of any scale."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    x = 0.25 + 0.5 * torch.rand(64, 3, 2, 2)
    y = net(x).argmax(1)
    plain = attack_all(net, x, y, Threat("linf", 0.1, 10))
    with torch.no_grad():
        net[1].weight *= 1e5
        net[1].bias *= 1e5
    outcome = attack_all(net, x, y, Threat("linf", 0.1, 10))
    assert (plain < VANISHED).all()
    assert (plain == 0).any()
    assert (outcome == 1 + VANISHED).sum() > 5
    assert torch.equal(without_marks(outcome) == ROBUST, plain == ROBUST)


def test_a_linear_model_has_the_robust_radius_of_the_closed_form():
    torch.manual_seed(0)
    net, x, y, radii = two_logits(64, 2)
    for norm, radius in radii.items():
        eps = float(radius.median())
        robust = without_marks(attack_all(net, x, y, Threat(norm, eps))) == ROBUST
        clear = (radius - eps).abs() > 1e-3 * eps
        assert torch.equal(robust[clear], (radius > eps)[clear])


# --- the authors' code ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained():
    """(a small network trained on Fashion-MNIST, 24 of its images, their labels)."""
    pytest.importorskip("pyautoattack")
    from tools.bench_attack import images, train_network

    torch.manual_seed(0)
    return train_network(600), *images("train", 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "eps", "targets"), [("l2", 0.25, 2), ("l2", 0.5, 9), ("linf", 2 / 255, 2), ("linf", 4 / 255, 9)]
)
def test_the_same_images_are_robust_as_by_the_authors_code(trained, norm, eps, targets, monkeypatch):
    from pyautoattack import AutoAttack

    net, x, y = trained
    names = ["apgd-ce", "apgd-t"]
    theirs = AutoAttack(net, norm=norm.capitalize(), eps=eps, version="custom", attacks=names, seed=0)
    theirs.apgd.n_iter = theirs.apgd_targeted.n_iter = 100 if targets == 2 else 25
    theirs.apgd.n_restarts = 1  # as in AutoAttack's standard version
    theirs.apgd_targeted.n_target_classes = targets  # the standard version has 9
    perturbed, _ = theirs.run_standard_evaluation(x, y, batch_size=len(x))
    expected = net(perturbed).argmax(1) == y
    state = {}

    def same_noise(threat, name, target, restart, index, shape):
        """The noise of their global generator, which is seeded with 0 for each attack."""
        if state.get("attack") != name:
            state.update(attack=name, generator=torch.Generator().manual_seed(0))
        draw = torch.rand if norm == "linf" else torch.randn
        noise = draw(len(index), *shape, generator=state["generator"])
        return 2 * noise - 1 if norm == "linf" else noise

    monkeypatch.setattr(attacks, "starting_noise", same_noise)
    robust = attack_all(net, x, y, Threat(norm, eps, theirs.apgd.n_iter, targets)) == ROBUST
    assert torch.equal(robust, expected)
    assert 0 < robust.sum() < len(x)  # a setting in which the attack decides


# --- FAB-T and Square -----------------------------------------------------------------------------------------------
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
        fab, square = (attacks.fab_or_square(name, net, x, y, threat) for name in ("fab-t", "square"))
    assert torch.equal(fab[clear], (radii[norm] < eps)[clear])
    assert square.any()
    assert not (square & (radii[norm] > 1.02 * eps)).any()
    assert torch.equal(torch.get_rng_state(), state)


def test_each_attack_gets_the_images_that_are_still_robust(linear, monkeypatch):
    net, x, y, radii = linear
    calls = []

    def two(name, model, images, label, threat):
        calls.append((name, len(images), threat))
        return torch.arange(len(images)) < 2

    monkeypatch.setattr(attacks, "fab_or_square", two)
    eps = float(radii["l2"].median())
    left = int((without_marks(attack_all(net, x, y, Threat("l2", eps, n_iter=20))) == ROBUST).sum())
    outcome = without_marks(attack_all(net, x, y, Threat("l2", eps, n_iter=20, standard=True)))
    threat = Threat("l2", eps, n_iter=20, n_targets=3, standard=True)
    assert calls == [("fab-t", left, threat), ("square", left - 2, threat)]
    assert [(outcome == ATTACKS.index(name)).sum() for name in ("fab-t", "square")] == [2, 2]
    assert (outcome == ROBUST).sum() == left - 4
