"""How programs end: one line and a status, whatever goes wrong."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from samon.cli import report, validate
from samon.cli.program import run_script
from samon.errors import RunError, Stopped, UserError

ROOT = Path(__file__).parents[1]


def ended(error: BaseException, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(status, what is on standard error) of a program that raises this."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert isinstance(stop.value.code, int)
    return stop.value.code, capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a\n  b"), 2, "error: a b\n"),
        (RunError("a"), 1, "error: a\n"),
        (Stopped(15, "go on"), 143, "stopped by signal 15; go on\n"),
        (KeyboardInterrupt(), 130, "stopped by signal 2\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "error: x: No such file\n"),
        (OSError(errno.EROFS, "Read-only file system", "x"), 2, "error: x: Read-only file system\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "error: x: File name too long\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "error: x: No space left on device\n"),
        (OSError(errno.EIO, "Input/output error"), 1, "error: Input/output error\n"),
        (OSError("of a library"), 1, "error: of a library\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "error: Broken pipe\n"),  # standard output is open
    ],
)
def test_one_line_and_a_status(error: BaseException, status: int, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert ended(error, capfd) == (status, line)


def test_a_closed_pipe_ends_quietly() -> None:
    code = "from samon.cli.program import run_script\nrun_script(lambda: print('line\\n' * 100_000))"
    command = f'{sys.executable} -c "$CODE" | head -n 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={"CODE": code}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "line\n", "")


def test_file_names_that_are_not_utf8_keep_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit):
        run_script(lambda: print(os.fsdecode(b"caf\xe9")))
    assert output.buffer.getvalue() == b"caf\xe9\n"  # type: ignore[attr-defined]


def test_figures_need_matplotlib_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"samon-timm\[report\]"):
        report.main([str(tmp_path), "-o", str(tmp_path / "report.html")])
    with pytest.raises(UserError, match=r"samon-timm\[report\]"):
        validate.main(["--model", "resnet18", "--evals", "norm_params", "--norm-figure", str(tmp_path / "figure.png")])
