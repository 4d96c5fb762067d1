"""train.py --fsdp on two gloo processes: the same run as without, states that continue either way, what it refuses.

float32: FSDP and DDP add gradients in another order. 1e-4 relative over the whole run; one update differs by 1e-7.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import samon  # noqa: F401 - registers the CIFAR networks
from samon import UserError
from samon.cli import export
from samon.evals import main as evals
from samon.trainer import main as train
from samon.trainer.dcp import load_sharded
from samon.trainer.fsdp import blocks
from samon.trainer.state import load_state
from tests.runs import BASE, ROOT, assert_same, last, weights
from tools import check_interruptions as matrix

COMMON = ["--model", "test_vit", "--epochs", "2", "--clip-grad", "0.5"]
SHARDED = ["--fsdp", "--opt", "samon-layerl2-momentum"]


def launch(directory: Path, *args: str, moment: tuple[str, int, int] | None = None, expect: int = 0) -> Path:
    matrix.prepare(2)
    argv = [*matrix.ARGS, *COMMON, "--output", str(directory.parent), "--experiment", directory.name, *args]
    log = directory.with_suffix(".log")
    codes = matrix.launch(argv, 2, log, moment, "kill-all") if moment else matrix.launch(argv, 2, log)
    assert (codes == [expect] * 2) if moment is None else any(codes), log.read_text()[-2000:]
    return directory


def apart(one: Path, two: Path) -> float:
    assert weights(one).keys() == weights(two).keys()
    a, b = (torch.cat([t.flatten() for t in weights(d).values() if t.is_floating_point()]) for d in (one, two))
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("sharded") / "whole", *SHARDED)


@pytest.fixture(scope="module")
def parallel(sharded: Path) -> Path:
    return launch(sharded.parent / "ddp", "--opt", "samon-layerl2-momentum")


def test_the_run_is_that_of_ddp(sharded: Path, parallel: Path) -> None:
    """Clipping, accumulation, EMA, mixup, validation of uneven parts (40 images in batches of 8 on two processes)."""
    assert apart(sharded, parallel) < 1e-4
    ends = [(d / "summary.csv").read_text().splitlines()[-1].split(",") for d in (sharded, parallel)]
    assert [float(x) for x in ends[0][1:]] == pytest.approx([float(x) for x in ends[1][1:]], rel=1e-4, abs=1e-6)
    assert "2 x cpu, sharded" in (sharded / "log.txt").read_text()


def test_a_killed_run_ends_bit_identical(sharded: Path) -> None:
    directory = launch(sharded.parent / "killed", *SHARDED, moment=("update", 0, 5))
    launch(directory, *SHARDED, "--resume", str(directory))
    assert_same(weights(sharded), weights(directory))


def test_a_state_continues_without_sharding_and_with_it(sharded: Path, parallel: Path) -> None:
    for begun, name in ((SHARDED, "to-ddp"), (SHARDED[1:], "to-fsdp")):
        directory = launch(sharded.parent / name, *begun, moment=("update", 1, 2))
        launch(directory, "--no-fsdp" if begun is SHARDED else "--fsdp", *SHARDED[1:], "--resume", str(directory))
        assert (directory / "log.txt").read_text().count("2 x cpu, sharded") == 1
        assert apart(directory, parallel) < 1e-4
        assert "Other settings" not in (directory / "log.txt").read_text()


PARTS = ["--checkpoint-format", "dcp"]


@pytest.fixture(scope="module")
def in_parts(sharded: Path) -> Path:
    return launch(sharded.parent / "parts", *SHARDED, *PARTS)


def test_states_in_parts_end_as_the_same_files(sharded: Path, in_parts: Path, tmp_path: Path) -> None:
    assert_same(weights(sharded), weights(in_parts))  # last.pth.tar, made at the end
    for name in ("last", "model_best"):
        one, two = (torch.load(d / f"{name}.pth.tar", weights_only=True) for d in (sharded, in_parts))
        assert matrix._equal(one["optimizer"], two["optimizer"])
        assert one["metric"] == two["metric"]
    states = sorted(path.name for path in in_parts.glob("*.dcp"))
    assert states == ["checkpoint-0.dcp", "checkpoint-1.dcp"]  # those within the epoch have gone
    export.main([str(in_parts / states[-1]), "--file", str(tmp_path / "one.pth.tar")])
    made = torch.load(tmp_path / "one.pth.tar", weights_only=True)
    assert matrix._equal(made["state_dict"], last(in_parts)["state_dict"])


@pytest.mark.parametrize("moment", [("update", 0, 5), ("update", 1, 3)])
def test_a_killed_run_in_parts_ends_bit_identical(moment: tuple[str, int, int], in_parts: Path) -> None:
    """SIGKILL of both while a state may be on its way to the disk."""
    directory = launch(in_parts.parent / f"killed-parts-{moment[1]}", *SHARDED, *PARTS, moment=moment)
    launch(directory, *SHARDED, *PARTS, "--resume", str(directory))
    assert_same(weights(in_parts), weights(directory))


def test_states_in_parts_continue_elsewhere(in_parts: Path, parallel: Path) -> None:
    """From FSDP to DDP and back, and in one process; what was not complete is passed over."""
    directory = launch(in_parts.parent / "parts-to-ddp", *SHARDED, *PARTS, moment=("update", 1, 2))
    launch(directory, "--no-fsdp", *SHARDED[1:], *PARTS, "--resume", str(directory))
    assert (directory / "log.txt").read_text().count("2 x cpu, sharded") == 1
    assert apart(directory, parallel) < 1e-4
    back = launch(in_parts.parent / "parts-to-fsdp", *SHARDED[1:], *PARTS, moment=("update", 1, 2))
    launch(back, *SHARDED, "--resume", str(back))
    assert apart(back, parallel) < 1e-4
    alone = ["--no-fsdp", "--output", str(in_parts.parent), "--experiment", "alone", "--resume"]
    alone.append(str(in_parts / "checkpoint-0.dcp"))
    metrics = train.main([*matrix.ARGS, *COMMON, *SHARDED[1:], *alone])
    assert metrics["epoch"] == 1


def test_metadata_of_strangers_is_not_executed(in_parts: Path, tmp_path: Path) -> None:
    state = tmp_path / "checkpoint-0.dcp"
    shutil.copytree(in_parts / "checkpoint-0.dcp", state)
    for name in ("os system", "torch load", "torch.distributed.checkpoint.filesystem io"):
        module, _, what = name.partition(" ")
        words = f"c{module}\n{what}\n(S'touch {tmp_path / 'owned'}'\ntR."
        (state / ".metadata").write_bytes(words.encode())
        with pytest.raises(UserError, match=f"{module}.{what} is not allowed in a checkpoint"):
            load_sharded(state)
    assert not (tmp_path / "owned").exists()
    (state / ".metadata").unlink()
    with pytest.raises(UserError, match="is incomplete"):
        load_state(state)


def test_sharded_weights_are_perturbed_alike_on_all_processes(sharded: Path) -> None:
    """Scope sam, AdamW: its states are sharded too."""
    args = ["--opt", "sam-adamw", "--lr", "1e-3", "--rho", "0.05", "--m-sharpness", "global"]
    one, two = launch(sharded.parent / "sam", *args, "--fsdp"), launch(sharded.parent / "sam-ddp", *args)
    assert apart(one, two) < 1e-3  # AdamW divides by the root of squares near zero


def test_validation_sharded_gives_the_same_figure(sharded: Path) -> None:
    """40 images on two processes in batches of 16: one has a batch more than the other."""
    checkpoint = ["--checkpoint", str(sharded), "--batch-size", "16", "--workers", "0", "--device", "cpu"]
    (alone,) = (row for row in evals.main(checkpoint) if row["metric"] == "loss")
    results = sharded.parent / "results.json"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "validate.py"]
    done = subprocess.run(
        [*words, *checkpoint, "--fsdp", "--results-file", str(results)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = (row for row in json.loads(results.read_text()) if row["metric"] == "loss")
    assert row["value"] == pytest.approx(alone["value"], rel=1e-5)
    assert row["num_samples"] == alone["num_samples"] == 40


def test_blocks_that_stay_gathered_and_bfloat16(sharded: Path) -> None:
    """Gathering once more or less changes nothing; weights gathered in bfloat16 are those that autocast would make."""
    never = launch(sharded.parent / "never", *SHARDED, "--fsdp-reshard-after-forward", "never")
    assert_same(weights(sharded), weights(never))
    bfloat16 = ["--amp", "--amp-dtype", "bfloat16"]
    one = launch(sharded.parent / "bf16", *SHARDED, *bfloat16)
    two = launch(sharded.parent / "bf16-ddp", *SHARDED[1:], *bfloat16)
    assert 0 < apart(one, two) < 0.01
    assert apart(one, sharded) > 0
    assert all(t.dtype == torch.float32 for t in last(one)["state_dict"].values() if t.is_floating_point())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--fsdp"], "--fsdp shares a model out among processes, and this is one"),
        (["--fsdp", "--torchcompile"], "--fsdp and --torchcompile exclude"),
        (["--fsdp", "--sync-bn"], "--fsdp and --sync-bn exclude"),
        (["--fsdp", "--amp"], "--amp-dtype float16; use bfloat16"),
        (["--fsdp", "--clip-grad", "1", "--clip-mode", "agc"], "--clip-mode agc"),
        (["--fsdp", "--opt", "ssam-f"], "--opt ssam-f"),
        (["--fsdp", "--opt", "sam"], "add --m-sharpness global"),
        (["--fsdp-reshard-after-forward", "never"], "--fsdp-reshard-after-forward needs --fsdp"),
    ],
)
def test_refusals(args: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        train.main([*BASE, "--output", str(tmp_path), *args])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_small_patch32_224", 12),
        ("resnet50", 16),
        ("swin_tiny_patch4_window7_224", 15),
        ("convnext_atto", 15),
        ("efficientnet_b0", 16),
        ("resnet56_cifar", 27),
    ],
)
def test_blocks_are_timms(name: str, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    found = blocks(model)
    assert len(found) == count
    held = [id(p) for block in found.values() for p in block.parameters()]
    assert len(held) == len(set(held)), "blocks within blocks"


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="Linear has no group_matcher"):
        blocks(nn.Linear(2, 2))
