"""Top-1, top-5 and loss over a loader, the same figures for any number of processes."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from samon.errors import UserError


def set_loss(logits: Tensor, allowed: Tensor) -> Tensor:
    """Per-sample ``-log sum_{c in set} p_c``: cross-entropy when a sample's set of labels holds one class.

    ``logits`` [B, C]; ``allowed`` [B, C] bool, at least one True per row.
    """
    logits = logits.float()
    return logits.logsumexp(1) - logits.masked_fill(~allowed, float("-inf")).logsumexp(1)


# How logits are read: (columns the prediction is restricted to, label sets [rows, classes]); None for plain.
Scoring = tuple[Tensor | list[int] | None, Tensor | None]


def accuracy(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    valid_labels: Tensor | list[int] | None = None,
    label_sets: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """``{'top1': %, 'top5': %, 'loss', 'num_samples'}``; the keywords are those of `score`.

    ``valid_labels`` keeps those columns of the logits (targets index into them, as in timm's validate).
    ``label_sets`` [rows, classes] bool makes ``target`` a row number: a prediction is right if it lies in the
    row's set, rows without a label are not counted, and the loss is `set_loss`.
    """
    return score(model, loader, {"": (valid_labels, label_sets)}, **kwargs)[""]


@torch.no_grad()
def score(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    scorings: Mapping[str, Scoring],
    *,
    device: torch.device | str,
    amp_autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    channels_last: bool = False,
    log: Callable[[str], None] | None = None,
    log_every: int = 50,
) -> dict[str, dict[str, float]]:
    """`accuracy` for several readings of the same logits, in eval mode; the model's mode is put back after.

    ``loader`` yields (input, target) of this process's part; sums are kept on the device in float64 and
    all-reduced once after the loop, so ranks may hold different numbers of batches. ``loss_fn`` is a mean
    over the batch.
    """
    sums = torch.zeros(len(scorings), 4, dtype=torch.float64, device=device)  # right at 1, at 5, loss, samples
    tables = [_on_device(scoring, device) for scoring in scorings.values()]
    was_training = model.training
    model.eval()
    try:
        for index, (images, target) in enumerate(loader):
            images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with amp_autocast():
                output = model(images)
                output = output[0] if isinstance(output, (tuple, list)) else output
                sums += torch.stack([_batch_sums(output, target, loss_fn, *table) for table in tables])
            if log is not None and (index + 1) % log_every == 0:
                top1, _, loss, count = sums[0].tolist()  # this process's part so far
                count = max(count, 1)
                log(f"eval batch {index + 1}: loss {loss / count:.4f} top1 {100 * top1 / count:.2f}")
    finally:
        model.train(was_training)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    results: dict[str, dict[str, float]] = {}
    for name, (top1, top5, loss, count) in zip(scorings, sums.tolist(), strict=True):
        if count == 0 and len(results) == 0:
            raise UserError("nothing to evaluate: the loader gave no sample with a label; check the split")
        n = max(count, 1)
        top = {"top1": 100 * top1 / n, "top5": 100 * top5 / n}
        results[name] = {**top, "loss": loss / n, "num_samples": int(count)}
    return results


def _on_device(scoring: Scoring, device: torch.device | str) -> tuple[Tensor | None, Tensor | None]:
    columns, table = scoring
    columns = None if columns is None else torch.as_tensor(columns, device=device)
    return columns, None if table is None else table.to(device)


def _batch_sums(
    output: Tensor,
    target: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    columns: Tensor | None,
    table: Tensor | None,
) -> Tensor:
    """[right at 1, right at 5, loss, samples] of one batch, float64."""
    if columns is not None:
        output = output[:, columns]
    if table is None:
        allowed, loss = None, loss_fn(output, target).double() * len(output)
    else:
        allowed = table[target] if columns is None else table[target][:, columns]
        counted = allowed.any(1)
        output, allowed = output[counted], allowed[counted]
        loss = set_loss(output, allowed).double().sum()
    top = output.topk(min(5, output.shape[1]), dim=1).indices  # [B, k]
    hits = top == target[:, None] if allowed is None else allowed.gather(1, top)
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum(), loss, loss.new_tensor(len(output))])
