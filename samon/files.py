"""Atomic file writes, and write errors that say what to do."""

import csv
import errno
import io
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from samon.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_WRITE_ERRORS = (*_DISK_FULL, errno.EFBIG, errno.EIO)  # these name no file


@contextmanager
def atomic_write(path: Path, size: int = 0) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` after an fsync; on an exception `path` stays as it was. Devices and
    pipes such as /dev/stdout are written directly.

    Args:
        size: expected bytes, for the message of a full disk; 0 if unknown.
    """
    temporary = _temporary(path)
    with name_write_errors(path, size):
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                yield file
            return
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    if sys.platform == "win32":  # opens no directories
        return
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def name_write_errors(path: Path, size: int = 0) -> Iterator[None]:
    """Reraise errors of writing `path` with its name and, if the disk is full, the bytes needed and free.

    Raises:
        OSError: also where a library hides it in an error of its own, as torch.save does.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or cause.errno is None:
            raise
        if cause.filename not in (str(path), str(_temporary(path))) and cause.errno not in _WRITE_ERRORS:
            raise
        reason = os.strerror(cause.errno)
        if cause.errno in _DISK_FULL:
            needed = f"{size:,} bytes are needed, " if size else ""
            reason += f" ({needed}{shutil.disk_usage(path.parent).free:,} bytes are free)"
        raise OSError(cause.errno, reason, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; file names in it that are not UTF-8 keep their bytes."""
    content = text.encode("utf-8", "surrogateescape")
    with atomic_write(path, len(content)) as file:
        file.write(content)


def check_writable(flag: str, path: Path) -> None:
    """Create the parent directory of an output file.

    Raises:
        UserError: the directory cannot be created or written to, or `path` is a directory.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.lstat(_temporary(path))  # fails if the name is too long
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


def markdown_table(rows: Iterable[Iterable[object]]) -> str:
    """Rows of cells as a Markdown table; the first row is the header."""
    head, *body = ([*map(str, row)] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def link_or_copy(source: Path, target: Path) -> None:
    """Replace `target` by a hard link to `source`, or by a copy where the file system has no hard links."""
    temporary = _temporary(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copy2(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # a link to the same file as `target` is left by the renaming


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")
