"""Which reader (a loader worker of a rank) reads which samples of an epoch, and in which order.

It is arithmetic on counts, the same on every rank without communication. An epoch of shards is a sequence of samples:
the shards in shuffled order, one after the other. Each reader has one range of it, so samples are disjoint whatever the
shards' lengths, and every rank gets the same number of batches. Two readers read the same shard only if a range ends
inside it.
"""

import random
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np


class ReaderLayout(NamedTuple):
    """How readers share an epoch's samples, and how many they read (all ranks together) before a restart."""

    world: int
    batch: int
    workers: int
    buffer: int
    samples: int = 0


def shard_slices(
    lengths: Sequence[int], start: int, stop: int, *, seed: int | None, epoch: int = 0, ring: bool = False
) -> list[tuple[int, range]]:
    """Return the shards that hold samples `start` to `stop` (exclusive) of an epoch's sequence, and which of theirs.

    The sequence is every shard once, shuffled by (seed, epoch), or as listed without a seed. Beyond the data set,
    further passes follow, each in an order of its own, or in the same one for a `ring`.
    """
    slices, offset, turn = [], 0, 0
    while offset < stop:
        order = list(range(len(lengths)))
        if seed is not None:
            random.Random(f"shards {seed} {epoch} {turn}").shuffle(order)
        for shard in order:
            if wanted := range(lengths[shard])[max(start - offset, 0) : max(stop - offset, 0)]:
                slices.append((shard, wanted))
            offset += lengths[shard]
        turn += not ring
    return slices


def worker_batches(batches: int, worker: int, num_workers: int) -> int:
    """Return how many of a rank's batches a worker makes; the loader takes them from the workers in turn."""
    return batches // num_workers + (worker < batches % num_workers)


def read_range(
    size: int, batch: int, rank: int, world: int, worker: int, num_workers: int, *, is_training: bool
) -> range:
    """Return which samples of an epoch's sequence a reader has.

    Training has whole batches, the same number on every rank; fewer than world x batch samples are left out.
    Evaluation has every sample once; only a rank's last batch is smaller.
    """
    if is_training:
        size -= size % (world * batch)
    low, high = size * rank // world, size * (rank + 1) // world
    batches = -(-(high - low) // batch)
    before = sum(worker_batches(batches, w, num_workers) for w in range(worker))
    start = min(low + before * batch, high)
    return range(start, min(start + worker_batches(batches, worker, num_workers) * batch, high))


def shuffle_order(count: int, size: int, seed: int, epoch: int, start: int) -> list[int]:
    """Return positions 0 to `count` in the order in which they leave a shuffle buffer of `size` samples.

    Two samples enter for each that leaves until the buffer is full, so the first batch does not wait for a full
    buffer. Because positions are shuffled, not samples, a resumed reader can skip what was used.
    """
    generator = random.Random(f"samples {seed} {epoch} {start}")
    buffer: list[int] = []
    order: list[int] = []
    arriving = iter(range(count))
    for position in arriving:
        buffer.append(position)
        if len(buffer) < size // 4:
            continue
        if len(buffer) < size and (extra := next(arriving, None)) is not None:
            buffer.append(extra)
        chosen = generator.randrange(len(buffer))
        buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
        order.append(buffer.pop())
    generator.shuffle(buffer)
    return order + buffer


def read_places(places: np.ndarray, layout: ReaderLayout, seed: int, epoch: int) -> np.ndarray:
    """Return which of the places of an epoch's sequence that the readers of `layout` share they have read."""
    read = np.zeros(len(places), dtype=bool)
    batches = layout.samples // (layout.world * layout.batch)
    for rank, worker in product(range(layout.world), range(layout.workers)):
        reader = rank, layout.world, worker, layout.workers
        own = read_range(len(places), layout.batch, *reader, is_training=True)
        done = worker_batches(batches, worker, layout.workers) * layout.batch
        order = shuffle_order(len(own), layout.buffer, seed, epoch, own.start)
        read[[own[position] for position in order[:done]]] = True
    return places[read]
