"""The paper's ablations of normalization layers (B.7 to B.9)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samon.errors import UserError
from samon.scope import norm_modules, norm_parameters

IDENTITY = {"weight": 1.0, "bias": 0.0}  # gamma and beta that do nothing


@torch.no_grad()
def fix_norm(model: nn.Module) -> None:
    """Fix gamma = 1 and beta = 0, untrained (B.7)."""
    for name, parameter in _norm_parameters(model, "--fix-norm").items():
        parameter.fill_(IDENTITY[name.rpartition(".")[2]]).requires_grad_(False)


def train_only_norm(model: nn.Module) -> None:
    """Freeze everything else at its initial values, the classifier included (B.8)."""
    norms = {id(p) for p in _norm_parameters(model, "--train-only-norm").values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in norms)


def weight_decay_groups(model: nn.Module, decay: float, on: str) -> list[dict[str, object]]:
    """Parameter groups without and with weight decay, of the trained parameters (B.9, Figure 11 right).

    Args:
        on: what decays: `all`, `non-norm` (all but normalization parameters; biases decay), or `none`.
    """
    norms = {id(p) for p in norm_parameters(model).values()}
    groups: list[dict[str, nn.Parameter]] = [{}, {}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[on == "all" or (on == "non-norm" and id(parameter) not in norms)][name] = parameter
    return [
        {"params": list(group.values()), "param_names": list(group), "weight_decay": rate}
        for group, rate in zip(groups, (0.0, decay), strict=True)
        if group
    ]


def add_norm_dropout(model: nn.Module, rate: float) -> None:
    """Drop each gamma and beta with probability `rate` in every training forward pass of a normalization layer, the
    others scaled by 1 / (1 - rate) (B.9, Figure 11 left). Names and checkpoints stay as they are."""
    _norm_parameters(model, "--norm-dropout")
    for module in norm_modules(model).values():
        if any(isinstance(getattr(module, name, None), nn.Parameter) for name in IDENTITY):
            # The hooks refer to no module, so that a copy (EMA) drops its own parameters.
            module.register_forward_pre_hook(partial(_drop, rate), prepend=True)
            module.register_forward_hook(_restore, always_call=True)


def _drop(rate: float, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if module.training:
        full = module._parameters
        dropped = {name: F.dropout(p, rate) for name in IDENTITY if (p := full.get(name)) is not None}
        module.__dict__.update(_parameters=full | dropped, _samon_full=full)


def _restore(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if "_samon_full" in module.__dict__:
        module.__dict__["_parameters"] = module.__dict__.pop("_samon_full")


def _norm_parameters(model: nn.Module, flag: str) -> dict[str, nn.Parameter]:
    if not (norms := norm_parameters(model)):
        raise UserError(f"{flag}: {type(model).__name__} has no affine normalization parameters; choose another model")
    return norms
