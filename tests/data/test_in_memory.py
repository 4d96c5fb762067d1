"""Data sets in memory: equality with image-by-image augmentation, exact epochs, ranks, resuming, errors."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from samon import UserError
from samon.data import InMemoryLoader, create_dataset, create_in_memory_loader, create_loader
from samon.data.in_memory import Augment
from samon.data.transforms import GRAY, create_transform, pad_pixels

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SHARDS = Path(__file__).parents[2] / "data/fashion-mnist"
COMMON: dict[str, Any] = {"mean": MEAN, "std": STD, "device": "cpu"}


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 + 11 random images of 32 px in CIFAR's layout; the first pixel tells the index."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, count in (("train", 40), ("test", 11)):
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        images[:, 0, 0, 0] = np.arange(count)
        arrays |= {f"x_{name}": images, f"y_{name}": np.arange(count) % 10}
    root = tmp_path_factory.mktemp("npz")
    np.savez(root / "tiny.npz", **arrays)
    return str(root)


def in_memory(npz: str, is_training: bool, batch_size: int = 8, **kwargs: Any) -> InMemoryLoader:
    split = "train" if is_training else "validation"
    stream = create_dataset("npz/tiny", npz, split, batch_size=batch_size, rank=0, world_size=1)
    options = COMMON | {"train_crop_mode": "pad", "color_jitter": 0.0} | kwargs
    return create_in_memory_loader(stream, (3, 32, 32), batch_size, is_training, **options)


def on_rank(npz: str, rank: int, world: int, is_training: bool) -> InMemoryLoader:
    loader = in_memory(npz, is_training, 4)
    loader.rank, loader.world_size, loader.augment = rank, world, None  # the first pixel still tells the index
    return loader


def indices(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * STD[0] * 255 + MEAN[0] * 255).round().int().tolist()


def test_crop_and_flip_equal_torchvisions_for_the_same_draws() -> None:
    augment = Augment((32, 32))
    assert augment.draw(1000, seed=1, epoch=0).corner.unique().tolist() == list(range(9)), "every corner is reached"
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    index = torch.randperm(16)
    draws = augment.draw(16, seed=1, epoch=2)
    out = augment(images[index], index, draws)
    for row, i in enumerate(index.tolist()):
        top, left = draws.corner[i].tolist()
        expected = transforms.functional.pad(images[i], [4])[:, top : top + 32, left : left + 32]
        assert torch.equal(out[row], expected.flip(-1) if draws.flip[i] else expected)
    assert 0 < draws.flip.sum() < 16


def test_autoaugment_equals_torchvisions_for_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation of every sub-policy, batched, against torchvision's class applied image by image."""
    augment = Augment((32, 32), hflip=0.0, policy=True)
    count = 400
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    draws = augment.draw(count, seed=5, epoch=0)
    draws.corner[:] = augment.pad  # the crop leaves the image as it is
    out = augment(images, torch.arange(count), draws)
    reference = AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[GRAY] * 3)
    for i in range(count):
        params = (int(draws.policy[i]), draws.chance[i], (~draws.negative[i]).long())
        monkeypatch.setattr(reference, "get_params", lambda _, params=params: params)
        torch.testing.assert_close(out[i], reference(images[i]), atol=0, rtol=0)
    assert len(set(draws.policy.tolist())) == 25
    assert (out != images).flatten(1).any(1).float().mean() > 0.5
    alone = augment(images[7:8], torch.tensor([7]), draws)
    assert torch.equal(alone[0], out[7]), "a sample's augmentation does not depend on its batch"
    assert not torch.equal(augment.draw(count, seed=5, epoch=1).order, draws.order)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("npz/tiny", {"crop_pct": 1.0}),
        ("npz/tiny", {"crop_pct": 0.875}),
        ("npz/tiny", {}),
        ("wds/fashion-mnist", {"crop_pct": 1.0}),  # of another size
        ("wds/fashion-mnist", {"crop_pct": 1.0, "interpolation": "bilinear"}),
        ("wide", {"crop_pct": 1.0, "crop_mode": "center"}),
        ("wide", {"is_training": True, "no_aug": True, "interpolation": "bilinear"}),
    ],
)
def test_the_same_images_as_from_the_other_loader(npz: str, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    kwargs: dict[str, Any] = {"root": npz, "split": "validation"}
    if name == "wds/fashion-mnist":
        kwargs |= {"root": str(SHARDS), "num_samples": 200}
    elif name == "wide":
        pixels = np.random.default_rng(0).integers(0, 256, (11, 30, 50, 3), dtype=np.uint8)
        np.savez(tmp_path / "wide.npz", x_test=pixels, y_test=range(11))
        name, kwargs["root"] = "npz/wide", str(tmp_path)
    training = options.get("is_training", False)
    stream = create_dataset(name, batch_size=1, **kwargs, is_training=training)
    vars(stream)["epoch_order"] = lambda _: range(11)
    other = create_loader(stream, (3, 32, 32), 1, num_workers=0, decoder="pil", **COMMON | options)
    stream = create_dataset(name, rank=0, world_size=1, **kwargs)
    ours = create_in_memory_loader(stream, (3, 32, 32), 8, **COMMON | options)
    assert ours.num_samples == kwargs.get("num_samples", 11)
    ours.is_training = False  # in order
    expected = [torch.cat(tensors) for tensors in zip(*other, strict=True)]
    for first, second in zip((torch.cat(tensors) for tensors in zip(*ours, strict=True)), expected, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_training_batches_partition_an_epoch_over_ranks(npz: str) -> None:
    seen: list[int] = []
    for rank in range(3):
        loader = on_rank(npz, rank, 3, True)
        loader.set_epoch(4)
        batches = list(loader)
        assert len(batches) == len(loader) == 3  # 40 // 12
        seen += [i for images, _ in batches for i in indices(images)]
        assert [i % 10 for i in seen[-12:]] == torch.cat([labels for _, labels in batches]).tolist()
    assert len(seen) == len(set(seen)) == 36
    assert [sum(len(y) for _, y in on_rank(npz, rank, 3, False)) for rank in range(3)] == [4, 4, 3]


def test_a_number_of_samples_takes_others_in_each_epoch(npz: str) -> None:
    """As from the other loader; the first ones, always the same, would be a smaller data set."""
    stream = create_dataset("npz/tiny", npz, "train", num_samples=16, rank=0, world_size=1)
    loader = create_in_memory_loader(stream, (3, 32, 32), 8, True, no_aug=True, **COMMON)
    epochs = [[i for images, _ in loader for i in indices(images)] for _ in range(6)]
    assert {(len(epoch), len(set(epoch))) for epoch in epochs} == {(16, 16)}
    assert (loader.num_samples, len(loader)) == (16, 2)
    assert len({i for epoch in epochs for i in epoch}) > 32


@pytest.mark.parametrize("options", [{"is_training": True}, {"world_size": 2}])
def test_a_stream_of_some_samples_is_refused(npz: str, options: dict[str, Any]) -> None:
    """Its missing samples would be random numbers."""
    stream = create_dataset("npz/tiny", npz, "train", **{"rank": 0, "world_size": 1} | options)
    with pytest.raises(UserError, match="every process keeps the whole set"):
        create_in_memory_loader(stream, (3, 32, 32), 8, True, no_aug=True, **COMMON)


def test_images_are_converted_to_the_mode(npz: str) -> None:
    stream = create_dataset("npz/tiny", npz, "validation", input_img_mode="YCbCr", rank=0, world_size=1)
    image = Image.fromarray(stream.source.arrays()[0][3]).convert("YCbCr")
    loader = create_in_memory_loader(stream, (3, 32, 32), 8, crop_pct=1.0, **COMMON)
    assert torch.equal(loader.images[3].permute(1, 2, 0), torch.from_numpy(np.array(image)))


def test_resuming_in_mid_epoch_is_bit_exact(npz: str) -> None:
    loader = in_memory(npz, True, auto_augment="cifar10")
    loader.set_epoch(2)
    list(loader)
    expected = list(loader)  # of epoch 3
    loader.set_epoch(3, samples_consumed=16)
    rest = list(loader)
    assert (len(expected), len(rest), len(loader)) == (5, 3, 5)
    for (a, x), (b, y) in zip(expected[2:], rest, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    loader.set_epoch(4)
    assert len(list(loader)) == 5


def test_pad_crop_and_policy_of_the_other_loader(npz: str) -> None:
    """The image-by-image path of the recipes: the same steps, in the same order."""
    options: dict[str, Any] = {"is_training": True, "use_prefetcher": True, "auto_augment": "cifar10"}
    transform = create_transform((3, 32, 32), train_crop_mode="pad", color_jitter=0.4, **options)
    names = [type(step).__name__ for step in transform.transforms]
    assert names == ["Resize", "RandomCrop", "RandomHorizontalFlip", "AutoAugment", "MaybePILToTensor"]
    assert transform.transforms[1].padding == pad_pixels(32) == 4
    assert transform(Image.fromarray(np.full((32, 32, 3), 7, np.uint8))).shape == (3, 32, 32)
    names = [type(step).__name__ for step in create_transform((3, 32, 32), **options).transforms]
    assert names[:3] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "AutoAugment"]
    assert "RandomCrop" not in str(create_transform((3, 32, 32), is_training=True, train_crop_mode="pad", no_aug=True))
    stream = create_dataset("npz/tiny", npz, "train", is_training=True, batch_size=8)
    options = COMMON | {"train_crop_mode": "pad", "auto_augment": "cifar10", "num_workers": 0}
    assert [x.shape for x, _ in create_loader(stream, (3, 32, 32), 8, True, **options)] == [(8, 3, 32, 32)] * 5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"train_crop_mode": None}, "--train-crop-mode pad"),
        ({"auto_augment": "rand-m9"}, "--aa rand-m9"),
        ({"color_jitter": 0.4}, "--color-jitter;"),
        ({"re_prob": 0.25}, "--reprob;"),
        ({"num_aug_splits": 3}, "--aug-splits;"),
        ({"num_aug_repeats": 3, "no_aug": True}, "--aug-repeats;"),
        ({"size_schedule": object()}, "--train-img-sizes;"),
        ({"collate_fn": object()}, "--no-prefetcher"),
        ({"batch_size": 64}, "40 training samples do not fill one batch of 64"),
    ],
)
def test_unsupported_options_are_errors(npz: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        in_memory(npz, True, **kwargs)


def test_torchvisions_cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch/cifar10`: the pickled batches as torchvision unpacks them (contents too small for its checksums)."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": pixels[i], "labels": [i, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    splits = ("train", "validation")
    streams = [create_dataset("torch/cifar10", str(tmp_path), split, rank=0, world_size=1) for split in splits]
    train, validation = (create_in_memory_loader(s, (3, 32, 32), 2, crop_pct=1.0, **COMMON) for s in streams)
    assert torch.equal(train.images, torch.from_numpy(pixels[:5].reshape(10, 3, 32, 32)))
    assert train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert validation.labels.tolist() == [5, 9]
