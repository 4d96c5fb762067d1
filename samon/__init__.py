"""Sharpness-aware minimization (SAM) for timm, and SAM-ON, which perturbs only the normalization layers.

    import samon  # adds its optimizers to timm's factory and its CIFAR networks to timm's models

    optimizer = timm.optim.create_optimizer_v2(model, "samon-layerl2", lr=0.1, weight_decay=1e-4, rho=0.05)
    optimizer.zero_grad()
    loss = samon.two_pass(optimizer, lambda: loss_fn(model(x), y))  # instead of loss.backward()
    optimizer.step()

Optimizer names are `<scope>[-<geometry>][-<base>]`. Scope: `sam` perturbs all parameters, `samon` only those of
normalization layers (SAM-ON), `samnn` all others. Geometry: the scaling of the perturbation, a row of Table 9 of
Mueller et al. 2023 (arXiv 2306.04226); plain l2 by default. Base: the optimizer that applies the gradient, SGD by
default.
"""

from samon import compat, models
from samon.errors import UserError
from samon.registry import is_sam_name, register
from samon.sam import SAM, sam_of
from samon.schedule import RhoSchedule, Tail
from samon.scope import register_norm
from samon.two_pass import two_pass

__version__ = "0.1.0"
register()
compat.check_requires_grad_in_compiled_code()

__all__ = [
    "SAM",
    "RhoSchedule",
    "Tail",
    "UserError",
    "__version__",
    "is_sam_name",
    "models",
    "register_norm",
    "sam_of",
    "two_pass",
]
