"""Errors in the data: corrupt samples, which training skips and counts, and loader workers that die."""

import errno
import logging
import shutil

import torch

from samon.errors import RunError, UserError

_logger = logging.getLogger(__name__)

_MAX_LOGGED = 5  # corrupt samples logged per process and epoch; the others are only counted
_MAX_WORKERS = 512  # per process


class DataError(UserError):
    """The data cannot be used as they are; the message names the file and says what to do."""


class SampleError(DataError):
    """One sample is unusable: a damaged shard, bytes that are no image or too large a one, a label that is no class.

    Training skips and counts it, evaluation stops.
    """


class WorkerError(RunError):
    """A loader worker was killed or could not hand over its batch; nothing is wrong with the data."""


def explain_worker_error(error: Exception) -> Exception:
    """Return the error that ended a loader as one line: without the worker's traceback, and with what to do."""
    text = str(error)
    if isinstance(error, UserError):
        _, _, message = text.strip().rpartition("\n")[2].partition("Error: ")
        return type(error)(message if message and "Traceback" in text else text)
    full = "shared memory" in text and "No space left" in text  # PyTorch's words; Python's semaphores set errno
    if full or "Bus error" in text or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        size = shutil.disk_usage("/dev/shm").total >> 20
        return WorkerError(
            f"/dev/shm, {size} MiB, is full: loader workers hand over their batches through it; enlarge it "
            "(docker run --shm-size 8g), or use --workers 0"
        )
    if "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text):
        return WorkerError(
            "a loader worker was killed, as the system does when memory runs out; use fewer --workers, or less memory "
            "in each (--shuffle-buffer, --batch-size)"
        )
    return error


class CorruptSampleCounter:
    """Counts the corrupt samples of one process over its loader workers, in shared memory.

    Args:
        limit: largest fraction of `samples` that may be corrupt in one epoch.
        samples: samples that this process reads per epoch.
    """

    def __init__(self, limit: float, samples: int = 0) -> None:
        if not 0 <= limit <= 1:
            raise UserError(f"the fraction of corrupt samples allowed is {limit}; it must be between 0 and 1")
        self.limit = limit
        self.samples = samples
        # One row per worker, so that no two processes write the same number. Columns: this epoch, the whole run.
        self._counts = torch.zeros(_MAX_WORKERS, 2, dtype=torch.int64).share_memory_()

    def start_epoch(self) -> None:
        """Reset the epoch's count."""
        self._counts[:, 0] = 0

    @property
    def total(self) -> int:
        """Corrupt samples of the whole run."""
        return int(self._counts[:, 1].sum())

    def add(self, worker: int, error: SampleError) -> None:
        """Count a corrupt sample, and log it if it is one of the epoch's first.

        Raises:
            DataError: the limit is exceeded.
        """
        self._counts[worker] += 1
        count = int(self._counts[:, 0].sum())
        if count <= _MAX_LOGGED:
            _logger.warning("corrupt sample skipped: %s", error)
        if count > self.limit * self.samples:
            raise DataError(
                f"{count} corrupt samples in this epoch, more than {self.limit:g} of the {self.samples} that this "
                f"process reads; last: {error}; repair the data or raise --max-corrupt-samples"
            )
