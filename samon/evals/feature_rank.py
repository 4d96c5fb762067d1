"""Feature rank: how many singular values hold 99 % of the energy of a layer's features (section 5.2, Table 6).

Andriushchenko et al. 2023, "Sharpness-aware minimization leads to low-rank features". Their public code takes
each example's own mean off its features (``row``); principal components take each feature's mean over the
examples off (``column``). Both are offered, because the two ranks differ.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from samon.errors import UserError
from samon.evals.entry import Entry, EvalImages, Target, batches, choose, evaluating
from samon.evals.results import Row

Part = tuple[Tensor, Tensor]  # rows of the feature matrix, images
CENTRINGS = ("row", "column", "none")


def features(model: nn.Module, images: Tensor, layer: str = "", token: str = "auto") -> Tensor:
    """A layer's output for ``images``, flattened: [B, D]. The default layer is the last one before pooling.

    ``layer``: a module's name as in ``named_modules()``, or ``""`` for timm's ``forward_features`` and
    ``pre_logits`` for what the classifier gets. ``token``: ``cls`` keeps the first token of a [B, N, C]
    output, ``all`` keeps all; ``auto`` is ``cls`` for models that have a class token.
    """
    if layer == "":
        out = model.forward_features(images)  # type: ignore[operator]
    elif layer == "pre_logits":
        out = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    else:
        out = _hooked(model, images, layer)
    has_class_token = getattr(model, "cls_token", None) is not None
    if out.dim() == 3 and (token == "cls" or (token == "auto" and has_class_token)):
        out = out[:, 0]
    return out.flatten(1)


def named_layer(model: nn.Module, layer: str) -> nn.Module:
    """The module of that name.

    Raises:
        UserError: there is none; the message names some that there are.
    """
    modules = dict(model.named_modules())
    if layer not in modules:
        near = [name for name in modules if layer.split(".")[0] in name][:5] or list(modules)[1:6]
        raise UserError(f"feature_rank: the model has no layer {layer!r}; it has for example {', '.join(near)}")
    return modules[layer]


def _hooked(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    caught: list[Tensor] = []
    handle = named_layer(model, layer).register_forward_hook(lambda _module, _args, out: caught.append(out))
    try:
        model(images)
    finally:
        handle.remove()
    if len(caught) != 1 or not isinstance(caught[0], Tensor):
        raise UserError(f"feature_rank: layer {layer!r} ran {len(caught)} times or gave no tensor; name another")
    return caught[0]


def energies(phi: Tensor, centring: str) -> Tensor:
    """Squared singular values of the centred [N, D] feature matrix, largest first, float64.

    They are the eigenvalues of the smaller of its two Gram matrices, which is exact enough for a share of
    energy.
    """
    phi = phi.double()
    if centring != "none":
        phi = phi - phi.mean(dim=1 if centring == "row" else 0, keepdim=True)
    gram = phi.T @ phi if phi.shape[1] < phi.shape[0] else phi @ phi.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)


def rank_of(squares: Tensor, share: float = 0.99) -> int:
    """Smallest k whose k largest squared singular values hold more than ``share`` of their sum; 0 if all are 0."""
    if squares.sum() == 0:
        return 0
    return min(int((squares.cumsum(0) <= share * squares.sum()).sum()) + 1, len(squares))


@torch.no_grad()
def feature_matrix(
    model: nn.Module, batches: Iterable[Part], count: int, layer: str = "", token: str = "auto"
) -> Tensor:
    """[count, D] features in eval mode; rows that ``batches`` does not name stay zero."""
    phi: Tensor | None = None
    with evaluating(model):
        for rows, images in batches:
            out = features(model, images, layer, token).float()
            if phi is None:
                phi = out.new_zeros(count, out.shape[1])
            phi[rows.to(out.device)] = out
    if phi is None:
        raise UserError("feature_rank: a process got no batch; use fewer processes or a smaller --batch-size")
    return phi


def prepare(target: Target, entry: Entry) -> EvalImages:
    """The images; every mistake in the settings is found here, before any work."""
    config = target.config
    if set(config.feature_centering.split(",")) - set(CENTRINGS):
        raise UserError(f"--feature-centering {config.feature_centering}: use {', '.join(CENTRINGS)}")
    for layer in set(config.feature_layer) - {"", "pre_logits"}:
        named_layer(target.model, layer)
    return entry.images(target, config.feature_split or None)


def rows(target: Target, entry: Entry) -> list[Row]:
    """Rank of every layer under every centring."""
    config, images = target.config, prepare(target, entry)
    split = config.feature_split or entry.split
    first = entry.first if split == entry.split else None
    chosen = choose(len(images), config.feature_samples, config.seed, first)
    size = min(config.batch_size, -(-len(chosen) // target.world))
    found: list[Row] = []
    for layer in config.feature_layer:
        about: Row = {"layer": layer or "forward_features", "split": split}
        data = batches(target, images, chosen, size, bar=f"feature_rank {about['layer']} {entry.name}")
        parts = ((torch.arange(k * size, k * size + len(x)), x) for k, _, x, _ in data)
        phi = target.total(feature_matrix(target.model, parts, len(chosen), layer, config.feature_token))
        about |= {"features": phi.shape[1], "metric": "feature_rank", "num_samples": len(chosen)}
        for centring in config.feature_centering.split(","):
            setting = {"centring": centring, "setting": f"{about['layer']} {centring}-centred"}
            found.append({**about, **setting, "value": rank_of(energies(phi, centring))})
    return found
