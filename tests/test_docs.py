"""The documentation builds without a warning, its tables of flags are current, and runnable commands are found."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from samon.geometry import GEOMETRIES
from samon.trainer.flag_rows import VALIDATE
from samon.trainer.flags import markdown
from tests.browser import chromium
from tests.runs import ROOT
from tools.runnable import commands, small


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; warnings are errors."""
    tmp_path = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]  # --quiet hides warnings
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement of the theme
    done = subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path


def test_the_site_has_every_page_and_needs_no_network(site: Path) -> None:
    reference = (site / "api.html").read_text()
    assert "samon.two_pass" in reference
    assert "m-sharpness inside the batch" in reference  # the docstring's own words
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}
    links = dict(
        re.findall(
            r'href="([^"#]*)" class="md-nav__link">\s*<span[^>]*>\s*([^<]*?)\s*<', (site / "data.html").read_text()
        )
    )
    assert links["results/fashion_mnist/index.html"] == "Fashion-MNIST"  # once the whole Guide's first page
    assert not re.findall(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)"', (site / "index.html").read_text())


def test_code_is_not_cut_at_the_right(site: Path) -> None:
    cut = "[...document.querySelectorAll('pre > code')].filter(code => code.scrollWidth > code.clientWidth + 1).length"
    with chromium() as browser:
        for width in (1280, 390):
            page = browser.new_context(viewport={"width": width, "height": 800}).new_page()
            for name in ("index", "multi_node", "recipes"):
                page.goto((site / f"{name}.html").as_uri())
                assert page.evaluate(cut) == 0, (name, width)


def test_validates_flags_are_current() -> None:
    text = (ROOT / "docs/flags_validate.md").read_text()
    assert markdown(VALIDATE).strip() in text, "run: python -m samon.trainer.flag_rows"


def test_the_default_rho_of_each_name_is_documented() -> None:
    text = (ROOT / "docs/flags.md").read_text()
    for name, row in GEOMETRIES.items():
        first = f"`{name}`" if name else "none (`sam`, `samon`, ...)"
        assert f"| {first} | {row.rho[0]:g} | {row.rho[1]:g} | {row.eta:g} |" in text


def test_documented_commands_can_run_beside_others() -> None:
    """Without --standalone two runs on one host meet at torchrun's default port."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "hparams").rglob("*.yaml")]
    lines = [line for page in pages for line in page.read_text().splitlines() if "torchrun --n" in line]
    assert lines
    assert [line for line in lines if "--nnodes" not in line] == []
    text = (ROOT / "docs/multi_node.md").read_text()
    assert "-m samon.cli.train" in text
    assert "-m samon.cli.validate" in text


def test_runnable_commands_are_joined_and_scaled_down() -> None:
    marked = "# words\npython train.py -c a \\\n  --opt samon   # why\nsamon-sweep -c b\n"
    page = f"<!-- runnable -->\n```bash\n{marked}```\n```bash\nrm x\n```"
    assert commands(page) == ["python train.py -c a    --opt samon", "samon-sweep -c b"]
    assert small("samon-sweep -c b") == "samon-sweep -c b -- --epochs 1 --train-num-samples 200 --val-num-samples 100"
    assert small("samon-sweep -c b -- --lr 1").count(" -- ") == 1
    assert small("samon-report a") == "samon-report a"


def test_there_are_runnable_commands() -> None:
    found = [command for page in (ROOT / "docs").glob("*.md") for command in commands(page.read_text())]
    assert any("train" in command for command in found)
    assert any("report" in command for command in found)


def test_citation_and_version_agree() -> None:
    import samon

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == samon.__version__
    assert samon.__version__ in (ROOT / "CHANGELOG.md").read_text()
