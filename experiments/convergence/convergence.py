#!/usr/bin/env python3
"""Theorem C.5 checked: the mean squared gradient norm of SAM-ON on a smooth non-convex problem against its bound.

    python experiments/convergence/convergence.py --output output/convergence

For step size h <= 1/L the theorem says: mean over t < T of E||grad f(w_t)||^2
<= 2 (f(w_0) - f*) / (h T) + 2 L h M + L^2 rho^2 (1 + L h). Here f is the mean over i of phi(a_i . w - b_i) with
phi(u) = u^2 / (1 + u^2), b_i = a_i . w* and ||a_i|| = 1, so that everything in the bound is known: |phi''| <= 2 gives
L = 2, |phi'| <= 3 sqrt(3) / 8 gives M = 27/64, and f* = 0. Half of the coordinates are the gamma of a normalization
layer (Eq. 10), half are not (Eq. 11). Each update takes one random sample for both of its gradients; E is the mean over
seeds. Writes OUTPUT.json and OUTPUT.png.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import samon
from samon.cli.program import run_script
from samon.errors import UserError
from samon.evals.norm_params import new_figure
from samon.files import markdown_table, write_text

L, M, F_STAR = 2.0, 27 / 64, 0.0
SIZE, SAMPLES = 16, 64


class Problem(nn.Module):
    """f and its samples; w = (gamma, rest)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(SAMPLES + 3, SIZE, generator=generator, dtype=torch.float64)
        # A common part, so that the samples' gradients do not cancel and the bound is not far away.
        self.a = nn.functional.normalize(2 * draw[-3] + draw[:SAMPLES], dim=1)
        self.b = self.a @ draw[-1]
        self.norm = nn.LayerNorm(SIZE // 2, bias=False, dtype=torch.float64)
        self.rest = nn.Parameter(draw[-2, SIZE // 2 :].clone())
        with torch.no_grad():
            self.norm.weight.copy_(draw[-2, : SIZE // 2])

    def forward(self, samples: Tensor | slice) -> Tensor:
        """The mean of f over the samples, []."""
        u = self.a[samples] @ torch.cat([self.norm.weight, self.rest]) - self.b[samples]
        return (u.square() / (1 + u.square())).mean()

    def gradient_norm(self) -> float:
        """||grad f(w)||^2 over all samples."""
        grads = torch.autograd.grad(self(slice(None)), list(self.parameters()))
        return float(sum(g.square().sum() for g in grads))


@dataclass
class Point:
    """A cell of the table: what was measured, and the bound."""

    h: float
    rho: float
    updates: int
    measured: float
    bound: float


def bound(start: float, h: float, rho: float, updates: int) -> float:
    """The right-hand side of Theorem C.5 (Eq. 12) from f(w_0)."""
    return 2 * (start - F_STAR) / (h * updates) + 2 * L * h * M + L**2 * rho**2 * (1 + L * h)


def measure(h: float, rho: float, updates: list[int], seeds: int) -> list[Point]:
    """The mean of ||grad f(w_t)||^2 over t < T and seeds, for each T in `updates`.

    Raises:
        UserError: h > 1/L, for which the theorem says nothing.
    """
    if not 0 < h <= 1 / L:
        raise UserError(f"Theorem C.5 needs 0 < h <= 1/L = {1 / L}, got {h}")
    curves, starts = [], []
    for seed in range(seeds):
        problem = Problem(seed)
        starts.append(float(problem(slice(None)).detach()))
        opt = create_optimizer_v2(problem, "samon-momentum", lr=h, momentum=0.0, weight_decay=0.0, rho=rho)
        order = torch.randint(SAMPLES, (max(updates),), generator=torch.Generator().manual_seed(seed))
        norms = []
        for sample in order.split(1):
            norms.append(problem.gradient_norm())
            opt.zero_grad()
            samon.two_pass(opt, partial(problem, sample))
            opt.step()
        curves.append(norms)
    start = math.fsum(starts) / seeds
    means = [math.fsum(sum(norms[:count]) / count for norms in curves) / seeds for count in updates]
    return [Point(h, rho, count, mean, bound(start, h, rho, count)) for count, mean in zip(updates, means, strict=True)]


def draw(points: list[Point], path: Path) -> None:
    """Measured (points) and bound (lines) against T, one panel for each h. Points of one T stand side by side."""
    steps = sorted({p.h for p in points})
    figure = new_figure(3.2 * len(steps), 3.6)
    axes = figure.subplots(1, len(steps), sharey=True, squeeze=False)
    for axis, h in zip(axes[0], steps, strict=True):
        for i, rho in enumerate(sorted({p.rho for p in points})):
            row = [p for p in points if (p.h, p.rho) == (h, rho)]
            axis.loglog([p.updates for p in row], [p.bound for p in row], color=f"C{i}", label=f"bound, rho {rho:g}")
            at = [p.updates * 1.25 ** (i - 1) for p in row]
            axis.loglog(at, [p.measured for p in row], "os^Dv"[i % 5], color=f"C{i}", label=f"measured, rho {rho:g}")
        axis.set(title=f"h = {h:g}", xlabel="updates T")
    axes[0][0].set_ylabel("mean squared gradient norm")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def table(points: list[Point]) -> str:
    rows = [["h", "rho", "T", "measured", "bound", "measured / bound"]]
    for p in points:
        numbers = [f"{p.measured:.4f}", f"{p.bound:.4f}", f"{p.measured / p.bound:.3f}"]
        rows.append([f"{p.h:g}", f"{p.rho:g}", str(p.updates), *numbers])
    return markdown_table(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/convergence"))
    parser.add_argument("--h", type=float, nargs="+", default=[0.02, 0.1, 0.5])
    parser.add_argument("--rho", type=float, nargs="+", default=[0.01, 0.1, 0.5])
    parser.add_argument("--updates", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args(argv)
    points = [p for h in args.h for rho in args.rho for p in measure(h, rho, args.updates, args.seeds)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"L": L, "M": M, "f_star": F_STAR, "seeds": args.seeds, "points": [asdict(p) for p in points]}
    write_text(args.output.with_suffix(".json"), json.dumps(content, indent=1))
    draw(points, args.output.with_suffix(".png"))
    print(table(points))
    if any(p.measured > p.bound for p in points):
        raise RuntimeError("the bound of Theorem C.5 does not hold")


if __name__ == "__main__":
    run_script(main)
