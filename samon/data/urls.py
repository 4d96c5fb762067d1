"""Opening local and remote files by URL, with retries and a cache of local copies."""

import atexit
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from samon.data.corrupt import DataError
from samon.errors import UserError, require_package

_logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 5  # per file; the waits between them are 1, 2, 4 and 8 seconds


def import_webdataset(module: str) -> ModuleType:
    """Import a module of webdataset, which only shards need; UserError if it is not installed."""
    return require_package(module, "shards need webdataset; run: pip install webdataset")


def url_scheme(url: str) -> str:
    """Return the URL's scheme, '' for a local path; one that webdataset cannot open is an error.

    Except for `pipe:`, webdataset runs curl, gsutil or ais with the URL as ONE argument and no shell. The argument
    starts with the scheme, so it cannot be taken for an option either.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?", url)
    if match is None:
        return ""
    known = {*import_webdataset("webdataset.gopen").gopen_schemes, "file"} - {"__default__"}
    if match[1].lower() in known:
        return match[1].lower()
    if match[2]:
        schemes = ", ".join(sorted(known))
        raise UserError(f"{url}: {match[0]} URLs cannot be opened; use a local path or one of {schemes}")
    return ""


def resolve_url(url: str, allow_shell: bool = False) -> str:
    """Return the URL as it will be opened: rewritten as GOPEN_REWRITE says, local paths made absolute.

    Raises:
        UserError: it would run a shell command and that is not allowed, or it cannot be opened.
    """
    url = import_webdataset("webdataset.gopen").rewrite_url(url)
    scheme = url_scheme(url)
    if scheme == "pipe" and not allow_shell:
        raise UserError(f"{url}: runs a shell command; if you trust its source, add --allow-shell-urls")
    if scheme == "file":
        return os.path.abspath(re.sub("^file:(//)?", "", url))
    return url if scheme else os.path.abspath(url)


def join_url(root: str, name: str, allow_shell: bool = False) -> str:
    """Return the resolved URL of a file below a directory or URL; a name that is a URL itself ignores `root`."""
    if not url_scheme(name):
        name = f"{root.rstrip('/')}/{name}" if url_scheme(root) else os.path.join(root, name)
    return resolve_url(name, allow_shell)


def is_local(url: str) -> bool:
    """Whether a resolved URL is a file on this machine."""
    return not url_scheme(url)


def open_url(url: str) -> BinaryIO:
    """Open a resolved URL for reading."""
    return open(url, "rb") if is_local(url) else import_webdataset("webdataset.gopen").gopen(url)


def iterate_attempts(url: str, failures: list[str]) -> Iterator[int]:
    """Yield attempt numbers: one for a local file, `MAX_ATTEMPTS` for a remote one, with waits that double.

    The caller appends the reason of each failed attempt to `failures`.
    """
    for attempt in range(1 if is_local(url) else MAX_ATTEMPTS):
        if attempt:
            wait = 2 ** (attempt - 1)
            _logger.warning("%s: %s; next attempt in %d s", url, failures[-1], wait)
            time.sleep(wait)
        yield attempt


@cache
def temporary_directory() -> str:
    """Return a directory for copies that this process and its workers share; removed when the process ends."""
    path = tempfile.mkdtemp(prefix="samon-shards-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)  # not run by workers
    return path


class ShardCache:
    """Local copies of remote shards, shared by processes: webdataset's cache with a lock per shard and a strict size.

    The least recently opened copies are removed. Removing a copy that a process is reading leaves it readable there.
    They lie in a folder of their own, since the cleanup removes whatever it finds.
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int, digests: Mapping[str, str]) -> None:
        self.directory, self.max_bytes, self.digests = Path(directory, "samon-shards"), max_bytes, digests
        self.directory.mkdir(parents=True, exist_ok=True)
        self._webdataset = import_webdataset("webdataset.cache")

    def path(self, url: str) -> Path:
        """Return the path of the copy, a different one for each URL, and for each content whose digest is known."""
        tail = re.sub(r"[^\w.-]", "_", url.rsplit("/", 1)[-1])[-80:]
        identity = hashlib.sha256(f"{url}{self.digests.get(url, '')}".encode())
        return self.directory / f"{identity.hexdigest()[:16]}-{tail}"

    def open(self, url: str) -> BinaryIO:
        """Open the copy, fetching it first if necessary; DataError if it is larger than the cache."""
        path = self.path(url)
        with _lock(path.with_name(f"{path.name}.lock")):
            if is_new := not path.exists():
                # A failed command raises when its stream is closed, so an incomplete copy never gets its final name.
                self._webdataset.download(url, str(path))
            if (size := path.stat().st_size) > self.max_bytes:
                path.unlink()
                limit = f"the shard cache of {self.max_bytes} bytes; raise --shard-cache-size"
                raise DataError(f"{url}: its {size} bytes do not fit {limit}")
            file = open(path, "rb")  # noqa: SIM115 - the caller closes it
            os.utime(path)  # the cleanup goes by ctime
        if is_new:
            self._webdataset.LRUCleanup(str(self.directory), self.max_bytes, interval=None).cleanup()
        return file


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock file that other processes wait for; it is removed afterwards."""
    fcntl = require_package("fcntl", "copies of remote shards need the file locks of Linux or macOS; copy them first")
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
