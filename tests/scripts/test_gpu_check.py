"""tools/gpu_check.sh, with the sizes that need no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_every_stage_runs_and_a_restart_skips_them(tmp_path: Path) -> None:
    def check() -> str:
        command = [ROOT / "tools/gpu_check.sh", tmp_path, "--dry-run"]
        done = subprocess.run(
            command, capture_output=True, text=True, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first, second = check(), check()
    for row in (
        "| tests |",
        "resnet50: SAM-ON, m = 4",
        "resnet50-compiled: plain SGD",
        "vit_small",
        "img/s",
        "train-samon-adamw | top-1",
    ):
        assert row in first
    assert "at most" in first
    assert "at most" not in second
    assert second.splitlines() == [line for line in first.splitlines() if "at most" not in line]
