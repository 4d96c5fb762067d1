"""The images that come with this repository, for the examples: Fashion-MNIST, 5,000 to train on, 1,000 to test on."""

import io
import itertools
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

DATA = Path(__file__).parents[1] / "data/fashion-mnist"


def small_resnet() -> torch.nn.Module:
    """A ResNet that learns these images in a minute on a CPU."""
    return timm.create_model("resnet10t", channels=[16, 32, 64, 128], stem_width=16, in_chans=1, num_classes=10)


def batches(split: str, batch: int = 50, samples: int | None = None, size: int = 28) -> DataLoader:
    """Batches of (images [B, 1, size, size], standardised, and labels [B]) of `train` or `validation`, all or the
    first `samples`."""
    members = itertools.chain.from_iterable(_members(path) for path in sorted(DATA.glob(f"{split}-*.tar.gz")))
    images, labels = [], []
    for image, label in itertools.islice(members, samples):
        images.append(np.asarray(Image.open(io.BytesIO(image))))
        labels.append(label)
    x = (torch.from_numpy(np.stack(images)).float()[:, None] / 255 - 0.286) / 0.353
    x = x if size == 28 else F.interpolate(x, size=(size, size), mode="bilinear")
    return DataLoader(TensorDataset(x, torch.tensor(labels)), batch, shuffle=split == "train")


def _members(path: Path) -> "list[tuple[bytes, int]]":
    with tarfile.open(path) as tar:
        content = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    keys = [name.removesuffix(".cls") for name in content if name.endswith(".cls")]
    return [(content[f"{key}.png"], int(content[f"{key}.cls"])) for key in keys]


@torch.no_grad()
def accuracy(model: torch.nn.Module, **how: Any) -> float:
    """Share of the test images that the model gets right, in %."""
    model.eval()
    right = [model(x).argmax(1) == y for x, y in batches("validation", **how)]
    return 100 * float(torch.cat(right).float().mean())
