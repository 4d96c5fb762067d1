"""Subsets, sharding, batches, corrupt images, and a model restored after an evaluation."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from samon.errors import UserError
from samon.evals import accuracy
from samon.evals.context import choose_samples, evaluating, load_batches, restrict_to_single_labels, shard_samples
from samon.evals.datasets import open_dataset
from samon.evals.metrics import Scoring
from tests.eval_sets import DATA_CONFIG, SYNSETS, DifferentiableReader, Reader, make_context, spec_of, write_folders


def test_subsets_and_shards():
    samples = choose_samples(1000, 100, seed=3)
    assert samples == sorted(set(samples))
    assert len(samples) == 100
    assert samples == choose_samples(1000, 100, seed=3) != choose_samples(1000, 100, seed=4)
    assert choose_samples(5, 100, seed=3) == choose_samples(5, None, seed=3) == [0, 1, 2, 3, 4]
    shards = [shard_samples(samples, 8, rank, 3) for rank in range(3)]
    assert sorted(shards[0] + shards[1] + shards[2]) == samples
    assert shards[1][:8] == samples[8:16]
    # A limit takes the first samples, or a subset of them.
    assert choose_samples(1000, None, 0, limit=30) == list(range(30))
    assert choose_samples(10, None, 0, limit=30) == list(range(10))
    assert choose_samples(1000, 20, 3, limit=30) == choose_samples(30, 20, 3)


@pytest.mark.parametrize("requires_grad", [None, True, False])
def test_mode_and_gradients_are_restored_after_an_exception(requires_grad):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    net[0].bias.requires_grad_(False)
    before = [True, False, True, True]

    def fail():
        with evaluating(net, requires_grad):
            assert not net.training
            inside = before if requires_grad is None else [requires_grad] * 4
            assert [p.requires_grad for p in net.parameters()] == inside
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert net.training
    assert [p.requires_grad for p in net.parameters()] == before


def test_images_of_imagenet_c_are_not_resized_again(tmp_path):
    """A frame of one pixel survives if the image has the model's size; otherwise the crop removes it."""
    context = make_context(Reader(), DATA_CONFIG | {"crop_pct": 0.5})
    (tmp_path / SYNSETS[0]).mkdir()
    for size in (8, 16):
        framed = Image.new("RGB", (size, size), (255, 255, 255))
        framed.paste((0, 0, 0), (1, 1, size - 1, size - 1))
        framed.save(tmp_path / SYNSETS[0] / f"{size:02d}.png")
    framed = torch.ones(3, 8, 8)
    framed[:, 1:-1, 1:-1] = 0
    for kind, survives in (("imagenet-c", [True, False]), ("imagenet", [False, False])):
        dataset = open_dataset(context, spec_of(tmp_path, kind))
        for raw in (True, False):
            ((_, _, images, _),) = load_batches(context, dataset, [0, 1], 2, raw=raw)
            assert [torch.equal(image, framed) for image in images] == survives


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_stops_the_evaluation(tmp_path, workers):
    path = write_folders(tmp_path, {SYNSETS[0]: [0]}) / SYNSETS[0] / "1.png"
    path.write_bytes(b"no image")
    context = make_context(Reader(), workers=workers)
    with pytest.raises(UserError) as caught:
        accuracy.evaluate(context, open_dataset(context, spec_of(tmp_path, "imagenet-sketch")))
    assert str(caught.value) == f"{path}: not an image: 8 bytes starting b'no image'"


def test_a_border_wider_than_the_image_and_errors_of_transforms_name_the_file(tmp_path):
    root = write_folders(tmp_path, {"0": [0]})
    Image.new("RGB", (200, 9)).save(root / "0/0.png")
    context = make_context(Reader(), crop_border_pixels=4)
    dataset = open_dataset(context, spec_of(root))
    assert len(list(load_batches(context, dataset, [0], 1))) == 1
    dataset.border = 5
    with pytest.raises(UserError, match=r"0/0\.png: 200 x 9 pixels, too small to crop a border of 5"):
        list(load_batches(context, dataset, [0], 1))


def test_losses_are_for_one_right_class(tmp_path):
    """A set with several, and one with none: ReaL labels that --valid-labels leaves out."""
    context = make_context(DifferentiableReader())
    several = open_dataset(context, spec_of(write_folders(tmp_path, {"alarm_clock": [409]}), "objectnet"))
    none = replace(several, scorings={"": Scoring([1, 2], torch.eye(3).bool())})
    for dataset in (several, none):
        with pytest.raises(UserError, match="sharpness x: images have no or several right classes"):
            restrict_to_single_labels("sharpness", context.model, dataset)


def test_evaluation_turns_tf32_off_and_restores_it():
    def allowed():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = allowed()
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        for requires_grad, inside in ((False, False), (None, True)):  # None: accuracy, as in training
            with evaluating(nn.Linear(1, 1), requires_grad):
                assert allowed() == (inside, inside)
            assert allowed() == (True, True)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
