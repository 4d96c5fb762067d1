"""Feature rank: how many singular values hold 99 % of the energy of a layer's features (section 5.2, Table 6).

Andriushchenko et al. 2023, "Sharpness-aware minimization leads to low-rank features". Their public code takes
each example's own mean off its features (``row``); principal components take each feature's mean over the
examples off (``column``). Both are offered, because the two ranks differ.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from samon.errors import UserError

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


def _hooked(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    modules = dict(model.named_modules())
    if layer not in modules:
        near = [name for name in modules if layer.split(".")[0] in name][:5] or list(modules)[1:6]
        raise UserError(f"feature_rank: the model has no layer {layer!r}; it has for example {', '.join(near)}")
    caught: list[Tensor] = []
    handle = modules[layer].register_forward_hook(lambda _module, _args, out: caught.append(out))
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
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    count: int,
    *,
    device: torch.device | str,
    layer: str = "",
    token: str = "auto",
) -> Tensor:
    """[count, D] features in eval mode; ``batches`` yields (rows of the matrix, images), other rows stay zero."""
    was_training = model.training
    model.eval()
    phi: Tensor | None = None
    try:
        for rows, images in batches:
            out = features(model, images.to(device), layer, token).float()
            if phi is None:
                phi = out.new_zeros(count, out.shape[1])
            phi[rows.to(out.device)] = out
    finally:
        model.train(was_training)
    if phi is None:
        raise UserError("feature_rank: a process got no batch; use fewer processes or a smaller --batch-size")
    return phi
