"""The flags that this project adds to timm's, and the tables of both programs.

`python -m samon.trainer.flag_rows` renews docs/flags.md and docs/flags_validate.md.
"""

from pathlib import Path
from typing import Any

from samon.engines.ascent import SOURCES, make_ascent
from samon.evals import EVALS
from samon.trainer.flag_rows_timm import TIMM, B, T, V
from samon.trainer.flags import Flag, Groups, markdown, of_program

# Texts that do not fit into their row.
PERTURBATIONS = "device: each process its own perturbation; global: one for all; a number m: sub-batches of m"
FORMATS = "file: timm's single file; dcp: a sharded checkpoint, written by all processes while training continues"
SETTINGS = "YAML of settings, keys as the flags with _ for -, or a recipe: imagenet/resnet50"
FSDP = "share the model out among the processes (FSDP2), block by block (validate.py: accuracy)"
OVERWRITE = "replace the run in the directory when the first state is saved (validate.py: the --results-file)"
NONFINITE = "stop after this many updates in a row with a non-finite gradient"
RESHARD = "free a block's parameters after its forward pass"
CENTERING = "subtract the mean of each image (row), of each feature (column), or none"
UNREADABLE = "share of unreadable samples to pass over before stopping"

DECODERS = ("auto", "torch", "crop", "scaled", "pil")  # as samon.data.decode's


def m_sharpness(value: Any) -> str | int:
    """`device`, `global` or a positive number of samples."""
    if value in ("device", "global"):
        return str(value)
    if str(value).isdigit() and int(value) > 0:
        return int(value)
    raise ValueError(f"{value!r} is not device, global or a number of samples")


def ascent(value: Any) -> str:
    """A source of the direction, checked and left as text."""
    return make_ascent(str(value)).name


def interval(value: Any) -> str:
    """`500` (updates) or `10m` (minutes), checked and left as text."""
    steps_or_minutes(str(value))
    return str(value)


def steps_or_minutes(text: str) -> tuple[int, float]:
    """`'500'` -> (500 updates, 0), `'10m'` -> (0, 10 minutes), `''` and `'0'` -> (0, 0)."""
    try:
        steps, minutes = (0, float(text.removesuffix("m"))) if text.endswith("m") else (int(text or 0), 0.0)
        if steps < 0 or minutes < 0:
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is not a number of updates (500) or of minutes (10m)") from None
    return steps, minutes


SAM: tuple[Flag, ...] = (
    T("rho", float, None, "size of the perturbation; the variant's own if not given", range=">= 0"),
    T("eta", float, None, "the variant's eta; its own if not given", range=">= 0"),
    T("base-opt", str, None, "timm optimizer that applies the perturbed gradient"),
    T("perturb", str, None, "perturb only parameters of the scope whose qualified name matches this regex"),
    T("sparsity", float, None, "share left unperturbed by sam-random, ssam-f and ssam-d", range="in [0, 1)"),
    T("mask-epochs", int, 5, "ssam-f, ssam-d: renew the mask at each k-th epoch", range=">= 1"),
    T("fisher-samples", int, 1024, "ssam-f: training images that the mask is made from", range=">= 1"),
    T("m-sharpness", m_sharpness, "device", PERTURBATIONS),
    T("ascent", ascent, "batch", f"where the direction of the perturbation comes from: {', '.join(SOURCES)}"),
    T("ascent-fraction", float, 1.0, "share of the batch that makes the ascent gradient", range="in (0, 1]"),
    T("ascent-size", int, None, "image size of the ascent pass", range=">= 1"),
    T("gsam-alpha", float, 0.0, "GSAM: share of the clean gradient's orthogonal part to take off", range=">= 0"),
    T("esam-beta", float, 1.0, "ESAM: chance of each tensor to be perturbed in an update", range="in (0, 1]"),
    T("sam-start-epoch", int, 0, "first epoch with the two-pass step", range=">= 0"),
    T("sam-end-epoch", int, None, "epoch from which the base step is used again", range=">= 0"),
    T("sam-every", int, 1, "two-pass step at every k-th update, the base step between", range=">= 1"),
    T("bn-stats", str, "first", "which pass updates BatchNorm statistics", choices=("first", "second", "both")),
    T("same-noise", bool, False, "same dropout and stochastic-depth masks in both passes"),
    T("no-replay", bool, False, "do not reuse activations in front of the first perturbed layer"),
)

GROUPS: Groups = {
    "Configuration": (
        T("config", str, "", SETTINGS, short="c"),
        T("print-config", bool, False, "print the resolved configuration as YAML and exit"),
    ),
    "Sharpness-aware minimization": SAM,
    "Run": (
        T("global-batch-size", int, None, "stop at once unless processes x batch x accumulation is this", range=">= 1"),
        T("checkpoint-interval", interval, "", "save within an epoch every so many updates (500) or minutes (10m)"),
        T("checkpoint-format", str, "file", FORMATS, choices=("file", "dcp"), old_values={"parts": "dcp"}),
        B("overwrite", bool, False, OVERWRITE),
        T("max-nonfinite-steps", int, 20, NONFINITE, range=">= 1", old_name="max-bad-steps"),
    ),
    "Sharded models": (
        B("fsdp", bool, False, FSDP),
        B("fsdp-reshard-after-forward", str, "always", RESHARD, choices=("always", "never"), old_name="fsdp-reshard"),
        B("fsdp-replicate", int, 1, "so many replicas, each shared out among its part of the processes", range=">= 1"),
    ),
    "Normalization layers (the paper's B.7 to B.9)": (
        T("fix-norm", bool, False, "normalization layers without affine parameters: gamma = 1, beta = 0, not trained"),
        T("train-only-norm", bool, False, "train the normalization parameters alone"),
        T("weight-decay-on", str, None, "what decays, instead of timm's rule", choices=("all", "non-norm", "none")),
        T("norm-dropout", float, 0.0, "dropout on the normalization parameters", range="in [0, 1)"),
    ),
    "Fine-tuning": (T("freeze", str, None, "do not train parameters whose qualified name matches this regex"),),
    "Shards": (
        B("shard-cache", str, None, "directory that keeps copies of remote shards"),
        B("shard-cache-size", float, 200.0, "size limit of --shard-cache in GiB", range="> 0"),
        T("sample-split", bool, False, "allow fewer shards than processes x workers"),
        T("shuffle-buffer", int, 2048, "encoded samples that each worker holds for shuffling", range=">= 1"),
        B("allow-shell-urls", bool, False, "let shard lists contain pipe: commands"),
        T("max-bad-samples", float, 0.001, UNREADABLE, range="in [0, 1]"),
        T("decoder", str, "auto", "image decoder (crop, scaled: what a training crop needs)", choices=DECODERS),
        T("data-resident", bool, False, "keep the whole data set on the device and augment it there"),
    ),
    "What to evaluate": (
        V("evals", str, "accuracy", f"comma-separated: {', '.join(EVALS)}"),
        V("suite", str, None, "YAML list of data sets under --data-dir to evaluate in one go; `suites` comes along"),
        V("group", bool, False, "mean and standard deviation over the checkpoints given together"),
        V("bootstrap", int, 0, "draws for 95 % intervals over images, such as 1000; 0 for none", range=">= 0"),
        V("class-report", str, "", "directory for accuracy by class and confusion matrices, as CSV"),
        V("no-ema", bool, False, "evaluate the weights themselves, also where their average decided the best"),
    ),
    "Adversarial robustness (--evals apgd)": (
        V("attack", str, "apgd", "standard: FAB-T and Square as well", choices=("apgd", "standard")),
        V("norm", str, "l2,linf", "norms of the attack"),
        V("eps", str, "0.25,0.5,0.25/255,0.5/255", "radii for images in [0, 1]; beside a/255, plain ones are for l2"),
        V("apgd-iters", int, 100, "iterations of a run", range="> 0"),
        V("apgd-targets", int, 9, "target classes of the targeted attack", range="> 0"),
        V("apgd-restarts", int, 1, "runs from other starting points", range="> 0"),
        V("apgd-batch-size", int, 100, "images attacked at once; 0: a search for the fastest size", range=">= 0"),
        V("apgd-state", str, "", "directory that keeps every finished batch; the same command goes on from it"),
    ),
    "Sharpness (--evals sharpness)": (
        V("sharpness", str, ["table6"], "presets, or such as worst-linf-adaptive-logitnorm-1step@0.007", nargs="+"),
        V("sharpness-mode", str, "reference", "how it is maximised", choices=("reference", "autopgd")),
        V("sharpness-scope", str, "all", "parameters that are perturbed", choices=("all", "norm", "non-norm")),
        V("sharpness-split", str, "train", "split, read without augmentation"),
        V("sharpness-samples", int, 2048, "images, drawn by --seed", range="> 0"),
        V("sharpness-m", int, 128, "images per batch", range="> 0"),
    ),
    "Curvature (--evals hessian)": (
        V("hessian-split", str, "train", "split, read without augmentation"),
        V("hessian-samples", int, 512, "images, drawn by --seed", range="> 0"),
        V("hessian-iters", int, 100, "most power iterations", range="> 0"),
        V("hessian-draws", int, 20, "vectors of signs that the trace is estimated from", range="> 0"),
        V("landscape-figure", str, "", "PNG or PDF of the loss along two directions"),
        V("landscape-points", int, 15, "points along each direction", range=">= 1"),
    ),
    "Feature rank and normalization parameters": (
        V("feature-layer", str, [""], "layers by name; `pre_logits`, or none for the last before pooling", nargs="+"),
        V("feature-token", str, "auto", "tokens kept", choices=("auto", "cls", "all")),
        V("feature-centering", str, "row,column", CENTERING, old_name="feature-centring"),
        V("feature-samples", int, 10_000, "images, drawn by --seed", range="> 0"),
        V("feature-split", str, "train", "split, as in the public code; --split if empty"),
        V("norm-figure", str, "", "PNG, and PDF beside it, of gamma's and beta's distributions"),
        V("norm-tensorboard", str, "", "directory for their TensorBoard histograms"),
    ),
    **TIMM,
}
TRAIN = of_program(GROUPS, "train")
VALIDATE = of_program(GROUPS, "validate")

if __name__ == "__main__":  # renews the tables; what stands above the first of them stays
    for page, groups in ((Path("docs/flags.md"), TRAIN), (Path("docs/flags_validate.md"), VALIDATE)):
        page.write_text(page.read_text().partition("## ")[0] + markdown(groups).rstrip("\n") + "\n")
