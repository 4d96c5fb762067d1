"""m-sharpness in weight space (Eq. 6; appendix B.10; Tables 6, 18 and 19).

Worst case: the mean over batches of m images of max L(w + eps) - L(w) over ||T^-1 eps||_p <= rho, with T = |w|
(adaptive) or 1. Average case: the mean over eps = rho T n instead, n standard normal (l2) or uniform in [-1, 1] (linf).

Two searches for the maximum. `autopgd` is Auto-PGD in v = T^-1 eps. `reference` computes what the public code of
Andriushchenko et al. 2023 computes, whose setup the paper follows; that its tables come from this search is inferred,
as its own public code has no sharpness file. `reference` differs from Auto-PGD:

- Each iterate is 0.75 times the projected point plus 0.25 times the iterate before the last one; Auto-PGD adds 0.25 of
  the last step. So the first step covers only 0.75 of the way: 1-step linf sharpness at rho is the loss change at
  0.75 rho T sign(g).
- It counts steps that set a new best loss, not those that increase the loss; its checkpoints are rounded up, and the
  first interval is one step longer than it is judged by.
- A halved step takes its next gradient at the best point, but continues from the last one.
- The l2 adaptive step is T g / ||g||, not T^2 g / ||T g||, and the projection is the nearest point in the Euclidean
  sense (by bisection), not along the ray.

The public code divides by |w|, so that one zero weight disables its l2 adaptive projection (0 / 0). Here the ball has
no extent in that direction, and the weight stays zero.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samon.errors import UserError
from samon.evals.attacks import StepSize, checkpoints
from samon.evals.context import EvalContext, EvalDataset, choose_samples, evaluating, load_batches, predict
from samon.evals.results import Result
from samon.geometry import global_norm
from samon.scope import norm_parameters

LossFn = Callable[[list[Tensor], bool], tuple[Tensor, list[Tensor]]]  # (eps, with gradients) -> loss [], gradients
# Measures in the short form by preset name; the names are the paper's tables.
PRESETS: dict[str, list[str]] = json.loads(Path(__file__).with_name("sharpness_presets.json").read_text())
_FORM = "worst|average-linf|l2[-adaptive][-logitnorm][-Nstep]@RHO[,RHO...]"


@dataclass(frozen=True)
class Measure:
    """A sharpness measure, a row of Tables 6, 18 or 19.

    Attributes:
        kind: "worst" or "average".
        norm: "linf" or "l2".
        logit_norm: normalize the logits, see `normalize_logits`.
        steps: gradient steps, or random draws in the average case.
    """

    rho: float
    kind: str = "worst"
    norm: str = "linf"
    adaptive: bool = True
    logit_norm: bool = True
    steps: int = 20

    @classmethod
    def parse(cls, text: str) -> list["Measure"]:
        """Measures of a short form such as `worst-linf-adaptive-logitnorm-1step@0.007,0.01`, one per rho."""
        form = re.fullmatch(r"(worst|average)-(linf|l2)((?:-adaptive|-logitnorm|-[1-9]\d*step)*)@([^@]+)", text)
        try:
            radii = [float(rho) for rho in form[4].split(",")] if form else []
        except ValueError:
            radii = []
        if form is None or not radii or not all(0 < rho < math.inf for rho in radii):
            raise UserError(f"sharpness measure {text!r}: use {', '.join(PRESETS)} or {_FORM} with positive radii")
        words = form[3].split("-")
        steps = next((int(word.removesuffix("step")) for word in words if word.endswith("step")), 20)
        return [cls(rho, form[1], form[2], "adaptive" in words, "logitnorm" in words, steps) for rho in radii]

    def __str__(self) -> str:
        flags = "-adaptive" * self.adaptive + "-logitnorm" * self.logit_norm
        return f"{self.kind}-{self.norm}{flags}-{self.steps}step@{self.rho:g}"


def check(context: EvalContext, dataset: EvalDataset) -> None:
    """Check measures, scope and number of images."""
    _measures(context)
    select_parameters(context.model, context.config.sharpness_scope)
    _choose_samples(context, dataset)


def evaluate(context: EvalContext, dataset: EvalDataset) -> list[Result]:
    """Mean sharpness over batches of m training images, for every measure."""
    config, m = context.config, context.config.sharpness_m
    samples, mode, scope = _choose_samples(context, dataset), config.sharpness_mode, config.sharpness_scope
    loader = load_batches(context, dataset, samples, m, progress=f"sharpness {dataset.name}")
    batches = ((number, images, labels) for number, _, images, labels in loader)
    values = sharpness(context.model, batches, len(samples) // m, _measures(context), config.seed, mode, scope)
    results: list[Result] = []
    for measure, per_batch in values.items():
        setting = f"{measure} {mode}" + ("" if scope == "all" else f" {scope}")
        metadata = {"setting": setting, "scope": scope, "rho": measure.rho, "m": m, "split": dataset.split}
        value = float(context.all_reduce(per_batch).mean())
        results.append({"metric": "sharpness", "value": value, **metadata, "num_samples": len(samples)})
    return results


def _measures(context: EvalContext) -> list[Measure]:
    texts = [text for word in context.config.sharpness for text in PRESETS.get(word, [word])]
    return [measure for text in texts for measure in Measure.parse(text)]


def _choose_samples(context: EvalContext, dataset: EvalDataset) -> list[int]:
    """Whole batches of images, shuffled: sets are sorted by class; batches, and the images left over, should not be."""
    config, m = context.config, context.config.sharpness_m
    samples = choose_samples(len(dataset), config.sharpness_samples, config.seed)
    if len(samples) < m:
        raise UserError(f"sharpness: {dataset.name} {dataset.split} has {len(samples)} images; lower --sharpness-m {m}")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(config.seed + 1)).tolist()
    return [samples[i] for i in order[: len(samples) // m * m]]


def sharpness(
    model: nn.Module,
    batches: Iterable[tuple[int, Tensor, Tensor]],
    count: int,
    measures: list[Measure],
    seed: int = 0,
    mode: str = "reference",
    scope: str = "all",
) -> dict[Measure, Tensor]:
    """Sharpness of each of `count` batches by measure, float64 [count] on the CPU.

    `batches` yields (number of the batch, images, labels). Batches of other processes stay 0, so that the sum over the
    processes is complete.
    """
    values = {measure: torch.zeros(count, dtype=torch.float64) for measure in measures}
    for number, images, label in batches:
        for measure in measures:
            batch_seed = seed * 1_000_003 + number
            values[measure][number] = batch_sharpness(model, images, label, measure, mode, batch_seed, scope)
    return values


def batch_sharpness(
    model: nn.Module,
    images: Tensor,
    label: Tensor,
    measure: Measure,
    mode: str = "reference",
    seed: int = 0,
    scope: str = "all",
) -> float:
    """Sharpness on one batch of m images, along the parameters of `scope`. The model is restored bit for bit."""
    parameters = select_parameters(model, scope)
    with evaluating(model, requires_grad=True), weights_restored(parameters) as weights:

        def loss_fn(delta: list[Tensor], with_grads: bool) -> tuple[Tensor, list[Tensor]]:
            with torch.no_grad():
                torch._foreach_copy_(parameters, torch._foreach_add(weights, delta))
            with torch.set_grad_enabled(with_grads):
                logits = predict(model, images)
                loss = F.cross_entropy(normalize_logits(logits) if measure.logit_norm else logits, label)
            if not with_grads:
                return loss.detach(), []
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            return loss.detach(), list(grads)

        scales = [w.abs() if measure.adaptive else torch.ones_like(w) for w in weights]
        if measure.kind == "average":
            return average_case(loss_fn, scales, measure, seed)
        return worst_case(loss_fn, scales, measure, mode)


def select_parameters(model: nn.Module, scope: str) -> list[Tensor]:
    """The parameters of a scope: `all`, `norm` (gamma and beta) or `non-norm`; raise UserError if there are none."""
    norms = {id(p) for p in norm_parameters(model).values()}
    selected: list[Tensor] = [p for p in model.parameters() if scope == "all" or (id(p) in norms) == (scope == "norm")]
    if not selected:
        raise UserError(f"scope {scope}: the model has no such parameters; measure along all")
    return selected


@contextmanager
def weights_restored(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield copies of the parameters, and restore these values at the end of the block."""
    values = [p.detach().clone() for p in parameters]
    try:
        yield values
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, values)


def normalize_logits(logits: Tensor) -> Tensor:
    """Center logits [B, C] and divide them by their l2 norm (at least 1e-10), so that their scale is irrelevant."""
    centered = logits - logits.mean(dim=1, keepdim=True)
    return centered / centered.norm(dim=1, keepdim=True).clamp(min=1e-10)


# --- the maximum and the average --------------------------------------------------------------------------------------


def worst_case(loss_fn: LossFn, scales: list[Tensor], measure: Measure, mode: str) -> float:
    """max L(w + eps) - L(w) by projected gradient ascent from eps = 0; at least 0, as eps = 0 is allowed.

    Args:
        scales: T, one tensor per parameter.
        mode: `autopgd` or `reference`, see the module's docstring.
    """
    reference, steps = mode == "reference", measure.steps
    delta = previous = best_delta = [torch.zeros_like(a) for a in scales]
    start, grads = loss_fn(delta, True)
    best, best_grads, loss_before = start, grads, start
    checks = reference_checkpoints(steps) if reference else checkpoints(steps)
    step = StepSize(start.new_full((1,), 2 * measure.rho), best.view(1), checks, strict=reference)
    for i in range(steps):
        z = _ascent_step(delta, grads, scales, float(step.size), measure, reference)
        if reference:
            z = _mix(0.75, z, 0.25, previous)
        else:
            momentum = 0.75 if i else 1.0
            z = _mix(1.0, _mix(momentum, z, 1 - momentum, delta), 1 - momentum, _mix(1.0, delta, -1.0, previous))
            z = project(z, scales, measure.rho, measure.norm)
        previous, delta = delta, z
        loss, grads = loss_fn(delta, i + 1 < steps)
        improved, loss_before = loss > (best if reference else loss_before), loss
        if loss.isnan():  # no maximum: comparisons with it are false, which would look like a flat minimum
            return math.nan
        if loss > best:
            best, best_delta, best_grads = loss, delta, grads
        halved = step.update(i, improved, best.view(1))
        if halved is not None and halved:
            delta, grads = delta if reference else best_delta, best_grads
    return float(best.double() - start.double())


def _mix(a: float, x: list[Tensor], b: float, y: list[Tensor]) -> list[Tensor]:
    """a x + b y."""
    return list(torch._foreach_add(torch._foreach_mul(x, a), y, alpha=b))


def _ascent_step(
    delta: list[Tensor], grads: list[Tensor], scales: list[Tensor], size: float, measure: Measure, reference: bool
) -> list[Tensor]:
    """delta + size T sign(g) (linf), delta + size T^2 g / ||T g|| or, in `reference`, T g / ||g|| (l2), projected."""
    if measure.norm == "linf":
        direction = [a * g.sign() for a, g in zip(scales, grads, strict=True)]
        return project(_mix(1.0, delta, size, direction), scales, measure.rho, "linf")
    scaled = [a * g for a, g in zip(scales, grads, strict=True)]
    if reference:
        z = _mix(1.0, delta, size, list(torch._foreach_div(scaled, global_norm(grads) + 1e-12)))
        return (project_euclidean if measure.adaptive else project)(z, scales, measure.rho)
    norm = global_norm(scaled)
    direction = [a * u * torch.where(norm > 0, 1 / norm, 0) for a, u in zip(scales, scaled, strict=True)]
    return project(_mix(1.0, delta, size, direction), scales, measure.rho)


def reference_checkpoints(n_iter: int) -> dict[int, int]:
    """`attacks.checkpoints` of the public sharpness code: rounded up, counted from iteration 0."""
    fractions, ends = [0.0, 0.22], [0, math.ceil(n_iter * 0.22)]
    while ends[-1] < n_iter and ends[-1] != ends[-2]:
        fractions.append(fractions[-1] + max(fractions[-1] - fractions[-2] - 0.03, 0.06))
        ends.append(math.ceil(fractions[-1] * n_iter))
    return {end: end - before for before, end in itertools.pairwise(ends)}


def project(deltas: list[Tensor], scales: list[Tensor], rho: float, norm: str = "l2") -> list[Tensor]:
    """Project the deltas onto the ball ||T^-1 delta|| <= rho: clipped for linf, rescaled for l2.

    Where T (`scales`) is zero the ball has no extent, so delta is zero there.
    """
    if norm == "linf":
        return [torch.clamp(d, -rho * t, rho * t) for d, t in zip(deltas, scales, strict=True)]
    inside = [torch.where(t > 0, d, 0) for d, t in zip(deltas, scales, strict=True)]
    radius = global_norm([torch.where(t > 0, d / t, 0) for d, t in zip(inside, scales, strict=True)])
    factor = torch.where(radius > rho, rho / radius, 1)
    return list(torch._foreach_mul(inside, factor))


def project_euclidean(delta: list[Tensor], scales: list[Tensor], rho: float) -> list[Tensor]:
    """Nearest point of the ellipsoid ||T^-1 delta||_2 <= rho: delta / (1 + lam / T^2), lam by bisection."""
    inside = [torch.where(a > 0, d, 0) for d, a in zip(delta, scales, strict=True)]

    def shrink(lam: float) -> list[Tensor]:
        return [d * a.square() / (a.square() + lam) if lam else d for d, a in zip(inside, scales, strict=True)]

    def radius(lam: float) -> float:
        return float(global_norm([torch.where(a > 0, d / a, 0) for d, a in zip(shrink(lam), scales, strict=True)]))

    if radius(0.0) <= rho:
        return inside
    low, high = 0.0, 1.0
    while radius(high) > rho:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if radius(middle) > rho else (low, middle)
    return shrink(high)


def average_case(loss_fn: LossFn, scales: list[Tensor], measure: Measure, seed: int) -> float:
    """Mean of L(w + rho T n) - L(w) over `measure.steps` draws of n."""
    generator = torch.Generator(scales[0].device).manual_seed(seed)
    start, _ = loss_fn([torch.zeros_like(a) for a in scales], False)
    total = 0.0
    for _ in range(measure.steps):
        noise = [torch.empty_like(a) for a in scales]
        for n in noise:
            _ = n.normal_(generator=generator) if measure.norm == "l2" else n.uniform_(-1, 1, generator=generator)
        loss, _ = loss_fn([measure.rho * a * n for a, n in zip(scales, noise, strict=True)], False)
        total += float(loss.double() - start.double())
    return total / measure.steps
