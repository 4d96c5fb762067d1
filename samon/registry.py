"""The names `<scope>[-<geometry>][-<base>]` in timm's optimizer factory. No other module touches that factory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from itertools import product
from typing import Any, ClassVar

from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import OptimizerRegistry, default_registry
from torch import nn
from torch.optim import Optimizer

from samon.errors import UserError, nearest, reraise_as_user_error
from samon.geometry import GEOMETRIES
from samon.sam import SAM
from samon.scope import SCOPES, Selection, select, select_bare

BASES = {"": "sgd", "-momentum": "momentum", "-adamw": "adamw", "-lion": "lion", "-muon": "muon"}
MASKED = {  # names with a mask over all parameters: its kind, and in words
    "sam-random": ("random", "a random mask, sampled once"),
    "ssam-f": ("fisher", "a Fisher mask (SSAM-F)"),
    "ssam-d": ("dynamic", "a dynamic mask (SSAM-D)"),
}


@dataclass(frozen=True)
class Variant:
    """What an optimizer name means."""

    name: str
    scope: str
    geometry: str
    base: str
    mask: str | None = None
    mask_description: str = ""

    @property
    def norms_only(self) -> bool:
        return SCOPES[self.scope].norms_only

    @property
    def rho(self) -> float:
        return GEOMETRIES[self.geometry].rho[self.norms_only]

    @property
    def target(self) -> str:
        """What is perturbed, in words."""
        return SCOPES[self.scope].description + (f" through {self.mask_description}" if self.mask else "")

    @property
    def description(self) -> str:
        return f"Sharpness-aware {self.base}: perturbs {self.target}, {GEOMETRIES[self.geometry].description}"


def _variants() -> Iterator[Variant]:
    for suffix, base in BASES.items():
        for scope, geometry in product(SCOPES, GEOMETRIES):
            yield Variant("-".join(filter(None, (scope, geometry))) + suffix, scope, geometry, base)
        for name, mask in MASKED.items():
            yield Variant(name + suffix, "sam", "", base, *mask)


VARIANTS: dict[str, Variant] = {v.name: v for v in _variants()}


def variant_of(opt: str) -> Variant | None:
    """The variant of this optimizer name, with or without timm's `lookahead_` prefix; None for other optimizers."""
    return VARIANTS.get(opt.lower().removeprefix("lookahead_"))


def base_of(opt: str, base_opt: str | None = None) -> str:
    """timm's name of the optimizer that applies the gradient, its aliases resolved."""
    variant = variant_of(opt)
    name = opt.lower().removeprefix("lookahead_") if variant is None else (base_opt or variant.base).lower()
    info = default_registry._optimizers.get(name)
    return name if info is None else info.name


def is_sam_name(opt: str) -> bool:
    """Whether the optimizer name is one of samon's."""
    return variant_of(opt) is not None


class VariantSAM(SAM):
    """The optimizer of one variant, as timm's factory calls it. It creates the base optimizer from `params`.

    Args:
        selection: from the model, by the wrapped factory; without it `params` are bare.
        base_kwargs: for the base optimizer; timm drops those that it does not accept (eps, betas, momentum).

    Raises:
        UserError: naming the argument that is wrong, or why timm cannot create the base optimizer.
    """

    variant: ClassVar[Variant]

    def __init__(
        self,
        params: Any,
        *,
        rho: float | None = None,
        eta: float | None = None,
        radius: str | float = "ball",
        base_opt: str | None = None,
        perturb: str | None = None,
        perturb_frozen: bool = False,
        sparsity: float | None = None,
        mask_every: int = 100,
        ascent: str = "batch",
        gsam_alpha: float = 0.0,
        esam_beta: float = 1.0,
        selection: Selection | None = None,
        **base_kwargs: Any,
    ) -> None:
        from samon.engines.ascent import make_ascent
        from samon.engines.masks import Mask

        variant = self.variant
        base_opt = base_opt or variant.base
        if variant_of(base_opt) is not None:
            raise UserError(
                f"base_opt={base_opt!r} is itself sharpness-aware; name a plain timm optimizer such as 'sgd'"
            )
        if sparsity is not None and variant.mask is None:
            raise UserError(f"sparsity is for {', '.join(MASKED)}; {variant.name} has no mask")
        with reraise_as_user_error(f"base_opt={base_opt!r}"):
            base = create_optimizer_v2(params, base_opt, **base_kwargs)
        if selection is None:
            if perturb_frozen:
                raise UserError("perturb_frozen=True needs the frozen parameters; create the optimizer from the model")
            selection = select_bare(base.param_groups, variant.scope, perturb)
            if GEOMETRIES[variant.geometry].by_name and not all("param_names" in g for g in base.param_groups):
                raise UserError(f"{variant.name} scales weights and biases differently; create it from the model")
        mask = None
        if variant.mask is not None:
            mask = Mask(variant.mask, 0.5 if sparsity is None else sparsity, mask_every)
        super().__init__(
            base,
            selection,
            rho=variant.rho if rho is None else rho,
            geometry=variant.geometry,
            eta=eta,
            radius=radius,
            mask=mask,
            ascent=make_ascent(ascent, gsam_alpha, esam_beta),
        )


CLASSES: dict[str, type[VariantSAM]] = {
    name: type(name, (VariantSAM,), {"variant": variant, "__doc__": variant.description, "__module__": __name__})
    for name, variant in VARIANTS.items()
}
globals().update(CLASSES)  # pickle finds a class by its name in its module


def _with_selection(create: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """timm passes an optimizer only parameter groups; for our names the model's selection is made first."""

    @wraps(create)
    def create_optimizer(model_or_params: Any, opt: str, *args: Any, **kwargs: Any) -> Optimizer:
        variant, known = variant_of(opt), default_registry._optimizers
        plain = opt.lower().removeprefix("lookahead_")
        if variant is None and plain.rpartition("_")[2] not in known:
            raise UserError(f"optimizer {opt!r} not found in registry{nearest(plain, known)}")
        if variant is not None and isinstance(model_or_params, nn.Module):
            frozen = kwargs.get("perturb_frozen", False)
            kwargs["selection"] = select(model_or_params, variant.scope, kwargs.get("perturb"), frozen)
        return create(model_or_params, opt, *args, **kwargs)

    return create_optimizer


def register(registry: OptimizerRegistry = default_registry) -> None:
    """Add our names to timm's registry, once. Importing samon does it."""
    if "samon" in registry._optimizers:
        return
    for name, cls in CLASSES.items():
        # All arguments pass through: base_opt may change the base optimizer, and timm drops what that does not accept.
        registry.register(OptimInfo(name, cls, cls.__doc__ or "", has_eps=True, has_momentum=True, has_betas=True))
    registry.create_optimizer = _with_selection(registry.create_optimizer)  # type: ignore[method-assign]
