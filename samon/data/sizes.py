"""Training at several image sizes: each batch has one, by timm's schedule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import SequentialSampler


@dataclass(frozen=True)
class SizeSchedule:
    """Which size each batch of an epoch has, the same on all processes and known without history.

    Args:
        sizes: side lengths in pixels; weights: their probabilities (uniform if None).
        progressive: the choice moves from the first size to the last over `epochs`, a window of width `spread` (in
            choices) around it, with a share `random_mix` of uniform choice.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None
    batches: int  # per epoch
    seed: int
    progressive: bool
    epochs: int
    spread: float
    random_mix: float

    @lru_cache(maxsize=2)  # noqa: B019 - one or two schedules live as long as the process
    def choices(self, epoch: int) -> tuple[int, ...]:
        """Index into `sizes` of each of the epoch's batches."""
        sampler = ScheduledBatchSampler(
            SequentialSampler(range(self.batches)),
            batch_sizes=[1] * len(self.sizes),
            choice_weights=self.weights,
            seed=self.seed,
            num_batches=self.batches,
            choice_schedule="progressive" if self.progressive else "constant",
            schedule_epochs=self.epochs,
            schedule_spread=self.spread,
            schedule_random_mix=self.random_mix,
        )
        sampler.set_epoch(epoch)
        return tuple(choice for [(_, choice)] in sampler)


class SizedTransform:
    """The transform of the current batch's size; the stream says which batch begins."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]], schedule: SizeSchedule) -> None:
        self.transforms, self.schedule, self.current = transforms, schedule, 0

    def begin_batch(self, epoch: int, batch: int) -> None:
        self.current = self.schedule.choices(epoch)[batch]

    def __call__(self, image: Any) -> Any:
        return self.transforms[self.current](image)
