"""train.py from the command line: outputs, timm's readers on its checkpoints, and the effect of each group of flags."""

import csv
import io
import json
import os
import pty
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.layers import SplitBatchNorm2d
from timm.models import load_checkpoint
from torch import Tensor, nn

from samon.evals.accuracy import accuracy
from samon.trainer import build, config
from samon.trainer import main as train
from samon.trainer import model as model_of
from samon.trainer.build import Hooks
from samon.trainer.model import create_train_model
from tests.graph_memory import Pool
from tests.runs import BASE, WATCH, assert_same, last, last_line, run, weights


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[build.Run]:
    """The Run of each training run of the test."""
    seen: list[build.Run] = []
    monkeypatch.setattr(WATCH, "built", seen.append)
    return seen


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The training batches as the model sees them."""
    seen: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(WATCH, "batch", lambda images, target: seen.append((images, target)))
    return seen


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """(epoch, update, whether it was a two-pass one) of every update."""
    seen: list[tuple[int, int, bool]] = []
    monkeypatch.setattr(WATCH, "updated", lambda _, p, perturbed: seen.append((p.epoch, p.updates, perturbed)))
    return seen


def rows(directory: Path) -> list[dict[str, str]]:
    with open(directory / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_outputs(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samon.trainer.logging.program", lambda: "samon-train")
    args = ["--opt", "samon-layerl2", "--epochs", "2", "--log-interval", "2", "--save-images"]
    metrics, directory = run(tmp_path, *args)
    printed = capfd.readouterr()
    assert last_line(printed.out) == json.loads(json.dumps(metrics)) | {
        k: last_line(printed.out)[k] for k in ("output", "seconds")
    }
    for word in ("tensorboard --logdir", f"samon-validate --checkpoint {directory}"):
        assert word in printed.out
    assert printed.err.count(" are decoded ") == 1
    assert "perturbs 2,080 parameters in 30 tensors" in printed.err
    names = {path.name for path in directory.iterdir()}
    assert {
        "args.yaml",
        "summary.csv",
        "log.txt",
        "tb",
        "last.pth.tar",
        "model_best.pth.tar",
        "checkpoint-0.pth.tar",
        "checkpoint-1.pth.tar",
        "train-batch-0.jpg",
    } <= names
    assert "\r" not in printed.err  # no progress bar without a terminal
    assert "eval_top1" in (directory / "log.txt").read_text()
    table = rows(directory)
    columns = "epoch train_loss train_loss_perturbed eval_loss eval_top1 eval_top5 lr"
    assert list(table[0]) == columns.split()
    assert float(table[1]["eval_top1"]) == metrics["eval_top1"]
    assert float(table[0]["train_loss_perturbed"]) > float(table[0]["train_loss"])
    saved = yaml.safe_load((directory / "args.yaml").read_text())
    assert saved["opt"] == "samon-layerl2"
    assert saved.keys() >= config.FLAGS.keys() - {"config", "print_config", "data"}


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, directory = run(tmp_path, "--opt", "samon", "--log-interval", "2")
    events = EventAccumulator(str(directory / "tb"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        "train/loss",
        "train/loss_perturbed",
        "train/sharpness",
        "train/eps_norm",
        "train/ascent_grad_norm",
        "train/grad_norm",
        "train/lr",
        "train/rho",
        "train/images_per_second",
        "train/data_wait",
        "train/skipped_steps",
        "train/skipped_samples",
        "eval/loss",
        "eval/top1",
        "eval/top5",
        "eval/num_samples",
    }
    assert tags["images"] == ["input"]
    assert sum(tag.startswith("gamma/") for tag in tags["histograms"]) == 15
    assert sum(tag.startswith("beta/") for tag in tags["histograms"]) == 15
    names = ("loss", "loss_perturbed", "sharpness", "eps_norm")
    value = {name: events.Scalars(f"train/{name}")[-1].value for name in names}
    assert value["sharpness"] == pytest.approx(value["loss_perturbed"] - value["loss"], rel=1e-4)
    assert value["eps_norm"] == pytest.approx(0.5, rel=1e-4)  # rho


def test_timm_reads_the_checkpoints(tmp_path: Path, jobs: list[build.Run]) -> None:
    metrics, directory = run(tmp_path, "--opt", "samon", "--model-ema", "--model-ema-decay", "0.5")
    content = last(directory)
    assert {"epoch", "arch", "state_dict", "state_dict_ema", "optimizer", "args", "version", "metric"} <= content.keys()
    path = str(directory / "last.pth.tar")
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1, checkpoint_path=path)
    assert_same(dict(model.state_dict()), content["state_dict_ema"])  # timm takes the average where there is one
    load_checkpoint(model, path, use_ema=False)
    assert_same(dict(model.state_dict()), content["state_dict"])
    load_checkpoint(model, path, use_ema=True)
    found = accuracy(model, jobs[0].eval_loader, device="cpu")
    assert (found["top1"], found["loss"]) == pytest.approx((metrics["eval_top1"], metrics["eval_loss"]))


def test_history_and_best(tmp_path: Path) -> None:
    metrics, directory = run(tmp_path, "--epochs", "5", "--checkpoint-hist", "2", "--opt", "adamw", "--lr", "1e-3")
    table = {int(row["epoch"]): float(row["eval_top1"]) for row in rows(directory)}
    best = max(table, key=lambda epoch: (table[epoch], -epoch))
    assert (metrics["best_epoch"], metrics["best_metric"]) == (best, table[best])
    assert torch.load(directory / "model_best.pth.tar", weights_only=True)["epoch"] == best
    assert last(directory)["epoch"] == 4
    kept = {int(path.name.split("-")[1].split(".")[0]) for path in directory.glob("checkpoint-*")}
    assert len(kept) == 2
    assert best in kept


# --- effects of flags -----------------------------------------------------------------------------------------------


def test_rho_zero_is_the_base_optimizer(tmp_path: Path) -> None:
    _, plain = run(tmp_path, "--opt", "sgd", name="plain")
    _, sharp = run(tmp_path, "--opt", "samon", "--rho", "0", name="sharp")
    assert_same(weights(plain), weights(sharp))


def differs(tmp_path: Path, *args: str, opt: str = "samon") -> None:
    _, one = run(tmp_path, "--opt", opt, name="one")
    _, two = run(tmp_path, "--opt", opt, *args, name="two")
    a, b = weights(one), weights(two)
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "args",
    [["--perturb", "stages|layer"], ["--bn-stats", "second"], ["--m-sharpness", "4"], ["--ascent-fraction", "0.5"]],
    ids=str,
)
def test_samon_flags_change_the_result(args: list[str], tmp_path: Path) -> None:
    differs(tmp_path, *args)


def test_no_replay_changes_nothing(tmp_path: Path) -> None:
    _, one = run(tmp_path, "--opt", "samon", "--perturb", "layer4|stages.3", name="one")
    _, two = run(tmp_path, "--opt", "samon", "--perturb", "layer4|stages.3", "--no-replay", name="two")
    a, b = weights(one), weights(two)
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)


@pytest.mark.parametrize("other", [["--torchcompile", "eager"], ["--grad-checkpointing"]], ids=str)
def test_replay_is_turned_off_where_it_does_not_combine(other: list[str], tmp_path: Path) -> None:
    args = ["--opt", "samon", "--model", "test_vit", "--perturb", "blocks.[4-9]|^norm", "--val-split", ""]
    _, one = run(tmp_path, *args, *other, name="one")
    said = f"replay is off: it keeps activations from module to module, which {other[0]} does not allow"
    assert said in (one / "log.txt").read_text()
    _, two = run(tmp_path, *args, "--no-replay", name="two")
    a, b = weights(one), weights(two)
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)


def test_m_sharpness_in_groups_equals_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scope samon runs all sub-batches at once, any other scope one after the other: the same step on one model."""
    args = ["--opt", "samon", "--m-sharpness", "4", "--model", "test_vit", "--model-dtype", "float32"]
    _, grouped = run(tmp_path, *args, name="grouped")
    monkeypatch.setattr("samon.sam.SAM.can_group", property(lambda self: False))
    _, looped = run(tmp_path, *args, name="looped")
    a, b = weights(grouped), weights(looped)
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in a)


@pytest.mark.parametrize(
    ("args", "two_pass"),
    [
        (["--sam-start-epoch", "1"], [False] * 4 + [True] * 4),
        (["--sam-end-epoch", "1"], [True] * 4 + [False] * 4),
        (["--sam-every", "3"], [True, False, False, True, False, False, True, False]),
    ],
)
def test_when_the_two_pass_step_is_used(
    args: list[str], two_pass: list[bool], tmp_path: Path, updates: list[tuple[int, int, bool]]
) -> None:
    run(tmp_path, "--opt", "samon", "--epochs", "2", *args)
    assert [perturbed for _, _, perturbed in updates] == two_pass


def test_micro_batches_make_a_mean(tmp_path: Path) -> None:
    """With rho 0 each has the plain gradient: 2 x 8 is 1 x 16, and not twice that."""
    args = ["--opt", "samon", "--rho", "0", "--model", "test_vit"]
    _, whole = run(tmp_path, *args, name="whole")
    _, split = run(tmp_path, *args, "-b", "8", "--grad-accum-steps", "2", name="split")
    a, b = weights(whole), weights(split)
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=2e-5) for name in a)


@pytest.mark.parametrize("how", ["device", "global"])
def test_accumulation(how: str, tmp_path: Path, jobs: list[build.Run], updates: list[tuple[int, int, bool]]) -> None:
    """Under `global` the micro-batches share one perturbation, so 2 x 8 is 1 x 16 for a model without BatchNorm."""
    args = ["--opt", "samon", "--model", "test_vit", "--m-sharpness", how]
    _, whole = run(tmp_path, *args, name="whole")
    _, split = run(tmp_path, *args, "-b", "8", "--grad-accum-steps", "2", name="split")
    assert len(updates) == 8
    assert jobs[1].updates_per_epoch == 4
    a, b = weights(whole), weights(split)
    close = all(torch.allclose(a[name], b[name], rtol=1e-3, atol=2e-5) for name in a)
    assert close == (how == "global")


def test_accumulation_of_a_tail(tmp_path: Path) -> None:
    """4 batches in updates of 3: the last update has one, weighted as one."""
    metrics, directory = run(tmp_path, "--opt", "samon", "--grad-accum-steps", "3")
    assert last(directory)["progress"]["updates"] == 2
    assert metrics["skipped_steps"] == 0


LOSSES = [
    (["--smoothing", "0"], "CrossEntropyLoss"),
    ([], "LabelSmoothingCrossEntropy"),
    (["--bce-loss", "--bce-sum", "--bce-pos-weight", "2"], "BinaryCrossEntropy"),
    (["--mixup", "0.2"], "SoftTargetCrossEntropy"),
    (["--cutmix-minmax", "0.2", "0.8", "--bce-loss", "--bce-target-thresh", "0.2"], "BinaryCrossEntropy"),
]


@pytest.mark.parametrize(("args", "name"), LOSSES)
def test_losses(args: list[str], name: str, tmp_path: Path, jobs: list[build.Run], batches: Any) -> None:
    run(tmp_path, "--opt", "samon", *args)
    loss = jobs[0].loss
    assert type(loss).__name__ == name
    assert all((target.ndim == 2) == build.mixing(jobs[0].config) for _, target in batches)
    if name == "BinaryCrossEntropy":
        assert loss.sum_classes == ("--bce-sum" in args)


def test_jsd_over_augmentation_splits(tmp_path: Path, jobs: list[build.Run], batches: Any) -> None:
    args = ["--aug-splits", "2", "--jsd-loss", "--aa", "rand-m5-inc1", "--split-bn", "--resplit", "--reprob", "0.5"]
    run(tmp_path, "--opt", "samon", *args)
    assert type(jobs[0].loss).__name__ == "JsdCrossEntropy"
    assert all(images.shape[0] == 32 for images, _ in batches)
    assert any(isinstance(module, SplitBatchNorm2d) for module in jobs[0].model.modules())


def test_mixup_goes_off(tmp_path: Path, batches: Any) -> None:
    for prefetcher in ([], ["--no-prefetcher"]):
        batches.clear()
        run(tmp_path, "--epochs", "2", "--mixup", "1", "--smoothing", "0", "--mixup-off-epoch", "1", *prefetcher)
        hard = [bool(((target == 0) | (target == 1)).all()) for _, target in batches]
        assert hard == [False] * 4 + [True] * 4


def test_schedules_and_rates(tmp_path: Path, jobs: list[build.Run]) -> None:
    args = ["--epochs", "3", "--opt", "sgd"]
    for extra, expected in {
        ("--sched", "none"): [0.05, 0.05, 0.05],
        ("--sched", "step", "--decay-epochs", "1", "--decay-rate", "0.5"): [0.05, 0.025, 0.0125],
        ("--sched", "multistep", "--decay-milestones", "2"): [0.05, 0.005, 0.005],  # timm counts from 1
        ("--sched", "constant", "--warmup-epochs", "2", "--warmup-lr", "0.01"): [0.01, 0.03, 0.05],
        ("--sched", "poly", "--decay-rate", "1", "--min-lr", "0.02"): [0.05, 0.04, 0.03],
    }.items():
        _, directory = run(tmp_path, *args, *extra)
        assert [float(row["lr"]) for row in rows(directory)] == pytest.approx(expected), extra
    _, directory = run(tmp_path, *args, "--cooldown-epochs", "1", "--min-lr", "0.001")
    assert len(rows(directory)) == 4
    _, directory = run(tmp_path, *args, "--warmup-epochs", "2", "--warmup-prefix")
    assert len(rows(directory)) == 5


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--opt", "sgd"], 0.1 * 16 / 256),
        (["--opt", "samon-adamw"], 0.1 * (16 / 256) ** 0.5),
        (["--opt", "samon", "--base-opt", "lamb"], 0.1 * (16 / 256) ** 0.5),
        (["--opt", "sgd", "--lr-base-scale", "sqrt", "--lr-base-size", "64"], 0.1 * 0.5),
        (["--opt", "sgd", "--grad-accum-steps", "4"], 0.1 * 64 / 256),
    ],
)
def test_learning_rate_from_the_batch(args: list[str], expected: float) -> None:
    c = config.parse(["-b", "16", *args])
    assert build.learning_rate(c, world_size=1) == pytest.approx(expected)


def test_optimizer_flags(tmp_path: Path, jobs: list[build.Run]) -> None:
    run(
        tmp_path,
        "--opt",
        "samon-adamw",
        "--lr",
        "1e-3",
        "--opt-eps",
        "1e-5",
        "--opt-betas",
        "0.8",
        "0.9",
        "--weight-decay",
        "0.3",
        "--layer-decay",
        "0.5",
        "--rho",
        "0.7",
        "--eta",
        "0.2",
        "--opt-kwargs",
        "amsgrad=True",
        "--model",
        "test_vit",
    )
    optimizer = jobs[0].optimizer
    groups = optimizer.param_groups
    assert {(group["eps"], tuple(group["betas"]), group["amsgrad"]) for group in groups} == {(1e-5, (0.8, 0.9), True)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert len({group["lr_scale"] for group in groups}) > 2
    assert (jobs[0].sam.rho, jobs[0].sam.eta) == (0.7, 0.2)


@pytest.mark.parametrize(("mode", "value"), [("norm", "0.01"), ("value", "0.001"), ("agc", "0.01")])
def test_clipping(mode: str, value: str, tmp_path: Path) -> None:
    found: list[Tensor] = []

    def updated(job: build.Run, *_: Any) -> None:
        grads = {name: p.grad for name, p in job.model.named_parameters() if p.grad is not None}
        if mode == "norm":
            found.append(torch.nn.utils.get_total_norm(list(grads.values())) <= 0.0101)
        elif mode == "value":
            found.append(torch.stack([g.abs().max() for g in grads.values()]).max() <= 0.00101)
        else:
            found.append(torch.stack([g.norm() for n, g in grads.items() if "fc" not in n]).max() < 0.2)
            found.append(grads["fc.weight"].norm() > 1)  # timm leaves the head out

    run(tmp_path, "--opt", "samon", "--clip-grad", value, "--clip-mode", mode, hooks=build.Hooks(updated=updated))
    assert torch.stack(found).all()


MODEL_FLAGS = [
    (["--drop", "0.3"], lambda m: m.drop_rate == 0.3),
    (["--drop-path", "0.2"], lambda m: any(getattr(x, "drop_prob", 0) > 0 for x in m.modules())),
    (["--drop-connect", "0.2"], lambda m: any(getattr(x, "drop_prob", 0) > 0 for x in m.modules())),
    (["--gp", "max"], lambda m: m.global_pool.pool_type == "max"),
    (["--model-kwargs", "stem_width=12"], lambda m: m.conv1[3].weight.shape[0] == 12),
    (
        ["--model", "test_efficientnet", "--bn-momentum", "0.3", "--bn-eps", "0.01"],
        lambda m: {(x.momentum, x.eps) for x in m.modules() if isinstance(x, nn.BatchNorm2d)} == {(0.3, 0.01)},
    ),
    (["--grad-checkpointing"], lambda m: m.grad_checkpointing),
    (["--channels-last"], lambda m: m.conv1[3].weight.is_contiguous(memory_format=torch.channels_last)),
    (["--model-dtype", "bfloat16"], lambda m: next(m.parameters()).dtype == torch.bfloat16),
    (["--num-classes", "12"], lambda m: m.get_classifier().out_features == 12),
]


@pytest.mark.parametrize(("args", "holds"), MODEL_FLAGS, ids=[" ".join(args) for args, _ in MODEL_FLAGS])
def test_model_flags(args: list[str], holds: Any, tmp_path: Path, jobs: list[build.Run]) -> None:
    model = [] if "--model" in args else ["--model", "resnet10t", "--img-size", "28"]
    run(tmp_path, "--opt", "samon", *model, *args)
    assert holds(jobs[0].model)


def test_head_initialization() -> None:
    heads = []
    for args in ([], ["--head-init-scale", "0.5", "--head-init-bias", "-3"]):
        torch.manual_seed(0)
        model: Any = create_train_model(config.parse(["--model", "test_vit", "--num-classes", "10", *args]))
        heads.append(model.get_classifier())
    assert torch.equal(heads[0].weight * 0.5, heads[1].weight)
    assert (heads[1].bias == -3).all()


def test_initial_and_pretrained_weights(tmp_path: Path, jobs: list[build.Run]) -> None:
    _, directory = run(tmp_path, "--opt", "sgd")
    torch.save(last(directory)["state_dict"], tmp_path / "plain.pth")
    for args in (
        ["--initial-checkpoint", str(directory / "last.pth.tar")],
        ["--pretrained", "--pretrained-path", str(tmp_path / "plain.pth")],
    ):
        _, again = run(tmp_path, "--opt", "sgd", "--lr", "1e-12", *args, name="again")
        a, b = weights(directory), weights(again)
        assert torch.allclose(
            a["conv1.0.weight"] if "conv1.0.weight" in a else a["stem.0.weight"],
            b["conv1.0.weight"] if "conv1.0.weight" in b else b["stem.0.weight"],
        )


def test_fast_norm(tmp_path: Path) -> None:
    from timm.layers import is_fast_norm

    run(tmp_path, "--opt", "samon", "--model", "test_vit", "--fast-norm")
    assert is_fast_norm()
    run(tmp_path, "--opt", "samon", "--model", "test_vit")
    assert not is_fast_norm()


AUGMENTATION = [
    (["--no-aug"], ["--no-aug", "--seed", "7"], True),  # nothing random is left but the order
    (["--hflip", "0"], ["--hflip", "1"], False),
    (["--vflip", "0"], ["--vflip", "1"], False),
    (["--aa", "rand-m9"], [], False),
    (["--scale", "0.9", "1"], [], False),
    (["--ratio", "0.5", "2"], [], False),
    (["--reprob", "1", "--remode", "const", "--recount", "2"], [], False),
    (["--train-interpolation", "bicubic"], [], False),
    (["--train-crop-mode", "rkrc"], [], False),
    (["--gaussian-blur-prob", "1"], [], False),
    (["--mean", "0.1"], [], False),
    (["--std", "0.1"], [], False),
]


@pytest.mark.parametrize(("one", "two", "same"), AUGMENTATION, ids=[" ".join(case[0]) for case in AUGMENTATION])
def test_augmentation_flags(one: list[str], two: list[str], same: bool, tmp_path: Path, batches: Any) -> None:
    """They change the images, not their order."""
    for args in (one, two):
        run(tmp_path, "--opt", "sgd", "--val-split", "", *args)
    first, second = batches[:4], batches[4:]
    if same:
        pixels = [torch.cat([images for images, _ in part]).flatten(1).sum(1).sort()[0] for part in (first, second)]
        assert not torch.equal(pixels[0], pixels[1])  # another order takes other 64 of 5,000 samples
    else:
        assert all(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
        assert not torch.equal(first[0][0], second[0][0])


def test_input_flags(tmp_path: Path, jobs: list[build.Run], batches: Any) -> None:
    for args, shape in {
        ("--in-chans", "3", "--mean", "0.3"): (16, 3, 32, 32),
        ("--img-size", "48"): (16, 1, 48, 48),
    }.items():
        batches.clear()
        run(tmp_path, "--opt", "samon", *args)
        assert batches[0][0].shape == shape
    assert len(jobs) == 2


def test_no_prefetcher_gives_the_same_images(tmp_path: Path, batches: Any) -> None:
    run(tmp_path, "--opt", "sgd")
    run(tmp_path, "--opt", "sgd", "--no-prefetcher")
    for (a, x), (b, y) in zip(batches[:4], batches[4:], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert torch.equal(x, y)


def test_no_validation(tmp_path: Path) -> None:
    metrics, directory = run(tmp_path, "--opt", "samon", "--val-split", "", "--epochs", "2")
    assert "eval_top1" not in metrics
    assert metrics["best_metric"] == pytest.approx(min(float(row["train_loss"]) for row in rows(directory)))


def test_validation_interval(tmp_path: Path) -> None:
    _, directory = run(tmp_path, "--opt", "samon", "--epochs", "5", "--val-interval", "2")
    assert [row["epoch"] for row in rows(directory)] == ["1", "3", "4"]
    assert {path.name for path in directory.glob("checkpoint-*")} == {f"checkpoint-{n}.pth.tar" for n in (1, 3, 4)}


@pytest.mark.parametrize("metric", ["top5", "loss"])
def test_eval_metric(metric: str, tmp_path: Path) -> None:
    metrics, directory = run(tmp_path, "--opt", "sgd", "--epochs", "3", "--eval-metric", metric)
    values = [float(row[f"eval_{metric}"]) for row in rows(directory)]
    assert metrics["best_metric"] == pytest.approx(min(values) if metric == "loss" else max(values))


def test_average_on_the_cpu_is_not_validated(tmp_path: Path) -> None:
    metrics, directory = run(tmp_path, "--opt", "sgd", "--model-ema", "--model-ema-force-cpu", "--model-ema-decay", "1")
    average = last(directory)["state_dict_ema"]
    assert any(not torch.equal(value, average[name]) for name, value in last(directory)["state_dict"].items())
    plain, _ = run(tmp_path, "--opt", "sgd", name="plain")
    assert metrics["eval_loss"] == plain["eval_loss"]


@pytest.mark.parametrize("m", ["device", "4"])
def test_compiled(m: str, tmp_path: Path) -> None:
    args = ["--opt", "samon", "--model", "test_vit", "--m-sharpness", m, "--val-split", ""]
    _, eager = run(tmp_path, *args, name="eager")
    _, compiled = run(tmp_path, *args, "--torchcompile", "eager")
    a, b = weights(eager), weights(compiled)
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)


@pytest.mark.parametrize("opt", ["sgd", "samon"])
def test_micro_batches_on_captured_graphs(opt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients must not be summed in memory that the next backward overwrites."""
    args = ["--opt", opt, "--model", "test_vit", "--grad-accum-steps", "2", "--val-split", ""]
    _, eager = run(tmp_path, *args, name="eager")
    pool = Pool()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", pool.begin)
    monkeypatch.setattr(
        "samon.trainer.model.compile_model", lambda config, model: torch.compile(model, backend=pool.backend)
    )
    how = ["--torchcompile", "eager", "--torchcompile-mode", "max-autotune"]
    _, captured = run(tmp_path, *args, *how, name="captured")
    assert pool.tensors
    a, b = weights(eager), weights(captured)
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)


def test_device_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "backend_of_a_test.py").write_text("import torch\ntorch.imported_by_a_test = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch, "imported_by_a_test", False, raising=False)
    run(tmp_path, "--device-modules", "backend_of_a_test")
    assert torch.imported_by_a_test


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in timm: the run's settings once, then each epoch's row."""
    calls: list[Any] = []

    class Session:
        log, finish = calls.append, lambda: calls.append("finish")

    fake = types.SimpleNamespace(init=lambda **kwargs: (calls.append(kwargs), Session)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tmp_path, "--log-wandb", "--wandb-project", "p", "--wandb-tags", "a", "b")
    settings, row, end = calls
    assert (settings["project"], settings["name"], settings["tags"]) == ("p", "run", ["a", "b"])
    assert settings["config"]["model"] == "test_resnet"
    assert list(row)[:2] == ["epoch", "train_loss"]
    assert end == "finish"


@pytest.mark.parametrize("native", [True, False])
def test_precision_that_the_device_has(
    native: bool, tmp_path: Path, jobs: list[build.Run], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """--amp-dtype auto: told in the log, and args.yaml says what ran; the loss is float32 either way."""
    monkeypatch.setattr(model_of, "has_native_bfloat16", lambda device: native)
    seen: list[torch.dtype] = []

    def built(job: build.Run) -> None:
        jobs.append(job)
        job.model.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
        job.loss.register_forward_hook(lambda _, args, out: seen.append(out.dtype))

    _, directory = run(tmp_path, "--amp", "--amp-dtype", "auto", "--opt", "samon", hooks=Hooks(built=built))
    assert set(seen[::2]) == {torch.bfloat16 if native else torch.float32}
    assert set(seen[1:4:2]) == {torch.float32}
    assert f"--amp-dtype auto: {'bfloat16' if native else 'float32'} on this cpu" in capfd.readouterr().err
    settings = yaml.safe_load((directory / "args.yaml").read_text())
    assert (settings["amp"], settings["amp_dtype"]) == (native, "bfloat16")
    assert jobs[0].scaler is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bar for the whole run; log.txt has every line all the same."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run(tmp_path, "--opt", "samon", "--log-interval", "1", "--epochs", "2")
    shown = terminal.getvalue()
    for part in ("epoch 0: ", "epoch 1: ", "8/8", "at w+eps", "img/s data", "validation 1: "):
        assert part in shown, part
    assert "Train 0 [" not in shown  # no plain lines beside it
    assert "Epoch 1 train_loss" in shown  # but an epoch's row is told
    text = (tmp_path / "run/log.txt").read_text()
    assert len(re.findall(r"Train [01] \[[1-4]/4\] loss .* img/s data \d+% eta \d\d:\d\d\n", text)) == 8


def test_a_terminal_without_rows_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pty.openpty()  # 0 x 0 unless somebody sets its size
    with open(follower, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        assert sys.stderr.isatty()
        run(tmp_path, "--log-interval", "1", "--epochs", "1")
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert shown.count("Train 0 [") == 4
    assert "%|" not in shown


def test_wandb_missing_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--log-wandb")
    assert "wandb is not installed" in capfd.readouterr().err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder: 2 classes, 16 + 8 images a split."""
    root = tmp_path / "images"
    torch.manual_seed(0)
    for split, count in (("train", 16), ("validation", 8)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(root / split / label / f"{index}.png")
    return root


FOLDER = ["--dataset", "", "--num-classes", "2", "--in-chans", "3", "--mean", "0.5", "--std", "0.2", "-b", "8"]


@pytest.mark.parametrize("schedule", ["constant", "progressive"])
def test_several_image_sizes(schedule: str, folder: Path, tmp_path: Path, batches: Any) -> None:
    args = ["--data-dir", str(folder), *FOLDER, "--val-num-samples", "16", "--epochs", "3", "--opt", "samon"]
    sizes = ["--train-img-sizes", "16", "32", "--train-size-schedule", schedule, "--train-batches-per-epoch", "6"]
    run(tmp_path, *args, *sizes, "--train-size-schedule-spread", "0", "--train-size-random-mix", "0")
    seen = [images.shape[-1] for images, _ in batches]
    assert len(seen) == 18
    assert set(seen) == {16, 32}
    if schedule == "progressive":
        assert seen[:6] == [16] * 6
        assert seen[-6:] == [32] * 6
    batches.clear()
    run(tmp_path, *args, *sizes, "--train-size-probs", "0", "1")
    assert {images.shape[-1] for images, _ in batches} == {32} if schedule == "constant" else {16, 32}


def test_folder_class_map_and_repeats(folder: Path, tmp_path: Path, batches: Any) -> None:
    (tmp_path / "map.txt").write_text("dog\ncat\n")
    args = ["--data-dir", str(folder), *FOLDER, "--val-num-samples", "16", "--train-num-samples", "32", "--opt", "sgd"]
    run(tmp_path, *args, "--no-aug")
    plain = list(batches)
    batches.clear()
    run(tmp_path, *args, "--no-aug", "--class-map", str(tmp_path / "map.txt"))
    assert all(torch.equal(1 - x, y) for (_, x), (_, y) in zip(plain, batches, strict=True))
    batches.clear()
    without = [item for item in args if item not in ("--train-num-samples", "32")]
    base = [item for item in BASE if item not in ("--train-num-samples", "64")]
    train.main([*base, *without, "--epoch-repeats", "2", "--output", str(tmp_path), "--experiment", "repeats"], WATCH)
    assert len(batches) == 8
