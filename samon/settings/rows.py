"""The flags that train.py adds to timm's: the perturbation, over what it is made, and how a run survives."""

from typing import Any

from samon.settings.flag import Flag as F
from samon.settings.flag import Groups, markdown
from samon.settings.rows_timm import TIMM


def m_sharpness(value: Any) -> str | int:
    """`device`, `global` or a positive number of samples."""
    if value in ("device", "global"):
        return str(value)
    if str(value).isdigit() and int(value) > 0:
        return int(value)
    raise ValueError(f"{value!r} is not device, global or a number of samples")


def interval(value: Any) -> str:
    """`500` (updates) or `10m` (minutes), checked and left as text."""
    steps_or_minutes(str(value))
    return str(value)


def steps_or_minutes(text: str) -> tuple[int, float]:
    """`'500'` -> (500 updates, 0), `'10m'` -> (0, 10 minutes), `''` and `'0'` -> (0, 0)."""
    number = text.removesuffix("m")
    try:
        if text.endswith("m"):
            steps, minutes = 0, float(number)
        else:
            steps, minutes = int(number or 0), 0.0
        if steps < 0 or minutes < 0:
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is not a number of updates (500) or of minutes (10m)") from None
    return steps, minutes


SAM: tuple[F, ...] = (
    F("rho", float, None, "size of the perturbation; the variant's own if not given", range=">= 0"),
    F("eta", float, None, "the variant's eta; its own if not given", range=">= 0"),
    F("base-opt", str, None, "timm optimizer that applies the perturbed gradient"),
    F("perturb", str, None, "perturb only parameters of the scope whose qualified name matches this regex"),
    F("sparsity", float, None, "share left unperturbed by sam-random, ssam-f and ssam-d", range="in [0, 1)"),
    F(
        "m-sharpness",
        m_sharpness,
        "device",
        "device: each process its own perturbation; global: one for all; a number m: sub-batches of m",
    ),
    F("ascent-fraction", float, 1.0, "share of the batch that makes the ascent gradient", range="in (0, 1]"),
    F("sam-start-epoch", int, 0, "first epoch with the two-pass step", range=">= 0"),
    F("sam-end-epoch", int, None, "epoch from which the base step is used again", range=">= 0"),
    F("sam-every", int, 1, "two-pass step at every k-th update, the base step between", range=">= 1"),
    F("bn-stats", str, "first", "which pass updates BatchNorm statistics", choices=("first", "second", "both")),
    F("same-noise", bool, False, "same dropout and stochastic-depth masks in both passes"),
    F("no-replay", bool, False, "do not reuse activations in front of the first perturbed layer"),
)

RUN: tuple[F, ...] = (
    F("global-batch-size", int, None, "stop at once unless processes x batch x accumulation is this", range=">= 1"),
    F("checkpoint-interval", interval, "", "save within an epoch every so many updates (500) or minutes (10m)"),
    F("max-bad-steps", int, 20, "stop after so many updates in a row with a non-finite gradient", range=">= 1"),
)

FINE_TUNING: tuple[F, ...] = (
    F("freeze", str, None, "do not train parameters whose qualified name matches this regex"),
)

SHARDS: tuple[F, ...] = (
    F("shard-cache", str, None, "directory that keeps copies of remote shards"),
    F("shard-cache-size", float, 200.0, "size limit of --shard-cache in GiB", range="> 0"),
    F("sample-split", bool, False, "allow fewer shards than processes x workers"),
    F("shuffle-buffer", int, 2048, "encoded samples that each worker holds for shuffling", range=">= 1"),
    F("allow-shell-urls", bool, False, "let shard lists contain pipe: commands"),
    F("max-bad-samples", float, 0.001, "share of unreadable samples to pass over before stopping", range="in [0, 1]"),
    F("decoder", str, "auto", "image decoder", choices=("auto", "torch", "pil")),
    F("data-resident", bool, False, "keep the whole data set on the device and augment it there"),
)

CONTROL: tuple[F, ...] = (
    F("config", str, "", "YAML file of settings, keys as the flags with _ for -", short="c"),
    F("print-config", bool, False, "print the resolved configuration as YAML and exit"),
)

OURS = {
    "Configuration": CONTROL,
    "Sharpness-aware minimization": SAM,
    "Run": RUN,
    "Fine-tuning": FINE_TUNING,
    "Shards": SHARDS,
}
TRAIN: Groups = OURS | TIMM

if __name__ == "__main__":
    print(markdown(TRAIN))
