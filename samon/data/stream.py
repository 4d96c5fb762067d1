"""Samples in a known order: deterministic, equal on all ranks, and able to start in the middle of an epoch."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from samon import rng
from samon.data.classes import check_label
from samon.data.corrupt import CorruptSampleCounter, DataError, SampleError
from samon.data.decode import Transform
from samon.data.sharding import ReaderLayout, read_places, read_range, shard_slices, shuffle_order, worker_batches
from samon.data.shards import SampleOrError
from samon.data.sources import ShardSource, Source
from samon.errors import UserError, error_line

T = TypeVar("T")
Processed = tuple[object, int]  # image as decode and transform leave it, label
_FALLBACKS = 8  # samples before and after a corrupt one, of which the nearest good one replaces it


def process_rank() -> tuple[int, int]:
    """Return this process's rank and the number of processes, (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def check_epoch(samples: int, batch_size: int, world_size: int) -> None:
    """Raise UserError if training has fewer samples than one batch per rank."""
    if samples < batch_size * world_size:
        what = f"one batch of {batch_size} on each of {world_size} processes"
        raise UserError(f"{samples} training samples do not fill {what}; lower --batch-size")


def sample_seed(*parts: int) -> int:
    """Return a 64-bit seed from integers that identify a draw, such as (seed, epoch, position)."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def with_fallbacks(items: Iterable[T], reach: int = _FALLBACKS) -> Iterator[tuple[T, list[T]]]:
    """Yield each item with up to `reach` items before and after it, the nearest earlier ones first."""
    source = iter(items)
    past: deque[T] = deque(maxlen=reach)
    ahead = deque(islice(source, reach))
    while ahead:
        ahead.extend(islice(source, 1))
        current = ahead.popleft()
        yield current, [*reversed(past), *ahead]
        past.append(current)


class SizedTransform:
    """One transform per image size; timm's sampler of (index, choice) batches of one says which size each batch has."""

    def __init__(self, transforms: Sequence[Transform], sampler: ScheduledBatchSampler) -> None:
        self.transforms, self.sampler = transforms, sampler
        self.epoch, self.choices, self.current = -1, [0], 0

    def begin_batch(self, epoch: int, batch: int) -> None:
        if epoch != self.epoch:
            self.sampler.set_epoch(epoch)
            self.epoch, self.choices = epoch, [choice for [(_, choice)] in self.sampler]
        self.current = self.choices[batch]

    def __call__(self, image: object) -> object:
        return self.transforms[self.current](image)


@dataclass(eq=False)
class SampleStream(IterableDataset):
    """Base of streams over shards and over indexed data sets: decoding, labels, corrupt samples and resuming.

    Training gives every rank the same number of whole batches; evaluation gives every sample once.

    Args:
        size: samples per epoch over all ranks; more than the source has means further passes over it.
        max_corrupt_fraction: of an epoch's training samples.
        decode, transform, collate, num_workers, repeats: set by `samon.data.create_loader`.
    """

    source: Source
    size: int
    is_training: bool
    batch_size: int
    seed: int = 42
    rank: int = 0
    world_size: int = 1
    num_classes: int | None = None
    max_corrupt_fraction: float = 0.001
    image_mode: str = "RGB"
    decode: Transform | None = None
    transform: Transform | None = None
    collate: Callable[..., object] = default_collate
    num_workers: int = 1
    repeats: int = 0
    layouts: tuple[int, Sequence[ReaderLayout]] = (-1, ())  # an epoch of shards, and its readers before restarts

    def __post_init__(self) -> None:
        self.corrupt = CorruptSampleCounter(self.max_corrupt_fraction)
        # Shared memory is the only way to reach persistent workers: epoch, first batch, whether mixup is enabled.
        self.state = torch.tensor([0, 0, 1]).share_memory_()

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """Set the number of loader workers (timm's name for this method); raise UserError if samples are too few."""
        self.num_workers = max(1, num_workers or 0)
        if self.is_training:
            check_epoch(self.size, self.batch_size, self.world_size)
        self.corrupt.samples = len(self)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch of the next iteration, from this rank's batch `first_batch` on."""
        self.state[0], self.state[1] = epoch, first_batch
        self.corrupt.start_epoch()

    def read_range(self, worker: int, num_workers: int, size: int | None = None) -> range:
        """Return the range of a worker of this rank, of `size` samples (default: the whole epoch)."""
        reader = self.rank, self.world_size, worker, num_workers
        return read_range(self.size if size is None else size, self.batch_size, *reader, is_training=self.is_training)

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch."""
        return len(self.read_range(0, 1))

    def samples_before(self, epoch: int) -> int:
        """Return how many samples of the epoch, over all ranks, other readers read before a restart."""
        return sum(layout.samples for layout in self.layouts[1]) if epoch == self.layouts[0] else 0

    def read_samples(self, epoch: int, stream: int, num_streams: int, skip: int) -> Iterator[tuple[int, SampleOrError]]:
        """Yield (place in the epoch, sample or its error) of one of this rank's streams, after its first `skip`."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Processed]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        epoch, first, mixup = self.state.tolist()
        if hasattr(self.collate, "mixup_enabled"):
            self.collate.mixup_enabled = bool(mixup)
        before = self.samples_before(epoch) // (self.batch_size * self.world_size)
        first = max(0, first - before)
        # The loader always asks worker 0 first, so worker 0 continues the stream whose turn it was.
        stream = (worker + first) % workers
        done = worker_batches(first, stream, workers) * self.batch_size
        rewind = min(done, _FALLBACKS)  # for the first sample's fallbacks
        items = with_fallbacks(self.read_samples(epoch, stream, workers, done - rewind))
        for count, ((place, sample), fallbacks) in enumerate(islice(items, rewind, None), start=done):
            if isinstance(self.transform, SizedTransform) and count % self.batch_size == 0:
                self.transform.begin_batch(epoch, before + stream + count // self.batch_size * workers)
            if self.is_training:
                rng.seed(sample_seed(self.seed, epoch, place))
            yield self._process_or_replace(sample, [fallback for _, fallback in fallbacks], worker)

    def _process_or_replace(self, sample: SampleOrError, fallbacks: Sequence[SampleOrError], worker: int) -> Processed:
        """Process the sample; in training, the nearest good fallback in place of a corrupt one: no rank runs short."""
        try:
            return self.process(sample)
        except SampleError as error:
            if not self.is_training:
                raise
            self.corrupt.add(worker, error)
        for fallback in fallbacks:
            try:
                return self.process(fallback)
            except SampleError:  # counted in its own turn
                continue
        raise DataError(f"{len(fallbacks) + 1} samples in a row are corrupt; the log names the first ones")

    def process(self, sample: SampleOrError) -> Processed:
        """Return the decoded and transformed image and the checked label."""
        if isinstance(sample, SampleError):
            raise sample
        image, label = sample.image, check_label(sample.label, self.num_classes, sample.where)
        try:
            for step in (self.decode, self.transform):
                image = image if step is None else step(image)
        except SampleError as error:
            raise SampleError(f"{sample.where}: {error}") from error
        except Exception as error:  # an augmentation can fail on some images
            raise SampleError(f"{sample.where}: {type(error).__name__}: {error_line(error)}") from error
        return image, label


@dataclass(eq=False)
class ShardStream(SampleStream):
    """Samples of WebDataset shards, each shard read from its beginning to its end.

    Args:
        buffer: samples in the shuffle buffer, still encoded (at 110 kB each, 2,048 take 225 MB per worker).
        sample_split: allow fewer shards than readers, which then share them sample by sample.
        source, size, ...: see `SampleStream`.
    """

    source: ShardSource
    buffer: int = 2048
    sample_split: bool = False

    @property
    def layout(self) -> ReaderLayout:
        """The present readers."""
        return ReaderLayout(self.world_size, self.batch_size, self.num_workers, self.buffer)

    def places(self, epoch: int) -> Sequence[int] | np.ndarray:
        """Return the places of the epoch's sequence that the present readers share: those not read before."""
        places: Sequence[int] | np.ndarray = range(self.size)
        if not self.samples_before(epoch):
            return places
        unread, before = np.ones(self.size, dtype=bool), 0
        for layout in (*self.layouts[1], self.layout):
            step = layout.batch * layout.world
            count = (self.size // step - before // step) * step  # whole steps repeat some samples, or leave some out
            repeated = np.flatnonzero(~unread)[: max(count - unread.sum(), 0)]
            places = np.sort(np.append(np.flatnonzero(unread), repeated))[:count]
            unread[read_places(places, layout, self.seed, epoch)] = False
            before += layout.samples
        return places

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """Also check that training has at least one shard per reader, unless samples may be split."""
        super().set_loader_cfg(num_workers)
        if self.repeats:
            raise UserError("--aug-repeats needs an image folder; shards are read once from front to back")
        readers = self.world_size * self.num_workers
        shards = sum(length > 0 for length in self.source.shards.lengths)
        if self.is_training and shards < readers and not self.sample_split:
            fewer = shards // self.world_size
            raise UserError(
                f"{shards} shards, but {self.world_size} processes x {self.num_workers} workers = {readers} readers; "
                + (f"use --workers {fewer}, " if fewer else "")
                + "write more shards (samon-shards --samples-per-shard), or share them with --sample-split"
            )

    def read_samples(self, epoch: int, stream: int, num_streams: int, skip: int) -> Iterator[tuple[int, SampleOrError]]:
        """Yield the range's samples in shuffled order (training) or as stored."""
        places = self.places(epoch)
        own = self.read_range(stream, num_streams, len(places))
        if not own:
            return
        first, last = int(places[own[0]]), int(places[own[-1]])
        lengths, seed = self.source.shards.lengths, self.seed if self.is_training else None
        layout = self.layouts[1][0] if self.samples_before(epoch) else self.layout
        used = self.size - self.size % (layout.world * layout.batch)
        # Epochs shorter than the data set, or with a last pass that is shorter than a shard, whose end it would never
        # read, follow each other in an order that lasts for one pass over the data set.
        rest = used % len(self.source)
        ring = self.is_training and (self.size < len(self.source) or 0 < rest < max(lengths))
        turn, begin = divmod(epoch * used, len(self.source)) if ring else (epoch, 0)
        slices = shard_slices(lengths, begin + first, begin + last + 1, seed=seed, epoch=turn, ring=ring)
        shuffled: Sequence[int] = range(len(own))
        if self.is_training:
            shuffled = shuffle_order(len(own), self.buffer, self.seed, epoch, own.start)
        order = [int(places[own[position]]) - first for position in shuffled][skip:]
        buffer: dict[int, SampleOrError] = {}
        arriving = self._read_in_order(slices, frozenset(order))
        for position in order:
            while position not in buffer:
                arrived, sample = next(arriving)
                buffer[arrived] = sample
            yield first + position, buffer.pop(position)
        next(arriving, None)  # lets the reader check that the last shard ends where it should

    def _read_in_order(
        self, slices: Sequence[tuple[int, range]], needed: frozenset[int]
    ) -> Iterator[tuple[int, SampleOrError]]:
        """Yield (position in the range, sample) of the needed samples, in the order in which the shards store them."""
        offset = 0  # from a shard's own numbers to positions
        for shard, part in slices:
            offset -= part.start
            wanted = [index for index in part if offset + index in needed]
            for index, sample in self.source.read_shard(shard, wanted):
                yield offset + index, sample
            offset += part.stop


class IndexedStream(SampleStream):
    """Samples of a source that can be read in any order.

    `repeats` is timm's repeated augmentation: that number of differently augmented copies, on different ranks.
    """

    def read_samples(self, epoch: int, stream: int, num_streams: int, skip: int) -> Iterator[tuple[int, SampleOrError]]:
        """Yield this rank's batches `stream`, `stream + num_streams`, ... of the epoch's order."""
        places: Iterable[int] = self.read_range(stream, num_streams)
        order: Sequence[int] = range(self.size)
        if self.is_training:
            order, size = self.epoch_order(epoch), self.batch_size
            firsts = range(stream * size, len(self), num_streams * size)
            places = (i * self.world_size + self.rank for first in firsts for i in range(first, first + size))
        for place in islice(places, skip, None):
            yield place, self.source.read([order[place]])[0]

    def epoch_order(self, epoch: int) -> list[int]:
        """Return the epoch's `size` indices over all ranks; place p belongs to rank p % world."""
        order: list[int] = []
        count, copies = len(self.source), self.repeats or 1
        for turn in range(-(-self.size // (count * copies))):
            indices = list(range(count))
            random.Random(f"samples {self.seed} {epoch} {turn}").shuffle(indices)
            order += [index for index in indices for _ in range(copies)]
        return order[: self.size]
