#!/usr/bin/env python3
"""Mutation test: apply each wrong change of tools/wrong_changes.yaml to a copy of the checkout and run its tests.

    python tools/check_tests.py [--jobs 2] [--only samon/evals] [--again]

A change is noticed if one of its tests fails, and survives if all pass. Results are cached in output/check_tests.json
under a hash of the change, its file and its tests, so a second start tests only what is new. Exits with 1 if a change
survives.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from samon.cli.program import run_script
from samon.errors import RunError, UserError
from samon.files import write_text
from samon.progress import progress_bar

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "output", "*.egg-info", "__pycache__", ".*_cache")
NOTICED, SURVIVES = "noticed", "SURVIVES"


@dataclass(frozen=True)
class Change:
    """A wrong edit of one file, and the tests that should notice it."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def key(self) -> str:
        """Hash of everything that can change the result."""
        parts = [self.file, self.old, self.new, (ROOT / self.file).read_text()]
        for name in self.tests:
            files = [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py"))
            parts += [path.read_text() for path in files]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.old.split())[:60]} -> {' '.join(self.new.split())[:60] or 'nothing'}"


def changes(path: Path, only: str) -> list[Change]:
    """The listed changes of files whose path starts with `only`.

    Raises:
        UserError: a text is not in its file exactly once, or a test does not exist.
    """
    listed = [Change(**{**row, "tests": tuple(row["tests"])}) for row in yaml.safe_load(path.read_text())]
    for change in listed:
        count = (ROOT / change.file).read_text().count(change.old)
        if count != 1:
            raise UserError(f"{change}: the text is {count} times in the file; update {path.name}")
        missing = [name for name in change.tests if not (ROOT / name).exists()]
        if missing or not change.tests:
            raise UserError(f"{change}: no such tests: {', '.join(missing) or 'none named'}")
    return [change for change in listed if change.file.startswith(only)]


def pytest(place: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """(exit code of pytest, its failed tests or last error)."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests]
    env = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, timeout=1800)
    lines = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return result.returncode, "; ".join(lines) or result.stderr.strip()[-300:]


def run_change(change: Change, place: Path) -> str:
    """Apply the change, run its tests, undo it."""
    path = place / change.file
    before = path.read_text()
    path.write_text(before.replace(change.old, change.new))
    try:
        status, _ = pytest(place, change.tests)
    except subprocess.TimeoutExpired:
        status = 1  # a test that never ends is noticed too
    finally:
        path.write_text(before)
    return {0: SURVIVES, 1: NOTICED}.get(status, f"pytest ended with {status}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", type=Path, default=ROOT / "tools/wrong_changes.yaml", help="YAML list of changes")
    add("--only", default="", help="only changes of files under this path")
    add("--jobs", type=int, default=2, help="changes tested in parallel, each in its own copy")
    add("--results", type=Path, default=ROOT / "output/check_tests.json", help="cache of results")
    add("--again", action="store_true", help="ignore the cache")
    args = parser.parse_args(argv)
    listed = changes(args.list, args.only)
    results = json.loads(args.results.read_text()) if args.results.exists() and not args.again else {}
    missing = [change for change in listed if change.key not in results]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, progress_bar("wrong changes", len(missing), "change") as bar:
        places = [Path(folder) / str(job) for job in range(args.jobs)]
        for place in places:
            shutil.copytree(ROOT, place, ignore=LEFT_OUT, symlinks=True)
        if missing:
            status, why = pytest(places[0], tuple(sorted({name for change in missing for name in change.tests})))
            if status:
                raise RunError(f"the tests fail without any change: {why}")

        def test(change: Change) -> None:
            place = places.pop()
            results[change.key] = run_change(change, place)
            places.append(place)
            print(f"{results[change.key]:10} {change}", flush=True)
            write_text(args.results, json.dumps(results, indent=1))
            bar.update()

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(test, missing))
    survivors = [change for change in listed if results[change.key] != NOTICED]
    print(f"{len(listed)} wrong changes, {len(listed) - len(survivors)} noticed")
    if survivors:
        raise RunError(f"{len(survivors)} not noticed: {'; '.join(map(str, survivors))}")


if __name__ == "__main__":
    run_script(main)
