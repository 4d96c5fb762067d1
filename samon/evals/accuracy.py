"""Top-1, top-5 and loss over a loader, the same figures for any number of processes."""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from samon.errors import UserError
from samon.evals import shifts
from samon.evals.entry import Device, Entry, EvalImages, Target, batches, choose, evaluating, predict
from samon.evals.results import Row
from samon.evals.shifts import Scoring
from samon.session.model import compiled

_log = logging.getLogger("samon")


def set_loss(logits: Tensor, allowed: Tensor) -> Tensor:
    """Per-sample ``-log sum_{c in set} p_c``: cross-entropy when a sample's set of labels holds one class.

    ``logits`` [B, C]; ``allowed`` [B, C] bool, at least one True per row.
    """
    logits = logits.float()
    return logits.logsumexp(1) - logits.masked_fill(~allowed, float("-inf")).logsumexp(1)


def accuracy(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], **options: Any) -> dict[str, float]:
    """``{'top1': %, 'top5': %, 'loss', 'num_samples'}`` of plain labels; the options are those of `score`."""
    return score(model, loader, {"": (None, None)}, **options)[""]


@torch.no_grad()
def score(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    scorings: Mapping[str, Scoring],
    *,
    device: Device,
    amp_autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    channels_last: bool = False,
    log_every: int = 0,
) -> dict[str, dict[str, float]]:
    """Top-1, top-5 and loss for several readings of the same logits; the model's mode is put back after.

    A scoring's columns are those of the logits that are kept (targets index into them, as in timm's validate).
    Its label sets [rows, classes] bool make ``target`` a row number: a prediction is right if it lies in the row's
    set, rows without a label are not counted, and the loss is `set_loss`.

    ``loader`` yields (input, target) of this process's part; sums are kept on the device in float64 and all-reduced
    once after the loop, so ranks may hold different numbers of batches. ``log_every`` so many batches the part so
    far is logged.
    """
    sums = torch.zeros(len(scorings), 4, dtype=torch.float64, device=device)  # right at 1, at 5, loss, samples
    readings = [[None if x is None else torch.as_tensor(x, device=device) for x in pair] for pair in scorings.values()]
    with evaluating(model):
        for index, (images, target) in enumerate(loader):
            images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with amp_autocast():
                output = predict(model, images)
                sums += torch.stack([_batch_sums(output, target, *reading) for reading in readings])
            if log_every and (index + 1) % log_every == 0:
                top1, _, loss, _ = (sums[0] / sums[0, 3].clamp(min=1)).tolist()
                _log.info("eval batch %d: loss %.4f top1 %.2f", index + 1, loss, 100 * top1)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    if scorings and sums[0, 3] == 0:
        raise UserError("nothing to evaluate: the loader gave no sample with a label; check the split")
    results: dict[str, dict[str, float]] = {}
    for name, (top1, top5, loss, count) in zip(scorings, sums.tolist(), strict=True):
        n = max(count, 1)
        results[name] = {"top1": 100 * top1 / n, "top5": 100 * top5 / n, "loss": loss / n, "num_samples": int(count)}
    return results


def _batch_sums(output: Tensor, target: Tensor, columns: Tensor | None, table: Tensor | None) -> Tensor:
    """[right at 1, right at 5, loss, samples] of one batch, float64."""
    if columns is not None:
        output = output[:, columns]
    if table is None:
        allowed, loss = None, F.cross_entropy(output, target).double() * len(output)
    else:
        allowed = table[target] if columns is None else table[target][:, columns]
        counted = allowed.any(1)
        output, allowed = output[counted], allowed[counted]
        loss = set_loss(output, allowed).double().sum()
    top = output.topk(min(5, output.shape[1]), dim=1).indices  # [B, k]
    hits = top == target[:, None] if allowed is None else allowed.gather(1, top)
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum(), loss, loss.new_tensor(len(output))])


def prepare(target: Target, entry: Entry) -> EvalImages:
    """The set; every mistake in the settings is found here, before any work."""
    return entry.images(target)


def rows(target: Target, entry: Entry) -> list[Row]:
    """top1, top5 and loss under every reading of the set's labels."""
    config, images = target.config, prepare(target, entry)
    chosen = choose(len(images), config.num_samples, config.seed, entry.first)
    found: list[Row] = []
    for setting, values in _scored(target, images, chosen, f"accuracy {entry.name}").items():
        n = int(values.pop("num_samples"))
        about: Row = {"num_samples": n} | ({"setting": setting} if setting else {})
        # The labels of ObjectNet's shards are known only now.
        mismatch = images.mismatch or (shifts.mismatch(entry.kind, images=n) if entry.kind == "objectnet" else "")
        about |= {"mismatch": mismatch} if mismatch else {}
        found += [{"metric": key, "value": round(value, 6), **about} for key, value in values.items()]
    return found


def _scored(target: Target, images: EvalImages, chosen: list[int], bar: str) -> dict[str, dict[str, float]]:
    """`score` of the chosen images; with --retry the batch is halved until it fits the memory."""
    config, size = target.config, target.config.batch_size
    dtype = next(target.model.parameters()).dtype
    net = compiled(config, target.model)
    options = {"amp_autocast": target.autocast, "channels_last": config.channels_last, "log_every": config.log_freq}
    while True:
        loader = ((x.to(dtype), y) for _, _, x, y in batches(target, images, chosen, size, bar=bar))
        try:
            return score(net, loader, images.scorings, device=target.device, **options)
        except torch.OutOfMemoryError:
            if not config.retry or size == 1 or target.world > 1:
                raise
            size //= 2
            _log.warning("out of memory: trying again with --batch-size %d", size)
