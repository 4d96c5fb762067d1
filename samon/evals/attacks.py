"""Robust accuracy under the two white-box attacks of AutoAttack: APGD-CE, then targeted APGD-DLR.

Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks". Images are [B, C, H, W] in [0, 1]; the model normalises its own input (`Normalized`).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from samon.errors import UserError
from samon.evals.apgd import StepSize, checkpoints
from samon.evals.calibration import interval
from samon.evals.entry import (
    Device,
    Entry,
    EvalImages,
    Target,
    batches,
    choose,
    evaluating,
    full_precision,
    one_label,
    predict,
    progress,
    share,
)
from samon.evals.results import Row
from samon.files import replacing

ATTACKS = ("apgd-ce", "apgd-t")
Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, which images) -> loss per image
ROBUST = len(ATTACKS)  # outcome of an image: -1 misclassified as it is, k fooled by ATTACKS[k], ROBUST otherwise


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


@dataclass(frozen=True)
class Threat:
    """A norm ball and how hard it is searched. ``eps`` is in units of the [0, 1] image."""

    norm: str  # 'l2' or 'linf'
    eps: float
    n_iter: int = 100
    n_targets: int = 9
    restarts: int = 1
    seed: int = 0


Batch = tuple[Tensor, Tensor, Tensor]  # index, images in [0, 1], label
# (attack, target rank, restart, indices of the images, image shape, norm) -> noise of shape [B, *image shape]
Noise = Callable[[str, int, int, Tensor, torch.Size, str], Tensor]
Tick = Callable[[str], None]  # hears what is going on


def _silent(_: str) -> None:
    pass


def _prefixed(tick: Tick, prefix: str, text: str) -> None:
    tick(f"{prefix} {text}")


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
    model: nn.Module, images: Tensor, label: Tensor, loss_fn: Loss, start: Tensor, threat: Threat, tick: Tick = _silent
) -> tuple[Tensor, Tensor]:
    """One Auto-PGD run from ``start``: (fooled [B] bool, an image that fools where there is one, else the clean one).

    ``loss_fn(logits, rows)`` is the per-image loss to maximise, of the images numbered ``rows``. Images are
    independent, so one that is fooled is settled and leaves the batch; the others go on as published. ``tick``
    hears of every iteration.
    """
    norm, eps = threat.norm, threat.eps
    found, fooled = images.clone(), torch.zeros_like(label, dtype=torch.bool)
    rows, centre, x = torch.arange(len(images), device=images.device), images, start
    loss, grad, predicted = _evaluate(model, x, loss_fn, rows)
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
    return fooled, found


@torch.no_grad()
def attack(
    model: nn.Module, images: Tensor, label: Tensor, index: Tensor, threat: Threat, noise: Noise, tick: Tick = _silent
) -> Tensor:
    """Outcome of every image [B] (see `ROBUST`): each run attacks only the points that are still robust."""
    logits = model(images)
    classes = logits.shape[1]
    if classes < 4:
        raise UserError(f"apgd: the targeted DLR loss needs at least 4 classes, the model has {classes}; take another")
    ranking = logits.argsort(dim=1)  # last column: the predicted class
    outcome = torch.where(ranking[:, -1] == label, ROBUST, -1)
    for name, target, restart in _runs(threat, classes):
        rows = (outcome == ROBUST).nonzero().flatten()
        if not len(rows):
            break
        x, y, wanted = images[rows], label[rows], ranking[rows, -target]

        def loss_fn(z: Tensor, r: Tensor, name: str = name, y: Tensor = y, wanted: Tensor = wanted) -> Tensor:
            if name == "apgd-ce":
                return F.cross_entropy(z, y[r], reduction="none")
            return dlr_targeted(z, y[r], wanted[r])

        draw = noise(name, target, restart, index[rows.cpu()], x.shape[1:], threat.norm).to(x)
        start = (x + threat.eps * unit(draw, threat.norm)).clamp(0.0, 1.0)
        run = f"{name} {target - 1}" if name == "apgd-t" else name
        fooled, _ = apgd(model, x, y, loss_fn, start, threat, partial(_prefixed, tick, run))
        outcome[rows[fooled]] = ATTACKS.index(name)
    return outcome


def _runs(threat: Threat, classes: int) -> Iterator[tuple[str, int, int]]:
    """(attack, rank of the target class counted from the likeliest, restart) in the order of the attacks."""
    last = min(threat.n_targets, classes - 1) + 1
    for name, targets in zip(ATTACKS, (range(1), range(2, last + 1)), strict=True):
        yield from ((name, target, restart) for target in targets for restart in range(threat.restarts))


def fingerprint(*parts: Tensor | str) -> str:
    """A name for these values: what makes a stored outcome safe to take up again."""
    digest = hashlib.sha256()
    for part in parts:
        flat = part if isinstance(part, str) else part.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.encode() if isinstance(flat, str) else flat.numpy().data)
    return digest.hexdigest()[:24]


def robust_outcomes(
    model: nn.Module,
    batches: Iterable[Batch],
    threats: list[Threat],
    *,
    device: Device,
    state: Path | None = None,
    bar: tqdm | None = None,
) -> dict[Threat, Tensor]:
    """{threat: outcomes of this process's images, int64 [n]}, images in the order ``batches`` gives them.

    With ``state`` (a directory) every batch's outcome is stored under the fingerprint of weights, images and threat
    as soon as it is known, and never attacked twice. ``bar`` counts images times threats, and moves within a batch.
    """
    weights = fingerprint(str(model), *model.state_dict().values()) if state else ""
    outcomes: dict[Threat, list[Tensor]] = {threat: [] for threat in threats}
    with evaluating(model, gradients=False), full_precision():  # only the image needs a gradient: 12 % faster
        for index, images, label in batches:
            for threat, parts in outcomes.items():
                path = state and state / f"{fingerprint(weights, repr(threat), index, images, label)}.npy"
                if path and path.exists():
                    parts.append(torch.from_numpy(np.load(path)))
                else:
                    parts.append(_outcome(model, (index, images, label), threat, device, bar))
                    if path:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with replacing(path) as file:
                            np.save(file, parts[-1].numpy())
                if bar is not None:
                    bar.update(sum(len(p) for ps in outcomes.values() for p in ps) - bar.n)
    empty = torch.empty(0, dtype=torch.int64)
    return {threat: torch.cat([empty, *parts]) for threat, parts in outcomes.items()}


def _outcome(model: nn.Module, batch: Batch, threat: Threat, device: Device, bar: tqdm | None) -> Tensor:
    """`attack` of one batch, on the CPU; every iteration moves the bar by its share of the batch."""
    index, images, label = batch
    part = 0.999 * len(images) / (threat.n_iter * threat.restarts * (1 + threat.n_targets))  # rounding: never above

    def tick(text: str) -> None:
        if bar is not None:
            bar.set_postfix_str(f"{threat.norm} {threat.eps:.3g} {text}", refresh=False)
            bar.update(part)

    noise = seeded_noise(threat.seed)
    return attack(model, images.to(device), label.to(device), index, threat, noise, tick).cpu()


def summarize(outcome: Tensor) -> dict[str, int]:
    """Counts over [n] outcomes: correct as they are, and still robust after each attack in turn."""
    after = {f"robust_{name}": int((outcome > k).sum()) for k, name in enumerate(ATTACKS)}
    return {"clean": int((outcome >= 0).sum()), **after, "num_samples": len(outcome)}


def radius(text: str) -> float:
    """A positive number, or a fraction such as 0.25/255."""
    above, _, below = text.partition("/")
    try:
        eps = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        eps = 0.0
    if not 0 < eps < float("inf"):
        raise UserError(f"--eps {text!r}: write positive numbers such as 0.25 or 0.25/255")
    return eps


def threats(config: Any) -> list[Threat]:
    """Every norm with every radius; where plain and a/255 radii are mixed, plain ones are for l2 alone."""
    norms = [norm.strip().lower() for norm in config.norm.split(",")]
    if set(norms) - {"l2", "linf"}:
        raise UserError(f"--norm {config.norm}: use l2, linf or both, comma-separated")
    radii = {text: radius(text) for text in map(str.strip, config.eps.split(","))}
    mixed = len({"/" in text for text in radii}) == 2
    budget = config.apgd_iters, config.apgd_targets, config.apgd_restarts, config.seed
    pairs = [(norm, text) for norm in norms for text in radii if not mixed or ("/" in text) == (norm == "linf")]
    found = [Threat(norm, radii[text], *budget) for norm, text in pairs]
    if not found:
        raise UserError(f"--eps {config.eps}: no radius fits --norm {config.norm}")
    return found


def prepare(target: Target, entry: Entry) -> tuple[EvalImages, nn.Module, Callable[[Tensor], Tensor], list[Threat]]:
    """(images, model of images in [0, 1], what makes classes of labels, threats); mistakes are found before any work.

    On a set with predictions among some classes the attacked model has their logits alone.
    """
    images = entry.images(target)
    net, classes = one_label("apgd", entry, images, target.model)
    model = Normalized(net, target.data_config["mean"], target.data_config["std"]).to(target.device)
    return images, model, classes, threats(target.config)


def rows(target: Target, entry: Entry) -> list[Row]:
    """Robust accuracy under both attacks, after each of them, for every threat."""
    config, (images, model, classes, balls) = target.config, prepare(target, entry)
    chosen, size = choose(len(images), config.num_samples, config.seed, entry.first), config.apgd_batch_size
    data = ((index, x, classes(y)) for _, index, x, y in batches(target, images, chosen, size, raw=True))
    state = Path(config.apgd_state) if config.apgd_state else None
    mine = len(share(chosen, size, target.rank, target.world))
    with progress(target, f"apgd {entry.name}", mine * len(balls)) as bar:
        outcomes = robust_outcomes(model, data, balls, device=target.device, state=state, bar=bar)
    found: list[Row] = []
    for threat, outcome in outcomes.items():
        clean, *after, n = target.total(torch.tensor(list(summarize(outcome).values()))).tolist()
        eps = f"{threat.eps * 255:g}/255" if threat.norm == "linf" else f"{threat.eps:g}"
        about = {"num_samples": n, "norm": threat.norm, "eps": threat.eps, "setting": f"{threat.norm} {eps}"}
        about |= {"clean_top1": 100 * clean / n}
        values = dict(zip((f"robust_top1_{name}" for name in ATTACKS), after, strict=True)) | {"robust_top1": after[-1]}
        for metric, value in values.items():
            found.append({"metric": metric, "value": 100 * value / n, **about})
            if config.bootstrap:
                hits = torch.cat([torch.full((value,), 100.0), torch.zeros(n - value)])
                bounds = interval(hits, config.bootstrap, config.seed)
                found[-1] |= dict(zip(("low", "high"), bounds, strict=True))
    return found
