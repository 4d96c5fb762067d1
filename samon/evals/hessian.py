"""Curvature of the training loss: largest Hessian eigenvalue and trace, and the loss along two directions.

Hessian-vector products by differentiating twice (Pearlmutter 1994), the eigenvalue by power iteration, the trace by
Hutchinson's estimator, as in Yao et al. 2020, "PyHessian". Each along all parameters and along the normalization
parameters alone, the block of the Hessian that matters when only these are perturbed.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from samon.evals.context import EvalContext, EvalDataset, choose_samples, evaluating, load_batches, predict
from samon.evals.norm_params import new_figure
from samon.evals.results import Result, file_stem
from samon.evals.sharpness import select_parameters, weights_restored
from samon.files import name_write_errors
from samon.geometry import global_norm
from samon.progress import wrap_path

Vector = list[Tensor]  # one tensor per parameter
Batches = Sequence[tuple[Tensor, Tensor]]  # (images, labels) of this process
AllReduce = Callable[[Tensor], Tensor]
SCOPES = ("all", "norm")


def check(context: EvalContext, dataset: EvalDataset) -> None:
    """Check that the model has parameters of each scope."""
    for scope in SCOPES:
        select_parameters(context.model, scope)


def evaluate(context: EvalContext, dataset: EvalDataset) -> list[Result]:
    """Largest eigenvalue and trace along all and along the normalization parameters."""
    config, model = context.config, context.model
    samples = choose_samples(len(dataset), config.hessian_samples, config.seed)
    n = len(samples)
    size = min(config.batch_size, -(-n // context.world_size))
    batches = [(images, labels) for _, _, images, labels in load_batches(context, dataset, samples, size)]
    results: list[Result] = []
    with evaluating(model, requires_grad=True):
        for scope in SCOPES:
            parameters, generator = select_parameters(model, scope), torch.Generator().manual_seed(config.seed)
            product = partial(hessian_product, model, batches, n, parameters, context.all_reduce)
            top, converged = top_eigenvalue(product, random_signs(parameters, generator), config.hessian_iters)
            vectors = (random_signs(parameters, generator) for _ in range(config.hessian_draws))
            for metric, value in (("hessian_top", top), ("hessian_trace", trace(product, vectors))):
                metadata = {"scope": scope, "split": dataset.split, "num_samples": n, "setting": f"{metric} {scope}"}
                results.append({"metric": metric, "value": value, **metadata})
            if not converged:
                results[-2]["note"] = f"not converged in {config.hessian_iters} iterations; raise --hessian-iters"
            if config.landscape_figure:
                _draw_landscape(context, batches, n, dataset.name, scope)
    return results


def hessian_product(
    model: nn.Module, batches: Batches, count: int, parameters: Vector, all_reduce: AllReduce, vector: Vector
) -> Vector:
    """H v of the mean cross-entropy over the `count` images of all processes."""
    result = [torch.zeros_like(v) for v in vector]
    for images, label in batches:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            loss = F.cross_entropy(predict(model, images), label, reduction="sum") / count
        grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        along = torch.stack([(g * v).sum() for g, v in zip(grads, vector, strict=True)]).sum()
        products = torch.autograd.grad(along, parameters, allow_unused=True, materialize_grads=True)
        torch._foreach_add_(result, list(products))
    return [all_reduce(r) for r in result]


def dot(x: Vector, y: Vector) -> float:
    """Inner product over all tensors, in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(x, y, strict=True))


def top_eigenvalue(
    product: Callable[[Vector], Vector], start: Vector, iters: int, tolerance: float = 1e-3
) -> tuple[float, bool]:
    """The eigenvalue of largest magnitude, by the Rayleigh quotient of at most `iters` power iterations, and whether it
    has converged: changed by at most `tolerance` of itself."""
    vector, value = list(torch._foreach_div(start, global_norm(start))), float("nan")
    for _ in range(iters):
        image = product(vector)
        previous, value = value, dot(vector, image)
        length = global_norm(image)
        if length == 0 or abs(value - previous) <= tolerance * abs(value):
            return value, True
        vector = list(torch._foreach_div(image, length))
    return value, False


def trace(product: Callable[[Vector], Vector], vectors: Iterable[Vector]) -> float:
    """Mean of v^T H v over random sign vectors (Hutchinson's estimator)."""
    values = [dot(v, product(v)) for v in vectors]
    return sum(values) / len(values)


def random_signs(parameters: Vector, generator: torch.Generator) -> Vector:
    """Entries +1 or -1, drawn on the CPU so that they are the same on every process and device."""
    return [(torch.randint(2, p.shape, generator=generator) * 2 - 1).to(p) for p in parameters]


def filter_normalized_direction(parameters: Vector, generator: torch.Generator) -> Vector:
    """A normal direction whose filters have the norms of the weights' filters (Li et al. 2018, section 4).

    Vectors (biases, normalization) count as one filter, so that their direction is not zero.
    """
    direction = []
    for p in parameters:
        noise = torch.randn(p.shape, generator=generator).to(p)
        d, w = (t.flatten(1) if p.dim() > 1 else t.view(1, -1) for t in (noise, p.detach()))
        scale = w.norm(dim=1, keepdim=True) / d.norm(dim=1, keepdim=True).clamp(min=1e-10)
        direction.append((d * scale).view_as(p))
    return direction


# --- loss landscape -------------------------------------------------------------------------------------------------


@torch.no_grad()
def loss_plane(
    model: nn.Module,
    batches: Batches,
    count: int,
    parameters: Vector,
    directions: tuple[Vector, Vector],
    steps: Tensor,
    all_reduce: AllReduce,
) -> Tensor:
    """Mean loss at w + steps[i] directions[0] + steps[j] directions[1], [n, n]. The weights are restored."""
    losses = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    with weights_restored(parameters) as weights:
        for (i, a), (j, b) in itertools.product(enumerate(steps.tolist()), repeat=2):
            along_first = torch._foreach_add(weights, directions[0], alpha=a)
            torch._foreach_copy_(parameters, torch._foreach_add(along_first, directions[1], alpha=b))
            for images, label in batches:
                loss = F.cross_entropy(predict(model, images), label, reduction="sum")
                losses[i, j] += loss.double().cpu() / count
    return all_reduce(losses)


def _draw_landscape(context: EvalContext, batches: Batches, count: int, name: str, scope: str) -> None:
    """Evaluate the loss plane along two random directions and save its figure."""
    config, parameters = context.config, select_parameters(context.model, scope)
    generator = torch.Generator().manual_seed(config.seed + 1)
    first, second = (filter_normalized_direction(parameters, generator) for _ in range(2))
    steps = torch.linspace(-1, 1, config.landscape_points, dtype=torch.float64)
    plane = loss_plane(context.model, batches, count, parameters, (first, second), steps, context.all_reduce)
    if context.rank == 0:
        path = Path(config.landscape_figure)
        file = path.with_name(f"{path.stem}-{file_stem(context.name, name)}-{scope}{path.suffix}")
        plot_plane(plane, steps, f"{context.name}: {scope}", file)


def plot_plane(plane: Tensor, steps: Tensor, title: str, path: Path) -> None:
    """Contours of the loss on a logarithmic color scale; a cross marks the weights."""
    figure = new_figure(5.5, 4.5)
    from matplotlib import ticker

    finite = plane[plane.isfinite()]
    high = float(finite.max()) if len(finite) else 1.0
    low = max(float(finite.min()) if len(finite) else 1.0, 1e-6 * high, 1e-12)
    levels = torch.logspace(math.log10(0.999 * low), math.log10(1.001 * max(high, 1.01 * low)), 31)
    axis = figure.subplots()
    contours = axis.contourf(steps, steps, plane.T, levels, norm="log")
    axis.plot(0, 0, "k+")
    axis.set(xlabel="first direction", ylabel="second direction", xticks=steps[[0, len(steps) // 2, -1]])
    axis.set_title(wrap_path(title, 50), fontsize="small")
    log_ticks = ticker.LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,))
    ticks = ticker.MaxNLocator(6) if high < 10 * low else log_ticks
    figure.colorbar(contours, label="loss", ticks=ticks, format="{x:.4g}").minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_write_errors(path):
        figure.savefig(path, dpi=120)
