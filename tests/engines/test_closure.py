"""`step(closure)`, however the closure treats gradients, and `first_step` and `second_step`: the gradient of the naive
float64 loop, or refused.

Tolerance 1e-9 relative: float64 sums in another order."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import samon
from samon import UserError
from samon.scope import select
from tests import reference, steps
from tests.nets import NETS, BatchNormNet, LayerNormNet, batch
from tests.steps import RHO, assert_same, assert_unchanged, closure_of, optimizer_of, same, two_steps, update, values

UNCLEARED = r"earlier gradients were not cleared.*optimizer\.zero_grad\(\).*two_pass\(\.\.\., loss_scale=1/K\)"
NO_GRADIENT = "the loss depends on no parameter that samon perturbs.*runs backward"
SOURCES = ("batch", "previous", "msam", "fsam", "looksam:2", "aesam")


def make(name: str = "samon", net: Callable[[], nn.Module] = LayerNormNet, **kwargs: Any) -> tuple[nn.Module, Any]:
    return steps.make(net, name, **({"base_opt": "momentum", "momentum": 0.0} | kwargs))


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    return steps.loss_of(model, *batch(seed=step))()


def backward(model: nn.Module, step: int = 0, **how: Any) -> None:
    loss_of(model, step).backward(**how)


def assert_gradient_at_w_plus_eps(model: nn.Module, start: nn.Module, name: str, losses: list[int]) -> None:
    """`.grad` is the naive loop's, of the mean over these batches, for weights as in `start`."""
    scope, _, geometry = name.partition("-")
    forwards = [lambda step=step: loss_of(start, step) for step in losses]
    _, expected = reference.sam_gradient(start, forwards, reference.scope_names(start, scope), geometry, RHO)
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[n], rtol=1e-9, atol=1e-12, msg=n)
        else:
            assert p.grad is None
            assert torch.equal(p, start.get_parameter(n))


CLEARING: dict[str, Callable[[nn.Module, Any], None]] = {
    "optimizer": lambda model, opt: opt.zero_grad(),
    "optimizer in place": lambda model, opt: opt.zero_grad(set_to_none=False),
    "model in place": lambda model, opt: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("where", ["in the closure", "before step"])
@pytest.mark.parametrize("way", CLEARING)
@pytest.mark.parametrize("name", ["sam", "samon-fisher", "samnn-layerl2"])
def test_gradients_are_cleared_in_any_way_and_anywhere(name: str, way: str, where: str) -> None:
    model, opt = make(name)
    for step in range(3):  # the first without gradients on entry
        start = copy.deepcopy(model)

        def closure(step: int = step) -> Tensor:
            if where == "in the closure":
                CLEARING[way](model, opt)
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if where == "before step":
            CLEARING[way](model, opt)
        loss = opt.step(closure)
        assert_gradient_at_w_plus_eps(model, start, name, [step])
        assert loss.item() == pytest.approx(loss_of(start, step).item(), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("create_graph", [False, True])
def test_micro_batches_inside_the_closure(create_graph: bool) -> None:
    """One perturbation for all; `create_graph` makes autograd replace `.grad` where else it adds in place. A gradient
    that is taken before the gradients are cleared, without being accumulated, is none of the closure's business."""
    model, opt = make()
    for _ in range(2):
        start = copy.deepcopy(model)

        def closure() -> None:
            torch.autograd.grad(loss_of(model), list(model.parameters()))
            opt.zero_grad()
            for step in (1, 2):
                (loss_of(model, step) / 2).backward(create_graph=create_graph)

        opt.step(closure)
        assert_gradient_at_w_plus_eps(model, start, "samon", [1, 2])
        for p in model.parameters():
            p.grad = p.grad.detach()


@pytest.mark.parametrize("net", NETS)
def test_frozen_parameters_are_perturbed_and_not_updated(net: str) -> None:
    start, _ = steps.make(NETS[net])
    model = copy.deepcopy(start)
    model.requires_grad_(False).head.requires_grad_(True)
    opt = optimizer_of(model, perturb_frozen=True)
    opt.step(closure_of(opt, lambda: loss_of(model)))
    assert_gradient_at_w_plus_eps(model, start, "samon", [0])


def test_gradients_that_are_written_by_hand_count() -> None:
    model, opt = make()
    for _ in range(2):
        start = copy.deepcopy(model)

        def closure() -> None:
            for p, grad in zip(
                model.parameters(), torch.autograd.grad(loss_of(model), list(model.parameters())), strict=True
            ):
                p.grad = grad

        opt.step(closure)
        assert_gradient_at_w_plus_eps(model, start, "samon", [0])


def clear_head(model: nn.Module) -> None:
    model.head.zero_grad()
    backward(model)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("closure", "text"),
    [
        (backward, UNCLEARED),  # davda54's README, and a trainer that accumulates
        (lambda model: backward(model, create_graph=True), UNCLEARED),
        (lambda model: [backward(model, step) for step in range(2)], UNCLEARED),
        (clear_head, UNCLEARED),
        (lambda model: None, UNCLEARED),
        (lambda model: model.zero_grad(), NO_GRADIENT),
        (lambda model: model.zero_grad(set_to_none=False), NO_GRADIENT),
        (lambda model: (backward(model), model.zero_grad()), UNCLEARED),
    ],
)
def test_gradients_that_are_not_this_closures_alone_are_refused(closure: Any, text: str, source: str) -> None:
    model, opt = make(ascent=source)
    before = values(model)
    backward(model)
    with pytest.raises(UserError, match=text):
        opt.step(lambda: closure(model))
    assert_unchanged(model, before)


def test_a_closure_that_leaves_no_gradient_is_refused() -> None:
    model, opt = make()
    for closure in (lambda: loss_of(model), lambda: (backward(model), opt.zero_grad())):
        with pytest.raises(UserError, match=NO_GRADIENT):
            opt.step(closure)


@pytest.mark.parametrize("source", ["batch", "previous"])
@pytest.mark.parametrize("how", ["closure", "two_pass"])
def test_parameters_replaced_after_creation_are_refused(how: str, source: str) -> None:
    model, opt = make(ascent=source)
    for norm in model.norms:
        norm.weight, norm.bias = (nn.Parameter(p.detach().clone()) for p in (norm.weight, norm.bias))
    with pytest.raises(UserError, match=r"no parameter that samon perturbs.*create the optimizer after"):
        opt.step(lambda: backward(model)) if how == "closure" else samon.two_pass(opt, lambda: loss_of(model))


@pytest.mark.parametrize("gsam_alpha", [0.0, 0.4])
@pytest.mark.parametrize("source", SOURCES)
def test_after_two_pass_a_closure_without_gradients_changes_nothing(source: str, gsam_alpha: float) -> None:
    """Lightning's manual optimization passes one that does nothing, Lightning's precision plugins one that clips."""
    if gsam_alpha and source not in ("batch", "fsam"):
        pytest.skip("gsam_alpha needs an ascent pass at every update")
    model, opt = make(net=BatchNormNet, base_opt="adamw", ascent=source, gsam_alpha=gsam_alpha)
    twin, other = make(net=BatchNormNet, base_opt="adamw", ascent=source, gsam_alpha=gsam_alpha)
    for step in range(5):
        calls: list[int] = []
        for one, optimizer in ((model, opt), (twin, other)):
            optimizer.zero_grad()
            samon.two_pass(optimizer, lambda one=one, step=step: loss_of(one, step))
        stats = dict(opt.stats)
        assert opt.step(lambda calls=calls: calls.append(1) or "result") == "result"
        other.step()
        assert calls == [1]
        assert opt.stats == stats
        assert opt.ascent.updates == other.ascent.updates
    assert_same(model, twin)


def test_a_closure_that_adds_to_what_two_pass_has_left_is_refused() -> None:
    model, opt = make()
    samon.two_pass(opt, lambda: loss_of(model))
    with pytest.raises(UserError, match=UNCLEARED):
        opt.step(lambda: backward(model))


@pytest.mark.parametrize("source", SOURCES)
def test_a_skipped_two_pass_leaves_nothing_behind(source: str) -> None:
    """An update that was skipped, or a perturbation for a look at the loss, before a closure of the usual kind."""
    net = LayerNormNet if source in ("previous", "msam") else BatchNormNet
    model, opt = make(net=net, ascent=source, momentum=0.9)
    twin, other = make(net=net, ascent=source, momentum=0.9)
    for step in range(5):
        state = copy.deepcopy(model.state_dict())
        samon.two_pass(opt, lambda: loss_of(model, 9))
        opt.zero_grad()
        with opt.perturbed([torch.ones_like(p) for p in opt.perturbed_parameters().values()]):
            loss_of(model)
        model.load_state_dict(state)  # running statistics
        for one, optimizer in ((model, opt), (twin, other)):
            optimizer.step(lambda one=one, o=optimizer, step=step: (o.zero_grad(), backward(one, step)))
    assert_same(model, twin, 1e-12)
    assert opt.ascent.updates == other.ascent.updates


@pytest.mark.parametrize("cleared", [True, False])
def test_a_plain_step_with_a_trainers_empty_closure(cleared: bool) -> None:
    """A plain step on purpose in a trainer that always passes a closure."""
    model, opt = make()
    backward(model)
    start, grads = copy.deepcopy(model), [p.grad.clone() for p in model.parameters()]
    opt.expect_plain_step()
    opt.step(lambda: None)
    for p, q, grad in zip(model.parameters(), start.parameters(), grads, strict=True):
        torch.testing.assert_close(p, q - 0.1 * grad)
    with pytest.raises(UserError, match=NO_GRADIENT if cleared else UNCLEARED):  # this step alone
        opt.step(lambda: opt.zero_grad() if cleared else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sam", "samon"])
@pytest.mark.parametrize("how", ["closure", "perturbed", "two_pass", "previous"])
def test_autocast_around_the_step_is_autocast_inside(name: str, how: str, dtype: torch.dtype) -> None:
    """Its cached half-precision copies are of the weights as they were when they were cast."""
    models = []
    for outside in (True, False):
        model, _ = steps.make()
        model.float()
        opt = optimizer_of(model, name, rho=2.0, ascent="previous" if how == "previous" else "batch")
        x, y = batch()
        autocast = partial(torch.autocast, "cpu", dtype)
        around, inside = (autocast, nullcontext) if outside else (nullcontext, autocast)

        def loss(model: nn.Module = model, inside: Any = inside) -> Tensor:
            with inside():
                return torch.nn.functional.cross_entropy(model(x.float()).float(), y)  # noqa: B023

        closure = closure_of(opt, loss)
        with around():
            for _ in range(2):
                if how == "two_pass":
                    update(opt, loss)
                elif how == "perturbed":
                    closure()
                    with opt.perturbed([p.grad for p in opt.perturbed_parameters().values()]):
                        closure()
                    opt.step()
                else:
                    opt.step(closure)
        models.append(model)
    assert_same(*models)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_nothing_is_read_on_the_host_if_the_closure_clears(set_to_none: bool) -> None:
    """On fake tensors any read raises."""
    with FakeTensorMode():
        model = LayerNormNet()
        opt = optimizer_of(model)
        forward = steps.loss_of(model, torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))
        for _ in range(2):
            opt.step(lambda: (opt.zero_grad(set_to_none), forward().backward()))
        with pytest.raises(Exception, match="_local_scalar_dense"):
            opt.step(lambda: forward().backward())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("sam", {}),
        ("samon-layerl2-adamw", {}),
        ("samnn-elemlinf", {}),
        ("sam-random", {}),
        ("samon", {"ascent": "looksam:2"}),
        ("samon", {"gsam_alpha": 0.3}),
        ("samon", {"esam_beta": 0.5}),
        ("samon", {"radius": "raw"}),
    ],
)
def test_first_and_second_step_equal_the_closure(net: str, name: str, how: dict[str, Any]) -> None:
    ends = []
    for by_hand in (True, False):
        model, opt = steps.make(NETS[net], name, **how)
        for seed in range(3):
            torch.manual_seed(seed)
            forward = steps.loss_of(model, *batch())
            if by_hand:
                two_steps(opt, forward)
            else:
                opt.step(closure_of(opt, forward))
                opt.zero_grad()
        ends.append((dict(model.state_dict()), opt.state_dict()))
    assert same(*ends)


def test_first_and_second_step_in_another_order_are_refused_and_the_weights_come_back() -> None:
    model, opt = steps.make(BatchNormNet)
    with pytest.raises(UserError, match=r"second_step\(\) needs first_step"):
        opt.second_step()
    with pytest.raises(UserError, match="depends on no parameter"):
        opt.first_step()
    backward(model)
    before = values(model)
    opt.first_step()
    for call in (opt.first_step, opt.step, lambda: samon.two_pass(opt, lambda: loss_of(model))):
        with pytest.raises(UserError, match="call second_step"):
            call()
    backward(model)  # adds to the gradients at w
    with pytest.raises(UserError, match="not cleared"):
        opt.second_step()
    opt.first_step(zero_grad=True)
    with pytest.raises(UserError, match="run a backward pass between first_step"):
        opt.second_step()
    assert_unchanged(model, before)
    two_steps(opt, lambda: loss_of(model))  # usable again
    backward(model)
    with pytest.raises(UserError, match="makes a single pass"):
        optimizer_of(model, ascent="previous").first_step()
    model.requires_grad_(False).head.requires_grad_(True)
    with pytest.raises(UserError, match="no gradients of frozen parameters"):
        optimizer_of(model, perturb_frozen=True).first_step()


@pytest.mark.parametrize("cleared_to", [None, 0.0, 2.0])
@pytest.mark.parametrize("created_from", ["model", "backbone", "parameters"])
def test_gradients_of_another_optimizer_are_those_at_w_plus_eps(created_from: str, cleared_to: float | None) -> None:
    """The closure clears the gradients of one optimizer only. Those of the head are not its own; 2.0 is accumulated."""
    torch.manual_seed(0)
    backbone, head = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)).double(), nn.Linear(6, 5).double()
    norm, x, y = list(backbone[1].parameters()), torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 5
    if created_from == "parameters":
        opt = optimizer_of(norm, "sam")  # type: ignore[arg-type]
    else:
        model = backbone if created_from == "backbone" else nn.Sequential(backbone, head)
        opt = samon.SAM(torch.optim.SGD(norm, lr=0.0), select(model, "samon"), rho=RHO)

    def forward() -> Tensor:
        return F.cross_entropy(head(backbone(x)), y)

    for _ in range(2):
        with opt.perturbed(torch.autograd.grad(forward(), norm)):
            expected = torch.autograd.grad(forward(), list(head.parameters()))
        for p in head.parameters():
            p.grad = None if cleared_to is None else torch.full_like(p, cleared_to)
        opt.step(closure_of(opt, forward))
        for p, h in zip(head.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, h + (cleared_to or 0), rtol=1e-12, atol=1e-14)
        opt.zero_grad()
