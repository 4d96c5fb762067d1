"""The declaration of flags, and what derives from it: command line, --help, docs, names of earlier releases."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import run as torchrun

from samon.errors import UserError
from samon.trainer.config import parse
from samon.trainer.flag_rows import TRAIN, VALIDATE
from samon.trainer.flags import Sections, by_key
from tests.runs import ROOT
from tools.flag_tables import PAGES, markdown

REFUSED = {flag.flag for flag in by_key(TRAIN).values() if flag.refused}


@pytest.mark.parametrize(("sections", "program", "count"), [(TRAIN, "train", 184), (VALIDATE, "validate", 59)])
def test_every_flag_of_timm_is_declared_once(sections: Sections, program: str, count: int) -> None:
    """The flags of timm 1.0.31's scripts, which are listed in a file of their own."""
    rows = [flag for rows in sections.values() for flag in rows]
    assert len(rows) == len(by_key(sections))
    expected = set(Path(__file__).with_name(f"timm_{program}_flags.txt").read_text().split())
    assert len(expected) == count
    assert expected <= {flag.flag for flag in rows} | {f"--{alias}" for flag in rows for alias in flag.aliases}


def test_refused_flags() -> None:
    assert len(REFUSED) == 40
    for name in sorted(REFUSED):
        with pytest.raises(UserError, match=f"^{name} is not supported: .{{20,}}"):
            parse([name])
    assert parse(["--tta", "0"]).tta == 0  # the default is allowed


def test_both_programs_share_their_rows() -> None:
    train, validate = by_key(TRAIN), by_key(VALIDATE)
    shared = train.keys() & validate.keys()
    different = {key: (train[key].default, validate[key].default) for key in shared if train[key] != validate[key]}
    assert different == {"model": ("resnet50", None), "batch_size": (128, 256), "overwrite": (False, False)}
    assert {"num_classes", "data_dir", "mean", "amp", "workers", "device"} <= shared


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        ("/images", "data_dir", "/images"),
        ("--train-img-sizes 16 32 --train-steps-per-epoch 7", "train_batches_per_epoch", 7),
        ("--dr 0.3", "decay_rate", 0.3),
        ("-vb 7 -j 2 -b 5", "validation_batch_size", 7),
        ("--local_rank=1", "epochs", 300),  # added by launchers
        ("--local-rank 1", "epochs", 300),
        ("--model-kwargs a=1 b=x", "model_kwargs", {"a": 1, "b": "x"}),
        ("--torchcompile", "torchcompile", "inductor"),
    ],
)
def test_spellings(args: str, key: str, value: object) -> None:
    assert getattr(parse(args.split()), key) == value


def test_names_of_earlier_releases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They warn in one line each, except in the settings that a run has stored."""
    (tmp_path / "old.yaml").write_text("max_bad_steps: 7\nper_opt: {sgd: {checkpoint_format: parts}}\n")
    old = parse(["-c", str(tmp_path / "old.yaml"), "--fsdp", "--fsdp-reshard=never"])
    assert (old.max_nonfinite_steps, old.checkpoint_format, old.fsdp_reshard_after_forward) == (7, "dcp", "never")
    assert parse(["--opt", "samon", "--ascent", "every:3"]).ascent == "looksam:3"
    assert len(caplog.messages) == 4
    assert "deprecated: --fsdp-reshard is now --fsdp-reshard-after-forward" in caplog.text
    caplog.clear()
    resumed = parse(["--resume", "x"], lambda resume: {"max_bad_steps": 7, "checkpoint_format": "parts"})
    assert (resumed.max_nonfinite_steps, resumed.checkpoint_format) == (7, "dcp")
    assert not caplog.messages


@pytest.mark.parametrize("page", PAGES)
def test_the_documentation_is_current(page: str) -> None:
    sections, other = PAGES[page]
    text = (ROOT / f"docs/{page}.md").read_text()
    assert markdown(sections, other).strip() in text, "run: python tools/flag_tables.py"
    assert all(f"`{flag.flag}`" in text for flag in by_key(sections).values())
    assert not any(f"`--{flag.old_name}`" in text for flag in by_key(sections).values() if flag.old_name)


@pytest.mark.parametrize(
    ("module", "script", "name"),
    [
        (None, "/usr/bin/samon-train", "samon-train"),
        (None, "/a/train.py", "python train.py"),
        ("samon.cli.train", "/a/samon/cli/train.py", "python -m samon.cli.train"),
    ],
)
def test_help_names_the_command_and_every_flag(
    module: str | None, script: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module and SimpleNamespace(name=module))
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert printed.startswith(f"usage: {name} ")
    assert all(flag.flag in printed for flag in by_key(TRAIN).values())
    assert "max-bad-steps" not in printed


@pytest.mark.parametrize("sections", [TRAIN, VALIDATE], ids=["train", "validate"])
def test_torchrun_leaves_every_flag_to_the_program(sections: Sections) -> None:
    """It takes an abbreviation of several of its own flags (--log) for a mistake, also after the script's name."""
    for flag in (flag for rows in sections.values() for flag in rows if not flag.positional):
        command = ["train.py", flag.flag, "x"]
        assert torchrun.get_args_parser().parse_args(command).training_script_args == command[1:]
