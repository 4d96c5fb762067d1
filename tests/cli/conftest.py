from pathlib import Path

import pytest
from PIL import Image

from tests.runs import train


@pytest.fixture(scope="session")
def gray_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run directory, image folder): three classes of gray images, 5 epochs of them."""
    root = tmp_path_factory.mktemp("gray")
    for split in ("train", "val"):
        for name, gray in {"dark": 30, "light": 220, "middle": 120}.items():
            (root / "images" / split / name).mkdir(parents=True)
            for index in range(16):
                Image.new("RGB", (40, 36), (gray + index,) * 3).save(root / "images" / split / name / f"{index}.png")
    args = ["--model", "test_resnet", "--img-size", "32", "-b", "8", "-j", "0", "--epochs", "5", "--warmup-epochs", "0"]
    args += ["--opt", "samon", "--lr", "0.1", "--mean", "0.4", "--std", "0.3", "--device", "cpu"]
    args += ["--data-dir", str(root / "images"), "--val-split", "val", "--output", str(root), "--experiment", "run"]
    train(args)
    return root / "run", root / "images"
