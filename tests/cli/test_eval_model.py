"""The models of validate.py: checkpoint files, pretrained weights, many models, test-time pooling."""

import csv
import json
import logging

import pytest
import timm
import torch
from timm.layers import apply_test_time_pool

from samon.cli import eval_model
from samon.cli.eval_model import build, create_model, list_checkpoints, list_model_names
from samon.cli.validate import main, parse
from samon.errors import UserError
from samon.trainer.distributed import DistInfo
from tests.eval_sets import CPU, FASHION

PLAIN = [*FASHION, "--num-samples", "20", "--workers", "0", "--device", "cpu"]
RANDOM = ["--no-pretrained", "--num-classes", "10"]


def build_one(*flags):
    return build(parse([*flags, *PLAIN])[0], DistInfo(CPU, 0, 1))


def test_a_directory_stands_for_its_best_checkpoint_or_all_of_them(tmp_path):
    files = [tmp_path / f"checkpoint-{number}.pth.tar" for number in (8, 9)]
    for file in files:
        file.touch()
    assert list_checkpoints([str(tmp_path)]) == [*map(str, files)]
    for name in ("last", "model_best"):
        (tmp_path / f"{name}.pth.tar").touch()
    assert list_checkpoints([str(tmp_path)]) == [str(tmp_path / "model_best.pth.tar")]


def test_a_model_by_name_has_its_pretrained_weights(monkeypatch, tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "net.pth")
    pretrained_of = []
    fake = lambda config, pretrained: pretrained_of.append(pretrained) or create_model(config, False)  # noqa: E731
    monkeypatch.setattr(eval_model, "create_model", fake)
    for flags in ([], ["--pretrained"], ["--no-pretrained"], ["--checkpoint", str(tmp_path / "net.pth")]):
        build_one("--model", "resnet10t", *flags)
    assert pretrained_of == [True, True, False, False]


def test_weights_that_are_not_available(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    with pytest.raises(UserError, match=r"--model resnet10t: .*; give --checkpoint FILE, or --no-pretrained"):
        build_one("--model", "resnet10t")


# --- many models ----------------------------------------------------------------------------------------------------
def test_names_of_many_models(tmp_path):
    every = list_model_names("all")
    assert "resnet10t.c3_in1k" in every
    assert not [name for name in every if timm.get_pretrained_cfg(name).num_classes != 1000]
    assert list_model_names("test_vit*") == timm.list_models("test_vit*", pretrained=True)
    (tmp_path / "names.txt").write_text("resnet10t\n\ntest_vit\n")
    assert list_model_names(str(tmp_path / "names.txt")) == ["resnet10t", "test_vit"]
    assert list_model_names("resnet10t.c3_in1k") == ["resnet10t.c3_in1k"]


def test_many_models_in_timms_format(tmp_path, caplog):
    """A row per model, the best first; one that does not take the images is left out."""
    (tmp_path / "names.txt").write_text("resnet10t\nnest_tiny\ntest_resnet\n")
    flags = ["--model", str(tmp_path / "names.txt"), *RANDOM, *PLAIN, "--img-size", "40", "--results-format", "timm"]
    with caplog.at_level(logging.ERROR):
        rows = main([*flags, "--results-file", str(tmp_path / "results.csv")])
    assert "nest_tiny is left out: " in caplog.text
    found = {row["model"]: row for row in rows if row["metric"] == "top1"}
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    keys = ["model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"]
    assert list(lines[0]) == keys
    assert {line["model"] for line in lines} == {"resnet10t", "test_resnet"}
    assert float(lines[0]["top1"]) >= float(lines[1]["top1"])
    for line in lines:
        assert float(line["top1"]) == found[line["model"]]["value"] == 100 - float(line["top1_err"])
        cfg = timm.get_pretrained_cfg(line["model"])
        assert (line["img_size"], line["interpolation"]) == ("40", cfg.interpolation)
        assert float(line["crop_pct"]) == (cfg.test_crop_pct or cfg.crop_pct)
    count = sum(p.numel() for p in timm.create_model("test_resnet", num_classes=10).parameters())
    assert next(float(line["param_count"]) for line in lines if line["model"] == "test_resnet") == round(count / 1e6, 2)
    (tmp_path / "names.txt").write_text("nest_tiny\nlevit_128s\n")
    with pytest.raises(UserError, match="none of the 2 models could be evaluated"):
        main([*flags, "--results-file", str(tmp_path / "none.csv")])
    main([*flags, "--model", "test_resnet", "--results-file", str(tmp_path / "one.json")])
    assert list(json.loads((tmp_path / "one.json").read_text())) == keys  # timm writes one model without a list


# --- test-time pooling ----------------------------------------------------------------------------------------------
def test_test_time_pooling_is_timms():
    flags = ["--model", "test_resnet", *RANDOM, "--img-size", "192"]
    plain, context = build_one(*flags), build_one(*flags, "--test-pool")
    images = torch.randn(2, 3, 192, 192)
    pooled, larger = apply_test_time_pool(plain.model, {"input_size": (3, 192, 192)})
    with torch.no_grad():
        assert torch.equal(context.model(images), pooled.eval()(images))
    assert larger
    assert (context.num_classes, context.data_config["crop_pct"]) == (10, 1.0)
    smaller = build_one(*flags, "--test-pool", "--img-size", "96")
    assert (smaller.num_classes, smaller.data_config["crop_pct"]) == (10, 0.95)


@pytest.mark.parametrize("model", ["test_vit", "test_convnext", "levit_128s"])
def test_models_without_plain_average_pooling_are_refused(model):
    size = "256" if model == "levit_128s" else "192"
    with pytest.raises(UserError, match=f"--test-pool: {model} has no plain average pooling before its classifier"):
        build_one("--model", model, *RANDOM, "--img-size", size, "--test-pool")
