"""The other two of AutoAttack's standard attacks, FAB-T and Square, by way of the package `pyautoattack`."""

import torch
from torch import Tensor, nn

from samon.errors import UserError

NAMES = ("fab-t", "square")


def check() -> None:
    """Raises:
    UserError: the package is not installed.
    """
    try:
        import pyautoattack  # noqa: F401
    except ImportError:
        raise UserError("--attack standard needs pyautoattack; run: pip install pyautoattack==0.2.0") from None


def fooled(
    name: str,
    model: nn.Module,
    images: Tensor,
    label: Tensor,
    norm: str,
    eps: float,
    n_iter: int,
    targets: int,
    seed: int,
) -> Tensor:
    """[B] bool: which of the images [B, C, H, W] in [0, 1] the attack fools within the ball.

    As in AutoAttack's standard version where ``n_iter`` is 100: so many iterations of FAB-T for each of ``targets``
    classes, 50 times as many queries of Square; one restart. Torch's generators are as they were afterwards.
    """
    from pyautoattack import AutoAttack

    norms = {"l2": "L2", "linf": "Linf"}
    whole = AutoAttack(
        model, norm=norms[norm], eps=eps, seed=seed, version="custom", attacks=[name], device=images.device
    )
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if name == "fab-t":
            whole.fab.targeted, whole.fab.n_restarts, whole.fab.n_iter = True, 1, n_iter
            whole.fab.n_target_classes, whole.fab.seed = targets, seed
            found = whole.fab.perturb(images, label)
        else:
            whole.square.n_queries, whole.square.seed = 50 * n_iter, seed
            found = whole.square.perturb(images, label)
    delta = (found - images).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    return (model(found).argmax(1) != label) & (size <= eps * (1 + 1e-4))  # float32: they end on the sphere
