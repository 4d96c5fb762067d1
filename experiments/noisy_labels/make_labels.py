#!/usr/bin/env python3
"""Copy an `npz/NAME` data set and make a fraction of its training labels wrong; the test labels stay correct.

    python experiments/noisy_labels/make_labels.py DIR/cifar10.npz DIR/cifar10_noise20.npz --fraction 0.2

`round(fraction * N)` training images, sampled at random, get the label of another class, each class with the same
probability (symmetric noise). The labels depend only on the seed.
"""

import argparse
from pathlib import Path

import numpy as np

from samon.cli.program import run_script
from samon.data.source_factory import read_npz
from samon.errors import UserError
from samon.files import atomic_write


def with_noise(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Labels int64 [N] of which `round(fraction * N)` are another class than before."""
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    place = np.searchsorted(classes, labels)
    wrong = rng.permutation(len(labels))[: round(fraction * len(labels))]
    place[wrong] = (place[wrong] + rng.integers(1, len(classes), len(wrong))) % len(classes)
    return classes[place]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="NAME.npz with x_train, y_train, x_test and y_test")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--fraction", type=float, default=0.2, help="part of the training labels that become wrong")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0 <= args.fraction <= 1:
        raise UserError(f"--fraction: {args.fraction} is not between 0 and 1")
    if not args.target.parent.is_dir():
        raise UserError(f"{args.target.parent} does not exist; make it, or name another file")
    x_train, y_train = read_npz(args.source, "train")
    x_test, y_test = read_npz(args.source, "validation")
    noisy = with_noise(y_train, args.fraction, args.seed)
    with atomic_write(args.target) as file:
        np.savez(file, x_train=x_train, y_train=noisy, x_test=x_test, y_test=y_test)
    print(f"{args.target}: {int((noisy != y_train).sum())} of {len(noisy)} training labels are wrong")


if __name__ == "__main__":
    run_script(main)
