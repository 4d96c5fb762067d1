"""Data sets in memory: equality with image-by-image augmentation, exact epochs, ranks, resume, refusals."""

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
from samon.data.loader import GRAY, create_transform, pad_pixels

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SHARDS = Path(__file__).parents[2] / "data/fashion-mnist"


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 + 11 random images of 32 px in CIFAR's layout; the first pixel tells the index."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, count in (("train", 40), ("test", 11)):
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        images[:, 0, 0, 0] = np.arange(count)
        arrays |= {f"x_{name}": images, f"y_{name}": np.arange(count) % 10}
    root = tmp_path_factory.mktemp("npz")
    np.savez(root / "tiny.npz", **arrays)
    return root


def in_memory(npz: Path, is_training: bool, batch_size: int = 8, **kwargs: Any) -> InMemoryLoader:
    stream = create_dataset(
        "npz/tiny",
        root=str(npz),
        split="train" if is_training else "validation",
        batch_size=batch_size,
        rank=0,
        world_size=1,
    )
    options = {"train_crop_mode": "pad", "mean": MEAN, "std": STD, "device": "cpu", "color_jitter": 0.0} | kwargs
    return create_in_memory_loader(stream, (3, 32, 32), batch_size, is_training, **options)


def on_rank(npz: Path, rank: int, world: int, is_training: bool, batch_size: int = 4) -> InMemoryLoader:
    loader = in_memory(npz, is_training, batch_size)
    loader.rank, loader.world_size = rank, world
    return loader


def test_corners_reach_every_place_of_the_padded_image() -> None:
    augment = Augment((32, 32))
    corners = augment.draw(1000, seed=1, epoch=0).corner
    assert corners.unique().tolist() == list(range(2 * augment.pad + 1)) == list(range(9))


def test_crop_and_flip_equal_torchvisions_for_the_same_draws() -> None:
    augment = Augment((32, 32))
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    index = torch.randperm(16)
    draws = augment.draw(16, seed=1, epoch=2)
    out = augment(images[index], index, draws)
    for row, i in enumerate(index.tolist()):
        padded = transforms.functional.pad(images[i], [4])
        top, left = draws.corner[i].tolist()
        expected = padded[:, top : top + 32, left : left + 32]
        expected = expected.flip(-1) if draws.flip[i] else expected
        assert torch.equal(out[row], expected)
    assert 0 < draws.flip.sum() < 16
    assert draws.corner.min() >= 0
    assert draws.corner.max() <= 8


def test_autoaugment_equals_torchvisions_for_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation of every sub-policy, batched, against torchvision's class applied image by image."""
    augment = Augment((32, 32), hflip=0.0, policy=True)
    count = 400
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    draws = augment.draw(count, seed=5, epoch=0)
    draws.corner[:] = augment.pad  # the crop leaves the image as it is
    index = torch.arange(count)
    out = augment(images, index, draws)
    reference = AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[GRAY] * 3)
    for i in range(count):
        given = (int(draws.policy[i]), draws.chance[i], (~draws.negative[i]).long())
        monkeypatch.setattr(reference, "get_params", lambda _, given=given: given)
        torch.testing.assert_close(out[i], reference(images[i]), atol=0, rtol=0)
    assert len(set(draws.policy.tolist())) == 25
    assert (out != images).flatten(1).any(1).float().mean() > 0.5


def test_batch_and_history_do_not_matter() -> None:
    """A sample is augmented the same way alone and in any batch."""
    augment = Augment((32, 32), policy=True)
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)
    draws = augment.draw(12, seed=0, epoch=7)
    together = augment(images, torch.arange(12), draws)
    for i in range(12):
        assert torch.equal(augment(images[i : i + 1], torch.tensor([i]), draws)[0], together[i])
    other = augment.draw(12, seed=0, epoch=8)
    assert not torch.equal(other.order, draws.order)


def test_evaluation_gives_every_image_once_as_the_other_loader_does(npz: Path) -> None:
    ours = list(in_memory(npz, False))
    stream = create_dataset("npz/tiny", root=str(npz), split="validation", batch_size=8)
    other = create_loader(stream, (3, 32, 32), 8, mean=MEAN, std=STD, device="cpu", num_workers=0, crop_pct=1.0)
    assert len(ours) == len(other) == 2
    for (a, x), (b, y) in zip(ours, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert torch.equal(x, y)


def test_training_batches_partition_an_epoch_over_ranks(npz: Path) -> None:
    ranks = [on_rank(npz, rank, 3, True) for rank in range(3)]
    assert [len(r) for r in ranks] == [3, 3, 3]  # 40 // 12
    for loader in ranks:
        loader.augment = None  # so that the first pixel still tells the index
    seen: list[int] = []
    for loader in ranks:
        loader.set_epoch(4)
        batches = list(loader)
        assert len(batches) == 3
        pixels = torch.cat([x for x, _ in batches])[:, 0, 0, 0] * STD[0] * 255 + MEAN[0] * 255
        seen += pixels.round().int().tolist()
    assert len(seen) == len(set(seen)) == 36
    evaluated = [sum(len(y) for _, y in on_rank(npz, rank, 3, False)) for rank in range(3)]
    assert evaluated == [4, 4, 3]


def test_resume_in_mid_epoch_and_in_other_epochs_is_bit_exact(npz: Path) -> None:
    whole = in_memory(npz, True, auto_augment="cifar10")
    whole.set_epoch(3)
    expected = list(whole)
    later = in_memory(npz, True, auto_augment="cifar10")
    later.set_epoch(3, samples_consumed=16)
    rest = list(later)
    assert len(expected) == len(later) == 5
    assert len(rest) == 3
    for (a, x), (b, y) in zip(expected[2:], rest, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    later.set_epoch(4)
    assert len(list(later)) == 5


def test_labels_follow_their_images(npz: Path) -> None:
    loader = in_memory(npz, True, no_aug=True)
    for x, y in loader:
        index = (x[:, 0, 0, 0] * STD[0] * 255 + MEAN[0] * 255).round().int()
        assert torch.equal(index % 10, y.int())


def test_shards_are_read_into_memory_and_are_resized_once() -> None:
    stream = create_dataset("wds/fashion-mnist", root=str(SHARDS), split="validation", rank=0, world_size=1)
    loader = create_in_memory_loader(stream, (3, 32, 32), 500, mean=MEAN, std=STD, device="cpu")
    plain = create_dataset("wds/fashion-mnist", root=str(SHARDS), split="validation", batch_size=500)
    other = create_loader(
        plain,
        (3, 32, 32),
        500,
        mean=MEAN,
        std=STD,
        device="cpu",
        num_workers=0,
        crop_pct=1.0,
        interpolation="bicubic",
        decoder="pil",
    )
    assert loader.num_samples == 1000
    for (a, x), (b, y) in zip(loader, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        assert torch.equal(x, y)


def test_evaluation_crop_is_timms(npz: Path) -> None:
    ours = torch.cat([x for x, _ in in_memory(npz, False, crop_pct=0.875)])
    stream = create_dataset("npz/tiny", root=str(npz), split="validation", batch_size=8)
    other = create_loader(
        stream,
        (3, 32, 32),
        8,
        mean=MEAN,
        std=STD,
        device="cpu",
        num_workers=0,
        crop_pct=0.875,
        interpolation="bicubic",
        decoder="pil",
    )
    torch.testing.assert_close(ours, torch.cat([x for x, _ in other]))


def test_pad_crop_and_policy_of_the_ordinary_loader(npz: Path) -> None:
    """The image-by-image path of the recipes: the same steps, in the same order."""
    made = create_transform(
        (3, 32, 32),
        is_training=True,
        train_crop_mode="pad",
        auto_augment="cifar10",
        color_jitter=0.4,
        use_prefetcher=True,
    )
    names = [type(step).__name__ for step in made.transforms]
    assert names == ["Resize", "RandomCrop", "RandomHorizontalFlip", "AutoAugment", "MaybePILToTensor"]
    assert made.transforms[1].padding == pad_pixels(32) == 4
    image = Image.fromarray(np.full((32, 32, 3), 7, np.uint8))
    assert made(image).shape == (3, 32, 32)
    area = create_transform((3, 32, 32), is_training=True, auto_augment="cifar10")
    names = [type(step).__name__ for step in area.transforms]
    assert names[:3] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "AutoAugment"]
    plain = create_transform((3, 32, 32), is_training=True, train_crop_mode="pad", no_aug=True)
    assert "RandomCrop" not in str(plain)
    stream = create_dataset("npz/tiny", root=str(npz), split="train", is_training=True, batch_size=8)
    loader = create_loader(
        stream,
        (3, 32, 32),
        8,
        True,
        train_crop_mode="pad",
        auto_augment="cifar10",
        mean=MEAN,
        std=STD,
        device="cpu",
        num_workers=0,
    )
    assert [x.shape for x, _ in loader] == [(8, 3, 32, 32)] * 5


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"train_crop_mode": None}, "--train-crop-mode pad"),
        ({"auto_augment": "rand-m9"}, "--aa rand-m9"),
        ({"color_jitter": 0.4}, "--color-jitter;"),
        ({"re_prob": 0.25}, "--reprob;"),
        ({"size_schedule": object()}, "--train-img-sizes;"),
        ({"collate_fn": object()}, "--no-prefetcher"),
        ({"batch_size": 64}, "40 training samples do not fill one batch of 64"),
    ],
)
def test_unsupported_augmentation_is_an_error(npz: Path, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        in_memory(npz, True, **kwargs)


def test_torchvisions_cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch/cifar10`: the pickled batches as torchvision unpacks them (contents too small for its checksums)."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": pixels[i], "labels": [i, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    streams = {
        split: create_dataset("torch/cifar10", root=str(tmp_path), split=split, rank=0, world_size=1)
        for split in ("train", "validation")
    }
    train = create_in_memory_loader(
        streams["train"], (3, 32, 32), 2, True, train_crop_mode="pad", color_jitter=0, mean=MEAN, std=STD, device="cpu"
    )
    assert torch.equal(train.images, torch.from_numpy(pixels[:5].reshape(10, 3, 32, 32)))
    assert train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    test = create_in_memory_loader(streams["validation"], (3, 32, 32), 2, mean=MEAN, std=STD, device="cpu")
    assert test.labels.tolist() == [5, 9]
