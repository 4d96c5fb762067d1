"""Every sample once, equal steps on all ranks, and continuing where a run was interrupted."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from timm.data.mixup import FastCollateMixup

from samon.data import create_dataset, sharding
from samon.data.classes import check_ranks
from samon.data.stream import with_fallbacks
from samon.errors import UserError
from tests.processes import run_ranks
from tests.sets import TOTAL, flat, make_loader, same, targets, write_images, write_set

# The tests may have fewer cores than workers; how the work is shared is what they are about.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.mark.parametrize(("world", "workers", "batch"), [(1, 1, 1), (1, 7, 4), (2, 2, 1), (3, 3, 4), (3, 7, 50)])
def test_read_ranges_cover_each_sample_once(world, workers, batch):
    cells = [(rank, worker) for rank in range(world) for worker in range(workers)]
    for size in (0, 1, 29, 100):
        evaluation = [sharding.read_range(size, batch, r, world, w, workers, is_training=False) for r, w in cells]
        covered = [i for own in evaluation for i in own]
        assert sorted(covered) == list(range(size))
        training = [sharding.read_range(size, batch, r, world, w, workers, is_training=True) for r, w in cells]
        covered = [i for own in training for i in own]
        assert len(covered) == len(set(covered)) == size // (world * batch) * world * batch
        samples = [sum(map(len, training[r * workers :][:workers])) for r in range(world)]
        assert samples == [size // (world * batch) * batch] * world


def test_shuffle_order_is_a_permutation_held_in_the_buffer():
    order = sharding.shuffle_order(1000, 64, 0, 0, 0)
    assert sorted(order) == list(range(1000))
    newest = 0
    for given, position in enumerate(order):
        newest = max(newest, position)
        assert newest + 1 - given <= 64 + 2
    moved = np.abs(np.asarray(order) - np.arange(1000))
    assert moved.mean() > 20


def test_every_sample_of_every_epoch_has_draws_of_its_own(root):
    stream = create_dataset("wds/x", str(root), "train", is_training=True, rank=0, world_size=1)
    stream.decode, stream.transform = None, lambda _: random.random()
    drawn = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        drawn.append([number for number, _ in stream])
    assert drawn[0] == drawn[2]
    assert len({*drawn[0], *drawn[1]}) == 2 * TOTAL


def test_shards_and_files_come_in_another_order_each_epoch(tmp_path):
    write_images(tmp_path, *(f"train/class{k % 2}/{k}.jpg" for k in range(12)))
    stream = create_dataset("", root=str(tmp_path), split="train", is_training=True, rank=0, world_size=1)
    shards = [
        [shard for shard, _ in sharding.shard_slices([4] * 12, 0, 48, seed=1, epoch=epoch)] for epoch in (0, 1, 0)
    ]
    for orders in (shards, [stream.epoch_order(epoch) for epoch in (0, 1, 0)]):
        assert orders[0] == orders[2] != orders[1]
        assert sorted(orders[0]) == list(range(12))


def test_fallbacks_are_the_nearest_neighbors():
    windows = dict(with_fallbacks(range(6), reach=2))
    assert windows == {0: [1, 2], 1: [0, 2, 3], 2: [1, 0, 3, 4], 3: [2, 1, 4, 5], 4: [3, 2, 5], 5: [4, 3]}


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (3, 0), (3, 3)])
def test_evaluation_sees_every_sample_once(root, world, workers):
    seen = []
    for rank in range(world):
        loader = make_loader(root, training=False, batch=4, workers=workers, world=world, rank=rank)
        batches = targets(loader)
        assert (len(batches), loader.num_samples) == (len(loader), TOTAL)
        seen += [i for batch in batches for i in batch]
    assert sorted(seen) == list(range(TOTAL))


@pytest.mark.parametrize("world", [1, 3])
def test_training_sees_samples_at_most_once_with_equal_steps(root, world):
    epochs = []
    for epoch in range(2):
        seen, steps = [], set()
        for rank in range(world):
            loader = make_loader(root, workers=2, world=world, rank=rank)
            loader.set_epoch(epoch)
            batches = targets(loader)
            assert len(batches) == len(loader)
            steps.add(len(batches))
            seen += [i for batch in batches for i in batch]
        assert steps == {TOTAL // (2 * world)}
        assert len(set(seen)) == len(seen) == TOTAL // (2 * world) * 2 * world
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def _augmented(root, **options):
    mixup = FastCollateMixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=TOTAL)
    return make_loader(root, re_prob=0.5, re_mode="pixel", interpolation="random", collate_fn=mixup, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_bit_identically_at_random_points(root, workers):
    options = {"workers": workers, "world": 2, "rank": 1, "dataset": {"shuffle_buffer": 4}}
    whole = _augmented(root, **options)
    whole.set_epoch(3)
    expected = list(whole)
    again = _augmented(root, **options)
    points = random.Random(0)
    for _ in range(4):
        step = points.randrange(len(expected))
        torch.manual_seed(points.randrange(1000))  # what happened before must not matter
        random.seed(points.randrange(1000))
        again.set_epoch(3, samples_consumed=step * 4)
        assert len(again) == len(expected)
        assert same(list(again), expected[step:])
    again.set_epoch(4)
    assert not same(list(again), expected)


def test_fewer_shards_than_readers_is_an_error(root):
    with pytest.raises(UserError, match=r"8 shards, but 3 processes x 4 workers = 12 readers; use --workers 2"):
        make_loader(root, workers=4, world=3)
    seen = []
    for rank in range(3):
        seen += flat(make_loader(root, workers=4, world=3, rank=rank, dataset={"sample_split": True}))
    assert len(set(seen)) == len(seen) == TOTAL // 6 * 6


def test_too_few_samples_for_a_batch_is_an_error(root):
    with pytest.raises(UserError, match="29 training samples do not fill one batch of 16 on each of 2"):
        make_loader(root, batch=16, world=2)


def test_longer_epochs_pass_over_the_data_again(root):
    assert len(flat(make_loader(root, batch=1, dataset={"repeats": 2}))) == 2 * TOTAL
    assert len(flat(make_loader(root, batch=1, dataset={"repeats": 2, "num_samples": 10}))) == 20
    with pytest.raises(UserError, match="the split has 29"):
        make_loader(root, training=False, dataset={"num_samples": 30})


@pytest.mark.parametrize(("world", "lengths", "epochs"), [(1, [30], 3), (2, [5] * 12, 6)])
def test_shorter_epochs_pass_over_all_samples(tmp_path, world, lengths, epochs):
    """Each epoch begins where the last one ended."""
    root, used = write_set(tmp_path / "set", lengths), []
    for epoch in range(epochs):
        for rank in range(world):
            options = {"num_samples": 20, "sample_split": True}
            loader = make_loader(root, world=world, rank=rank, dataset=options)
            loader.set_epoch(epoch)
            used += flat(loader)
        assert len(set(used[-20:])) == 20
    assert sorted(used) == sorted(2 * [*range(sum(lengths))])
    assert len(lengths) == 1 or {*used[:20]} != {*used[60:80]}, "another order in the next pass"


@pytest.mark.parametrize(("lengths", "count"), [([29], None), ([3, 26], None), ([29], 14), ([29], 58)])
def test_epochs_use_all_samples_equally_often(tmp_path, lengths, count):
    loader = make_loader(write_set(tmp_path / "set", lengths), batch=8, dataset={"num_samples": count})
    uses = Counter(i for _ in range(12) for i in flat(loader))
    assert len(uses) == 29
    assert max(uses.values()) - min(uses.values()) <= (1 if len(lengths) == 1 else 4)


def test_image_folders_behave_like_shards(tmp_path):
    write_images(tmp_path, *(f"train/c{i:02d}/image.jpg" for i in range(11)))
    root = str(tmp_path)
    for world in (1, 3):
        options = [{"name": "", "workers": 0, "world": world, "rank": rank} for rank in range(world)]
        assert sorted(i for o in options for i in flat(make_loader(root, training=False, **o))) == list(range(11))
        seen = [i for o in options for i in flat(make_loader(root, **o))]
        assert len(set(seen)) == len(seen) == 11 // (2 * world) * 2 * world
    loader = make_loader(root, name="", workers=2)
    expected = list(loader)
    loader.set_epoch(0, samples_consumed=6)
    assert same(list(loader), expected[3:])
    assert len(targets(make_loader(root, name="", world=2, num_aug_repeats=2))) == 2


def _one_process(rank, root):
    stream = create_dataset("wds/x", root, "train", is_training=False, batch_size=4)
    assert (stream.rank, stream.world_size) == (rank, 2)
    evaluation = make_loader(root, training=False, batch=4, rank=None)
    training = make_loader(root, workers=1, rank=None)
    seen = {"evaluated": torch.tensor(flat(evaluation)), "trained": torch.tensor(targets(training))}
    training.close()
    check_ranks(["a", "b"], 5, "x")
    seen["refused"] = []
    for names, count in (((["a", "b"], ["a", "B"])[rank], 5), (["a"], 5 + rank)):
        try:
            check_ranks(names, count, "x")
        except UserError as error:
            seen["refused"].append(str(error))
    return seen


@pytest.mark.parametrize(
    ("shares", "repeated"),  # (processes, workers, batch, steps) one after the other, the last ones to the epoch's end
    [
        ([(1, 2, 2, 5), (1, 0, 2, None)], 0),
        ([(2, 1, 2, 3), (1, 2, 2, None)], 0),
        ([(1, 3, 2, 2), (1, 2, 2, 3), (2, 0, 1, 4), (1, 1, 2, None)], 0),
        ([(1, 2, 2, 3), (1, 2, 2, 2), (1, 0, 2, None)], 0),
        ([(1, 2, 2, 1), (1, 2, 7, 2), (1, 0, 1, None)], 1),  # the last of four steps of 7
    ],
)
def test_other_readers_share_what_is_left_of_an_epoch(root, shares, repeated):
    given, layouts, taken = [], [], 0
    for world, workers, batch, steps in shares:
        for rank in range(world):
            loader = make_loader(root, workers=workers, world=world, rank=rank, batch=batch)
            loader.dataset.layouts = (3, layouts)
            loader.set_epoch(3, taken + sum(layout.samples for layout in layouts))
            given += [i for batch in targets(loader)[:steps] for i in batch]
            loader.set_epoch(4)
            assert len(targets(loader)) == TOTAL // (batch * world), "the next epoch is whole"
        if steps:
            layouts = [*layouts, loader.dataset.layout._replace(samples=steps * batch * world)]
    assert len(given) == len(set(given)) + repeated == TOTAL - TOTAL % (batch * world)


def test_two_real_processes(root):
    results = run_ranks(_one_process, 2, root)
    assert sorted(torch.cat([r["evaluated"] for r in results]).tolist()) == list(range(TOTAL))
    assert [r["trained"].shape for r in results] == [(TOTAL // 4, 2)] * 2
    assert torch.cat([r["trained"].flatten() for r in results]).unique().numel() == TOTAL // 4 * 4
    first, second = (r["refused"] for r in results)
    assert first == second, "processes that see other data end together"
    assert len(first) == 2
    assert "process 0 sees 5 samples of 1 classes, process 1 sees 6 samples of 1 classes" in first[1]
