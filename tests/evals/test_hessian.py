"""Curvature against the whole Hessian of a small network, and the plane of losses point by point."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from samon.cli.validate import main
from samon.errors import UserError
from samon.evals import hessian
from samon.evals.sharpness import select_parameters
from tests.eval_sets import FASHION
from tests.sets import RANDOM_MODEL


@pytest.fixture
def small():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 5)).double().eval()
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 5, (32,))
    return net, x, y


def like(parameters, flat):
    """The flat vector, cut as the parameters are."""
    return [v.view_as(p) for v, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]


def whole_hessian(net, x, y, parameters):
    """Every entry, by torch's own double differentiation of a flat vector."""
    names = [name for name, p in net.named_parameters() if any(p is q for q in parameters)]

    def loss(flat):
        return F.cross_entropy(
            torch.func.functional_call(net, dict(zip(names, like(parameters, flat), strict=True)), (x,)), y
        )

    return torch.autograd.functional.hessian(loss, parameters_to_vector(parameters).detach())


def test_attention_has_second_derivatives():
    """Of PyTorch's implementations of attention only one has them."""
    net = timm.create_model("vit_tiny_cifar", num_classes=5, depth=1, img_size=8).eval()
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    parameters = select_parameters(net, "norm")
    vector = [torch.ones_like(p) for p in parameters]
    product = hessian.hessian_product(net, [(x, y)], 2, parameters, lambda values: values, vector)
    assert all(p.isfinite().all() for p in product)


@pytest.mark.parametrize("scope", ["all", "norm"])
def test_eigenvalue_and_trace_are_the_whole_hessians(small, scope):
    net, x, y = small
    parameters = select_parameters(net, scope)
    exact = whole_hessian(net, x, y, parameters)
    halves = [(x[:20], y[:20]), (x[20:], y[20:])]
    product = partial(hessian.hessian_product, net, halves, 32, parameters, lambda values: values)
    generator = torch.Generator().manual_seed(0)
    start = hessian.random_signs(parameters, generator)
    values, flat = torch.linalg.eigvalsh(exact), parameters_to_vector(start)
    largest = values[values.abs().argmax()].item()
    assert torch.allclose(parameters_to_vector(product(start)), exact @ flat, atol=1e-12)
    assert hessian.top_eigenvalue(product, start, 500, 1e-9) == (pytest.approx(largest, rel=1e-4), True)
    quotient = float(flat @ exact @ flat) / len(exact)
    assert hessian.top_eigenvalue(product, start, 1) == (pytest.approx(quotient, rel=1e-9), False)
    units = [like(parameters, row) for row in torch.eye(len(exact), dtype=torch.float64)]
    assert hessian.trace(product, units) * len(exact) == pytest.approx(exact.trace().item(), rel=1e-9)
    draws = [hessian.random_signs(parameters, generator) for _ in range(3)]
    assert {v for d in draws for t in d for v in t.flatten().tolist()} == {-1.0, 1.0}


def test_plane_has_the_losses_of_moved_weights_and_restores_them(small):
    net, x, y = small
    parameters = list(net.parameters())
    before = parameters_to_vector(parameters).clone()
    generator = torch.Generator().manual_seed(1)
    axes = tuple(hessian.filter_normalized_direction(parameters, generator) for _ in range(2))
    assert axes[0][0].norm(dim=1).tolist() == pytest.approx(parameters[0].norm(dim=1).tolist())
    assert float(axes[0][2].norm()) == pytest.approx(parameters[2].detach().norm().item())
    at = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    plane = hessian.loss_plane(net, [(x, y)], 32, parameters, axes, at, lambda values: values)
    assert torch.equal(parameters_to_vector(parameters), before)
    with torch.no_grad():
        first, second = (parameters_to_vector(axis) for axis in axes)
        vector_to_parameters(before - first + 0.5 * second, parameters)
        assert plane[0, 2].item() == pytest.approx(F.cross_entropy(net(x), y).item(), rel=1e-12)


def test_program_gives_both_scopes_and_figures(tmp_path):
    flags = [*RANDOM_MODEL, *FASHION, "--evals", "hessian"]
    flags += ["--hessian-samples", "16", "--hessian-iters", "2", "--hessian-draws", "1"]
    figure = tmp_path / "figures" / "plane.pdf"
    with pytest.raises(UserError, match="--landscape-points: must be >= 2"):
        main([*flags, "--landscape-points", "1"])
    rows = main([*flags, "--landscape-figure", str(figure), "--landscape-points", "3"])
    assert [(row["metric"], row["scope"]) for row in rows] == [
        (metric, scope) for scope in ("all", "norm") for metric in ("hessian_top", "hessian_trace")
    ]
    assert {row["num_samples"] for row in rows} == {16}
    assert [row.get("note", "").partition(";")[0] for row in rows] == ["not converged in 2 iterations", ""] * 2
    assert len(list(figure.parent.iterdir())) == 2


@pytest.mark.parametrize("scale", [1.0, 1e6, float("nan")])
def test_landscapes_have_a_logarithmic_scale_with_plain_ticks(scale, tmp_path, monkeypatch):
    """Losses span orders of magnitude: on a linear scale the middle is one color."""
    from matplotlib import colors, figure

    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    at = torch.linspace(-1, 1, 5, dtype=torch.float64)
    plane = 2 + scale * (at[:, None] ** 2 + at[None] ** 2)
    hessian.plot_plane(plane, at, "20261125-214518-a-long-name-of-a-run/model_best.pth.tar: all", tmp_path / "a.png")
    drawn[0].draw_without_rendering()
    axis, bar = drawn[0].axes
    assert isinstance(axis.collections[0].norm, colors.LogNorm)
    shown = [float(tick.get_text().replace("\N{MINUS SIGN}", "-")) for tick in bar.get_yticklabels() if tick.get_text()]
    assert shown
    assert scale != scale or all(float(f"{value:.2g}") == value for value in shown), shown
    assert axis.title.get_window_extent().width <= axis.get_window_extent().width
