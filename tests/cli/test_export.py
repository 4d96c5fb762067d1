"""samon-export writes the model that validate.py evaluates."""

import json

import onnxruntime
import pytest
import timm
import torch

from samon.cli import export
from samon.errors import RunError, UserError


@pytest.fixture
def weights(gray_run):
    return torch.load(gray_run[0] / "model_best.pth.tar", weights_only=True)["state_dict"]


def test_onnx_gives_the_same_logits(gray_run, weights, tmp_path):
    export.main([str(gray_run[0]), "--onnx", str(tmp_path / "model.onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    model = timm.create_model("test_resnet", num_classes=3).eval()
    model.load_state_dict(weights)
    for count in (1, 3):  # any batch size
        x = torch.randn(count, 3, 32, 32)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_wrong_onnx_file_is_not_kept(gray_run, tmp_path, monkeypatch):
    class WrongSession:
        def __init__(self, *args, **kwargs): ...

        def run(self, names, inputs):
            return [inputs["images"][:, :3, 0, 0] * 0]

    monkeypatch.setattr(onnxruntime, "InferenceSession", WrongSession)
    with pytest.raises(RunError, match="logits of test_resnet differ by"):
        export.main([str(gray_run[0]), "--onnx", str(tmp_path / "model.onnx")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("license_name", ["unknown", "mit"])
def test_timms_folder_recreates_the_model(license_name, gray_run, weights, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()  # an empty folder may exist
    license_flags = [] if license_name == "unknown" else ["--license", license_name]
    # --channels-last: as stored by a run in this layout, whose tensors a file cannot hold
    export.main([str(gray_run[0]), "--timm", str(folder), *license_flags, "--", "--channels-last"])
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
    for part in ("sharpness-aware minimization (`--opt samon`)", "**rho:** 0.5", "**Validation top1:**", "**Epochs:**"):
        assert part in text
    assert f"license: {license_name}\n" in text


def test_an_incomplete_folder_is_removed(gray_run, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "generate_readme", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export.main([str(gray_run[0]), "--timm", str(tmp_path / "hub")])
    assert not list(tmp_path.iterdir())


def test_push_gives_timm_the_same_and_its_errors_are_one_line(gray_run, monkeypatch):
    class ConnectError(Exception):
        """As httpx's, which is no OSError."""

    def push(model, repository, **options):
        assert (repository, options["private"], options["model_config"]["num_classes"]) == ("me/model", True, 3)
        assert options["model_card"]["details"]["Optimizer"] == "samon"
        assert options["data_config"]["mean"] == (0.4,) * 3
        assert model.num_classes == 3
        raise ConnectError("[Errno -3] Temporary failure\nin name resolution")

    monkeypatch.setattr(export, "push_to_hf_hub", push)
    with pytest.raises(RunError, match=r"^--push me/model: \[Errno -3\] Temporary failure in name resolution; nothing"):
        export.main([str(gray_run[0]), "--push", "me/model", "--private"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "nothing to export"),
        ("--file weights.pth.tar", "--file converts a sharded checkpoint"),
        ("--onnx LICENSE/x.onnx", "--onnx LICENSE/x.onnx: .*choose another path"),
        ("--timm docs", "docs is not empty"),
        ("--timm LICENSE", "LICENSE is a file"),
        ("--img-size 32", "go after --"),
    ],
)
def test_mistakes(args, message, gray_run):
    with pytest.raises(UserError, match=message):
        export.main([str(gray_run[0]), *args.split()])
