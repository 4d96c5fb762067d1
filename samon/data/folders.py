"""Image files of a directory, or of a plain tar read in place, always in the same order."""

import io
import logging
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from samon.data.classes import class_order
from samon.data.decode import IMAGE_KEYS
from samon.errors import UserError

_log_once = cache(logging.getLogger("samon").warning)  # a set is opened several times in a run

# Endings of images that can be decoded, of which timm reads .png, .jpg and .jpeg.
KNOWN_ENDINGS = frozenset(f".{key}" for key in IMAGE_KEYS.split(";"))


class Item(NamedTuple):
    """One image.

    - path: relative to the source, for people and class names;
    - file: the directory that it lies in, or the tar if there is an `offset`;
    - array: pixels [H, W, C] or [H, W] instead of a file.
    """

    path: str
    file: str = ""
    offset: int = -1
    size: int = -1
    array: Any = None

    @property
    def where(self) -> str:
        return os.path.join(self.file, self.path)

    @property
    def folder(self) -> str:
        """Name of the innermost folder, '' if there is none: timm's rule for classes."""
        return os.path.basename(os.path.dirname(self.path))

    @property
    def nbytes(self) -> int:
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


def is_hidden(path: str) -> bool:
    """Whether a relative path leads through a hidden name or the folder that macOS adds to archives."""
    parts = path.split("/")
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in parts)


def tar_items(file: str, prefix: str = "", offset: int = 0) -> Iterator[Item]:
    """Yield the files of a plain tar (that may lie inside another one at `offset`) and of tars inside it.

    Raises:
        UserError: no plain tar.
    """
    with open(file, "rb") as raw:
        raw.seek(offset)
        try:
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                for member in tar:
                    path = prefix + posixpath.normpath(member.name)
                    if member.isreg() and path.endswith(".tar") and not is_hidden(path):
                        yield from tar_items(file, f"{path.removesuffix('.tar')}/", member.offset_data)
                    elif member.isreg():
                        yield Item(path, file, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UserError(f"{file}: no plain tar archive ({error}); extract it and give the directory") from error


def _raise(error: OSError) -> NoReturn:
    raise error


def _directory_items(root: str, tars: bool) -> Iterator[Item]:
    """Yield the files below a directory; hidden directories by their name alone."""
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        relative = os.path.relpath(folder, root).removeprefix(".").lstrip("/")
        for name in names:
            path = os.path.join(relative, name)
            if tars and name.endswith(".tar") and not is_hidden(path):
                yield from tar_items(os.path.join(root, path), f"{path.removesuffix('.tar')}/")
            else:
                yield Item(path, root)
        for name in filter(is_hidden, folders):
            yield Item(os.path.join(relative, name), root)
        folders[:] = [name for name in folders if not is_hidden(name)]


def find_images(source: str | Path, endings: Iterable[str] | None = None, *, tars: bool = False) -> list[Item]:
    """Return the images below a directory or in a plain tar, in natural order of their paths.

    Hidden names and images of other formats are left out and counted in the log.

    Args:
        endings: of the files' names, with the dot (default: timm's, .png .jpg .jpeg).
        tars: also look into the tars of a directory.

    Raises:
        UserError: no such place, or no image there.
    """
    source = str(source)
    if not os.path.exists(source):
        raise UserError(f"{source}: no such file or directory")
    wanted = frozenset(ending.lower() for ending in endings or get_img_extensions())
    found: list[Item] = []
    hidden: list[str] = []
    other: Counter[str] = Counter()
    seen = ""
    for item in tar_items(source) if os.path.isfile(source) else _directory_items(source, tars):
        ending = os.path.splitext(item.path)[1].lower()
        if is_hidden(item.path):
            hidden.append(item.path)
        elif ending in wanted:
            found.append(item)
        else:
            other[ending] += ending in KNOWN_ENDINGS
            seen = item.path if ending == ".tar" or not seen else seen
    more = ", ".join(f"{count} {ending}" for ending, count in sorted(other.items()) if count)
    if not found:
        raise UserError(f"{source}: no images found ({', '.join(sorted(wanted))}){_instead(source, more, seen)}")
    if hidden:
        _log_once(f"{source}: {len(hidden)} hidden files or folders are left out, such as {hidden[0]}")
    if more:
        _log_once(f"{source}: images with other endings are left out ({more}); --input-key names those to read")
    return sorted(found, key=lambda item: class_order(item.path))


def _instead(source: str, more: str, seen: str) -> str:
    """What a place without images has."""
    if more:
        return f"; it has {more}"
    if seen.endswith(".tar"):
        return "; it has tar files: shards are read with --dataset wds/NAME, others must be extracted"
    return f"; it has {seen}" if seen else "; it is empty"
