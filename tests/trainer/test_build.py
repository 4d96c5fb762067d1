"""What each flag builds: model, loss, optimizer, schedule, average. Nothing is trained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.layers import SplitBatchNorm2d, is_fast_norm
from timm.scheduler import create_scheduler_v2
from torch import nn

from samon.errors import UserError
from samon.trainer import build, config
from samon.trainer import model as models
from samon.trainer.resume import fast_forward_scheduler
from samon.trainer.state import Progress
from tests.runs import BASE, CPU, built

RESNET, TWO_PASS = "--model resnet10t", "--opt samon --epochs 2"


def batch_norms(model: nn.Module) -> set[tuple[float | None, float]]:
    return {(m.momentum, m.eps) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}


def drops_paths(run: build.Run) -> bool:
    return any(getattr(module, "drop_prob", 0) > 0 for module in run.model.modules())


FLAGS: dict[str, Callable[[build.Run], bool]] = {
    f"{RESNET} --drop 0.3": lambda run: run.model.drop_rate == 0.3,
    f"{RESNET} --drop-path 0.2": drops_paths,
    f"{RESNET} --drop-connect 0.2": drops_paths,
    f"{RESNET} --gp max": lambda run: run.model.global_pool.pool_type == "max",
    f"{RESNET} --model-kwargs stem_width=12": lambda run: run.model.conv1[3].weight.shape[0] == 12,
    f"{RESNET} --grad-checkpointing": lambda run: run.model.grad_checkpointing,
    f"{RESNET} --channels-last": lambda run: run.model.conv1[3].weight.stride()[1] == 1,
    f"{RESNET} --model-dtype bfloat16": lambda run: next(run.model.parameters()).dtype == torch.bfloat16,
    f"{RESNET} --num-classes 12": lambda run: run.model.get_classifier().out_features == 12,
    f"{RESNET} --aug-splits 2 --split-bn --resplit --reprob 0.5": lambda run: any(
        isinstance(module, SplitBatchNorm2d) for module in run.model.modules()
    ),
    "--model test_efficientnet --bn-momentum 0.3 --bn-eps 0.01": lambda run: batch_norms(run.model) == {(0.3, 0.01)},
    "--model test_vit --img-size 64": lambda run: run.model.pos_embed.shape[1] == 1 + (64 // 16) ** 2,
    "--model test_vit --img-size 64 --model-kwargs img_size=32 dynamic_img_size=True": lambda run: (
        run.model.pos_embed.shape[1] == 1 + (32 // 16) ** 2
    ),
    "--fast-norm": lambda run: is_fast_norm(),
    "": lambda run: not is_fast_norm(),
    "--opt samon-muon": lambda run: type(run.sam.base).__name__ == "Muon",
    "--opt samon-eleml2orig": lambda run: (run.config.rho, run.config.eta, run.sam.eta) == (0.5, 0.01, 0.01),
    "--cooldown-epochs 1 --epochs 3": lambda run: run.epochs == 4,
    "--warmup-epochs 2 --warmup-prefix --epochs 3": lambda run: run.epochs == 5,
    "--sched multistep --decay-milestones 9 3": lambda run: run.scheduler.decay_t == [3, 9],
    f"{TWO_PASS} --sam-tail 0.5": lambda run: (run.tail.start, run.tail.total_updates) == (4, 8),
    f"{TWO_PASS} --rho-sched linear --rho-warmup 4 --rho-min 0.01": lambda run: run.rho_schedule.at(2, 0) == 0.255,
    f"{TWO_PASS} --rho-sched linear --rho-warmup 4 --sam-start-epoch 1 --sam-every 3": lambda run: (
        run.rho_schedule.at(6, 0) == 0
    ),
    f"{TWO_PASS} --rho-sched lr": lambda run: run.rho_schedule.at(0, run.config.lr) == 0.5,
    f"{TWO_PASS} --radius 0.25": lambda run: run.sam.radius == 0.25,
    "--freeze ^conv1 --train-only-norm": lambda run: not any(p.requires_grad for p in run.model.conv1.parameters()),
    f"{TWO_PASS} --freeze ^(?!head|fc) --perturb-frozen": lambda run: len(run.sam.perturbed_parameters()) == 30,
}


@pytest.mark.parametrize("args", FLAGS)
def test_flags(args: str) -> None:
    assert FLAGS[args](built(*args.split()))


def test_head_initialization() -> None:
    heads = []
    for args in ([], ["--head-init-scale", "0.5", "--head-init-bias", "-3"]):
        torch.manual_seed(0)
        heads.append(built("--model", "test_vit", *args).model.get_classifier())
    assert torch.equal(heads[0].weight * 0.5, heads[1].weight)
    assert (heads[1].bias == -3).all()
    with pytest.raises(UserError, match="the classifier of levit_128s has no bias"):
        built("--model", "levit_128s", "--head-init-bias", "-3")


def test_initial_and_pretrained_weights(tmp_path: Path) -> None:
    stem = (first := built().model).conv1[0].weight
    torch.save(first.state_dict(), path := str(tmp_path / "plain.pth"))
    assert not torch.equal(stem, built().model.conv1[0].weight)
    for args in (["--initial-checkpoint", path], ["--pretrained", "--pretrained-path", path]):
        assert torch.equal(stem, built(*args).model.conv1[0].weight)


@pytest.mark.parametrize("native", [True, False])
def test_automatic_precision(native: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """--amp-dtype auto is bfloat16 where the device has it; the log and args.yaml say what runs. Losses are float32."""
    caplog.set_level("INFO")
    monkeypatch.setattr(models, "has_native_bfloat16", lambda device: native)
    run = built("--amp", "--amp-dtype", "auto")
    assert f"--amp-dtype auto: {'bfloat16' if native else 'float32'} on this cpu" in caplog.text
    assert (run.config.amp, run.config.amp_dtype, run.scaler) == (native, "bfloat16", None)
    with run.autocast():
        result = run.task(torch.randn(2, 1, 32, 32), torch.tensor([0, 1]))
    assert result["output"].dtype == (torch.bfloat16 if native else torch.float32)
    assert result["loss"].dtype == torch.float32


def test_native_bfloat16_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": True}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert models.has_native_bfloat16(torch.device("cpu"))
    assert not models.has_native_bfloat16(torch.device("cuda"))  # it could only emulate
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert not models.has_native_bfloat16(torch.device("cpu"))


def test_synchronized_batch_norm_needs_gpus() -> None:
    with pytest.raises(UserError, match="--sync-bn: PyTorch's SyncBatchNorm runs on GPUs only"):
        build.lay_out(config.parse([*BASE, "--sync-bn"]), nn.Linear(1, 1), replace(CPU, size=2))


def test_a_model_that_returns_more_than_logits() -> None:
    """What inception_v3 does in training with --model-kwargs aux_logits=True."""
    run = built()
    run.task.trainable_module = type("Auxiliary", (nn.Module,), {"forward": lambda self, x: (x, x)})()
    with pytest.raises(UserError, match="--model returns a tuple in training, not logits alone"):
        run.task(torch.zeros(2, 1, 32, 32), torch.zeros(2, dtype=torch.long))


# --- loss -------------------------------------------------------------------------------------------------------------
LOSSES = {
    "--smoothing 0": "CrossEntropyLoss",
    "": "LabelSmoothingCrossEntropy",
    "--bce-loss --bce-sum --bce-pos-weight 2": "BinaryCrossEntropy",
    "--mixup 0.2": "SoftTargetCrossEntropy",
    "--cutmix-minmax 0.2 0.8 --bce-loss --bce-target-thresh 0.2": "BinaryCrossEntropy",
    "--aug-splits 2 --jsd-loss": "JsdCrossEntropy",
}


@pytest.mark.parametrize("args", LOSSES)
def test_losses(args: str) -> None:
    run = built("--aa", "rand-m5-inc1", *args.split())
    loss = run.task.criterion
    assert type(loss).__name__ == LOSSES[args]
    assert getattr(loss, "sum_classes", False) == ("--bce-sum" in args)
    images, target = next(iter(run.train_loader))
    assert len(images) == (32 if "--aug-splits" in args else 16)
    assert (target.ndim == 2) == ("mix" in args)
    assert run.task(images, target)["loss"].isfinite()


# --- optimizer and average --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--opt sgd", 0.1 * 16 / 256),
        ("--opt samon-adamw", 0.1 * (16 / 256) ** 0.5),
        ("--opt samon --base-opt lamb", 0.1 * (16 / 256) ** 0.5),
        ("--opt sgd --lr-base-scale sqrt --lr-base-size 64", 0.1 * 0.5),
        ("--opt sgd --grad-accum-steps 4", 0.1 * 64 / 256),
    ],
)
def test_learning_rate_from_the_batch(args: str, expected: float) -> None:
    assert build.learning_rate(config.parse(["-b", "16", *args.split()]), world_size=1) == pytest.approx(expected)


def test_optimizer_flags() -> None:
    args = "--opt samon-fisher-adamw --opt-eps 1e-5 --opt-betas 0.8 0.9 --weight-decay 0.3 --layer-decay 0.5 --rho 0.7"
    run = built("--model", "test_vit", *args.split(), "--eta", "0.2", "--opt-kwargs", "amsgrad=True")
    groups = run.optimizer.param_groups
    assert {(group["eps"], tuple(group["betas"]), group["amsgrad"]) for group in groups} == {(1e-5, (0.8, 0.9), True)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert len({group["lr_scale"] for group in groups}) > 2
    assert (run.sam.rho, run.sam.eta) == (0.7, 0.2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_average_of_half_precision_is_float32(dtype: str) -> None:
    """A step of the average is 1e-3 of the way, which weights of 8 or 11 bits lose in rounding."""
    run = built("--model-dtype", dtype, "--model-ema", "--model-ema-decay", "0.999")
    name, weight = next(iter(run.model.named_parameters()))
    average = run.ema.module.state_dict()[name]
    with torch.no_grad():
        weight.fill_(1.0)
        average.fill_(0.0)
    for step in range(2, 102):
        run.ema.update(run.model, step=step)
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full_like(average, 1 - 0.999**100))


@pytest.mark.parametrize("other", [["--torchcompile", "eager"], ["--grad-checkpointing"]], ids=str)
def test_replay_is_turned_off_where_it_does_not_combine(other: list[str], caplog: pytest.LogCaptureFixture) -> None:
    args = ["--opt", "samon", "--model", "test_vit", "--perturb", "blocks.[4-9]|^norm"]
    assert not built(*args).config.no_replay
    caplog.set_level("INFO")
    assert built(*args, *other).config.no_replay
    assert f"replay is off: it keeps activations from module to module, which {other[0]} does not allow" in caplog.text


# --- schedule ---------------------------------------------------------------------------------------------------------
def rates(run: build.Run) -> list[float]:
    return [group["lr"] for group in run.optimizer.param_groups]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--sched none", [0.05, 0.05, 0.05]),
        ("--sched step --decay-epochs 1 --decay-rate 0.5", [0.05, 0.025, 0.0125]),
        ("--sched multistep --decay-milestones 2", [0.05, 0.005, 0.005]),  # timm counts from 1
        ("--sched constant --warmup-epochs 2 --warmup-lr 0.01", [0.01, 0.03, 0.05]),
        ("--sched poly --decay-rate 1 --min-lr 0.02", [0.05, 0.04, 0.03]),
        ("--sched wsd --decay-epochs 0.4 --lr-decay-fn linear --opt samon --sam-tail 0.1", [0.05, 0.05, 0.05]),
    ],
)
def test_schedules(args: str, expected: list[float]) -> None:
    run, found = built("--epochs", "3", *args.split()), []
    for epoch in range(3):
        run.progress = Progress(epoch=epoch)
        fast_forward_scheduler(run)
        found += rates(run)[:1]
    assert run.epochs == 3
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("opt", ["sgd", "samon", "lookahead_sgd"])
def test_layer_decay_without_a_schedule(opt: str) -> None:
    args = ["--opt", opt, "--model", "test_vit", "--layer-decay", "0.5"]
    without, constant = built(*args, "--sched", "none"), built(*args, "--sched", "constant")
    assert rates(without) == rates(constant)
    assert min(rates(without)) < 0.05 == max(rates(without))


def test_schedule_flags_of_timm() -> None:
    args = "--epochs 8 --sched rsqrt --decay-epochs 3 --warmup-epochs 2 --lr-decay-fn cosine --lr-stable-timescale 1.5"
    run, other = built(*args.split()), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    own = {"num_epochs": 8, "decay_epochs": 3.0, "warmup_epochs": 2, "warmup_lr": 1e-5}
    timms, _ = create_scheduler_v2(other, "rsqrt", decay_fn="cosine", stable_timescale=1.5, **own)
    for epoch in range(8):
        run.progress = Progress(epoch=epoch)
        fast_forward_scheduler(run)
        timms.step(epoch)
        assert rates(run)[0] == other.param_groups[0]["lr"], epoch


# --- inputs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("args", "shape"),
    [
        ("--in-chans 3 --img-size 32 --mean 0.3", (16, 3, 32, 32)),
        ("--img-size 48", (16, 1, 48, 48)),
        ("--input-size 1 24 40", (16, 1, 24, 40)),
        ("--model vit_tiny_patch16_224 --model-kwargs img_size=32 depth=1", (16, 1, 32, 32)),
    ],
)
def test_input_size(args: str, shape: tuple[int, ...]) -> None:
    """Also of a fixed-size model whose size is its own argument."""
    own = [item for item in BASE if item not in ("--img-size", "32")]
    run = build.build(config.parse([*own, *args.split()]), CPU)
    images, _ = next(iter(run.train_loader))
    assert images.shape == shape
    assert run.model(images).shape == (16, 10)


@pytest.mark.parametrize("tail", ["1", "0.9", "0.5"])
@pytest.mark.parametrize("extra", ["", "--cooldown-epochs 2", "--warmup-epochs 1", "--warmup-epochs 1 --warmup-prefix"])
def test_a_wsd_schedule_decays_from_the_start_of_the_tail(tail: str, extra: str) -> None:
    args = ["--opt", "samon", "--sched", "wsd", "--sched-on-updates", "--epochs", "6", "--warmup-epochs", "0"]
    run = built(*args, "--sam-tail", tail, *extra.split())
    total, warmup = run.epochs * run.updates_per_epoch, int(run.config.warmup_epochs) * run.updates_per_epoch
    rates = [run.scheduler._get_lr(update)[0] for update in range(total + 1)]
    start = max(run.tail.start, warmup)
    assert rates[warmup] == rates[start] > rates[start + 1]
    end = total - run.config.cooldown_epochs * run.updates_per_epoch
    assert rates[end - 1] > rates[end] == run.config.min_lr
