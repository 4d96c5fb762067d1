"""Every script says what it is for; a row of a benchmark that cannot be leaves the others."""

import re
import runpy
import subprocess
import sys

import pytest

from tests.runs import ROOT


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_has_a_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    assert stop.value.code in (0, None)
    printed = capsys.readouterr().out
    assert printed.startswith("usage: ")
    assert len(printed) > 200


def test_the_package_names_its_own_commands() -> None:
    """An installed package has no tools/ directory beside it: messages and help name `samon-shards`, `samon-sweep`."""
    named = [
        str(path)
        for path in (ROOT / "samon").rglob("*.py")
        if re.search(r"tools/(make_shards|sweep|report)\.py", path.read_text())
    ]
    assert named == []


def test_timm_script_prints_its_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["timm_script", "--help"])
    monkeypatch.delitem(sys.modules, "samon.timm_script", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("samon.timm_script", run_name="__main__")
    assert not stop.value.code
    assert "python -m samon.timm_script SCRIPT.py ARGS" in capsys.readouterr().out


@pytest.mark.slow
def test_a_row_that_cannot_be_leaves_the_others() -> None:
    """m = 1 on a network whose last map is one pixel: BatchNorm has no variance there."""
    args = "--model resnet10t --img-size 28 --batch-size 4 --m 2 1 --rounds 1 --no-memory"
    done = subprocess.run(
        [sys.executable, "tools/bench_step.py", *args.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {line.split(" | ")[0].strip("| "): line for line in done.stdout.splitlines() if line.startswith("| SAM-ON")}
    assert "1.0" in rows["SAM-ON, ascent previous"]
    assert "more than 1 value per channel" in rows["SAM-ON, m = 1, groups"]
    assert "more than 1 value" not in rows["SAM-ON, m = 2, groups"]
