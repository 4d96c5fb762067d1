"""Top-1, top-5, loss and calibration error; the same figures for any number of processes."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from samon.errors import UserError
from samon.evals import metrics
from samon.evals.context import EvalContext, EvalDataset, choose_samples, evaluating, load_batches, predict
from samon.evals.metrics import Scoring
from samon.evals.results import Result, file_stem
from samon.files import csv_text, write_text

log = logging.getLogger("samon")
Loader = Iterable[tuple[Tensor, Tensor]]
Autocast = Callable[[], AbstractContextManager[object]]


def accuracy(
    model: nn.Module,
    loader: Loader,
    *,
    device: torch.device | str,
    amp_autocast: Autocast = nullcontext,
    channels_last: bool = False,
) -> dict[str, float]:
    """Return `{"top1", "top5", "loss", "num_samples"}` over (images, labels) batches, accuracies in %.

    The float64 sums are all-reduced once at the end, so processes may have different numbers of batches. Without any,
    as if a loader worker dies at the first one, the figures are NaN.
    """
    sums = torch.zeros(1, 4, dtype=torch.float64, device=device)  # top-1, top-5, loss, samples
    for batch in batch_metrics(model, loader, [Scoring()], device, amp_autocast, channels_last):
        sums += batch[:, :, :4].sum(1)
    if dist.is_initialized():
        dist.all_reduce(sums)
    top1, top5, loss = (sums[0, :3] * sums.new_tensor([100, 100, 1]) / sums[0, 3]).tolist()
    return {"top1": top1, "top5": top5, "loss": loss, "num_samples": int(sums[0, 3])}


@torch.no_grad()
def batch_metrics(
    model: nn.Module,
    loader: Loader,
    scorings: Iterable[Scoring],
    device: torch.device | str,
    amp_autocast: Autocast = nullcontext,
    channels_last: bool = False,
) -> Iterator[Tensor]:
    """Yield `metrics.per_sample_metrics` by every scoring, [scorings, B, 7], of each batch, in eval mode."""
    on_device = [
        Scoring(*(None if part is None else torch.as_tensor(part, device=device) for part in scoring))
        for scoring in scorings
    ]
    with evaluating(model):
        for images, target in loader:
            images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with amp_autocast():
                logits = predict(model, images)
                batch = torch.stack([metrics.per_sample_metrics(logits, target, scoring) for scoring in on_device])
            yield batch


def evaluate(context: EvalContext, dataset: EvalDataset) -> list[Result]:
    """Top-1, top-5, loss and expected calibration error by every scoring of the data set."""
    config, data = context.config, context.data_config
    tables = evaluate_samples(context, dataset)
    results: list[Result] = []
    for setting, table in zip(dataset.scorings, tables, strict=True):
        valid = table[table[:, 3] > 0]
        n = len(valid)
        if not n:  # a few images may have none in the clean subset of imagenet-a
            continue
        metadata: Result = {"num_samples": n} | ({"setting": setting} if setting else {})
        mismatch = dataset.mismatch
        if not mismatch and dataset.published_images not in (None, n):
            mismatch = f"{n} images, published {dataset.published_images}"
        if mismatch:
            metadata["mismatch"] = mismatch
        if dataset.keeps_size:
            size, others = "x".join(map(str, data["input_size"][:0:-1])), f"crop_pct {data['crop_pct']:g}"
            metadata["preprocessing"] = f"images of {size} as they are, others {data['interpolation']}, {others}"
        for column, (metric, unit) in enumerate((("top1", 100), ("top5", 100), ("loss", 1))):
            value = unit * float(valid[:, column].sum()) / n
            interval = metrics.bootstrap_interval(valid[:, column] * unit, config.bootstrap, config.seed)
            results.append({"metric": metric, "value": round(value, 6), **metadata, **interval})
        ece = metrics.expected_calibration_error(valid[:, 4], valid[:, 0])
        results.append({"metric": "ece", "value": round(ece, 6), **metadata})
    if not results:
        raise UserError("nothing to evaluate: no sample has a label; check the split")
    if config.class_report and context.rank == 0:
        write_class_report(context, dataset, tables[0])
    return results


def evaluate_samples(context: EvalContext, dataset: EvalDataset) -> Tensor:
    """Metrics of the chosen images [scorings, images, 7] on the CPU, in the same order for any number of processes."""
    config, rank, world_size = context.config, context.rank, context.world_size
    samples = choose_samples(len(dataset), config.num_samples, config.seed, dataset.limit)
    dtype, batch_size = next(context.model.parameters()).dtype, config.batch_size
    batches = load_batches(context, dataset, samples, batch_size, progress=f"accuracy {dataset.name}")
    loader: Iterator[tuple[Tensor, Tensor]] = ((images.to(dtype), labels) for _, _, images, labels in batches)
    if config.fsdp:
        steps = len(range(rank * batch_size, len(samples), world_size * batch_size))  # as in `shard_samples`
        image = torch.zeros(1, *context.data_config["input_size"], device=context.device, dtype=dtype)
        loader = pad_batches(loader, steps, context.model, image, context.autocast)
    model = context.model if context.compiled is None else context.compiled
    options = context.device, context.autocast, config.channels_last
    shape = len(dataset.scorings), len(samples), len(metrics.COLUMNS)
    table = torch.zeros(shape, dtype=torch.float64, device=context.device)
    for k, batch in enumerate(batch_metrics(model, loader, dataset.scorings.values(), *options)):
        start = (rank + k * world_size) * batch_size
        table[:, start : start + batch.shape[1]] = batch
        if (k + 1) % config.log_freq == 0:
            top1, _, loss, valid = table[0, :, :4].sum(0).tolist()
            count = max(valid, 1)
            log.info("eval batch %d: loss %.4f top1 %.2f", k + 1, loss / count, 100 * top1 / count)
    return context.all_reduce(table).cpu()


@torch.no_grad()
def pad_batches(
    batches: Iterator[tuple[Tensor, Tensor]], length: int, model: nn.Module, image: Tensor, autocast: Autocast
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's `length` batches, followed by as many forward passes of one image [1, C, H, W] as the longest
    process has more batches, since a forward pass of a sharded model gathers parameters from all processes."""
    longest = torch.tensor([length], device=image.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    count = 0  # fewer than `length` after a signal
    for batch in batches:
        yield batch
        count += 1
    for _ in range(int(longest) - count):
        with autocast():
            model(image)


def write_class_report(context: EvalContext, dataset: EvalDataset, table: Tensor) -> None:
    """Write `NAME-per_class.csv` (class, name, images, top1) and `NAME-confusion.csv` (a row per true class).

    Sets whose images have several right classes get no report.
    """
    classes, label_sets = next(iter(dataset.scorings.values()))
    if label_sets is not None and int(label_sets.sum(1).max()) > 1:
        log.warning("--class-report: images of %s have several right classes, no report", dataset.name)
        return
    num_classes = context.num_classes if classes is None else len(classes)
    names = (dataset.class_names or [])[:num_classes]
    names += map(str, range(len(names), num_classes))
    valid = table[table[:, 3] > 0]
    matrix = metrics.confusion_matrix(valid[:, 6], valid[:, 5], num_classes)
    counts, correct = matrix.sum(1).tolist(), matrix.diagonal().tolist()
    top1 = [100 * hits / count if count else "" for count, hits in zip(counts, correct, strict=True)]
    rows = zip(range(num_classes), names, counts, top1, strict=True)
    directory, stem = Path(context.config.class_report), file_stem(context.name, dataset.name)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / f"{stem}-per_class.csv", csv_text([("class", "name", "images", "top1"), *rows]))
    lines = [[name, *row] for name, row in zip(names, matrix.tolist(), strict=True)]
    write_text(directory / f"{stem}-confusion.csv", csv_text([["", *names], *lines]))
