"""validate.py from command line to results: settings -> model and data sets -> evaluations -> table and file."""

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import yaml
from timm import utils
from timm.data import resolve_data_config
from timm.layers import apply_test_time_pool, set_fast_norm

import samon  # noqa: F401 - registers the networks
from samon.errors import UserError, user_errors
from samon.evals import EVALS, needs_data, norm_params
from samon.evals.entry import Entry, Target, evaluate
from samon.evals.results import Row, markdown, render, result_format
from samon.evals.shifts import SETS
from samon.settings.flag import by_key, nearest, parse_command_line
from samon.settings.rows_validate import VALIDATE

log = logging.getLogger("samon")
DESCRIPTION = "Evaluate timm models: accuracy, distribution shifts, attacks, sharpness, feature rank."
_WEIGHTS = (".pth.tar", ".pth", ".safetensors")
# Settings of a training run that its checkpoint carries and that decide how it must be evaluated.
_FROM_CHECKPOINT = (
    "num_classes",
    "in_chans",
    "img_size",
    "input_size",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "gp",
    "model_kwargs",
    "input_img_mode",
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Settings; ``given`` keeps those that the command line names."""
    given = parse_command_line(VALIDATE, argv, "validate.py", DESCRIPTION)
    flags = by_key(VALIDATE)
    for key, value in given.items():
        if flags[key].refused and value != flags[key].default:
            raise UserError(f"{flags[key].flag} is not honoured: {flags[key].refused}")
    args = argparse.Namespace(**{key: flag.default for key, flag in flags.items()} | given, given=set(given))
    args.data_dir = args.data_dir or args.data
    args.evals = _evals(args.evals, "--evals")
    args.workers = min(args.workers, os.cpu_count() or 1)
    if args.results_file:
        result_format(args.results_file, args.results_format)
    low = args.amp or args.model_dtype not in (None, "float32")
    if low and set(args.evals) - {"accuracy"}:
        raise UserError("--amp and --model-dtype are for accuracy; the other evaluations are float32, drop them")
    if not args.suite and not args.data_dir and any(map(needs_data, args.evals)):
        raise UserError("no data set; give --data-dir, or several with --suite")
    return args


def _evals(text: str | list[str], where: str) -> list[str]:
    names = text.split(",") if isinstance(text, str) else text
    for name in names:
        if name not in EVALS:
            raise UserError(f"{where}: unknown evaluation {name!r}{nearest(name, EVALS)}; use {', '.join(EVALS)}")
    return names


def entries(args: argparse.Namespace) -> list[Entry]:
    """The data sets of ``--suite``, or the one of ``--data-dir``."""
    if not args.suite:
        name = args.dataset or Path(args.data_dir or "").name
        return [Entry(name, args.dataset, args.data_dir or "", args.split, args.evals)]
    try:
        content = yaml.safe_load(Path(args.suite).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--suite {args.suite} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, list) or not content or not all(isinstance(item, dict) for item in content):
        raise UserError(f"--suite {args.suite}: write a list of data sets such as {{set: imagenet-r, data_dir: DIR}}")
    return [_suite_entry(item, f"--suite {args.suite}", args) for item in content]


def _suite_entry(item: dict[str, Any], where: str, args: argparse.Namespace) -> Entry:
    keys = ("set", "name", "dataset", "data_dir", "split", "evals")
    for key in item:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, keys)}; use {', '.join(keys)}")
    kind = item.get("set", "")
    if kind and kind not in SETS:
        raise UserError(f"{where}: unknown set {kind!r}{nearest(kind, SETS)}; use {', '.join(SETS)}")
    if "data_dir" not in item:
        raise UserError(f"{where}: {item} has no data_dir")
    name = item.get("name") or kind or item.get("dataset") or Path(item["data_dir"]).name
    evals = _evals(item["evals"], where) if "evals" in item else args.evals
    split = item.get("split", "" if kind else args.split)
    return Entry(str(name), item.get("dataset", ""), str(item["data_dir"]), str(split), evals, kind)


def checkpoints(args: argparse.Namespace) -> list[str]:
    """Checkpoint files to evaluate; ``''`` stands for the model as it is created."""
    found = []
    for path in args.checkpoint:
        if Path(path).is_dir():
            inside = [str(p) for p in sorted(Path(path).iterdir()) if p.name.endswith(_WEIGHTS)]
            if not inside:
                raise UserError(f"--checkpoint {path}: no {', '.join(_WEIGHTS)} file in this directory")
            found += inside
        elif not Path(path).is_file():
            raise UserError(f"--checkpoint {path}: no such file")
        else:
            found.append(path)
    return found or [""]


def settle_model(args: argparse.Namespace, checkpoint: str) -> argparse.Namespace:
    """Settings with the model's name, and what the command line leaves open taken from the checkpoint."""
    args = argparse.Namespace(**vars(args))
    if args.model is None:
        stored: Any = {}
        if checkpoint and not checkpoint.endswith(".safetensors"):
            with user_errors(f"--checkpoint {checkpoint}"), torch.serialization.safe_globals([argparse.Namespace]):
                stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
        trained = stored.get("args") if isinstance(stored, dict) else None
        if not isinstance(stored, dict) or not stored.get("arch"):
            raise UserError("--model: name the model" + (f", {checkpoint} does not" if checkpoint else ""))
        args.model = stored["arch"]
        settings = trained if isinstance(trained, dict) else vars(trained) if trained else {}
        for key in _FROM_CHECKPOINT:
            if key not in args.given and settings.get(key) is not None:
                setattr(args, key, settings[key])
    if not args.model.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(args.model):
        raise UserError(f"--model: unknown model {args.model!r}{nearest(args.model, timm.list_models())}")
    return args


def build(args: argparse.Namespace, checkpoint: str, device: torch.device, rank: int, world: int) -> Target:
    """The model with its weights on the device, and how its images are prepared."""
    set_fast_norm(args.fast_norm)
    utils.random_seed(args.seed)  # without weights to load, every process makes the same ones
    in_chans = args.in_chans or (args.input_size or [3])[0]
    args.in_chans = in_chans
    with user_errors(f"--model {args.model}"):
        model = timm.create_model(
            args.model,
            pretrained=args.pretrained and not checkpoint,
            num_classes=args.num_classes,
            in_chans=in_chans,
            global_pool=args.gp,
            **args.model_kwargs,
        )
    args.num_classes = model.num_classes
    args.input_img_mode = args.input_img_mode or ("L" if in_chans == 1 else "RGB")
    if checkpoint:
        try:
            timm.models.load_checkpoint(model, checkpoint, args.use_ema)
        except Exception as error:  # a damaged file can make the unpickler raise anything
            text = " ".join(str(error).split())[:300]
            raise UserError(f"--checkpoint {checkpoint}: {type(error).__name__}: {text}") from error
    with user_errors():
        data_config = resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size)
    if args.test_pool:
        model, _ = apply_test_time_pool(model, data_config)
    if args.reparam:
        model = utils.reparameterize_model(model)
    model.to(device=device, dtype=getattr(torch, args.model_dtype) if args.model_dtype else None)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    _probe(args, model.eval(), data_config["input_size"], device)
    dtype = torch.bfloat16 if args.amp_dtype == "bfloat16" else torch.float16
    autocast = partial(torch.autocast, device_type=device.type, dtype=dtype) if args.amp else nullcontext
    return Target(args, model, data_config, device, rank, world, autocast)


def _probe(args: argparse.Namespace, model: torch.nn.Module, size: tuple[int, ...], device: torch.device) -> None:
    """One image through the model, so that a size it does not take is told before any data is read."""
    with torch.no_grad():
        try:
            model(torch.zeros(1, *size, device=device, dtype=next(model.parameters()).dtype))
        except (AssertionError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(
                f"{args.model} does not take images of {list(size)} ({text}); give --img-size, and for "
                "transformers --model-kwargs img_size=N as well"
            ) from None


def results(args: argparse.Namespace, device: torch.device, rank: int, world: int) -> Iterator[Row]:
    """Every row of every model; the figure and histograms of normalization parameters on the way."""
    sets = entries(args)
    paths = checkpoints(args)
    seen: dict[str, norm_params.Values] = {}
    for path in paths:
        settled = settle_model(args, path)
        target = build(settled, path, device, rank, world)
        about: Row = {"model": settled.model} | ({"checkpoint": path} if path else {})
        for entry in sets:
            yield from evaluate(target, entry, about)
        if "norm_params" in args.evals:
            place = {"dataset": "", "split": "", "eval": "norm_params"}
            yield from ({**about, **place, **row} for row in norm_params.rows(target))
            seen["/".join(Path(path).parts[-2:]) or settled.model] = norm_params.values(target.model)
    if seen and rank == 0:
        if args.norm_figure:
            norm_params.plot(seen, Path(args.norm_figure))
        if args.norm_tensorboard:
            norm_params.write_tensorboard(seen, Path(args.norm_tensorboard))


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the command line; the table goes to standard output, the log to standard error."""
    args = parse(argv)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    with user_errors("--device"):
        torch.device(args.device)
        where = argparse.Namespace(device=args.device, dist_backend=None, dist_url=None)
        device = utils.init_distributed_device(where)
    rank, world = where.rank, where.world_size
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s")
    try:
        rows = list(results(args, device, rank, world))
        if rank == 0:
            print(markdown(rows), end="", flush=True)
            if args.results_file:
                path = Path(args.results_file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(render(rows, result_format(args.results_file, args.results_format)))
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    return rows
