import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from samon.errors import UserError
from samon.evals import norm_params
from tests.eval_sets import make_context


def resnet():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.1)
    return model


def test_results_are_the_statistics_of_every_layer_in_order_of_depth():
    model = resnet()
    rows = norm_params.evaluate(make_context(model))
    names = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert [(row["layer"], row["depth"]) for row in rows if row["metric"] == "beta_mean"] == [
        *(("all", 0), *zip(names, range(1, 99), strict=False))
    ]
    everything = torch.cat([m.weight.detach() for m in model.modules() if isinstance(m, nn.BatchNorm2d)])

    def value(metric, layer="all"):
        (row,) = [row for row in rows if row["metric"] == metric and row["layer"] == layer]
        return row["value"]

    assert value("gamma_mean") == pytest.approx(everything.mean().item(), rel=1e-5)
    assert value("gamma_abs_max") == everything.abs().max().item()
    assert value("gamma_median") == pytest.approx(everything.median().item(), abs=1e-3)
    assert value("beta_std") == 0
    assert value("gamma_std", "bn1") == pytest.approx(model.bn1.weight.detach().std(correction=0).item(), rel=1e-5)
    assert {row["num_samples"] for row in rows if row["layer"] == "all"} == {everything.numel()}


def test_a_model_without_normalization_is_refused():
    with pytest.raises(UserError, match="no affine normalization layer"):
        norm_params.norm_values(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2, elementwise_affine=False)))


def test_figure_and_histograms_of_two_models(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4)
    with torch.no_grad():
        for module in vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.bias.copy_(torch.linspace(-0.3, 0.1, len(module.bias)))
    models = {"a/resnet": norm_params.norm_values(resnet()), "vit": norm_params.norm_values(vit)}
    norm_params.write_tensorboard(models, tmp_path / "tb")
    assert len(list((tmp_path / "tb").glob("*/events*"))) == 2
    events = EventAccumulator(str(tmp_path / "tb/vit"), size_guidance={"histograms": 0}).Reload()
    layers = models["vit"]["LayerNorm", "beta"]
    written = events.Histograms("norm_params/LayerNorm_beta")
    assert [entry.step for entry in written] == list(range(len(layers)))
    for entry, (_, w) in zip(written, layers, strict=True):
        values = entry.histogram_value
        assert (values.min, values.max, values.num) == pytest.approx((float(w.min()), float(w.max()), w.numel()))
        assert values.sum == pytest.approx(float(w.double().sum()), rel=1e-5)  # signed
    norm_params.plot(models, tmp_path / "norm.png")
    for name, start in (("norm.png", b"\x89PNG"), ("norm-magnitudes.png", b"\x89PNG"), ("norm.pdf", b"%PDF")):
        assert (tmp_path / name).read_bytes().startswith(start)


def test_figure_5_has_signed_values_on_linear_axes_and_a_panel_per_model():
    centers = {"SAM": -0.2, "SAM-ON": 0.3}
    values = {name: torch.linspace(-0.1, 0.1, 40) + center for name, center in centers.items()}
    groups = {name: {("N", "gamma"): [("n", torch.ones(40))], ("N", "beta"): [("n", v)]} for name, v in values.items()}
    panels = norm_params.draw_signed(groups).axes
    assert [axis.get_title() for axis in panels] == ["SAM", "SAM-ON"] * 2
    assert [axis.get_xlabel() for axis in panels] == ["$\\gamma$"] * 2 + ["$\\beta$"] * 2
    assert {axis.get_yscale() for axis in panels} | {axis.get_xscale() for axis in panels} == {"linear"}
    for axis, center in zip(panels[2:], centers.values(), strict=True):
        (stairs,) = axis.patches
        counts, edges, _ = stairs.get_data()
        assert counts.sum() == 40
        assert len(counts) == 60
        middle = edges[:-1] + (edges[1] - edges[0]) / 2
        assert (counts * middle).sum() / 40 == pytest.approx(center, abs=0.006)  # a bin is 0.012 wide
    assert panels[2].get_xlim() == panels[3].get_xlim()
