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

# --- model ------------------------------------------------------------------------------------------------------------


def batch_norms(model: nn.Module) -> set[tuple[float | None, float]]:
    return {(m.momentum, m.eps) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}


MODEL_FLAGS: dict[str, Callable[[nn.Module], bool]] = {
    "--drop 0.3": lambda m: m.drop_rate == 0.3,
    "--drop-path 0.2": lambda m: any(getattr(x, "drop_prob", 0) > 0 for x in m.modules()),
    "--drop-connect 0.2": lambda m: any(getattr(x, "drop_prob", 0) > 0 for x in m.modules()),
    "--gp max": lambda m: m.global_pool.pool_type == "max",
    "--model-kwargs stem_width=12": lambda m: m.conv1[3].weight.shape[0] == 12,
    "--model test_efficientnet --bn-momentum 0.3 --bn-eps 0.01": lambda m: batch_norms(m) == {(0.3, 0.01)},
    "--grad-checkpointing": lambda m: m.grad_checkpointing,
    "--channels-last": lambda m: m.conv1[3].weight.is_contiguous(memory_format=torch.channels_last),
    "--model-dtype bfloat16": lambda m: next(m.parameters()).dtype == torch.bfloat16,
    "--num-classes 12": lambda m: m.get_classifier().out_features == 12,
    "--model test_vit --img-size 64": lambda m: m.pos_embed.shape[1] == 1 + (64 // 16) ** 2,  # as if given as a kwarg
    "--model test_vit --img-size 64 --model-kwargs img_size=32 dynamic_img_size=True": lambda m: (
        m.pos_embed.shape[1] == 1 + (32 // 16) ** 2
    ),
    "--aug-splits 2 --split-bn --resplit --reprob 0.5": lambda m: any(
        isinstance(x, SplitBatchNorm2d) for x in m.modules()
    ),
}


@pytest.mark.parametrize("args", MODEL_FLAGS)
def test_model_flags(args: str) -> None:
    assert MODEL_FLAGS[args](built("--model", "resnet10t", *args.split()).model)


def test_head_initialization() -> None:
    heads = []
    for args in ([], ["--head-init-scale", "0.5", "--head-init-bias", "-3"]):
        torch.manual_seed(0)
        heads.append(built("--model", "test_vit", *args).model.get_classifier())
    assert torch.equal(heads[0].weight * 0.5, heads[1].weight)
    assert (heads[1].bias == -3).all()


def test_initial_and_pretrained_weights(tmp_path: Path) -> None:
    stem = (first := built().model).conv1[0].weight
    torch.save(first.state_dict(), path := str(tmp_path / "plain.pth"))
    assert not torch.equal(stem, built().model.conv1[0].weight)
    for args in (["--initial-checkpoint", path], ["--pretrained", "--pretrained-path", path]):
        assert torch.equal(stem, built(*args).model.conv1[0].weight)


def test_fast_norm() -> None:
    built("--fast-norm")
    assert is_fast_norm()
    built()
    assert not is_fast_norm()


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


@pytest.mark.parametrize(
    "flags", ["--m-sharpness 4", "--m-sharpness global", "--ascent-fraction 0.5", "--ascent-size 8"]
)
def test_the_step_is_checked_before_data_are_read(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samon.trainer.build.build_data", lambda *args: pytest.fail("data were read"))
    with pytest.raises(UserError, match=r"--ascent 'previous' makes no ascent pass.*--m-sharpness"):
        built("--opt", "samon", "--ascent", "previous", *flags.split())


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
    args = "--opt samon-adamw --opt-eps 1e-5 --opt-betas 0.8 0.9 --weight-decay 0.3 --layer-decay 0.5 --rho 0.7"
    run = built("--model", "test_vit", *args.split(), "--eta", "0.2", "--opt-kwargs", "amsgrad=True")
    groups = run.optimizer.param_groups
    assert {(group["eps"], tuple(group["betas"]), group["amsgrad"]) for group in groups} == {(1e-5, (0.8, 0.9), True)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert len({group["lr_scale"] for group in groups}) > 2
    assert (run.sam.rho, run.sam.eta) == (0.7, 0.2)
    assert type(built("--opt", "samon-muon").sam.base).__name__ == "Muon"


def test_defaults_of_the_variant_are_shown() -> None:
    printed = config.dump(config.parse([*BASE, "--opt", "samon-eleml2orig", "--print-config"]))
    assert "rho: 0.5\neta: 0.01\n" in printed
    run = built("--opt", "samon-eleml2orig")
    assert (run.config.rho, run.config.eta) == (0.5, 0.01)
    assert repr(run.optimizer).startswith("SAM(samon, geometry=eleml2orig, rho=0.5, eta=0.01, ")


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
        ("--cooldown-epochs 1 --min-lr 0.001", 4),
        ("--warmup-epochs 2 --warmup-prefix", 5),
    ],
)
def test_schedules(args: str, expected: list[float] | int) -> None:
    run = built("--epochs", "3", *args.split())
    assert run.epochs == (expected if isinstance(expected, int) else 3)
    if isinstance(expected, list):
        found = [rates(run)[0]]
        for epoch in (1, 2):
            run.progress = Progress(epoch=epoch)
            fast_forward_scheduler(run)
            found += rates(run)[:1]
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


def test_stop_after_the_end() -> None:
    with pytest.raises(UserError, match="--stop-epoch 3 of 2 epochs"):
        built("--epochs", "2", "--stop-epoch", "3")


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


def test_the_tail_owns_the_decay_of_a_wsd_schedule() -> None:
    args = ["--opt", "samon", "--sched", "wsd", "--sched-on-updates", "--epochs", "10", "--warmup-epochs", "0"]
    rates = []
    for extra in (["--sam-tail", "0.5"], ["--decay-epochs", "0.5"], ["--sam-tail", "0.5", "--decay-epochs", "0.2"]):
        run = built(*args, *extra)
        rates.append([run.scheduler._get_lr(update)[0] for update in range(run.epochs * run.updates_per_epoch)])
    assert rates[0] == rates[1] != rates[2]


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


@pytest.mark.parametrize(
    ("args", "holds"),
    [
        ("--sam-tail 0.5", lambda run: (run.tail.start, run.tail.total_updates) == (4, 8)),
        ("--rho-sched linear --rho-warmup 4 --rho-min 0.01", lambda run: run.rho_schedule.at(2, 0) == 0.255),
        ("--rho-sched lr --sched cosine", lambda run: run.rho_schedule.at(0, run.config.lr) == 0.5),
        ("--radius raw", lambda run: run.sam.radius == "raw"),
        ("--radius 0.25", lambda run: run.sam.radius == 0.25),
        ("--freeze ^(?!head|fc) --perturb-frozen", lambda run: len(run.sam.perturbed_parameters()) == 30),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a function's address differs by process
)
def test_flags_of_the_two_pass_phase(args: str, holds: Callable[[build.Run], bool]) -> None:
    assert holds(built("--opt", "samon", "--epochs", "2", *args.split()))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--sam-tail 0.3 --sam-every 2", "--sam-tail and --sam-every exclude"),
        ("--sam-tail 0.3 --sam-start-epoch 1", "--sam-tail and --sam-start-epoch exclude"),
        ("--rho-min 0.1", "--rho-min needs --rho-sched"),
        ("--rho-sched lr --sched none", "learning rate that is constant"),
        ("--tail-opt muon", "--tail-opt needs --sam-tail"),
        ("--sam-tail 0.3 --tail-lr 0.1", "--tail-lr needs --tail-opt"),
        ("--sam-tail 0.3 --tail-opt samon-muon", "--tail-opt samon-muon: .* is itself sharpness-aware"),
        ("--sam-tail 0.3 --tail-opt mon", "--tail-opt: unknown optimizer 'mon'; did you mean 'muon'"),
        ("--sam-tail 0.3 --tail-opt lookahead_sgd", "--tail-opt replaces .*drop lookahead_"),
        ("--sam-tail 0.3 --tail-opt muon --opt lookahead_samon", "--tail-opt replaces .*drop lookahead_"),
        ("--sam-tail 1 --tail-opt muon", "use --base-opt muon instead"),
        ("--sam-tail 0.5 --tail-opt adahessian", "second derivatives"),
        ("--sam-tail 0.5 --tail-opt muon --tail-lr 0", "--tail-lr"),
        ("--sam-tail 0.01", "is less than one; raise it"),
        ("--sam-tail 0.1 --sched wsd --epochs 2 --warmup-epochs 0 --cooldown-epochs 2", "--cooldown-epochs, where"),
        ("--opt samon-layerl2 --base-opt lookahead_sgd", "Lookahead goes around it: use lookahead_samon-layerl2"),
        ("--rho-warmup 5", "--rho-sched"),
    ],
)
def test_contradictions_of_the_two_pass_phase(args: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        built("--opt", "samon", *args.split())
