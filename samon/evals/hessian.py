"""Curvature of the training loss: largest Hessian eigenvalue and trace, and the loss along two directions.

Hessian-vector products by differentiating twice (Pearlmutter 1994); the eigenvalue by power iteration, the trace by
Hutchinson's estimator with signs, as in Yao et al. 2020, "PyHessian". Each along all parameters, or along the
normalization parameters alone: the block of the Hessian that perturbing them alone sees.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samon.errors import UserError
from samon.evals.entry import Entry, EvalImages, Target, batches, choose, evaluating, one_label, predict
from samon.evals.norm_params import new_figure
from samon.evals.results import Row
from samon.evals.sharpness import restored, scoped
from samon.files import name_write_errors
from samon.geometry import global_norm
from samon.progress import wrap_path

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # each call gives the same (images, label) again
Total = Callable[[Tensor], Tensor]  # sum over the processes
Vector = list[Tensor]  # one tensor a parameter
SCOPES = ("all", "norm")


def _unit(vector: Vector) -> Vector:
    return list(torch._foreach_div(vector, global_norm(vector)))


def product(model: nn.Module, batches: Batches, count: int, vector: Vector, parameters: Vector, total: Total) -> Vector:
    """H v of the mean cross-entropy over ``count`` images, in eval mode, of all processes."""
    result = [torch.zeros_like(v) for v in vector]
    for images, label in batches():
        loss = F.cross_entropy(predict(model, images), label, reduction="sum") / count
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        along = torch.stack([(g * v).sum() for g, v in zip(grads, vector, strict=True)]).sum()
        products = torch.autograd.grad(along, parameters, allow_unused=True, materialize_grads=True)
        torch._foreach_add_(result, list(products))
    return [total(r) for r in result]


def dot(x: Vector, y: Vector) -> float:
    """Inner product over all tensors, summed in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(x, y, strict=True))


def top_eigenvalue(product: Callable[[Vector], Vector], start: Vector, iters: int, tolerance: float = 1e-3) -> float:
    """The eigenvalue of largest magnitude: its Rayleigh quotient after at most ``iters`` power iterations.

    It ends where the quotient moves by less than ``tolerance`` of itself.
    """
    vector, value = _unit(start), float("nan")
    for _ in range(iters):
        moved = product(vector)
        before, value = value, dot(vector, moved)
        if global_norm(moved) == 0 or abs(value - before) <= tolerance * abs(value):
            break
        vector = _unit(moved)
    return value


def trace(product: Callable[[Vector], Vector], draws: Iterable[Vector]) -> float:
    """Mean of v^T H v over ``draws`` of signs (Hutchinson's estimator)."""
    values = [dot(v, product(v)) for v in draws]
    return sum(values) / len(values)


def signs(parameters: Sequence[Tensor], generator: torch.Generator) -> Vector:
    """+1 or -1 in every place, drawn on the CPU so that every process and device has the same."""
    return [(torch.randint(2, p.shape, generator=generator) * 2 - 1).to(p) for p in parameters]


def directions(parameters: Sequence[Tensor], generator: torch.Generator) -> Vector:
    """A normal direction whose filters have the norms of the weights' filters (Li et al. 2018, section 4).

    Vectors (biases, normalization) are taken whole, so that directions along them exist as well.
    """
    found = []
    for p in parameters:
        d = torch.randn(p.shape, generator=generator).to(p)
        rows = (d.flatten(1), p.detach().flatten(1)) if p.dim() > 1 else (d.view(1, -1), p.detach().view(1, -1))
        size = rows[1].norm(dim=1, keepdim=True) / rows[0].norm(dim=1, keepdim=True).clamp(min=1e-10)
        found.append((rows[0] * size).view_as(p))
    return found


@torch.no_grad()
def loss_plane(
    model: nn.Module, batches: Batches, count: int, parameters: Vector, axes: Sequence[Vector], at: Tensor, total: Total
) -> Tensor:
    """[n, n] mean loss at w + at[i] axes[0] + at[j] axes[1]; the weights are as they were afterwards."""
    found = torch.zeros(len(at), len(at), dtype=torch.float64)
    with restored(parameters) as weights:
        for (i, a), (j, b) in itertools.product(enumerate(at.tolist()), repeat=2):
            moved = torch._foreach_add(torch._foreach_add(weights, axes[0], alpha=a), axes[1], alpha=b)
            torch._foreach_copy_(parameters, moved)
            for images, label in batches():
                found[i, j] += F.cross_entropy(predict(model, images), label, reduction="sum").double().cpu() / count
    return total(found)


def plot(plane: Tensor, at: Tensor, title: str, path: Path) -> None:
    """Contours of the loss over the two directions, on a logarithmic color scale; the weights lie in the middle."""
    figure = new_figure(5.5, 4.5)
    from matplotlib import ticker

    finite = plane[plane.isfinite()]
    high = float(finite.max()) if len(finite) else 1.0
    low = max(float(finite.min()) if len(finite) else 1.0, 1e-6 * high, 1e-12)
    levels = torch.logspace(math.log10(0.999 * low), math.log10(1.001 * max(high, 1.01 * low)), 31)
    axis = figure.subplots()
    drawn = axis.contourf(at, at, plane.T, levels, norm="log")
    axis.plot(0, 0, "k+")
    axis.set(xlabel="first direction", ylabel="second direction", xticks=at[[0, len(at) // 2, -1]])
    axis.set_title(wrap_path(title, 50), fontsize="small")
    ticks = (
        ticker.MaxNLocator(6) if high < 10 * low else ticker.LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,))
    )
    figure.colorbar(drawn, label="loss", ticks=ticks, format="{x:.4g}").minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_write_errors(path):
        figure.savefig(path, dpi=120)


def prepare(target: Target, entry: Entry) -> tuple[EvalImages, nn.Module]:
    """(images, model); mistakes are found before any work."""
    images = entry.images(target, target.config.hessian_split)
    for scope in SCOPES:
        scoped(target.model, scope)
    return images, one_label("hessian", entry, images, target.model)


def rows(target: Target, entry: Entry) -> list[Row]:
    """Largest eigenvalue and trace along all and along the normalization parameters."""
    config, (images, net) = target.config, prepare(target, entry)
    chosen = choose(len(images), config.hessian_samples, config.seed)
    if len(chosen) < target.world:
        raise UserError("hessian: fewer images than processes; raise --hessian-samples")
    size = min(config.batch_size, -(-len(chosen) // target.world))
    mine = [(x, y) for _, _, x, y in batches(target, images, chosen, size)]
    found: list[Row] = []
    with evaluating(net, gradients=True):
        for scope in SCOPES:
            parameters, generator = scoped(net, scope), torch.Generator().manual_seed(config.seed)

            def hessian(vector: Vector, parameters: Vector = parameters) -> Vector:
                return product(net, lambda: mine, len(chosen), vector, parameters, target.total)

            values = {"hessian_top": top_eigenvalue(hessian, signs(parameters, generator), config.hessian_iters)}
            draws = (signs(parameters, generator) for _ in range(config.hessian_draws))
            values["hessian_trace"] = trace(hessian, draws)
            about = {"scope": scope, "split": config.hessian_split, "num_samples": len(chosen)}
            found += [{"metric": k, "value": v, "setting": f"{k} {scope}", **about} for k, v in values.items()]
            if config.landscape_figure:
                _landscape(target, net, mine, len(chosen), entry.name, scope)
    return found


def _landscape(target: Target, net: nn.Module, mine: Any, count: int, name: str, scope: str) -> None:
    config, parameters = target.config, scoped(net, scope)
    generator = torch.Generator().manual_seed(config.seed + 1)
    axes = directions(parameters, generator), directions(parameters, generator)
    at = torch.linspace(-1, 1, config.landscape_points, dtype=torch.float64)
    plane = loss_plane(net, lambda: mine, count, parameters, axes, at, target.total)
    if target.rank == 0:
        wanted = Path(config.landscape_figure)
        place = "-".join([wanted.stem, *f"{target.name}/{name}".split("/"), scope])
        plot(plane, at, f"{target.name}: {scope}", wanted.with_name(place + wanted.suffix))
