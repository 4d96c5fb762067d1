"""What the paper's ablations do to the normalization layers (B.7 to B.9)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samon.errors import UserError
from samon.scope import norm_modules, norm_parameters

AFFINE = {"weight": 1.0, "bias": 0.0}  # gamma and beta, and the values with which they do nothing


def fix_norm(model: nn.Module) -> None:
    """gamma = 1, beta = 0, not trained (B.7)."""
    for name, parameter in _found(model, "--fix-norm").items():
        with torch.no_grad():
            parameter.fill_(AFFINE[name.rpartition(".")[2]])
        parameter.requires_grad_(False)


def train_only_norm(model: nn.Module) -> None:
    """Everything else stays as it was initialised, the classifier included (B.8)."""
    norms = {id(p) for p in _found(model, "--train-only-norm").values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in norms)


def weight_decay_groups(model: nn.Module, decay: float, on: str) -> list[dict[str, Any]]:
    """Parameter groups of the trained parameters that decay and of those that do not (B.9, Figure 11 right): `all`,
    `non-norm` (all but normalization parameters; biases decay) or `none`."""
    norms = {id(p) for p in norm_parameters(model).values()}
    decays = {"all": lambda p: True, "non-norm": lambda p: id(p) not in norms, "none": lambda p: False}[on]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for wanted, rate in ((False, 0.0), (True, decay)):
        chosen = {name: p for name, p in named if decays(p) is wanted}
        if chosen:
            groups.append({"params": [*chosen.values()], "param_names": [*chosen], "weight_decay": rate})
    return groups


def norm_dropout(model: nn.Module, rate: float) -> None:
    """In training, every forward of a normalization layer sees each gamma and beta dropped with this chance, the others
    scaled by 1 / (1 - rate) (B.9, Figure 11 left). Names and checkpoints stay as they are."""
    _found(model, "--norm-dropout")
    for module in norm_modules(model).values():
        if any(isinstance(getattr(module, name, None), nn.Parameter) for name in AFFINE):
            # The hooks hold no module of their own, so that a copy (EMA) drops its own parameters.
            module._samon_dropout = rate  # type: ignore[assignment]
            module.register_forward_pre_hook(_drop, prepend=True)
            module.register_forward_hook(_undrop, always_call=True)


def _drop(module: Any, args: Any) -> None:
    if module.training:
        kept = module._parameters
        dropped = {name: F.dropout(p, module._samon_dropout) for name in AFFINE if (p := kept.get(name)) is not None}
        module.__dict__.update(_parameters=kept | dropped, _samon_kept=kept)


def _undrop(module: Any, args: Any, output: Tensor) -> None:
    if "_samon_kept" in module.__dict__:
        module.__dict__["_parameters"] = module.__dict__.pop("_samon_kept")


def _found(model: nn.Module, flag: str) -> dict[str, nn.Parameter]:
    if not (norms := norm_parameters(model)):
        raise UserError(f"{flag}: {type(model).__name__} has no affine normalization parameters; choose another model")
    return norms
