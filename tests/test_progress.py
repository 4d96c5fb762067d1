"""Bars on a terminal, lines elsewhere; numbers have decimals by what they measure and units by their size."""

import io
import logging
import sys

import pytest

from samon import progress
from samon.progress import ConsoleHandler, format_quantity, metric_format, progress_bar, wrap_path


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_show_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e-9)
    assert list(progress_bar("packing", 3, "shard", iter("abc"))) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == [f"packing: {n} of 3" for n in (1, 2, 3)]
    assert all("shard/s" in line or "s/shard" in line for line in lines)
    assert all(line.endswith("left") for line in lines)


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    list(progress_bar("packing", 3, "shard", iter("abc")))
    assert capsys.readouterr().err == ""


def test_log_lines_are_printed_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar("packing", 3, "shard") as bar:
        bar.update()
        bar.refresh()
        record = logging.LogRecord("samon", logging.INFO, "", 0, "a line", None, None)
        ConsoleHandler(sys.stderr).emit(record)
        record.shown = True  # the bar displays it anyway
        ConsoleHandler(sys.stderr).emit(record)
    assert "packing:  33%|" in terminal.getvalue()
    assert terminal.getvalue().count("a line\n") == 1
    assert "\ra line" in terminal.getvalue()  # the bar was cleared first


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("eval_loss", 0.0123456, "0.0123"),
        ("train_loss_perturbed", 12.34567, "12.3457"),
        ("eval_top1", 87.4, "87.40"),
        ("robust_top1", 100.0, "100.00"),
        ("lr", 0.00012346, "0.0001235"),
    ],
)
def test_a_metric_always_has_the_same_decimals(metric: str, value: float, text: str) -> None:
    assert f"{value:{metric_format(metric)}}" == text


def test_units_go_by_size() -> None:
    assert format_quantity(2.1555e9, "FLOP") == "2.155 GFLOP"
    assert format_quantity(0, "B", 1024) == "0 B"
    assert format_quantity(3 * 2**20, "B", 1024) == "3 MiB"
    assert format_quantity(1000, "B", 1024) == "1000 B"
    assert format_quantity(1e24, "FLOP") == "1e+06 EFLOP"


def test_paths_are_wrapped_at_their_directories() -> None:
    assert wrap_path("a/run/model.pth", 30) == "a/run/model.pth"
    assert wrap_path("20261125-214518-resnet10t/best.pth.tar", 30) == "20261125-214518-resnet10t/\nbest.pth.tar"
    assert max(map(len, wrap_path("a" * 70 + "/b" * 30, 30).splitlines())) <= 30
