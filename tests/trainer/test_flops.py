"""FLOPs of a step relative to a plain one, which run.json records."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from samon.engines.replay import Replay
from samon.plan import main as planning
from samon.report.read import read_sources
from samon.trainer import loop
from samon.trainer.flops import FORMULAS, count_flops, step_flops
from tests.runs import built, run

NET = ["-b", "8"]  # 8 updates per epoch


def ratio(*flags: str) -> float | None:
    flops = step_flops(built(*NET, "--opt", "samon-momentum", *flags))
    return flops and flops["step"] / flops["plain"]


def test_flops_of_every_kind_of_step() -> None:
    full = ratio()
    assert full is not None
    assert 1.6 < full < 1.7
    assert ratio("--opt", "sgd") == ratio("--ascent", "previous") == 1
    assert ratio("--opt", "sam") == pytest.approx(2, abs=0.02)
    assert ratio("--m-sharpness", "2") == pytest.approx(full, abs=0.02)
    assert ratio("--ascent-fraction", "0.5") == pytest.approx(1 + (full - 1) / 2, abs=0.01)
    assert ratio("--ascent", "aesam") is ratio("--train-img-sizes", "16", "32") is None  # decided during training
    assert ratio("--opt-kwargs", "fused=True") == full
    muon, tail = ratio("--opt", "samon-muon"), ratio("--sam-tail", "0.25", "--tail-opt", "muon")
    assert muon is not None  # the plain step multiplies matrices as well
    assert tail is not None
    assert muon < full < 1 + (tail - 1) / 0.25


def test_one_of_several_processes_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ([], ["--m-sharpness", "global"], ["--gsam-alpha", "0.1"])
    runs = [built(*NET, "--opt", "samon-momentum", *more) for more in flags]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # a message would fail
    first, *others = map(step_flops, runs)
    assert others == [first, first]
    assert first is not None


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 24, 3, groups=8), nn.ConvTranspose2d(8, 24, 3, stride=2, groups=4)])
def test_each_gradient_of_a_grouped_convolution_costs_as_much_as_its_forward_pass(layer: nn.Module) -> None:
    layer, x = layer.to("meta"), torch.empty(2, 8, 10, 10, device="meta", requires_grad=True)
    forward = count_flops(lambda: layer(x))
    assert forward > 0
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * forward
    layer.requires_grad_(False)
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * forward


def test_a_frozen_network_saves_its_backward_pass() -> None:
    """2 of 3 parts of the step; the perturbed normalization layers need both passes and the gradients in between."""
    head = ["--freeze", "^(?!fc)", "--opt", "sgd"]
    all_layers, frozen = (step_flops(built(*NET, *flags)) for flags in (["--opt", "sgd"], head))
    assert all_layers is not None
    assert frozen is not None
    assert frozen["step"] / all_layers["step"] == pytest.approx(1 / 3, abs=0.02)
    assert ratio(*head, "--opt", "samon", "--perturb-frozen") == pytest.approx(3, abs=0.05)


def test_images_have_the_models_size_if_none_is_given() -> None:
    made = built("--model", "resnet20_cifar", "--opt", "sgd")
    assert step_flops(replace(made, config=made.config.but(img_size=None))) == step_flops(made)


def test_sharded_parameters_have_a_full_ascent_pass() -> None:
    """FSDP computes and averages the gradients of all parameters, also if few are perturbed."""
    made = built("--opt", "sam", "--perturb", "layer4", "--no-replay")
    whole, sharded = step_flops(made), step_flops(replace(made, config=made.config.but(fsdp=True)))
    assert whole is not None
    assert sharded is not None
    assert whole["step"] < 1.9 * whole["plain"]
    assert sharded["step"] == 2 * sharded["plain"]


def count_run(counted: dict[str, int], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the FLOPs of every update from now on to `counted[key]`."""

    def count(name: str) -> Any:
        function = getattr(loop, name)

        def counting(*args: Any) -> Any:
            with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
                result = function(*args)
            counted[key] = counted.get(key, 0) + counter.get_total_flops()
            return result

        return counting

    for name in ("compute_gradient", "apply_gradient"):
        monkeypatch.setattr(loop, name, count(name))


LATE = "--opt samon --perturb layer4"  # replayed, after the update that records the order of modules
RUNS = [
    "--opt sgd",
    f"{LATE} --bn-stats both",
    f"{LATE} --norm-dropout 0.1",
    f"{LATE} --norm-dropout 0.1 --same-noise",
    # the epoch's last update has one micro-batch
    f"{LATE} --m-sharpness global --grad-accum-steps 3 --train-num-samples 64",
    f"{LATE} --grad-accum-steps 2 --epochs 2 --sam-every 2",
    "--opt sam --esam-beta 0.5",
    "--opt sam --m-sharpness 4",
    "--opt samon --grad-checkpointing",
    "--opt samon --aa rand-m5-inc1 --aug-splits 2 --jsd-loss",
    "--opt samon --epochs 2 --cooldown-epochs 1 --sam-start-epoch 1",
    "--opt samon --epochs 3 --stop-epoch 2 --sam-tail 0.5",
    "--opt samon --epochs 3 --sam-every 3 --resume auto after --start-epoch 1 --stop-epoch 2",
    "--opt samon --epochs 2 --sam-every 2 --ascent looksam:3",
    "--opt samon --ascent-size 24",
    "--opt samon-layerl2 --epochs 2 --sam-tail 0.3 --tail-opt muon --grad-accum-steps 2 -b 8",
]


@pytest.mark.parametrize("args", RUNS)
def test_the_figure_is_that_of_the_whole_run(args: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, int] = {}
    count_run(counted, "run", monkeypatch)
    monkeypatch.setattr(Replay, "verify", lambda *_: None)  # not counted
    args, _, first = args.partition(" after ")  # flags of an earlier start
    settings = ["--val-split", "", "--train-num-samples", "48", *args.split()]
    if first:
        run(tmp_path, *settings, *first.split())
    _, directory = run(tmp_path, *settings, flops=True)
    record = json.loads((directory / "run.json").read_text())
    assert record["micro_batches"] * record["step_flops"]["step"] == pytest.approx(counted["run"], rel=1e-12)
    (read,) = read_sources([directory]).runs
    assert read.cost["flops"] == pytest.approx(counted["run"], rel=1e-12)


def test_log_and_plan_have_the_figure_of_a_tail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0.3 of 8 updates are 2."""
    own = ["--in-chans", "3", "--val-split", "", "--epochs", "2"]
    _, directory = run(tmp_path, *own, "--opt", "samon-momentum", "--sam-tail", "0.3", flops=True)
    flops = json.loads((directory / "run.json").read_text())["step_flops"]
    assert flops["plain"] == step_flops(built(*own, "--opt", "sgd"))["step"]
    tail = f"{flops['step'] / flops['plain']:.2f}"
    assert f"two passes in the last 30 % of updates: {tail}x the FLOPs" in (directory / "log.txt").read_text()
    words = ["--model", "test_resnet", "--num-classes", "10", "--img-size", "32", "-b", "16", "--sam-tail", "0.25"]
    capsys.readouterr()
    planning.main([*words, "--opt", "samon-momentum"])
    assert f"| FLOPs of a training, tail 0.25 | 1.00 | 1.25 | {tail} |" in capsys.readouterr().out
