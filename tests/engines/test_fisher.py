"""The Fisher diagonal of SSAM-F against a loop in float64, on one process and two. Tolerance 1e-12: sums of squares."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor

from samon.engines.masks import fisher_diagonal
from tests.nets import LayerNormNet, batch, randomized
from tests.processes import run_ranks


def diagonal(part: slice) -> list[Tensor]:
    torch.manual_seed(0)
    model = randomized(LayerNormNet())
    opt = create_optimizer_v2(model, "ssam-f", lr=0.1)
    x, y = batch(6)
    pairs = zip(x[part].split(1), y[part].split(1), strict=True)
    return fisher_diagonal(opt, [partial(lambda a, b: F.cross_entropy(model(a), b), a, b) for a, b in pairs])


def rank_diagonal(rank: int) -> list[Tensor]:
    return diagonal(slice(3 * rank, 3 * rank + 3))


def test_sum_of_squared_gradients_of_single_samples() -> None:
    torch.manual_seed(0)
    model = randomized(LayerNormNet())
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    x, y = batch(6)
    for i in range(6):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        total = {n: t + dict(model.named_parameters())[n].grad ** 2 for n, t in total.items()}
    ranks = run_ranks(rank_diagonal, 2)
    for found in (diagonal(slice(None)), *ranks):
        for got, want in zip(found, total.values(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-16)
