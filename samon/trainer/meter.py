"""Means over the samples of an epoch, images per second, and the time spent waiting for data."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from samon.trainer.state import Progress


class Meter:
    """Means of device scalars over the samples of a log interval and of the epoch.

    Values stay tensors until a line is logged and are then read in one transfer, so that no update waits for the
    device; timm's AverageMeter takes numbers, which would read every value at every update.
    """

    def __init__(self, progress: Progress) -> None:
        self.sums = progress.sums  # {name: sum over samples, name + '/n': samples}, saved with the state
        self.outcomes: list[bool | Tensor] = []  # whether the updates that the host has not counted yet were applied
        self._interval: dict[str, float] = {}  # as `sums`, of the log interval
        self._updates: list[tuple[int | Tensor, dict[str, Tensor]]] = []  # in neither of them yet

    def add(self, samples: int, values: dict[str, Tensor], applied: bool | Tensor = True) -> None:
        """Add the values of an update; those of a skipped update do not count."""
        self.outcomes.append(applied)
        if isinstance(applied, Tensor):
            values = {name: torch.where(applied, value, 0) for name, value in values.items()}
            self._updates.append((samples * applied, values))
        elif applied:
            self._updates.append((samples, values))

    def flush(self, reduce: Callable[[Tensor], None]) -> None:
        """Add the updates to the sums, over all processes, every one of which must call this.

        Args:
            reduce: sums a float64 CPU tensor over the processes, in place.
        """
        totals: dict[str, Tensor] = {}
        for name in sorted({name for _, values in self._updates for name in values}):
            rows = [(n, values[name]) for n, values in self._updates if name in values]
            stacked = torch.stack([value.detach().float() for _, value in rows]).double().cpu()
            weights = torch.stack([torch.as_tensor(n) for n, _ in rows]).double().cpu()
            totals |= {name: (stacked * weights).sum(), f"{name}/n": weights.sum()}
        self._updates.clear()
        if totals:
            reduce(reduced := torch.stack([*totals.values()]))
            for sums in (self.sums, self._interval):
                sums |= {k: sums.get(k, 0.0) + v for k, v in zip(totals, reduced.tolist(), strict=True)}

    def read(self, reduce: Callable[[Tensor], None]) -> dict[str, float]:
        """Means over the log interval, which ends; all processes call this (`flush`)."""
        self.flush(reduce)
        sums, self._interval = self._interval, {}
        return {name: _mean(sums, name) for name in sums if not name.endswith("/n")}

    def epoch_mean(self, name: str) -> float | None:
        """The mean of a value over the epoch so far; None if it has none."""
        return _mean(self.sums, name) if name in self.sums else None


def _mean(sums: dict[str, float], name: str) -> float:
    return sums[name] / sums[f"{name}/n"] if sums[f"{name}/n"] else float("nan")


class Timer:
    """Images per second and the fraction of time spent waiting for data, since the last reading."""

    def __init__(self, progress: Progress, images_per_sample: float = 1) -> None:
        self.progress, self.images_per_sample = progress, images_per_sample
        self._samples, self._waited, self._since = progress.samples, 0.0, time.monotonic()

    def timed(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches; waiting for them is timed."""
        before = time.monotonic()
        for batch in batches:
            self._waited += time.monotonic() - before
            yield batch
            before = time.monotonic()

    def read(self) -> tuple[float, float]:
        """`(images per second over all processes, fraction of time spent waiting)`; starts anew."""
        now, samples = time.monotonic(), self.progress.samples
        passed = max(now - self._since, 1e-9)
        images = (samples - self._samples) * self.images_per_sample
        result = images / passed, self._waited / passed
        self._samples, self._waited, self._since = samples, 0.0, now
        return result
