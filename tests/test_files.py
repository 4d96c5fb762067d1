"""Files appear whole or not at all; where they cannot be written, the error says what is missing."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from samon.errors import UserError
from samon.files import atomic_write, check_writable, name_write_errors, write_text
from tests.disks import small_disk


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    with small_disk(tmp_path, "64k"):
        yield tmp_path


def test_a_full_disk_says_what_is_needed_and_free(small: Path) -> None:
    write_text(small / "x", "old")
    with pytest.raises(
        OSError, match=r"No space left on device \(100,000 bytes are needed, 61,440 bytes are free\)"
    ) as full:
        write_text(small / "x", "n" * 100_000)
    assert full.value.errno == errno.ENOSPC
    assert full.value.filename == str(small / "x")
    assert (small / "x").read_text() == "old"
    assert [path.name for path in small.iterdir()] == ["x"]


def test_what_a_library_makes_of_it_is_told_as_well(small: Path) -> None:
    """torch.save turns a full disk into "unexpected pos 704 vs 598"."""
    path = small / "state.pth.tar"
    with pytest.raises(OSError, match=r"No space left on device \(65,536 bytes are free\)"), atomic_write(path) as file:
        torch.save({"a": torch.zeros(100_000)}, file)
    with pytest.raises(OSError, match=f"No space left.*{path}"), name_write_errors(path):
        path.write_bytes(bytes(100_000))


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(tmp_path / "x"):
        Path("elsewhere").read_text()
    with pytest.raises(RuntimeError, match="other"), atomic_write(tmp_path / "x"):
        raise RuntimeError("other")


@pytest.mark.parametrize(
    ("place", "reason"), [("file/x", "File exists"), ("n" * 250, "File name too long"), (".", "cannot be written")]
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"--output .*{reason}; choose another path"):
        check_writable("--output", tmp_path / place)
    check_writable("--output", tmp_path / "new/deep/x")
    assert (tmp_path / "new/deep").is_dir()


def test_a_read_only_file_system_is_told_before_the_work(small: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    with pytest.raises(UserError, match="it cannot be written; choose"):
        check_writable("--output", small / "x")
    with pytest.raises(OSError, match="Read-only file system"):
        write_text(small / "x", "text")


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "content")
    assert os.read(reader, 100) == b"content"
    assert pipe.is_fifo()
    os.close(reader)
