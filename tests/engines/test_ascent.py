"""Every source of the ascent direction against a naive loop that trains for some updates. Tolerance 1e-9 relative:
float64 sums in another order, grown over the updates."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import samon
from samon import UserError
from samon.engines.ascent import base_momenta, make_ascent, orthogonal_part
from tests import reference
from tests.nets import NETS, BatchNormNet, LayerNormNet, batch, randomized
from tests.processes import run_ranks

RHO, UPDATES = 0.3, 7
SOURCES = ("batch", "previous", "momentum", "friendly", "every:3", "adaptive")


def make(net: Callable[[], nn.Module] = LayerNormNet) -> nn.Module:
    torch.manual_seed(0)
    return randomized(net())


def optimizer(model: nn.Module, name: str = "samon-momentum", **how: Any) -> Any:
    return create_optimizer_v2(model, name, lr=0.1, momentum=0.9, weight_decay=0.0, rho=RHO, **how)


def losses(model: nn.Module, parts: int = 1, updates: int = UPDATES) -> list[list[Callable[[], Tensor]]]:
    """For each update the losses of its micro-batches."""
    found = []
    for t in range(updates):
        x, y = batch(8, seed=10 + t)
        pairs = zip(x.chunk(parts), y.chunk(parts), strict=True)
        found.append([lambda a=a, b=b: F.cross_entropy(model(a), b) for a, b in pairs])
    return found


def train(opt: Any, updates: list[list[Callable[[], Tensor]]], **how: Any) -> None:
    for forwards in updates:
        opt.zero_grad()
        for forward in forwards:
            samon.two_pass(opt, forward, loss_scale=1 / len(forwards), **how)
        opt.step()


def assert_close(model: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    one, two = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, other))
    assert (one - two).norm() <= tolerance * two.norm()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["samon", "samon-elemlinf", "sam-layerl2", "samnn-fisher"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("net", NETS)
def test_training_equals_a_naive_loop(net: str, source: str, name: str, parts: int) -> None:
    model = make(NETS[net])
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    scope, _, geometry = name.partition("-")
    names = reference.scope_names(twin, scope)
    did = reference.ascent_training(twin, losses(twin, parts), names, geometry, RHO, source)
    opt = optimizer(model, f"{name}-momentum", ascent=source)
    train(opt, losses(model, parts))
    assert_close(model, twin)
    reference.ascent_training(start, losses(start, parts), names, geometry, 0.0, "batch")
    with pytest.raises(AssertionError):  # and is not the plain training
        assert_close(model, start, 1e-6)
    if source == "adaptive":
        assert {"sam", "plain"} == set(did)


@pytest.mark.parametrize("bn_stats", ["first", "second", "both"])
def test_the_only_pass_updates_running_statistics(bn_stats: str) -> None:
    """`previous` has a single pass: whichever of two would have counted, it is the one."""
    model = make(BatchNormNet)
    opt = optimizer(model, ascent="previous")
    for forwards in losses(model):  # the second update is at w + eps
        before = {name: b.clone() for name, b in model.named_buffers() if "running" in name}
        opt.zero_grad()
        samon.two_pass(opt, forwards[0], bn_stats=bn_stats)
        opt.step()
        assert not any(torch.equal(b, before[name]) for name, b in model.named_buffers() if name in before)


@pytest.mark.parametrize("source", ["batch", "friendly"])
def test_gsam_takes_off_the_orthogonal_part_of_the_clean_gradient(source: str) -> None:
    model = make()
    twin = copy.deepcopy(model)
    reference.ascent_training(twin, losses(twin, 2), reference.scope_names(twin, "sam"), "", RHO, source, 0.4)
    train(optimizer(model, "sam-momentum", ascent=source, gsam_alpha=0.4), losses(model, 2))
    assert_close(model, twin)


@pytest.mark.parametrize("source", SOURCES)
def test_a_closure_does_the_same(source: str) -> None:
    model = make()
    twin = copy.deepcopy(model)
    train(optimizer(twin, ascent=source), losses(twin))
    opt = optimizer(model, ascent=source)
    for [forward] in losses(model):

        def closure(forward: Callable[[], Tensor] = forward) -> Tensor:
            opt.zero_grad()
            loss = forward()
            loss.backward()
            return loss

        opt.step(closure)
    assert_close(model, twin)


@pytest.mark.parametrize("source", SOURCES)
def test_a_state_continues_bit_exactly(source: str) -> None:
    model = make()
    opt = optimizer(model, ascent=source)
    train(opt, losses(model)[:4])
    other = copy.deepcopy(model)
    fresh = optimizer(other, ascent=source)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, losses(model)[4:])
    train(fresh, losses(other)[4:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert source == "batch" or (fresh.ascent.updates, opt.ascent.updates) == (UPDATES, UPDATES)


def test_a_state_of_another_source_is_left_aside() -> None:
    model = make()
    opt = optimizer(model, ascent="previous")
    train(opt, losses(model)[:2])
    other = optimizer(copy.deepcopy(model), ascent="friendly")
    other.load_state_dict(opt.state_dict())
    assert (other.ascent.updates, other.ascent.state) == (0, {})


@pytest.mark.parametrize("source", [s for s in SOURCES if s != "batch"])
def test_two_pass_changes_the_source(source: str) -> None:
    model = make()
    twin = copy.deepcopy(model)
    train(optimizer(twin, ascent=source), losses(twin))
    train(optimizer(model), losses(model), ascent=source)
    assert_close(model, twin, 0.0)


@pytest.mark.parametrize("source", SOURCES)
def test_a_gradient_scaler_changes_nothing(source: str) -> None:
    """2^12 scales float64 exactly."""
    model = make()
    twin = copy.deepcopy(model)
    train(optimizer(twin, ascent=source), losses(twin, 2))
    opt, scaler = optimizer(model, ascent=source), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for forwards in losses(model, 2):
        opt.zero_grad()
        for forward in forwards:
            samon.two_pass(opt, forward, loss_scale=0.5, scaler=scaler)
        scaler.step(opt)
        scaler.update()
    assert_close(model, twin, 1e-14)


@pytest.mark.parametrize("source", ["friendly", "every:3"])
def test_a_skipped_update_leaves_no_trace(source: str) -> None:
    """The gradient at w of an update that is not applied does not count for the next one."""
    model = make()
    twin = copy.deepcopy(model)
    train(optimizer(twin, ascent=source), losses(twin))
    opt = optimizer(model, ascent=source)
    for [forward] in losses(model):
        samon.two_pass(opt, losses(model, updates=1)[0][0])  # and no step
        opt.zero_grad()
        samon.two_pass(opt, forward)
        opt.step()
        opt.zero_grad()
    assert_close(model, twin, 0.0)


def train_rank(rank: int) -> dict[str, list[Tensor]]:
    found = {}
    for source in SOURCES:
        model = make()
        ddp = DistributedDataParallel(model)
        opt = optimizer(model, ascent=source, gsam_alpha=0.3 if source == "batch" else 0.0)
        for t in range(UPDATES):
            x, y = (part.chunk(2)[rank] for part in batch(8, seed=10 + t))
            opt.zero_grad()
            samon.two_pass(opt, lambda: F.cross_entropy(ddp(x), y), no_sync=ddp.no_sync)  # noqa: B023
            opt.step()
        found[source] = [p.detach() for p in model.parameters()]
    return found


def test_two_processes_are_two_micro_batches() -> None:
    ranks = run_ranks(train_rank, 2)
    for source in SOURCES:
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][source], ranks[1][source], strict=True)), source
        twin = make()
        alpha = 0.3 if source == "batch" else 0.0
        names = reference.scope_names(twin, "samon")
        reference.ascent_training(twin, losses(twin, 2), names, "", RHO, source, alpha)
        for got, want in zip(ranks[0][source], twin.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10, msg=source)


@pytest.mark.parametrize(
    ("source", "bound"), [("batch", 1.67), ("friendly", 1.67), ("previous", 1.0), ("momentum", 1.0), ("every:3", 1.23)]
)
def test_cost_over_a_plain_step(source: str, bound: float) -> None:
    """FLOPs of three updates behind the first three, over those of three plain ones."""
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch32_224").train()
        x, y = torch.empty(8, 3, 224, 224), torch.empty(8, dtype=torch.long)
    opt = create_optimizer_v2(model, "samon-momentum", lr=0.1, ascent=source)

    def update() -> None:
        opt.zero_grad()
        samon.two_pass(opt, lambda: F.cross_entropy(model(x), y))
        opt.step()

    def count(function: Callable[[], None], times: int) -> int:
        with FlopCounterMode(display=False) as counter:
            for _ in range(times):
                function()
        return counter.get_total_flops()

    count(update, 3)
    ratio = count(update, 3) / (3 * count(lambda: F.cross_entropy(model(x), y).backward(), 1))
    assert bound - 0.02 < ratio <= bound + 0.005


@pytest.mark.parametrize("base", ["sgd", "momentum", "adamw", "lion"])
def test_momentum_is_the_base_optimizers_own(base: str) -> None:
    model = make()
    opt = create_optimizer_v2(model, "samon", base_opt=base, lr=1e-3, rho=RHO, ascent="momentum")
    train(opt, losses(model)[:2])
    named, key = opt.perturbed_parameters(), "momentum_buffer" if base in ("sgd", "momentum") else "exp_avg"
    found = opt.ascent.direction(named, None, opt.state)
    for p, direction in zip(named.values(), found, strict=True):
        assert torch.equal(direction, -opt.state[p][key])
    [forward] = losses(model)[2]
    direct = torch.autograd.grad(forward(), named.values())
    with opt.perturbed(found):
        expected = torch.autograd.grad(forward(), list(named.values()))
    assert not torch.equal(direct[0], expected[0])
    opt.zero_grad()
    samon.two_pass(opt, forward)
    for p, want in zip(named.values(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-12, atol=1e-14)


def test_a_running_sum_stands_in_where_the_base_keeps_no_momentum() -> None:
    model = make()
    opt = create_optimizer_v2(model, "samon", base_opt="rmsprop", lr=1e-3, rho=RHO, ascent="momentum", momentum=0.0)
    grads = []
    for [forward] in losses(model)[:3]:
        opt.zero_grad()
        samon.two_pass(opt, forward)
        grads.append([p.grad.clone() for p in opt.perturbed_parameters().values()])
        opt.step()
    assert base_momenta(opt.perturbed_parameters().values(), opt.state) is None
    for i, got in enumerate(opt.ascent.direction(opt.perturbed_parameters(), None, opt.state)):
        torch.testing.assert_close(got, -(0.81 * grads[0][i] + 0.9 * grads[1][i] + grads[2][i]), rtol=1e-12, atol=1e-14)


def test_adaptive_threshold_falls_over_the_training() -> None:
    """At mu + sigma it is a SAM step late in training and a plain one early on."""
    source = make_ascent("adaptive")
    source.moments = [torch.tensor(4.5), torch.tensor(4.0), torch.tensor(1.0)]
    source.total = 100
    assert not source.needs_ascent_pass()  # 4.5 < 4 + 1
    source.updates = 100
    assert source.needs_ascent_pass()  # 4.5 >= 4 - 1


def test_esam_perturbs_a_random_part_anew_each_update() -> None:
    model = make()
    opt = optimizer(model, esam_beta=0.5)
    plain = optimizer(copy.deepcopy(model))
    seen = []
    for [forward] in losses(model, updates=20):
        opt.zero_grad()
        with opt.sampled_parameters() as chosen:
            grads = torch.autograd.grad(forward(), list(chosen.values()), allow_unused=True)
            eps, _, _ = opt.perturbation(chosen, grads)
            expected = reference.perturbation(
                "",
                dict(chosen),
                {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(chosen.items(), grads, strict=True)},
                RHO,
            )
            for got, want in zip(eps, expected.values(), strict=True):
                torch.testing.assert_close(got, 2 * want, rtol=1e-12, atol=1e-14)
        seen.append(frozenset(chosen))
        samon.two_pass(opt, forward)
        assert opt.stats["eps_norm"].item() == pytest.approx(2 * RHO, rel=1e-9)
        opt.step()
    total = len(plain.perturbed_parameters())
    assert len(set(seen)) > 10
    assert 0.35 * total < sum(map(len, seen)) / len(seen) < 0.65 * total
    assert len(opt.perturbed_parameters()) == total


def test_esam_draws_go_on_after_a_restart() -> None:
    model = make()
    opt = optimizer(model, esam_beta=0.5)
    train(opt, losses(model)[:4])
    other = copy.deepcopy(model)
    fresh = optimizer(other, esam_beta=0.5)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, losses(model)[4:])
    train(fresh, losses(other)[4:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_orthogonal_part_by_hand() -> None:
    x, y = [torch.tensor([3.0, 1.0]), torch.tensor([2.0])], [torch.tensor([1.0, 0.0]), torch.tensor([0.0])]
    assert [part.tolist() for part in orthogonal_part(x, y)] == [[0.0, 1.0], [2.0]]
    assert [part.tolist() for part in orthogonal_part(x, [torch.zeros(2), torch.zeros(1)])] == [[3.0, 1.0], [2.0]]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"ascent": "often"}, "ascent must be one of batch, previous"),
        ({"ascent": "every:0"}, "ascent must be one of"),
        ({"ascent": "previous", "gsam_alpha": 0.1}, "gsam_alpha needs the gradient at w"),
        ({"esam_beta": 0.0}, "esam_beta must be in"),
        ({"esam_beta": 0.5, "ascent": "friendly"}, "esam_beta samples other tensors"),
    ],
)
def test_what_does_not_exist_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        optimizer(make(), **how)


@pytest.mark.parametrize("source", ["previous", "momentum"])
def test_sources_without_ascent_pass_refuse_its_options(source: str) -> None:
    model = make()
    opt = optimizer(model, ascent=source)
    [forward] = losses(model)[0]
    with pytest.raises(UserError, match="makes no ascent pass"):
        samon.two_pass(opt, forward, groups=2)
    with pytest.raises(UserError, match="makes no ascent pass"):
        samon.two_pass(opt, forward, ascent_forward=forward)
    with pytest.raises(UserError, match="makes no ascent pass"):
        samon.two_pass(opt, forward, reduce="global")
