"""validate.py from command line to results: settings -> model and data sets -> evaluations -> table and file."""

import filecmp
import hashlib
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm import utils

from samon.data.sources import check_name
from samon.errors import RunError, Stopped, UserError, require_matplotlib
from samon.evals import EVALS, accuracy, corruptions, evaluation, needs_data, norm_params
from samon.evals.entry import Entry, Target
from samon.evals.model import create, model_names, test_time_pooling
from samon.evals.results import Results, Row, markdown, result_format
from samon.evals.shifts import SETS
from samon.files import check_writable
from samon.trainer import fsdp as sharding
from samon.trainer import model as models
from samon.trainer.config import Config, check_combinations, load_yaml
from samon.trainer.distributed import DistInfo, distributed_session, rank_zero_only
from samon.trainer.flag_rows import VALIDATE
from samon.trainer.flags import by_key, nearest, parse_command_line
from samon.trainer.state import SUFFIX, load_file, load_weights, stored_args, validated_with_ema

log = logging.getLogger("samon")
DESCRIPTION = "Evaluate timm models: accuracy, distribution shifts, attacks, sharpness, feature rank."
_WEIGHTS = (SUFFIX, ".pth", ".safetensors")
# What a training run's checkpoint brings along: settings that decide how its model must be evaluated, and its data.
_MODEL = ("num_classes", "in_chans", "img_size", "input_size", "mean", "std", "interpolation", "crop_pct", "gp")
_STORED = (*_MODEL, "model_kwargs", "input_img_mode", "fast_norm", "channels_last")
_DATA = ("dataset", "data_dir", "class_map", "input_key", "target_key", "dataset_trust_remote_code")
_INDIFFERENT = {"workers", "pin_mem", "no_prefetcher", "log_freq", "results_file", "results_format", "overwrite"}
_INDIFFERENT |= {"shard_cache", "shard_cache_size", "allow_shell_urls"}
_PRECISION = ("amp", "amp_dtype", "model_dtype")


@dataclass(frozen=True)
class Job:
    """One model to evaluate."""

    path: str  # its checkpoint; '' for the model as it is created
    config: Config
    average: bool  # evaluate the checkpoint's averaged weights
    entries: list[Entry]
    class_names: list[str] | None = None  # that the checkpoint was trained on
    name: str = ""  # tells it from the other jobs, in files
    float32: bool = False  # accuracy is not in the precision of the run, because of other evaluations


def parse(argv: list[str] | None) -> list[Job]:
    """The command line, with what its checkpoints bring along; every mistake in it is a UserError."""
    given = parse_command_line(VALIDATE, argv, DESCRIPTION)
    given |= {"data_dir": given.get("data_dir") or given["data"]} if given.get("data") else {}
    if given.get("use_ema") and given.get("no_ema"):
        raise UserError("--use-ema and --no-ema exclude each other; drop one of them")
    if given.get("results_file"):
        result_format(given["results_file"], given.get("results_format", ""))
    evaluations(given.get("evals", "accuracy"), "--evals")
    paths = checkpoints(given.get("checkpoint", []))
    chosen = model_names(given.get("model")) if paths == [""] else [given.get("model")]
    jobs = [settle(given | ({"model": name} if name else {}), path) for name in chosen for path in paths]
    names = shortest_names([job.path or job.config.model for job in jobs])
    jobs = [replace(job, name=name) for job, name in zip(jobs, names, strict=True)]
    check_names(jobs)
    return jobs


def check_names(jobs: list[Job]) -> None:
    """Raise UserError if two models or data sets would write files of one name."""
    if jobs[0].config.class_report:
        pairs = [(job.name, entry.name) for job in jobs for entry in job.entries if "accuracy" in entry.evals]
        _check_unique("--class-report", {" on ".join(pair): accuracy.report_name(*pair) for pair in pairs})
    if jobs[0].config.norm_tensorboard:
        _check_unique("--norm-tensorboard", {job.name: norm_params.directory_name(job.name) for job in jobs})


def _check_unique(flag: str, files: dict[str, str]) -> None:
    for file, count in Counter(files.values()).items():
        if count > 1:
            both = " and ".join(name for name, other in files.items() if other == file)
            raise UserError(f"{flag}: {both} would both write {file}; rename one of them")


def shortest_names(paths: list[str]) -> list[str]:
    """The last two parts of each path, or as many more as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for count in range(2, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def evaluations(text: str | list[str], where: str) -> list[str]:
    """The names of evaluations in a list, or in a text with commas."""
    names = text.split(",") if isinstance(text, str) else text
    for name in names:
        if name not in EVALS:
            raise UserError(f"{where}: unknown evaluation {name!r}{nearest(name, EVALS)}; use {', '.join(EVALS)}")
    return names


def checkpoints(paths: list[str]) -> list[str]:
    """Checkpoint files to evaluate: of a run's directory its best; ``''`` stands for the model as it is created."""
    found: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            inside = {p.name: str(p) for p in sorted(Path(path).iterdir()) if p.name.endswith(_WEIGHTS)}
            if not inside:
                raise UserError(f"--checkpoint {path}: no {', '.join(_WEIGHTS)} file in this directory")
            chosen = next((name for name in (f"model_best{SUFFIX}", f"last{SUFFIX}") if name in inside), None)
            found += [inside[chosen]] if chosen else different(list(inside.values()))
        elif not Path(path).is_file():
            raise UserError(f"--checkpoint {path}: no such file")
        else:
            found.append(path)
    return list(dict.fromkeys(found)) or [""]


def different(paths: list[str]) -> list[str]:
    """The files without those whose content is an earlier one's, under another name."""
    kept: list[str] = []
    for path in paths:
        twin = next((other for other in kept if filecmp.cmp(path, other, shallow=False)), None)
        if twin:
            log.info("%s is the same file as %s: evaluated once", path, twin)
        else:
            kept.append(path)
    return kept


def settle(given: dict[str, Any], path: str) -> Job:
    """Settings for one checkpoint: defaults < what its run was made with < command line."""
    content = load_file(Path(path), "--checkpoint") if path and not path.endswith(".safetensors") else {}
    stored, first = from_run(given, content)
    defaults = {key: flag.default for key, flag in by_key(VALIDATE).items()}
    values = defaults | {"pretrained": not path} | stored | given
    if values["model"] is None:
        raise UserError("--model: name the model" + (f", {path} does not" if path else ""))
    config = Config(**values).but(workers=min(values["workers"], os.cpu_count() or 1))
    models.check_model_name(config)
    entries = data_sets(config, first)
    wanted = {name for entry in entries for name in entry.evals}
    if config.test_pool and "feature_rank" in wanted:
        raise UserError("--test-pool replaces the pooling that --evals feature_rank reads; drop one of them")
    if config.results_format == "timm" and wanted != {"accuracy"}:
        raise UserError("--results-format timm has a place for accuracy alone; drop it, or the other --evals")
    float32 = False
    if (config.amp or config.model_dtype not in (None, "float32")) and wanted - {"accuracy"}:
        if {"amp", "model_dtype"} & set(given):
            raise UserError("--amp and --model-dtype are for accuracy; the other evaluations are float32, drop them")
        config, float32 = config.but(amp=False, model_dtype=None), "accuracy" in wanted
    if config.fsdp and "channels_last" not in given:
        config = config.but(channels_last=False)
    check_combinations(config, by_key(VALIDATE))
    if config.fsdp and wanted != {"accuracy"}:
        raise UserError(f"--fsdp does not combine with --evals {min(wanted - {'accuracy'})}; drop one of them")
    if config.use_ema and not {"state_dict_ema", "model_ema"} & content.keys():
        raise UserError(f"--use-ema: {path or 'the model as it is created'} has no averaged weights; drop it")
    average = not config.no_ema and (config.use_ema or validated_with_ema(content))
    return Job(path, config, average, entries, content.get("class_names"), float32=float32)


def from_run(given: Mapping[str, Any], content: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """(settings that a checkpoint brings along, how many images from the front its run validated on).

    A checkpoint of another model than the command line names brings nothing.
    """
    stored = stored_args(content)
    model = content.get("arch") or stored.get("model")
    if not isinstance(model, str) or given.get("model", model) != model:
        return {}, None
    data = () if given.get("suite") else _DATA
    found = {key: stored[key] for key in (*_STORED, *data, *_PRECISION) if stored.get(key) is not None}
    found["model"] = model
    if stored.get("val_split"):  # training validates at the training resolution and its crop
        found |= {"split": stored["val_split"], "use_train_size": True}
    own = not {"data_dir", "dataset", "split", "num_samples", "suite"} & set(given)
    return found, stored.get("val_num_samples") if own else None


def data_sets(config: Config, first: int | None) -> list[Entry]:
    """The data sets of ``--suite``, or the one of ``--data-dir``."""
    names = evaluations(config.evals, "--evals")
    if not config.suite:
        if any(map(needs_data, names)):
            check_name(config.dataset, config.data_dir)
        name = config.dataset or Path(config.data_dir or "").name
        return [Entry(name, config.dataset, config.data_dir or "", config.split, names, first=first)]
    content = load_yaml(config.suite, "--suite")
    if not isinstance(content, list) or not content or not all(isinstance(item, dict) for item in content):
        raise UserError(f"--suite {config.suite}: write a list of data sets such as {{set: imagenet-r, data_dir: DIR}}")
    where = f"--suite {config.suite}"
    entries = distinct([_suite_entry(item, where, config, names) for item in content], where)
    return [part for e in entries for part in (corruptions.parts(e) if e.kind == "imagenet-c" else [e])]


def distinct(entries: list[Entry], where: str) -> list[Entry]:
    """The entries, with their split in the name where the name alone does not tell them apart.

    Raises:
        UserError: two entries have one name and one split.
    """
    counts = Counter(entry.name for entry in entries)
    found = [
        replace(entry, name=f"{entry.name} {entry.split}".strip()) if counts[entry.name] > 1 else entry
        for entry in entries
    ]
    for name, count in Counter(entry.name for entry in found).items():
        if count > 1:
            raise UserError(f"{where}: {count} entries are called {name!r}; give each a `name` of its own")
    return found


def _suite_entry(item: dict[str, Any], where: str, config: Config, names: list[str]) -> Entry:
    keys = ("set", "name", "dataset", "data_dir", "split", "evals")
    for key, value in item.items():
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), keys)}; use {', '.join(keys)}")
        texts = value if key == "evals" and isinstance(value, list) and value else [value]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: {key} is {value!r}; it must be a text; write it in quotes")
    kind = item.get("set", "")
    if kind and kind not in SETS:
        raise UserError(f"{where}: unknown set {kind!r}{nearest(kind, SETS)}; use {', '.join(SETS)}")
    if "data_dir" not in item:
        raise UserError(f"{where}: {item} has no data_dir")
    name = item.get("name") or kind or item.get("dataset") or Path(item["data_dir"]).name
    evals = evaluations(item["evals"], where) if "evals" in item else names
    split = item.get("split", "" if kind and not item.get("dataset") else config.split)
    root = Path(config.data_dir or "") / item["data_dir"]
    return Entry(str(name), item.get("dataset", ""), str(root), str(split), evals, kind)


def build(job: Job, world: DistInfo) -> Target:
    """The model with its weights on the device, and how its images are prepared."""
    config = models.resolve_precision(job.config, world)
    utils.random_seed(config.seed)  # without weights to load, every process makes the same ones
    model = create(config, pretrained=config.pretrained and not job.path)
    if job.path:
        load_weights(model, job.path, job.average)
        which = "averaged weights" if job.average else "weights"
        log.info("%s: the %s of %s", config.model, which, job.path)
    data_config = models.resolve_data_config(config, model, use_test_size=not config.use_train_size)
    if config.reparam:
        model = utils.reparameterize_model(model)
    if config.test_pool:
        model = test_time_pooling(config, model, data_config)
    mesh = sharding.make_mesh(config, world) if config.fsdp else None
    model = models.place_model(
        config, model, world if mesh is None else replace(world, device=torch.device("cpu"))
    ).eval()
    size = data_config["input_size"]
    if text := models.input_size_error(model, size):  # told before any data is read
        raise UserError(f"{config.model} does not take images of {list(size)} ({text}); give another --img-size")
    if mesh is not None:
        sharding.shard_model(config, model, world, mesh)
    autocast = models.make_autocast(config, world.device)
    return Target(config, model, data_config, world.device, world.rank, world.size, autocast, job.name, job.class_names)


def pieces(job: Job) -> Iterator[tuple[str, Entry, str]]:
    """(its key, data set, evaluation) of every piece of a job's work; what looks at the weights alone comes last."""
    for number, entry in enumerate(job.entries):
        yield from ((f"{number} {name}", entry, name) for name in filter(needs_data, entry.evals))
    alone = dict.fromkeys(name for entry in job.entries for name in entry.evals if not needs_data(name))
    yield from ((f"- {name}", Entry("", "", "", "", []), name) for name in alone)


def check(jobs: list[Job], world: DistInfo) -> Target:
    """Opens every checkpoint and data set once, so that no mistake costs finished work; the last job's model."""
    for job in jobs:
        target = build(job, world)
        for _, entry, name in pieces(job):
            evaluation(name).prepare(target, entry)
    return target


def evaluate(jobs: list[Job], world: DistInfo, results: Results) -> None:
    """Every piece of every job that is not there yet; the figure and histograms of normalization parameters."""
    config = jobs[0].config
    rank_zero_only(world, lambda: check_paths(config))
    found = rank_zero_only(world, lambda: results.load(config.overwrite))
    bulk = len(jobs) > 1 and not any(job.path for job in jobs)  # by their names: each is downloaded when its turn comes
    ready = None if bulk else check(jobs, world)
    seen: dict[str, norm_params.Values] = {}
    for number, job in enumerate(jobs):
        try:
            target = ready if ready is not None and len(jobs) == 1 else build(job, world)
            evaluate_job(job, number, target, world, found, results, seen)
        except (UserError, RuntimeError) as error:
            if not bulk or world.size > 1 or isinstance(error, RunError):  # other processes would wait for this one
                raise
            log.error("%s is left out: %s", job.config.model, " ".join(str(error).split())[:300])
    if bulk and not results.rows:
        raise UserError(f"--model: none of the {len(jobs)} models could be evaluated; the log says why")
    if seen and world.is_rank_zero:
        if config.norm_figure:
            norm_params.plot(seen, Path(config.norm_figure))
        if config.norm_tensorboard:
            norm_params.write_tensorboard(seen, Path(config.norm_tensorboard))


def evaluate_job(
    job: Job,
    number: int,
    target: Target,
    world: DistInfo,
    found: Mapping[str, list[Row]],
    results: Results,
    seen: dict[str, norm_params.Values],
) -> None:
    """The pieces of a job that are not `found`, into `results`; into `seen` the values of normalization parameters."""
    config = job.config
    if job.float32:
        log.info("accuracy is in float32, as the other evaluations; without them in the run's own precision")
    for key, entry, name in pieces(job):
        rows = found.get(f"{number} {key}")
        log.info("%s on %s%s", name, entry.name or config.model, " is there already" if rows else "")
        about: Row = {"model": config.model} | ({"checkpoint": job.path} if job.path else {})
        about |= {"dataset": entry.name, "split": entry.split, "eval": name, **entry.about}
        about |= timm_facts(target) if config.results_format == "timm" else {}
        rows = rows or [{**about, **row} for row in evaluation(name).rows(target, entry)]
        results.pieces[f"{number} {key}"] = rows
        rank_zero_only(world, results.write)
        if name == "norm_params" and (config.norm_figure or config.norm_tensorboard):
            seen[target.name] = norm_params.values(target.model)
    mine = [row for key, _, _ in pieces(job) for row in results.pieces[f"{number} {key}"]]
    results.pieces[f"{number} mce"] = corruptions.errors(mine)


def timm_facts(target: Target) -> Row:
    """What timm's results say of a model beside its accuracy: millions of parameters, and how images are prepared."""
    data, count = target.data_config, sum(p.numel() for p in target.model.parameters())
    facts: Row = {"param_count": round(count / 1e6, 2), "img_size": data["input_size"][-1]}
    return facts | {key: data[key] for key in ("crop_pct", "interpolation")}


def check_paths(config: Config) -> None:
    """Every file and directory that will be written to, and the package that draws them."""
    if config.norm_figure or config.landscape_figure:
        require_matplotlib()
    directories = ("norm_tensorboard", "apgd_state", "class_report")
    for key in ("results_file", "norm_figure", "landscape_figure", *directories):
        if path := getattr(config, key):
            check_writable(f"--{key.replace('_', '-')}", Path(path, "file") if key in directories else Path(path))


def fingerprint(jobs: list[Job]) -> str:
    """What decides the figures of a command: its settings and the files it reads the weights from."""
    told: list[Any] = []
    for job in jobs:
        values = {key: value for key, value in vars(job.config).items() if key not in _INDIFFERENT}
        stat = os.stat(job.path) if job.path else None
        told.append((job.path, stat and (stat.st_size, stat.st_mtime_ns), job.average, sorted(values.items())))
        told.append([vars(entry) for entry in job.entries])
    return hashlib.sha256(repr(told).encode()).hexdigest()


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the command line; the table goes to standard output, the log to standard error."""
    jobs = parse(argv)
    config = jobs[0].config
    results = Results(config.results_file, config.results_format, fingerprint(jobs), config.group)
    if config.group and config.bootstrap:
        raise UserError("--group gives a deviation over checkpoints, --bootstrap an interval for each: drop one")
    if config.group and len(jobs) < 2:
        raise UserError("--group: give several checkpoints of one model, --checkpoint A B C")
    try:
        with distributed_session(config) as world:
            evaluate(jobs, world, results)
            if world.is_rank_zero:
                results.finish()
                print(markdown(results.rows), end="", flush=True)
    except KeyboardInterrupt:
        kept = "the same command goes on with what is missing" if results.path else "--results-file would keep the rows"
        raise Stopped(signal.SIGINT, kept) from None
    return results.rows
