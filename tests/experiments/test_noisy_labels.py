"""experiments/noisy_labels: as many wrong labels as asked for, of other classes, in the training images alone."""

from pathlib import Path

import numpy as np
import pytest

from experiments.noisy_labels import make_labels
from samon.errors import UserError


def test_only_training_labels_change(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    images, labels = rng.integers(0, 255, (3000, 4, 4, 3), np.uint8), rng.choice([1, 3, 4, 8], 3000)
    source, target, again = tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "c.npz"
    np.savez(source, x_train=images, y_train=labels, x_test=images[:50], y_test=labels[:50])
    for file in (target, again):
        make_labels.main([str(source), str(file), "--fraction", "0.3", "--seed", "2"])
    with np.load(target) as noisy, np.load(again) as repeated:
        wrong = noisy["y_train"] != labels
        assert wrong.sum() == 900
        # Of 900, each of 3 other classes gets 300 with a standard deviation of at most 15: 5 of them
        moved = np.searchsorted([1, 3, 4, 8], noisy["y_train"]) - np.searchsorted([1, 3, 4, 8], labels)
        assert np.abs(np.bincount(moved[wrong] % 4, minlength=4)[1:] - 300).max() < 75
        assert wrong[:1500].sum() == pytest.approx(450, abs=75)  # not only in front
        assert np.array_equal(noisy["y_train"], repeated["y_train"])
        for name, right in (("x_train", images), ("x_test", images[:50]), ("y_test", labels[:50])):
            assert np.array_equal(noisy[name], right)


def test_no_part_above_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--fraction: 1\.5 is not between 0 and 1"):
        make_labels.main(["a.npz", "b.npz", "--fraction", "1.5"])
