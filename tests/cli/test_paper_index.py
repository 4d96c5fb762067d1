"""docs/paper.md: every command resolves, and every table and figure of the paper is there."""

import re
import shlex

import pytest

from samon.cli import sweep
from samon.trainer.config import parse
from tests.runs import ROOT

PAGE = (ROOT / "docs/paper.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line.strip()
]


def words_after(command: str, script: str) -> list[str]:
    words = shlex.split(command)
    return words[words.index(script) + 1 :]


def test_the_page_names_every_table_and_figure() -> None:
    def named(kind: str) -> set[int]:
        lists = re.findall(rf"{kind}s? ((?:\d+(?:, | and )?)+)", PAGE)
        return {int(number) for part in lists for number in re.findall(r"\d+", part)}

    assert named("Table") >= set(range(1, 20))
    assert named("Figure") >= set(range(1, 12))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py -c" in c and "-m experiments" not in c])
def test_training_commands_resolve(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = parse([*words_after(command, "train.py"), "--print-config"])
    assert config.data_dir == "DIR"


@pytest.mark.parametrize("command", [c for c in COMMANDS if "tools/sweep.py" in c])
def test_sweeps_resolve(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    sweep.main(["--dry-run", *words_after(command, "tools/sweep.py")])
    assert capsys.readouterr().out.count("to run") >= 2


def test_other_commands_name_files_that_exist() -> None:
    others = [c for c in COMMANDS if not re.search(r"train\.py -c|sweep\.py|validate\.py|-m experiments", c)]
    assert others
    for command in others:
        assert (ROOT / shlex.split(command)[1]).is_file(), command
    assert len(COMMANDS) > 20
