"""Which parameters are perturbed: by the type of the module that owns them, never by name."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from timm import layers
from torch import nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from samon.errors import UserError

Named = dict[str, Parameter]


@dataclass(frozen=True)
class Scope:
    """Which parameters are perturbed.

    Attributes:
        label: its column in the paper's Table 1.
        choose: those of a model by qualified name, from (all of them, those of normalization layers).
        norms_only: no others than normalization parameters: few enough for a copy for each group of samples, and whole
            on every process where the rest is sharded.
    """

    label: str
    description: str
    choose: Callable[[Named, Named], Named]
    norms_only: bool = False


def _others(everything: Named, norms: Named) -> Named:
    norm_ids = {id(p) for p in norms.values()}
    return {name: p for name, p in everything.items() if id(p) not in norm_ids}


SCOPES = {
    "sam": Scope("all", "all parameters", lambda everything, norms: everything),
    "samon": Scope("ON", "only normalization parameters (SAM-ON)", lambda everything, norms: norms, norms_only=True),
    "samnn": Scope("no-norm", "all but normalization parameters (no-norm)", _others),
}

# timm's normalization layers that differ from the torch class they derive from, or derive from none.
_TIMM: dict[int | None, str] = {
    -1: "RmsNorm RmsNormFp32 SimpleNorm SimpleNormFp32",
    1: "LayerNorm2d LayerNorm2dFp32 LayerNormExp2d LayerNormAct2d LayerNormAct2dFp32 RmsNorm2d RmsNorm2dFp32 "
    "SimpleNorm2d SimpleNorm2dFp32",
    None: "SplitBatchNorm2d InplaceAbn FilterResponseNormTlu2d FilterResponseNormAct2d EvoNorm2dB0 EvoNorm2dB1 "
    "EvoNorm2dB2 EvoNorm2dS0 EvoNorm2dS1 EvoNorm2dS2",
}
# Modules whose `weight` and `bias` are the affine gamma and beta of Eq. 1, and the first dimension they run along;
# None where one module cannot carry several gammas (see step/groups.py). Not every timm exports all of its own.
# Gates and scales that normalise nothing (LayerScale, ResMLP's Affine, ConvNeXt-V2's GRN) are not among them.
NORM_TYPES: dict[type[nn.Module], int | None] = {
    _BatchNorm: 1,
    nn.SyncBatchNorm: None,
    nn.GroupNorm: 1,
    _InstanceNorm: 1,
    nn.LayerNorm: -1,
    nn.RMSNorm: -1,
    **{getattr(layers, name): dim for dim, names in _TIMM.items() for name in names.split() if hasattr(layers, name)},
}


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every normalization module of the model by qualified name, affine or not."""
    return {clean_name(name): m for name, m in model.named_modules() if NORM_TYPES.keys() & set(type(m).__mro__)}


def affine_dim(module: nn.Module) -> int | None:
    """NORM_TYPES's entry for the closest class of this normalization module."""
    return next(NORM_TYPES[t] for t in type(module).__mro__ if t in NORM_TYPES)


def norm_parameters(model: nn.Module) -> dict[str, Parameter]:
    """The affine normalization parameters by qualified name; shared ones once, under their first name."""
    seen: dict[Parameter, str] = {}
    for prefix, module in norm_modules(model).items():
        for name in ("weight", "bias"):
            if isinstance(parameter := getattr(module, name, None), Parameter):
                seen.setdefault(parameter, f"{prefix}.{name}" if prefix else name)
    return {name: parameter for parameter, name in seen.items()}


def clean_name(name: str) -> str:
    """A parameter's name in the bare model: without the prefixes of DDP and torch.compile."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model inside DistributedDataParallel and torch.compile wrappers."""
    parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    inner = model.module if parallel else getattr(model, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


@dataclass
class Selection:
    """The perturbed parameters by qualified name, and how they were chosen."""

    scope: str
    parameters: dict[str, Parameter]
    perturb: str | None = None
    model: nn.Module | None = field(default=None, repr=False)
    narrowed: bool = False  # `perturb` leaves out a part of the scope, so only some layers are perturbed

    @property
    def names(self) -> list[str]:
        return list(self.parameters)

    def summary(self) -> str:
        """Log text: how much of the model is perturbed, and in which types of layer."""
        count = sum(p.numel() for p in self.parameters.values())
        line = f"{self.scope} perturbs {count:,} parameters in {len(self.parameters)} tensors"
        if self.model is None:
            return line
        total = sum(p.numel() for p in self.model.parameters())
        tensors, numbers = Counter[str](), Counter[str]()
        modules = reversed(list(self.model.modules()))  # a shared parameter counts where it is met first
        kinds = {id(p): type(m).__name__ for m in modules for p in m.parameters(recurse=False)}
        for parameter in self.parameters.values():
            tensors[kinds[id(parameter)]] += 1
            numbers[kinds[id(parameter)]] += parameter.numel()
        rows = [f"  {kind}: {numbers[kind]:,} in {tensors[kind]} tensors" for kind, _ in numbers.most_common()]
        return "\n".join([f"{line}, {count / total:.3%} of {model_name(self.model)}", *rows])


def model_name(model: nn.Module) -> str:
    """The timm architecture where there is one, else the class."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(model).__name__


def select(model: nn.Module, scope: str, perturb: str | None = None) -> Selection:
    """The trainable parameters of `scope` whose qualified name matches the regular expression `perturb`.

    Raises:
        UserError: nothing is selected, or `perturb` is not a regular expression.
    """
    model = unwrap(model)
    everything = {clean_name(name): p for name, p in model.named_parameters()}
    candidates = SCOPES[scope].choose(everything, norm_parameters(model))
    trainable = {name: p for name, p in candidates.items() if p.requires_grad}
    if not trainable:
        found = sorted({type(m).__name__ for m in norm_modules(model).values()}) or ["none"]
        raise UserError(
            f"{scope}: {model_name(model)} has no trainable parameter to perturb ({SCOPES[scope].description}; "
            f"normalization layers found: {', '.join(found)}); take a scope that has some (sam perturbs all "
            "parameters), unfreeze them, or choose another model"
        )
    return _narrowed(trainable, scope, perturb, model)


def select_bare(param_groups: list[dict], scope: str, perturb: str | None = None) -> Selection:
    """Scope `sam` over an optimizer's own parameter groups, when no model is at hand."""
    if scope != "sam":
        raise UserError(
            f"{scope} must know which parameters belong to normalization layers, but was given bare parameters; "
            f"create it from the model: timm.optim.create_optimizer_v2(model, '{scope}', ...)"
        )
    named: dict[str, Parameter] = {}
    for i, group in enumerate(param_groups):
        names = group.get("param_names") or [f"group{i}.{j}" for j in range(len(group["params"]))]
        named |= {name: p for name, p in zip(names, group["params"], strict=True) if p.requires_grad}
    return _narrowed(named, scope, perturb)


def _narrowed(
    trainable: dict[str, Parameter], scope: str, perturb: str | None, model: nn.Module | None = None
) -> Selection:
    """Those whose name the regular expression is found in; without one, all."""
    try:
        chosen = {name: p for name, p in trainable.items() if re.search(perturb or "", name)}
    except re.error as e:
        raise UserError(f"perturb={perturb!r} is not a regular expression: {e}") from None
    if not chosen:
        where = "the parameter groups" if model is None else model_name(model)
        raise UserError(
            f"perturb={perturb!r} matches none of the {len(trainable)} parameters of scope {scope} in {where}; the "
            f"first of them is {next(iter(trainable), None)!r}"
        )
    return Selection(scope, chosen, perturb, model, narrowed=len(chosen) < len(trainable))
