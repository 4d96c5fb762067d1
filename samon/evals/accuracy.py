"""Top-1, top-5 and loss over a loader, the same figures for any number of processes."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from samon.errors import UserError
from samon.evals import shifts
from samon.evals.calibration import COLUMNS, bounds, confusion, expected_calibration_error, write_classes
from samon.evals.entry import Entry, EvalImages, Target, batches, choose, evaluating, predict, share
from samon.evals.results import Row
from samon.evals.shifts import Scoring
from samon.trainer.fsdp import pad_batches
from samon.trainer.model import compile_model

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
    device: torch.device | str,
    amp_autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    channels_last: bool = False,
    log_every: int = 0,
    kept: list[Tensor] | None = None,
) -> dict[str, dict[str, float]]:
    """Top-1, top-5 and loss for several readings of the same logits; the model's mode is put back after.

    A scoring's columns are those of the logits that are kept (targets index into them, as in timm's validate).
    Its label sets [rows, classes] bool make ``target`` a row number: a prediction is right if it lies in the row's
    set, rows without a label are not counted, and the loss is `set_loss`.

    ``loader`` yields (input, target) of this process's part; sums are kept on the device in float64 and all-reduced
    once after the loop, so ranks may hold different numbers of batches. ``log_every`` so many batches the part so
    far is logged. ``kept`` gets the `details` [readings, B, 7] of every batch.
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
                found = torch.stack([details(output, target, *reading) for reading in readings])
            sums += found[:, :, :4].sum(1)
            if kept is not None:
                kept.append(found)
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


def details(output: Tensor, target: Tensor, columns: Tensor | None, table: Tensor | None) -> Tensor:
    """`calibration.COLUMNS` of every image of a batch, [B, 7] float64; what is not counted is 0 in the first four."""
    if columns is not None:
        output = output[:, columns]
    output = output.float()
    top = output.topk(min(5, output.shape[1]), dim=1).indices  # [B, k]
    if table is None:
        label, counted = target, torch.ones_like(target, dtype=torch.bool)
        hits, loss = top == target[:, None], F.cross_entropy(output, target, reduction="none")
    else:
        allowed = table[target] if columns is None else table[target][:, columns]
        label, counted = allowed.float().argmax(1), allowed.any(1)
        hits, loss = allowed.gather(1, top), torch.where(counted, set_loss(output, allowed), 0)
    confidence = (output.amax(1) - output.logsumexp(1)).exp()
    found = (hits[:, 0], hits.any(1), loss, counted, confidence, top[:, 0], label)
    return torch.stack([column.double() for column in found], 1)


def prepare(target: Target, entry: Entry) -> EvalImages:
    """The set; every mistake in the settings is found here, before any work."""
    return entry.images(target)


def rows(target: Target, entry: Entry) -> list[Row]:
    """top1, top5, loss and calibration error under every reading of the set's labels."""
    config, images = target.config, prepare(target, entry)
    chosen = choose(len(images), config.num_samples, config.seed, entry.first)
    scores, found = _scored(target, images, chosen, f"accuracy {entry.name}")
    told: list[Row] = []
    for (setting, values), part in zip(scores.items(), found, strict=True):
        n = int(values.pop("num_samples"))
        about: Row = {"num_samples": n} | ({"setting": setting} if setting else {})
        # The labels of ObjectNet's shards are known only now.
        mismatch = images.mismatch or (shifts.mismatch(entry.kind, images=n) if entry.kind == "objectnet" else "")
        about |= {"mismatch": mismatch} if mismatch else {}
        if images.keeps_size:
            data = target.data_config
            others = f"others {data['interpolation']}, crop_pct {data['crop_pct']:g}"
            about["preprocessing"] = f"images of {'x'.join(map(str, data['input_size'][:0:-1]))} as they are, {others}"
        part = part[part[:, 3] > 0]
        if n:  # a reading may count no image at all, as its other figures say
            values["ece"] = expected_calibration_error(part[:, 4], part[:, 0])
        for place, (key, value) in enumerate(values.items()):
            drawn = {} if key == "ece" else bounds(part[:, place] * (1 if key == "loss" else 100), config)
            told.append({"metric": key, "value": round(value, 6), **about, **drawn})
    if config.class_report and target.rank == 0:
        _report(target, entry, images, found[0])
    return told


def report_name(model: str, data_set: str) -> str:
    """What the files of --class-report are called."""
    return f"{model}-{data_set}".replace("/", "_")


def _report(target: Target, entry: Entry, images: EvalImages, part: Tensor) -> None:
    """Files of the first reading's classes; images with several right ones belong to none and are passed over."""
    columns, table = next(iter(images.scorings.values()))
    if table is not None and int(table.sum(1).max()) > 1:
        _log.warning("--class-report: images of %s have several right classes, no report", entry.name)
        return
    classes = int(target.model.num_classes) if columns is None else len(columns)  # type: ignore[arg-type]
    names = [str(index) for index in range(classes)]
    if table is not None:
        kept = range(classes) if columns is None else torch.as_tensor(columns).tolist()
        names = [shifts.synsets()[index] for index in kept]
    elif images.source.class_names:
        names[: len(images.source.class_names)] = images.source.class_names
    part = part[part[:, 3] > 0]
    name = report_name(target.name, entry.name)
    write_classes(Path(target.config.class_report), name, confusion(part[:, 6], part[:, 5], classes), names)


def _scored(
    target: Target, images: EvalImages, chosen: list[int], bar: str
) -> tuple[dict[str, dict[str, float]], Tensor]:
    """`score` of the chosen images and their `details` [readings, images, 7] on the CPU, of all processes.

    With --retry the batch is halved until it fits the memory.
    """
    config, size = target.config, target.config.batch_size
    dtype = next(target.model.parameters()).dtype
    net = compile_model(config, target.model)
    options = {"amp_autocast": target.autocast, "channels_last": config.channels_last, "log_every": config.log_freq}
    while True:
        kept: list[Tensor] = []
        loader: Iterator[Any] = ((x.to(dtype), y) for _, _, x, y in batches(target, images, chosen, size, bar=bar))
        if config.fsdp:
            mine = -(-len(share(chosen, size, target.rank, target.world)) // size)
            image = torch.zeros(1, *target.data_config["input_size"], device=target.device, dtype=dtype)
            loader = pad_batches(loader, mine, target.model, image, target.autocast)
        try:
            scores = score(net, loader, images.scorings, device=target.device, kept=kept, **options)
            break
        except torch.OutOfMemoryError:
            if not config.retry or size == 1 or target.world > 1:
                raise
            size //= 2
            _log.warning("out of memory: trying again with --batch-size %d", size)
    found = torch.zeros(len(images.scorings), len(chosen), len(COLUMNS), dtype=torch.float64)
    for k, part in enumerate(kept):
        start = (target.rank + k * target.world) * size
        found[:, start : start + part.shape[1]] = part.cpu()
    return scores, target.total(found)
