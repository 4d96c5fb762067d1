"""Which parameters are perturbed. Normalization layers are recognized by the type of the module, never by its name."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeVar

import torch
from timm import layers
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from samon.errors import UserError

NamedParameters = dict[str, Parameter]
V = TypeVar("V")


@dataclass(frozen=True)
class Scope:
    """A set of parameters.

    Attributes:
        label: its column in the paper's Table 1.
        choose: the parameters in the scope, from (all parameters, normalization parameters) by qualified name.
        norms_only: whether it has only normalization parameters. These are few enough for one copy per group of
            samples, and to be replicated on every process if the other parameters are sharded.
    """

    label: str
    description: str
    choose: Callable[[NamedParameters, NamedParameters], NamedParameters]
    norms_only: bool = False


def _without_norms(everything: NamedParameters, norms: NamedParameters) -> NamedParameters:
    own = set(norms.values())
    return {name: p for name, p in everything.items() if p not in own}


SCOPES = {
    "sam": Scope("all", "all parameters", lambda everything, norms: everything),
    "samon": Scope("ON", "only normalization parameters (SAM-ON)", lambda everything, norms: norms, norms_only=True),
    "samnn": Scope("no-norm", "all but normalization parameters (no-norm)", _without_norms),
}

# By the dimension that NORM_TYPES below explains: timm's layers that derive from none of its classes, or differ from
# the one they derive from.
_TIMM: dict[int | None, str] = {
    -1: "RmsNorm RmsNormFp32 SimpleNorm SimpleNormFp32",
    1: "LayerNorm2d LayerNorm2dFp32 LayerNormExp2d LayerNormAct2d LayerNormAct2dFp32 RmsNorm2d RmsNorm2dFp32 "
    "SimpleNorm2d SimpleNorm2dFp32",
    None: "SplitBatchNorm2d InplaceAbn FilterResponseNormTlu2d FilterResponseNormAct2d EvoNorm2dB0 EvoNorm2dB1 "
    "EvoNorm2dB2 EvoNorm2dS0 EvoNorm2dS1 EvoNorm2dS2",
}
_LAYERS = vars(layers.norm) | vars(layers)  # which does not export LayerNormExp2d
# Modules whose `weight` and `bias` are gamma and beta of Eq. 1, and the first dimension of the input that these run
# along; None if the groups of `samon.two_pass` cannot each have their own. Not every version of timm has all of its
# layers. Gates and scales that do not normalize (LayerScale, ResMLP's Affine, ConvNeXt-V2's GRN) are left out.
NORM_TYPES: dict[type[nn.Module], int | None] = {
    _BatchNorm: 1,
    nn.SyncBatchNorm: None,
    nn.GroupNorm: 1,
    _InstanceNorm: 1,
    nn.LayerNorm: -1,
    nn.RMSNorm: -1,
    **{_LAYERS[name]: dim for dim, names in _TIMM.items() for name in names.split() if name in _LAYERS},
}
BUILT_IN = frozenset(NORM_TYPES)  # without the classes that users register


def register_norm(cls: type[nn.Module], dim: int | None) -> None:
    """Register a normalization layer class of your own; the parameters that its modules own directly are gamma and
    beta. Call it before the optimizer is created.

    Args:
        cls: the class; subclasses are included.
        dim: first dimension of the input that the parameters run along: 1 for channels first ([B, C, ...]), -1 for
            channels last ([B, ..., C]). None if `groups` of `samon.two_pass` cannot work: samples of a batch influence
            each other (batch statistics), or the output is not `normalized(x) * weight + bias` with parameters of
            these names. The first step with `groups` checks it.

    Raises:
        UserError: `cls` is not an `nn.Module` class, or `dim` has another value.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UserError(f"register_norm takes an nn.Module class such as LlamaRMSNorm, got {cls!r}")
    if dim not in (1, -1, None):
        raise UserError(f"dim must be 1 (channels first), -1 (channels last) or None (no groups), got {dim!r}")
    NORM_TYPES[cls] = dim


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every normalization module of the model by qualified name, affine or not."""
    return _by_unique_name((name, m) for name, m in named_modules(model) if norm_type(m) is not None)


def norm_type(module: nn.Module) -> type[nn.Module] | None:
    """The known normalization layer that the module is: its class or the closest base class. None for other modules."""
    return next((t for t in type(module).__mro__ if t in NORM_TYPES), None)


def affine_dim(module: nn.Module) -> int | None:
    """The entry of NORM_TYPES for this normalization module."""
    closest = norm_type(module)
    assert closest is not None
    return NORM_TYPES[closest]


def norm_parameters(model: nn.Module) -> NamedParameters:
    """Affine normalization parameters by qualified name, or those that a parametrization computes them from; shared
    ones once, under their first name."""
    names: dict[Parameter, str] = {}
    for prefix, module in norm_modules(model).items():
        computed = getattr(module, "parametrizations", {}).items()
        own = [(n, path, p) for n, layer in computed for path, p in layer.named_parameters(f"parametrizations.{n}")]
        own += [(name, name, p) for name, p in module.named_parameters(recurse=False)]
        every = norm_type(module) not in BUILT_IN  # FRN and EvoNorm own further parameters, which are not affine
        for name, path, parameter in own:
            if every or name.removesuffix("_orig") in ("weight", "bias"):  # `weight_orig` is that of a pruned layer
                names.setdefault(parameter, f"{prefix}.{path}".lstrip("."))
    return {name: parameter for parameter, name in names.items()}


def looks_like_norm(module: nn.Module) -> bool:
    """Whether the class is not known as a normalization layer, but has "norm" in its name and a parameter [C] or
    [1, C, 1, 1]."""
    known = norm_type(module) is not None or isinstance(module, GlobalResponseNorm)  # "norm" by name alone
    return not known and "norm" in type(module).__name__.lower() and bool(_vectors(module))


def _vectors(module: nn.Module) -> set[str]:
    """Names of the module's own parameters [C] or [1, C, 1, 1]."""
    shapes = {name: p.shape for name, p in module.named_parameters(recurse=False)}
    return {k for k, s in shapes.items() if len(s) == 1 or (s[2:] and s[-1] == 1 and sum(n > 1 for n in s) == 1)}


def _hides_norms(module: nn.Module) -> bool:
    """Whether layers lost their classes, by TorchScript or as operations in a torch.fx graph, and one of them has
    parameters as a normalization layer: a vector that is not a bias."""
    lost = [module] if isinstance(module, torch.jit.ScriptModule) else list[nn.Module]()
    if isinstance(module, torch.fx.GraphModule):
        lost = [m for m in module.modules() if type(m) is nn.Module]
    return any(_vectors(m) - {"bias"} for m in lost)


def _wrapped_attribute(module: nn.Module) -> str | None:
    """The attribute in which DDP, DataParallel and torch.compile wrappers hold their model; None for other modules."""
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "module"
    return "_orig_mod" if isinstance(module, torch._dynamo.OptimizedModule) else None


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model inside DistributedDataParallel and torch.compile wrappers."""
    attribute = _wrapped_attribute(model)
    return model if attribute is None else unwrap(getattr(model, attribute))


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without the attributes (`module`, `_orig_mod`) in which wrappers hold their model,
    wherever in the model they are."""
    names, hidden = {"": ""}, set[str]()  # shortened names by path; paths of wrapped models
    for path, module in model.named_modules():
        parent, _, attribute = path.rpartition(".")
        names[path] = names[parent] if path in hidden else f"{names[parent]}.{attribute}".lstrip(".")
        if (wrapped := _wrapped_attribute(module)) is not None:
            hidden.add(f"{path}.{wrapped}".lstrip("."))
        yield names[path], module


def named_parameters(model: nn.Module) -> NamedParameters:
    """Parameters by their names in the bare model; shared ones once, under their first name."""
    names: dict[Parameter, str] = {}
    for prefix, module in named_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, f"{prefix}.{name}".lstrip("."))
    return _by_unique_name((name, parameter) for parameter, name in names.items())


def _by_unique_name(pairs: Iterable[tuple[str, V]]) -> dict[str, V]:
    result: dict[str, V] = {}
    for name, value in pairs:
        if name in result:
            raise UserError(f"{name!r} names two parameters or layers; rename one, since perturbations go by name")
        result[name] = value
    return result


@dataclass
class Selection:
    """The parameters of a scope by qualified name. Frozen ones are included: `requires_grad` decides at every step.

    Attributes:
        perturb: regular expression that the names match.
        model: the bare model; None if the optimizer was created from parameters.
        narrowed: whether `perturb` excludes a part of the scope, so that only some layers are perturbed.
        perturb_frozen: whether frozen parameters are perturbed too.
    """

    scope: str
    parameters: NamedParameters
    perturb: str | None = None
    model: nn.Module | None = field(default=None, repr=False)
    narrowed: bool = False
    perturb_frozen: bool = False

    def current(self) -> NamedParameters:
        """The parameters to perturb now: those that require gradients, or all with `perturb_frozen`."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad or self.perturb_frozen}

    def summary(self) -> str:
        """Text for the log: how much of the model is perturbed, and in which types of layer."""
        perturbed = list(self.current().values())
        count = sum(p.numel() for p in perturbed)
        line = f"{self.scope} perturbs {count:,} parameters in {len(perturbed)} tensors"
        if self.model is None:
            return line
        total = sum(p.numel() for p in self.model.parameters())
        modules = reversed(list(self.model.modules()))  # a shared parameter counts for its first owner
        owners = {id(p): type(m).__name__ for m in modules for p in m.parameters(recurse=False)}
        tensors, sizes = Counter[str](), Counter[str]()
        for p in perturbed:
            owner = owners.get(id(p), "outside the model")  # from `add_param_group`
            tensors[owner] += 1
            sizes[owner] += p.numel()
        rows = [f"  {owner}: {size:,} in {tensors[owner]} tensors" for owner, size in sizes.most_common()]
        return "\n".join([f"{line}, {count / total:.3%} of {model_name(self.model)}", *rows])


def model_name(model: nn.Module) -> str:
    """The timm architecture if there is one, else the class name."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(model).__name__


def select(model: nn.Module, scope: str, perturb: str | None = None, perturb_frozen: bool = False) -> Selection:
    """Select the parameters of `scope` whose qualified name matches the regular expression `perturb`.

    Raises:
        UserError: there is none, or none that is trainable, or `perturb` is not a regular expression.
    """
    model = unwrap(model)
    refuse_fsdp1(model.parameters())
    if scope != "sam" and any(map(_hides_norms, model.modules())):
        raise UserError(f"{scope}: TorchScript and torch.fx hide which layers normalize; create the optimizer before")
    norms = norm_parameters(model)
    candidates = SCOPES[scope].choose(named_parameters(model), norms)
    unknown = ", ".join(sorted({type(m).__name__ for m in model.modules() if looks_like_norm(m)}))
    advice = ""
    if unknown and scope != "sam":
        advice = (
            f"not known as normalization layers, though their names say so: {unknown}; register each by "
            "samon.register_norm(cls, dim=...) before the optimizer is created"
        )
    if not any(p.requires_grad or perturb_frozen for p in candidates.values()):
        types = sorted({type(m).__name__ for m in norm_modules(model).values()}) or ["none"]
        raise UserError(
            f"{scope}: {model_name(model)} has no trainable parameter to perturb ({SCOPES[scope].description}; its "
            f"normalization layers: {', '.join(types)}); use another scope (sam perturbs all parameters), unfreeze "
            f"them, pass perturb_frozen=True, or choose another model{advice and '; ' + advice}"
        )
    if advice:
        warnings.warn(f"{scope}: {model_name(model)} has layers that are {advice}", stacklevel=4)
    return _narrow(Selection(scope, candidates, perturb, model, perturb_frozen=perturb_frozen))


def select_bare(param_groups: list[dict], scope: str, perturb: str | None = None) -> Selection:
    """Select from the parameter groups of an optimizer that was created without a model (scope `sam` only)."""
    if scope != "sam":
        raise UserError(
            f"{scope} must know which parameters belong to normalization layers, but was given bare parameters; "
            f"create it from the model: timm.optim.create_optimizer_v2(model, '{scope}', ...)"
        )
    names = [
        group.get("param_names") or [f"group{i}.{j}" for j in range(len(group["params"]))]
        for i, group in enumerate(param_groups)
    ]
    parameters = [p for group in param_groups for p in group["params"]]
    refuse_fsdp1(parameters)
    pairs = zip(chain.from_iterable(names), parameters, strict=True)
    return _narrow(Selection(scope, _by_unique_name(pairs), perturb))


def _narrow(whole: Selection) -> Selection:
    """The parameters of a whole scope whose name matches its `perturb` (all if None)."""
    perturb, candidates = whole.perturb, whole.parameters
    try:
        matching = {name: p for name, p in candidates.items() if re.search(perturb or "", name)}
    except re.error as e:
        raise UserError(f"perturb={perturb!r} is not a regular expression: {e}") from None
    selection = replace(whole, parameters=matching, narrowed=len(matching) < len(candidates))
    if not selection.current():
        where = "the parameter groups" if whole.model is None else model_name(whole.model)
        trainable = [name for name, p in candidates.items() if p.requires_grad]
        raise UserError(
            f"perturb={perturb!r} matches none of the {len(trainable)} trainable parameters of scope {whole.scope} in "
            f"{where}; the first of them is {next(iter(trainable), None)!r}"
        )
    return selection


def refuse_fsdp1(parameters: Iterable[Tensor]) -> None:
    """Raise UserError if FSDP1 has flattened a parameter, since the part of it that a process holds is unknown."""
    if any(getattr(p, "_fsdp_flattened", False) for p in parameters):
        raise UserError(
            "FullyShardedDataParallel (FSDP1) hides which part of a parameter a process holds; shard the model with "
            "torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )
