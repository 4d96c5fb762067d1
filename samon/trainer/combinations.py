"""Which flags exclude each other, need each other, or have no effect without or with each other."""

import argparse
from collections.abc import Collection, Iterator, Mapping

from timm.optim import OptimInfo, get_optimizer_info, list_optimizers

from samon.errors import UserError
from samon.registry import base_of
from samon.trainer.flags import Flag

# Flags that cannot be combined with any of the others; `name=value` stands for that value alone.
EXCLUDES = {
    "fsdp": "torchcompile channels-last sync-bn split-bn model-ema-force-cpu clip-mode=agc",
    "aug-splits": "mixup cutmix cutmix-minmax ascent-fraction ascent-size train-img-sizes no-prefetcher",
    "m-sharpness": "ascent-fraction ascent-size",
    "ascent-size": "bn-stats=both",  # statistics of small images differ
    "sam-tail": "sam-start-epoch sam-end-epoch sam-every",
    "in-memory": "epoch-repeats train-img-sizes decoder",
    "train-batches-per-epoch": "epoch-repeats train-num-samples",
    "fix-norm": "train-only-norm norm-dropout",
    "norm-dropout": "torchcompile",
    "sync-bn": "split-bn",
    "weight-decay-on": "layer-decay",
    "sched=plateau": "sched-on-updates start-epoch",  # it steps once per epoch, by the metric
    "checkpoint-format=dcp": "save-epochs",  # which keeps single files
}
# Flags without effect (named last) unless one of the others is used: an error.
NEEDS = {
    "fsdp": "fsdp-reshard-after-forward fsdp-replicate",
    "aug-splits": "jsd-loss",
    "train-img-sizes": "train-size-probs train-batches-per-epoch",
    "resume": "wandb-resume-id",
    "sam-tail": "tail-opt",
    "tail-opt": "tail-lr",
    "rho-sched": "rho-min",
    "aug-splits resplit": "split-bn",
    "sched=wsd sched=rsqrt": "lr-decay-fn",
    "sched=rsqrt": "lr-stable-timescale",
    "experiment": "resume=auto",  # by which it finds the run
    "landscape-figure": "landscape-points",
    "results-file": "results-format",
}
# The same for flags that timm accepts without effect: a warning.
IDLE_WITHOUT = {
    "amp": "amp-dtype",
    "clip-grad": "clip-mode",
    "layer-decay": "layer-decay-min-scale layer-decay-no-opt-scale",
    "model-ema": "model-ema-decay model-ema-force-cpu model-ema-warmup",
    "bce-loss": "bce-sum bce-target-thresh bce-pos-weight",
    "reprob": "remode recount",
    "reprob split-bn": "resplit",
    "mixup cutmix cutmix-minmax": "mixup-prob mixup-mode mixup-off-epoch",
    "mixup": "mixup-switch-prob",
    "train-img-sizes": "train-size-schedule",
    "train-size-schedule": "train-size-schedule-spread train-size-random-mix",
    "torchcompile": "torchcompile-mode",
    "shard-cache": "shard-cache-size",
    "lr-noise": "lr-noise-pct lr-noise-std",
    "lr-cycle-limit": "lr-cycle-mul lr-cycle-decay",
    "sched=multistep": "decay-milestones",
    "sched=plateau": "patience-epochs",
    "sched=step sched=wsd sched=rsqrt": "decay-epochs",
    "sched=step sched=multistep sched=plateau sched=poly": "decay-rate",
    "sched=cosine sched=poly": "lr-k-decay",
    "sched=cosine sched=tanh sched=poly": "lr-cycle-limit",
    "sched=cosine sched=tanh sched=poly sched=wsd sched=rsqrt": "cooldown-epochs",
    "sched=cosine sched=tanh sched=poly sched=wsd sched=rsqrt sched=plateau": "min-lr",
}
# Flags without effect (named last) beside the other: a warning.
IDLE_WITH = {
    "lr": "lr-base lr-base-size lr-base-scale",
    "drop-path": "drop-connect",
    "sched=none": "warmup-epochs warmup-lr lr-noise",
    "aa": "color-jitter color-jitter-prob",
    "train-crop-mode=pad": "scale ratio",
    "no-aug": "train-crop-mode scale ratio hflip vflip color-jitter color-jitter-prob grayscale-prob "
    "gaussian-blur-prob aa reprob train-interpolation",
}


def check_combinations(config: argparse.Namespace, flags: Mapping[str, Flag]) -> None:
    """Raise UserError if flags in use (not at their default) exclude each other, or one lacks another that it needs."""
    used = _used(config, flags)
    for name, others in EXCLUDES.items():
        for other in others.split():
            if {name, other} <= used:
                raise UserError(f"--{name} and --{other} exclude each other; drop one of them".replace("=", " "))
    for others, names in NEEDS.items():
        if (idle := [n for n in names.split() if n in used]) and not used.intersection(others.split()):
            text = f"--{idle[0]} needs {_alternatives(others)}; add it, or drop --{idle[0]}"
            raise UserError(text.replace("=", " "))
    if config.fsdp and config.amp and config.amp_dtype == "float16":
        raise UserError("--fsdp does not support --amp-dtype float16; use bfloat16")


def describe_idle(
    config: argparse.Namespace, flags: Mapping[str, Flag], given: Collection[str], written: Collection[str]
) -> Iterator[str]:
    """A line for each flag in use that has no effect, though not if the command line turns off what a file's is for.

    Args:
        flags: those of train.py by key.
        given: keys of the command line.
        written: keys of the command line and of --config.
    """
    used, keys = _used(config, flags), {flag.name: key for key, flag in flags.items()}
    used -= {"aa"} if not config.aa or "3a" in config.aa else set()  # timm's 3-Augment keeps the jitter
    for idle_with, table in ((False, IDLE_WITHOUT), (True, IDLE_WITH)):
        for others, names in table.items():
            if bool(used.intersection(others.split())) != idle_with:
                continue
            turned_off = any(keys[other.partition("=")[0]] in given for other in others.split())
            for name in [n for n in names.split() if n in used and getattr(config, keys[n])]:
                if keys[name] in (given if turned_off else written):
                    yield f"--{name} has no effect with{'' if idle_with else 'out'} {_alternatives(others)}"
    info = base_info(config)
    for key, argument in {"momentum": "momentum", "opt_eps": "eps", "opt_betas": "betas"}.items():
        differs = getattr(config, key) not in (None, 0, flags[key].default)
        lacks = info is not None and not getattr(info, f"has_{argument}")
        if lacks and differs and key in (given if "opt" in given else written):
            yield f"{flags[key].flag} has no effect: --opt {config.opt} has no {argument}"


def _used(config: argparse.Namespace, flags: Mapping[str, Flag]) -> set[str]:
    """The names of the flags that are not at their default, and `name=value` of every flag."""
    values = {flag.name: (getattr(config, key), flag.default) for key, flag in flags.items()}
    names = {name for name, (value, default) in values.items() if value != default}
    return names | {f"{name}={value}" for name, (value, _) in values.items()}


def base_info(config: argparse.Namespace) -> OptimInfo | None:
    """timm's description of the optimizer that applies the gradient; None if --base-opt is wrong, as is said later."""
    name = base_of(config.opt, config.base_opt)
    return get_optimizer_info(name) if name in list_optimizers() else None


def _alternatives(names: str) -> str:
    return " or ".join(f"--{name}" for name in names.split()).replace("=", " ")
