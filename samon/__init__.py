"""Sharpness-aware minimization for timm: SAM, SAM-ON and their variants, with exact two-pass steps.

    import samon                                                   # registers the optimizers with timm
    optimizer = timm.optim.create_optimizer_v2(model, "samon-layerl2", lr=0.1, weight_decay=1e-4, rho=0.05)
    optimizer.zero_grad()
    loss = samon.two_pass(optimizer, lambda: loss_fn(model(x), y))  # instead of loss.backward()
    optimizer.step()

Optimizer names are `<scope>[-<geometry>][-<base>]`. Scope: `sam` perturbs all parameters, `samon` only those of
normalization layers, `samnn` all others. Geometry: a row of the paper's Table 9, plain l2 by default. Base: the
optimizer that applies the gradient, SGD by default.
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
