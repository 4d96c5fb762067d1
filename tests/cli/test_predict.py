"""samon-predict and samon-export give what validate.py's model gives."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from samon.cli import export, predict
from samon.cli.program import run_script
from samon.errors import RunError, UserError
from samon.trainer import main as train

GRAYS = {"dark": 30, "light": 220, "middle": 120}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run directory, image folder): three classes of gray images, 5 epochs of them."""
    root = tmp_path_factory.mktemp("gray")
    for split in ("train", "val"):
        for name, gray in GRAYS.items():
            (root / "images" / split / name).mkdir(parents=True)
            for index in range(16):
                Image.new("RGB", (40, 36), (gray + index,) * 3).save(root / "images" / split / name / f"{index}.png")
    args = ["--model", "test_resnet", "--img-size", "32", "-b", "8", "-j", "0", "--epochs", "5", "--warmup-epochs", "0"]
    args += [
        "--opt",
        "samon",
        "--data-dir",
        str(root / "images"),
        "--val-split",
        "val",
        "--mean",
        "0.4",
        "--std",
        "0.3",
    ]
    train.main([*args, "--output", str(root), "--experiment", "run", "--lr", "0.1", "--device", "cpu"])
    return root / "run", root / "images"


def by_hand(run: Path, paths: list[Path]) -> torch.Tensor:
    """Probabilities [N, 3] from timm's own model and transform."""
    content = torch.load(run / "model_best.pth.tar", weights_only=True)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    model.load_state_dict(content["state_dict"])
    cfg = model.pretrained_cfg
    how: dict[str, Any] = {"interpolation": cfg["interpolation"], "crop_pct": cfg["crop_pct"]}
    transform: Any = create_transform((3, 32, 32), mean=(0.4,) * 3, std=(0.3,) * 3, **how)
    with torch.no_grad():
        return model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])).softmax(1)


def test_csv_of_a_folder(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, images = trained
    out = tmp_path / "out.csv"
    flags = ["--device", "cpu", "--workers", "0", "--batch-size", "7"]
    predict.main([str(images / "val"), "--checkpoint", str(run), "--topk", "2", "-o", str(out), "--", *flags])
    rows = list(csv.DictReader(out.read_text().splitlines()))
    paths = [Path(row["file"]) for row in rows]
    assert paths == sorted((images / "val").rglob("*.png"))
    assert list(rows[0]) == ["file", "label_1", "probability_1", "label_2", "probability_2"]
    values, classes = by_hand(run, paths).topk(2, dim=1)
    names = sorted(GRAYS)
    for row, value, index in zip(rows, values.tolist(), classes.tolist(), strict=True):
        assert [row["label_1"], row["label_2"]] == [names[i] for i in index]
        assert float(row["probability_1"]) == pytest.approx(value[0], abs=2e-5)  # six decimals, and float32
        assert float(row["probability_2"]) == pytest.approx(value[1], abs=2e-5)
    assert len({row["label_1"] for row in rows}) > 1  # the model tells some of them apart


def test_imagenets_names_on_standard_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **{**kwargs, "pretrained": False}))
    photo = next(Path("tests/photographs").rglob("*.jp*g"))
    more = ["--", "--device", "cpu", "--workers", "0"]
    predict.main([str(photo), "--model", "test_resnet", "--pretrained", "--topk", "1", *more])
    head, row = csv.reader(capsys.readouterr().out.splitlines())
    assert head == ["file", "label_1", "probability_1"]
    assert row[0] == str(photo)
    assert not row[1].isdigit()


BAD = {
    "no weights": (["."], "no weights: give --checkpoint"),
    "no file": (["/nowhere.png", "--checkpoint", "RUN"], "/nowhere.png: no such file"),
    "no image": (["samon", "--checkpoint", "RUN"], "no images below samon"),
    "topk": (["tests", "--checkpoint", "RUN", "--topk", "0"], "--topk must be at least 1"),
    "output": (["tests", "--checkpoint", "RUN", "-o", "LICENSE/x.csv"], "--output LICENSE/x.csv: File exists"),
    "text": (["LICENSE", "--checkpoint", "RUN", "--", "--device", "cpu"], "no file of 1 is an image"),
    "flag": (["tests", "--checkpoint", "RUN", "--img-size", "32"], "go after --, .* -- --img-size 32"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes(case: str, trained: tuple[Path, Path]) -> None:
    args, words = BAD[case]
    with pytest.raises(UserError, match=words):
        predict.main([str(trained[0]) if word == "RUN" else word for word in args])


def test_damaged_files_have_empty_rows_and_every_name_is_kept(
    trained: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, images = trained
    odd = os.fsencode(tmp_path / "in") + b"/caf\xe9.png"  # Latin-1
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(odd)).write_bytes((images / "val/dark/0.png").read_bytes())
    (tmp_path / "in/a.png").write_bytes(b"no image")
    (tmp_path / "in/b.png").symlink_to("nowhere")
    (tmp_path / "in/z.png").write_bytes((images / "val/light/0.png").read_bytes())
    flags = ["--checkpoint", str(run), "--topk", "9", "--", "--device", "cpu", "--workers", "0"]
    predict.main([str(tmp_path / "in"), "-o", str(tmp_path / "out.csv"), *flags])
    lines = (tmp_path / "out.csv").read_bytes().splitlines()
    assert len(lines) == 5
    rows = [line.split(b",") for line in lines[1:]]
    assert [row[0] for row in rows] == [os.fsencode(tmp_path / "in" / name) for name in ("a.png", "b.png")] + [
        odd,
        os.fsencode(tmp_path / "in/z.png"),
    ]
    assert [row[1] for row in rows] == [b"", b"", b"dark", b"light"]
    assert {len(row) for row in rows} == {7}
    said = capfd.readouterr().err
    assert "2 of 4 files cannot be read: their rows are empty" in said
    assert "a.png: not an image: 8 bytes" in said


def test_hidden_files_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert predict.image_files([tmp_path]) == [tmp_path / "a.png"]
    assert "3 hidden files are left out" in caplog.text
    assert predict.image_files([tmp_path / "._a.png"]) == [tmp_path / "._a.png"]  # named by the user


def test_every_command_prints_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit):
        run_script(lambda: print(os.fsdecode(b"caf\xe9")))
    assert output.buffer.getvalue() == b"caf\xe9\n"  # type: ignore[attr-defined]


# --- export -----------------------------------------------------------------------------------------------------------


def test_onnx_gives_the_same_logits(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = trained
    export.main([str(run), "--onnx", str(tmp_path / "model.onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    content = torch.load(run / "model_best.pth.tar", weights_only=True)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    model.load_state_dict(content["state_dict"])
    for count in (1, 3):  # any batch size
        x = torch.randn(count, 3, 32, 32)
        (found,) = session.run(["logits"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_wrong_onnx_file_is_not_kept(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def run(self, names: Any, inputs: dict[str, Any]) -> list[Any]:
            return [inputs["images"][:, :3, 0, 0] * 0]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(RunError, match="logits of test_resnet differ by"):
        export.main([str(trained[0]), "--onnx", str(tmp_path / "model.onnx")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("license_flags", [[], ["--license", "mit"]])
def test_timms_folder_makes_the_model_again(
    license_flags: list[str], trained: tuple[Path, Path], tmp_path: Path
) -> None:
    run, _ = trained
    (tmp_path / "hub").mkdir()  # an empty folder may be there
    # As of a run that was trained in this layout, whose tensors a file cannot hold.
    export.main([str(run), "--timm", str(tmp_path / "hub"), *license_flags, "--", "--channels-last"])
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}
    model: nn.Module = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    content = torch.load(run / "model_best.pth.tar", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, content["state_dict"][name]), name
    assert model.pretrained_cfg["mean"] == [0.4] * 3
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)
    written = json.loads((tmp_path / "hub/config.json").read_text())
    assert written["label_names"] == sorted(GRAYS)
    assert not {"tag", "license", "origin_url"} & set(written["pretrained_cfg"])  # those of timm's own weights
    text = (tmp_path / "hub/README.md").read_text()
    for part in ("sharpness-aware minimization (`--opt samon`)", "**rho:** 0.5", "**Validation top1:**", "**Epochs:**"):
        assert part in text
    assert f"license: {license_flags[-1] if license_flags else 'unknown'}\n" in text


def test_a_folder_that_cannot_be_finished_is_not_left_behind(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "generate_readme", full)
    with pytest.raises(OSError, match="No space left"):
        export.main([str(trained[0]), "--timm", str(tmp_path / "hub")])
    assert not list(tmp_path.iterdir())


def test_a_push_without_a_network_is_one_line(trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class ConnectError(Exception):
        """As httpx's, which is no OSError."""

    def push(*_: Any, **__: Any) -> None:
        raise ConnectError("[Errno -3] Temporary failure\nin name resolution")

    monkeypatch.setattr(export, "push_to_hf_hub", push)
    with pytest.raises(RunError, match=r"^--push me/model: \[Errno -3\] Temporary failure in name resolution; nothing"):
        export.main([str(trained[0]), "--push", "me/model"])


def test_push_hands_timm_the_same(trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    push: Callable[..., None] = lambda model, repo, **how: seen.append((model, repo, how))  # noqa: E731
    monkeypatch.setattr(export, "push_to_hf_hub", push)
    export.main([str(trained[0]), "--push", "me/model", "--private"])
    ((model, repo, how),) = seen
    assert (repo, how["private"], how["model_config"]["num_classes"]) == ("me/model", True, 3)
    assert how["model_card"]["details"]["Optimizer"] == "samon"
    assert how["data_config"]["mean"] == (0.4,) * 3
    assert model.num_classes == 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "nothing to make"),
        (["--onnx", "LICENSE/x.onnx"], "--onnx LICENSE/x.onnx: .*choose another path"),
        (["--timm", "docs"], "docs is not empty"),
        (["--timm", "LICENSE"], "LICENSE is a file"),
        (["--img-size", "32"], "go after --"),
    ],
)
def test_mistakes_of_export(args: list[str], words: str, trained: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=words):
        export.main([str(trained[0]), *args])
