"""`create_dataset` and `create_loader`: timm's arguments, our streams, timm's transforms and device prefetcher."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, default_collate, get_worker_info

from samon import rng
from samon.data.corrupt import DataError, WorkerError, explain_worker_error
from samon.data.decode import Transform, choose_decoder, decode_pil
from samon.data.source_factory import open_source
from samon.data.sources import ShardSource
from samon.data.stream import IndexedStream, SampleStream, ShardStream, SizedTransform, process_rank, sample_seed
from samon.data.transforms import create_transform
from samon.errors import UserError

_logger = logging.getLogger(__name__)


def create_dataset(
    name: str,
    root: str | None = None,
    split: str = "validation",
    *,
    is_training: bool = False,
    batch_size: int = 1,
    seed: int = 42,
    input_img_mode: str = "RGB",
    num_samples: int | None = None,
    num_classes: int | None = None,
    repeats: float = 0,
    sample_split: bool = False,
    shuffle_buffer: int = 2048,
    max_corrupt_fraction: float = 0.001,
    rank: int | None = None,
    world_size: int | None = None,
    **source_options: Any,
) -> SampleStream:
    """Return the samples of a split, as this rank reads them; timm's arguments and names, and:

    Args:
        num_classes: labels must be less (default: the number in the data).
        num_samples: samples per pass, whatever the split has (evaluation: at most what it has).
        repeats: passes per epoch of training; below 1 it is one.
        sample_split: allow fewer shards than processes x workers.
        shuffle_buffer: encoded samples per worker for shuffling shards.
        max_corrupt_fraction: of an epoch's training samples; evaluation stops at the first corrupt one.
        rank, world_size: both or neither; default to torch.distributed's.
        **source_options: timm's class_map, input_key, target_key, download and trust_remote_code; for remote shards
            shard_cache (a directory for copies), shard_cache_size (its largest size, bytes), and allow_shell_urls,
            which allows `pipe:` URLs.
    """
    if rank is None or world_size is None:
        rank, world_size = process_rank()
    source = open_source(name, root, split, **source_options)
    if num_samples and not is_training and num_samples > len(source):
        raise UserError(f"{num_samples} samples requested, the split has {len(source)}")
    make: Callable[..., SampleStream] = IndexedStream
    if isinstance(source, ShardSource):
        make = partial(ShardStream, buffer=shuffle_buffer, sample_split=sample_split)
    return make(
        source=source,
        size=int((num_samples or len(source)) * (max(1, repeats) if is_training else 1)),
        is_training=is_training,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_classes=num_classes or source.num_classes,
        max_corrupt_fraction=max_corrupt_fraction,
        image_mode=input_img_mode,
        decode=partial(decode_pil, mode=input_img_mode),
    )


class SeededErasing:
    """timm's random erasing, with a seed for each batch.

    It runs in the main process one batch ahead of training. If it drew from the process's generators, a resumed run
    would differ from an uninterrupted one.
    """

    def __init__(self, erasing: Callable[[Tensor], Tensor], stream: SampleStream, device: torch.device) -> None:
        self.erasing, self.stream, self.device = erasing, stream, device
        self.batch = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Erase in place, [B, C, H, W]."""
        seed = sample_seed(self.stream.seed, int(self.stream.state[0]), self.batch, self.stream.rank, 1)
        self.batch += 1
        with rng.fork(self.device):
            rng.seed(seed, self.device)
            return self.erasing(images)


def ignore_signals(_: int) -> None:
    """Let a worker outlive signals sent to the whole process group: the trainer ends it after its update."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "win32":  # the other signals are POSIX's
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # only the thread below receives it
    threading.Thread(target=_exit_on_request, args=(os.getppid(),), daemon=True).start()


def _exit_on_request(trainer: int) -> None:
    while True:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == trainer:
            os._exit(0)


def collate_shared(collate: Callable[..., object], samples: object) -> object:
    """Collate a batch, a worker's in shared memory.

    PyTorch moves it there later, in a thread of the worker, where too little shared memory raises an error that is
    lost: the main process would wait forever.
    """
    batch = collate(samples)
    return batch if get_worker_info() is None else tree_map_only(Tensor, Tensor.share_memory_, batch)


@contextmanager
def _no_child_handler() -> Iterator[None]:
    """Undo that PyTorch handles the end of its workers, where it did.

    Its handler raises wherever the main thread is when a worker dies, also within an update; without it the death is
    noticed when the next batch is due.
    """
    if sys.platform == "win32":
        yield
        return
    previous = signal.getsignal(signal.SIGCHLD)
    yield
    if signal.getsignal(signal.SIGCHLD) is not previous:
        signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)


class _Batches(DataLoader):
    """The data loader; without workers it runs in this process, whose random generators it restores."""

    iterator: Any = None

    def __iter__(self) -> Any:
        try:
            with _no_child_handler():
                self.iterator = iterator = super().__iter__()
            while True:
                with nullcontext() if self.num_workers else rng.fork():
                    batch = next(iterator, None)
                if batch is None:
                    return
                yield batch
        except Exception:
            self.close()  # the error's traceback would keep them alive
            raise

    def close(self) -> None:
        """End living workers now.

        The garbage collector may run in the thread that has to tell the workers to end; that thread would then wait
        for them until its timeout.
        """
        iterator, self.iterator, self._iterator = self.iterator, None, None
        if iterator is not None and self.num_workers:
            iterator._shutdown_workers()


class Loader:
    """Batches (input, target) on the device; see `create_loader`. A pass is an epoch, the next one follows it."""

    def __init__(
        self, stream: SampleStream, loader: _Batches, prefetcher: PrefetchLoader | None, device: torch.device
    ) -> None:
        self.dataset, self.loader, self.device = stream, loader, device
        self.batches: PrefetchLoader | _Batches = loader if prefetcher is None else prefetcher
        self.worker_error: WorkerError | None = None  # why workers had to be started again
        self.erasing: SeededErasing | None = None
        if prefetcher is not None and prefetcher.random_erasing:
            self.erasing = SeededErasing(prefetcher.random_erasing, stream, device)
            prefetcher.random_erasing = self.erasing  # type: ignore[assignment]

    def __len__(self) -> int:
        """Batches of this process in a whole epoch."""
        return -(-len(self.dataset) // self.dataset.batch_size)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch over all ranks (training drops what does not fill a whole batch on every rank)."""
        return self.dataset.size

    @property
    def corrupt_samples(self) -> int:
        """Corrupt samples that this process skipped so far."""
        return self.dataset.corrupt.total

    @property
    def mixup_enabled(self) -> bool:
        """Whether the collate function mixes samples; setting it takes effect at the next epoch, also in workers."""
        return hasattr(self.dataset.collate, "mixup_enabled") and bool(self.dataset.state[2])

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        self.dataset.state[2] = int(value)

    def close(self) -> None:
        """End the loader's workers; the next iteration starts new ones."""
        self.loader.close()

    def set_epoch(self, epoch: int, samples_consumed: int = 0) -> None:
        """Set the epoch of the next iteration, and how many of its samples (over all ranks) to skip."""
        per_step = self.dataset.batch_size * self.dataset.world_size
        first, rest = divmod(samples_consumed, per_step)
        if rest:
            used = f"{samples_consumed} samples of epoch {epoch} were used, not a multiple of the step's {per_step}"
            _logger.warning("%s: the last %d of them are used again", used, rest)
        self.dataset.set_epoch(epoch, first)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        (epoch, first), samples, steps = self.dataset.state[:2].tolist(), 0, 0
        for attempt in range(2):  # new workers continue at the next batch, so that the update can be finished
            if self.erasing is not None:
                self.erasing.batch = int(self.dataset.state[1])
            try:
                for images, target in self.batches:
                    samples, steps = samples + len(target), steps + 1
                    yield images.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)
                break
            except (RuntimeError, OSError, UserError) as error:
                reason = explain_worker_error(error)
                if attempt or not isinstance(reason, WorkerError):
                    raise reason from None
                self.worker_error = reason
                self.dataset.state[1] = first + steps
        if self.dataset.is_training:
            self.dataset.set_epoch(epoch + 1)
            return
        self.dataset.state[1] = first
        if samples != len(self.dataset):
            raise DataError(f"evaluated {samples} samples, the index lists {len(self.dataset)}")


SizeSchedule = tuple[Sequence[int], ScheduledBatchSampler] | None


def _set_transform(
    dataset: SampleStream, size: int | Sequence[int], schedule: SizeSchedule, decoder: str, options: dict[str, Any]
) -> None:
    """Set how images are decoded and augmented, at one size or at each of a schedule's."""

    def choose(size: int | Sequence[int], quiet: bool) -> tuple[Transform, Transform]:
        return choose_decoder(decoder, create_transform(size, **options), dataset.image_mode, quiet)

    dataset.decode, dataset.transform = choose(size, quiet=not options["is_training"])
    if schedule is not None:
        sizes, sampler = schedule
        dataset.transform = SizedTransform([choose((side, side), quiet=True)[1] for side in sizes], sampler)


def create_loader(
    dataset: SampleStream,
    input_size: int | Sequence[int],
    batch_size: int,
    is_training: bool = False,
    *,
    re_prob: float = 0.0,
    re_mode: str = "const",
    re_count: int = 1,
    re_split: bool = False,
    num_aug_repeats: int = 0,
    num_aug_splits: int = 0,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    num_workers: int = 1,
    collate_fn: Callable[..., object] | None = None,
    pin_memory: bool = False,
    img_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
    use_prefetcher: bool = True,
    decoder: str = "auto",
    size_schedule: SizeSchedule = None,
    **transform_options: Any,
) -> Loader:
    """timm's `create_loader` for a stream of `create_dataset`, with timm's arguments and:

    Args:
        decoder: see `samon.data.decode.choose_decoder`.
        size_schedule: side lengths of training images, and the sampler that chooses each batch's among them.
        **transform_options: of timm's `create_transform`. `distributed`, `worker_seeding`, `persistent_workers` and
            `use_multi_epochs_loader` have no effect: a stream has a rank, samples have seeds, workers persist.
    """
    if is_training != dataset.is_training:
        raise UserError(f"is_training is {dataset.is_training} for the data set, but {is_training} for its loader")
    for name in ("distributed", "worker_seeding", "persistent_workers", "use_multi_epochs_loader"):
        transform_options.pop(name, None)
    device = torch.device(device)
    erasing: dict[str, Any] = {"re_prob": re_prob, "re_mode": re_mode, "re_count": re_count, "mean": mean, "std": std}
    erasing["re_num_splits"] = (num_aug_splits or 2) if re_split else 0
    transform_options |= {"is_training": is_training, "splits": num_aug_splits, "use_prefetcher": use_prefetcher}
    _set_transform(dataset, input_size, size_schedule, decoder, transform_options | erasing)
    dataset.batch_size, dataset.repeats = batch_size, num_aug_repeats
    dataset.collate = collate_fn or (fast_collate if use_prefetcher else default_collate)
    dataset.set_loader_cfg(num_workers)
    loader = _Batches(
        dataset,
        batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory and device.type == "cuda",
        drop_last=is_training,
        collate_fn=partial(collate_shared, dataset.collate),
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # else it would draw its base seed from the global one
    )
    if not use_prefetcher:
        return Loader(dataset, loader, None, device)
    channels = len(mean) if isinstance(input_size, int) or len(input_size) < 3 else input_size[0]
    erasing |= {"channels": channels, "re_prob": 0.0 if transform_options.get("no_aug") or not is_training else re_prob}
    return Loader(dataset, loader, PrefetchLoader(loader, device=device, img_dtype=img_dtype, **erasing), device)
