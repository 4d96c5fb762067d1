"""Data and model of the examples: this repository's Fashion-MNIST images, 5,000 for training and 1,000 for testing."""

import io
import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

DATA = Path(__file__).parents[1] / "data/fashion-mnist"


def small_resnet() -> torch.nn.Module:
    """A ResNet that trains on these images in a minute on a CPU."""
    return timm.create_model("resnet10t", channels=[16, 32, 64, 128], stem_width=16, in_chans=1, num_classes=10)


def batches(split: str, batch_size: int = 50, samples: int | None = None, size: int = 28) -> DataLoader:
    """Batches of (standardized images [B, 1, size, size], labels [B]) of `train` or `validation`: the first `samples`
    images, or all."""
    images, labels = [], []
    for image, label in itertools.islice(_read_samples(split), samples):
        images.append(np.asarray(image))
        labels.append(label)
    x = (torch.from_numpy(np.stack(images)).float()[:, None] / 255 - 0.286) / 0.353
    x = x if size == 28 else F.interpolate(x, size=(size, size), mode="bilinear")
    return DataLoader(TensorDataset(x, torch.tensor(labels)), batch_size, shuffle=split == "train")


def _read_samples(split: str) -> Iterator[tuple[Image.Image, int]]:
    for path in sorted(DATA.glob(f"{split}-*.tar.gz")):
        with tarfile.open(path) as tar:
            files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
        for name, content in files.items():
            if name.endswith(".cls"):
                yield Image.open(io.BytesIO(files[name.replace(".cls", ".png")])), int(content)


@torch.no_grad()
def accuracy(model: torch.nn.Module, samples: int | None = None, size: int = 28) -> float:
    """Accuracy on the test images in %."""
    model.eval()
    correct = [model(x).argmax(1) == y for x, y in batches("validation", samples=samples, size=size)]
    return 100 * float(torch.cat(correct).float().mean())
