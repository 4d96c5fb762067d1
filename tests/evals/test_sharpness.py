"""Weight-space sharpness against closed forms, brute force and a naive version of the public code."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samon.errors import UserError
from samon.evals.sharpness import (
    PRESETS,
    Measure,
    _choose_samples,
    average_case,
    batch_sharpness,
    normalize_logits,
    project,
    project_euclidean,
    select_parameters,
    worst_case,
)
from samon.geometry import global_norm
from tests.eval_sets import make_context

MODES = ["autopgd", "reference"]


def quadratic(curvature, minimum, weights):
    """loss_of for L(w) = 1/2 sum a (w - c)^2."""

    def loss_of(delta, want_grad):
        away = weights + delta[0] - minimum
        return (curvature * away.square()).sum() / 2, [curvature * away]

    return loss_of


@pytest.fixture
def convex():
    torch.manual_seed(0)
    curvature = torch.rand(20, dtype=torch.float64) + 0.5
    minimum, weights = torch.randn(2, 20, dtype=torch.float64)
    weights[3] = 0.0
    return curvature, minimum, weights


@pytest.mark.parametrize("mode", MODES)
def test_linf_maximum_of_a_quadratic_is_the_closed_form(convex, mode):
    """Over a box the maximum lies in the corner away from the minimum."""
    curvature, minimum, weights = convex
    rho, t = 0.1, weights.abs()
    away = weights - minimum
    exact = float((curvature * ((away.abs() + rho * t).square() - away.square())).sum() / 2)
    found = worst_case(quadratic(*convex), [t], Measure(rho), mode)
    assert found <= exact * (1 + 1e-9)
    assert found == pytest.approx(exact, rel=1e-4 if mode == "reference" else 1e-9)


def test_l2_adaptive_maximum_of_a_linear_loss_is_the_closed_form():
    """max g.eps over ||T^-1 eps|| <= rho is rho ||T g||, reached in one step."""
    torch.manual_seed(2)
    g, weights = torch.randn(2, 20, dtype=torch.float64)

    def loss_of(delta, _):
        return (g * delta[0]).sum(), [g]

    for steps in (1, 20):
        measure = Measure(0.2, norm="l2", steps=steps)
        found = worst_case(loss_of, [weights.abs()], measure, "autopgd")
        assert found == pytest.approx(0.2 * float((g * weights).norm()))
    # If T varies, gradient steps with Euclidean projections creep along the ellipsoid: close, and never above.
    found = worst_case(loss_of, [weights.abs()], Measure(0.2, norm="l2", steps=200), "reference")
    exact = 0.2 * float((g * weights).norm())
    assert 0.9 * exact < found <= exact * (1 + 1e-6)


def small_net():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 5)).double()
    with torch.no_grad():
        net[0].weight[0, 0] = 0.0
        net[2].running_var.fill_(2.0)
    return net, torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 5, (32,))


def naive_reference(net, x, y, measure):
    """The public code's search in the plainest form: one flat vector, no shared parts."""
    shapes = list(net.parameters())
    w = torch.nn.utils.parameters_to_vector(shapes).detach()
    t = w.abs() if measure.adaptive else torch.ones_like(w)
    rho = measure.rho

    def value(v, grad=False):
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(v, shapes)
        out = net(x)
        out = normalize_logits(out) if measure.logit_norm else out
        loss = F.cross_entropy(out, y)
        if not grad:
            return loss.item()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, shapes)])

    net.eval()
    start = best = value(w)
    checks, p = [0, math.ceil(0.22 * measure.steps)], [0, 0.22]
    while checks[-1] < measure.steps and checks[-1] != checks[-2]:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
        checks.append(math.ceil(p[-1] * measure.steps))
    delta, previous, at, best_at = torch.zeros_like(w), torch.zeros_like(w), w, w
    size = last_size = 2 * rho
    last_best, last_check, count = best, 0, 0
    for i in range(measure.steps):
        g = value(at, grad=True)
        if measure.norm == "linf":
            z = torch.max(torch.min(delta + size * t * g.sign(), rho * t), -rho * t)
        else:
            z = delta + size * t * g / (g.norm() + 1e-12)
            if measure.adaptive:
                z = project_euclidean([z], [t], rho)[0]
            elif z.norm() > rho:
                z = z * rho / z.norm()
        delta, previous = 0.75 * z + 0.25 * previous, delta
        at = w + delta
        loss = value(at)
        if loss > best:
            best, best_at, count = loss, at, count + 1
        if i in checks[1:]:
            few = count < 0.75 * (i - last_check)
            stuck = last_size == size and last_best == best
            last_size, last_best, last_check, count = size, best, i, 0
            if few or stuck:
                size, at = size / 2, best_at
    value(w)
    return best - start


@pytest.mark.parametrize(
    "text",
    [
        "worst-linf-adaptive-logitnorm@0.05,0.5",
        "worst-linf@0.02,0.3",
        "worst-l2@0.3,3",
        "worst-l2-adaptive@0.3,3",
        "worst-linf-adaptive-7step@0.2",
        "worst-linf-adaptive-1step@0.2",
    ],
)
def test_reference_mode_is_the_public_codes_search(text):
    net, x, y = small_net()
    for measure in Measure.parse(text):
        expected = naive_reference(net, x, y, measure)
        assert expected > 0
        assert batch_sharpness(net, x, y, measure, "reference") == pytest.approx(expected, rel=1e-9)


def test_euclidean_projection_is_the_nearest_point():
    torch.manual_seed(5)
    t, far = torch.rand(3, dtype=torch.float64) + 0.2, torch.randn(3, dtype=torch.float64) * 3
    near = project_euclidean([far], [t], 0.7)[0]
    assert float((near / t).norm()) == pytest.approx(0.7, rel=1e-5)
    sphere = torch.randn(200_000, 3, dtype=torch.float64)
    others = 0.7 * sphere / sphere.norm(dim=1, keepdim=True) * t
    assert (others - far).norm(dim=1).min() >= (near - far).norm() - 1e-9
    assert torch.equal(project_euclidean([near * 0.9], [t], 0.7)[0], near * 0.9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_zero_weights_stay_and_everything_is_restored(mode, norm):
    net, x, y = small_net()
    for p in net.parameters():
        p.data = torch.where(p.abs() < 0.1, 0.0, p.data)  # whole directions without extent
    net[2].bias.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    seen = []
    net.register_forward_pre_hook(lambda *_: seen.append(net[2].bias.detach().clone()))
    value = batch_sharpness(net.train(), x, y, Measure(0.3, norm=norm), mode)
    assert math.isfinite(value)
    assert value > 0
    assert all(torch.equal(bias, torch.zeros_like(bias)) for bias in seen)  # BatchNorm's biases are 0
    assert value == batch_sharpness(net, x, y, Measure(0.3, norm=norm), mode)  # deterministic
    assert net.training
    assert not net[2].bias.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_each_scope_moves_its_own_parameters():
    net, x, y = small_net()
    before, moved = [p.detach().clone() for p in net.parameters()], set()

    def watch(*_):
        moved.update(i for i, (p, q) in enumerate(zip(net.parameters(), before, strict=True)) if not torch.equal(p, q))

    net.register_forward_pre_hook(watch)
    values = {}
    for scope, indices in (("norm", {2, 3}), ("non-norm", {0, 1, 4, 5}), ("all", {0, 1, 2, 3, 4, 5})):
        moved.clear()
        values[scope] = batch_sharpness(net, x, y, Measure(0.05, adaptive=False), "autopgd", scope=scope)
        assert moved == indices
    assert min(values.values()) > 0
    assert max(values.values()) == values["all"]
    with pytest.raises(UserError, match="scope norm: the model has no such parameters"):
        select_parameters(nn.Linear(2, 2), "norm")


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_not_a_number_is_no_flat_minimum(mode):
    """No comparison with NaN is true, so that the best loss stays that of the weights themselves."""

    def loss_of(delta, _):
        return torch.tensor(math.nan if delta[0].any() else 1.0), [torch.ones(2)]

    assert math.isnan(worst_case(loss_of, [torch.ones(2)], Measure(0.1), mode))


def test_weights_are_restored_after_an_exception():
    net, x, y = small_net()
    before = [p.clone() for p in net.parameters()]
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("worker died")

    net.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="worker died"):
        batch_sharpness(net, x, y, Measure(0.3))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize(("norm", "moment"), [("l2", 1.0), ("linf", 1 / 3)])
def test_average_case_of_a_quadratic_is_its_expectation(convex, norm, moment):
    """E[1/2 sum a (rho T n)^2] = rho^2 / 2 sum a T^2 E[n^2]; the linear term has mean 0."""
    curvature, _, weights = convex
    loss_of = quadratic(curvature, weights, weights)  # at the minimum: no linear term
    measure = Measure(0.5, "average", norm, steps=4000)
    exact = 0.125 * moment * float((curvature * weights.square()).sum())
    assert average_case(loss_of, [weights.abs()], measure, seed=0) == pytest.approx(exact, rel=0.05)


def test_logit_normalization_by_hand():
    """Centered, then divided by their norm: (3, 4, 8) -> (-2, -1, 3) / sqrt(14)."""
    found = normalize_logits(torch.tensor([[3.0, 4.0, 8.0], [5.0, 5.0, 5.0]], dtype=torch.float64))
    assert torch.allclose(found[0], torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64) / 14**0.5, rtol=0, atol=1e-15)
    assert found[1].tolist() == [0, 0, 0]


def test_images_that_fill_no_batch_are_of_any_class():
    """Sets are sorted by class."""
    chosen = _choose_samples(make_context(None, sharpness_samples=1000), range(1000))
    assert len(set(chosen)) == 7 * 128
    assert max(chosen) > 950


def test_presets_are_the_papers_rows():
    rows = {name: [str(m) for text in texts for m in Measure.parse(text)] for name, texts in PRESETS.items()}
    assert {name: len(found) for name, found in rows.items() if "18" not in name} == {"table6": 6, "table19": 8}
    assert [text.rpartition("@")[2] for text in rows["table18-resnext"]] == ["0.001", "0.003", "0.005"]
    assert [text.rpartition("@")[2] for text in rows["table18-wrn28"]] == ["0.003", "0.005", "0.007"]
    assert "worst-linf-20step@1e-05" in rows["table19"]
    assert "worst-linf-adaptive-logitnorm-1step@0.03" in rows["table6"]


def test_short_form():
    text = "worst-l2-adaptive-logitnorm-1step@0.007,0.01"
    first, second = Measure.parse(text)
    assert second == Measure(0.01, "worst", "l2", adaptive=True, logit_norm=True, steps=1)
    assert str(first) == "worst-l2-adaptive-logitnorm-1step@0.007"
    assert Measure.parse("average-linf@0.2") == [Measure(0.2, "average", "linf", False, False, 20)]
    wrong = (
        "worst-linf worst-linf@0 worst-l2@nan worst-l2@inf worst-l2-0step@1 best-l2@1 worst-l2-adaptve@1 worst-l2@1,x"
    )
    for text in wrong.split():
        with pytest.raises(UserError, match="sharpness measure"):
            Measure.parse(text)


@pytest.mark.parametrize(("norm", "p"), [("l2", 2), ("linf", math.inf)])
def test_projection(norm, p):
    generator = torch.Generator().manual_seed(0)
    weights, deltas = ([torch.randn(n, generator=generator, dtype=torch.float64) for n in (7, 5)] for _ in range(2))
    t = [w.abs() for w in weights]
    t[1][0] = 0
    inside = project(deltas, t, 0.05, norm)
    scaled = [torch.where(a > 0, d / a, 0) for d, a in zip(inside, t, strict=True)]
    assert global_norm(scaled, p).item() <= 0.05 * (1 + 1e-12)
    assert inside[1][0] == 0
    for again, once in zip(project(inside, t, 0.05, norm), inside, strict=True):
        torch.testing.assert_close(again, once, rtol=1e-12, atol=0)
    for far, d, a in zip(project(deltas, t, 1e6, norm), deltas, t, strict=True):
        assert torch.equal(far, torch.where(a > 0, d, 0))
