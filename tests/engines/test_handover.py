"""`replace_base`: another base optimizer takes over, with the momentum that both have."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import samon
from samon import UserError
from tests.nets import ShallowNet, batch
from tests.steps import assert_same, loss_of, make

BETA = 0.9  # timm's momentum, and beta1 of the Adam family; Lion's buffer has 0.99
SUMS = {"sgd", "momentum", "sgdw"}
ADAM = {"adam", "adamw", "cadamw", "nadamw"}
OLD = ("sgd", "momentum", "sgdw", "adam", "adamw", "lion", "muon", "adamuon")
NEW = (*OLD, "nadamw", "cadamw")


def train(model: nn.Module, opt: Any, updates: range, plain: bool = False) -> None:
    for t in updates:
        opt.zero_grad()
        loss = loss_of(model, *batch(8, seed=t))
        if plain:
            opt.expect_plain_step()
            loss().backward()
        else:
            samon.two_pass(opt, loss)
        opt.step()


def trained(base: str, updates: int = 3, **how: Any) -> tuple[nn.Module, Any, list[list[Tensor]]]:
    """A network after some updates, its optimizer, and the gradients [update][parameter]."""
    model, opt = make(ShallowNet, "samon", base_opt=base, **how)
    grads = []
    for t in range(updates):
        train(model, opt, range(t, t + 1))
        grads.append([p.grad.clone() for p in model.parameters()])
    return model, opt, grads


def mean_of(grads: list[Tensor], beta: float) -> Tensor:
    """The exponential mean from its definition."""
    return sum((1 - beta) * beta ** (len(grads) - 1 - i) * g for i, g in enumerate(grads))  # type: ignore[return-value]


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("old", OLD)
def test_what_is_carried(old: str, new: str) -> None:
    """The new buffer holds the exponential mean of the gradients that the old one held; Adam's state is carried whole
    or not at all."""
    model, opt, grads = trained(old)
    before, matrices = {p: dict(s) for p, s in opt.state.items()}, 0
    carried = opt.replace_base(new)
    for i, p in enumerate(model.parameters()):
        matrix = p.dim() > 1 and min(p.shape[0], p[0].numel()) >= 4
        matrices += matrix
        adam_now, adam_before = (n in ADAM or ("muon" in n and not matrix) for n in (new, old))
        state = opt.state.get(p, {})
        if adam_now and not adam_before:
            assert not state
        elif adam_now:
            assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(state[key], before[p][key]) for key in state)
            assert all(state[key] is not before[p][key] for key in state)
        else:
            [(key, value)] = state.items()
            assert key == ("exp_avg" if new == "lion" else "momentum_buffer")
            mean = mean_of([g[i] for g in grads], 0.99 if old == "lion" else BETA)
            expected = mean / (1 - BETA) if new in SUMS else mean
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    assert carried == sum(bool(opt.state.get(p)) for p in model.parameters())
    assert 0 < matrices < len(grads[0])
    train(model, opt, range(3, 5))
    if "muon" in new:  # it decides by itself what is a matrix
        for p in model.parameters():
            assert opt.state[p]["use_muon"] == ("exp_avg" not in opt.state[p])


@pytest.mark.parametrize("base", ["sgd", "adamw", "lion", "muon", "adamuon"])
def test_the_same_optimizer_goes_on_bit_identically(base: str) -> None:
    """AdaMuon starts its second moments of matrices anew; all others carry everything."""
    (model, opt, _), (twin, other, _) = trained(base), trained(base)
    opt.replace_base(base)
    train(model, opt, range(3, 6))
    train(twin, other, range(3, 6))
    if base == "adamuon":
        assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    else:
        assert_same(model, twin)


def test_options_are_those_of_the_new_optimizer() -> None:
    """Learning rate, decay and what schedulers and timm keep in a group stay; momentum, Nesterov and others do not."""
    _, opt, _ = trained("sgd", weight_decay=0.1)
    for i, group in enumerate(opt.param_groups):
        group |= {"lr_scale": 0.5**i, "initial_lr": 0.3}  # of --layer-decay, and of schedulers
    before = [dict(group) for group in opt.param_groups]
    opt.replace_base("muon", momentum=0.95)
    for old, new in zip(before, opt.param_groups, strict=True):
        assert [id(p) for p in old["params"]] == [id(p) for p in new["params"]]
        for key in ("lr", "weight_decay", "lr_scale", "initial_lr"):
            assert old[key] == new[key]
        assert (new["momentum"], new["nesterov"]) == (0.95, False)
        assert "dampening" not in new
    assert opt.defaults["lr"] == 0.3


@pytest.mark.parametrize("new", ["sgd", "adamw", "lion", "muon"])
def test_the_ratio_multiplies_the_learning_rate_of_any_scheduler(new: str) -> None:
    """torch's LambdaLR sets rates from their initial values; the ratio is not lost. Decay is scaled with the rate."""
    ends = []
    for ratio in (0.25, 1.0):
        model, opt, _ = trained("adamw", weight_decay=0.1)
        rates = LambdaLR(opt, lambda t: 0.5**t)
        opt.replace_base(new, ratio)
        for t in range(3, 6):
            if ratio == 1:
                for group in opt.param_groups:
                    group["lr"] *= 0.25
            train(model, opt, range(t, t + 1))
            assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (t - 3) * (0.25 if ratio == 1 else 1))
            rates.step()
        ends.append(model)
    assert_same(*ends, 1e-12)


@pytest.mark.parametrize(("old", "new"), [("sgd", "muon"), ("adamw", "muon"), ("adamw", "sgd"), ("sgd", "adamw")])
@pytest.mark.parametrize("saved", [1, 3, 4])
def test_resuming_before_at_and_after_the_switch(saved: int, old: str, new: str) -> None:
    """Update 3 is the first of the tail. A new optimizer, created as at the start, loads any of the states."""
    tail = samon.Tail(6, 0.5)

    def run(model: nn.Module, opt: Any, updates: range) -> None:
        for t in updates:
            if t == tail.start:
                opt.replace_base(new, 0.5)
            train(model, opt, range(t, t + 1), plain=t not in tail)

    kinds = {"base_opt": old, "weight_decay": 0.01}
    (model, opt), (twin, other) = make(ShallowNet, "samon", **kinds), make(ShallowNet, "samon", **kinds)
    run(model, opt, range(6))
    run(twin, other, range(saved))
    state = copy.deepcopy(other.state_dict())
    resumed, fresh = make(ShallowNet, "samon", **kinds)
    resumed.load_state_dict(twin.state_dict())
    fresh.load_state_dict(state)
    run(resumed, fresh, range(saved, 6))
    assert_same(model, resumed)
    copied = copy.deepcopy((resumed, fresh))
    for m, o in ((resumed, fresh), copied):
        assert type(o.base) is type(opt.base)
        train(m, o, range(6, 7))
    assert_same(*(m for m, _ in ((resumed, 0), copied)))


def test_a_state_of_the_other_side_is_refused() -> None:
    _, opt, _ = trained("sgd")
    before = opt.state_dict()
    opt.replace_base("lion", 0.1)
    after = opt.state_dict()
    with pytest.raises(UserError, match=r"saved before replace_base; create the optimizer anew"):
        opt.load_state_dict(before)
    opt.load_state_dict(after)
    _, other, _ = trained("sgd")
    other.replace_base("adamw")
    with pytest.raises(UserError, match=r"saved after replace_base\('lion'\)"):
        other.load_state_dict(after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opt": "samon"}, "itself sharpness-aware"),
        ({"opt": "lookahead_sgd"}, "lookahead_sgd"),
        ({"opt": "mon"}, "mon not found in registry"),
        ({"opt": "adahessian"}, "second derivatives"),
        ({"opt": "muon", "lr_ratio": 0.0}, "lr_ratio must be a finite number > 0, got 0.0"),
        ({"opt": "muon", "lr_ratio": "x"}, "lr_ratio must be a finite number > 0, got .x"),
        ({"opt": "muon", "lr": 0.1}, "the parameter groups keep their lr"),
    ],
)
def test_what_cannot_take_over(arguments: dict[str, Any], message: str) -> None:
    _, opt, _ = trained("sgd", 1)
    base = opt.base
    with pytest.raises(UserError, match=message):
        opt.replace_base(**arguments)
    assert opt.base is base
    assert opt.replacement is None


def test_lookahead_is_refused() -> None:
    _, opt = make(ShallowNet, "lookahead_samon")
    with pytest.raises(UserError, match="Lookahead keeps its state in the base optimizer"):
        samon.sam_of(opt).replace_base("muon")
