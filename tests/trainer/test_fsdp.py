"""train.py --fsdp on two gloo processes: the same run as without, checkpoints that resume either way, its errors.

float32: FSDP and DDP add gradients in another order. 1e-4 relative over the whole run; one update differs by 1e-7.
"""

import io
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

import samon  # noqa: F401 - registers the CIFAR networks
from samon import UserError
from samon.cli import export
from samon.cli import validate as evals
from samon.trainer.dcp import _MetadataUnpickler, load_sharded
from samon.trainer.fsdp import find_blocks
from samon.trainer.state import load_state
from tests import processes
from tests.runs import assert_same, last, train, weights
from tools import check_interruptions as matrix

COMMON = ["--model", "test_vit", "--epochs", "2", "--clip-grad", "0.5", "-j", "0"]
SHARDED = ["--fsdp", "--opt", "samon-layerl2-momentum"]
DCP = ["--checkpoint-format", "dcp"]


def launch(directory: Path, *args: str, moment: matrix.Moment | None = None) -> Path:
    """Train on two processes; at the moment both are killed."""
    matrix.prepare(2)
    argv = [*matrix.ARGS, *COMMON, "--output", str(directory.parent), "--experiment", directory.name, *args]
    log = directory.with_suffix(".log")
    codes = matrix.launch(argv, 2, log, moment, "kill-all")
    assert any(codes) if moment else codes == [0, 0], log.read_text()[-2000:]
    return directory


def distance(one: Path, two: Path) -> float:
    """Relative distance between the final weights of two runs."""
    assert weights(one).keys() == weights(two).keys()
    a, b = (torch.cat([t.flatten() for t in weights(d).values() if t.is_floating_point()]) for d in (one, two))
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("sharded") / "whole", *SHARDED)


@pytest.fixture(scope="module")
def ddp(sharded: Path) -> Path:
    return launch(sharded.parent / "ddp", *SHARDED[1:])


@pytest.fixture(scope="module")
def dcp(sharded: Path) -> Path:
    return launch(sharded.parent / "dcp", *SHARDED, *DCP)


def test_the_run_is_that_of_ddp(sharded: Path, ddp: Path) -> None:
    """Clipping, accumulation, EMA, mixup, and uneven validation (40 images in batches of 8 on two processes)."""
    assert distance(sharded, ddp) < 1e-4
    ends = [(d / "summary.csv").read_text().splitlines()[-1].split(",") for d in (sharded, ddp)]
    assert [float(x) for x in ends[0][1:]] == pytest.approx([float(x) for x in ends[1][1:]], rel=1e-4, abs=1e-6)
    assert "2 x cpu, sharded" in (sharded / "log.txt").read_text()


@pytest.mark.parametrize(("extra", "moment"), [([], ("update", 0, 5)), (DCP, ("update", 1, 3))], ids=["file", "dcp"])
def test_a_killed_run_ends_bit_identical(extra: list[str], moment: matrix.Moment, sharded: Path) -> None:
    """SIGKILL of both, for dcp while a checkpoint may be on its way to the disk."""
    directory = launch(sharded.parent / f"killed-{len(extra)}", *SHARDED, *extra, moment=moment)
    launch(directory, *SHARDED, *extra, "--resume", str(directory))
    assert_same(weights(sharded), weights(directory))


@pytest.mark.slow
def test_another_optimizer_takes_over_in_the_tail(sharded: Path) -> None:
    """SGDW takes SGD's sharded momentum at update 3 of 12; killed and resumed after it, also as it runs under DDP."""
    args = ["--opt", "samon-layerl2-momentum", "--sam-tail", "0.75", "--tail-opt", "sgdw", "--tail-lr", "0.5"]
    whole, ddp = (launch(sharded.parent / f"tail{len(more)}", *args, *more) for more in (["--fsdp", *DCP], []))
    assert distance(whole, ddp) < 1e-4
    log = (whole / "log.txt").read_text()
    assert "update 3, the start of the tail: --tail-opt sgdw replaces SGD, with the momentum of " in log
    killed = launch(sharded.parent / "tail-killed", *args, "--fsdp", *DCP, moment=("update", 1, 3))
    launch(killed, *args, "--fsdp", *DCP, "--resume", str(killed))
    assert_same(weights(whole), weights(killed))


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], DCP], ids=["file", "dcp"])
def test_a_checkpoint_resumes_without_sharding_and_with_it(extra: list[str], sharded: Path, ddp: Path) -> None:
    for first, second in ((SHARDED, ["--no-fsdp", *SHARDED[1:]]), (SHARDED[1:], SHARDED)):
        directory = launch(sharded.parent / f"from-{len(first)}-{len(extra)}", *first, *extra, moment=("update", 1, 2))
        launch(directory, *second, *extra, "--resume", str(directory))
        assert (directory / "log.txt").read_text().count("2 x cpu, sharded") == 1
        assert distance(directory, ddp) < 1e-4
        assert "settings differ" not in (directory / "log.txt").read_text()


def test_sharded_checkpoints_end_as_the_same_files(sharded: Path, dcp: Path, tmp_path: Path) -> None:
    assert_same(weights(sharded), weights(dcp))  # last.pth.tar, converted at the end
    for name in ("last", "model_best"):
        one, two = (torch.load(d / f"{name}.pth.tar", weights_only=True) for d in (sharded, dcp))
        assert matrix.trees_equal(one["optimizer"], two["optimizer"])
        assert one["metric"] == two["metric"]
    states = sorted(path.name for path in dcp.glob("*.dcp"))
    assert states == ["checkpoint-0.dcp", "checkpoint-1.dcp"]  # those within the epoch are deleted
    export.main([str(dcp / states[-1]), "--file", str(tmp_path / "one.pth.tar")])
    converted = torch.load(tmp_path / "one.pth.tar", weights_only=True)
    assert matrix.trees_equal(converted["state_dict"], last(dcp)["state_dict"])


def test_a_sharded_checkpoint_resumes_in_one_process(dcp: Path, tmp_path: Path) -> None:
    source = dcp / "checkpoint-0.dcp"
    alone = ["--no-fsdp", "--output", str(tmp_path), "--experiment", "alone", "--resume", str(source)]
    assert train([*matrix.ARGS, *COMMON, *SHARDED[1:], *alone])["epoch"] == 1


def test_foreign_metadata_is_not_executed(dcp: Path, tmp_path: Path) -> None:
    state = Path(shutil.copytree(dcp / "checkpoint-0.dcp", tmp_path / "checkpoint-0.dcp"))
    for name in ("os system", "torch load", "torch.distributed.checkpoint.filesystem io"):
        module, _, what = name.partition(" ")
        words = f"c{module}\n{what}\n(S'touch {tmp_path / 'owned'}'\ntR."
        (state / ".metadata").write_bytes(words.encode())
        with pytest.raises(UserError, match=f"{module}.{what} is not allowed in a checkpoint"):
            load_sharded(state)
    words = b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\nMetadata\nS'__init__'\ntR."
    (state / ".metadata").write_bytes(words)
    with pytest.raises(UserError, match=r"builtins\.getattr is not allowed in a checkpoint"):
        load_sharded(state)
    assert not (tmp_path / "owned").exists()
    (state / ".metadata").unlink()
    with pytest.raises(UserError, match="is incomplete"):
        load_state(state)


def test_metadata_of_every_python_is_read() -> None:
    """Python 3.11.0 to 3.11.3 pickle the members of an Enum by `getattr`, others by its value."""
    for words in (b"cbuiltins\ngetattr\n(%sS'TORCH_CHANNELS_LAST'\ntR.", b"%s(I1\ntR."):
        data = words % b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
        assert _MetadataUnpickler(io.BytesIO(data)).load() is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST


def test_sharded_weights_are_perturbed_alike_on_all_processes(sharded: Path) -> None:
    """Scope sam, AdamW: its states are sharded too."""
    args = ["--opt", "sam-adamw", "--lr", "1e-3", "--rho", "0.05", "--m-sharpness", "global"]
    args += ["--epochs", "1", "--warmup-epochs", "0"]
    one, two = launch(sharded.parent / "sam", *args, "--fsdp"), launch(sharded.parent / "sam-ddp", *args)
    assert distance(one, two) < 1e-3  # AdamW divides by the root of squares near zero


def test_sharded_validation_gives_the_same_figure(sharded: Path) -> None:
    """40 images on two processes in batches of 16: one has a batch more than the other."""
    checkpoint = ["--checkpoint", str(sharded), "--batch-size", "16", "--workers", "0", "--device", "cpu"]
    (alone,) = (row for row in evals.main(checkpoint) if row["metric"] == "loss")
    results = sharded.parent / "results.json"
    processes.launch(evals.main, 2, [*checkpoint, "--fsdp", "--results-file", str(results)])
    (row,) = (row for row in json.loads(results.read_text()) if row["metric"] == "loss")
    assert row["value"] == pytest.approx(alone["value"], rel=1e-5)
    assert row["num_samples"] == alone["num_samples"] == 40


@pytest.mark.slow
def test_blocks_that_stay_gathered_and_bfloat16(sharded: Path) -> None:
    """Gathering more or less often changes nothing; weights gathered in bfloat16 are those that autocast would make."""
    never = launch(sharded.parent / "never", *SHARDED, "--fsdp-reshard-after-forward", "never")
    assert_same(weights(sharded), weights(never))
    bfloat16 = ["--amp", "--amp-dtype", "bfloat16"]
    one = launch(sharded.parent / "bf16", *SHARDED, *bfloat16)
    two = launch(sharded.parent / "bf16-ddp", *SHARDED[1:], *bfloat16)
    assert 0 < distance(one, two) < 0.01
    assert distance(one, sharded) > 0
    assert all(t.dtype == torch.float32 for t in last(one)["state_dict"].values() if t.is_floating_point())


BLOCKS = {"vit_small_patch32_224": 12, "resnet50": 16, "swin_tiny_patch4_window7_224": 15, "convnext_atto": 15}
BLOCKS |= {"efficientnet_b0": 16, "resnet56_cifar": 27}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_timms(name: str) -> None:
    with torch.device("meta"):
        blocks = find_blocks(timm.create_model(name))
    assert len(blocks) == BLOCKS[name]
    parameters = [id(p) for block in blocks.values() for p in block.parameters()]
    assert len(parameters) == len(set(parameters)), "blocks within blocks"


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="Linear has no group_matcher"):
        find_blocks(nn.Linear(2, 2))
