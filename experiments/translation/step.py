"""One update from micro-batches with different numbers of tokens; its loss is the mean over all tokens."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

import samon

Loss = Callable[[], Tensor]


def fill_gradients(optimizer: Optimizer, losses: Sequence[Loss], tokens: Sequence[int], m_sharpness: str) -> Tensor:
    """Add the gradient of the update's token mean to `.grad`, at w + eps for samon's optimizers.

    With n_k tokens in micro-batch k, L_k its token mean and N = sum n_k, the update's loss is L = sum_k n_k/N L_k.
    `two_pass` itself weights micro-batches equally, so it is given the weights:

    - `micro`: every micro-batch has its own perturbation, from its own token mean L_k (m-sharpness with m tokens of
      the micro-batch). K calls, the k-th with `loss_scale=n_k/N`, which leaves the ascent gradient alone.
    - `global`: one perturbation, from the gradient of L. One call with K losses K n_k/N L_k, whose equal mean is L.

    Args:
        losses: each the mean over its micro-batch's target tokens, shape [].
        tokens: how many target tokens each is the mean over.

    Returns:
        L at w in nats per token, shape [], detached.
    """
    weighted = [(n / sum(tokens), loss) for n, loss in zip(tokens, losses, strict=True)]
    if samon.sam_of(optimizer) is None:
        parts = []
        for share, loss in weighted:
            parts.append(share * loss())
            parts[-1].backward()
        return torch.stack(parts).sum().detach()
    if m_sharpness == "global":
        return samon.two_pass(optimizer, [partial(_times, len(losses) * share, loss) for share, loss in weighted])
    return torch.stack([share * samon.two_pass(optimizer, loss, loss_scale=share) for share, loss in weighted]).sum()


def _times(factor: float, loss: Loss) -> Tensor:
    return factor * loss()


def inverse_sqrt(update: int, lr: float, warmup: int) -> float:
    """Learning rate of an update, counted from 0: linear to `lr` over `warmup` updates, then lr sqrt(warmup/update)."""
    return lr * min((update + 1) / warmup, (warmup / (update + 1)) ** 0.5)
