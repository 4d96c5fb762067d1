#!/usr/bin/env python3
"""Write the shards of `data/fashion-mnist/`: 5,000 + 1,000 real Fashion-MNIST images, class-balanced.

    python tools/make_fashion_mnist.py --source DIR --output data/fashion-mnist

DIR holds Fashion-MNIST's four original files (`train-images-idx3-ubyte.gz`, ...), as its authors publish them and
as Debian's package `dataset-fashion-mnist` installs them under /usr/share/datasets/fashion-mnist.
The first images of each class are taken, so the result is the same bytes wherever it is made.
"""

import argparse
import gzip
import io
import json
import random
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# split: (prefix of the original files, images per class, shards). 16 shards feed 2 processes of up to 8 workers.
SPLITS = {"train": ("train", 500, 16), "validation": ("t10k", 100, 8)}


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an IDX file; its magic number's last byte is the number of dimensions."""
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3]
    shape = struct.unpack(f">{ndim}I", raw[4 : 4 + 4 * ndim])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def shard_bytes(samples: list[tuple[str, bytes, int]]) -> bytes:
    """A gzipped tar of (key, PNG, label) samples, the same bytes for the same samples."""
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, png, label in samples:
            for name, data in ((f"{key}.png", png), (f"{key}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    # Two tar headers cost three times what a 450 byte PNG does; gzip takes them back.
    return gzip.compress(tar_bytes.getvalue(), 9, mtime=0)


def make_split(source: Path, output: Path, split: str) -> dict:
    """Write one split's shards; return its entry for `_info.json`."""
    prefix, per_class, num_shards = SPLITS[split]
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    chosen = [int(i) for c in range(len(CLASSES)) for i in np.flatnonzero(labels == c)[:per_class]]
    random.Random(0).shuffle(chosen)
    samples = []
    for i in chosen:
        png = io.BytesIO()
        Image.fromarray(images[i]).save(png, "PNG", optimize=True)
        samples.append((f"{prefix}-{i:05d}", png.getvalue(), int(labels[i])))
    filenames, lengths = [], []
    for n in range(num_shards):
        part = samples[n * len(samples) // num_shards : (n + 1) * len(samples) // num_shards]
        name = f"{split}-{n:02d}.tar.gz"
        (output / name).write_bytes(shard_bytes(part))
        filenames.append(name)
        lengths.append(len(part))
    return {"name": split, "num_samples": len(samples), "filenames": filenames, "shard_lengths": lengths}


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    splits = {split: make_split(args.source, args.output, split) for split in SPLITS}
    info = {"name": "fashion-mnist", "num_classes": len(CLASSES), "class_names": CLASSES, "splits": splits}
    (args.output / "_info.json").write_text(json.dumps(info, indent=1) + "\n")
    size = sum(p.stat().st_size for p in args.output.iterdir())
    print(f"{args.output}: {size / 1e6:.2f} MB, {[s['num_samples'] for s in splits.values()]} images")


if __name__ == "__main__":
    main()
