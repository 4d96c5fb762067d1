"""Samples in a known order: deterministic, equal on all ranks, and able to start in the middle of an epoch."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate, islice, product
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import IterableDataset, SequentialSampler, get_worker_info

from samon import rng
from samon.data.classes import check_label
from samon.data.corrupt import CorruptSampleCounter, DataError, ImageError, SampleError
from samon.data.shards import RawSample
from samon.data.sources import ShardSource, Source
from samon.errors import UserError


class ShardSlice(NamedTuple):
    """Samples ``start`` to ``stop`` (exclusive) of one shard."""

    shard: int
    start: int
    stop: int


class ReadRange(NamedTuple):
    """Samples ``start`` to ``start + size`` of an epoch's sequence, and the batches they make."""

    start: int
    size: int
    batches: int


class ReaderLayout(NamedTuple):
    """How readers share an epoch's samples, and how many of them they gave (all ranks together) before a restart."""

    world: int
    batch: int
    workers: int
    buffer: int
    samples: int = 0


def epoch_pieces(lengths: Sequence[int], size: int, *, seed: int | None, epoch: int = 0) -> list[ShardSlice]:
    """The epoch's sequence of ``size`` samples: every shard once in an order drawn from (seed, epoch).

    Where ``size`` exceeds the data set, further passes follow, each in an order of its own; ``seed=None`` keeps the
    order given.
    """
    pieces: list[ShardSlice] = []
    left, turn = size, 0
    while left > 0:
        order = list(range(len(lengths)))
        if seed is not None:
            random.Random(f"shards {seed} {epoch} {turn}").shuffle(order)
        for shard in order:
            take = min(left, lengths[shard])
            if take:
                pieces.append(ShardSlice(shard, 0, take))
            left -= take
        turn += 1
    return pieces


def cut(pieces: Sequence[ShardSlice], start: int, count: int) -> list[ShardSlice]:
    """The pieces that hold samples ``start`` to ``start + count`` of a sequence."""
    kept, at = [], 0
    for shard, first, last in pieces:
        low, high = max(start, at), min(start + count, at + last - first)
        if low < high:
            kept.append(ShardSlice(shard, first + low - at, first + high - at))
        at += last - first
    return kept


def worker_batches(batches: int, worker: int, num_workers: int) -> int:
    """How many of a rank's batches a worker makes; the loader takes them from the workers in turn."""
    return batches // num_workers + (worker < batches % num_workers)


def stretch(
    size: int, batch: int, rank: int, world: int, worker: int, num_workers: int, *, is_training: bool
) -> ReadRange:
    """The stretch of a reader.

    Training has whole batches, as many on every rank; fewer than world x batch samples are left. Evaluation has every
    sample once; only a rank's last batch is smaller.
    """
    if is_training:
        size -= size % (world * batch)
    low, high = size * rank // world, size * (rank + 1) // world
    batches = -(-(high - low) // batch)
    before = sum(worker_batches(batches, w, num_workers) for w in range(worker))
    mine = worker_batches(batches, worker, num_workers)
    start = min(low + before * batch, high)
    return ReadRange(start, min(mine * batch, high - start), mine)


def reader_order(count: int, buffer: int, *draw: int) -> list[int]:
    """Positions 0 to ``count`` as a training reader gives them; ``draw`` is its (seed, epoch, start)."""
    return shuffle_order(count, buffer, random.Random(" ".join(map(str, ("samples", *draw)))))


def left_over(places: np.ndarray, layout: ReaderLayout, seed: int, epoch: int) -> np.ndarray:
    """The places of an epoch's sequence, of those that ``layout``'s readers shared, that they have not given."""
    given = np.zeros(len(places), dtype=bool)
    batches = layout.samples // (layout.world * layout.batch)
    for rank, worker in product(range(layout.world), range(layout.workers)):
        place = rank, layout.world, worker, layout.workers
        start, count, _ = stretch(len(places), layout.batch, *place, is_training=True)
        done = worker_batches(batches, worker, layout.workers) * layout.batch
        order = reader_order(count, layout.buffer, seed, epoch, start)
        given[[start + position for position in order[:done]]] = True
    return places[~given]


def shuffle_order(count: int, buffer: int, rng: random.Random) -> list[int]:
    """Positions 0 to ``count`` in the order in which a shuffle buffer of ``buffer`` samples gives them out.

    Two samples come in for each that goes out until the buffer is full, so the first batch does not wait for a
    full buffer. Deciding on positions, without the samples, is what lets a resumed reader skip what was used.
    """
    held: list[int] = []
    order: list[int] = []
    arriving = iter(range(count))
    initial = buffer // 4
    for position in arriving:
        held.append(position)
        if len(held) < initial:
            continue
        if len(held) < buffer and (extra := next(arriving, None)) is not None:
            held.append(extra)
        chosen = rng.randrange(len(held))
        held[chosen], held[-1] = held[-1], held[chosen]
        order.append(held.pop())
    rng.shuffle(held)
    return order + held


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


_SPARES = 8  # samples before and after one in the stream, of which the nearest stands in for it if it is bad


def sample_seed(*parts: int) -> int:
    """A 64-bit seed from whatever identifies a draw, such as (seed, epoch, position)."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def with_spares(items: Iterable[Any], reach: int = _SPARES) -> Iterator[tuple[Any, list[Any]]]:
    """Each item with up to ``reach`` items before and after it, the nearest earlier ones first."""
    source = iter(items)
    past: deque[Any] = deque(maxlen=reach)
    ahead = deque(islice(source, reach))
    while ahead:
        ahead.extend(islice(source, 1))
        current = ahead.popleft()
        yield current, [*reversed(past), *ahead]
        past.append(current)


@dataclass(eq=False)
class SampleStream(IterableDataset):
    """What shards and indexed data sets share: the epoch's arithmetic, decoding, labels, faults and resuming.

    Training (``is_training``) gives every rank the same number of whole batches; evaluation gives every sample once.
    ``size`` is the samples per epoch over all ranks; more than the source holds means further passes over it.
    ``transform``, ``decode``, ``collate``, ``num_workers`` and ``repeats`` are set by `samon.data.create_loader`.
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
    decode: Callable[[Any], Any] | None = None
    transform: Callable[[Any], Any] | None = None
    collate: Any = None
    num_workers: int = 1
    repeats: int = 0

    def __post_init__(self) -> None:
        self.faults = CorruptSampleCounter(self.max_corrupt_fraction)
        # Shared with persistent workers, which are told of a new epoch in no other way: epoch, first batch, mixup.
        self.state = torch.tensor([0, 0, 1]).share_memory_()

    def check(self) -> None:
        """Refuse sizes that cannot work, before any worker starts.

        Raises:
            UserError: fewer samples than one batch per rank.
        """
        needed = self.batch_size * self.world_size
        if self.is_training and self.size < needed:
            what = f"one batch of {self.batch_size} on each of {self.world_size} processes"
            raise UserError(f"{self.size} training samples do not fill {what}; lower --batch-size")
        if self.size < 1:
            raise UserError("the split has no samples")

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """Tell how many loader workers there will be (timm's name for it)."""
        self.num_workers = max(1, num_workers or 0)
        self.check()
        self.faults.samples = len(self)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch that the next iteration gives, from this process's batch ``first_batch`` on."""
        self.state[0], self.state[1] = epoch, first_batch
        self.faults.new_epoch()

    def stretch(self, worker: int, num_workers: int) -> ReadRange:
        """What that worker of this rank reads."""
        place = self.rank, self.world_size, worker, num_workers
        return stretch(self.size, self.batch_size, *place, is_training=self.is_training)

    def __len__(self) -> int:
        """Samples that this process gives in a whole epoch."""
        return self.stretch(0, 1).size

    def batches_before(self, epoch: int) -> int:
        """This rank's batches of the epoch whose samples other readers gave before a restart."""
        return 0

    def records(self, epoch: int, stream: int, num_streams: int, skip: int) -> Iterator[tuple[int, Any]]:
        """(place in the epoch, record or its error) of one of this rank's streams, ``skip`` samples left out."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        worker = get_worker_info()
        workers, me = (worker.num_workers, worker.id) if worker else (1, 0)
        epoch, first, mixup = self.state.tolist()
        if hasattr(self.collate, "mixup_enabled"):
            self.collate.mixup_enabled = bool(mixup)
        before = self.batches_before(epoch)
        first = max(0, first - before)
        # The loader asks its workers in turn, beginning with worker 0: so that one takes over whose turn it was.
        stream = (me + first) % workers
        done = worker_batches(first, stream, workers) * self.batch_size
        spared = min(done, _SPARES)
        items = with_spares(self.records(epoch, stream, workers, done - spared))
        for count, ((place, record), spares) in enumerate(islice(items, spared, None), start=done):
            if isinstance(self.transform, SizedTransform) and count % self.batch_size == 0:
                self.transform.begin_batch(epoch, before + stream + count // self.batch_size * workers)
            if self.is_training:
                rng.seed(sample_seed(self.seed, epoch, place))
            yield self._usable(record, [spare for _, spare in spares], me)

    def _usable(self, record: Any, spares: Sequence[Any], worker: int) -> tuple[Any, Any]:
        """The finished sample; in training, the nearest good spare in place of a bad one, so no rank runs short."""
        try:
            return self._finish(record)
        except SampleError as error:
            if not self.is_training:
                raise
            self.faults.add(worker, error)
        for spare in spares:
            try:
                return self._finish(spare)
            except SampleError:  # counted when its own turn comes
                continue
        raise DataError(f"{len(spares) + 1} samples in a row are bad; the log names the first ones")

    def _finish(self, record: RawSample | SampleError) -> tuple[Any, Any]:
        if isinstance(record, SampleError):
            raise record
        image, target = record.image, check_label(record.label, self.num_classes, record.where)
        try:  # a transform may decode as well, what it needs
            for step in (self.decode, self.transform):
                image = image if step is None else step(image)
        except ImageError as error:
            raise type(error)(f"{record.where}: {error}") from error
        except Exception as error:  # an image can be such that an augmentation fails
            raise ImageError(f"{record.where}: {type(error).__name__}: {' '.join(str(error).split())}") from error
        return image, target


@dataclass(eq=False)
class ShardStream(SampleStream):
    """Samples of WebDataset shards, each shard read from its beginning to its end.

    Args:
        buffer: samples held, still encoded, for shuffling (at 110 kB each, 2,048 take 225 MB per worker).
        sample_split: allow fewer shards than readers, which then share them sample by sample.
        source, size, ...: see `SampleStream`.
    """

    source: ShardSource
    buffer: int = 2048
    sample_split: bool = False
    layouts: tuple[int, Sequence[ReaderLayout]] = (-1, ())  # an epoch, and the readers that gave its first samples

    @property
    def layout(self) -> ReaderLayout:
        """The present readers."""
        return ReaderLayout(self.world_size, self.batch_size, self.num_workers, self.buffer)

    def _samples_before(self, epoch: int) -> int:
        return sum(layout.samples for layout in self.layouts[1]) if epoch == self.layouts[0] else 0

    def batches_before(self, epoch: int) -> int:
        return self._samples_before(epoch) // (self.batch_size * self.world_size)

    def places(self, epoch: int) -> Sequence[int] | np.ndarray:
        """The places of the epoch's sequence that the present readers share: all, or those not given before."""
        before = self._samples_before(epoch)
        if not before:
            return range(self.size)
        every = left = np.arange(self.size)
        for layout in self.layouts[1]:
            left = left_over(left, layout, self.seed, epoch)
        step = self.batch_size * self.world_size
        missing = (self.size // step - before // step) * step - len(left)  # for whole steps some come again
        return np.sort(np.append(left, np.setdiff1d(every, left)[: max(missing, 0)]))

    def check(self) -> None:
        """Also refuse repeated augmentation, and fewer shards than training readers, unless samples may be split."""
        super().check()
        if self.repeats:
            raise UserError("--aug-repeats needs an image folder; shards are read once from front to back")
        readers, lengths = self.world_size * self.num_workers, self.source.shards.lengths
        shards = sum(length > 0 for length in lengths)
        if self.is_training and shards < readers and not self.sample_split:
            fewer = shards // self.world_size
            have = f"{self.world_size} processes x {self.num_workers} workers = {readers} readers"
            do = (f"use --workers {fewer}, " if fewer else "") + "write more shards (samon-shards"
            do += " --samples-per-shard), or share them with --sample-split"
            raise UserError(f"{shards} shards, but {have}; {do}")

    def records(self, epoch: int, stream: int, num_streams: int, skip: int) -> Iterator[tuple[int, Any]]:
        """The stretch's samples in shuffled order (training) or as they lie; passes over what is not needed."""
        seed, places = self.seed if self.is_training else None, self.places(epoch)
        reader = self.rank, self.world_size, stream, num_streams
        start, count, _ = stretch(len(places), self.batch_size, *reader, is_training=self.is_training)
        if not count:
            return
        first, last = int(places[start]), int(places[start + count - 1])
        pieces = epoch_pieces(self.source.shards.lengths, self.size, seed=seed, epoch=epoch)
        pieces = cut(pieces, first, last + 1 - first)
        drawn = reader_order(count, self.buffer, self.seed, epoch, start) if self.is_training else range(count)
        order = [int(places[start + position]) - first for position in drawn]
        held: dict[int, Any] = {}
        arriving = self._arriving(pieces, frozenset(order[skip:]))
        for position in order[skip:]:
            while position not in held:
                arrived, record = next(arriving)
                held[arrived] = record
            yield first + position, held.pop(position)
        next(arriving, None)  # lets the reader see whether the last shard ends where it should

    def _arriving(self, pieces: Sequence[ShardSlice], needed: frozenset[int]) -> Iterator[tuple[int, Any]]:
        """(position in the stretch, record) of the needed samples, in the order in which they lie in the shards."""
        shards, reader = self.source.shards, self.source.reader
        starts = accumulate((piece.stop - piece.start for piece in pieces), initial=0)
        for (shard, low, high), at in zip(pieces, starts, strict=False):
            wanted = [index for index in range(low, high) if at + index - low in needed]
            for index, record in reader.read(shards.urls[shard], shards.lengths[shard], wanted):
                yield at + index - low, record


class IndexedStream(SampleStream):
    """Samples of a source that can be read in any order.

    ``repeats`` is timm's repeated augmentation: so many differently augmented copies, on different ranks.
    """

    def records(self, epoch: int, stream: int, num_streams: int, skip: int) -> Iterator[tuple[int, Any]]:
        """This rank's batches ``stream``, ``stream + num_streams``, ... of the epoch's order."""
        start, count, batches = self.stretch(stream, num_streams)
        places: Iterable[int] = range(start, start + count)
        order: Any = range(start + count)
        if self.is_training:
            batch, order = self.batch_size, self._order(epoch)
            firsts = ((stream + b * num_streams) * batch for b in range(batches))
            places = ((first + i) * self.world_size + self.rank for first in firsts for i in range(batch))
        for place in islice(places, skip, None):
            yield place, self.source.read([int(order[place])])[0]

    def _order(self, epoch: int) -> np.ndarray:
        """Indices in the epoch's order over all ranks, ``size`` of them; place p belongs to rank p % world."""
        order: list[int] = []
        held, copies = len(self.source), self.repeats or 1
        for turn in range(-(-self.size // (held * copies))):
            indices = list(range(held))
            random.Random(f"samples {self.seed} {epoch} {turn}").shuffle(indices)
            order += [index for index in indices for _ in range(copies)]
        return np.asarray(order[: self.size])
