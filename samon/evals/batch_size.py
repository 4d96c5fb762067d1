"""The batch size that fills a device: images per second are measured while the batch doubles."""

import logging
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger("samon")


def fastest(rate: Callable[[int], float | None], most: int) -> int:
    """The size (1, 2, 4, ... at most ``most``) of the highest ``rate``, as far as a doubling gains at least 5 %.

    ``rate`` gives None where the memory does not hold the size. Two doublings without a gain end the search, as one
    alone may be an unlucky measurement.
    """
    best, best_rate, size, idle = 1, 0.0, 1, 0
    while size <= most and idle < 2:
        found = rate(size)
        if found is None:
            break
        if found > 1.05 * best_rate:
            best, best_rate, idle = size, found, 0
        else:
            idle += 1
        size *= 2
    return best


def gradient_rate(model: nn.Module, image: Tensor) -> Callable[[int], float | None]:
    """Images per second of loss and gradient with respect to the image [C, H, W]: what an attack's iteration costs."""

    def once(images: Tensor) -> None:
        with torch.enable_grad():
            images.requires_grad_()
            logits = model(images)
            torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)

    def rate(size: int) -> float | None:
        try:
            images = image.expand(size, *image.shape).clone()
            once(images.detach())  # the first call also chooses algorithms
            start, count = time.perf_counter(), 0
            while count < 3 or time.perf_counter() - start < 0.2:
                once(images.detach())
                count += 1
        except torch.OutOfMemoryError:
            return None
        found = count * size / (time.perf_counter() - start)
        log.info("batch size search: %d images at once, %.1f images/s", size, found)
        return found

    return rate
