"""Data sets that are plain arrays: `--dataset npz/NAME` reads NAME.npz in --data-dir."""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from samon.errors import UserError

TRAIN_SPLITS = {"train", "training"}
EVAL_SPLITS = {"validation", "val", "valid", "eval", "evaluation", "test"}


def read_npz(name: str, root: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, 3] (or [N, H, W]) and labels int64 [N] of a split of `npz/NAME`, or of a part of it:
    `train[:45000]` and `train[45000:]` hold out the last 5,000 training images, to choose settings on.

    `root` holds NAME.npz, or is the file itself."""
    path = Path(root or ".")
    if path.suffix != ".npz":
        path /= f"{name.removeprefix('npz/')}.npz"
    if not path.is_file():
        raise UserError(f"{path} does not exist; --dataset npz/NAME reads NAME.npz in --data-dir")
    named = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", split)
    split, *ends = named.groups() if named else (split, None, None)
    kind = "train" if split in TRAIN_SPLITS else "test" if split in EVAL_SPLITS else None
    if kind is None:
        raise UserError(f"{path}: unknown split {split!r}; use train or validation, or a part such as train[:45000]")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays: dict[str, Any] = {key: file.get(key) for key in (f"x_{kind}", f"y_{kind}")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as arrays: {error}") from None
    if missing := [key for key, array in arrays.items() if array is None]:
        raise UserError(f"{path} holds no {' and no '.join(missing)}; it needs x_train, y_train, x_test and y_test")
    images, labels = arrays.values()
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        found = f"{images.dtype} {list(images.shape)} with {len(labels)} labels"
        raise UserError(f"{path}: x_{kind} must be uint8 [N, H, W, 3] with one label each, is {found}")
    part = slice(*(int(end) if end else None for end in ends))
    if not len(images[part]):
        raise UserError(f"{path}: the part of {split} is empty, it has {len(images)} images")
    return images[part], labels[part].astype(np.int64).reshape(-1)


class ArrayDataset(Dataset):
    """Images in memory, read as PIL images; map-style, arrays named as torchvision's CIFAR names them."""

    def __init__(self, data: np.ndarray, targets: np.ndarray) -> None:
        self.data, self.targets = data, targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), int(self.targets[index])
