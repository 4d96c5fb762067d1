"""The flags that this project adds to timm's. `python tools/flag_tables.py` updates their tables in the docs."""

from samon.engines.ascent import SOURCES, make_ascent
from samon.evals import EVALS
from samon.geometry import validate_radius_rule
from samon.schedule import RHO_SCHEDULES
from samon.trainer.flag_rows_timm import TIMM, B, T, V, optimizer_name
from samon.trainer.flags import Flag, Sections

# Texts that are too long for their row.
SETTINGS = "YAML file of settings (keys are the flags, with _ for -), or a recipe such as imagenet/resnet50"
RADIUS = "what rho measures: ball (its radius), raw (times the gradient norm), a mix in (0, 1), or loss (its rise)"
TAIL_OPT = "timm optimizer that applies the gradient from the start of --sam-tail on; momentum is carried over"
RHO_SCHED = "rho over time: constant, linear ramp, or proportional to lr"
PERTURBATIONS = "device: one perturbation per process; global: one for all; a number m: one per m samples"
FORMATS = "file: timm's single file; dcp: a sharded checkpoint, written by all processes while training continues"
RESHARD = "free the parameters of a block after its forward pass"
TRACKERS = "comma-separated: tensorboard, wandb, trackio, mlflow; or none (torchrun itself refuses --log)"
NONFINITE = "stop after this many updates in a row with a non-finite gradient"
CORRUPT = "fraction of corrupt samples to skip before stopping"
IN_MEMORY = "keep the whole data set on the device and augment it there"
CENTERING = "subtract the mean of each image (row), of each feature (column), or none"
OLD_ASCENTS = {"momentum": "msam", "friendly": "fsam", "every": "looksam", "adaptive": "aesam"}
TRAIN_SPLIT = "split, read without augmentation; a checkpoint's own training split if not given"
DECODERS = ("auto", "torch", "crop", "pil")  # of samon.data.decode


def parse_m_sharpness(value: object) -> str | int:
    """Parse `device`, `global` or a positive number of samples."""
    if value in ("device", "global"):
        return str(value)
    if str(value).isdigit() and int(str(value)) > 0:
        return int(str(value))
    raise ValueError(f"{value!r} is not device, global or a number of samples")


def parse_ascent(value: object) -> str:
    """Check the name of an ascent source."""
    return make_ascent(str(value)).name


def parse_interval(text: str) -> tuple[int, float]:
    """Parse `'500'` to (500 updates, 0 minutes), `'10m'` to (0, 10), `''` and `'0'` to (0, 0)."""
    try:
        steps, minutes = (0, float(text.removesuffix("m"))) if text.endswith("m") else (int(text or 0), 0.0)
        if steps < 0 or not 0 <= minutes < float("inf"):
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is not a number of updates (500) or of minutes (10m)") from None
    return steps, minutes


def check_interval(value: object) -> str:
    """Check an interval; it stays text."""
    parse_interval(str(value))
    return str(value)


SAM: tuple[Flag, ...] = (
    T("rho", float, None, "radius of the perturbation; by default the optimizer name's own", range=">= 0"),
    T("eta", float, None, "eta of the geometry; by default the optimizer name's own", range=">= 0"),
    T("radius", validate_radius_rule, "ball", RADIUS),
    T("base-opt", optimizer_name, None, "timm optimizer that applies the perturbed gradient"),
    T("perturb", str, None, "perturb only the parameters of the scope whose qualified name matches this regex"),
    T("perturb-frozen", bool, False, "perturb the parameters of the scope that are not trained, too"),
    T("sparsity", float, None, "fraction left unperturbed by sam-random, ssam-f and ssam-d", range="in [0, 1)"),
    T("mask-epochs", int, 5, "ssam-f, ssam-d: renew the mask every k epochs", range=">= 1"),
    T("fisher-samples", int, 1024, "ssam-f: number of training images that define the mask", range=">= 1"),
    T("m-sharpness", parse_m_sharpness, "device", PERTURBATIONS),
    T("ascent", parse_ascent, "batch", f"source of the ascent direction: {', '.join(SOURCES)}", old_values=OLD_ASCENTS),
    T("ascent-fraction", float, 1.0, "fraction of the batch used for the ascent gradient", range="in (0, 1]"),
    T("ascent-size", int, None, "image size of the ascent pass", range=">= 1"),
    T("gsam-alpha", float, 0.0, "GSAM: factor of the clean gradient's orthogonal part to subtract", range=">= 0"),
    T("esam-beta", float, 1.0, "ESAM: probability that an update perturbs a tensor", range="in (0, 1]"),
    T("sam-start-epoch", int, 0, "first epoch of the two-pass step", range=">= 0"),
    T("sam-end-epoch", int, None, "epoch from which the base step is used again", range=">= 0"),
    T("sam-tail", float, None, "only the last fraction of all updates takes two passes", range="in (0, 1]"),
    T("tail-opt", optimizer_name, None, TAIL_OPT),
    T("tail-lr", float, 1.0, "factor on the schedule's learning rate for --tail-opt", range="> 0"),
    T("rho-sched", str, "constant", RHO_SCHED, choices=RHO_SCHEDULES),
    T("rho-warmup", int, 0, "updates of the linear ramp, from the first two-pass update on", range=">= 0"),
    T("rho-min", float, 0.0, "smallest rho of a schedule", range=">= 0"),
    T("sam-every", int, 1, "use the two-pass step in every k-th update, the base step in between", range=">= 1"),
    T("bn-stats", str, "first", "pass that updates BatchNorm statistics", choices=("first", "second", "both")),
    T("same-noise", bool, False, "use the same dropout and stochastic-depth masks in both passes"),
    T("no-replay", bool, False, "do not reuse the activations before the first perturbed layer"),
)

SECTIONS: Sections = {
    "Sharpness-aware minimization": SAM,
    "Run": (
        T("config", str, "", SETTINGS, short="c"),
        T("print-config", bool, False, "print the resolved configuration as YAML and exit"),
        T("global-batch-size", int, None, "require processes x batch x accumulation to be this number", range=">= 1"),
        T("trackers", str, "tensorboard", TRACKERS, aliases=("log",)),
        T("checkpoint-interval", check_interval, "", "save within an epoch every N updates (500) or N minutes (10m)"),
        T("checkpoint-format", str, "file", FORMATS, choices=("file", "dcp"), old_values={"parts": "dcp"}),
        T("overwrite", bool, False, "replace the run in the directory once the first state is saved"),
        V("overwrite", bool, False, "replace a --results-file that is complete or from another command"),
        T("max-nonfinite-steps", int, 20, NONFINITE, range=">= 1", old_name="max-bad-steps"),
    ),
    "Sharded models": (
        B("fsdp", bool, False, "shard the model across processes (FSDP2), block by block (validate.py: accuracy only)"),
        B("fsdp-reshard-after-forward", str, "always", RESHARD, choices=("always", "never"), old_name="fsdp-reshard"),
        B("fsdp-replicate", int, 1, "number of replicas, each sharded across its own processes (HSDP)", range=">= 1"),
    ),
    "Fine-tuning and normalization layers (the paper's B.7 to B.9)": (
        T("freeze", str, None, "do not train the parameters whose qualified name matches this regex"),
        T("fix-norm", bool, False, "normalization layers without affine parameters: gamma = 1, beta = 0, not trained"),
        T("train-only-norm", bool, False, "train only the normalization parameters"),
        T("weight-decay-on", str, None, "what decays, instead of timm's rule", choices=("all", "non-norm", "none")),
        T("norm-dropout", float, 0.0, "dropout on the normalization parameters", range="in [0, 1)"),
    ),
    "Shards": (
        B("shard-cache", str, None, "directory for copies of remote shards"),
        B("shard-cache-size", float, 200.0, "size limit of --shard-cache in GiB", range="> 0"),
        T("sample-split", bool, False, "allow fewer shards than processes x workers"),
        T("shuffle-buffer", int, 2048, "encoded samples that each worker holds for shuffling", range=">= 1"),
        B("allow-shell-urls", bool, False, "allow pipe: commands in lists of shards"),
        T("max-corrupt-samples", float, 0.001, CORRUPT, range="in [0, 1]", old_name="max-bad-samples"),
        T("decoder", str, "auto", "image decoder; crop decodes only what a training crop needs", choices=DECODERS),
        T("in-memory", bool, False, IN_MEMORY, old_name="data-resident"),
    ),
    "What to evaluate": (
        V("evals", str, "accuracy", f"comma-separated: {', '.join(EVALS)}"),
        V("suite", str, None, "YAML list of data sets under --data-dir; `suites` is included with the package"),
        V("group", bool, False, "mean and standard deviation over the given checkpoints"),
        V("bootstrap", int, 0, "resamples for 95 % intervals over images, such as 1000; 0 for none", range=">= 0"),
        V("class-report", str, "", "directory for accuracy by class and confusion matrices, as CSV"),
        V("no-ema", bool, False, "evaluate the weights themselves, even if their average was validated"),
    ),
    "Adversarial robustness (--evals apgd)": (
        V("attack", str, "apgd", "standard adds FAB-T and Square", choices=("apgd", "standard")),
        V("norm", str, "l2,linf", "norms of the attack"),
        V("eps", str, "0.25,0.5,0.25/255,0.5/255", "radii for images in [0, 1]; if some are a/255, the others are l2"),
        V("apgd-iters", int, 100, "iterations of a run", range="> 0"),
        V("apgd-targets", int, 9, "target classes of the targeted attack", range="> 0"),
        V("apgd-restarts", int, 1, "runs from different starting points", range="> 0"),
        V("apgd-batch-size", int, 100, "images attacked at once", range="> 0"),
        V("apgd-state", str, "", "directory for finished batches; the same command resumes from it"),
    ),
    "Sharpness (--evals sharpness)": (
        V("sharpness", str, ["table6"], "presets, or such as worst-linf-adaptive-logitnorm-1step@0.007", nargs="+"),
        V("sharpness-mode", str, "reference", "how it is maximized", choices=("reference", "autopgd")),
        V("sharpness-scope", str, "all", "parameters that are perturbed", choices=("all", "norm", "non-norm")),
        V("sharpness-split", str, "train", TRAIN_SPLIT),
        V("sharpness-samples", int, 2048, "number of images, sampled by --seed", range="> 0"),
        V("sharpness-m", int, 128, "images per batch", range="> 0"),
    ),
    "Curvature (--evals hessian)": (
        V("hessian-split", str, "train", TRAIN_SPLIT),
        V("hessian-samples", int, 512, "number of images, sampled by --seed", range="> 0"),
        V("hessian-iters", int, 100, "maximum number of power iterations", range="> 0"),
        V("hessian-draws", int, 20, "random sign vectors for the estimate of the trace", range="> 0"),
        V("landscape-figure", str, "", "PNG or PDF file for the loss along two directions"),
        V("landscape-points", int, 15, "points along each direction", range=">= 2"),
    ),
    "Feature rank (--evals feature_rank)": (
        V("feature-layer", str, [""], "layer names; `pre_logits`; the last before pooling if empty", nargs="+"),
        V("feature-token", str, "auto", "tokens to use", choices=("auto", "cls", "all")),
        V("feature-centering", str, "row,column", CENTERING, old_name="feature-centring"),
        V("feature-samples", int, 10_000, "number of images, sampled by --seed", range="> 0"),
        V("feature-split", str, "train", f"{TRAIN_SPLIT}; --split if empty"),
    ),
    "Normalization parameters (--evals norm_params)": (
        V("norm-figure", str, "", "PNG file, with a PDF beside it, for the distributions of gamma and beta"),
        V("norm-tensorboard", str, "", "directory for their TensorBoard histograms"),
    ),
    **TIMM,
}
TRAIN, VALIDATE = (
    {title: rows for title, all_rows in SECTIONS.items() if (rows := tuple(f for f in all_rows if name in f.programs))}
    for name in ("train", "validate")
)
