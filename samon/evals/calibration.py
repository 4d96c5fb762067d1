"""What one pass over the images tells beside the means: calibration, intervals, classes taken for each other."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samon.files import csv_text, write_text

COLUMNS = ("top1", "top5", "loss", "counted", "confidence", "predicted", "label")  # of `details` [N, 7], float64


def expected_calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """Sum over equal bins of confidence of (share of the images) |accuracy - mean confidence|, in %.

    Guo et al. 2017, "On calibration of modern neural networks", equation 3. ``confidence`` [N] in (0, 1]; ``right``
    [N], 0 or 1. Bins are closed above, as published.
    """
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right.double() - confidence.double())
    return 100 * float(gaps.abs().sum()) / len(confidence)


def interval(values: Tensor, draws: int, seed: int) -> tuple[float, float]:
    """Bounds of the mean of ``values`` [N] by bootstrap over images: 2.5 % and 97.5 % of ``draws`` resampled means."""
    generator = torch.Generator().manual_seed(seed)
    n, values = len(values), values.double()
    means = [values[torch.randint(n, (n,), generator=generator)].mean() for _ in range(draws)]
    low, high = torch.quantile(torch.stack(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def bounds(values: Tensor, config: Any) -> dict[str, float]:
    """`interval` as the columns of a row, where --bootstrap asks for it and there are values."""
    if not config.bootstrap or not len(values):
        return {}
    return dict(zip(("low", "high"), interval(values, config.bootstrap, config.seed), strict=True))


def confusion(label: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """[classes, classes] int64: how many images of the row's class were taken for the column's."""
    return torch.bincount(label.long() * classes + predicted.long(), minlength=classes**2).view(classes, classes)


def write_classes(directory: Path, name: str, matrix: Tensor, names: list[str]) -> None:
    """``NAME-per_class.csv``: class, name, images, top1 in %; ``NAME-confusion.csv``: a row for each true class."""
    counts, right = matrix.sum(1).tolist(), matrix.diagonal().tolist()
    top1 = [100 * hits / count if count else "" for count, hits in zip(counts, right, strict=True)]
    lines = zip(range(len(matrix)), names, counts, top1, strict=True)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / f"{name}-per_class.csv", csv_text([("class", "name", "images", "top1"), *lines]))
    table = [[said, *row] for said, row in zip(names, matrix.tolist(), strict=True)]
    write_text(directory / f"{name}-confusion.csv", csv_text([["", *names], *table]))
