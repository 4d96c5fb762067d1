"""What AutoAttack searches, and the last two of its attacks, FAB-T and Square, by way of the package `pyautoattack`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samon.errors import require_package

NAMES = ("fab-t", "square")
APGD = ("apgd-ce", "apgd-t")
ATTACKS = (*APGD, *NAMES)  # in the order of AutoAttack's standard version


@dataclass(frozen=True)
class Threat:
    """A norm ball and how hard it is searched. ``eps`` is in units of the [0, 1] image."""

    norm: str  # 'l2' or 'linf'
    eps: float
    n_iter: int = 100
    n_targets: int = 9
    restarts: int = 1
    seed: int = 0
    standard: bool = False  # FAB-T and Square as well

    @property
    def attacks(self) -> tuple[str, ...]:
        """The names of its attacks, in their order."""
        return ATTACKS if self.standard else APGD


def check() -> None:
    """Raises:
    UserError: the package is not installed.
    """
    require_package("pyautoattack", "--attack standard needs pyautoattack; run: pip install pyautoattack==0.2.0")


def fooled(name: str, model: nn.Module, images: Tensor, label: Tensor, threat: Threat) -> Tensor:
    """[B] bool: which of the images [B, C, H, W] in [0, 1] the attack fools within the ball.

    As in AutoAttack's standard version where ``n_iter`` is 100: so many iterations of FAB-T for each of ``n_targets``
    classes, 50 times as many queries of Square; one restart. Torch's generators are as they were afterwards.
    """
    from pyautoattack import AutoAttack

    norm, eps, seed = threat.norm, threat.eps, threat.seed
    options = {"norm": norm.capitalize(), "eps": eps, "seed": seed, "version": "custom", "attacks": [name]}
    whole = AutoAttack(model, **options, device=images.device)
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if name == "fab-t":
            whole.fab.targeted, whole.fab.n_restarts, whole.fab.n_iter = True, 1, threat.n_iter
            whole.fab.n_target_classes, whole.fab.seed = threat.n_targets, seed
            found = whole.fab.perturb(images, label)
        else:
            whole.square.n_queries, whole.square.seed = 50 * threat.n_iter, seed
            found = whole.square.perturb(images, label)
    delta = (found - images).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    return (model(found).argmax(1) != label) & (size <= eps * (1 + 1e-4))  # float32: they end on the sphere
