"""m-sharpness in weight space (Eq. 6; appendix B.10; Tables 6, 18 and 19).

Worst case: mean over batches of m of max over ||T^-1 eps||_p <= rho of L(w + eps) - L(w), T = |w| (adaptive)
or 1. Average case: the mean over eps = rho T n instead, n standard normal (l2) or uniform in [-1, 1] (l_inf).

Two modes for the maximum. ``autopgd`` is Auto-PGD in v = T^-1 eps. ``reference`` computes what the public
code of Andriushchenko et al. 2023 computes. The paper says that it follows their setup, but its own public code
holds no sharpness file: that its tables come from this search is an inference. It differs from Auto-PGD in what
follows:

- every iterate is 0.75 projected point + 0.25 of the iterate before the last one, where Auto-PGD adds 0.25 of
  the last move. The first step, with the start in both places, therefore goes only 0.75 of the way: 1-step
  l_inf sharpness at rho is the loss change at 0.75 rho T sign(g);
- steps that set a new best loss are counted, not those that increase it; checkpoints are rounded up, and the
  first interval holds one step more than it is judged by;
- a halved step takes its next gradient at the best point, but moves on from the last one;
- the l2 adaptive step is T g / ||g||, not T^2 g / ||T g||, and its projection is onto the nearest point in
  the Euclidean sense (found by bisection), not along the ray.

The public code divides by |w|, so a single zero weight switches its l2 adaptive projection off (0 / 0); here
the ball has no extent in that direction and the weight stays at zero.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samon.errors import UserError
from samon.evals.apgd import StepSize, checkpoints
from samon.evals.entry import Entry, EvalImages, Target, batches, choose, evaluating, one_label, predict
from samon.evals.results import Row
from samon.geometry import global_norm, project
from samon.scope import norm_parameters

Part = tuple[int, Tensor, Tensor]  # number of the batch, images, label
# (eps, want gradient) -> loss [], gradients
Loss = Callable[[list[Tensor], bool], tuple[Tensor, list[Tensor]]]
_FORM = "worst|average-linf|l2[-adaptive][-logitnorm][-Nstep]@RHO[,RHO...]"
P = {"l2": 2.0, "linf": math.inf}


@dataclass(frozen=True)
class Measure:
    """What is measured: a row of Table 6, 18 or 19. `parse` reads the short form, `str` writes it."""

    rho: float
    kind: str = "worst"  # or 'average'
    norm: str = "linf"  # or 'l2'
    adaptive: bool = True
    logit_norm: bool = True
    steps: int = 20  # gradient steps, or random draws in the average case

    @classmethod
    def parse(cls, text: str) -> list["Measure"]:
        """``worst-linf-adaptive-logitnorm-1step@0.007,0.01``: one measure per rho."""
        form = re.fullmatch(r"(worst|average)-(linf|l2)((?:-adaptive|-logitnorm|-\d+step)*)@([^@]+)", text)
        try:
            radii = [float(rho) for rho in form[4].split(",")] if form else []
        except ValueError:
            radii = []
        if form is None or not radii or min(radii) <= 0:
            raise UserError(f"sharpness measure {text!r}: use {', '.join(PRESETS)} or {_FORM} with positive radii")
        words = form[3].split("-")
        steps = next((int(word.removesuffix("step")) for word in words if word.endswith("step")), 20)
        return [cls(rho, form[1], form[2], "adaptive" in words, "logitnorm" in words, steps) for rho in radii]

    def __str__(self) -> str:
        flags = [word for word, on in (("adaptive", self.adaptive), ("logitnorm", self.logit_norm)) if on]
        return "-".join([self.kind, self.norm, *flags, f"{self.steps}step"]) + f"@{self.rho:g}"


# {name on the command line: measures in the short form}, after the tables of the paper that they make.
PRESETS: dict[str, list[str]] = json.loads(Path(__file__).with_name("sharpness_presets.json").read_text())


def normalized_logits(logits: Tensor) -> Tensor:
    """Logits [B, C] with their mean taken off, divided by their l2 norm (at least 1e-10): scale-free."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-10)


def scoped(model: nn.Module, scope: str) -> list[Tensor]:
    """The parameters along which is measured: ``all``, ``norm`` (gamma and beta) or ``non-norm``.

    Raises:
        UserError: the model has none of them.
    """
    norms = {id(p) for p in norm_parameters(model).values()}
    found: list[Tensor] = [p for p in model.parameters() if scope == "all" or (id(p) in norms) == (scope == "norm")]
    if not found:
        raise UserError(f"scope {scope}: the model has no such parameters; measure along all")
    return found


@contextmanager
def restored(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The weights' values; whatever happens inside, the parameters hold exactly these afterwards."""
    values = [p.detach().clone() for p in parameters]
    try:
        yield values
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, values)


def _mix(a: float, x: list[Tensor], b: float, y: list[Tensor]) -> list[Tensor]:
    """a x + b y."""
    return list(torch._foreach_add(torch._foreach_mul(x, a), y, alpha=b))


def _ascent(delta: list[Tensor], grads: list[Tensor], scales: list[Tensor], size: float, p: float) -> list[Tensor]:
    """delta + size T sign(g) (p = inf) or delta + size T^2 g / ||T g|| (p = 2), not yet projected."""
    if p == math.inf:
        direction = [a * g.sign() for a, g in zip(scales, grads, strict=True)]
    else:
        scaled = [a * g for a, g in zip(scales, grads, strict=True)]
        norm = global_norm(scaled)
        direction = [a * u * torch.where(norm > 0, 1 / norm, 0) for a, u in zip(scales, scaled, strict=True)]
    return _mix(1.0, delta, size, direction)


def reference_checkpoints(n_iter: int) -> dict[int, int]:
    """Like `apgd.checkpoints`, as the public sharpness code has them: rounded up, counted from iteration 0."""
    fractions, ends = [0.0, 0.22], [0, math.ceil(n_iter * 0.22)]
    while ends[-1] < n_iter and ends[-1] != ends[-2]:
        fractions.append(fractions[-1] + max(fractions[-1] - fractions[-2] - 0.03, 0.06))
        ends.append(math.ceil(fractions[-1] * n_iter))
    return {end: end - before for before, end in itertools.pairwise(ends)}


def project_euclidean(delta: list[Tensor], scales: list[Tensor], rho: float) -> list[Tensor]:
    """Nearest point of the ellipsoid ||T^-1 delta||_2 <= rho: delta / (1 + lam / T^2), lam by bisection."""
    inside = [torch.where(a > 0, d, 0) for d, a in zip(delta, scales, strict=True)]

    def shrunk(lam: float) -> list[Tensor]:
        return [d * a.square() / (a.square() + lam) if lam else d for d, a in zip(inside, scales, strict=True)]

    def radius(point: list[Tensor]) -> float:
        return float(global_norm([torch.where(a > 0, d / a, 0) for d, a in zip(point, scales, strict=True)]))

    if radius(inside) <= rho:
        return inside
    low, high = 0.0, 1.0
    while radius(shrunk(high)) > rho:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if radius(shrunk(middle)) > rho else (low, middle)
    return shrunk(high)


def worst_autopgd(loss_of: Loss, scales: list[Tensor], measure: Measure) -> float:
    """max L(w + eps) - L(w) found by Auto-PGD in T^-1 eps from eps = 0; never below 0, as eps = 0 is allowed."""
    return _worst(loss_of, scales, measure, False)


def worst_reference(loss_of: Loss, scales: list[Tensor], measure: Measure) -> float:
    """The same maximum as the public sharpness code searches it: see the top of this file."""
    return _worst(loss_of, scales, measure, True)


def _worst(loss_of: Loss, scales: list[Tensor], measure: Measure, reference: bool) -> float:
    p, rho, steps = P[measure.norm], measure.rho, measure.steps
    delta = previous = best_delta = [torch.zeros_like(a) for a in scales]
    start, grads = loss_of(delta, True)
    best, best_grads, before = start, grads, start
    checks = reference_checkpoints(steps) if reference else checkpoints(steps)
    step = StepSize(start.new_full((1,), 2 * rho), best.view(1), checks, strict=reference)
    for i in range(steps):
        size = float(step.size)
        if reference and p == 2:
            along = torch._foreach_div([a * g for a, g in zip(scales, grads, strict=True)], global_norm(grads) + 1e-12)
            moved = _mix(1.0, delta, size, list(along))
            z = project_euclidean(moved, scales, rho) if measure.adaptive else project(moved, scales, rho, p)
        else:
            z = project(_ascent(delta, grads, scales, size, p), scales, rho, p)
        if reference:
            moved = _mix(0.75, z, 0.25, previous)
        else:
            momentum = 0.75 if i else 1.0
            moved = _mix(1.0, _mix(momentum, z, 1 - momentum, delta), 1 - momentum, _mix(1.0, delta, -1.0, previous))
            moved = project(moved, scales, rho, p)
        previous, delta = delta, moved
        loss, grads = loss_of(delta, i + 1 < steps)
        improved, before = loss > (best if reference else before), loss
        if loss > best:
            best, best_delta, best_grads = loss, delta, grads
        halved = step.update(i, improved, best.view(1))
        if halved is not None and halved:
            delta, grads = delta if reference else best_delta, best_grads
    return float(best.double() - start.double())


def average_case(loss_of: Loss, scales: list[Tensor], measure: Measure, seed: int) -> float:
    """Mean of L(w + rho T n) - L(w) over ``measure.steps`` draws of n."""
    generator = torch.Generator(scales[0].device).manual_seed(seed)
    start, _ = loss_of([torch.zeros_like(a) for a in scales], False)
    total = 0.0
    for _ in range(measure.steps):
        draws = [torch.empty_like(a) for a in scales]
        for draw in draws:
            _ = draw.normal_(generator=generator) if measure.norm == "l2" else draw.uniform_(-1, 1, generator=generator)
        loss, _ = loss_of([measure.rho * a * n for a, n in zip(scales, draws, strict=True)], False)
        total += float(loss.double() - start.double())
    return total / measure.steps


def batch_sharpness(
    model: nn.Module,
    images: Tensor,
    label: Tensor,
    measure: Measure,
    mode: str = "reference",
    seed: int = 0,
    scope: str = "all",
) -> float:
    """Sharpness on one batch of m images, along the parameters of ``scope``.

    The model is left bit for bit as it was, also after an exception.
    """
    parameters = scoped(model, scope)
    with evaluating(model, gradients=True), restored(parameters) as weights:

        def loss_of(delta: list[Tensor], want_grad: bool) -> tuple[Tensor, list[Tensor]]:
            with torch.no_grad():
                torch._foreach_copy_(parameters, torch._foreach_add(weights, delta))
            with torch.set_grad_enabled(want_grad):
                out = predict(model, images)
                loss = F.cross_entropy(normalized_logits(out) if measure.logit_norm else out, label)
            if not want_grad:
                return loss.detach(), []
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            return loss.detach(), list(grads)

        scales = [w.abs() if measure.adaptive else torch.ones_like(w) for w in weights]
        if measure.kind == "average":
            return average_case(loss_of, scales, measure, seed)
        return (worst_reference if mode == "reference" else worst_autopgd)(loss_of, scales, measure)


def sharpness(
    model: nn.Module, batches: Iterable[Part], count: int, measures: list[Measure], seed: int = 0, **options: Any
) -> dict[Measure, Tensor]:
    """{measure: sharpness of each of ``count`` batches, float64 on the CPU}.

    ``batches`` yields (number of the batch, images, label); numbers that this process does not get stay 0, so
    that a sum over the processes is the whole and its mean does not depend on how many there are. ``options`` are
    those of `batch_sharpness`.
    """
    values = {measure: torch.zeros(count, dtype=torch.float64) for measure in measures}
    for number, images, label in batches:
        for measure in measures:
            draws = seed * 1_000_003 + number
            values[measure][number] = batch_sharpness(model, images, label, measure, seed=draws, **options)
    return values


def prepare(target: Target, entry: Entry) -> tuple[EvalImages, nn.Module, list[Measure], list[int]]:
    """(images, model, measures, chosen images); mistakes are found before any work."""
    config, split, size = target.config, target.config.sharpness_split, target.config.sharpness_m
    measures = [m for word in config.sharpness for text in PRESETS.get(word, [word]) for m in Measure.parse(text)]
    images = entry.images(target, split)
    scoped(target.model, config.sharpness_scope)
    net = one_label("sharpness", entry, images, target.model)
    chosen = choose(len(images), config.sharpness_samples, config.seed)
    if len(chosen) < size:
        raise UserError(f"sharpness: {entry.name} {split} gives {len(chosen)} images; lower --sharpness-m {size}")
    n = len(chosen) // size * size
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed + 1)).tolist()
    return images, net, measures, [chosen[i] for i in order]  # sets lie sorted by class; batches should not


def rows(target: Target, entry: Entry) -> list[Row]:
    """Mean sharpness over batches of m training images, for every measure asked for."""
    config, size, (images, net, measures, chosen) = target.config, target.config.sharpness_m, prepare(target, entry)
    mode, scope = config.sharpness_mode, config.sharpness_scope
    data = batches(target, images, chosen, size, bar=f"sharpness {entry.name}")
    parts = ((number, x, y) for number, _, x, y in data)
    values = sharpness(net, parts, len(chosen) // size, measures, config.seed, mode=mode, scope=scope)
    found: list[Row] = []
    for measure, part in values.items():
        setting = f"{measure} {mode}" + ("" if scope == "all" else f" {scope}")
        about = {"setting": setting, "scope": scope, "rho": measure.rho, "m": size, "split": config.sharpness_split}
        found.append({"metric": "sharpness", "value": float(target.total(part).mean()), **about})
        found[-1]["num_samples"] = len(chosen)
    return found
