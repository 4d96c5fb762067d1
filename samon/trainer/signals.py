"""Signals and timed saves, agreed between the processes: all of them stop, or save, after the same update."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from samon.data.corrupt import WorkerError
from samon.errors import Stopped
from samon.trainer.checkpoint import CheckpointManager
from samon.trainer.distributed import gloo_group

FAULT = 255  # by which the processes tell each other of a fault; larger than the number of any signal
# Windows has no SIGUSR1.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
T = TypeVar("T")


class SignalHandler:
    """Catches the first signal; a second one exits at once.

    What one process knows reaches the others through an all-reduce of two integers on the CPU. It is started after
    an update and read after the next one, so nothing waits for it and the accelerator never takes part.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        """`minutes`: interval of the timed saves; 0 for none."""
        self.signum = 0
        self.fault: WorkerError | None = None
        self.group = gloo_group()
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._period, self._saved = minutes * 60, time.monotonic()  # seconds
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + number)
        self.signum = number

    def close(self) -> None:
        """Restore the previous handlers and wait for the pending all-reduce."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None:
            with contextlib.suppress(RuntimeError):  # the other processes may be gone: another error says why
                self._pending[1].wait()

    def fail(self, error: WorkerError) -> None:
        """Let all processes save and end because of an error of this one, as they do after a signal."""
        self.fault = error
        self.signum = self.signum or FAULT

    def stop(self, signum: int, checkpoints: CheckpointManager) -> NoReturn:
        """End the run after `signum`, once its state is written."""
        checkpoints.wait()
        if signum != FAULT:
            raise Stopped(signum, f"continue with --resume {checkpoints.directory}")
        raise self.fault or WorkerError("another process failed")

    def poll(self) -> tuple[int, bool]:
        """`(signal to stop for or 0, whether a timed save is due)`, the same on all processes; call after an update."""
        signum, save = self.signum, bool(self._period) and time.monotonic() - self._saved > self._period
        if self.group is not None:
            flags = torch.tensor([signum, int(save)])
            before = self._pending
            self._pending = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, self.group, async_op=True)
            if before is None:
                return 0, False
            before[1].wait()
            signum, save = before[0].tolist()
        if save:
            self._saved = time.monotonic()
        return signum, bool(save)

    def agree(self) -> int:
        """The largest signal that any process has caught; every process must call it."""
        flag = torch.tensor([self.signum])
        if self.group is not None:
            dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        return int(flag)

    def until_signal(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches` up to the one in which this process catches a signal; `agree()` tells the others."""
        try:
            for batch in batches:
                yield batch
                if self.signum:
                    return
        except WorkerError as error:
            self.fail(error)

    def reduce(self, sums: torch.Tensor) -> None:
        """Sum a CPU tensor over the processes, in place."""
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
