"""Small shard sets for the tests: sample i has label i, so a target says which sample it was."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from samon.data import create_dataset, create_loader

# validate.py's flags for a small model with random weights.
RANDOM_MODEL = (
    *("--model", "test_resnet", "--no-pretrained", "--num-classes", "10", "--img-size", "32"),
    *("--workers", "0", "--device", "cpu"),
)

opened = []  # loaders whose workers conftest.py ends after each test
UNEVEN = (5, 1, 7, 3, 4, 2, 6, 1)
TOTAL = sum(UNEVEN)  # 29 samples


def jpeg(index, size=(24, 18)):
    """Noise, a different one for each index."""
    pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def tar_of(members):
    """Bytes of a tar with (name, content) members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def write_images(root, *paths):
    """An image for each path, its bytes those of `jpeg(number)`."""
    for number, name in enumerate(paths):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(number))
    return str(root)


def write_set(root: Path, lengths=UNEVEN, replace=None, num_classes=None):
    """A split `train` with shards of these lengths; ``replace[i]`` gives sample i other members by suffix."""
    root.mkdir(parents=True, exist_ok=True)
    index, names = 0, []
    for number, length in enumerate(lengths):
        members = []
        for _ in range(length):
            sample = {"jpg": jpeg(index), "cls": str(index).encode()} | (replace or {}).get(index, {})
            members += [(f"s{index:04d}.{key}", data) for key, data in sample.items() if data is not None]
            index += 1
        names.append(f"train-{number:04d}.tar")
        (root / names[-1]).write_bytes(tar_of(members))
    split = {"name": "train", "num_samples": index, "filenames": names, "shard_lengths": list(lengths)}
    info = {"num_classes": num_classes or index, "splits": {"train": split}}
    (root / "_info.json").write_text(json.dumps(info))
    return str(root)


def change_info(root, split=None, **changes):
    """Change the split's entry and the top level of a set's `_info.json`."""
    path = Path(root, "_info.json")
    info = json.loads(path.read_text()) | changes
    info["splits"]["train"] |= split or {}
    path.write_text(json.dumps(info))


def make_loader(root, *, training=True, batch=2, workers=0, world=1, rank=0, name="wds/test", dataset=None, **loading):
    """Our loader over such a set."""
    stream = create_dataset(
        name, root, "train", is_training=training, batch_size=batch, rank=rank, world_size=world, **(dataset or {})
    )
    loader = create_loader(stream, (3, 12, 12), batch, training, num_workers=workers, device="cpu", **loading)
    opened.append(loader)
    return loader


def targets(loader):
    """Targets in order, as a list of batches."""
    return [target.tolist() for _, target in loader]


def flat(loader):
    """Targets in order."""
    return [i for batch in targets(loader) for i in batch]


def same(first, second):
    """Whether two lists of (input, target) batches are equal to the bit."""
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )
