"""Leaves out test files whose optional package is not installed, so that the others run; and a shared fixture."""

import io
from importlib.util import find_spec

import pytest

_NEEDS = {
    "cli/test_export.py": "onnxruntime",
    "experiments/test_translation.py": "sentencepiece",
    "report/test_draw.py": "matplotlib",
}
collect_ignore = [file for file, package in _NEEDS.items() if find_spec(package) is None]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What is written to standard error, which is a terminal."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    return stream
