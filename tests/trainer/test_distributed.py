"""How processes find each other, and what is said while they do not."""

import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from timm import utils

from samon.errors import UserError
from samon.trainer import distributed as world
from samon.trainer.config import Config

CONFIG = Config(device_modules=[], device="cpu")


@pytest.fixture
def leftover(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment that a launcher's job leaves behind."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def waits(settings: object) -> None:
    time.sleep(0.3)
    raise RuntimeError("nobody came")


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (60.0, False)])
def test_a_process_that_waits_for_others_says_so(
    leftover: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], patience: float, shown: bool
) -> None:
    leftover.setattr(world, "NOTICE_DELAY", patience)
    leftover.setattr(utils, "init_distributed_device", waits)
    with pytest.raises(UserError, match=r"^RANK, WORLD_SIZE: nobody came"):
        world.init_distributed(CONFIG)
    said = "process 0 of 2, waiting for the others at host:29500 (unset WORLD_SIZE for a single process)"
    assert (said in capfd.readouterr().err) is shown


def test_slurms_variables_alone_are_no_way_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^SLURM_NTASKS=2 .* torchrun, or unset SLURM_NTASKS for a single process"):
        world.init_distributed(CONFIG)


def test_a_rank_that_is_no_number_is_one_line(leftover: pytest.MonkeyPatch) -> None:
    leftover.setenv("WORLD_SIZE", "x")
    with pytest.raises(UserError, match=r"^RANK, WORLD_SIZE: invalid literal"):
        world.init_distributed(CONFIG)


def test_a_card_trains_with_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm finds the card; a run on the CPU leaves the settings as they are."""

    def find_card(args: Namespace) -> torch.device:
        args.rank, args.world_size = 0, 1
        return torch.device(args.device)

    monkeypatch.setattr(utils, "init_distributed_device", find_card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, matmul.allow_tf32
    try:
        cudnn.benchmark = matmul.allow_tf32 = False
        assert world.init_distributed(CONFIG).device.type == "cpu"
        assert (cudnn.benchmark, matmul.allow_tf32) == (False, False)
        assert world.init_distributed(CONFIG.but(device="")).device.type == "cuda"
        assert (cudnn.benchmark, matmul.allow_tf32) == (True, True)
    finally:
        cudnn.benchmark, matmul.allow_tf32 = before


def test_device_modules_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "backend_of_a_test.py").write_text("import torch\ntorch.imported_by_a_test = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch, "imported_by_a_test", False, raising=False)
    world.init_distributed(CONFIG.but(device_modules=["backend_of_a_test"]))
    assert torch.imported_by_a_test
