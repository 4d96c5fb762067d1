"""What can go wrong while data are read: faulty samples, which are counted, and loader workers that die."""

import errno
import logging
import shutil

import torch

from samon.errors import RunError, UserError

_logger = logging.getLogger(__name__)

_LOGGED = 5  # faults named in the log, per process and epoch; the rest is only counted
_SLOTS = 512  # most workers a process can have


class DataError(UserError):
    """The data cannot be used as it is; the message says which file and what to do."""


class SampleError(DataError):
    """One sample is unusable. Training skips and counts it, evaluation stops."""


class ShardError(SampleError):
    """A shard is damaged: samples that its index promises cannot be read."""


class ImageError(SampleError):
    """The bytes are no image that can be decoded."""


class ImageTooLargeError(ImageError):
    """The image has more pixels or bytes than any photograph: a decompression bomb or damage."""


class LabelError(SampleError):
    """The label is missing, no integer, or not a class."""


class WorkerError(RunError):
    """A loader worker was killed or could not hand over its batch; nothing is wrong with the data."""


def explain_worker_error(error: Exception) -> Exception:
    """What ended a loader, in one line: without a worker's traceback, and with what to do where a worker was lost."""
    text = str(error)
    if isinstance(error, UserError):
        _, _, said = text.strip().rpartition("\n")[2].partition("Error: ")
        return type(error)(said if said and "Traceback" in text else text)
    full = "shared memory" in text and "No space left" in text  # PyTorch's words; Python's semaphores have a number
    if full or "Bus error" in text or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        size = shutil.disk_usage("/dev/shm").total >> 20
        return WorkerError(
            f"/dev/shm, {size} MiB, is full: loader workers hand over their batches through it; give it more "
            "(docker run --shm-size 8g), or use --workers 0"
        )
    if "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text):
        return WorkerError(
            "a loader worker was killed, as the system does when memory runs out; use fewer --workers, or less memory "
            "in each (--shuffle-buffer, --batch-size)"
        )
    return error


class CorruptSampleCounter:
    """Faulty samples of one process, counted over its loader workers in shared memory.

    ``limit`` is the fraction of ``samples`` (this process's samples per epoch) that may be faulty in one epoch.
    """

    def __init__(self, limit: float, samples: int = 0) -> None:
        if not 0 <= limit <= 1:
            raise UserError(f"the fraction of bad samples allowed is {limit}; give one between 0 and 1")
        self.limit = limit
        self.samples = samples
        # One row per worker, so that no two processes write the same number. Columns: in this epoch, ever.
        self._counts = torch.zeros(_SLOTS, 2, dtype=torch.int64).share_memory_()

    def new_epoch(self) -> None:
        """Start the epoch's count again."""
        self._counts[:, 0] = 0

    @property
    def total(self) -> int:
        """Faulty samples met so far."""
        return int(self._counts[:, 1].sum())

    def add(self, worker: int, error: SampleError) -> None:
        """Count one faulty sample, name the first few in the log.

        Raises:
            DataError: more than the fraction allowed.
        """
        self._counts[worker] += 1
        count = int(self._counts[:, 0].sum())
        if count <= _LOGGED:
            _logger.warning("bad sample skipped: %s: %s", type(error).__name__, error)
        if count > self.limit * self.samples:
            allowed = f"{self.limit:g} of the {self.samples} that this process reads"
            last = f"{type(error).__name__}: {error}; repair the data or raise --max-bad-samples"
            raise DataError(f"{count} bad samples in this epoch, more than {allowed}; last: {last}")
