"""The documentation builds without warnings, its flag tables are current, and its commands use existing flags."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from samon.cli.validate import check_flags_are_read
from samon.geometry import GEOMETRIES
from samon.trainer.flag_rows import TRAIN, VALIDATE
from samon.trainer.flags import parse_command_line
from tests.browser import chromium
from tests.runs import ROOT
from tools.runnable import commands, small

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = {"train": TRAIN, "validate": VALIDATE}


def documented_commands() -> list[tuple[str, str]]:
    """(train or validate, its arguments) of the commands in shell blocks; those that contain `...` are left out.

    What follows `--` in the command of a sweep or an experiment are arguments of train.
    """
    blocks = [
        block
        for page in PAGES
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
        if language in ("", "bash")
    ]
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    lines = [re.sub(r"\s#.*| &$", "", line) for line in lines]
    program = re.compile(r"(?: |samon-|samon\.cli\.|^)(train|validate)(?:\.py)? (-.*)")
    programs = [(match[1], match[2]) for line in lines if (match := program.search(line))]
    sweep = re.compile(r"(?:samon-sweep|sweep\.py|compare\.py) .*? -- (.*)")
    programs += [("train", match[1]) for line in lines if (match := sweep.search(line))]
    return [(name, arguments) for name, arguments in programs if "..." not in arguments]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; warnings are errors."""
    tmp_path = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]  # --quiet hides warnings
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement of the theme
    result = subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return tmp_path


@pytest.mark.slow
def test_the_site_has_every_page_and_needs_no_network(site: Path) -> None:
    reference = (site / "api.html").read_text()
    assert "samon.two_pass" in reference
    assert "equal sub-batches of consecutive samples" in reference  # from its docstring
    assert {path.stem for path in PAGES[1:]} <= {path.stem for path in site.rglob("*.html")}
    links = dict(
        re.findall(
            r'href="([^"#]*)" class="md-nav__link">\s*<span[^>]*>\s*([^<]*?)\s*<', (site / "data.html").read_text()
        )
    )
    assert links["results/fashion_mnist.html"] == "Fashion-MNIST"
    assert not re.findall(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)"', (site / "index.html").read_text())


@pytest.mark.slow
def test_code_is_not_cut_at_the_right(site: Path) -> None:
    cut = "[...document.querySelectorAll('pre > code')].filter(code => code.scrollWidth > code.clientWidth + 1).length"
    with chromium() as browser:
        for width in (1280, 390):
            page = browser.new_context(viewport={"width": width, "height": 800}).new_page()
            for name in ("index", "multi_node", "recipes"):
                page.goto((site / f"{name}.html").as_uri())
                assert page.evaluate(cut) == 0, (name, width)


def test_the_page_on_gpus_names_every_file_that_asks_for_the_device() -> None:
    asks = re.compile(r"device\.type|\bkind = .*\.type|torch\.cuda\.|backends\.cuda|backend=\"|cudagraph")
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "samon").rglob("*.py") if asks.search(path.read_text())}
    assert files - set(re.findall(r"`(samon/\S+\.py)`", (ROOT / "docs/gpu.md").read_text())) == set()
    assert len(files) > 10


def test_the_default_rho_of_each_name_is_documented() -> None:
    text = (ROOT / "docs/flags.md").read_text()
    for name, row in GEOMETRIES.items():
        label = f"`{name}`" if name else "none (`sam`, `samon`, ...)"
        assert f"| {label} | {row.rho[0]:g} | {row.rho[1]:g} | {row.eta:g} |" in text


def test_documented_commands_can_run_beside_others() -> None:
    """Without --standalone two runs on one host use the same default port of torchrun."""
    lines = [
        line
        for page in [*PAGES, *(ROOT / "hparams").rglob("*.yaml")]
        for line in page.read_text().splitlines()
        if "torchrun --n" in line
    ]
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


@pytest.mark.parametrize(("program", "arguments"), documented_commands())
def test_documented_flags_exist(program: str, arguments: str) -> None:
    settings = parse_command_line(PROGRAMS[program], shlex.split(arguments), "")
    assert settings
    if program == "validate" and settings.get("suite") in (None, "suites"):
        check_flags_are_read(settings, set(settings.get("evals", "accuracy").split(",")))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_exist(name: str) -> None:
    """mkdocs checks the links of its pages, not these."""
    targets = re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)|(?:src|srcset)="([^"]+)"', (ROOT / name).read_text())
    missing = [path for pair in targets if not (ROOT / (path := pair[0] or pair[1])).exists()]
    assert missing == []


def test_every_program_is_documented() -> None:
    runnable = [command for page in PAGES for command in commands(page.read_text())]
    assert all(any(program in command for command in runnable) for program in ("train", "report"))
    assert {program for program, _ in documented_commands()} == set(PROGRAMS)
    assert len(documented_commands()) > 20


def test_citation_and_version_agree() -> None:
    import samon

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == samon.__version__
    assert samon.__version__ in (ROOT / "CHANGELOG.md").read_text()
