"""The names `<scope>[-<geometry>][-<base>]` in timm's optimizer factory. The only module that touches that factory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import timm.layers as layers
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import OptimizerRegistry, default_registry
from torch import nn
from torch.optim import Optimizer

from samon.errors import UserError
from samon.optim.geometry import GEOMETRIES
from samon.optim.masks import Mask
from samon.optim.sam import SAM
from samon.optim.scope import NORM_TYPES, SCOPES, Selection, select, select_bare

BASES = ("", "momentum", "adamw", "lion")  # "" is sgd
MASKED = {  # names with a sparse mask over all parameters: kind of mask, default sparsity, description
    "sam-random": ("random", 0.5, "a random mask, drawn once"),
    "ssam-f": ("fisher", 0.5, "a Fisher mask (SSAM-F)"),
    "ssam-d": ("dynamic", 0.5, "a dynamic mask (SSAM-D)"),
}
# Middle values of the paper's Tables 7 and 8: a radius to start from, not a tuned one.
DEFAULT_RHO = {
    "sam": {"": 0.05, "eleml2": 1.0, "eleml2orig": 0.5, "elemlinf": 0.001, "layerl2": 0.005, "fisher": 0.05},
    "samon": {"": 0.5, "eleml2": 1.0, "eleml2orig": 0.5, "elemlinf": 0.005, "layerl2": 0.05, "fisher": 0.5},
}
DEFAULT_RHO["samnn"] = DEFAULT_RHO["sam"]


@dataclass(frozen=True)
class Variant:
    """What an optimizer name stands for."""

    name: str
    scope: str
    geometry: str
    base: str
    mask: str | None = None

    @property
    def rho(self) -> float:
        return DEFAULT_RHO[self.scope][self.geometry]

    @property
    def description(self) -> str:
        masked = next((text for name, (_, _, text) in MASKED.items() if self.name.startswith(name)), None)
        target = f"{SCOPES[self.scope]} through {masked}" if masked else SCOPES[self.scope]
        return f"Sharpness-aware {self.base}: perturbs {target}, {GEOMETRIES[self.geometry].description}"


def _variants() -> list[Variant]:
    named = [
        Variant("-".join(filter(None, (scope, geometry, base))), scope, geometry, base or "sgd")
        for scope in SCOPES
        for geometry in GEOMETRIES
        for base in BASES
    ]
    masked = [
        Variant("-".join(filter(None, (name, base))), "sam", "", base or "sgd", kind)
        for name, (kind, _, _) in MASKED.items()
        for base in BASES
    ]
    return named + masked


VARIANTS: dict[str, Variant] = {v.name: v for v in _variants()}


def variant_of(opt: str) -> Variant | None:
    """The variant behind a timm optimizer name, timm's `lookahead_` prefix allowed; None for other optimizers."""
    return VARIANTS.get(opt.lower().removeprefix("lookahead_"))


def is_sam_name(opt: str) -> bool:
    """Whether the optimizer name is one of this package's."""
    return variant_of(opt) is not None


def build_sam(
    params: Any,
    *,
    variant: Variant,
    rho: float | None = None,
    eta: float | None = None,
    base_opt: str | None = None,
    perturb: str | None = None,
    sparsity: float | None = None,
    mask_every: int = 100,
    selection: Selection | None = None,
    **base_kwargs: Any,
) -> SAM:
    """What timm's factory calls for our names: the base optimizer over `params`, wrapped.

    Args:
        selection: made from the model by the wrapped factory; without it `params` are bare.
        base_kwargs: for the base optimizer; timm drops those its base does not know (eps, betas, momentum).
    """
    base_opt = base_opt or variant.base
    if variant_of(base_opt) is not None:
        raise UserError(f"base_opt={base_opt!r} is itself sharpness-aware; name a plain timm optimizer such as 'sgd'")
    if sparsity is not None and variant.mask is None:
        raise UserError(f"sparsity is for {', '.join(MASKED)}; {variant.name} has no mask")
    if selection is None:
        params = list(params)
    base = create_optimizer_v2(params, base_opt, **base_kwargs)
    if selection is None:
        selection = select_bare(base.param_groups, variant.scope, perturb)
        if variant.geometry == "eleml2orig" and not all("param_names" in g for g in base.param_groups):
            raise UserError(f"{variant.name} scales weights and biases differently; create it from the model")
    mask = None
    if variant.mask is not None:
        default = next(s for kind, s, _ in MASKED.values() if kind == variant.mask)
        mask = Mask(variant.mask, default if sparsity is None else sparsity, mask_every)
    rho = variant.rho if rho is None else rho
    return SAM(base, selection, rho=rho, geometry=variant.geometry, eta=eta, mask=mask)


def _with_selection(create: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """timm hands an optimizer only parameter groups; for our names the model's selection is made first."""

    @wraps(create)
    def create_optimizer(model_or_params: Any, opt: str, *args: Any, **kwargs: Any) -> Optimizer:
        variant = variant_of(opt)
        if variant is not None and isinstance(model_or_params, nn.Module):
            kwargs["selection"] = select(model_or_params, variant.scope, kwargs.get("perturb"))
        return create(model_or_params, opt, *args, **kwargs)

    return create_optimizer


# timm's normalization layers that differ from the torch class they derive from, or derive from none.
TIMM_NORMS: dict[int | None, tuple[str, ...]] = {
    -1: ("RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32"),
    1: (
        "LayerNorm2d",
        "LayerNorm2dFp32",
        "LayerNormExp2d",
        "LayerNormAct2d",
        "LayerNormAct2dFp32",
        "RmsNorm2d",
        "RmsNorm2dFp32",
        "SimpleNorm2d",
        "SimpleNorm2dFp32",
    ),
    None: (
        "SplitBatchNorm2d",
        "InplaceAbn",
        "FilterResponseNormTlu2d",
        "FilterResponseNormAct2d",
        "EvoNorm2dB0",
        "EvoNorm2dB1",
        "EvoNorm2dB2",
        "EvoNorm2dS0",
        "EvoNorm2dS1",
        "EvoNorm2dS2",
    ),
}


def register(registry: OptimizerRegistry = default_registry) -> None:
    """Add our names to timm's registry and its norm types to the selection. Importing samon does it, once."""
    for dim, names in TIMM_NORMS.items():
        # Not every timm exports all of them.
        NORM_TYPES.update({getattr(layers, name): dim for name in names if hasattr(layers, name)})
    if "samon" in registry._optimizers:
        return
    for variant in VARIANTS.values():
        info = OptimInfo(
            name=variant.name,
            opt_class=partial(build_sam, variant=variant),  # type: ignore[arg-type]
            description=variant.description,
            # All pass through: the base optimizer, which base_opt may change, drops what it does not know.
            has_eps=True,
            has_momentum=True,
            has_betas=True,
        )
        registry.register(info)
    registry.create_optimizer = _with_selection(registry.create_optimizer)  # type: ignore[method-assign]
