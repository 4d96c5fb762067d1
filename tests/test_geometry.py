"""Eq. 5, Table 9 and what rho measures against entry-by-entry formulas, and the ball's invariants.

Tolerance 1e-12: float64, sums of some hundred terms.
"""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from samon.geometry import GEOMETRIES, ascent_step, global_norm
from tests import reference
from tests.nets import LayerNormNet
from tests.runs import ROOT
from tests.steps import optimizer_of

NAMES = ("conv.weight", "bn.weight", "bn.bias")
IS_WEIGHT = [n.endswith("weight") for n in NAMES]
RHO = 0.7
RULES = ("ball", "raw", 0.25, "loss")


@pytest.fixture
def vectors() -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    shapes = [(4, 3, 2, 2), (4,), (4,)]
    return [torch.randn(s, dtype=torch.float64) for s in shapes], [torch.randn(s, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("radius", RULES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry_and_radius_equals_the_reference(geometry: str, radius: str | float, vectors) -> None:
    """Alone, and in groups, which are independent vectors."""
    weights, grads = vectors
    rows = [grads, [3 * g.flip(0) for g in grads], [g.square() for g in grads]]
    stacked, eta = [torch.stack(tensors) for tensors in zip(*rows, strict=True)], GEOMETRIES[geometry].eta
    grouped, norms = ascent_step(geometry, weights, stacked, RHO, eta, IS_WEIGHT, grouped=True, radius=radius)
    for i, row in enumerate(rows):
        eps, norm = ascent_step(geometry, weights, row, RHO, eta, IS_WEIGHT, radius=radius)
        named = [dict(zip(NAMES, tensors, strict=True)) for tensors in (weights, row)]
        expected = [*reference.perturbation(geometry, *named, RHO, radius).values()]
        torch.testing.assert_close(eps, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close([e[i] for e in grouped], expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(norms[i], norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("radius", RULES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_zero_gradients_and_zero_radius_do_not_move(geometry: str, radius: str | float, vectors) -> None:
    weights, grads = vectors
    for g, rho in (([torch.zeros_like(g) for g in grads], RHO), (grads, 0.0)):
        eps, _ = ascent_step(geometry, weights, g, rho, GEOMETRIES[geometry].eta, IS_WEIGHT, radius=radius)
        assert not any(e.any() for e in eps)


@pytest.mark.parametrize("radius", RULES)
@pytest.mark.parametrize("geometry", ["", "elemlinf"])
def test_a_tiny_gradient_moves_nothing_where_its_inverse_overflows(geometry: str, radius: str | float) -> None:
    """1e-42 in float32: the update is skipped as one with a non-finite gradient is."""
    opt = optimizer_of(LayerNormNet(), f"samon-{geometry}".strip("-"), radius=radius)
    named = opt.perturbed_parameters()
    eps, _, finite = opt.perturbation(named, [torch.full_like(p, 1e-42) for p in named.values()])
    assert all(e.isfinite().all() for e in eps)
    assert finite != (radius == "loss" and geometry == "elemlinf")  # the 2-norm underflows to zero before


@pytest.mark.parametrize("size", [1e-18, 1e18])  # their squares are still float32 numbers
def test_radius_does_not_depend_on_the_size_of_the_gradient(size: float) -> None:
    eps, _ = ascent_step("", [torch.ones(4)], [torch.full((4,), size)], 0.1)
    assert math.isclose(global_norm(eps).item(), 0.1, rel_tol=1e-5)


def test_projections_of_attention_are_weights() -> None:
    """In the original elementwise scaling, as by the authors' code: T = |w| + eta, and not 1."""
    opt = optimizer_of(nn.TransformerEncoderLayer(8, 2, 8, dtype=torch.float64), "sam-eleml2orig")
    named = opt.perturbed_parameters()
    eps, *_ = opt.perturbation(named, [torch.ones_like(p) for p in named.values()])
    scales = {name: e / eps[1][0] for name, e in zip(named, eps, strict=True)}  # the second is a bias
    for name, p in named.items():
        torch.testing.assert_close(scales[name], (p.abs() + 0.01).square() if "weight" in name else torch.ones_like(p))


def test_one_row_is_a_new_geometry_and_one_a_new_scope(tmp_path: Path) -> None:
    """Names, flags, steps and tables of sweeps: nothing else has to be said. A row each is written into a copy."""
    biases = 'lambda every, norms: {n: p for n, p in every.items() if n.endswith("bias")}'
    rows = {
        "geometry": ("GEOMETRIES: dict[str, Geometry] = {", '"linf": Geometry(math.inf, 0, "l inf", "", (0.25, 0.5)),'),
        "scope": ("SCOPES = {", f'"sambias": Scope("biases", "biases", {biases}),'),
    }
    shutil.copytree(ROOT / "samon", tmp_path / "samon")
    for file, (table, row) in rows.items():
        path = tmp_path / f"samon/{file}.py"
        text = path.read_text()
        assert text.count(table) == 1
        path.write_text(text.replace(table, table + row))
    code = """
import timm, torch, samon
from samon.cli.tables import scope_table
from samon.report.content import Score
from samon.trainer.config import parse
parse(["--data-dir", "data", "--opt", "sambias-linf-adamw"])
model = timm.create_model("test_vit", num_classes=3).double()
opt = timm.optim.create_optimizer_v2(model, "sambias-linf-adamw", lr=0.0)
biases = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
assert opt.perturbed_parameters().keys() == biases.keys() and opt.rho == 0.25 and not opt.can_group
x, y = torch.randn(4, 3, 160, 160, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
seen = {}
def forward():
    seen.update({n: p.detach() - biases[n] for n, p in model.named_parameters() if n in biases})
    return torch.nn.functional.cross_entropy(model(x), y)
samon.two_pass(opt, forward)
moved = torch.cat([d.flatten() for d in seen.values()]).abs()
assert ((moved - 0.25).abs() < 1e-12).float().mean() > 0.9, moved
scores = [Score(opt, rho, [y], opt) for opt, rho, y in (("sambias-linf-adamw", 0.25, 1.0), ("sam", 0.1, 2.0))]
print(scope_table(scores, {}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| variant | biases | all |" in done.stdout
    assert "| l inf (adamw) | 1.00 (rho 0.25) |  |" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("geometry", reference.GEOMETRIES)
def test_the_perturbation_is_the_best_point_of_the_sphere(geometry: str, dtype: torch.dtype) -> None:
    """||T^-1 eps||_p = rho, and the linearized loss rises by the most that is possible there: rho ||T g||_q. Of complex
    entries, T and the norms are those of the moduli."""
    torch.manual_seed(0)
    w, g = (torch.randn(7, dtype=dtype) for _ in range(2))
    row, eta, rho = GEOMETRIES[geometry], reference.ETA[geometry], 0.3
    (eps,), _ = ascent_step(geometry, [w], [g], rho, eta, [True])
    t = reference.scale(geometry, "weight", w.abs(), g.abs(), eta) if geometry != "layerl2" else w.norm().expand(7)
    dual = 1 if row.p == math.inf else 2
    rise = (eps.conj() * g).real.sum()
    torch.testing.assert_close(rise, rho * torch.linalg.vector_norm(t * g.abs(), dual))
    torch.testing.assert_close(torch.linalg.vector_norm(eps / t, row.p), torch.tensor(rho, dtype=torch.float64))
