"""Who reads which sample, and when: pure arithmetic on counts, the same on every rank without communication.

An epoch is a sequence of samples: the shards in a shuffled order, one behind the other. The sequence is cut into
one stretch per reader (a loader worker of a rank), so samples are disjoint whatever the shards' lengths, and every
rank gets the same number of batches. A shard is read by two readers only where a stretch ends inside it.
"""

import random
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Samples ``start`` to ``stop`` (exclusive) of one shard."""

    shard: int
    start: int
    stop: int


class Stretch(NamedTuple):
    """Samples ``start`` to ``start + size`` of an epoch's sequence, and the batches they make."""

    start: int
    size: int
    batches: int


class Layout(NamedTuple):
    """How readers share an epoch's samples, and how many of them they gave (all ranks together) before a restart."""

    world: int
    batch: int
    workers: int
    buffer: int
    samples: int = 0


def epoch_pieces(lengths: Sequence[int], size: int, *, seed: int | None, epoch: int = 0) -> list[Piece]:
    """The epoch's sequence of ``size`` samples: every shard once in an order drawn from (seed, epoch).

    Where ``size`` exceeds the data set, further passes follow, each in an order of its own; ``seed=None`` keeps the
    order given.
    """
    pieces: list[Piece] = []
    left, turn = size, 0
    while left > 0:
        order = list(range(len(lengths)))
        if seed is not None:
            random.Random(f"shards {seed} {epoch} {turn}").shuffle(order)
        for shard in order:
            take = min(left, lengths[shard])
            if take:
                pieces.append(Piece(shard, 0, take))
            left -= take
        turn += 1
    return pieces


def cut(pieces: Sequence[Piece], start: int, count: int) -> list[Piece]:
    """The pieces that hold samples ``start`` to ``start + count`` of a sequence."""
    kept, at = [], 0
    for shard, first, last in pieces:
        low, high = max(start, at), min(start + count, at + last - first)
        if low < high:
            kept.append(Piece(shard, first + low - at, first + high - at))
        at += last - first
    return kept


def worker_batches(batches: int, worker: int, num_workers: int) -> int:
    """How many of a rank's batches a worker makes; the loader takes them from the workers in turn."""
    return batches // num_workers + (worker < batches % num_workers)


def stretch(
    size: int, batch: int, rank: int, world: int, worker: int, num_workers: int, *, is_training: bool
) -> Stretch:
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
    return Stretch(start, min(mine * batch, high - start), mine)


def reader_order(count: int, buffer: int, *draw: int) -> list[int]:
    """Positions 0 to ``count`` as a training reader gives them; ``draw`` is its (seed, epoch, start)."""
    return shuffle_order(count, buffer, random.Random(" ".join(map(str, ("samples", *draw)))))


def left_over(places: np.ndarray, layout: Layout, seed: int, epoch: int) -> np.ndarray:
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
