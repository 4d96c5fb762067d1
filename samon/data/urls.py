"""Opening shards: local files, what webdataset can fetch, retries, and a cache of bounded size."""

import atexit
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.gopen import gopen, gopen_schemes, rewrite_url

from samon.data.corrupt import DataError
from samon.errors import UserError
from samon.files import atomic_write

_logger = logging.getLogger(__name__)

ATTEMPTS = 5  # tries per shard; between them 1, 2, 4 and 8 seconds
_SHELL = frozenset({"pipe"})
# webdataset fetches these by running curl, gsutil or ais with the URL as ONE argument, no shell in between; the
# argument starts with the scheme, so it cannot be taken for an option either.
_REMOTE = frozenset(gopen_schemes) - _SHELL - {"__default__"}


def scheme(url: str) -> str:
    """The URL's scheme if it is one that can be opened; '' for a local path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", url)
    name = found[1].lower() if found else ""
    if name in _SHELL | _REMOTE or name == "file":
        return name
    if found and url[found.end() :].startswith("//"):
        known = ", ".join(sorted(_REMOTE))
        raise UserError(f"{url}: no way to open {name}:// URLs; use a local path or one of {known}")
    return ""


def checked_url(url: str, allow_shell: bool = False) -> str:
    """The URL as it will be opened: rewritten as the environment asks, local paths made absolute.

    Raises:
        UserError: it would run a shell command and that is not allowed, or nothing can open it.
    """
    url = rewrite_url(url)
    kind = scheme(url)
    if kind in _SHELL and not allow_shell:
        raise UserError(f"{url}: runs a shell command; if you trust where it comes from, add --allow-shell-urls")
    if kind == "file":
        return os.path.abspath(re.sub("^file:(//)?", "", url))
    return url if kind else os.path.abspath(url)


def join(root: str, name: str, allow_shell: bool = False) -> str:
    """A file beside others under a root that is a directory or a URL; a name that is a URL stays as it is."""
    if scheme(name):
        return checked_url(name, allow_shell)
    return checked_url(f"{root.rstrip('/')}/{name}" if scheme(root) else os.path.join(root, name), allow_shell)


def is_local(url: str) -> bool:
    """Whether a checked URL is a file on this machine."""
    return not scheme(url)


def open_url(url: str) -> BinaryIO:
    """Open a checked URL for reading."""
    return open(url, "rb") if is_local(url) else gopen(url)


def attempts(url: str, faults: list[Any]) -> Iterator[int]:
    """0, 1, ...: one attempt at a local file; `ATTEMPTS` at a remote one, with waits between them that double.

    The caller appends to ``faults`` why an attempt failed; the last one is logged before the next attempt.
    """
    for attempt in range(1 if is_local(url) else ATTEMPTS):
        if attempt:
            wait = 2 ** (attempt - 1)
            _logger.warning("%s: %s; trying again in %d s", url, faults[-1], wait)
            time.sleep(wait)
        yield attempt


def read_url(url: str, limit: int) -> bytes:
    """The first ``limit`` bytes of a checked URL, tried as often as `attempts` says.

    Raises:
        DataError: the last attempt failed too.
    """
    faults: list[Exception] = []
    for _ in attempts(url, faults):
        try:
            with open_url(url) as file:
                return file.read(limit)
        except (OSError, EOFError) as error:
            faults.append(error)
    raise DataError(f"{url}: {faults[-1]}" + f", {len(faults)} attempts" * (len(faults) > 1)) from faults[-1]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file that other processes wait for; it is removed afterwards."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@cache
def temporary_directory() -> str:
    """A directory for copies that this process and its workers share, removed when it ends."""
    path = tempfile.mkdtemp(prefix="samon-shards-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)  # not run by workers
    return path


class ShardCache:
    """Local copies of remote shards in one directory, the least recently used removed to keep under ``max_bytes``.

    Processes may share the directory: copies appear under their final name only when complete, and removing one
    that another process has open leaves it readable there.
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int) -> None:
        self.directory = Path(directory)
        self.max_bytes = max_bytes
        self.directory.mkdir(parents=True, exist_ok=True)

    def path(self, url: str) -> Path:
        """The file that caches ``url``; two URLs with the same last part do not meet."""
        tail = re.sub(r"[^\w.-]", "_", url.rsplit("/", 1)[-1])[-80:]
        return self.directory / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{tail}"

    def open(self, url: str) -> BinaryIO:
        """Open the copy, fetching it first if need be."""
        path = self.path(url)
        if (copy := self._copy(path)) is not None:
            return copy
        with _locked(path.with_name(f"{path.name}.lock")):
            if (copy := self._copy(path)) is not None:  # another process fetched it meanwhile
                return copy
            with atomic_write(path) as target:
                # gopen's close() raises when the command that fetched failed, so an incomplete copy is never kept.
                with open_url(url) as source:
                    shutil.copyfileobj(source, target, 1 << 20)
                self._make_room(target.tell())
                return open(target.name, "rb")  # stays readable should another process remove the file at once

    def _copy(self, path: Path) -> BinaryIO | None:
        with suppress(FileNotFoundError):
            os.utime(path)  # last use, which the removal goes by
            return open(path, "rb")
        return None

    def forget(self, url: str) -> None:
        """Remove a copy that turned out to be damaged."""
        self.path(url).unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        if size > self.max_bytes:
            limit = f"the shard cache of {self.max_bytes} bytes; raise --shard-cache-size"
            raise UserError(f"a shard of {size} bytes does not fit {limit}")
        entries = []
        for path in self.directory.iterdir():
            with suppress(FileNotFoundError):  # another process was quicker
                status = path.stat()
                # A part is being written by someone, unless it was left behind long ago.
                if path.suffix not in (".part", ".lock") or time.time() - status.st_mtime > 3600:
                    entries.append((status.st_mtime_ns, status.st_size, path))
        used = sum(entry[1] for entry in entries)
        for _, entry_size, path in sorted(entries):
            if used + size <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            used -= entry_size
