"""The models of validate.py as of timm's script: pretrained unless there is a checkpoint, many at once, pooling."""

import csv
import json
import logging

import pytest
import timm
import torch
from timm.layers import apply_test_time_pool

from samon.errors import UserError
from samon.evals import main as program
from samon.evals.main import build, main, parse
from samon.evals.model import create, model_names
from samon.trainer.distributed import DistInfo

CPU = DistInfo(torch.device("cpu"), 0, 1)
FASHION = ["--dataset", "wds/fashion-mnist", "--data-dir", "data/fashion-mnist", "--num-samples", "20"]
PLAIN = [*FASHION, "--workers", "0", "--device", "cpu"]
RANDOM = ["--no-pretrained", "--num-classes", "10"]


# --- pretrained weights -----------------------------------------------------------------------------------------------


def test_a_model_by_name_has_its_pretrained_weights(monkeypatch, tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "net.pth")
    asked = []
    monkeypatch.setattr(program, "create", lambda config, pretrained: asked.append(pretrained) or create(config, False))
    for flags in ([], ["--pretrained"], ["--no-pretrained"], ["--checkpoint", str(tmp_path / "net.pth")]):
        (job,) = parse(["--model", "resnet10t", *PLAIN, *flags])
        build(job, CPU)
    assert asked == [True, True, False, False]


def test_weights_that_cannot_be_had(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    with pytest.raises(UserError, match=r"--model resnet10t: .*; give --checkpoint FILE, or --no-pretrained"):
        build(parse(["--model", "resnet10t", *PLAIN])[0], CPU)


# --- many models ------------------------------------------------------------------------------------------------------


def test_names_of_many_models(tmp_path):
    every = model_names("all")
    assert "resnet10t.c3_in1k" in every
    assert not [name for name in every if timm.get_pretrained_cfg(name).num_classes != 1000]
    assert model_names("test_vit*") == timm.list_models("test_vit*", pretrained=True)
    (tmp_path / "names.txt").write_text("resnet10t\n\ntest_vit\n")
    assert model_names(str(tmp_path / "names.txt")) == ["resnet10t", "test_vit"]
    assert model_names("resnet10t.c3_in1k") == ["resnet10t.c3_in1k"]


def test_many_models_in_timms_form(tmp_path, caplog):
    """A row for each, the best first; one that does not take the images is left out."""
    (tmp_path / "names.txt").write_text("resnet10t\nnest_tiny\ntest_resnet\n")
    flags = ["--model", str(tmp_path / "names.txt"), *RANDOM, *PLAIN, "--img-size", "40", "--results-format", "timm"]
    with caplog.at_level(logging.ERROR):
        rows = main([*flags, "--results-file", str(tmp_path / "results.csv")])
    assert "nest_tiny is left out: " in caplog.text
    found = {row["model"]: row for row in rows if row["metric"] == "top1"}
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
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
    main([*flags, "--model", "test_resnet", "--results-file", str(tmp_path / "one.json")])
    assert list(json.loads((tmp_path / "one.json").read_text())) == keys  # timm writes one model without a list


def test_no_model_could_be_evaluated(tmp_path):
    (tmp_path / "names.txt").write_text("nest_tiny\nlevit_128s\n")
    with pytest.raises(UserError, match="none of the 2 models could be evaluated"):
        main(["--model", str(tmp_path / "names.txt"), *RANDOM, *PLAIN, "--img-size", "40"])


# --- test-time pooling ------------------------------------------------------------------------------------------------


def test_test_time_pooling_is_timms():
    flags = ["--model", "test_resnet", *RANDOM, *PLAIN, "--img-size", "192"]
    plain, target = (build(parse([*flags, *extra])[0], CPU) for extra in ([], ["--test-pool"]))
    images = torch.randn(2, 3, 192, 192)
    timms, larger = apply_test_time_pool(plain.model, {"input_size": (3, 192, 192)})
    with torch.no_grad():
        assert torch.equal(target.model(images), timms.eval()(images))
    assert larger
    assert (target.model.num_classes, target.data_config["crop_pct"]) == (10, 1.0)
    smaller = build(parse([*flags, "--test-pool", "--img-size", "96"])[0], CPU)
    assert (smaller.model.num_classes, smaller.data_config["crop_pct"]) == (10, 0.95)


@pytest.mark.parametrize("model", ["test_vit", "test_convnext", "levit_128s"])
def test_models_that_cannot_be_pooled_so(model):
    size = "256" if model == "levit_128s" else "192"
    argv = ["--model", model, *RANDOM, *PLAIN, "--img-size", size, "--test-pool"]
    with pytest.raises(UserError, match=f"--test-pool: {model} has no plain average pooling before its classifier"):
        build(parse(argv)[0], CPU)
