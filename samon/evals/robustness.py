"""Robust accuracy of a data set under the attacks of AutoAttack (Tables 4, 14 and 15)."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from samon.errors import UserError
from samon.evals import autoattack
from samon.evals.attacks import VANISHED, Batch, Normalized, Threat, attack, check_classes, seeded_noise, unmarked
from samon.evals.batch_size import fastest, gradient_rate
from samon.evals.calibration import bounds
from samon.evals.entry import Entry, EvalImages, Target, batches, choose, evaluating, one_label, share
from samon.evals.results import Row
from samon.files import atomic_write
from samon.progress import progress_bar

log = logging.getLogger("samon")


def fingerprint(*parts: Tensor | str) -> str:
    """A name for these values: what makes a stored outcome safe to take up again."""
    digest = hashlib.sha256()
    for part in parts:
        flat = part if isinstance(part, str) else part.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.encode() if isinstance(flat, str) else flat.numpy().data)
    return digest.hexdigest()[:24]


def robust_outcomes(
    model: nn.Module, batches: Iterable[Batch], balls: list[Threat], state: Path | None = None, bar: tqdm | None = None
) -> dict[Threat, Tensor]:
    """{threat: outcomes of this process's images, int64 [n]}, images in the order ``batches`` gives them.

    With ``state`` (a directory) every batch's outcome is stored under the fingerprint of weights, images and threat
    as soon as it is known, and never attacked twice. ``bar`` counts images times threats, and moves within a batch.
    """
    weights = fingerprint(str(model), *model.state_dict().values()) if state else ""
    outcomes: dict[Threat, list[Tensor]] = {threat: [] for threat in balls}
    with evaluating(model, gradients=False):  # only the image needs a gradient: 12 % faster
        for index, images, label in batches:
            for threat, parts in outcomes.items():
                path = state and state / f"{fingerprint(weights, repr(threat), index, images, label)}.npy"
                if path and path.exists():
                    parts.append(torch.from_numpy(np.load(path)))
                else:
                    parts.append(_outcome(model, (index, images, label), threat, bar))
                    if path:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with atomic_write(path) as file:
                            np.save(file, parts[-1].numpy())
                if bar is not None:
                    bar.update(sum(len(p) for ps in outcomes.values() for p in ps) - bar.n)
    empty = torch.empty(0, dtype=torch.int64)
    return {threat: torch.cat([empty, *parts]) for threat, parts in outcomes.items()}


def _outcome(model: nn.Module, batch: Batch, threat: Threat, bar: tqdm | None) -> Tensor:
    """`attack` of one batch, on the CPU; every iteration moves the bar by its share of the batch."""
    index, images, label = batch
    part = 0.999 * len(images) / (threat.n_iter * threat.restarts * (1 + threat.n_targets))  # rounding: never above

    def tick(text: str) -> None:
        if bar is not None:
            bar.set_postfix_str(f"{threat.norm} {threat.eps:.3g} {text}", refresh=False)
            bar.update(part)

    noise = seeded_noise(threat.seed)
    return attack(model, images, label, index, threat, noise, tick).cpu()


def summarize(outcome: Tensor, attacks: tuple[str, ...]) -> dict[str, int]:
    """Counts over [n] outcomes: correct as they are, still robust after each attack in turn, without a gradient."""
    vanished, outcome = outcome >= VANISHED, unmarked(outcome)
    after = {f"robust_{name}": int((outcome > k).sum()) for k, name in enumerate(attacks)}
    return {"clean": int((outcome >= 0).sum()), **after, "vanished": int(vanished.sum()), "num_samples": len(outcome)}


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
    budget = config.apgd_iters, config.apgd_targets, config.apgd_restarts, config.seed, config.attack == "standard"
    pairs = [(norm, text) for norm in norms for text in radii if not mixed or ("/" in text) == (norm == "linf")]
    found = [Threat(norm, radii[text], *budget) for norm, text in pairs]
    if not found:
        raise UserError(f"--eps {config.eps}: no radius fits --norm {config.norm}")
    return found


def prepare(target: Target, entry: Entry) -> tuple[EvalImages, nn.Module, list[Threat]]:
    """(images, model of images in [0, 1], threats); mistakes are found before any work.

    On a set with predictions among some classes the attacked model has their logits alone.
    """
    if target.config.attack == "standard":
        autoattack.check()
    images = entry.images(target)
    columns, _ = next(iter(images.scorings.values()))
    check_classes(int(target.model.num_classes) if columns is None else len(columns))  # type: ignore[arg-type]
    net = one_label("apgd", entry, images, target.model)
    model = Normalized(net, target.data_config["mean"], target.data_config["std"]).to(target.device)
    return images, model, threats(target.config)


def _size_that_fills(target: Target, model: nn.Module, images: int) -> int:
    """As the first process measures it on its device, for all."""
    found = torch.zeros(1, dtype=torch.int64)
    if target.rank == 0:
        image = torch.rand(target.data_config["input_size"], device=target.device)
        with evaluating(model, gradients=False):
            found += fastest(gradient_rate(model, image), min(1024, images))
    return int(target.total(found))


def rows(target: Target, entry: Entry) -> list[Row]:
    """Robust accuracy under both attacks, after each of them, for every threat."""
    config, (images, model, balls) = target.config, prepare(target, entry)
    chosen = choose(len(images), config.num_samples, config.seed, entry.first)
    size = config.apgd_batch_size or _size_that_fills(target, model, len(chosen))
    data = ((index, x, y) for _, index, x, y in batches(target, images, chosen, size, raw=True))
    state = Path(config.apgd_state) if config.apgd_state else None
    mine = len(share(chosen, size, target.rank, target.world))
    with progress_bar(f"apgd {entry.name}", mine * len(balls), "image", show=target.rank == 0) as bar:
        outcomes = robust_outcomes(model, data, balls, state, bar)
    found: list[Row] = []
    for threat, outcome in outcomes.items():
        counts = target.total(torch.tensor(list(summarize(outcome, threat.attacks).values())))
        clean, *after, vanished, n = counts.tolist()
        eps = f"{threat.eps * 255:g}/255" if threat.norm == "linf" else f"{threat.eps:g}"
        about = {"num_samples": n, "norm": threat.norm, "eps": threat.eps, "setting": f"{threat.norm} {eps}"}
        about |= {"clean_top1": 100 * clean / n}
        if vanished:
            about["note"] = f"gradients of {vanished} images are exactly zero: accuracy may be overstated"
            if target.rank == 0:
                log.warning("apgd %s, %s: %s", entry.name, about["setting"], about["note"])
        values = dict(zip((f"robust_top1_{name}" for name in threat.attacks), after, strict=True))
        values["robust_top1"] = after[-1]
        for metric, value in values.items():
            hits = torch.cat([torch.full((value,), 100.0), torch.zeros(n - value)])
            found.append({"metric": metric, "value": 100 * value / n, **about, **bounds(hits, config)})
    return found
