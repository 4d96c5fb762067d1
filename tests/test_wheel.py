"""The wheel, installed into a clean environment: commands, recipes and types come along, and a run works anywhere."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from tests.runs import ROOT, last_line

SOURCES = ("samon", "hparams", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")


def call(*words: object, cwd: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an environment that sees the libraries of this one, but not the checkout."""
    base = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, target = ROOT / name, base / "source" / name
        target.parent.mkdir(exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, target, **({"symlinks": True} if source.is_dir() else {}))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", base, base / "source", cwd=base)
    venv.create(base / "env")
    packages = next((base / "env/lib").glob("python*/site-packages"))
    # Lines of a .pth add folders but do not run the .pth files there, so an editable install of samon is not seen.
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    wheel = next(base.glob("*.whl"))
    call(*pip, "--python", base / "env/bin/python", "install", "-q", "--no-deps", "--no-index", wheel, cwd=base)
    return base / "env/bin"


def test_what_is_in_it(installed: Path, tmp_path: Path) -> None:
    code = "import samon, pathlib; print(samon.__version__, pathlib.Path(samon.__file__).parent)"
    version, where = call(installed / "python", "-c", code, cwd=tmp_path).split()
    assert where.startswith(str(installed.parent))
    assert version.count(".") == 2
    assert (Path(where) / "py.typed").exists()
    packed = {str(path.relative_to(ROOT / "hparams")) for path in (ROOT / "hparams").rglob("*.yaml")}
    there = Path(where) / "hparams"
    assert packed == {str(path.relative_to(there)) for path in there.rglob("*.yaml")}
    printed = call(installed / "samon-train", "-c", "imagenet/resnet50", "--print-config", cwd=tmp_path)
    assert yaml.safe_load(printed)["model"] == "resnet50"


def test_commands_are_there(installed: Path, tmp_path: Path) -> None:
    """Every one starts the program it is named after; samon-train and samon-report run in the test below."""
    code = """
from importlib.metadata import entry_points
from samon.cli import installed
installed.run_script = lambda main: print(main.__module__)
for entry in entry_points(group="console_scripts"):
    if entry.module == "samon.cli.installed":
        print(entry.name, end=" ")
        entry.load()()
"""
    found = dict(line.split() for line in call(installed / "python", "-c", code, cwd=tmp_path).splitlines())
    assert found.pop("samon-train") == "samon.trainer.main"
    assert found.pop("samon-validate") == "samon.evals.main"
    assert found.pop("samon-shards") == "samon.cli.make_shards"
    assert found.pop("samon-plan") == "samon.plan.main"
    assert found == {name: f"samon.cli.{name.removeprefix('samon-')}" for name in found}
    assert {"samon-sweep", "samon-report", "samon-predict", "samon-export"} <= found.keys()
    assert all((installed / name).exists() for name in found)


def test_an_epoch_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    size = ["--epochs", "1", "--warmup-epochs", "0", "--train-num-samples", "100", "--val-num-samples", "50"]
    data = ["--data-dir", ROOT / "data/fashion-mnist", "-j", "0"]
    where = ["--output", "out", "--experiment", "one"]
    printed = call(installed / "samon-train", "-c", "quickstart", *data, *size, *where, cwd=tmp_path)
    assert last_line(printed)["epoch"] == 0
    record = json.loads((tmp_path / "out/one/run.json").read_text())
    assert record["recipe"] == "quickstart"
    assert record["command"].startswith("samon-train -c quickstart")
    call(installed / "samon-report", "out/one", "-o", "page.html", cwd=tmp_path)
    assert "<title>" in (tmp_path / "page.html").read_text()
