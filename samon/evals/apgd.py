"""Robust accuracy under the attacks of AutoAttack (Tables 4, 14 and 15)."""

import argparse
import hashlib
import itertools
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from samon.errors import UserError, require_package
from samon.evals import attacks
from samon.evals.attacks import Normalized, Threat
from samon.evals.context import EvalContext, EvalDataset, choose_samples, evaluating, load_batches
from samon.evals.metrics import bootstrap_interval
from samon.evals.results import Result
from samon.files import atomic_write

log = logging.getLogger("samon")
Batch = tuple[Tensor, Tensor, Tensor]  # sample indices, images in [0, 1], labels


def check(context: EvalContext, dataset: EvalDataset) -> None:
    """Check package, number of classes and threats."""
    if context.config.attack == "standard":
        require_package("pyautoattack", "--attack standard needs pyautoattack; run: pip install pyautoattack==0.2.0")
    if (count := context.num_classes) < 4:
        raise UserError(f"apgd: the targeted DLR loss needs at least 4 classes, the model has {count}; drop apgd")
    parse_threats(context.config)


def evaluate(context: EvalContext, dataset: EvalDataset) -> list[Result]:
    """Robust accuracy after all attacks and after each of them, for every threat."""
    config, data, threats = context.config, context.data_config, parse_threats(context.config)
    model = Normalized(context.model, data["mean"], data["std"]).to(context.device)
    samples = choose_samples(len(dataset), config.num_samples, config.seed, dataset.limit)
    size, progress = config.apgd_batch_size, f"apgd {dataset.name}"
    loader = load_batches(context, dataset, samples, size, raw=True, progress=progress)
    batches = ((index, images, label) for _, index, images, label in loader)
    state = Path(config.apgd_state) if config.apgd_state else None
    settings = repr((config.model, config.model_kwargs, config.gp))  # such as the number of attention heads
    results: list[Result] = []
    for threat, outcome in attack_batches(model, batches, threats, state, settings).items():
        counts = context.all_reduce(count_outcomes(outcome, len(threat.attacks)))
        clean, *robust, vanished, n = counts.tolist()
        eps = f"{threat.eps * 255:g}/255" if threat.norm == "linf" else f"{threat.eps:g}"
        metadata: Result = {"num_samples": n, "norm": threat.norm, "eps": threat.eps, "setting": f"{threat.norm} {eps}"}
        metadata["clean_top1"] = 100 * clean / n
        if vanished:
            metadata["note"] = f"gradients of {vanished} images are exactly zero: accuracy may be overstated"
            if context.rank == 0:
                log.warning("apgd %s, %s: %s", dataset.name, metadata["setting"], metadata["note"])
        values = dict(zip((f"robust_top1_{name}" for name in threat.attacks), robust, strict=True))
        values["robust_top1"] = robust[-1]
        for metric, count in values.items():
            hits = torch.cat([torch.full((count,), 100.0), torch.zeros(n - count)])
            interval = bootstrap_interval(hits, config.bootstrap, config.seed)
            results.append({"metric": metric, "value": 100 * count / n, **metadata, **interval})
    return results


def parse_threats(config: argparse.Namespace) -> list[Threat]:
    """Every norm with every radius; if plain and a/255 radii are mixed, plain ones are for l2, the others for linf."""
    norms = [norm.strip().lower() for norm in config.norm.split(",")]
    if set(norms) - {"l2", "linf"}:
        raise UserError(f"--norm {config.norm}: use l2, linf or both, comma-separated")
    radii = {text: parse_radius(text) for text in map(str.strip, config.eps.split(","))}
    mixed = len({"/" in text for text in radii}) == 2
    budget = (config.apgd_iters, config.apgd_targets, config.apgd_restarts, config.seed, config.attack == "standard")
    threats = [
        Threat(norm, eps, *budget)
        for norm, (text, eps) in itertools.product(norms, radii.items())
        if not mixed or ("/" in text) == (norm == "linf")
    ]
    return list(dict.fromkeys(threats))  # 0.5 and 0.50 are one


def parse_radius(text: str) -> float:
    """A positive number, or a fraction such as 0.25/255."""
    numerator, _, denominator = text.partition("/")
    try:
        eps = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        eps = 0.0
    if not 0 < eps < float("inf"):
        raise UserError(f"--eps {text!r}: write positive numbers such as 0.25 or 0.25/255")
    return eps


def attack_batches(
    model: nn.Module, batches: Iterable[Batch], threats: list[Threat], state: Path | None, settings: str = ""
) -> dict[Threat, Tensor]:
    """Attack this process's images; return outcomes (`attacks.ROBUST`) by threat, int64 [n] in the order of `batches`.

    Args:
        state: directory that stores the outcome of every batch under the hash of weights, images and threat, and of
            `settings` of the model that its weights and text do not show, so that no batch is attacked twice.
    """
    weights = content_hash(settings, str(model), *model.state_dict().values()) if state else ""
    outcomes: dict[Threat, list[Tensor]] = {threat: [torch.empty(0, dtype=torch.int64)] for threat in threats}
    with evaluating(model, requires_grad=False):  # only the image needs a gradient: 12 % faster
        for index, images, label in batches:
            for threat, parts in outcomes.items():
                path = state and state / f"{content_hash(weights, repr(threat), index, images, label)}.npy"
                if path and path.exists():
                    parts.append(torch.from_numpy(np.load(path)))
                else:
                    parts.append(attacks.attack(model, images, label, index, threat).cpu())
                    if path:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with atomic_write(path) as file:
                            np.save(file, parts[-1].numpy())
    return {threat: torch.cat(parts) for threat, parts in outcomes.items()}


def content_hash(*parts: Tensor | str) -> str:
    """Hash of texts and tensor values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]


def count_outcomes(outcome: Tensor, num_attacks: int) -> Tensor:
    """Numbers of images in outcomes [n]: correct before all attacks, correct after each of them in turn, without a
    gradient, all."""
    vanished, outcome = outcome >= attacks.VANISHED, attacks.without_marks(outcome)
    correct = [int((outcome > k).sum()) for k in range(-1, num_attacks)]
    return torch.tensor([*correct, int(vanished.sum()), len(outcome)])
