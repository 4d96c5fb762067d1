"""SAM as a torch optimizer: what schedulers, scalers, checkpoints, copies and other trainers rely on."""

import copy
import pickle
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import samon
from samon import UserError
from tests.nets import NETS, BatchNormNet, LayerNormNet, batch, randomized
from tests.steps import (
    assert_same,
    assert_unchanged,
    closure_of,
    loss_of,
    losses_of,
    make,
    optimizer_of,
    update,
    values,
)


def trained(name: str, count: int = 3, closure: bool = False, net: Any = LayerNormNet, **kwargs: Any) -> Any:
    """(network, optimizer) after a few steps."""
    torch.manual_seed(0)
    model = randomized(net())
    opt = create_optimizer_v2(model, name, lr=0.05, weight_decay=1e-3, **kwargs)
    for step in range(count):
        train_step(model, opt, step, closure)
    return model, opt


def train_step(model: nn.Module, opt: Any, step: int, closure: bool = False) -> Any:
    forward = loss_of(model, *batch(seed=step))
    if closure:
        return opt.step(closure_of(opt, forward))
    if samon.sam_of(opt) is not None:
        return update(opt, forward)
    opt.zero_grad()
    forward().backward()
    return opt.step()


@pytest.mark.parametrize("base", ["sgd", "momentum", "adamw", "lion"])
@pytest.mark.parametrize("net", NETS.values())
def test_zero_radius_is_the_base_optimizer(base: str, net) -> None:
    name = "samon-layerl2" + ("" if base == "sgd" else f"-{base}")
    ours, _ = trained(name, net=net, rho=0.0)
    theirs, _ = trained(base, net=net)
    # Freezing changes no forward arithmetic and eps is exactly zero, so not a bit differs.
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["sam", "samon-layerl2-adamw", "samnn-elemlinf-lion", "lookahead_samon"])
@pytest.mark.parametrize("net", NETS.values())
def test_closure_step_equals_two_pass(name: str, net) -> None:
    """To 1e-12: the closure's ascent gradient comes from a full backward pass, which may add in another order."""
    assert_same(trained(name, net=net)[0], trained(name, net=net, closure=True)[0], 1e-12)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("samon-layerl2-adamw", {"radius": "raw"}),
        ("ssam-d", {"mask_every": 2}),
        ("sam-random-adamw", {}),
        ("lookahead_samon", {}),
        ("samon-momentum", {"esam_beta": 0.5}),
    ],
)
def test_a_run_continues_bit_exactly(name: str, how: dict[str, Any], way: str) -> None:
    if "lookahead" in name and way != "state_dict":
        pytest.skip("timm's Lookahead cannot be copied")
    model, opt = trained(name, 4, **how)
    torch.optim.lr_scheduler.StepLR(opt, 1)  # it replaces opt.step by a bound wrapper that cannot be copied
    if way == "state_dict":
        other, again = trained(name, 0, **how)
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        pair = model, opt
        other, again = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for step in range(4, 7):
        train_step(model, opt, step)
        train_step(other, again, step)
    assert_same(model, other)
    sam, parameters = samon.sam_of(again), dict(other.named_parameters())
    assert repr(sam) == repr(samon.sam_of(opt))
    assert sam.param_groups is sam.base.param_groups
    assert all(p is parameters[n] for n, p in sam.perturbed_parameters().items())


def test_loads_the_base_optimizers_state() -> None:
    """A run can be continued with SAM from a checkpoint without it."""
    model, plain = trained("adamw", 2)
    opt = create_optimizer_v2(model, "samon-adamw", lr=0.05, weight_decay=1e-3)
    opt.load_state_dict(plain.state_dict())
    for p in model.parameters():
        assert torch.equal(opt.state[p]["exp_avg"], plain.state[p]["exp_avg"])
        assert opt.state[p]["step"] == 2
    train_step(model, opt, 3)
    assert opt.state[model.head.weight]["step"] == 3


def test_add_param_group() -> None:
    """Layers that are unfrozen later are perturbed from then on; before, the optimizer does not train them either."""
    model, _ = make()
    model.norms[3].requires_grad_(False)
    opt = optimizer_of(model)
    assert len(opt.perturbed_parameters()) == 6
    model.norms[3].requires_grad_(True)
    assert len(opt.perturbed_parameters()) == 6
    opt.add_param_group({"params": list(model.norms[3].parameters())})
    assert len(opt.perturbed_parameters()) == 8
    before = copy.deepcopy(model.norms[3].weight)
    train_step(model, opt, 0)
    assert not torch.equal(model.norms[3].weight, before)
    model.norms.requires_grad_(False)
    outside = nn.Parameter(torch.ones(2, dtype=torch.float64))  # of the loss function
    for opt in (optimizer_of(model, perturb_frozen=True), optimizer_of(model, "sam")):
        count = len(opt.perturbed_parameters())
        opt.add_param_group({"params": [outside]})
        assert len(opt.perturbed_parameters()) == count + (opt.scope == "sam")
        assert ("outside the model: 2 in 1 tensors" in opt.selection.summary()) == (opt.scope == "sam")
    for opt in (optimizer_of(model, "samnn"), optimizer_of(model, "sam-eleml2orig")):
        with pytest.raises(UserError, match="must know the layers"):
            opt.add_param_group({"params": [outside]})


def test_a_wrapper_that_keeps_rho_to_itself_is_refused() -> None:
    model, opt = trained("lookahead_samon", 1)
    opt.rho = 0.1
    with pytest.raises(UserError, match=r"set samon\.sam_of\(optimizer\)\.rho"):
        samon.two_pass(opt, loss_of(model, *batch()))


def test_a_selection_serves_several_optimizers() -> None:
    model, _ = make()
    selection = samon.scope.select(model, "sam")
    for parameters, count in ((model.head.parameters(), 2), (model.parameters(), len(list(model.parameters())))):
        opt = samon.SAM(torch.optim.SGD(parameters, lr=0.1), selection, rho=0.1)
        assert len(opt.perturbed_parameters()) == count


def test_perturbed_context_restores_bit_exactly() -> None:
    """(w + eps) - eps is not w."""
    model, opt = trained("samon", 1)
    before = values(model)
    grads = {n: torch.randn_like(p) for n, p in opt.perturbed_parameters().items()}
    grads[next(iter(grads))] = None  # a missing gradient counts as zero
    with pytest.raises(RuntimeError, match="inside"), opt.perturbed(grads):  # noqa: PT012
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert changed == list(grads)[1:]
        eps = torch.cat([(p - before[n]).flatten() for n, p in opt.perturbed_parameters().items()])
        assert eps.norm().item() == pytest.approx(opt.rho, rel=1e-9)
        raise RuntimeError("inside")
    assert_unchanged(model, before)
    with opt.perturbed(list(grads.values())):
        assert not torch.equal(model.norms[1].weight, before["norms.1.weight"])
        with pytest.raises(UserError, match="would lose its update"):
            opt.step()
    wrapped = {f"module.{name}": grad for name, grad in grads.items()}  # as DistributedDataParallel names them
    with pytest.raises(UserError, match="names no perturbed parameter"), opt.perturbed(wrapped):
        pass


def test_an_interruption_after_eps_was_added_restores_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = trained("sam", 1)
    before, calls = values(model), []

    def interrupt(named: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(opt, "_clear_weight_copies", interrupt)
    with pytest.raises(KeyboardInterrupt):
        samon.two_pass(opt, loss_of(model, *batch()))
    assert_unchanged(model, before)


def test_the_radius_of_a_parameter_group_is_refused() -> None:
    """davda54/sam reads rho there."""
    model = randomized(LayerNormNet())
    opt = create_optimizer_v2([{"params": list(model.parameters()), "rho": 0.3}], "sam", lr=0.1, rho=0.3)
    samon.two_pass(opt, loss_of(model, *batch()))
    opt.param_groups[0]["rho"] = 0.5
    with pytest.raises(UserError, match=r"set optimizer\.rho"):
        samon.two_pass(opt, loss_of(model, *batch()))


def test_the_rho_of_adadelta_is_its_own() -> None:
    model = randomized(LayerNormNet())
    opt = create_optimizer_v2(model, "sam", lr=0.1, base_opt="adadelta")
    samon.two_pass(opt, loss_of(model, *batch()))
    assert opt.stats["eps_norm"].item() == pytest.approx(opt.rho)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float, dtype: torch.dtype) -> None:
    """Running statistics of the second pass would keep what a NaN weight makes."""
    torch.manual_seed(0)
    model = randomized(LayerNormNet()).to(dtype)
    opt = optimizer_of(model)
    before = {n: p.detach().clone() for n, p in opt.perturbed_parameters().items()}
    grads = [torch.ones_like(p) for p in before.values()]
    grads[1].view(-1)[0] = bad
    with opt.perturbed(grads):
        assert all(torch.equal(p, before[n]) for n, p in opt.perturbed_parameters().items())
    rows = [g[None].expand(3, *g.shape) for g in grads]
    eps, _, finite = opt.perturbation(opt.perturbed_parameters(), rows, grouped=True)
    assert not finite.any()
    assert all(torch.equal(e, torch.zeros_like(e)) for e in eps)


def test_missing_gradient_in_the_second_pass() -> None:
    """A branch that runs only in the first pass must not leave its weights perturbed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2), nn.LayerNorm(2)).double()
    opt = optimizer_of(model, rho=1.0)
    before = values(model)
    x, calls = torch.randn(3, 4, dtype=torch.float64), []

    def forward() -> Tensor:
        calls.append(1)
        features = model[1](model[0](x))
        return (model[2](features) if len(calls) == 1 else features).square().mean()

    samon.two_pass(opt, forward)
    assert model[2].weight.grad is None
    assert_unchanged(model, before)


def test_frozen_later_is_left_alone() -> None:
    model, opt = trained("samon", 1)
    model.norms[0].requires_grad_(False)
    assert "norms.0.weight" not in opt.perturbed_parameters()
    frozen = model.norms[0].weight.clone()
    train_step(model, opt, 1)
    assert torch.equal(model.norms[0].weight, frozen)
    for norm in model.norms:
        norm.requires_grad_(False)
    for closure in (False, True):
        with pytest.raises(UserError, match="all parameters that samon perturbs are frozen"):
            train_step(model, opt, 2, closure)


def test_a_state_is_loaded_while_everything_is_frozen() -> None:
    model, opt = trained("samon", 1, ascent="previous")
    state = opt.state_dict()
    for norm in model.norms:
        norm.requires_grad_(False)
    opt.load_state_dict(state)
    assert opt.ascent.state.keys() == state["ascent"]["kept"].keys() != set()


def test_frozen_parameters_are_perturbed_on_request() -> None:
    model, whole = make(BatchNormNet)
    named, summary = whole.perturbed_parameters(), whole.selection.summary()
    model.requires_grad_(False).head.requires_grad_(True)
    with pytest.raises(UserError, match="perturb_frozen=True"):
        optimizer_of(model)
    opt = optimizer_of(model, perturb_frozen=True)
    assert opt.perturbed_parameters() == named
    assert opt.selection.summary() == summary
    for source in (*({"ascent": name} for name in ("previous", "msam", "looksam:2", "aesam")), {"gsam_alpha": 0.1}):
        with pytest.raises(UserError, match=r"perturb_frozen excludes .* use ascent='batch'"):
            optimizer_of(model, perturb_frozen=True, **source)
    with pytest.raises(UserError, match="create the optimizer from the model"):
        optimizer_of(model.head.parameters(), "sam", perturb_frozen=True)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("samon", {"ascent": source}) for source in ("fsam", "looksam:3")),
        *(("samon", {"gsam_alpha": 0.3}), ("ssam-f", {"mask_every": 1})),
    ],
)
def test_a_skipped_update_leaves_nothing_behind_however_it_is_cleared(name: str, how: dict[str, Any]) -> None:
    """In micro-batches, whose gradients at w are summed up to the step."""
    ends = []
    for steps, in_place in (([0, 2], False), ([0, 1, 2], False), ([0, 1, 2], True)):
        model, opt = make(name=name, **how)
        for step in steps:
            model.zero_grad(set_to_none=not in_place)
            for forward in losses_of(model, *batch(seed=step), 2):
                samon.two_pass(opt, forward, loss_scale=0.5)
            if step != 1:
                opt.step()
        ends.append(model)
    for end in ends[1:]:
        assert_same(ends[0], end)


@pytest.mark.parametrize("how", [{"ascent": "fsam"}, {"gsam_alpha": 0.3}])
def test_an_auxiliary_loss_between_micro_batches_changes_nothing_else(how: dict[str, Any]) -> None:
    """Its backward pass writes to all gradients in place, which is not clearing them."""
    ends = []
    for auxiliary in (False, True):
        model, opt = make(**how)
        for step in range(2):
            opt.zero_grad()
            for forward in losses_of(model, *batch(seed=step), 3):
                samon.two_pass(opt, forward, loss_scale=1 / 3)
                if auxiliary:
                    (0 * torch.cat([p.flatten() for p in model.parameters()]).sum()).backward()
            opt.step()
        ends.append(model)
    assert_same(*ends)


@pytest.mark.parametrize("way", ["two_pass", "closure", "perturbed", "plain"])
def test_a_step_on_purpose_does_not_warn(way: str) -> None:
    model, opt = make()
    forward = loss_of(model, *batch())
    closure = closure_of(opt, forward)
    for _ in range(2):
        opt.zero_grad()
        if way == "two_pass":
            samon.two_pass(opt, forward)
        elif way == "perturbed":
            closure()
            with opt.perturbed({name: p.grad.clone() for name, p in opt.perturbed_parameters().items()}):
                closure()
        elif way == "plain":
            closure()
            opt.expect_plain_step()
        opt.step(closure) if way == "closure" else opt.step()
    if way == "plain":  # for one step; a forgotten two_pass warns once, also if another was skipped before
        samon.two_pass(opt, forward)
        closure()
        with pytest.warns(UserWarning, match="taken at w.*call samon.two_pass"):
            opt.step()
        closure()
        opt.step()
