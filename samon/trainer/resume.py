"""Restoring a run from a checkpoint: weights, optimizer, schedule, random state, and the position in the data."""

import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path

from timm.models import clean_state_dict
from timm.utils import random_seed
from torch import Tensor, nn

from samon.data.sharding import ReaderLayout
from samon.data.stream import ShardStream
from samon.errors import UserError, reraise_as_user_error
from samon.registry import base_of
from samon.trainer import fsdp
from samon.trainer.ablations import fix_norm
from samon.trainer.apply import parameters
from samon.trainer.build import Run, tail_options
from samon.trainer.dcp import load_sharded
from samon.trainer.run_dir import LAUNCH_FLAGS, without_launch_flags
from samon.trainer.state import DCP_SUFFIX, TrainState, Tree, load_state

log = logging.getLogger("samon")
# Settings that change no weight: where and how often things are read and written. Resuming does not mention them.
NON_SEMANTIC_FLAGS = {
    *LAUNCH_FLAGS,
    *("config", "data", "output", "experiment", "data_dir", "shard_cache", "shard_cache_size", "dataset_download"),
    *("pin_mem", "log_interval", "checkpoint_interval", "recovery_interval", "checkpoint_hist", "checkpoint_format"),
    *("print_config", "save_images", "device"),
    *("trackers", "log_wandb", "wandb_project", "wandb_tags", "wandb_resume_id"),
    *("val_interval", "save_epochs", "validation_batch_size", "no_replay"),
    *("fsdp", "fsdp_reshard_after_forward", "fsdp_replicate"),
}
# Settings of the initial weights.
INITIAL_FLAGS = ("pretrained", "pretrained_path", "initial_checkpoint", "head_init_scale", "head_init_bias")
# What the metric that decides the best epoch is, and is measured on.
DECISIVE_FLAGS = {"eval_metric", "model_ema", "model_ema_force_cpu", "dataset", "val_split", "val_num_samples"}
DECISIVE_FLAGS |= {"img_size", "input_size", "crop_pct", "interpolation", "mean", "std"}
PLATEAU_KEYS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")  # what training changes in this schedule
# Keys of a parameter group that training itself changes; the others are options.
TRAINED_KEYS = {"params", "lr", "step", "lookahead_step"}
START_ANEW = "add the flags it was made with (--opt, --tail-opt), or --no-resume-opt for a new optimizer state"


def restore_run(run: Run, source: Path, started: str) -> tuple[TrainState, Tree | None]:
    """Restore a run, with its position, from a checkpoint.

    Args:
        started: identifies this run. --start-epoch sets the position if the checkpoint is of another one.

    Returns:
        The checkpoint's content, and this process's random state, which is to be set before the next update (None if
        the checkpoint has none for this number of processes).
    """
    config = run.config
    state = load_sharded(source, _sharded_layout(run)) if source.suffix == DCP_SUFFIX else load_state(source)
    changed = changed_settings(run, state.args)
    if state.class_map_digest and state.class_map_digest == run.class_map_digest:  # its file may have moved
        changed.pop("class_map", None)
    if changed and run.dist_info.is_rank_zero:
        idle = " (no effect: the weights are the checkpoint's)"
        text = ", ".join(f"{k} {old} -> {new}{idle * (k in INITIAL_FLAGS)}" for k, (old, new) in changed.items())
        log.warning("settings differ from those in %s: %s", source, text)
    writer = f"--model {state.args.get('model')} --opt {state.args.get('opt')}"
    flags = f"--model {config.model} --opt {config.opt}"
    with reraise_as_user_error(f"{source} does not fit {flags} (it was written by {writer})"):
        _load_model(run, run.model, state.state_dict)
        if run.ema is not None:
            _load_model(run, run.ema.module, state.state_dict_ema or state.state_dict)
        if not config.no_resume_opt:
            if state.optimizer is not None:
                load_optimizer(run, source, state, changed)
            if run.scaler is not None and state.amp_scaler is not None:
                run.scaler.load_state_dict(state.amp_scaler)
    if config.start_epoch is None or state.started == started:
        run.progress = state.progress.next_epoch() if state.progress.epoch_done else state.progress
    random_state = _restore_rank(run, state.ranks)
    _count_updates(run)
    if run.sam is not None and run.sam.replacement is not None and run.tail is not None and run.update not in run.tail:
        raise UserError(
            f"{source} has the state of --tail-opt {config.tail_opt}, and the run would continue at update "
            f"{run.update}, before its tail starts at {run.tail.start}; keep --epochs, --sam-tail and --start-epoch, "
            "or use --no-resume-opt to start with a new optimizer state"
        )
    _restore_stream(run, state)
    if DECISIVE_FLAGS.intersection(changed):  # earlier figures do not compare
        state.scheduler = None
        state.best = {"metric": None, "epoch": None, "kept": [[name, None] for name, _ in state.best.get("kept", [])]}
    fast_forward_scheduler(run, state.scheduler)
    log.info("Continuing %s at epoch %d, update %d", source, run.progress.epoch, run.progress.updates)
    return state, random_state


def _sharded_layout(run: Run) -> dict[str, Tensor]:
    layout = {f"optimizer/{index}": p for index, p in enumerate(parameters(run.optimizer))}
    layout |= {f"state_dict/{name}": t for name, t in run.model.state_dict().items()}
    average = {} if run.ema is None else run.ema.module.state_dict()
    return layout | {f"state_dict_ema/{name}": t for name, t in average.items()}


def _load_model(run: Run, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    state = clean_state_dict(dict(state))
    model.load_state_dict(fsdp.shard_state(state, model.state_dict()) if run.config.fsdp else state)
    if run.config.fix_norm:  # the run may have begun without it
        fix_norm(model)


def changed_settings(run: Run, stored: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """{setting: (in the checkpoint, in this run)} of the settings that differ and affect the result."""
    ignored = NON_SEMANTIC_FLAGS
    if not isinstance(getattr(run.train_loader, "dataset", None), ShardStream):
        ignored = ignored | {"workers"}  # their number decides the order in which shards are read
    current = {k: v for k, v in vars(without_launch_flags(run.config)).items() if k in stored and k not in ignored}
    return {key: (stored[key], value) for key, value in current.items() if stored[key] != value}


# --- optimizer --------------------------------------------------------------------------------------------------------


def describe_optimizer(run: Run) -> Tree:
    """What an optimizer state fits: `base`, timm's name of the base optimizer, and `groups` of parameter names."""
    names = {id(p): name for name, p in run.model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in run.optimizer.param_groups]
    replacement = None if run.sam is None else run.sam.replacement
    base = base_of(run.config.opt, run.config.base_opt) if replacement is None else base_of(replacement["opt"])
    return {"base": base, "groups": groups}


def load_optimizer(run: Run, source: Path, state: TrainState, changed: Collection[str]) -> None:
    """Load the optimizer's state. Options of its groups (weight decay, betas, lr_scale) stay those of this run, and so
    does the learning rate if settings of it have `changed`."""
    optimizer, stored = state.optimizer or {}, state.optimizer_layout
    if "replacement" in optimizer and run.sam is not None and run.config.tail_opt is not None:
        run.sam.replace_base(run.config.tail_opt, run.config.tail_lr, **tail_options(run.config))
    current = describe_optimizer(run)
    base = stored.get("base") or current["base"]  # timm's checkpoints and earlier versions do not name it
    if "base" not in stored and state.args.get("opt"):
        base = base_of(state.args["opt"], state.args.get("base_opt"))
    if base != current["base"]:
        raise UserError(f"{source} has the optimizer state of {base}, and {current['base']} is asked for; {START_ANEW}")
    old_groups, groups = optimizer["param_groups"], run.optimizer.param_groups
    same_sizes = [len(group["params"]) for group in old_groups] == [len(group["params"]) for group in groups]
    if stored.get("groups", current["groups"]) != current["groups"] or not same_sizes:
        raise UserError(
            f"{source} has an optimizer state of other groups of parameters, as --freeze, --layer-decay or the weight "
            f"decay make them; {START_ANEW}"
        )
    trained = TRAINED_KEYS - {"lr"} if {"lr", "sched"}.intersection(changed) else TRAINED_KEYS
    options = [{key: value for key, value in group.items() if key not in trained} for group in groups]
    optimizer = {**optimizer, "param_groups": [old | own for old, own in zip(old_groups, options, strict=True)]}
    if run.sam is not None and run.sam.replacement is None:  # then the base is --opt's, at the schedule's learning rate
        optimizer.pop("replacement", None)
    run.optimizer.load_state_dict(fsdp.shard_optimizer(optimizer, run.optimizer) if run.config.fsdp else optimizer)


# --- position ---------------------------------------------------------------------------------------------------------


def _count_updates(run: Run) -> None:
    """Derive the updates of the epoch from its samples; --batch-size and the processes may have changed since."""
    config, loader, progress = run.config, run.train_loader, run.progress
    left = len(loader) - progress.samples // (config.batch_size * run.dist_info.size)
    progress.updates = run.updates_per_epoch - math.ceil(max(0, left) / config.grad_accum_steps)


def _restore_rank(run: Run, ranks: list[Tree]) -> Tree | None:
    """Restore this process's running statistics; returns its random state."""
    dist_info, progress = run.dist_info, run.progress
    if len(ranks) == dist_info.size:
        own = ranks[dist_info.rank]
        run.model.load_state_dict(own["buffers"], strict=False)
        if run.ema is not None:
            run.ema.module.load_state_dict(own["ema_buffers"], strict=False)
        return own["rng"]
    if ranks:
        log.warning(
            f"The state was saved by {len(ranks)} processes and continues on {dist_info.size}: the epoch resumes after "
            f"{progress.samples} samples, but the order of samples and the random numbers differ"
        )
    random_seed(run.config.seed + progress.epoch, dist_info.rank)
    return None


def _restore_stream(run: Run, state: TrainState) -> None:
    """Tell a stream of shards which samples of the epoch were read, and by how many readers."""
    stream, progress = getattr(run.train_loader, "dataset", None), run.progress
    if not isinstance(stream, ShardStream) or not progress.samples or not state.ranks:
        return
    args, layouts = state.args, [ReaderLayout(*layout) for layout in progress.layouts]
    samples = progress.samples - sum(layout.samples for layout in layouts)
    last = ReaderLayout(len(state.ranks), args["batch_size"], max(1, args["workers"]), args["shuffle_buffer"])
    if last != stream.layout and samples:
        layouts.append(last._replace(samples=samples))
        write = log.warning if run.dist_info.is_rank_zero else log.debug
        write("the number of data workers or processes has changed; they share the remaining samples of this epoch")
    progress.layouts = [list(layout) for layout in layouts]
    stream.layouts = (progress.epoch, layouts)


def fast_forward_scheduler(run: Run, plateau: Tree | None = None) -> None:
    """Set the learning rate of the next update; `plateau` is the state of timm's plateau schedule."""
    if run.scheduler is None:
        return
    if plateau is not None and hasattr(run.scheduler, "lr_scheduler"):
        run.scheduler.lr_scheduler.load_state_dict({key: plateau["inner"][key] for key in PLATEAU_KEYS})
        vars(run.scheduler)["restore_lr"] = plateau["restore_lr"]
    elif run.config.sched_on_updates:
        run.scheduler.step_update(run.update)
    elif run.progress.epoch > 0 or run.config.start_epoch is not None:  # otherwise the rate is the checkpoint's
        run.scheduler.step(run.progress.epoch)
