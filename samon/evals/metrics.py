"""Figures of a classification: hits and losses per sample, calibration, bootstrap intervals, confusion matrices."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = ("top1", "top5", "loss", "valid", "confidence", "predicted", "label")  # of `per_sample_metrics`


class Scoring(NamedTuple):
    """How logits [B, C] are compared with labels.

    Attributes:
        classes: predictions are restricted to these classes (all if None); a label is an index among them, as in
            timm's validate.
        label_sets: the classes that are right for each label, bool [labels, C]. None: a label is the class.
    """

    classes: Tensor | list[int] | None = None
    label_sets: Tensor | None = None


def per_sample_metrics(logits: Tensor, target: Tensor, scoring: Scoring) -> Tensor:
    """`COLUMNS` per sample, float64 [B, 7]. Samples without a right class are not valid: their first four are 0.

    The loss is -log of the summed probability of the right classes: cross-entropy if one class is right.
    """
    classes, label_sets = scoring
    logits = (logits if classes is None else logits[:, classes]).float()
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, k]
    if label_sets is None:
        label, valid = target, torch.ones_like(target, dtype=torch.bool)
        hits, loss = top == target[:, None], F.cross_entropy(logits, target, reduction="none")
    else:
        right = label_sets[target] if classes is None else label_sets[target][:, classes]
        label, valid = right.float().argmax(1), right.any(1)
        loss = logits.logsumexp(1) - logits.masked_fill(~right, float("-inf")).logsumexp(1)
        hits, loss = right.gather(1, top), torch.where(valid, loss, 0)
    confidence = (logits.amax(1) - logits.logsumexp(1)).exp()
    columns = (hits[:, 0], hits.any(1), loss, valid, confidence, top[:, 0], label)
    return torch.stack([column.double() for column in columns], 1)


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error in %: sum over bins of (fraction of samples) |accuracy - mean confidence|.

    Guo et al. 2017, "On calibration of modern neural networks", equation 3. The bins have equal width and include
    their upper edge, as published.

    Args:
        confidence: [N] in (0, 1].
        correct: [N], 0 or 1.
    """
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, correct.double() - confidence.double())
    return 100 * float(gaps.abs().sum()) / len(confidence)


def bootstrap_interval(values: Tensor, draws: int, seed: int) -> dict[str, float]:
    """95 % interval of the mean of `values` [N]: the 2.5 % and 97.5 % quantiles of `draws` resampled means, as the
    columns `low` and `high` of a result; none without draws."""
    if not draws:
        return {}
    generator = torch.Generator().manual_seed(seed)
    n, values = len(values), values.double()
    means = [values[torch.randint(n, (n,), generator=generator)].mean() for _ in range(draws)]
    low, high = torch.quantile(torch.stack(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"low": low, "high": high}


def confusion_matrix(label: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Number of images by true class (row) and predicted class (column), int64 [num_classes, num_classes]."""
    flat = label.long() * num_classes + predicted.long()
    return torch.bincount(flat, minlength=num_classes**2).view(num_classes, num_classes)
