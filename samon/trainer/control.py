"""Signals and timed saves, agreed between processes: all of them stop, or save, after the same update."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from samon.data.corrupt import WorkerError
from samon.errors import RunError, Stopped
from samon.trainer.checkpoint import CheckpointManager

FAULT = signal.SIGCHLD  # stands for a fault among the signals, which the processes tell each other
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
T = TypeVar("T")


class Control:
    """Catches the first signal; a second one exits at once.

    What one process knows reaches the others by an all-reduce of two integers on the CPU. It is started after
    an update and read after the next one, so nothing waits for it and the accelerator never takes part.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        """`minutes`: a save is due that often; 0 for never."""
        self.signum = 0
        self.fault: RunError | None = None
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._period = minutes * 60
        self._saved = time.monotonic()
        self._previous = {number: signal.signal(number, self._caught) for number in SIGNALS}

    def fail(self, error: RunError) -> None:
        """Have all processes save and end for a fault of this one, as they do for a signal."""
        self.fault = error
        self.signum = self.signum or FAULT

    def reason(self, signum: int, checkpoints: CheckpointManager) -> Exception:
        """What a run that ends for `signum` raises; its state is saved."""
        if signum != FAULT:
            return Stopped(signum, f"continue with --resume {checkpoints.directory}")
        return RunError(f"{self.fault or 'another process has a fault'}; {checkpoints.describe_last_good()}")

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + number)
        self.signum = number

    def close(self) -> None:
        """Give the signals back; wait for what is under way."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None:
            with contextlib.suppress(RuntimeError):  # the others may be gone: whatever ends this run says why
                self._pending[1].wait()

    def poll(self) -> tuple[int, bool]:
        """(signal to stop for or 0, whether a timed save is due), the same on all processes; call after an update."""
        signum, save = self.signum, bool(self._period) and time.monotonic() - self._saved > self._period
        if self.group is not None:
            flags = torch.tensor([signum, int(save)])
            before = self._pending
            self._pending = (flags, dist.all_reduce(flags, dist.ReduceOp.MAX, self.group, async_op=True))
            if before is None:
                return 0, False
            before[1].wait()
            signum, save = before[0].tolist()
        if save:
            self._saved = time.monotonic()
        return signum, bool(save)

    def agree(self) -> int:
        """The largest of all processes' caught signals; every process must call it."""
        flag = torch.tensor([self.signum])
        if self.group is not None:
            dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        return int(flag)

    def reduce(self, sums: torch.Tensor) -> None:
        """Sum a CPU tensor over the processes, in place."""
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)

    def until_signal(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches`, ending after the current one once this process has a signal; `agree()` tells the others."""
        try:
            for batch in batches:
                yield batch
                if self.signum:
                    return
        except WorkerError as error:
            self.fail(error)

    def gather(self, item: T) -> list[T] | None:
        """Every process's item, by rank, on rank 0; None elsewhere."""
        if self.group is None:
            return [item]
        items: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(item, items, dst=0, group=self.group)
        return items
