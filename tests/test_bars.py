"""Bars on a terminal, lines elsewhere."""

import io
import logging
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from samon import bars
from samon.cli import sweep


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_with_pace_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bars, "SECONDS", 1e-9)
    assert list(bars.bar("packing", 3, "shard", iter("abc"))) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == [f"packing: {n} of 3" for n in (1, 2, 3)]
    assert all("shard/s" in line or "s/shard" in line for line in lines)
    assert all(line.endswith("left") for line in lines)


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    list(bars.bar("packing", 3, "shard", iter("abc")))
    assert capsys.readouterr().err == ""


def test_log_lines_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with bars.bar("packing", 3, "shard", mininterval=0) as shown:
        shown.update()
        record = logging.LogRecord("samon", logging.INFO, "", 0, "a line", None, None)
        bars.Console(sys.stderr).emit(record)
        record.shown = True
        bars.Console(sys.stderr).emit(record)
    text = terminal.getvalue()
    assert "packing:  33%|" in text
    assert text.count("a line\n") == 1
    assert "\ra line" in text  # the bar's line was cleared first


def test_a_sweep_counts_its_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those finished before are done from the beginning, and not part of the pace."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    states = {"a": "skipped", "b": "done", "c": "done"}
    monkeypatch.setattr(sweep, "run_job", lambda job, *_: states[job.name])
    monkeypatch.setattr(sweep, "finished", lambda job, args: {"top1": 1.0} if job.name == "a" else None)
    args = Namespace(gpus="", jobs=1, output=tmp_path, metric="top1")
    assert sweep.run_all([SimpleNamespace(name=name) for name in states], args) == []  # type: ignore[misc]
    text = terminal.getvalue()
    assert "sweep:  33%|" in text
    assert "[3/3] c: done" in text
    assert "4/3" not in text
