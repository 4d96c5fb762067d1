"""Top-1, top-5 and loss over a loader, the same figures for any number of processes."""

from collections.abc import Callable, Iterable
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


def _all_reduce(sums: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums


@torch.no_grad()
def accuracy(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str,
    amp_autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    valid_labels: Tensor | list[int] | None = None,
    label_sets: Tensor | None = None,
    channels_last: bool = False,
    log: Callable[[str], None] | None = None,
    log_every: int = 50,
) -> dict[str, float]:
    """``{'top1': %, 'top5': %, 'loss', 'num_samples'}`` in eval mode; the model's mode is put back after.

    ``loader`` yields (input, target) of this process's part; sums are kept on the device in float64 and
    all-reduced once after the loop, so ranks may hold different numbers of batches. ``loss_fn`` is a mean
    over the batch. ``valid_labels`` keeps those columns of the logits (targets index into them, as in timm's
    validate). ``label_sets`` [T, C] bool makes ``target`` a row number: a prediction is right if it lies in
    the row's set, rows without a label are not counted, and the loss is `set_loss`.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # right at 1, right at 5, loss, samples
    columns = None if valid_labels is None else torch.as_tensor(valid_labels, device=device)
    label_sets = None if label_sets is None else label_sets.to(device)
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
                output = output if columns is None else output[:, columns]
                loss = loss_fn(output, target) if label_sets is None else None
            sums += _batch_sums(output, target, loss, label_sets)
            if log is not None and (index + 1) % log_every == 0:
                right, _, total, count = sums.tolist()  # this process's part so far
                log(
                    f"eval {index + 1} batches, {count:.0f} images: "
                    f"loss {total / max(count, 1):.4f} top1 {100 * right / max(count, 1):.2f}"
                )
    finally:
        model.train(was_training)
    top1, top5, total, count = _all_reduce(sums).tolist()
    if count == 0:
        raise UserError("nothing to evaluate: the loader gave no sample with a label; check the split")
    return {
        "top1": 100 * top1 / count,
        "top5": 100 * top5 / count,
        "loss": total / count,
        "num_samples": int(count),
    }


def _batch_sums(output: Tensor, target: Tensor, loss: Tensor | None, label_sets: Tensor | None) -> Tensor:
    """[right at 1, right at 5, loss, samples] of one batch, float64."""
    if label_sets is not None:
        allowed = label_sets[target]
        counted = allowed.any(1)
        output, allowed = output[counted], allowed[counted]
        count = len(output)
        loss_sum = set_loss(output, allowed).double().sum()
    else:
        assert loss is not None
        allowed, count = None, len(output)
        loss_sum = loss.double() * count
    top = output.topk(min(5, output.shape[1]), dim=1).indices  # [B, k]
    hits = top == target[:, None] if allowed is None else allowed.gather(1, top)
    return torch.stack(
        [
            hits[:, 0].sum().double(),
            hits.any(1).sum().double(),
            loss_sum,
            torch.tensor(count, dtype=torch.float64, device=output.device),
        ]
    )
