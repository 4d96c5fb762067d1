"""What an epoch and its windows measure: means over samples, images per second, the time spent waiting."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from samon.trainer.state import Progress


class Meter:
    """Means of device scalars over the samples of a window and of the epoch.

    Values are kept as tensors and read in one transfer when a line is due, so that no update waits for the device.
    """

    def __init__(self, progress: Progress) -> None:
        self.sums = progress.sums  # {name: sum over samples, name + '/n': samples}, saved with the state
        self.outcomes: list[bool | Tensor] = []  # whether updates were applied, as far as the host has not looked yet
        self._window: list[tuple[int | Tensor, dict[str, Tensor]]] = []

    def add(self, samples: int, values: dict[str, Tensor], applied: bool | Tensor = True) -> None:
        """An update's values; those of one that was not applied do not count."""
        self.outcomes.append(applied)
        if isinstance(applied, Tensor):
            values = {name: torch.where(applied, value, 0) for name, value in values.items()}
            self._window.append((samples * applied, values))
        elif applied:
            self._window.append((samples, values))

    def read(self, reduce: Callable[[Tensor], None]) -> dict[str, float]:
        """Means of the window over all processes; adds it to the epoch. Every process must call it.

        reduce: sums a float64 CPU tensor over the processes, in place.
        """
        names = sorted({name for _, values in self._window for name in values})
        totals = []
        for name in names:
            rows = [(n, values[name]) for n, values in self._window if name in values]
            stacked = torch.stack([value.detach().float() for _, value in rows]).double().cpu()
            weights = torch.stack([torch.as_tensor(n) for n, _ in rows]).double().cpu()
            totals += [(stacked * weights).sum(), weights.sum()]
        self._window.clear()
        if not totals:
            return {}
        both = torch.stack(totals)
        reduce(both)
        means = {}
        for name, (total, weight) in zip(names, both.view(-1, 2).tolist(), strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.sums[f"{name}/n"] = self.sums.get(f"{name}/n", 0.0) + weight
            means[name] = total / weight if weight else float("nan")
        return means

    def epoch_mean(self, name: str) -> float | None:
        return self.sums[name] / self.sums[f"{name}/n"] if name in self.sums else None


class Clock:
    """Images per second and the share of time spent waiting for data, since the last reading."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self._samples, self._waited, self._since = progress, progress.samples, 0.0, time.monotonic()

    def timed(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        before = time.monotonic()
        for batch in batches:
            self._waited += time.monotonic() - before
            yield batch
            before = time.monotonic()

    def read(self) -> tuple[float, float]:
        now, samples = time.monotonic(), self.progress.samples
        passed = max(now - self._since, 1e-9)
        result = (samples - self._samples) / passed, self._waited / passed
        self._samples, self._waited, self._since = samples, 0.0, now
        return result
