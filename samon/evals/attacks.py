"""AutoAttack on a batch of images: APGD-CE, targeted APGD-DLR, then FAB-T and Square if asked for.

Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks". Images are [B, C, H, W] in [0, 1]; the model normalizes its own input (`Normalized`). FAB-T and Square come
from the package `pyautoattack`.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samon.evals.context import predict

APGD = ("apgd-ce", "apgd-t")
ATTACKS = (*APGD, "fab-t", "square")  # in the order of AutoAttack's standard version
ROBUST = len(ATTACKS)  # outcome of an image: -1 misclassified, k adversarial by ATTACKS[k], ROBUST otherwise
VANISHED = 2 * ROBUST  # added to the outcome if an attack failed whose first gradient was exactly zero

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, indices of the images) -> loss per image


@dataclass(frozen=True)
class Threat:
    """A norm ball and how hard it is searched.

    Attributes:
        norm: "l2" or "linf".
        eps: radius, for images in [0, 1].
        standard: run FAB-T and Square after APGD.
    """

    norm: str
    eps: float
    n_iter: int = 100
    n_targets: int = 9
    restarts: int = 1
    seed: int = 0
    standard: bool = False

    @property
    def attacks(self) -> tuple[str, ...]:
        return ATTACKS if self.standard else APGD


class Normalized(nn.Module):
    """A model that takes images in [0, 1] and normalizes them: (x - mean) / std."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std)).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return predict(self.model, (x - self.mean) / self.std)


# --- step size (section 3 of the paper), for the ascent in input space and in weight space --------------------------


def checkpoints(n_iter: int) -> dict[int, int]:
    """Iterations (0-based) after which the step size is checked, with the number of iterations since the last check.

    Intervals start at 0.22 n and shrink by 0.03 n each, to at least 0.06 n, in whole iterations rounded down, at
    least 1, as in the released AutoAttack (the paper writes them as fractions of n).
    """
    length, shortest, shrink = (max(int(f * n_iter), 1) for f in (0.22, 0.06, 0.03))
    ends: dict[int, int] = {}
    end = -1
    while end + length < n_iter:
        end += length
        ends[end] = length
        length = max(length - shrink, shortest)
    return ends


class StepSize:
    """Auto-PGD's step size for each of B problems (images, or one batch whose loss the weights maximize).

    At a checkpoint it is halved if at most (`strict`: fewer than) 3/4 of the interval's steps were improvements, or if
    the best loss has not changed over an interval that began without halving. The caller then returns to its best
    point, and decides what counts as an improvement.

    Args:
        initial: first step size, [B].
        best: best loss so far, [B].
        checks: iterations to check after, see `checkpoints`.
    """

    def __init__(self, initial: Tensor, best: Tensor, checks: dict[int, int], strict: bool = False) -> None:
        self.size = initial.clone()
        self.checks, self.strict = checks, strict
        self.improvements = torch.zeros_like(initial)
        self.best_at_check = best.clone()
        self.halved = torch.ones_like(initial, dtype=torch.bool)

    def update(self, iteration: int, improved: Tensor, best: Tensor) -> Tensor | None:
        """Count an iteration; at a checkpoint return which problems halved their step, bool [B]."""
        self.improvements += improved
        length = self.checks.get(iteration)
        if length is None:
            return None
        limit = 0.75 * length
        few = self.improvements < limit if self.strict else self.improvements <= limit
        stuck = ~self.halved & (self.best_at_check >= best)
        self.halved = few | stuck
        self.size = torch.where(self.halved, self.size / 2, self.size)
        self.best_at_check = best.clone()
        self.improvements = torch.zeros_like(self.improvements)
        return self.halved

    def select(self, mask: Tensor) -> None:
        """Drop the problems outside `mask`, bool [B]."""
        self.size, self.improvements = self.size[mask], self.improvements[mask]
        self.best_at_check, self.halved = self.best_at_check[mask], self.halved[mask]


# --- Auto-PGD -------------------------------------------------------------------------------------------------------


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def unit(x: Tensor, norm: str) -> Tensor:
    """Divide every image by its own l_inf or l2 norm (plus 1e-12, so that zero stays zero)."""
    size = x.abs().flatten(1).amax(1) if norm == "linf" else x.square().flatten(1).sum(1).sqrt()
    return x / (_per_image(size, x) + 1e-12)


def project(x: Tensor, center: Tensor, norm: str, eps: float) -> Tensor:
    """Project onto the ball around `center`, then onto [0, 1] (in this order, as published)."""
    if norm == "linf":
        return torch.clamp(torch.min(torch.max(x, center - eps), center + eps), 0.0, 1.0)
    delta = x - center
    length = delta.square().flatten(1).sum(1).sqrt().clamp(max=eps)
    return torch.clamp(center + unit(delta, norm) * _per_image(length, delta), 0.0, 1.0)


def dlr_targeted(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """Targeted difference-of-logits ratio: -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2), [B]."""
    ordered = logits.sort(dim=1).values
    rows = torch.arange(len(logits), device=logits.device)
    scale = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4])
    return -(logits[rows, label] - logits[rows, target]) / (scale + 1e-12)


def _loss_and_grad(model: nn.Module, x: Tensor, loss_fn: Loss, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss per image, its gradient with respect to x, and the predicted classes."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        loss = loss_fn(logits, rows)
        (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad, logits.detach().argmax(1)


@torch.no_grad()
def apgd(
    model: nn.Module, images: Tensor, label: Tensor, loss_fn: Loss, start: Tensor, threat: Threat
) -> tuple[Tensor, Tensor]:
    """Run Auto-PGD (Algorithm 1) once from `start`, maximizing `loss_fn` for each image.

    Images are independent: one that is adversarial is finished and leaves the batch.

    Returns:
        (adversarial: bool [B]; vanished: bool [B], the first gradient is exactly zero)
    """
    norm, eps = threat.norm, threat.eps
    adversarial = torch.zeros_like(label, dtype=torch.bool)
    rows, center, x = torch.arange(len(images), device=images.device), images, start
    loss, grad, predicted = _loss_and_grad(model, x, loss_fn, rows)
    vanished = grad.flatten(1).abs().amax(1) == 0
    best, best_x, best_grad, x_before = loss.clone(), x.clone(), grad.clone(), x.clone()
    # The released attack compares the first iterate's loss with 0 instead of the start's, so this one does too.
    loss_before = torch.zeros_like(loss)
    step = StepSize(torch.full_like(loss, 2 * eps), best, checkpoints(threat.n_iter))
    for i in range(threat.n_iter + 1):
        wrong = predicted != label[rows]
        if wrong.any():
            adversarial[rows[wrong]] = True
            remaining = ~wrong
            step.select(remaining)
            state = (rows, center, x, x_before, grad, loss_before, best, best_x, best_grad)
            rows, center, x, x_before, grad, loss_before, best, best_x, best_grad = (t[remaining] for t in state)
        if i == threat.n_iter or not len(rows):
            break
        momentum = 0.75 if i > 0 else 1.0
        direction = grad.sign() if norm == "linf" else unit(grad, norm)
        z = project(x + _per_image(step.size, x) * direction, center, norm, eps)
        z = x + (z - x) * momentum + (x - x_before) * (1 - momentum)
        x_before, x = x, project(z, center, norm, eps)
        loss, grad, predicted = _loss_and_grad(model, x, loss_fn, rows)
        higher = loss > best
        best = torch.where(higher, loss, best)
        best_x = torch.where(_per_image(higher, x), x, best_x)
        best_grad = torch.where(_per_image(higher, x), grad, best_grad)
        halved = step.update(i, loss > loss_before, best)
        loss_before = loss
        if halved is not None:
            # `predicted` is of x: an adversarial x must not be replaced before it is recorded above.
            back = _per_image(halved & (predicted == label[rows]), x)
            x, grad = torch.where(back, best_x, x), torch.where(back, best_grad, grad)
    return adversarial, vanished


# --- all attacks ----------------------------------------------------------------------------------------------------


def starting_noise(threat: Threat, attack: str, target: int, restart: int, index: Tensor, shape: torch.Size) -> Tensor:
    """Noise [B, *shape] for the starting points, uniform in [-1, 1] (linf) or normal (l2).

    It depends on the threat's seed, the run and the sample's index alone, not on batch or process.
    """
    rows = []
    for i in index.tolist():
        words = np.random.SeedSequence([threat.seed, ATTACKS.index(attack), target, restart, i]).generate_state(2)
        generator = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        draw = torch.rand if threat.norm == "linf" else torch.randn
        rows.append(draw(shape, generator=generator))
    return torch.stack(rows) * 2 - 1 if threat.norm == "linf" else torch.stack(rows)


@torch.no_grad()
def attack(model: nn.Module, images: Tensor, label: Tensor, index: Tensor, threat: Threat) -> Tensor:
    """Attack the images in turn by all attacks of a threat, each those still robust; return outcomes [B] (`ROBUST`)."""
    ranking = model(images).argsort(dim=1)  # last column: the predicted class
    threat = replace(threat, n_targets=min(threat.n_targets, ranking.shape[1] - 1))
    outcome = torch.where(ranking[:, -1] == label, ROBUST, -1)
    without_gradient = torch.zeros_like(outcome)
    ranks = [("apgd-ce", 0), *(("apgd-t", rank) for rank in range(2, threat.n_targets + 2))]  # of the target class
    for (name, target), restart in itertools.product(ranks, range(threat.restarts)):
        rows = (outcome == ROBUST).nonzero().flatten()
        if not len(rows):
            break
        x, y, target_class = images[rows], label[rows], ranking[rows, -target]

        def loss_fn(z: Tensor, r: Tensor, name: str = name, y: Tensor = y, target: Tensor = target_class) -> Tensor:
            if name == "apgd-ce":
                return F.cross_entropy(z, y[r], reduction="none")
            return dlr_targeted(z, y[r], target[r])

        noise = starting_noise(threat, name, target, restart, index[rows.cpu()], x.shape[1:]).to(x)
        start = (x + threat.eps * unit(noise, threat.norm)).clamp(0.0, 1.0)
        adversarial, vanished = apgd(model, x, y, loss_fn, start, threat)
        outcome[rows[adversarial]] = ATTACKS.index(name)
        without_gradient[rows[vanished & ~adversarial]] = VANISHED
    for name in threat.attacks[len(APGD) :]:
        rows = (outcome == ROBUST).nonzero().flatten()
        if len(rows):
            adversarial = fab_or_square(name, model, images[rows], label[rows], threat)
            outcome[rows[adversarial]] = ATTACKS.index(name)
    return outcome + without_gradient


def without_marks(outcome: Tensor) -> Tensor:
    """Outcomes without `VANISHED`."""
    return torch.where(outcome >= VANISHED, outcome - VANISHED, outcome)


def fab_or_square(name: str, model: nn.Module, images: Tensor, label: Tensor, threat: Threat) -> Tensor:
    """Run `fab-t` or `square` once; return which images are adversarial, bool [B]. Torch's generators are restored.

    With `n_iter` = 100 as in AutoAttack's standard version: FAB-T runs `n_iter` iterations for each of `n_targets`
    classes, Square makes 50 `n_iter` queries.
    """
    from pyautoattack import AutoAttack

    norm, eps, seed = threat.norm, threat.eps, threat.seed
    options = {"norm": norm.capitalize(), "eps": eps, "seed": seed, "version": "custom", "attacks": [name]}
    attacks = AutoAttack(model, **options, device=images.device)
    with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
        if name == "fab-t":
            run = attacks.fab
            run.targeted, run.n_restarts, run.n_iter = True, 1, threat.n_iter
            run.n_target_classes, run.seed = threat.n_targets, seed
        else:
            run = attacks.square
            run.n_queries, run.seed = 50 * threat.n_iter, seed
        perturbed = run.perturb(images, label)
    delta = (perturbed - images).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    return (model(perturbed).argmax(1) != label) & (size <= eps * (1 + 1e-4))  # float32: they end on the sphere
