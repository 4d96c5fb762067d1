"""Every source of the ascent direction against a naive loop that trains for some updates. Tolerance 1e-9 relative:
float64 sums in another order, amplified over the updates."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import samon
from samon import UserError
from samon.engines.ascent import base_momenta, make_ascent, orthogonal_part
from tests import reference, steps
from tests.nets import NETS, BatchNormNet, LayerNormNet, batch
from tests.processes import run_ranks
from tests.steps import RHO, Forward, assert_same, closure_of, count_flops, losses_of, update

UPDATES = 7
SOURCES = ("batch", "previous", "msam", "fsam", "looksam:3", "aesam")
FORMER = {"momentum": "msam", "friendly": "fsam", "every:3": "looksam:3", "adaptive": "aesam"}


def make(net: Callable[[], nn.Module] = LayerNormNet, name: str = "samon-momentum", **kwargs: Any) -> Any:
    return steps.make(net, name, momentum=0.9, **kwargs)


def losses(model: nn.Module, parts: int = 1, updates: int = UPDATES) -> list[list[Forward]]:
    """For each update the losses of its micro-batches."""
    return [losses_of(model, *batch(8, seed=10 + t), parts) for t in range(updates)]


def train(opt: Any, updates: list[list[Forward]], **options: Any) -> None:
    for forwards in updates:
        update(opt, *forwards, **options)


def assert_close(model: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    one, two = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, other))
    assert (one - two).norm() <= tolerance * two.norm()


@pytest.mark.parametrize(("net", "parts"), [("batchnorm", 1), ("layernorm", 2)])
@pytest.mark.parametrize("name", ["samon", "samon-elemlinf", "sam-layerl2", "samnn-fisher"])
@pytest.mark.parametrize("source", SOURCES)
def test_training_equals_a_naive_loop(net: str, source: str, name: str, parts: int) -> None:
    model, opt = make(NETS[net], f"{name}-momentum", ascent=source)
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    scope, _, geometry = name.partition("-")
    names = reference.scope_names(twin, scope)
    ways = reference.ascent_training(twin, losses(twin, parts), names, geometry, RHO, source)
    train(opt, losses(model, parts))
    assert_close(model, twin)
    reference.ascent_training(start, losses(start, parts), names, geometry, 0.0, "batch")
    with pytest.raises(AssertionError):  # and is not the plain training
        assert_close(model, start, 1e-6)
    if source == "aesam":
        assert {"sam", "plain"} == set(ways)


@pytest.mark.parametrize("source", ["batch", "fsam"])
def test_gsam_subtracts_the_orthogonal_part_of_the_clean_gradient(source: str) -> None:
    model, opt = make(name="sam-momentum", ascent=source, gsam_alpha=0.4)
    twin = copy.deepcopy(model)
    reference.ascent_training(twin, losses(twin, 2), reference.scope_names(twin, "sam"), "", RHO, source, 0.4)
    train(opt, losses(model, 2))
    assert_close(model, twin)


@pytest.mark.parametrize("source", SOURCES)
def test_other_ways_to_the_same_training(source: str) -> None:
    """A closure, which corrects gradients for clipping, and a gradient scaler (2^12 scales float64 exactly)."""
    options = {"ascent": source, "gsam_alpha": 0.4 if source == "batch" else 0.0}
    (model, opt), (closed, by_closure), (scaled, with_scaler) = (make(**options) for _ in range(3))
    train(opt, losses(model))
    for [forward] in losses(closed):
        run = closure_of(by_closure, forward)
        by_closure.step(lambda run=run: (run(), by_closure.correct_gradients())[0])
    assert_close(closed, model)
    torch.testing.assert_close(by_closure.ascent.moments, opt.ascent.moments)
    train(with_scaler, losses(scaled), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12))
    assert_close(scaled, model, 1e-14)


@pytest.mark.parametrize("name", [*SOURCES, *FORMER])
def test_a_state_continues_bit_exactly(name: str) -> None:
    """Also one that was saved under a former name of its source."""
    (model, opt), (other, fresh) = make(ascent=FORMER.get(name, name)), make(ascent=name)
    assert (type(fresh.ascent), vars(fresh.ascent)) == (type(opt.ascent), vars(opt.ascent))
    train(opt, losses(model)[:4])
    state = copy.deepcopy(opt.state_dict())
    if name in FORMER:
        state["ascent"]["source"] = name
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(state)
    train(opt, losses(model)[4:])
    train(fresh, losses(other)[4:])
    assert_same(other, model)
    assert name == "batch" or fresh.ascent.updates == opt.ascent.updates == UPDATES


def test_the_state_of_another_source_is_ignored() -> None:
    model, opt = make(ascent="previous")
    train(opt, losses(model)[:2])
    _, other = make(ascent="fsam")
    other.load_state_dict(opt.state_dict())
    assert (other.ascent.updates, other.ascent.state) == (0, {})


@pytest.mark.parametrize("bn_stats", ["first", "second", "both"])
def test_the_only_pass_updates_running_statistics(bn_stats: str) -> None:
    """`previous` makes a single pass, which counts whatever `bn_stats` says."""
    model, opt = make(BatchNormNet, ascent="previous")
    for forwards in losses(model):  # from the second update on at w + eps
        before = {name: b.clone() for name, b in model.named_buffers() if "running" in name}
        train(opt, [forwards], bn_stats=bn_stats)
        assert not any(torch.equal(b, before[name]) for name, b in model.named_buffers() if name in before)


def rank_training(rank: int) -> dict[str, list[Tensor]]:
    results = {}
    for source in SOURCES:
        model, opt = make(ascent=source, gsam_alpha=0.3 if source == "batch" else 0.0)
        ddp = DistributedDataParallel(model)
        for t in range(UPDATES):
            x, y = (part.chunk(2)[rank] for part in batch(8, seed=10 + t))
            update(opt, steps.loss_of(ddp, x, y), no_sync=ddp.no_sync)
        results[source] = [p.detach() for p in model.parameters()]
    return results


def test_two_processes_are_two_micro_batches() -> None:
    ranks = run_ranks(rank_training, 2)
    for source in SOURCES:
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][source], ranks[1][source], strict=True)), source
        twin, _ = make()
        names, alpha = reference.scope_names(twin, "samon"), 0.3 if source == "batch" else 0.0
        reference.ascent_training(twin, losses(twin, 2), names, "", RHO, source, alpha)
        for got, want in zip(ranks[0][source], twin.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10, msg=source)


@pytest.mark.parametrize(("source", "bound"), [("fsam", 1.67), ("previous", 1.0), ("msam", 1.0), ("looksam:3", 1.23)])
def test_cost_over_a_plain_step(source: str, bound: float) -> None:
    """FLOPs of three updates after the first, over those of three plain ones."""
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch32_224", depth=3).train()
        [forward] = losses_of(model, torch.empty(8, 3, 224, 224), torch.empty(8, dtype=torch.long), 1)
    opt = steps.optimizer_of(model, "samon-momentum", ascent=source)
    update(opt, forward)
    plain = count_flops(lambda: forward().backward())
    ratio = count_flops(lambda: update(opt, forward), 3) / plain / 3
    assert bound - 0.02 < ratio <= bound + 0.005


@pytest.mark.parametrize("base", ["sgd", "momentum", "adamw", "lion"])
def test_msam_takes_the_momentum_of_the_base_optimizer(base: str) -> None:
    model, opt = make(name="samon", base_opt=base, lr=1e-3, ascent="msam")
    train(opt, losses(model)[:2])
    named, key = opt.perturbed_parameters(), "momentum_buffer" if base in ("sgd", "momentum") else "exp_avg"
    direction = opt.ascent.direction(named, None, opt.state)
    assert all(torch.equal(d, -opt.state[p][key]) for d, p in zip(direction, named.values(), strict=True))
    [forward] = losses(model)[2]
    with opt.perturbed(direction):
        expected = torch.autograd.grad(forward(), list(named.values()))
    opt.zero_grad()
    samon.two_pass(opt, forward)
    for p, want in zip(named.values(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-12, atol=1e-14)


def test_msam_sums_gradients_itself_for_a_base_without_momentum() -> None:
    model, opt = steps.make(base_opt="rmsprop", lr=1e-3, ascent="msam", momentum=0.0)
    grads = []
    for [forward] in losses(model)[:3]:
        update(opt, forward)
        grads.append([p.grad.clone() for p in opt.perturbed_parameters().values()])
    assert base_momenta(opt.perturbed_parameters().values(), opt.state) is None
    for i, got in enumerate(opt.ascent.direction(opt.perturbed_parameters(), None, opt.state)):
        torch.testing.assert_close(got, -(0.81 * grads[0][i] + 0.9 * grads[1][i] + grads[2][i]), rtol=1e-12, atol=1e-14)


def test_the_threshold_of_aesam_falls_over_the_training() -> None:
    """At mu + sigma it is a SAM step late in training and a plain one early on."""
    source = make_ascent("aesam")
    source.moments = [torch.tensor(4.5), torch.tensor(4.0), torch.tensor(1.0)]
    source.total = 100
    assert not source.needs_ascent_pass()  # 4.5 < 4 + 1
    source.updates = 100
    assert source.needs_ascent_pass()  # 4.5 >= 4 - 1


def test_esam_perturbs_another_random_subset_at_each_update() -> None:
    model, opt = make(esam_beta=0.5)
    samples = []
    for [forward] in losses(model, updates=20):
        opt.zero_grad()
        with opt.sampled_parameters() as sample:
            options = {"allow_unused": True, "materialize_grads": True}
            grads = torch.autograd.grad(forward(), list(sample.values()), **options)
            eps, _, _ = opt.perturbation(sample, grads)
            expected = reference.perturbation("", dict(sample), dict(zip(sample, grads, strict=True)), RHO)
        for got, want in zip(eps, expected.values(), strict=True):
            torch.testing.assert_close(got, 2 * want, rtol=1e-12, atol=1e-14)
        samples.append(frozenset(sample))
        samon.two_pass(opt, forward)
        assert opt.stats["eps_norm"].item() == pytest.approx(2 * RHO, rel=1e-9)
        opt.step()
        before = steps.values(model)
        with opt.perturbed({n: torch.ones_like(p) for n, p in opt.perturbed_parameters().items()}):
            changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert len(changed) < len(opt.perturbed_parameters())
    assert len(set(samples)) > 10
    assert 0.35 < sum(map(len, samples)) / len(samples) / len(opt.perturbed_parameters()) < 0.65


def test_orthogonal_part_by_hand() -> None:
    x, y = [torch.tensor([3.0, 1.0]), torch.tensor([2.0])], [torch.tensor([1.0, 0.0]), torch.tensor([0.0])]
    assert [part.tolist() for part in orthogonal_part(x, y)] == [[0.0, 1.0], [2.0]]
    assert [part.tolist() for part in orthogonal_part(x, [torch.zeros(2), torch.zeros(1)])] == [[3.0, 1.0], [2.0]]


NO_PASS = "makes no ascent pass"


@pytest.mark.parametrize(
    ("kwargs", "options", "message"),
    [
        ({"ascent": "often"}, {}, "ascent must be one of batch, previous"),
        ({"ascent": "looksam:0"}, {}, "ascent must be one of"),
        ({"ascent": "previous", "gsam_alpha": 0.1}, {}, "gsam_alpha needs the gradient at w"),
        ({"esam_beta": 0.0}, {}, "esam_beta must be in"),
        ({"esam_beta": 0.5, "ascent": "fsam"}, {}, "esam_beta samples other tensors"),
        ({"esam_beta": 0.5, "name": "ssam-f"}, {}, "esam_beta samples other tensors"),
        ({"ascent": "previous"}, {"groups": 2}, NO_PASS),
        ({"ascent": "previous"}, {"reduce": "global"}, NO_PASS),
        ({"ascent": "msam"}, {"ascent_forward": torch.ones}, NO_PASS),
    ],
)
def test_what_a_source_refuses(kwargs: dict[str, Any], options: dict[str, Any], message: str) -> None:
    def step() -> None:
        model, opt = make(**kwargs)
        samon.two_pass(opt, losses(model)[0][0], **options)

    with pytest.raises(UserError, match=message):
        step()
