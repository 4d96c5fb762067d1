"""The package installed in a clean environment: commands, recipes and types are there, and a run works."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.runs import ROOT, last_line

pytestmark = pytest.mark.slow

OPTIONAL = ("webdataset", "braceexpand", "simplejpeg", "nvidia.nvimgcodec", "matplotlib", "onnx", "scipy", "datasets")
PARTS = ((0, "train"), (1, "test"))
SOURCES = ("samon", "hparams", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")


def call(*words: object, cwd: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


def install(base: Path, *flags: str) -> Path:
    """The bin directory of an environment that sees the libraries of this one, but not the checkout."""
    for name in SOURCES:
        target = base / "source" / name
        target.parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    venv.create(base / "env")
    packages = next((base / "env/lib").glob("python*/site-packages"))
    # Lines of a .pth file add folders but do not run the .pth files there, so an editable install of samon is not seen.
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", base / "env/bin/python"]
    call(*pip, "install", "-q", "--no-deps", "--no-index", "--no-build-isolation", *flags, base / "source", cwd=base)
    return base / "env/bin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_types_and_all_recipes(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('samon').origin)"
    package = Path(call(installed / "python", "-c", code, cwd=tmp_path).strip()).parent
    assert package.is_relative_to(installed.parent)
    assert (package / "py.typed").exists()
    recipes = {str(path.relative_to(ROOT / "hparams")) for path in (ROOT / "hparams").rglob("*.yaml")}
    assert recipes == {str(path.relative_to(package / "hparams")) for path in (package / "hparams").rglob("*.yaml")}
    sources = {str(path.relative_to(ROOT / "samon")) for path in (ROOT / "samon").rglob("*.*")}
    missing = [name for name in sources if not (package / name).exists() and "__pycache__" not in name]
    assert not missing, "not listed in pyproject.toml: tool.setuptools.packages"


def test_an_editable_install_finds_the_recipes_of_its_checkout(tmp_path: Path) -> None:
    """By name, as the wheel does below and the checkout itself in every other test."""
    commands = install(tmp_path, "--editable")
    printed = call(commands / "samon-train", "-c", "imagenet/resnet50", "--print-config", cwd=tmp_path)
    assert yaml.safe_load(printed)["model"] == "resnet50"


def test_every_command_starts_the_program_it_is_named_after(installed: Path, tmp_path: Path) -> None:
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
    assert found.pop("samon-validate") == "samon.cli.validate"
    assert found.pop("samon-shards") == "samon.cli.make_shards"
    assert found.pop("samon-plan") == "samon.plan.main"
    assert found == {name: f"samon.cli.{name.removeprefix('samon-')}" for name in found}
    assert {"samon-sweep", "samon-report", "samon-predict", "samon-export"} <= found.keys()
    assert all((installed / name).exists() for name in found)


def test_arrays_train_and_validate_without_optional_packages(installed: Path, tmp_path: Path) -> None:
    """A package that is None in `sys.modules` cannot be imported. Shards ask for theirs by name."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (2, 64, 32, 32, 3), np.uint8), random.integers(0, 10, (2, 64))
    arrays = {f"{name}_{part}": pair[i] for name, pair in (("x", images), ("y", labels)) for i, part in PARTS}
    np.savez(tmp_path / "random.npz", **arrays)
    code = f"""
import sys
sys.modules |= dict.fromkeys({OPTIONAL})
from samon.cli import installed
getattr(installed, sys.argv.pop(1))()
"""
    run = [installed / "python", "-c", code]
    data = ["--dataset", "npz/random", "--data-dir", ".", "-b", "16", "-j", "1", "--device", "cpu"]
    size = ["--model", "resnet20_cifar", "--num-classes", "10", "--input-size", "3", "32", "32", "--epochs", "1"]
    where = ["--opt", "samon", "--in-memory", "--no-aug", "--output", "out", "--experiment", "one"]
    printed = call(*run, "train", *data, *size, *where, cwd=tmp_path)
    assert last_line(printed)["epoch"] == 0
    printed = call(*run, "validate", "--checkpoint", "out/one", "--device", "cpu", cwd=tmp_path)
    assert "| npz/random | validation | accuracy |" in printed
    shards = [*run, "train", "--dataset", "wds/x", "--data-dir", "."]
    done = subprocess.run(shards, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: shards need webdataset; run: pip install webdataset\n")


def test_an_epoch_and_its_report_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
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
