"""Flags that exclude or need each other are errors; flags without effect beside the others are named."""

from pathlib import Path

import pytest

from samon.errors import UserError
from samon.trainer import config
from tests.runs import BASE

ERRORS = {
    "--opt samon --m-sharpness global --ascent-fraction 0.5": "--m-sharpness and --ascent-fraction",
    "--opt samon --ascent-size 8 --bn-stats both": "--ascent-size and --bn-stats both exclude",
    "--fix-norm --train-only-norm": "--fix-norm and --train-only-norm exclude",
    "--weight-decay-on all --layer-decay 0.9": "--weight-decay-on and --layer-decay exclude",
    "--fsdp --torchcompile": "--fsdp and --torchcompile exclude",
    "--fsdp --amp": "use bfloat16",
    "--fsdp --clip-grad 1 --clip-mode agc": "--clip-mode agc",
    "--split-bn": "--split-bn needs --aug-splits or --resplit",
    "--fsdp-replicate 2": "--fsdp-replicate needs --fsdp",
    "--jsd-loss": "--jsd-loss needs --aug-splits",
    "--aug-splits 2 --no-prefetcher": "--aug-splits and --no-prefetcher exclude",
    "--sched plateau --start-epoch 1": "--sched plateau and --start-epoch exclude",
    "--sched plateau --sched-on-updates": "--sched plateau and --sched-on-updates exclude",
    "--lr-decay-fn linear": "--lr-decay-fn needs --sched wsd or --sched rsqrt",
    "--sched wsd --lr-stable-timescale 2": "--lr-stable-timescale needs --sched rsqrt",
    "--resume auto": "--resume auto needs --experiment",
    "--save-epochs 1 --checkpoint-format dcp": "--checkpoint-format dcp and --save-epochs exclude",
    "--opt samon --sam-tail 0.3 --sam-every 2": "--sam-tail and --sam-every exclude",
    "--opt samon --rho-min 0.1": "--rho-min needs --rho-sched",
    "--opt samon --tail-opt muon": "--tail-opt needs --sam-tail",
    "--opt samon --sam-tail 0.3 --tail-lr 0.1": "--tail-lr needs --tail-opt",
    "--in-memory --decoder crop": "--in-memory and --decoder exclude",
    "--train-img-sizes 16 32 --train-batches-per-epoch 5": "--train-batches-per-epoch and --train-num-samples exclude",
}


@pytest.mark.parametrize("args", ERRORS)
def test_flags_that_exclude_or_need_each_other(args: str) -> None:
    with pytest.raises(UserError, match=ERRORS[args]):
        config.parse([*BASE, *args.split()])


IDLE = {
    "--amp-dtype bfloat16": "--amp-dtype has no effect without --amp",
    "--model-ema-decay 0.9": "--model-ema-decay has no effect without --model-ema",
    "--sched step --min-lr 0.1": "--min-lr has no effect without --sched cosine or",
    "--lr 1 --lr-base 2": "--lr-base has no effect with --lr",
    "--aa rand-m9 --color-jitter 0.3": "--color-jitter has no effect with --aa",
    "--opt samon --opt-betas 0.9 0.99": "--opt-betas has no effect: --opt samon has no betas",
    "-c FILE": "--clip-mode has no effect without --clip-grad",
    "-c FILE --clip-grad 1": "",
    "--aa 3a --color-jitter 0.3": "",
    "--sched step --cooldown-epochs 0 --mixup 0.1 --mixup-prob 0.5": "",
    "-c quickstart --no-amp": "",  # turned off on purpose
    "-c FILE --clip-mode value --momentum 0.8 --opt muon --opt-betas 0.9 0.99": "--clip-mode has",
}


@pytest.mark.parametrize("args", IDLE)
def test_flags_without_effect_are_named(args: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(config, "_warn_once", lines.append)
    (tmp_path / "c.yaml").write_text("clip_mode: agc")
    config.parse([*args.replace("FILE", str(tmp_path / "c.yaml")).split(), "--print-config"])
    assert [line.startswith(IDLE[args]) for line in lines] == [True] * bool(IDLE[args])
