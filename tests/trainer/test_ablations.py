"""What each ablation of B.7 to B.9 does to the parameters."""

import copy
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

from samon.errors import UserError
from samon.scope import norm_parameters
from samon.trainer.ablations import add_norm_dropout, fix_norm, weight_decay_groups
from samon.trainer.apply import apply_gradient
from samon.trainer.config import parse
from samon.trainer.gradient import compute_gradient
from samon.trainer.loop import to_device
from tests.nets import BatchNormNet, randomized
from tests.runs import built

RECIPES = Path(__file__).parents[2] / "hparams/cifar/ablations"


def test_fixed_norms_do_nothing() -> None:
    model = randomized(BatchNormNet())
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n not in norm_parameters(model)}
    fix_norm(model)
    for name, p in norm_parameters(model).items():
        assert p.eq(1.0 if name.endswith("weight") else 0.0).all()
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)


@pytest.mark.parametrize("on", ["all", "non-norm", "none"])
def test_what_decays(on: str) -> None:
    """A step with no gradient at all: p <- p (1 - lr decay) where it decays."""
    model = randomized(BatchNormNet())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = create_optimizer_v2(
        model, "momentum", lr=0.5, weight_decay=0.2, param_group_fn=lambda m: weight_decay_groups(m, 0.2, on)
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    norms = norm_parameters(model)
    for name, p in model.named_parameters():
        decays = on == "all" or (on == "non-norm" and name not in norms)
        torch.testing.assert_close(p, before[name] * (0.9 if decays else 1.0), rtol=1e-12, atol=0)


def test_norm_dropout_drops_gamma_and_beta_of_each_forward() -> None:
    """With one BatchNorm the output shows which gammas and betas were there: y = d_gamma gamma x + d_beta beta."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2000)).double()
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[0].bias.fill_(5.0)
    add_norm_dropout(model, 0.25)
    x = torch.randn(64, 2000, dtype=torch.float64)
    y = model(x)
    gamma, beta = y.std(0, unbiased=False), y.mean(0)
    for values, full in ((gamma, 2.0), (beta, 5.0)):
        dropped = values.abs() < 1e-9
        assert 0.2 < dropped.double().mean() < 0.3
        torch.testing.assert_close(values[~dropped], torch.full_like(values[~dropped], full / 0.75), rtol=1e-4, atol=0)
    assert not torch.equal((model(x).mean(0).abs() < 1e-9), (beta.abs() < 1e-9))
    assert isinstance(model[0].weight, nn.Parameter)
    model.eval()
    torch.testing.assert_close(model(x), 2 * (x - model[0].running_mean) / (model[0].running_var + 1e-5).sqrt() + 5)


def test_norm_dropout_of_a_copy_is_the_copys_and_survives_an_exception() -> None:
    model = nn.Sequential(nn.LayerNorm(4)).double()
    add_norm_dropout(model, 0.5)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.fill_(7.0)
    x = torch.randn(3, 4, dtype=torch.float64)
    twin.eval()
    model.eval()
    torch.testing.assert_close(twin(x), F.layer_norm(x, [4], torch.full([4], 7.0, dtype=torch.float64)))
    model.train()
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5, dtype=torch.float64))
    assert isinstance(model[0].weight, nn.Parameter)
    model(x).sum().backward()
    assert model[0].weight.grad is not None


def test_a_model_without_norms_is_refused() -> None:
    with pytest.raises(UserError, match="--fix-norm: Linear has no affine normalization parameters"):
        fix_norm(nn.Linear(2, 2))


@pytest.mark.parametrize("flags", ["--fix-norm", "--train-only-norm", "--freeze ^(conv1|layer[12])"])
def test_an_update_keeps_what_is_fixed(flags: str) -> None:
    run = built("--opt", "sam", *flags.split())
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    batches = (to_device(run, *batch) for batch in run.train_loader)
    compute_gradient(run, islice(batches, 1), 1, perturb=True)
    apply_gradient(run)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    norms, frozen = set(norm_parameters(run.model)), {n for n in before if n.startswith(("conv1", "layer1", "layer2"))}
    fixed = {"--fix-norm": norms, "--train-only-norm": before.keys() - norms}.get(flags, frozen)
    assert moved == before.keys() - fixed == run.sam.perturbed_parameters().keys()


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_change_their_base_and_nothing_else(recipe: Path) -> None:
    config = parse(["-c", str(recipe), "--print-config"])
    base = parse(["-c", str(RECIPES.parent / f"cifar{10 if recipe.stem == 'train_only_norm' else 100}_resnet.yaml")])
    changed = {k for k, v in vars(config).items() if getattr(base, k) != v} - {"config", "print_config", "opt", "rho"}
    assert changed - {"model", "eta"} == {"weight_decay_on" if recipe.stem == "weight_decay" else recipe.stem}
    assert config.weight_decay == 5e-4
