"""timm's flags, one row each: name, type, timm's default, meaning; of train.py (T), validate.py (V), or both (B)."""

from functools import partial

from samon.trainer.flags import Flag, Sections, parse_kwargs

TRAIN_ONLY, VALIDATE_ONLY, BOTH = ("train",), ("validate",), ("train", "validate")
T, V, B = (partial(Flag, programs=programs) for programs in (TRAIN_ONLY, VALIDATE_ONLY, BOTH))

# Texts and choices that are too long for their row.
RESUMED = (
    "resume from a checkpoint file, or from the newest state in a directory, with its settings; auto: from the newest "
    "state of --experiment, with the settings of this command, or start if there is no state"
)
MODELS = "model name in timm's registry, all, a pattern such as 'vit_*', or a file of names"
PRECISION = "precision of --amp; auto: bfloat16 if the device computes in it, otherwise no --amp"
CLASSES = "number of classes; default: that of the checkpoint or the pretrained model, otherwise of the training data"
METRIC = "metric that determines the best checkpoint; without validation, the training loss does"
RESULTS = "format, if the file name does not determine it; timm: one row per model, as .csv or .json"
AMP_DTYPES, DTYPES = ("float16", "bfloat16", "auto"), ("float32", "float16", "bfloat16")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "wsd", "rsqrt", "constant", "none")
DECAYS = ("linear", "1-sqrt", "cosine", "power", "exp")  # timm's, of wsd and rsqrt
CROPS = ("rrc", "rkrc", "rkrr", "pad")
RESAMPLING = ("random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "")

# Why a flag is refused.
NO_JIT = "PyTorch no longer develops TorchScript and functorch's AOT; use --torchcompile"
NO_MULTILABEL = "each image has one label here; run timm's own script with `python -m samon.timm_script`"
NO_LOSS = "of timm's losses, cross-entropy, --bce-loss (with --bce-pos-weight) and --jsd-loss are supported"
NO_KD = "distillation needs a second model; run timm's own script with `python -m samon.timm_script`"
NO_NAFLEX = "sequence-packed batches are not supported; train.py has --train-img-sizes for several resolutions"
ONE_BATCH_SIZE = "a state counts samples in batches of one size, --batch-size, for all image sizes"


def optimizer_name(value: object) -> str:
    """In lower case, as timm's factory reads it: `per_opt` and our tables must find it too."""
    return str(value).lower()


def refused(flags: str, reason: str, switch: str = "", programs: tuple[str, ...] = TRAIN_ONLY) -> tuple[Flag, ...]:
    """Rows of refused flags.

    Args:
        flags: `name=default`, separated by spaces.
        switch: the flag without which the others have no effect; a file may set those.
    """
    defaults = parse_kwargs(flags.split())
    return tuple(
        Flag(name, str, default, "", refused=reason, dependent=switch not in ("", name), programs=programs)
        for name, default in defaults.items()
    )


TIMM: Sections = {
    "Dataset": (
        B("data", str, None, "alias of --data-dir", positional=True),
        B("data-dir", str, None, "root directory of the data set"),
        B("dataset", str, "", "wds/NAME for shards, npz/, torch/, hfds/; empty for image folders"),
        T("train-split", str, "train", "split to train on"),
        T("val-split", str, "validation", "split to validate on; empty for no validation"),
        T("train-num-samples", int, None, "samples per epoch (no effect on sets sorted by class)", range="> 0"),
        T("val-num-samples", int, None, "samples to validate on (no effect on sets sorted by class)", range="> 0"),
        B("dataset-download", bool, False, "allow torch/ and hfds/ to download data sets"),
        B("dataset-trust-remote-code", bool, False, "allow hfds/ data sets to run the code they contain"),
        B("class-map", str, "", "file that maps class names to indices"),
        B("input-img-mode", str, None, "PIL mode of the images; default: RGB for 3 channels, otherwise L"),
        B("input-key", str, None, "name of the image field in a sample"),
        B("target-key", str, None, "name of the label field in a sample"),
    ),
    "Model": (
        T("model", str, "resnet50", "model name in timm's registry", short="m"),
        V("model", str, None, MODELS, short="m"),
        B("pretrained", bool, False, "use pretrained weights (validate.py: unless --checkpoint is given)"),
        T("pretrained-path", str, None, "load pretrained weights from this file and adapt the head"),
        T("initial-checkpoint", str, "", "load model weights from this checkpoint before training"),
        T("resume", str, "", RESUMED),
        T("no-resume-opt", bool, False, "on resume, load only the weights, not the optimizer and scaler"),
        B("num-classes", int, None, CLASSES, range=">= 1"),
        B("gp", str, None, "global pooling: fast, avg, max, avgmax, avgmaxc"),
        B("img-size", int, None, "image size; default: the model's own", range="> 0"),
        B("in-chans", int, None, "image channels", range="> 0"),
        B("input-size", int, None, "input size as C H W", nargs=3, range="> 0"),
        B("crop-pct", float, None, "center crop for validation, as a fraction of the resized image", range="> 0"),
        B("mean", float, None, "pixel mean: one value, or one per channel", nargs="+", range="in [0, 1]"),
        B("std", float, None, "pixel standard deviation: one value, or one per channel", nargs="+", range="in (0, 1]"),
        B("interpolation", str, "", "resize interpolation for validation"),
        T("batch-size", int, 128, "batch size per process", short="b", range=">= 1"),
        V("batch-size", int, 256, "batch size per process", short="b", range=">= 1"),
        T("validation-batch-size", int, None, "batch size per process for validation", short="vb", range=">= 1"),
        B("channels-last", bool, False, "channels-last memory layout"),
        T("grad-accum-steps", int, 1, "micro-batches per optimizer step", range=">= 1"),
        T("grad-checkpointing", bool, False, "recompute activations in the backward pass to save memory"),
        B("fast-norm", bool, False, "timm's fast normalization (half precision under AMP)"),
        B("model-kwargs", parse_kwargs, {}, "arguments for the model's constructor, KEY=VALUE ..."),
        T("head-init-scale", float, None, "multiply the classifier's initial weights by this"),
        T("head-init-bias", float, None, "initial value of the classifier's bias"),
        B("torchcompile", str, None, "compile the model, with this backend", nargs="?", const="inductor"),
        B("torchcompile-mode", str, None, "torch.compile mode; reduce-overhead captures CUDA graphs"),
    ),
    "Device and precision": (
        B("device", str, None, "cpu, cuda, ...; default: a GPU if there is one, otherwise cpu"),
        B("amp", bool, False, "mixed precision (validate.py: accuracy only)"),
        B("amp-dtype", str, "float16", PRECISION, choices=AMP_DTYPES),
        B("model-dtype", str, None, "precision of the weights", choices=DTYPES),
        T("no-ddp-bb", bool, False, "do not broadcast buffers from rank 0 at each step"),
        T("synchronize-step", bool, False, "wait for the device at the end of each step"),
        B("device-modules", str, None, "Python modules of device backends to import first", nargs="+"),
    ),
    "Optimizer": (
        T("opt", optimizer_name, "sgd", "optimizer name; names such as samon-layerl2 are sharpness-aware"),
        T("opt-eps", float, None, "the optimizer's epsilon", range=">= 0"),
        T("opt-betas", float, None, "the optimizer's betas", nargs="+", range=">= 0"),
        T("momentum", float, 0.9, "momentum", range=">= 0"),
        T("weight-decay", float, 2e-05, "weight decay", range=">= 0"),
        T("clip-grad", float, None, "clip gradients at this value", range="> 0"),
        T("clip-mode", str, "norm", "how to clip", choices=("norm", "value", "agc")),
        T("layer-decay", float, None, "layer-wise learning rate decay", range="in (0, 1]"),
        T("layer-decay-min-scale", float, 0.0, "minimum learning rate scale of --layer-decay", range=">= 0"),
        T("layer-decay-no-opt-scale", float, None, "freeze layers whose scale is below this", range=">= 0"),
        T("opt-kwargs", parse_kwargs, {}, "further optimizer arguments, KEY=VALUE ..."),
    ),
    "Learning rate schedule": (
        T("sched", str, "cosine", "schedule", choices=SCHEDULES),
        T("sched-on-updates", bool, False, "advance the schedule with each update instead of each epoch"),
        T("lr", float, None, "learning rate; overrides --lr-base", range="> 0"),
        T("lr-base", float, 0.1, "learning rate at a global batch of --lr-base-size", range=">= 0"),
        T("lr-base-size", int, 256, "global batch size that --lr-base is for", range=">= 1"),
        T("lr-base-scale", str, "", "scaling with the batch; by optimizer if empty", choices=("", "linear", "sqrt")),
        T("lr-noise", float, None, "fractions of the schedule where learning rate noise starts and ends", nargs="+"),
        T("lr-noise-pct", float, 0.67, "limit of the learning rate noise, as a fraction", range=">= 0"),
        T("lr-noise-std", float, 1.0, "standard deviation of the learning rate noise", range=">= 0"),
        T("lr-cycle-mul", float, 1.0, "cycle length multiplier", range="> 0"),
        T("lr-cycle-decay", float, 0.5, "learning rate factor per cycle", range=">= 0"),
        T("lr-cycle-limit", int, 1, "number of cycles", range=">= 1"),
        T("lr-k-decay", float, 1.0, "k-decay of cosine and poly", range="> 0"),
        T("warmup-lr", float, 1e-05, "learning rate at the start of the warm-up", range=">= 0"),
        T("min-lr", float, 0.0, "lower limit of the learning rate", range=">= 0"),
        T("epochs", int, 300, "epochs to train", range=">= 1"),
        T("epoch-repeats", float, 0.0, "repetitions of the data set per epoch", range=">= 0"),
        T("start-epoch", int, None, "first epoch; overrides the checkpoint's", range=">= 0"),
        T("stop-epoch", int, None, "end after this many epochs; the schedule stays that of --epochs", range=">= 1"),
        T("decay-milestones", int, [90, 180, 270], "epochs at which multistep decays", nargs="+"),
        T("decay-epochs", float, None, "step: epochs between decays; wsd, rsqrt: length of the decay", range="> 0"),
        T("warmup-epochs", int, 5, "epochs of warm-up", range=">= 0"),
        T("warmup-prefix", bool, False, "warm up before the schedule instead of within it"),
        T("cooldown-epochs", int, 0, "epochs at --min-lr after a cyclic schedule", range=">= 0"),
        T("patience-epochs", int, 10, "patience of plateau", range=">= 0"),
        T("decay-rate", float, 0.1, "decay factor; the power of poly", short="-dr", range="> 0"),
        T("lr-decay-fn", str, None, "decay of wsd (default: 1-sqrt) and rsqrt (linear)", choices=DECAYS),
        T("lr-stable-timescale", float, None, "timescale of rsqrt in epochs; by default --warmup-epochs", range="> 0"),
    ),
    "Augmentation and regularization": (
        T("no-aug", bool, False, "no training augmentation"),
        T("train-crop-mode", str, None, "training crop; pad is CIFAR's: pad, then crop", choices=CROPS),
        T("scale", float, [0.08, 1.0], "range of the random crop's area", nargs=2, range="> 0"),
        T("ratio", float, [3 / 4, 4 / 3], "range of the random crop's aspect ratio", nargs=2, range="> 0"),
        T("hflip", float, 0.5, "probability of a horizontal flip", range="in [0, 1]"),
        T("vflip", float, 0.0, "probability of a vertical flip", range="in [0, 1]"),
        T("color-jitter", float, 0.4, "color jitter strength", range=">= 0"),
        T("color-jitter-prob", float, None, "probability of color jitter", range="in [0, 1]"),
        T("grayscale-prob", float, 0.0, "probability of a grayscale image", range="in [0, 1]"),
        T("gaussian-blur-prob", float, 0.0, "probability of a blur", range="in [0, 1]"),
        T("aa", str, None, "AutoAugment policy, such as rand-m9-mstd0.5"),
        T("aug-repeats", float, 0, "repetitions of each sample (distributed image folders)", range=">= 0"),
        T("aug-splits", int, 0, "augmentation splits of a batch: 0, or at least 2", range=">= 0"),
        T("loss", str, None, "ce, bce (as --bce-loss) or jsd (as --jsd-loss)", choices=("ce", "bce", "jsd")),
        T("jsd-loss", bool, False, "Jensen-Shannon and cross-entropy loss over --aug-splits"),
        T("bce-loss", bool, False, "binary cross-entropy"),
        T("bce-sum", bool, False, "sum the binary cross-entropy over classes"),
        T("bce-target-thresh", float, None, "threshold for binarizing soft targets"),
        T("bce-pos-weight", float, None, "weight of the positive targets", range="> 0"),
        T("reprob", float, 0.0, "probability of random erasing", range="in [0, 1]"),
        T("remode", str, "pixel", "what random erasing fills with", choices=("const", "rand", "pixel")),
        T("recount", int, 1, "regions to erase", range=">= 1"),
        T("resplit", bool, False, "do not erase the first augmentation split"),
        T("mixup", float, 0.0, "mixup alpha", range=">= 0"),
        T("cutmix", float, 0.0, "cutmix alpha", range=">= 0"),
        T("cutmix-minmax", float, None, "cutmix box size range instead of alpha", nargs=2, range="in [0, 1]"),
        T("mixup-prob", float, 1.0, "probability of mixup or cutmix", range="in [0, 1]"),
        T("mixup-switch-prob", float, 0.5, "probability of cutmix if both are on", range="in [0, 1]"),
        T("mixup-mode", str, "batch", "what shares mixing parameters", choices=("batch", "pair", "elem", "half")),
        T("mixup-off-epoch", int, 0, "epoch from which mixing is off; 0: never", range=">= 0"),
        T("smoothing", float, 0.1, "label smoothing", range="in [0, 1)"),
        T("train-interpolation", str, "random", "training interpolation", choices=RESAMPLING),
        T("drop", float, 0.0, "dropout rate", range="in [0, 1]"),
        T("drop-connect", float, None, "old name of --drop-path", range="in [0, 1]"),
        T("drop-path", float, None, "stochastic depth rate", range="in [0, 1]"),
        T("drop-block", float, None, "drop block rate", range="in [0, 1]"),
    ),
    "Batch normalization and weight averaging": (
        T("bn-momentum", float, None, "BatchNorm momentum", range=">= 0"),
        T("bn-eps", float, None, "BatchNorm epsilon", range="> 0"),
        T("sync-bn", bool, False, "BatchNorm statistics over all processes"),
        T("dist-bn", str, "reduce", "share running statistics after each epoch", choices=("broadcast", "reduce", "")),
        T("split-bn", bool, False, "separate BatchNorm layers per augmentation split"),
        T("model-ema", bool, False, "average the weights, in float32"),
        T("model-ema-force-cpu", bool, False, "keep the average on the CPU, where it is not validated"),
        T("model-ema-decay", float, 0.9998, "decay of the average", range="in [0, 1]"),
        T("model-ema-warmup", bool, False, "warm up the decay"),
    ),
    "Several image sizes": (
        T("train-img-sizes", int, None, "image sizes, one of which is chosen for each batch", nargs="+", range="> 0"),
        T("train-size-probs", float, None, "probability of each of --train-img-sizes", nargs="+", range=">= 0"),
        T("train-size-schedule", str, "constant", "how the choice changes", choices=("constant", "progressive")),
        T("train-size-schedule-spread", float, 0.65, "width of the progressive window, in choices", range=">= 0"),
        T("train-size-random-mix", float, 0.1, "fraction of uniform choice in progressive", range="in [0, 1]"),
        T("train-batches-per-epoch", int, None, "batches per epoch", range=">= 1", aliases=("train-steps-per-epoch",)),
    ),
    "Miscellaneous": (
        B("seed", int, 42, "seed of every random choice", range=">= 0"),
        T("worker-seeding", str, "all", "no effect: every sample has a seed of its own", choices=("all", "part")),
        T("log-interval", int, 50, "updates between log lines", range=">= 1"),
        T("val-interval", int, 1, "epochs between validations and checkpoints", range=">= 1"),
        T("recovery-interval", int, 0, "updates between mid-epoch states (see --checkpoint-interval)", range=">= 0"),
        T("checkpoint-hist", int, 10, "checkpoints to keep", range=">= 1"),
        T("save-epochs", int, [], "also keep milestone-N.pth.tar after N epochs, for each N", nargs="*", range=">= 1"),
        B("workers", int, 4, "data workers per process", short="j", range=">= 0"),
        T("save-images", bool, False, "save the input batch at each log interval"),
        B("pin-mem", bool, False, "pin memory in the loader"),
        B("no-prefetcher", bool, False, "normalize on the CPU, without timm's prefetcher"),
        T("output", str, "", "directory for results; ./output/train if empty"),
        T("experiment", str, "", "name of the run's directory; time and model if empty"),
        T("eval-metric", str, "top1", METRIC, choices=("top1", "top5", "loss")),
        T("use-multi-epochs-loader", bool, False, "no effect: workers always persist across epochs"),
        T("log-wandb", bool, False, "the same as adding wandb to --trackers"),
        T("wandb-project", str, None, "project of wandb and trackio, experiment of MLflow"),
        T("wandb-tags", str, [], "wandb tags", nargs="+"),
        T("wandb-resume-id", str, "", "wandb run to resume; requires --resume"),
    ),
    "Evaluation": (
        V("results-file", str, "", "output file; .json, .csv or .md determines the format"),
        V("results-format", str, "", RESULTS, choices=("json", "csv", "md", "timm")),
        V("checkpoint", str, [], "checkpoint files, or a directory of them, to compare", nargs="+"),
        V("use-ema", bool, False, "evaluate the averaged weights; the default if training validated them"),
        V("split", str, "validation", "split to evaluate"),
        V("num-samples", int, None, "number of images, sampled by --seed", range="> 0"),
        V("valid-labels", str, "", "file of class indices; predictions are restricted to them"),
        V("real-labels", str, "", "ReaL labels of ImageNet validation: a JSON file, or `real` for timm's own"),
        V("use-train-size", bool, False, "use the training resolution, even if the model has another for testing"),
        V("crop-mode", str, None, "how images are cropped", choices=("squash", "border", "center")),
        V("crop-border-pixels", int, None, "border to remove before resizing", range=">= 0"),
        V("test-pool", bool, False, "test-time pooling for larger images"),
        V("reparam", bool, False, "fuse branches that are only for training (reparameterization)"),
        V("retry", bool, False, "halve --batch-size when out of memory (one process)"),
        V("log-freq", int, 10, "batches between progress lines", range="> 0"),
    ),
    "Not supported": (
        *refused("fuser= torchscript=False", NO_JIT, programs=BOTH),
        *refused("aot-autograd=False", NO_JIT, programs=VALIDATE_ONLY),
        *refused("tta=0", "no loader makes the copies that timm averages; evaluate with validate.py"),
        *refused("tf-preprocessing=False", "TensorFlow is not a dependency", programs=VALIDATE_ONLY),
        *refused("metrics-avg=", "use timm's own validate.py for precision, recall and F1", programs=VALIDATE_ONLY),
        *refused("num-gpu=1", "use torchrun --standalone --nproc-per-node N", programs=VALIDATE_ONLY),
        *refused("train-batch-sizes=None variable-batch-loss-scale=none", ONE_BATCH_SIZE, "train-batch-sizes"),
        *refused("task=classification target-format=None multilabel-threshold=0.5", NO_MULTILABEL, "task", BOTH),
        *refused("loss-class-weight=None loss-pos-weight=None", NO_LOSS),
        *refused(
            "loss-weight-power=1.0 class-stats=None asl-gamma-pos=1.0 asl-gamma-neg=4.0 asl-clip=0.05 "
            "asl-reduction=batchmean poly-epsilon=2.0 poly-gamma=0.0 poly-alpha=None twoway-tp=4.0 twoway-tn=1.0 "
            "db-neg-scale=2.0 db-init-bias=0.05 db-focal-gamma=2.0",
            NO_LOSS,
            "loss-class-weight",
        ),
        *refused("naflex-loader=False naflex-max-seq-len=576", NO_NAFLEX, "naflex-loader", BOTH),
        *refused(
            "naflex-train-seq-lens=[128,256,576,784,1024] naflex-patch-sizes=None naflex-patch-size-probs=None "
            "naflex-loss-scale=linear naflex-patchify-channels-first=False",
            NO_NAFLEX,
            "naflex-loader",
        ),
        *refused(
            "kd-model-name=None kd-distill-type=logit kd-loss-type=kl distill-loss-weight=None task-loss-weight=None "
            "kd-temperature=4.0 kd-student-feature-dim=None kd-teacher-feature-dim=None kd-token-distill-type=soft",
            NO_KD,
            "kd-model-name",
        ),
    ),
}
