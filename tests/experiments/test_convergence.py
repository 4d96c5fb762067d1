"""experiments/convergence: the constants of the problem are right, and Theorem C.5's bound holds."""

import json
from pathlib import Path

import pytest
import torch

from experiments.convergence import convergence
from samon.errors import UserError


def test_constants_bound_gradients_and_curvature_and_are_reached() -> None:
    """phi on a grid: phi' = 2u / (1 + u^2)^2 at most sqrt(M), |phi''| at most L; both nearly reached."""
    u = torch.linspace(-6, 6, 20001, dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad((u.square() / (1 + u.square())).sum(), u, create_graph=True)
    [curvature] = torch.autograd.grad(slope.sum(), u)
    assert 0.9999 < float(slope.detach().square().max()) / convergence.M <= 1
    assert 0.9999 < float(curvature.abs().max()) / convergence.L <= 1
    problem = convergence.Problem(0)
    torch.testing.assert_close(problem.a.norm(dim=1), torch.ones(convergence.SAMPLES, dtype=torch.float64))
    with torch.no_grad():  # at w*, which is the last draw, f is f* = 0
        best = torch.linalg.lstsq(problem.a, problem.b).solution
        problem.norm.weight.copy_(best[: convergence.SIZE // 2])
        problem.rest.copy_(best[convergence.SIZE // 2 :])
    assert float(problem(slice(None)).detach()) == pytest.approx(convergence.F_STAR, abs=1e-20)
    assert list(dict(problem.named_parameters())) == ["rest", "norm.weight"]


def test_bound_by_hand() -> None:
    """2 * 0.5 / (0.1 * 10) + 2 * 2 * 0.1 * 27/64 + 4 * 0.09 * 1.2 = 1 + 0.16875 + 0.432"""
    assert convergence.bound(0.5, 0.1, 0.3, 10) == pytest.approx(1.60075)


@pytest.mark.slow
def test_measured_stays_under_the_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--h", "0.1", "0.5", "--rho", "0.01", "0.5", "--updates", "10", "60", "--seeds", "2"]
    convergence.main([*arguments, "--output", str(tmp_path / "c")])
    points = json.loads((tmp_path / "c.json").read_text())["points"]
    assert len(points) == 8
    assert all(0 < p["measured"] <= p["bound"] for p in points)
    by = {(p["h"], p["rho"], p["updates"]): p["measured"] for p in points}
    assert by[0.5, 0.01, 60] < by[0.5, 0.01, 10]  # it goes down
    assert (tmp_path / "c.png").stat().st_size > 5000
    assert capsys.readouterr().out.count("\n") == 10


def test_steps_beyond_the_theorem_are_refused() -> None:
    with pytest.raises(UserError, match=r"needs 0 < h <= 1/L = 0\.5"):
        convergence.measure(0.6, 0.1, [1], 1)
