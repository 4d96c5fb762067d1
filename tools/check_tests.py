#!/usr/bin/env python3
"""Would the tests notice? Each small wrong change of tools/wrong_changes.yaml, made alone in a copy of the checkout.

    python tools/check_tests.py [--jobs 2] [--only samon/evals] [--again]

A change is noticed if one of the tests named beside it fails, and survives if all of them pass. Results are kept in
output/check_tests.json by what decides them (the change, its file, the tests): started again, the command goes on with
what is new. Exits with 1 if a change survives.
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
    """One line of one file, wrong."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def key(self) -> str:
        """Changes with whatever could change the answer."""
        parts = [self.file, self.old, self.new, (ROOT / self.file).read_text()]
        for name in self.tests:
            files = [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py"))
            parts += [path.read_text() for path in files]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.old.split())[:60]} -> {' '.join(self.new.split())[:60] or 'nothing'}"


def changes(path: Path, only: str) -> list[Change]:
    """The kept list.

    Raises:
        UserError: a text that is not in its file exactly once, or a test that is not there.
    """
    found = [Change(**{**row, "tests": tuple(row["tests"])}) for row in yaml.safe_load(path.read_text())]
    for change in found:
        count = (ROOT / change.file).read_text().count(change.old)
        if count != 1:
            raise UserError(f"{change}: the text is {count} times in the file; renew {path.name}")
        missing = [name for name in change.tests if not (ROOT / name).exists()]
        if missing or not change.tests:
            raise UserError(f"{change}: no such tests: {', '.join(missing) or 'none named'}")
    return [change for change in found if change.file.startswith(only)]


def pytest(place: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """(its exit status, its last line)."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests]
    env = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, timeout=1800)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, "; ".join(lines) or done.stderr.strip()[-300:]


def answer(change: Change, place: Path) -> str:
    """Make the change, ask the tests, undo it."""
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
    add("--list", type=Path, default=ROOT / "tools/wrong_changes.yaml", help="the changes")
    add("--only", default="", help="changes of files below this path")
    add("--jobs", type=int, default=2, help="changes at a time, each in a copy of its own")
    add("--results", type=Path, default=ROOT / "output/check_tests.json", help="what is known already")
    add("--again", action="store_true", help="ask again about all")
    args = parser.parse_args(argv)
    every = changes(args.list, args.only)
    known = json.loads(args.results.read_text()) if args.results.exists() and not args.again else {}
    left = [change for change in every if change.key not in known]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, progress_bar("wrong changes", len(left), "change") as shown:
        places = [Path(folder) / str(job) for job in range(args.jobs)]
        for place in places:
            shutil.copytree(ROOT, place, ignore=LEFT_OUT, symlinks=True)
        if left:
            status, why = pytest(places[0], tuple(sorted({name for change in left for name in change.tests})))
            if status:
                raise RunError(f"the tests do not pass without any change: {why}")

        def ask(change: Change) -> None:
            place = places.pop()
            known[change.key] = answer(change, place)
            places.append(place)
            print(f"{known[change.key]:10} {change}", flush=True)
            write_text(args.results, json.dumps(known, indent=1))
            shown.update()

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(ask, left))
    wrong = [change for change in every if known[change.key] != NOTICED]
    print(f"{len(every)} wrong changes, {len(every) - len(wrong)} noticed")
    if wrong:
        raise RunError(f"{len(wrong)} not noticed: {'; '.join(map(str, wrong))}")


if __name__ == "__main__":
    run_script(main)
