"""samon-export writes the model that validate.py evaluates."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import onnxruntime
import pytest
import timm
import torch

from samon.cli import export, validate
from samon.errors import RunError, UserError


@pytest.fixture
def weights(gray_run):
    return torch.load(gray_run[0] / "model_best.pth.tar", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_onnx_gives_the_same_logits(gray_run, weights, tmp_path):
    """In float32, also those of a run in lower precision."""
    export.main([str(gray_run[0]), "--onnx", str(tmp_path / "model.onnx"), "--", "--model-dtype", "bfloat16"])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    model = timm.create_model("test_resnet", num_classes=3).eval()
    model.load_state_dict(weights)
    for count in (1, 3):  # any batch size
        x = torch.randn(count, 3, 32, 32)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_wrong_onnx_file_is_not_kept(gray_run, tmp_path, monkeypatch):
    session = Mock(run=lambda names, inputs: [inputs["images"][:, :3, 0, 0] * 0])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    with pytest.raises(RunError, match="logits of test_resnet differ by"):
        export.main([str(gray_run[0]), "--onnx", str(tmp_path / "model.onnx")])
    assert not list(tmp_path.iterdir())


def test_timms_folder_recreates_the_model(gray_run, weights, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()  # an empty folder may exist
    # --channels-last: as stored by a run in this layout, whose tensors a file cannot hold
    export.main([str(gray_run[0]), "--timm", str(folder), "--", "--channels-last"])
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert model.pretrained_cfg["mean"] == [0.4] * 3
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == ["dark", "light", "middle"]
    assert not {"tag", "license", "origin_url"} & set(config["pretrained_cfg"])  # those of timm's own weights
    text = (folder / "README.md").read_text()
    for part in (
        *("sharpness-aware minimization (`--opt samon`)", "**rho:** 0.5", "**Validation top1:**", "**Epochs:**"),
        *("**Scope:** samon (only norm", "**Geometry:** l2 ball", "**Two passes:** in all", "license: unknown\n"),
    ):
        assert part in text


def test_an_incomplete_folder_is_removed(gray_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "generate_readme", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        export.main([str(gray_run[0]), "--timm", str(tmp_path / "hub")])
    assert not list(tmp_path.iterdir())


def test_errors_of_the_hub_are_one_line(gray_run, monkeypatch):
    error = Exception("[Errno -3] Temporary failure\nin name resolution")  # httpx's, which is no OSError
    monkeypatch.setattr(export, "push_to_hf_hub", Mock(side_effect=error))
    with pytest.raises(RunError, match=r"^--push me/model: \[Errno -3\] Temporary failure in name resolution; nothing"):
        export.main([str(gray_run[0]), "--push", "me/model", "--private"])


def test_the_card_says_what_was_perturbed_and_when():
    stored = {"opt": "lookahead_samon-layerl2-adamw", "perturb": "layer4", "rho": 0.1, "ascent": "looksam:5"}
    stored |= {"sam_tail": 0.25, "m_sharpness": 32}
    details = export.perturbation_details(stored)
    assert details["Scope"] == "samon (only normalization parameters (SAM-ON), names matching `layer4`)"
    assert details["Geometry"] == "layerwise l2, T = ||tensor||_2"
    assert [details[key] for key in ("rho", "ascent", "m-sharpness")] == ["0.1", "looksam:5", "32"]
    assert details["Two passes"] == "in the last 25 % of updates (tail), where looksam:5 makes an ascent pass"
    some = {"opt": "sam", "sam_start_epoch": 2, "sam_end_epoch": 8, "sam_every": 5}
    assert export.perturbation_details(some)["Two passes"] == "from epoch 2, before epoch 8, in every 5th update"
    assert export.perturbation_details({"opt": "adamw"}) == {}
    details = export.perturbation_details({"opt": "sam", "base_opt": "lamb", "ascent": "previous"})
    assert details["base-opt"] == "lamb"
    assert details["Two passes"].startswith("never")


def test_the_card_of_a_run_without_validation_names_its_training_loss():
    job, content = SimpleNamespace(config=SimpleNamespace(model="x")), {"metric": 2.3, "args": {"val_split": ""}}
    assert export.model_card(job, content, "mit", None)["details"]["Training loss"] == "2.30"


class LocalHub:
    """In place of huggingface_hub's HfApi: an upload lands in a cache directory, from which offline downloads come."""

    cache: Path

    def __init__(self, **_):
        pass

    def create_repo(self, repo_id, private, exist_ok):
        assert private
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, **_):
        return False

    def upload_folder(self, repo_id, folder_path, **_):
        repository = self.cache / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(folder_path, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)


def test_a_pushed_model_loads_from_the_hub(gray_run, weights, tmp_path, monkeypatch):
    """timm's own upload and download, with a directory as the hub; the card has the table of samon-validate."""
    run, results = str(gray_run[0]), tmp_path / "results.json"
    top1, *_ = validate.main(["--checkpoint", run, "--results-file", str(results), "--device", "cpu", "-j", "0"])
    monkeypatch.setattr(LocalHub, "cache", tmp_path / "cache", raising=False)
    monkeypatch.setattr(timm.models._hub, "HfApi", LocalHub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    export.main([run, "--push", "me/model", "--private", "--license", "mit", "--results", str(results)])
    model = timm.create_model("hf-hub:me/model", pretrained=True, cache_dir=tmp_path / "cache")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    (card,) = (path.read_text() for path in (tmp_path / "cache").rglob("README.md"))
    table = "## Evaluation\n\n| data set | split | evaluation | top-1 |"
    for part in (table, f"| accuracy | {top1['value']:.2f} |", "license: mit\n"):
        assert part in card


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "nothing to export"),
        ("--file weights.pth.tar", "--file converts a sharded checkpoint"),
        ("--onnx LICENSE/x.onnx", "--onnx LICENSE/x.onnx: .*choose another path"),
        ("--timm docs", "docs is not empty"),
        ("--timm LICENSE", "LICENSE is .*a file"),
        ("--img-size 32", "go after --"),
        ("--timm hub --results LICENSE", "--results LICENSE: .*name a .json file of samon-validate"),
        ("--timm hub --results {empty}", "has no results of these weights; run samon-validate"),
    ],
)
def test_mistakes(args, message, gray_run, tmp_path):
    rows = [{"checkpoint": str(gray_run[0] / "model_best.pth.tar"), "ema": True}]  # of an average that is not exported
    (tmp_path / "empty.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        export.main([str(gray_run[0]), *args.format(empty=tmp_path / "empty.json").split()])
