"""The attacks of AutoAttack on a batch: APGD-CE, then targeted APGD-DLR, then FAB-T and Square if asked for.

Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks". Images are [B, C, H, W] in [0, 1]; the model normalises its own input (`Normalized`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samon.errors import UserError
from samon.evals import autoattack
from samon.evals.apgd import StepSize, checkpoints
from samon.evals.autoattack import APGD, ATTACKS, Threat
from samon.evals.entry import predict

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, which images) -> loss per image
ROBUST = len(ATTACKS)  # outcome of an image: -1 misclassified as it is, k fooled by ATTACKS[k], ROBUST otherwise
VANISHED = 2 * ROBUST  # is added where an attack failed whose gradient at the start was exactly zero


class Normalized(nn.Module):
    """``model`` behind the normalisation (x - mean) / std, so that attacks see images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Iterable[float], std: Iterable[float]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std)).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return predict(self.model, (x - self.mean) / self.std)


Batch = tuple[Tensor, Tensor, Tensor]  # index, images in [0, 1], label
# (attack, target rank, restart, indices of the images, image shape, norm) -> noise of shape [B, *image shape]
Noise = Callable[[str, int, int, Tensor, torch.Size, str], Tensor]
Tick = Callable[[str], None]  # hears what is going on


def unmarked(outcome: Tensor) -> Tensor:
    """Outcomes without `VANISHED`."""
    return torch.where(outcome >= VANISHED, outcome - VANISHED, outcome)


def silent(_: str) -> None:
    pass


def seeded_noise(seed: int) -> Noise:
    """Noise that depends on the image's index only, not on its batch or process: uniform or normal."""

    def noise(attack: str, target: int, restart: int, index: Tensor, shape: torch.Size, norm: str) -> Tensor:
        rows = []
        for i in index.tolist():
            words = np.random.SeedSequence([seed, ATTACKS.index(attack), target, restart, i]).generate_state(2)
            generator = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
            draw = torch.rand if norm == "linf" else torch.randn
            rows.append(draw(shape, generator=generator))
        return torch.stack(rows) * 2 - 1 if norm == "linf" else torch.stack(rows)

    return noise


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def unit(x: Tensor, norm: str) -> Tensor:
    """Every image of ``x`` divided by its own l_inf or l2 norm (plus 1e-12, so zero stays zero)."""
    size = x.abs().flatten(1).amax(1) if norm == "linf" else x.square().flatten(1).sum(1).sqrt()
    return x / (_per_image(size, x) + 1e-12)


def project(point: Tensor, centre: Tensor, norm: str, eps: float) -> Tensor:
    """``point`` brought into the ball around ``centre``, then into [0, 1] (in this order, as published)."""
    if norm == "linf":
        return torch.clamp(torch.min(torch.max(point, centre - eps), centre + eps), 0.0, 1.0)
    delta = point - centre
    length = delta.square().flatten(1).sum(1).sqrt().clamp(max=eps)
    return torch.clamp(centre + unit(delta, norm) * _per_image(length, delta), 0.0, 1.0)


def dlr_targeted(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """Targeted difference-of-logits ratio: -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2), [B]."""
    ordered = logits.sort(dim=1).values
    rows = torch.arange(len(logits), device=logits.device)
    scale = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4])
    return -(logits[rows, label] - logits[rows, target]) / (scale + 1e-12)


def _evaluate(model: nn.Module, x: Tensor, loss_fn: Loss, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(per-image loss, its gradient with respect to x, predicted class); ``rows`` tells the loss who is left."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        loss = loss_fn(logits, rows)
        (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad, logits.detach().argmax(1)


@torch.no_grad()
def apgd(
    model: nn.Module, images: Tensor, label: Tensor, loss_fn: Loss, start: Tensor, threat: Threat, tick: Tick = silent
) -> tuple[Tensor, Tensor, Tensor]:
    """One Auto-PGD run from ``start``: (fooled [B] bool, an image that fools where there is one, else the clean one,
    vanished [B] bool: the gradient at the start is exactly zero).

    ``loss_fn(logits, rows)`` is the per-image loss to maximise, of the images numbered ``rows``. Images are
    independent, so one that is fooled is settled and leaves the batch; the others go on as published. ``tick``
    hears of every iteration.
    """
    norm, eps = threat.norm, threat.eps
    found, fooled = images.clone(), torch.zeros_like(label, dtype=torch.bool)
    rows, centre, x = torch.arange(len(images), device=images.device), images, start
    loss, grad, predicted = _evaluate(model, x, loss_fn, rows)
    vanished = grad.flatten(1).abs().amax(1) == 0
    best, best_x, best_grad, x_before = loss.clone(), x.clone(), grad.clone(), x.clone()
    # The released attack compares the first iterate's loss with 0 instead of the start's: kept, as published.
    before = torch.zeros_like(loss)
    step = StepSize(torch.full_like(loss, 2 * eps), best, checkpoints(threat.n_iter))
    for i in range(threat.n_iter + 1):
        wrong = predicted != label[rows]
        if wrong.any():
            found[rows[wrong]], fooled[rows[wrong]] = x[wrong], True
            left = ~wrong
            step.keep(left)
            rows, centre, x, x_before, grad, before = (t[left] for t in (rows, centre, x, x_before, grad, before))
            best, best_x, best_grad = best[left], best_x[left], best_grad[left]
        if i == threat.n_iter or not len(rows):
            break
        tick(f"iteration {i + 1}/{threat.n_iter}, {len(rows)} robust")
        momentum = 0.75 if i > 0 else 1.0
        direction = grad.sign() if norm == "linf" else unit(grad, norm)
        z = project(x + _per_image(step.size, x) * direction, centre, norm, eps)
        moved = x + (z - x) * momentum + (x - x_before) * (1 - momentum)
        x_before, x = x, project(moved, centre, norm, eps)
        loss, grad, predicted = _evaluate(model, x, loss_fn, rows)
        higher = loss > best
        best = torch.where(higher, loss, best)
        best_x = torch.where(_per_image(higher, x), x, best_x)
        best_grad = torch.where(_per_image(higher, x), grad, best_grad)
        restarted = step.update(i, loss > before, best)
        before = loss
        if restarted is not None:
            # A point that fools the model is read off above before it could be replaced: predicted is of x.
            settled = predicted != label[rows]
            back = _per_image(restarted & ~settled, x)
            x, grad = torch.where(back, best_x, x), torch.where(back, best_grad, grad)
    return fooled, found, vanished


def check_classes(classes: int) -> None:
    """Raise UserError if the model has too few classes for the attacks."""
    if classes < 4:
        raise UserError(f"apgd: the targeted DLR loss needs at least 4 classes, the model has {classes}; drop apgd")


@torch.no_grad()
def attack(
    model: nn.Module, images: Tensor, label: Tensor, index: Tensor, threat: Threat, noise: Noise, tick: Tick = silent
) -> Tensor:
    """Outcome of every image [B] (see `ROBUST` and `VANISHED`): each run attacks what is still robust."""
    logits = model(images)
    classes = logits.shape[1]
    check_classes(classes)
    threat = replace(threat, n_targets=min(threat.n_targets, classes - 1))
    ranking = logits.argsort(dim=1)  # last column: the predicted class
    outcome = torch.where(ranking[:, -1] == label, ROBUST, -1)
    lost = torch.zeros_like(outcome)
    for name, target, restart in _runs(threat):
        rows = (outcome == ROBUST).nonzero().flatten()
        if not len(rows):
            break
        x, y, wanted = images[rows], label[rows], ranking[rows, -target]

        def loss_fn(z: Tensor, r: Tensor, name: str = name, y: Tensor = y, wanted: Tensor = wanted) -> Tensor:
            if name == "apgd-ce":
                return F.cross_entropy(z, y[r], reduction="none")
            return dlr_targeted(z, y[r], wanted[r])

        def told(text: str, run: str = f"{name} {target - 1}" if name == "apgd-t" else name) -> None:
            tick(f"{run} {text}")

        draw = noise(name, target, restart, index[rows.cpu()], x.shape[1:], threat.norm).to(x)
        start = (x + threat.eps * unit(draw, threat.norm)).clamp(0.0, 1.0)
        fooled, _, vanished = apgd(model, x, y, loss_fn, start, threat, told)
        outcome[rows[fooled]] = ATTACKS.index(name)
        lost[rows[vanished & ~fooled]] = VANISHED
    for name in threat.attacks[len(APGD) :]:
        rows = (outcome == ROBUST).nonzero().flatten()
        if len(rows):
            tick(f"{name}, {len(rows)} robust")
            outcome[rows[autoattack.fooled(name, model, images[rows], label[rows], threat)]] = ATTACKS.index(name)
    return outcome + lost


def _runs(threat: Threat) -> Iterator[tuple[str, int, int]]:
    """(attack, rank of the target class counted from the likeliest, restart) in the order of the attacks."""
    for name, targets in zip(APGD, (range(1), range(2, threat.n_targets + 2)), strict=True):
        yield from ((name, target, restart) for target in targets for restart in range(threat.restarts))
