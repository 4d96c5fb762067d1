"""timm's factory makes our optimizers, with timm's own parameter groups."""

import copy
import itertools
import math
import pickle
from collections.abc import Iterable

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers

import samon


def names(*parts: Iterable[str]) -> list[str]:
    return ["-".join(filter(None, product)) for product in itertools.product(*parts)]


# Middle values of the paper's Tables 7 and 8.
RHO_ALL = {"": 0.05, "eleml2": 1.0, "eleml2orig": 0.5, "elemlinf": 0.001, "layerl2": 0.005, "fisher": 0.05}
RHO_NORMS = {"": 0.5, "eleml2": 1.0, "eleml2orig": 0.5, "elemlinf": 0.005, "layerl2": 0.05, "fisher": 0.5}
BASES = ("", "momentum", "adamw", "lion", "muon")
NAMES, MASKED = names(("sam", "samon", "samnn"), RHO_ALL, BASES), names(("sam-random", "ssam-f", "ssam-d"), BASES)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return timm.create_model("test_resnet")


def test_all_names_are_listed_and_described() -> None:
    assert len(NAMES) == len(set(NAMES)) == 90
    assert set(NAMES) <= set(list_optimizers("sam*"))
    described = dict(list_optimizers(with_description=True))
    assert described["samon-layerl2"] == (
        "Sharpness-aware sgd: perturbs only normalization parameters (SAM-ON), layerwise l2, T = ||tensor||_2"
    )
    assert len({described[n] for n in NAMES + MASKED}) == len(NAMES + MASKED)  # the description tells variants apart


@pytest.mark.parametrize("name", NAMES + MASKED)
def test_every_name_makes_the_right_optimizer(name: str, model) -> None:
    opt = create_optimizer_v2(model, name, lr=0.1, weight_decay=1e-4)
    base = {"adamw": "AdamW", "lion": "Lion", "muon": "Muon"}.get(name.rpartition("-")[2], "SGD")
    assert type(opt.base).__name__ == base
    made = get_optimizer_class(name, bind_defaults=False)
    assert type(opt) is type(pickle.loads(pickle.dumps(opt))) is made
    assert issubclass(made, torch.optim.Optimizer)
    assert made.__name__ == name
    assert vars(copy.deepcopy(opt)).keys() == vars(opt).keys()
    scope, _, rest = name.partition("-")
    geometry = rest.partition("-")[0] if name in NAMES else ""
    assert opt.rho == (RHO_NORMS if scope == "samon" else RHO_ALL)[geometry if geometry in RHO_ALL else ""]
    assert opt.scope == (name.split("-")[0] if name in NAMES else "sam")
    if base == "SGD":
        assert opt.defaults["nesterov"] == (not name.endswith("momentum"))
        assert opt.defaults["momentum"] == 0.9


def test_groups_are_timms(model) -> None:
    for kwargs in ({"weight_decay": 0.1}, {"weight_decay": 0.1, "layer_decay": 0.7}, {"filter_bias_and_bn": False}):
        ours = create_optimizer_v2(model, "samon-adamw", lr=0.1, **kwargs)
        theirs = create_optimizer_v2(model, "adamw", lr=0.1, **kwargs)
        assert ours.param_groups == theirs.param_groups


def test_keyword_arguments_reach_their_place(model) -> None:
    other = {"base_opt": "lamb", "betas": (0.8, 0.9), "eps": 1e-3}
    opt = create_optimizer_v2(model, "samon-fisher", lr=0.1, rho=0.3, eta=0.2, **other)
    assert (opt.rho, opt.eta, type(opt.base).__name__) == (0.3, 0.2, "Lamb")
    assert (opt.defaults["betas"], opt.defaults["eps"]) == ((0.8, 0.9), 1e-3)
    late = create_optimizer_v2(model, "samon", lr=0.1, perturb="layer4|stages.3|stages_3")
    assert set(late.perturbed_parameters()) < set(opt.perturbed_parameters())
    sparse = create_optimizer_v2(model, "ssam-f", lr=0.1, sparsity=0.9)
    assert sparse.mask.sparsity == 0.9


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("samon-layrel2", "samon-layerl2"),
        ("samon_layerl2", "samon-layerl2"),
        ("lookahead_smaon", "samon"),
        ("adamww", "adamw"),
    ],
)
def test_misspelt_names_name_the_nearest(name: str, like: str, model) -> None:
    with pytest.raises(ValueError, match=f"'{name}' not found in registry; did you mean '{like}'"):
        create_optimizer_v2(model, name, lr=0.1)


def test_lookahead(model) -> None:
    opt = create_optimizer_v2(model, "lookahead_samon-layerl2", lr=0.1)
    assert samon.sam_of(opt) is opt._base_optimizer
    assert opt.param_groups is samon.sam_of(opt).param_groups
    assert samon.is_sam_name("lookahead_samon-layerl2")
    assert not samon.is_sam_name("lookahead_sgd")


def test_bare_parameters(model) -> None:
    assert len(create_optimizer_v2(model.parameters(), "sam", lr=0.1).perturbed_parameters()) == len(
        list(model.parameters())
    )
    for name in ("samon", "samnn-layerl2"):
        with pytest.raises(ValueError, match=rf"bare parameters.*create_optimizer_v2\(model, '{name[:5]}"):
            create_optimizer_v2(model.parameters(), name, lr=0.1)
    with pytest.raises(ValueError, match="create it from the model"):
        create_optimizer_v2(model.parameters(), "sam-eleml2orig", lr=0.1)
    named = create_optimizer_v2(list(model.named_parameters()), "sam-eleml2orig", lr=0.1)
    assert set(named.perturbed_parameters()) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        *(({"rho": v}, f"rho must be a finite number >= 0, got {v!r}") for v in (-1, math.nan, math.inf, "0.1", True)),
        *(({"eta": v}, f"eta must be a finite number >= 0, got {v!r}") for v in (-0.1, math.nan, math.inf)),
        ({"base_opt": "adahessian"}, "Adahessian needs second derivatives.*first-order base"),
        ({"sparsity": 0.5}, "samon has no mask"),
        ({"base_opt": "sam"}, "is itself sharpness-aware"),
        ({"base_opt": "nosuch"}, "nosuch"),
        *(
            ({"radius": r}, "radius must be ball, raw, loss or a number in")
            for r in ("rho", "nan", 0, 1, -0.5, True, None)
        ),
    ],
)
def test_bad_arguments(kwargs: dict, message: str, model) -> None:
    with pytest.raises(ValueError, match=message):
        create_optimizer_v2(model, "samon", lr=0.1, **kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they may exist")
@pytest.mark.parametrize("base", list_optimizers(["bnb*", "fused*"]))
def test_a_base_that_does_not_exist_here_is_refused_by_name(base: str, model) -> None:
    with pytest.raises(samon.UserError, match=f"base_opt='{base}': .*(CUDA|bitsandbytes|APEX)"):
        create_optimizer_v2(model, "samon", lr=0.1, base_opt=base)


def test_other_optimizers_are_untouched(model) -> None:
    assert type(create_optimizer_v2(model, "sgd", lr=0.1)) is torch.optim.SGD
    samon.registry.register()  # a second import registers nothing twice
    assert type(create_optimizer_v2(model, "samon", lr=0.1).base) is torch.optim.SGD
