"""Image files of a directory or of an uncompressed tar, in an order that is the same on every process."""

import io
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from samon.data.classes import class_order, log_once
from samon.data.decode import IMAGE_KEYS
from samon.data.shards import is_hidden
from samon.errors import UserError


class ImageEntry(NamedTuple):
    """One image, not read yet.

    - path: relative to the source, for messages and class names;
    - file: the directory that contains it, or the tar if there is an `offset`;
    - array: pixels [H, W, C] or [H, W] instead of a file.
    """

    path: str
    file: str = ""
    offset: int = -1
    size: int = -1
    array: np.ndarray | None = None

    @property
    def where(self) -> str:
        return os.path.join(self.file, self.path)

    @property
    def folder(self) -> str:
        """Name of the innermost folder, '' if there is none: timm's rule for classes."""
        return os.path.basename(os.path.dirname(self.path))

    @property
    def num_bytes(self) -> int:
        if self.array is not None:
            return int(self.array.nbytes)
        return os.path.getsize(self.where) if self.offset < 0 else self.size

    def read(self) -> bytes:
        """Return the image's own bytes; a PNG of an array."""
        if self.array is not None:
            png = io.BytesIO()
            Image.fromarray(self.array).save(png, "PNG")
            return png.getvalue()
        with open(self.where if self.offset < 0 else self.file, "rb") as file:
            file.seek(max(self.offset, 0))
            return file.read(self.size)


def _list_tar(file: str, prefix: str = "", offset: int = 0) -> Iterator[ImageEntry]:
    """Yield the files of an uncompressed tar (that may lie inside another one at `offset`) and of tars inside it."""
    with open(file, "rb") as raw:
        raw.seek(offset)
        try:
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                for member in tar:
                    path = prefix + posixpath.normpath(member.name)
                    if member.isreg() and path.endswith(".tar") and not is_hidden(path):
                        yield from _list_tar(file, f"{path.removesuffix('.tar')}/", member.offset_data)
                    elif member.isreg():
                        yield ImageEntry(path, file, member.offset_data, member.size)
        except tarfile.TarError as error:
            do = "extract it and give the directory"
            raise UserError(f"{file}: not an uncompressed tar archive ({error}); {do}") from error


def _raise(error: OSError) -> NoReturn:
    raise error


def _list_directory(root: str, tars: bool) -> Iterator[ImageEntry]:
    """Yield the files below a directory; hidden directories by their name alone."""
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        relative = os.path.relpath(folder, root).removeprefix(".").lstrip("/")
        for name in names:
            path = os.path.join(relative, name)
            if tars and name.endswith(".tar") and not is_hidden(path):
                yield from _list_tar(os.path.join(root, path), f"{path.removesuffix('.tar')}/")
            else:
                yield ImageEntry(path, root)
        yield from (ImageEntry(os.path.join(relative, name), root) for name in folders if is_hidden(name))
        folders[:] = [name for name in folders if not is_hidden(name)]
        for path in (os.path.join(folder, name) for name in folders):
            if os.path.islink(path) and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(path)}/"):
                raise UserError(f"{path}: links to a folder that contains it; remove the link")


def find_images(source: str | Path, input_key: str | None = None, *, tars: bool = False) -> list[ImageEntry]:
    """Return the images below a directory or in an uncompressed tar, in natural order of their paths.

    Hidden names and images of other formats are left out and counted in the log.

    Args:
        input_key: endings of file names, separated by semicolons (default: timm's, .png .jpg .jpeg).
        tars: also look into the tars of a directory.

    Raises:
        UserError: nothing there, or no image.
    """
    source = str(source)
    if not os.path.exists(source):
        raise UserError(f"{source}: no such file or directory")
    endings = input_key.lower().split(";") if input_key else get_img_extensions()
    wanted = frozenset(f".{ending.strip().lstrip('.')}" for ending in endings)
    images: list[ImageEntry] = []
    hidden: list[str] = []
    others: Counter[str] = Counter()
    example = ""
    for entry in _list_tar(source) if os.path.isfile(source) else _list_directory(source, tars):
        ending = os.path.splitext(entry.path)[1].lower()
        if is_hidden(entry.path):
            hidden.append(entry.path)
        elif ending in wanted:
            images.append(entry)
        else:
            others[ending] += 1
            example = entry.path if ending == ".tar" or not example else example
    counts = [f"{others[f'.{key}']} .{key}" for key in sorted(IMAGE_KEYS.split(";")) if others[f".{key}"]]
    if not images:
        content = f"it has {', '.join(counts) or example}" if counts or example else "it is empty"
        if not counts and example.endswith(".tar"):
            content = "it has tar files: shards are read with --dataset wds/NAME, others must be extracted"
        raise UserError(f"{source}: no images found ({', '.join(sorted(wanted))}); {content}")
    if hidden:
        log_once(f"{source}: {len(hidden)} hidden files or folders are left out, such as {hidden[0]}")
    if counts:
        log_once(f"{source}: images with other endings are left out ({', '.join(counts)}); --input-key includes them")
    images.sort(key=lambda entry: class_order(entry.path))
    if twice := next((one.path for one, other in pairwise(images) if one.path == other.path), None):
        raise UserError(f"{source}: {twice} occurs twice, as in a tar and beside it; remove one of them")
    return images
