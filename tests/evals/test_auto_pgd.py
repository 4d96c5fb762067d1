"""Auto-PGD step by step against a naive loop written after the paper (Croce & Hein 2020, Algorithm 1) and its released
first comparison. float64, 1e-9: forty steps of the same arithmetic in another order."""

import pytest
import torch
from torch import Tensor, nn

from samon.evals import attacks, main, robustness
from samon.evals.attacks import ROBUST, VANISHED, Threat, apgd, attack, dlr_targeted, seeded_noise
from samon.evals.attacks import project as into_ball
from samon.evals.robustness import robust_outcomes

N = 40


def wiggly(z: Tensor) -> Tensor:
    """A loss [B] with ridges much narrower than the first step: most steps overshoot."""
    slopes = torch.linspace(15, 45, z.shape[1], dtype=z.dtype)
    return (torch.sin(slopes * z) * torch.linspace(1, 2, z.shape[1], dtype=z.dtype)).sum(1)


def loss_and_gradient(x: Tensor) -> tuple[float, Tensor]:
    x = x.clone().requires_grad_()
    loss = wiggly(x.flatten()[None])[0]
    (grad,) = torch.autograd.grad(loss, x)
    return loss.item(), grad


def naive(centre: Tensor, start: Tensor, norm: str, eps: float) -> tuple[list[Tensor], int, int]:
    """One image: (every iterate, halvings, returns to a best point that was not the last one)."""
    ball = lambda x: into_ball(x[None], centre[None], norm, eps)[0]  # noqa: E731
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
def test_every_iterate_is_the_papers(norm: str, eps: float) -> None:
    """The images are their own logits, so the loss sees every iterate; class 0 is never left."""
    torch.manual_seed(0)
    images = 0.3 + 0.2 * torch.rand(6, 1, 2, 4, dtype=torch.float64)
    images[:, 0, 0, 0] = 1.0
    start = (images + eps / 4 * torch.randn_like(images)).clamp(0, 1)
    start[:, 0, 0, 0] = 1.0
    seen: list[Tensor] = []

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        seen.append(logits.detach().clone())
        return wiggly(logits)

    label = torch.zeros(6, dtype=torch.long)
    fooled, *_ = apgd(nn.Flatten(), images, label, loss, start, Threat(norm, eps, N))
    assert not fooled.any()
    assert len(seen) == N + 1
    halvings = returns = 0
    for i in range(6):
        path, halved, went_back = naive(images[i], start[i], norm, eps)
        halvings, returns = halvings + halved, returns + went_back
        for step, (x, logits) in enumerate(zip(path, seen, strict=True)):
            assert torch.allclose(logits[i], x.flatten(), rtol=0, atol=1e-9), (i, step)
    assert halvings > 6
    assert returns > 3


def test_the_targeted_loss_by_hand() -> None:
    """z_y - z_t = 2, and 4 - (2 + 0) / 2 = 3."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 0.0, -1.0]])
    found = dlr_targeted(logits, torch.tensor([0]), torch.tensor([2]))
    assert found.item() == pytest.approx(-2 / 3)


def test_targets_are_the_next_classes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the clean logits, likeliest first, --apgd-targets of them; cross-entropy before all."""
    net = nn.Linear(4, 6, bias=False)
    x, y = torch.rand(1, 4), torch.tensor([0])
    with torch.no_grad():
        net.weight.copy_(torch.tensor([5.0, 1.0, 4.0, 0.0, 3.0, 2.0])[:, None].expand(6, 4))
    asked: list[int] = []
    plain = attacks.dlr_targeted
    monkeypatch.setattr(attacks, "dlr_targeted", lambda z, y, t: asked.append(int(t)) or plain(z, y, t))

    def unsuccessful(model, images, label, loss_fn, *_):
        loss_fn(model(images), torch.arange(len(images)))
        none = torch.zeros(len(images), dtype=torch.bool)
        return none, images, none

    monkeypatch.setattr(attacks, "apgd", unsuccessful)
    outcome = attack(net, x, y, torch.arange(1), Threat("linf", 0.1, 5, n_targets=3), seeded_noise(0))
    assert asked == [2, 4, 5]
    assert outcome.tolist() == [ROBUST]


def test_the_targeted_loss_decides_where_cross_entropy_did_not() -> None:
    """Its gradient vanishes in float32 where the net is sure of itself; differences of logits do not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    x = 0.25 + 0.5 * torch.rand(64, 3, 2, 2)
    with torch.no_grad():
        net[1].weight *= 1000
        y = net(x).argmax(1)
    outcomes = robust_outcomes(net, [(torch.arange(64), x, y)], [Threat("linf", 0.1, 10)])
    outcome = next(iter(outcomes.values()))
    fooled = outcome == 1 + VANISHED  # marked, as cross-entropy had no gradient to follow
    assert fooled.sum() > 5
    assert (outcome == -1).sum() == 0


def test_images_and_columns_of_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks see images in [0, 1] and the model normalised ones; each figure under its attack's name."""
    asked: list[tuple[float, float, float]] = []

    def outcomes(model, data, balls, *_):
        _, images, _ = next(iter(data))
        inside: list[Tensor] = []
        handle = model.model.register_forward_pre_hook(lambda _, args: inside.append(args[0]))
        model(images)
        handle.remove()
        assert torch.allclose(inside[0], (images - 0.286) / 0.353, atol=1e-6)
        asked.append((float(images.min()), float(images.max()), len(balls)))
        return {ball: torch.tensor([-1, 0, 0, 0, 1, 1, *[ROBUST] * 4]) for ball in balls}

    monkeypatch.setattr(robustness, "robust_outcomes", outcomes)
    words = ["--dataset", "wds/fashion-mnist", "--data-dir", "data/fashion-mnist"]
    words += ["--model", "test_resnet", "--no-pretrained"]
    words += ["--num-classes", "10", "--in-chans", "1", "--img-size", "32", "--mean", "0.286", "--std", "0.353"]
    words += ["--num-samples", "10", "--workers", "0", "--device", "cpu", "--norm", "linf", "--eps", "1/255"]
    found = {row["metric"]: row["value"] for row in main.main([*words, "--evals", "apgd"])}
    assert found == {"robust_top1_apgd-ce": 60, "robust_top1_apgd-t": 40, "robust_top1": 40}
    ((low, high, balls),) = asked
    assert (low, balls) == (0, 1)
    assert 0.9 < high <= 1
