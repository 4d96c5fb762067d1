"""The loader: timm's arguments, the process's random state, workers, transforms."""

import os
import random

import pytest
import timm.data
import torch
from PIL import Image
from timm.data.mixup import FastCollateMixup

from samon.data import create_dataset, create_loader
from samon.errors import UserError
from tests.sets import TOTAL, flat, jpeg, make_loader, same, targets, write_set


def test_partial_steps_are_rounded_down_and_said(root, caplog):
    loader = make_loader(root, world=2)
    loader.set_epoch(0, samples_consumed=10)
    assert len(targets(loader)) == len(loader) - 2
    assert "the last 2 of them are used again" in caplog.text


def test_without_workers_the_process_keeps_its_random_state(root):
    mixup = FastCollateMixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=TOTAL)
    loader = make_loader(root, re_prob=0.5, re_mode="pixel", interpolation="random", collate_fn=mixup)
    before = random.getstate(), torch.get_rng_state()
    for _ in loader:
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])


def test_mixup_is_switched_off_inside_living_workers(root):
    loader = make_loader(root, workers=1, collate_fn=FastCollateMixup(num_classes=TOTAL, label_smoothing=0.0))
    assert loader.mixup_enabled
    assert any(((target > 0).sum(1) > 1).any() for _, target in loader)
    loader.mixup_enabled = False
    assert not loader.mixup_enabled
    assert all(((target > 0).sum(1) == 1).all() for _, target in loader)


@pytest.mark.parametrize("training", [True, False])
def test_data_set_and_loader_agree_on_training(root, training):
    stream = create_dataset("wds/x", root, "train", is_training=training, batch_size=4)
    with pytest.raises(UserError, match=f"is_training is {training} for the data set, but {not training} for its"):
        create_loader(stream, (3, 12, 12), 4, not training, num_workers=0, device="cpu")


def test_each_pass_is_the_next_epoch(root):
    loader, other = make_loader(root, workers=1), make_loader(root)
    loader.set_epoch(0, 4)
    passes = [list(loader) for _ in range(2)]
    other.set_epoch(1)
    assert same(passes[1], list(other))


def test_timms_own_loader_takes_the_stream(root):
    stream = create_dataset("wds/x", root, "train", is_training=False, batch_size=4)
    loader = timm.data.create_loader(stream, (3, 12, 12), 4, num_workers=2, device=torch.device("cpu"))
    assert sorted(flat(loader)) == list(range(TOTAL))


def test_augmix_splits_come_clean_part_first(root):
    images, target = next(iter(make_loader(root, batch=2, num_aug_splits=3, auto_augment="augmix-m3-w2")))
    assert images.shape == (6, 3, 12, 12)
    assert target.tolist() == target[:2].tolist() * 3


def test_memory_stays_flat_over_three_epochs(tmp_path):
    root = write_set(tmp_path / "set", [40] * 4, {i: {"jpg": jpeg(i, (200, 150))} for i in range(160)})
    loader = make_loader(root, batch=8, dataset={"shuffle_buffer": 32})

    def memory():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    used = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        targets(loader)
        used.append(memory())
    assert max(used[1:]) - used[0] < 8, used


def test_without_augmentation_nothing_is_erased(root):
    batches = [list(make_loader(root, no_aug=True, re_prob=probability)) for probability in (0.0, 1.0)]
    assert same(*batches)


def test_repeated_augmentation_of_shards_is_an_error(root):
    with pytest.raises(UserError, match="aug-repeats"):
        make_loader(root, num_aug_repeats=3)


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1)])
@pytest.mark.parametrize("decoder", ["auto", "torch", "pil"])
def test_images_one_pixel_wide_or_high_train(tmp_path, size, decoder):
    (tmp_path / "train/a").mkdir(parents=True)
    Image.new("RGB", size, (200,) * 3).save(tmp_path / "train/a/0.png")
    Image.new("RGB", size, (200,) * 3).save(tmp_path / "train/a/1.jpg")
    options = {"dataset": {"max_corrupt_fraction": 0}, "mean": (0,) * 3, "std": (1,) * 3}
    loader = make_loader(str(tmp_path), name="", decoder=decoder, **options)
    for epoch in range(40):
        loader.set_epoch(epoch)
        ((images, target),) = loader
        assert target.tolist() == [0, 0]
        assert torch.equal(images.amin((2, 3)), images.amax((2, 3)))  # nothing from outside the image
