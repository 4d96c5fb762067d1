"""Feature rank: how many singular values hold 99 % of the energy of a layer's features (section 5.2, Table 6).

Andriushchenko et al. 2023, "Sharpness-aware minimization leads to low-rank features". Their public code subtracts each
example's own mean from its features (`row`); principal components subtract each feature's mean over the examples
(`column`). The two ranks differ, so both are reported.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from samon.errors import UserError
from samon.evals.context import EvalContext, EvalDataset, choose_samples, evaluating, load_batches
from samon.evals.results import Result

CENTERINGS = ("row", "column", "none")


def check(context: EvalContext, dataset: EvalDataset) -> None:
    """Check the centerings and the names of the layers."""
    config = context.config
    if set(config.feature_centering.split(",")) - set(CENTERINGS):
        raise UserError(f"--feature-centering {config.feature_centering}: use {', '.join(CENTERINGS)}")
    for layer in set(config.feature_layer) - {"", "pre_logits"}:
        find_layer(context.model, layer)


def evaluate(context: EvalContext, dataset: EvalDataset) -> list[Result]:
    """The feature rank of every layer with every centering."""
    config = context.config
    samples = choose_samples(len(dataset), config.feature_samples, config.seed, dataset.limit)
    size = min(config.batch_size, -(-len(samples) // context.world_size))
    results: list[Result] = []
    for layer in dict.fromkeys(config.feature_layer):
        name = layer or "forward_features"
        loader = load_batches(context, dataset, samples, size, progress=f"feature_rank {name} {dataset.name}")
        batches = ((torch.arange(k * size, k * size + len(images)), images) for k, _, images, _ in loader)
        matrix = feature_matrix(context.model, batches, len(samples), layer, config.feature_token)
        features = context.all_reduce(matrix)
        metadata = {"layer": name, "split": dataset.split, "features": features.shape[1], "num_samples": len(samples)}
        for centering in dict.fromkeys(config.feature_centering.split(",")):
            rank = energy_rank(squared_singular_values(features, centering))
            setting = {"centering": centering, "setting": f"{name} {centering}-centered"}
            results.append({**metadata, **setting, "metric": "feature_rank", "value": rank})
    return results


def extract_features(model: nn.Module, images: Tensor, layer: str = "", token: str = "auto") -> Tensor:
    """Return a layer's output, flattened to [B, D].

    Args:
        layer: a name in `named_modules()`; `""` for timm's `forward_features`, the last output before pooling;
            `pre_logits` for the input of the classifier.
        token: `cls` keeps the first token of a [B, N, C] output, `all` keeps all, `auto` is `cls` for models that
            have a class token.
    """
    if layer == "":
        out = model.forward_features(images)  # type: ignore[operator]
    elif layer == "pre_logits":
        out = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    else:
        outputs: list[Tensor] = []
        handle = find_layer(model, layer).register_forward_hook(lambda _module, _args, out: outputs.append(out))
        try:
            model(images)
        finally:
            handle.remove()
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
            raise UserError(f"feature_rank: layer {layer!r} ran {len(outputs)} times or gave no tensor; name another")
        out = outputs[0]
    has_class_token = getattr(model, "cls_token", None) is not None
    if out.dim() == 3 and (token == "cls" or (token == "auto" and has_class_token)):
        out = out[:, 0]
    return out.flatten(1)


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module of this name; raise UserError naming similar ones."""
    modules = dict(model.named_modules())
    if name not in modules:
        similar = [other for other in modules if name.split(".")[0] in other][:5] or list(modules)[1:6]
        raise UserError(f"feature_rank: the model has no layer {name!r}; it has for example {', '.join(similar)}")
    return modules[name]


def squared_singular_values(features: Tensor, centering: str) -> Tensor:
    """Squared singular values of the centered [N, D] matrix, descending, float64.

    They are the eigenvalues of the smaller Gram matrix, which is exact enough for a fraction of the energy.
    """
    features = features.double()
    if centering != "none":
        features = features - features.mean(dim=1 if centering == "row" else 0, keepdim=True)
    n, d = features.shape
    gram = features.T @ features if d < n else features @ features.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)


def energy_rank(squares: Tensor, fraction: float = 0.99) -> int:
    """Smallest k such that the first k values hold more than `fraction` of the sum; 0 if all are 0."""
    if squares.sum() == 0:
        return 0
    return min(int((squares.cumsum(0) <= fraction * squares.sum()).sum()) + 1, len(squares))


@torch.no_grad()
def feature_matrix(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], count: int, layer: str = "", token: str = "auto"
) -> Tensor:
    """Features [count, D] of (row numbers, images) batches in eval mode; other rows are zero."""
    matrix: Tensor | None = None
    with evaluating(model):
        for rows, images in batches:
            out = extract_features(model, images, layer, token).float()
            if matrix is None:
                matrix = out.new_zeros(count, out.shape[1])
            matrix[rows.to(out.device)] = out
    if matrix is None:
        raise UserError("feature_rank: a process got no batch; use fewer processes or a smaller --batch-size")
    return matrix
