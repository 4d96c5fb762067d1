"""validate.py, from the command line to the results: settings, models, data sets, evaluations, table, file."""

import hashlib
import logging
import os
import signal
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from samon.cli.eval_model import Job, build, list_checkpoints, list_model_names
from samon.cli.program import run_script
from samon.errors import RunError, Stopped, UserError, error_line, require_matplotlib
from samon.evals import EVALS, load_evaluation, norm_params
from samon.evals.context import EvalContext, EvalDataset, restrict_to_single_labels
from samon.evals.corruptions import corruption_errors
from samon.evals.datasets import EvalSpec, open_dataset, read_specs
from samon.evals.results import Result, ResultsFile, file_stem, markdown, shorten_paths
from samon.files import check_writable
from samon.trainer import model as models
from samon.trainer.combinations import check_combinations
from samon.trainer.config import Config, load_yaml
from samon.trainer.distributed import DistInfo, distributed_session, rank_zero_only
from samon.trainer.flag_rows import VALIDATE
from samon.trainer.flags import Settings, by_key, parse_command_line
from samon.trainer.state import load_file, stored_args, validated_with_ema

log = logging.getLogger("samon")
DESCRIPTION = "Evaluate timm models: accuracy, distribution shifts, attacks, sharpness, feature rank."
# Settings of a training run that its checkpoint brings along: how its model must be evaluated, and its data.
_MODEL_KEYS: tuple[str, ...] = ("num_classes", "in_chans", "img_size", "input_size", "mean", "std", "interpolation")
_MODEL_KEYS += ("crop_pct", "gp", "model_kwargs", "input_img_mode", "fast_norm", "channels_last")
_MODEL_KEYS += ("amp", "amp_dtype", "model_dtype")
_SAME_KEYS = ("dataset", "data_dir", "class_map", "input_key", "target_key", "dataset_trust_remote_code")
_TRAIN_SPLITS = dict.fromkeys(("sharpness_split", "hessian_split", "feature_split"), "train_split")
_DATA_KEYS = {key: key for key in _SAME_KEYS} | {"split": "val_split"} | _TRAIN_SPLITS  # and their names in training
# Settings that do not change the results.
_NON_SEMANTIC = {"workers", "pin_mem", "no_prefetcher", "log_freq", "results_file", "results_format", "overwrite"}
_NON_SEMANTIC |= {"shard_cache", "shard_cache_size", "allow_shell_urls"}
# Evaluations that write a file for each model, and each data set if they read one, by the setting that asks for it.
_FILES_OF = {"class_report": "accuracy", "landscape_figure": "hessian", "norm_tensorboard": "norm_params"}
# The evaluations that read a flag, one of which it needs; for some, the title of their section names it.
_READ_BY = dict.fromkeys(("class-report", "torchcompile"), "accuracy")
_READ_BY |= dict.fromkeys(("split", "num-samples", "bootstrap"), "accuracy or apgd")
for _title, _rows in VALIDATE.items():
    if "--evals" in _title:
        _READ_BY |= dict.fromkeys((flag.name for flag in _rows), _title.rstrip(")").rpartition(" ")[2])


# --- settings -------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> list[Job]:
    """The jobs of a command line, with the settings that checkpoints bring along."""
    given = parse_command_line(VALIDATE, argv, DESCRIPTION)
    if given.get("data"):
        given["data_dir"] = given.get("data_dir") or given["data"]
    if given.get("use_ema") and given.get("no_ema"):
        raise UserError("--use-ema and --no-ema exclude each other; drop one of them")
    checkpoints = list_checkpoints(given.get("checkpoint", []))
    names = list_model_names(given.get("model")) if checkpoints == [""] else [given.get("model")]
    jobs = [resolve(given | ({"model": name} if name else {}), path) for name in names for path in checkpoints]
    short = shorten_paths(job.checkpoint or job.config.model for job in jobs)
    jobs = [replace(job, name=short[job.checkpoint or job.config.model]) for job in jobs]
    config = jobs[0].config
    if config.group and config.bootstrap:
        raise UserError("--group gives a deviation over checkpoints, --bootstrap an interval for each: drop one")
    if config.group and len(jobs) < 2:
        raise UserError("--group: give several checkpoints of one model, --checkpoint A B C")
    _check_file_names(jobs)
    return jobs


def _check_file_names(jobs: list[Job]) -> None:
    """Raise UserError if two models, or a model on two data sets, would write the same file."""
    for key, evaluation in _FILES_OF.items():
        if not getattr(jobs[0].config, key):
            continue
        labels: dict[str, str] = {}
        pairs = [(job.name, spec.name) for job in jobs for _, spec, name in list_tasks(job) if name == evaluation]
        for pair in pairs:
            stem, label = file_stem(*pair), " on ".join(filter(None, pair))
            if labels.setdefault(stem, label) != label:
                both = f"{labels[stem]} and {label}"
                raise UserError(f"--{key.replace('_', '-')}: {both} would both write {stem}; rename one of them")


def check_flags_are_read(keys: Collection[str], evals: set[str]) -> None:
    """Raise UserError if none of the evaluations reads a flag, named by its key."""
    for name, readers in _READ_BY.items():
        if name.replace("-", "_") in keys and evals.isdisjoint(readers.split(" or ")):
            raise UserError(f"--{name} needs --evals {readers}; add it, or drop --{name}")


def resolve(given: Settings, path: str) -> Job:
    """Settings for a checkpoint: defaults < its run's settings < command line."""
    content = load_file(Path(path), "--checkpoint") if path and not path.endswith(".safetensors") else {}
    stored, limit = settings_from_run(given, content)
    defaults = {key: flag.default for key, flag in by_key(VALIDATE).items()}
    values = defaults | {"pretrained": not path} | stored | given
    epsilon = {key: value for key, value in stored.get("model_kwargs", {}).items() if key == "bn_eps"}
    values["model_kwargs"] = epsilon | values["model_kwargs"]  # that of --bn-eps, which validate.py does not have
    if values["model"] is None:
        raise UserError("--model: name the model" + (f", {path} does not" if path else ""))
    config = Config(**values).but(workers=min(values["workers"], os.cpu_count() or 1))
    models.check_model_name(config)
    specs = read_specs(config, load_yaml(config.suite, "--suite") if config.suite else None, limit)
    evals = {name for spec in specs for name in spec.evals}
    others = sorted(evals - {"accuracy"})
    check_flags_are_read(set(given) - (set() if config.feature_split else {"split"}), evals)
    if config.test_pool and "feature_rank" in evals:
        raise UserError("--test-pool replaces the pooling that --evals feature_rank reads; drop one of them")
    if config.results_format == "timm" and evals != {"accuracy"}:
        raise UserError("--results-format timm has columns for accuracy alone; drop it, or the other --evals")
    forced_float32 = False
    for flag, other in (("amp-dtype", "amp"), ("torchcompile-mode", "torchcompile")):
        if flag.replace("-", "_") in given and not getattr(config, other):
            raise UserError(f"--{flag} needs --{other}; add it, or drop --{flag}")
    if (config.amp or config.model_dtype not in (None, "float32")) and others:
        if {"amp", "model_dtype"} & set(given):
            raise UserError("--amp and --model-dtype are for accuracy; the other evaluations are float32, drop them")
        config, forced_float32 = config.but(amp=False, model_dtype=None), "accuracy" in evals
    if config.fsdp and "channels_last" not in given:
        config = config.but(channels_last=False)
    check_combinations(config, by_key(VALIDATE))
    if config.fsdp and others:
        raise UserError(f"--fsdp does not combine with --evals {others[0]}; drop one of them")
    if config.use_ema and not {"state_dict_ema", "model_ema"} & content.keys():
        raise UserError(f"--use-ema: {path or 'the model as created'} has no averaged weights; drop it")
    use_ema = not config.no_ema and (config.use_ema or validated_with_ema(content))
    digest = "" if "class_map" in given else content.get("class_map_digest", "")
    return Job(path, config, use_ema, specs, content.get("class_names"), digest, forced_float32=forced_float32)


def settings_from_run(given: Settings, content: Settings) -> tuple[Settings, int | None]:
    """Return the settings that a checkpoint brings along, and the number of first images that its run validated on.

    A checkpoint of another model than the command line names (up to the tag of pretrained weights) brings none.
    """
    stored = stored_args(content)
    model = content.get("arch") or stored.get("model")
    if not isinstance(model, str) or given.get("model", model).split(".")[0] != model.split(".")[0]:
        return {}, None
    replaced = {"img_size", "input_size"} if given.keys() & {"img_size", "input_size"} else {}
    keys = [key for key in _MODEL_KEYS if stored.get(key) is not None and key not in replaced]
    settings = {key: stored[key] for key in keys} | {"model": model}
    if stored.get("bn_eps") is not None:  # no flag of validate.py
        settings["model_kwargs"] = settings.get("model_kwargs", {}) | {"bn_eps": stored["bn_eps"]}
    if stored.get("val_split"):  # training validates at the training resolution and its crop
        settings["use_train_size"] = True
    if not given.get("suite"):  # which names its own data
        other = given.get("dataset", stored.get("dataset")) != stored.get("dataset")
        names = {key: name for key, name in _DATA_KEYS.items() if not (other and key in _TRAIN_SPLITS)}
        settings |= {key: stored[name] for key, name in names.items() if stored.get(name)}
    own_data = not {"dataset", "split", "num_samples", "suite"} & set(given)  # --data-dir: the data have moved
    return settings, stored.get("val_num_samples") if own_data else None


# --- evaluation -----------------------------------------------------------------------------------------------------


def list_tasks(job: Job) -> Iterator[tuple[str, EvalSpec, str]]:
    """Yield (key, data set, evaluation) of each task of a job; evaluations without data come last."""
    for number, spec in enumerate(job.specs):
        yield from ((f"{number} {name}", spec, name) for name in spec.evals if EVALS[name].needs_data)
    without_data = dict.fromkeys(name for spec in job.specs for name in spec.evals if not EVALS[name].needs_data)
    yield from ((f"- {name}", EvalSpec("", "", "", "", []), name) for name in without_data)


def prepare(context: EvalContext, spec: EvalSpec, name: str) -> tuple[EvalContext, EvalDataset | None]:
    """Open the data set of an evaluation, restrict the model to its classes if need be, and check the settings."""
    evaluation, module = EVALS[name], load_evaluation(name)
    split = getattr(context.config, evaluation.split) if evaluation.split else ""
    dataset = open_dataset(context, spec, split or None) if evaluation.needs_data else None
    if evaluation.single_label and dataset is not None:
        context = replace(context, model=restrict_to_single_labels(name, context.model, dataset))
    if hasattr(module, "check"):
        module.check(context, dataset)
    return context, dataset


def evaluate(context: EvalContext, spec: EvalSpec, name: str) -> list[Result]:
    """Run an evaluation; with --retry, halve --batch-size until it fits in memory (in one process)."""
    while True:
        config, key = context.config, EVALS[name].batch_size
        try:
            return load_evaluation(name).evaluate(*prepare(context, spec, name))
        except torch.OutOfMemoryError as error:
            size = config.batch_size
            if not config.retry or key != "batch_size" or size == 1 or context.world_size > 1:
                flag = f"--{key.replace('_', '-')}"
                raise UserError(f"{name}: out of memory with {flag} {getattr(config, key)}; lower {flag}") from error
        log.warning("%s: out of memory with --batch-size %d; trying %d", name, size, size // 2)
        context = replace(context, config=config.but(batch_size=size // 2))


def evaluate_jobs(jobs: list[Job], dist_info: DistInfo, file: ResultsFile) -> None:
    """Run the tasks of all jobs that have no results yet, and draw the normalization parameters.

    Every checkpoint and data set is opened first, so that no mistake costs finished work. Models by --model names are
    not: each is downloaded in its turn, and one that fails is left out.
    """
    config = jobs[0].config
    rank_zero_only(dist_info, lambda: check_outputs(config))
    earlier = rank_zero_only(dist_info, lambda: file.load(config.overwrite))
    by_name = len(jobs) > 1 and not any(job.checkpoint for job in jobs)
    for job in [] if by_name else jobs:
        context = build(job, dist_info)
        for _, spec, name in list_tasks(job):
            prepare(context, spec, name)
    models_to_draw: dict[str, norm_params.NormValues] = {}
    for number, job in enumerate(jobs):
        try:
            if len(jobs) > 1:
                context = build(job, dist_info)
            evaluate_job(job, number, context, earlier, file, dist_info)
        except (UserError, RuntimeError) as error:
            if not by_name or dist_info.size > 1 or isinstance(error, RunError):  # other processes would wait
                raise
            log.error("%s is left out: %s", job.config.model, error_line(error))
            continue
        if any(name == "norm_params" for *_, name in list_tasks(job)):
            models_to_draw[context.name] = norm_params.norm_values(context.model)
    if by_name and not file.results:
        raise UserError(f"--model: none of the {len(jobs)} models could be evaluated; the log says why")
    if models_to_draw and dist_info.is_rank_zero:
        if config.norm_figure:
            norm_params.plot(models_to_draw, Path(config.norm_figure))
        if config.norm_tensorboard:
            norm_params.write_tensorboard(models_to_draw, Path(config.norm_tensorboard))


def evaluate_job(
    job: Job,
    number: int,
    context: EvalContext,
    earlier: Mapping[str, list[Result]],
    file: ResultsFile,
    dist_info: DistInfo,
) -> None:
    """Run the tasks of a job without `earlier` results, and write after each."""
    config = job.config
    if job.forced_float32:
        log.info("accuracy is in float32, as the other evaluations; without them in the run's own precision")
    model: Result = {"model": config.model}
    model |= {"checkpoint": job.checkpoint, "ema": job.use_ema} if job.checkpoint else {}
    size: Result = {}
    if config.results_format == "timm":
        data, count = context.data_config, sum(p.numel() for p in context.model.parameters())
        size = {"param_count": round(count / 1e6, 2), "img_size": data["input_size"][-1]}
        size |= {key: data[key] for key in ("crop_pct", "interpolation")}
    results: list[Result] = []
    for key, spec, name in list_tasks(job):
        task = f"{number} {key}"
        first = f", first {spec.limit} images" if spec.limit and not EVALS[name].split else ""
        done = ": has results already" if task in earlier else ""
        log.info("%s on %s%s%s", name, spec.name or config.model, first, done)
        about = model | {"dataset": spec.name, "split": spec.split, "eval": name, **spec.metadata} | size
        file.tasks[task] = earlier.get(task) or [about | row for row in evaluate(context, spec, name)]
        rank_zero_only(dist_info, file.write)
        results += file.tasks[task]
    file.tasks[f"{number} mce"] = corruption_errors(results)


def check_outputs(config: Config) -> None:
    """Check that the files and directories to write can be written, and that matplotlib is there for figures."""
    if config.norm_figure or config.landscape_figure:
        require_matplotlib()
    for key in ("results_file", "norm_figure", "landscape_figure", "norm_tensorboard", "apgd_state", "class_report"):
        if path := getattr(config, key):
            is_file = key.endswith(("file", "figure"))
            check_writable(f"--{key.replace('_', '-')}", Path(path) if is_file else Path(path, "file"))


def command_hash(jobs: list[Job]) -> str:
    """Hash of what determines the results of a command: its settings and the files with weights or labels."""
    parts: list[object] = []
    for job in jobs:
        settings = {key: value for key, value in vars(job.config).items() if key not in _NON_SEMANTIC}
        stat = os.stat(job.checkpoint) if job.checkpoint else None
        parts.append((job.checkpoint, stat and (stat.st_size, stat.st_mtime_ns), job.use_ema, sorted(settings.items())))
        parts.append([vars(spec) for spec in job.specs])
        names = filter(None, (job.config.class_map, job.config.valid_labels, job.config.real_labels))
        files = [Path(root, name) for name in names for root in ("", job.config.data_dir or "")]
        parts.append([file.read_bytes() for file in files if file.is_file()])
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def main(argv: list[str] | None = None) -> list[Result]:
    """Run the command line; the table goes to standard output, the log to standard error."""
    jobs = parse(argv)
    config = jobs[0].config
    file = ResultsFile(config.results_file, config.results_format, command_hash(jobs), config.group)
    try:
        with distributed_session(config) as dist_info:
            evaluate_jobs(jobs, dist_info, file)
            if dist_info.is_rank_zero:
                file.finish()
                print(markdown(file.results), end="", flush=True)
    except KeyboardInterrupt:
        resumes = "the same command resumes with what is missing"
        raise Stopped(signal.SIGINT, resumes if file.path else "--results-file would keep the results") from None
    return file.results


if __name__ == "__main__":
    run_script(main)
