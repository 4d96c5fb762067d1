"""experiments/flat_minima: rounding and corruptions by their definitions, and every figure of a finished run."""

import colorsys
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from torch import nn

import samon  # noqa: F401  registers the CIFAR networks
from experiments.flat_minima import flat_minima
from samon.errors import UserError
from samon.evals.sharpness import Measure, batch_sharpness
from tests.runs import ROOT


@pytest.mark.parametrize("bits", flat_minima.BITS)
def test_rounding_to_levels_of_each_channel(bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[5] *= 100  # its scale leaves the other channels alone
        model[1].weight.uniform_()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat_minima.round_weights(model, bits)
    for name, after in model.named_parameters():
        if after.dim() == 1:  # gamma, beta and biases
            assert torch.equal(after, before[name])
            continue
        for channel, old in zip(after.flatten(1), before[name].flatten(1), strict=True):
            step = old.abs().max() / (2 ** (bits - 1) - 1)
            assert len(channel.unique()) <= 2**bits - 1
            assert (channel - old).abs().max() <= step / 2 * (1 + 1e-5)  # float32
            assert channel.abs().max().item() == pytest.approx(old.abs().max().item())


def test_corruptions_by_their_definitions() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32)
    for name, function in flat_minima.CORRUPTIONS.items():
        assert torch.equal(function(x, 4), function(x, 4)), name  # the same for every model
        errors = [(function(x, level).clamp(0, 1) - x).square().mean().item() for level in range(5)]
        assert errors == sorted(errors), name
        assert flat_minima.corrupt((x * 255).byte(), name, 5).dtype == torch.uint8
    h, s, v = colorsys.rgb_to_hsv(*x[0, :, 3, 4].tolist())
    expected = torch.tensor(colorsys.hsv_to_rgb(h, s, min(1, v + 0.3)))
    torch.testing.assert_close(flat_minima.brightness(x, 4)[0, :, 3, 4], expected)
    assert (flat_minima.brightness(torch.zeros(1, 3, 1, 1), 0) == 0.05).all()  # gray, not 0 / 0
    noise = flat_minima.gaussian_noise(x, 2) - x
    assert noise.std().item() == pytest.approx(0.08, rel=0.05)  # 6144 values: 1 % is one standard deviation
    changed = flat_minima.impulse_noise(x, 4) != x
    assert changed.float().mean().item() == pytest.approx(0.07, abs=0.013)  # four standard deviations
    photons = flat_minima.shot_noise(torch.full((1, 1, 200, 200), 0.5), 4) * 50
    assert photons.var().item() == pytest.approx(photons.mean().item(), rel=0.05)


def test_every_figure_of_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SHARPNESS_IMAGES": 32, "M": 16, "RANK_IMAGES": 20}.items():
        monkeypatch.setattr(flat_minima, name, value)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (40, 32, 32, 3), np.uint8), rng.integers(0, 10, 40)
    np.savez(tmp_path / "x.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    settings = {"model": "resnet20_cifar", "num_classes": 10, "dataset": "npz/x", "mean": [0.5] * 3, "std": [0.2] * 3}
    settings["train_split"] = "train[20:]"  # one batch of 16
    for seed, settings["gp"] in enumerate(("max", "avg")):
        run = tmp_path / f"out/test/SAM-ON/seed{seed}"
        run.mkdir(parents=True)
        torch.manual_seed(seed)
        model = timm.create_model("resnet20_cifar")
        torch.save({"state_dict": model.state_dict(), "args": settings}, run / "last.pth.tar")
        (run / "args.yaml").write_text(yaml.safe_dump(settings))
        (run / "result.json").write_text("{}")
    words = [str(tmp_path / "out"), "--data-dir", str(tmp_path), "--images", "30"]
    flat_minima.main(words)
    rows = json.loads((tmp_path / "out/flat_minima.json").read_text())
    pool = flat_minima.Evaluation(tmp_path / "out/test/SAM-ON/seed0", tmp_path, "cpu", 30).model().global_pool
    assert pool.pool_type == "max"
    x = (torch.from_numpy(images[:30]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
    right = (model.eval()(x).argmax(1) == torch.from_numpy(labels[:30])).float().mean().item()
    assert rows[1]["values"]["top1"] == pytest.approx(100 * right)
    x = (torch.from_numpy(images[20:36]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
    expected = batch_sharpness(model, x, torch.from_numpy(labels[20:36]), *Measure.parse(flat_minima.MEASURE))
    assert rows[1]["values"]["worst sharpness"] == pytest.approx(expected, rel=1e-4)  # float32
    assert 1 <= rows[0]["values"]["feature rank"] <= 20
    assert "| SAM-ON | 2 | " in capsys.readouterr().out
    (tmp_path / "x.npz").unlink()
    flat_minima.main(words)  # nothing is measured again
    capsys.readouterr()
    (tmp_path / "out/test/SAM-ON/seed1/fingerprint.txt").write_text("of another run in its place")
    flat_minima.main([*words, "--table"])
    assert "| SAM-ON | 1 | " in capsys.readouterr().out
    flat_minima.main([*words[:3], "--images", "20", "--table"])
    assert "SAM-ON" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no test/METHOD/RUN/last\.pth\.tar"):
        flat_minima.main([str(tmp_path), "--data-dir", str(tmp_path)])
    with pytest.raises(UserError, match="--data-dir is missing"):
        flat_minima.main([str(tmp_path)])


def test_figures_of_the_committed_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = ROOT / "experiments/flat_minima/results.json"
    flat_minima.main([str(results), "--figures", str(tmp_path)])
    assert "| SAM-ON | 3 | 78.10" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*-light.svg"))) == len(list(tmp_path.glob("*-dark.svg"))) == 2
    rounding, corruption = flat_minima.figures(json.loads(results.read_text()))
    assert [series.method for series in rounding.series] == ["SGD", "SAM", "SAM-ON"]
    sgd, clean = rounding.series[0], corruption.series[0]
    assert (sgd.x, clean.x) == ([4, 6, 8], [0, 3, 5])
    assert sgd.y[0] == pytest.approx(77.4 - 75.9333, abs=1e-3)
    assert sgd.y_error[0] == pytest.approx(0.404, abs=1e-3)  # of the differences of each seed
    assert clean.y == pytest.approx([77.4, 58.25, 42.4833], abs=1e-3)
