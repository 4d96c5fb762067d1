"""Which images a run reads: augmentation, mixing, splits, and the numbering of classes."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from samon.errors import UserError
from samon.trainer import build, config
from samon.trainer.loaders import without_counts
from samon.trainer.logging import RunLogger
from samon.trainer.loop import updates
from samon.trainer.meter import Timer
from samon.trainer.run_dir import RunDir
from samon.trainer.state import Progress, TrainState
from tests.runs import BASE, CPU, built
from tests.sets import write_set


def batches(tmp_path: Path, *args: str, epochs: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The training batches of the first epochs as the model sees them."""
    torch.manual_seed(42)
    run = built(*args)
    logger = RunLogger(run, RunDir(tmp_path))
    found: list[tuple[Tensor, Tensor]] = []
    for epoch in range(epochs):
        run.progress = Progress(epoch=epoch)
        for micro_batches, _ in updates(run, Timer(run.progress), logger, None):
            found += micro_batches
    logger.close()
    return found


AUGMENTATION = [
    ("--hflip 0", "--hflip 1"),
    ("--vflip 0", "--vflip 1"),
    ("--aa rand-m9", ""),
    ("--scale 0.9 1", ""),
    ("--ratio 0.5 2", ""),
    ("--reprob 1 --remode const --recount 2", ""),
    ("--train-interpolation bicubic", ""),
    ("--train-crop-mode rkrc", ""),
    ("--gaussian-blur-prob 1", ""),
    ("--mean 0.1", ""),
    ("--std 0.1", ""),
]


@pytest.mark.parametrize(("one", "two"), AUGMENTATION)
def test_augmentation_flags_change_the_images_not_their_order(one: str, two: str, tmp_path: Path) -> None:
    first, second = batches(tmp_path, *one.split()), batches(tmp_path, *two.split())
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], second[0][0])


def test_without_augmentation_the_seed_changes_the_order_alone(tmp_path: Path) -> None:
    pixels = []
    for seed in ("7", "8"):
        images = torch.cat([x for x, _ in batches(tmp_path, "--no-aug", "--seed", seed)])
        pixels.append(images.flatten(1).sum(1))
    assert not torch.equal(pixels[0].sort()[0], pixels[1].sort()[0])  # another order takes other 64 of 5,000 samples


@pytest.mark.parametrize("mean", [True, False])
def test_no_prefetcher_gives_the_same_images(mean: bool, tmp_path: Path) -> None:
    """Also with timm's mean and deviation of three channels, which become one."""
    found = []
    for extra in ([], ["--no-prefetcher"]):
        args = BASE if mean else [item for item in BASE if item not in ("--mean", "0.286", "--std", "0.353")]
        run = build.build(config.parse([*args, "--no-aug", *extra]), CPU)
        found.append(next(iter(run.train_loader)))
    (a, x), (b, y) = found
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert torch.equal(x, y)
    assert abs(float(a.mean())) < 1


@pytest.mark.parametrize("prefetcher", [[], ["--no-prefetcher"]], ids=str)
def test_mixup_is_turned_off(prefetcher: list[str], tmp_path: Path) -> None:
    args = ["--mixup", "1", "--smoothing", "0", "--mixup-off-epoch", "1", "--epochs", "2"]
    seen = batches(tmp_path, *args, *prefetcher, epochs=2)
    assert [bool(((t == 0) | (t == 1)).all()) for _, t in seen] == [False] * 4 + [True] * 4


# --- image folders ----------------------------------------------------------------------------------------------------
Folders = Callable[[str, str], Path]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Makes image folders of the classes for training and for validation: 16 and 4 images each, of one gray."""

    def make(train_classes: str, validation_classes: str) -> Path:
        root = tmp_path / "images"
        for split, names, count in (("train", train_classes, 16), ("val", validation_classes, 4)):
            for name in names.split():
                (root / split / name).mkdir(parents=True)
                for index in range(count):
                    gray = 40 * (ord(name[0]) - ord("a")) + index
                    Image.new("RGB", (36, 36), (gray, gray, gray)).save(root / split / name / f"{index}.png")
        return root

    return make


def built_on(root: Path, *args: str, resumed: TrainState | None = None) -> build.Run:
    argv = ["--model", "test_resnet", "--img-size", "32", "-b", "8", "-j", "0", "--epochs", "3", "--lr", "0.05"]
    argv += ["--data-dir", str(root), "--val-split", "val", *args]
    return build.build(config.parse(argv), CPU, resumed)


def test_the_head_takes_the_number_of_classes(folders: Folders, caplog: pytest.LogCaptureFixture) -> None:
    run = built_on(folders("ant bee cat", "ant bee cat"))
    assert (run.config.num_classes, run.class_names) == (3, ["ant", "bee", "cat"])
    built_on(run.config.data_dir, "--num-classes", "5")
    assert "has 3 classes, the model 5; --num-classes 3 fits" in caplog.text


def test_the_same_images_in_both_splits(folders: Folders) -> None:
    root = folders("ant bee", "ant bee")
    with pytest.raises(UserError, match=r"share images, those of .*images/train; give --data-dir the directory above"):
        built_on(root / "train")
    with pytest.raises(UserError, match="share images"):
        built("--val-split", "train")


def test_a_class_in_validation_only(folders: Folders) -> None:
    with pytest.raises(UserError, match="images/val: class 'beee' is not among the 3 trained; did you mean 'bee'"):
        built_on(folders("ant bee cat", "ant beee cat"))


def test_a_missing_class_in_validation_shifts_no_label(folders: Folders, caplog: pytest.LogCaptureFixture) -> None:
    root = folders("ant bee cat", "ant cat")
    run = built_on(root)
    assert "has 2 of the 3 classes: its labels are numbered as in training" in caplog.text
    assert {label for _, target in run.eval_loader for label in target.tolist()} == {0, 2}
    (root / "map.pkl").write_bytes(pickle.dumps({0: 0, 1: 0, 2: 1}))  # cat is 2 in training, 1 in validation
    with pytest.raises(UserError, match="number different classes; map their names instead"):
        built_on(root, "--class-map", "map.pkl")
    with pytest.raises(UserError, match="other labels than the run to resume"):
        built_on(root, "--class-map", "map.pkl", resumed=TrainState({}, class_names=["ant", "bee", "cat"]))


def test_a_resumed_run_keeps_the_labels_of_its_classes(folders: Folders) -> None:
    root, trained = folders("ant cat", "ant cat"), TrainState({}, class_names=["ant", "bee", "cat"])
    run = built_on(root, "--num-classes", "3", resumed=trained)
    assert {label for _, target in run.train_loader for label in target.tolist()} == {0, 2}
    with pytest.raises(UserError, match=r"images/train: class 'cat' is not among the 2 trained"):
        built_on(root, resumed=TrainState({}, class_names=["ant", "bee"]))


def test_a_number_of_samples_does_not_cut_an_image_folder(folders: Folders, caplog: pytest.LogCaptureFixture) -> None:
    """Its files lie class by class, so that the first ones are of the first classes."""
    root = folders("ant bee", "ant bee")
    run = built_on(root, "--train-num-samples", "2", "--val-num-samples", "3")
    assert (run.train_loader.num_samples, run.eval_loader.num_samples) == (32, 8)
    assert (run.config.train_num_samples, run.config.val_num_samples) == (None, None)  # as validate.py reads it
    assert "--train-num-samples and --val-num-samples: no effect on image folders;" in caplog.text
    flags = ["--model", "test_resnet", "--dataset", "torch/imagenet", "--val-num-samples", "3"]
    without_counts(config.parse(flags), run.dist_info)
    assert "--val-num-samples: no effect on torch/imagenet;" in caplog.text
    part = built_on(root, "--val-split", "val[:2]")
    assert sorted(label for _, target in part.eval_loader for label in target.tolist()) == [0, 1]


def test_an_epoch_repeats_the_images(folders: Folders) -> None:
    root = folders("ant bee", "ant bee")
    assert len(built_on(root, "--epoch-repeats", "2").train_loader) == 2 * len(built_on(root).train_loader)


@pytest.mark.parametrize("schedule", ["constant", "progressive"])
def test_several_image_sizes(schedule: str, folders: Folders) -> None:
    args = ["--train-img-sizes", "16", "32", "--train-size-schedule", schedule, "--train-batches-per-epoch", "6"]
    root = folders("ant bee", "ant bee")

    def sizes(*extra: str) -> list[int]:
        run, seen = built_on(root, *args, *extra), []
        for epoch in range(3):
            run.train_loader.set_epoch(epoch, 0)
            seen += [images.shape[-1] for images, _ in run.train_loader]
        return seen

    seen = sizes("--train-size-schedule-spread", "0", "--train-size-random-mix", "0")
    assert len(seen) == 18
    assert set(seen) == {16, 32}
    if schedule == "progressive":
        assert seen[:6] + seen[-6:] == [16] * 6 + [32] * 6
    assert set(sizes("--train-size-probs", "0", "1")) == {32}


def test_more_samples_than_there_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = ["--data-dir", write_set(tmp_path / "data", lengths=(16, 16), num_classes=32), "--num-classes", "32"]
    args += ["--in-chans", "3", "--val-split", "", "--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.2"]
    built(*args, "--train-num-samples", "32")
    assert "more than once" not in caplog.text
    assert (
        built(*args, "--train-num-samples", "16", "--epoch-repeats", "2").train_loader.num_samples == 32
    )  # as in timm
    built(*args, "--train-num-samples", "48")
    assert "--train-num-samples 48: an epoch passes more than once over the 32 samples" in caplog.text
