"""Atomic file writes, and errors of writing that say what to do."""

import csv
import errno
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from samon.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_WRITES = (*_FULL, errno.EFBIG, errno.EIO)  # these name no file


@contextmanager
def replacing(path: Path, size: int = 0) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end, fsynced; after an exception `path` is as it was. A device or a
    pipe, such as /dev/stdout, is written to directly.

    Args:
        size: bytes that it will have, for the error of a full disk; 0 if that is not known.

    Raises:
        OSError: naming `path`, as `writing` says.
    """
    part = _part(path)
    with writing(path, size):
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                yield file
            return
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            _sync_directory(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, size: int = 0) -> Iterator[None]:
    """Errors of writing `path` name it and, where its disk is full, how many bytes are needed and free.

    Raises:
        OSError: also where a library hides it behind an error of its own, as torch.save does.
    """
    try:
        yield
    except Exception as error:
        first: BaseException | None = error
        while first is not None and not isinstance(first, OSError):
            first = first.__context__
        own = first is not None and (first.filename in (str(path), str(_part(path))) or first.errno in _OF_WRITES)
        if first is None or first.errno is None or not own:
            raise
        reason = os.strerror(first.errno)
        if first.errno in _FULL:
            needed = f"{size:,} bytes are needed, " if size else ""
            reason += f" ({needed}{shutil.disk_usage(path.parent).free:,} bytes are free)"
        raise OSError(first.errno, reason, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step; names of files that are not UTF-8 keep their bytes."""
    content = text.encode("utf-8", "surrogateescape")
    with replacing(path, len(content)) as file:
        file.write(content)


def check_writable(flag: str, path: Path) -> None:
    """Make the directory of a file to write where it is missing.

    Raises:
        UserError: it cannot be made or written to, or the file is a directory.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.lstat(_part(path))  # refuses a name that is too long
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; choose another path") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: it cannot be written; choose another path")


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows of cells as CSV; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def same_content(source: Path, target: Path) -> None:
    """`target` becomes `source`'s content, without writing it again where the file system has hard links."""
    part = _part(target)
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copy2(source, part)
    os.replace(part, target)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
