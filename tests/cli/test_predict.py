"""samon-predict gives what validate.py's model gives."""

import csv
import os
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from samon.cli import predict
from samon.errors import UserError

CPU = ["--device", "cpu", "--workers", "0"]


def test_csv_of_a_folder_has_the_probabilities_of_timms_model(gray_run, tmp_path):
    run, images = gray_run
    out = tmp_path / "out.csv"
    flags = ["--topk", "2", "-o", str(out), "--", *CPU, "--batch-size", "7"]
    predict.main([str(images / "val"), "--checkpoint", str(run), *flags])
    rows = list(csv.DictReader(out.read_text().splitlines()))
    paths = [Path(row["file"]) for row in rows]
    assert paths == [images / "val" / name / f"{i}.png" for name in ("dark", "light", "middle") for i in range(16)]
    assert list(rows[0]) == ["file", "label_1", "probability_1", "label_2", "probability_2"]
    model = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(run / "model_best.pth.tar")).eval()
    how = {key: model.pretrained_cfg[key] for key in ("interpolation", "crop_pct")}
    transform = create_transform((3, 32, 32), mean=(0.4,) * 3, std=(0.3,) * 3, **how)
    with torch.no_grad():
        top = model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])).softmax(1).topk(2)
    names = ["dark", "light", "middle"]
    for row, values, classes in zip(rows, top.values.tolist(), top.indices.tolist(), strict=True):
        assert [row["label_1"], row["label_2"]] == [names[i] for i in classes]
        assert float(row["probability_1"]) == pytest.approx(values[0], abs=2e-5)  # six decimals, and float32
        assert float(row["probability_2"]) == pytest.approx(values[1], abs=2e-5)
    assert len({row["label_1"] for row in rows}) > 1  # the model distinguishes some of them


def test_imagenets_names_on_standard_output(capsys, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **{**kwargs, "pretrained": False}))
    photo = next(Path("tests/photographs").rglob("*.jp*g"))
    predict.main([str(photo), "--model", "test_resnet", "--pretrained", "--topk", "1", "--", *CPU])
    head, row = csv.reader(capsys.readouterr().out.splitlines())
    assert head == ["file", "label_1", "probability_1"]
    assert row[0] == str(photo)
    assert not row[1].isdigit()


def test_names_of_a_run_in_half_precision_with_more_outputs_than_classes(tmp_path):
    """As after --pretrained without --num-classes: the other outputs are numbers, not ImageNet's classes."""
    model = timm.create_model("test_resnet")
    with torch.no_grad():
        model.get_classifier().bias[[1, 5]] += torch.tensor([200.0, 100.0])
    args = Namespace(model="test_resnet", img_size=32, model_dtype="bfloat16")
    content = {"state_dict": model.state_dict(), "arch": args.model, "args": args, "class_names": ["ant", "bee"]}
    torch.save(content, tmp_path / "net.pth")
    photo = next(Path("tests/photographs").rglob("*.jp*g"))
    out = tmp_path / "out.csv"
    predict.main([str(photo), "--checkpoint", str(tmp_path / "net.pth"), "--topk", "2", "-o", str(out), "--", *CPU])
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert (row["label_1"], row["label_2"]) == ("bee", "5")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (".", "no weights: give --checkpoint"),
        ("/nowhere.png --checkpoint RUN", "/nowhere.png: no such file"),
        ("samon --checkpoint RUN", "samon: no images found"),
        ("tests --checkpoint RUN --topk 0", "--topk must be at least 1"),
        ("tests --checkpoint RUN -o LICENSE/x.csv", "--output LICENSE/x.csv: File exists"),
        ("LICENSE --checkpoint RUN -- --device cpu", "none of 1 files is a readable image"),
        ("tests --checkpoint RUN -- --valid-labels LICENSE", "--valid-labels has no effect on samon-predict"),
        ("tests --model vit_tiny* --pretrained", "samon-predict needs one model, got"),
        ("tests --checkpoint RUN --img-size 32", "go after --, .* -- --img-size 32"),
    ],
)
def test_mistakes(args, message, gray_run):
    with pytest.raises(UserError, match=message):
        predict.main(args.replace("RUN", str(gray_run[0])).split())


def test_corrupt_files_have_empty_rows_and_file_names_keep_their_bytes(gray_run, tmp_path, capfd):
    run, images = gray_run
    folder = tmp_path / "in"
    folder.mkdir()
    latin1 = os.fsencode(folder) + b"/caf\xe9.png"
    Path(os.fsdecode(latin1)).write_bytes((images / "val/dark/0.png").read_bytes())
    (folder / "a.png").write_bytes(b"no image")
    (folder / "b.png").symlink_to("nowhere")
    (folder / "z.png").write_bytes((images / "val/light/0.png").read_bytes())
    predict.main([str(folder), "-o", str(tmp_path / "out.csv"), "--checkpoint", str(run), "--topk", "9", "--", *CPU])
    rows = [line.split(b",") for line in (tmp_path / "out.csv").read_bytes().splitlines()[1:]]
    files = [os.fsencode(folder / "a.png"), os.fsencode(folder / "b.png"), latin1, os.fsencode(folder / "z.png")]
    assert [row[0] for row in rows] == files
    assert [row[1] for row in rows] == [b"", b"", b"dark", b"light"]
    assert {len(row) for row in rows} == {7}
    log = capfd.readouterr().err
    assert "2 of 4 files cannot be read: their rows are empty" in log
    assert "a.png: not an image: 8 bytes" in log


def test_hidden_files_are_skipped_unless_named(tmp_path, caplog):
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    named = [tmp_path, tmp_path / "._a.png"]
    assert [entry.where for entry in predict.list_images(named, None)] == [f"{tmp_path}/a.png", f"{tmp_path}/._a.png"]
    assert "3 hidden files or folders are left out" in caplog.text
