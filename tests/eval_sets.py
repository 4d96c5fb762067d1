"""Data sets and a model with known answers for the tests of evaluations.

An image is one color that spells a number below 1000; `Reader` reads it and answers with that class.
"""

import io
import json

import timm
import torch
from PIL import Image
from torch import nn

from samon.evals import shifts
from samon.evals.context import EvalContext
from samon.evals.datasets import EvalSpec
from samon.trainer.config import Config
from samon.trainer.flag_rows import VALIDATE
from samon.trainer.flags import by_key
from tests.sets import tar_of

SYNSETS = shifts.synsets()
CPU = torch.device("cpu")
PREPROCESSING = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
DATA_CONFIG = {"input_size": (3, 8, 8), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **PREPROCESSING}
FASHION = ("--dataset", "wds/fashion-mnist", "--data-dir", "data/fashion-mnist")


def make_context(model, data_config=DATA_CONFIG, **settings):
    """The context of a model with validate.py's default settings and some others."""
    defaults = {key: flag.default for key, flag in by_key(VALIDATE).items()}
    config = Config(**defaults | {"workers": 0, "no_prefetcher": True, "pin_mem": False} | settings)
    return EvalContext(config, model, data_config, CPU)


def spec_of(root, kind="", dataset="", split="", limit=None):
    return EvalSpec("x", dataset, str(root), split, ["accuracy"], kind, limit=limit)


def save_model(path, model="test_resnet", seed=0, **kwargs):
    """Save random weights for 10 classes; return the path as text."""
    torch.manual_seed(seed)
    torch.save(timm.create_model(model, num_classes=10, **kwargs).state_dict(), path)
    return str(path)


def color(number, size=8):
    """An RGB image whose color spells a number below 1000 in three digits."""
    digits = number // 100, number // 10 % 10, number % 10
    return Image.new("RGB", (size, size), tuple(20 * digit + 10 for digit in digits))


class Reader(nn.Module):
    """Answers with the number that an image spells, but prefers the class `favorite`."""

    num_classes = 1000

    def __init__(self, favorite=None):
        super().__init__()
        self.favorite, self.unused = favorite, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        assert (x.flatten(2).amax(2) - x.flatten(2).amin(2)).max() < 0.02, "the image is not one color"
        digits = ((x.mean((2, 3)) * 255 - 10) / 20).round().long().clamp(0, 9)
        logits = torch.zeros(len(x), 1000)
        logits[torch.arange(len(x)), digits[:, 0] * 100 + digits[:, 1] * 10 + digits[:, 2]] = 10.0
        if self.favorite is not None:
            logits[:, self.favorite] = 20.0
        return logits


class DifferentiableReader(Reader):
    """A Reader with gradients with respect to image and weights, so that it can be attacked and perturbed."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)  # unused

    def forward(self, x):
        return super().forward(x) + self.unused + 0 * x.sum()


def write_folders(root, folders, border=None):
    """{folder: numbers to spell} as PNG files; `border` frames them with 2 pixels of this color."""
    for folder, numbers in folders.items():
        (root / folder).mkdir(parents=True)
        for k, number in enumerate(numbers):
            image = color(number)
            if border:
                framed = Image.new("RGB", (12, 12), border)
                framed.paste(image, (2, 2))
                image = framed
            image.save(root / folder / f"{k}.png")
    return root


def write_shard(root, samples, names=None):
    """One shard `val.tar` of (key, number to spell, label)."""
    members = []
    for key, number, label in samples:
        buffer = io.BytesIO()
        color(number).save(buffer, "PNG")
        members += [(f"{key}.png", buffer.getvalue()), (f"{key}.cls", str(label).encode())]
    (root / "val.tar").write_bytes(tar_of(members))
    split = {"name": "val", "filenames": ["val.tar"], "shard_lengths": [len(samples)], "num_samples": len(samples)}
    info = {"splits": {"val": split}} | ({"class_names": names, "num_classes": len(names)} if names else {})
    (root / "_info.json").write_text(json.dumps(info))
    return root
