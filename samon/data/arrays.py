"""Data sets that are plain arrays: `--dataset npz/NAME` reads NAME.npz in --data-dir."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from samon.data.splits import train_or_test
from samon.errors import UserError


def npz_path(name: str, root: str | None) -> Path:
    """Return the file of `npz/NAME`: NAME.npz in `root`, or `root` itself."""
    path = Path(root or ".")
    return path if path.suffix == ".npz" else path / f"{name.removeprefix('npz/')}.npz"


def read_npz(name: str, root: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [N, H, W, 3] (or [N, H, W]) and labels int64 [N] of a split of `npz/NAME`.

    Raises:
        UserError: no such file or split, or arrays that are no images with one class each.
    """
    path = npz_path(name, root)
    if not path.is_file():
        raise UserError(f"{path} does not exist; --dataset npz/NAME reads NAME.npz in --data-dir")
    kind = train_or_test(split, str(path))
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays: dict[str, Any] = {key: file.get(key) for key in (f"x_{kind}", f"y_{kind}")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as arrays: {error}") from None
    if missing := [key for key, array in arrays.items() if array is None]:
        raise UserError(f"{path} holds no {' and no '.join(missing)}; it needs x_train, y_train, x_test and y_test")
    images, labels = arrays.values()
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.shape[3:] not in ((), (3,)) or images.ndim < 3:
        transpose = f"; write x_{kind}.transpose(0, 2, 3, 1)" if images.ndim == 4 and images.shape[1] == 3 else ""
        raise UserError(f"{path}: x_{kind} is {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 3]{transpose}")
    return images, _integers(labels, len(images), f"{path}: y_{kind}")


def _integers(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    """Labels int64 [N]; whole numbers of another type, or [N, 1], are taken as these."""
    shape = list(labels.shape)
    if shape not in ([count], [count, 1]) or labels.dtype.kind not in "buif":
        raise UserError(f"{where} is {labels.dtype} {shape}, not one class number for each of the {count} images")
    labels = labels.reshape(-1)
    with np.errstate(invalid="ignore"):
        whole = labels.astype(np.int64)
    wrong = np.flatnonzero((whole != labels) | (whole < 0))
    if len(wrong):
        raise UserError(f"{where}: label {labels[wrong[0]]} of image {wrong[0]} is no class number")
    return whole


class ArrayDataset(Dataset):
    """Images in memory, read as PIL images; map-style, arrays named as torchvision's CIFAR names them."""

    def __init__(self, data: np.ndarray, targets: np.ndarray) -> None:
        self.data, self.targets = data, targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), int(self.targets[index])
