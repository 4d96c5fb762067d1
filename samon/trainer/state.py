"""Where a run lives, what it continues from, and how its state is taken and put back."""

import datetime
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm import utils
from timm.models import clean_state_dict, safe_model_name
from torch import nn

from samon import rng as generators
from samon.data.stream import ReaderLayout, ShardStream
from samon.errors import UserError
from samon.files import check_writable, write_text
from samon.trainer import checkpoint
from samon.trainer import dcp as parts
from samon.trainer import distributed as elastic
from samon.trainer import fsdp as sharding
from samon.trainer.build import Run
from samon.trainer.checkpoint import OVERWRITTEN, PARTS, SUFFIX, Checkpoints, Progress, TrainState, settings_of
from samon.trainer.config import AUTO, FLAGS, Config, dump, read_yaml
from samon.trainer.control import Control
from samon.trainer.optimizer_state import layout, load_optimizer

log = logging.getLogger("samon")
ARGS = "args.yaml"
# How a run is started is not how it is made.
OF_A_START = ("resume", "no_resume_opt", "start_epoch", "stop_epoch", "overwrite")
# Of the settings, those that change no weight: where things are written and read, and how often.
INDIFFERENT = {*OF_A_START, "config", "data", "output", "experiment", "data_dir", "shard_cache", "shard_cache_size"}
INDIFFERENT |= {"workers", "pin_mem", "log_interval", "checkpoint_interval", "recovery_interval", "checkpoint_hist"}
INDIFFERENT |= {"print_config", "save_images", "log_wandb", "wandb_project", "wandb_tags", "wandb_resume_id", "device"}
INDIFFERENT |= {"val_interval", "save_epochs", "validation_batch_size", "no_replay", "dataset_download"}
INDIFFERENT |= {"fsdp", "fsdp_reshard_after_forward", "fsdp_replicate", "checkpoint_format"}
READERS = {"workers"}  # which decide the order in which shards are read


@dataclass(frozen=True)
class Place:
    """Where a run lives, the same on all processes."""

    directory: Path
    started: str  # identifies the run
    source: Path | None  # the state to continue from
    same_run: bool  # which the directory is that run's


def locate(config: Config) -> Place:
    """Find or make the run's directory, and the state to continue from; for rank 0, which tells the others."""
    directory = _directory(config)
    started, word = _identity(directory)
    restarted = bool(word) and word == elastic.word()
    old = directory / OVERWRITTEN
    if old.is_dir() and not (restarted or config.overwrite or _states(directory)):
        what = "is the run that --overwrite was about to replace"
        raise UserError(f"{old} {what}; move its files to {directory}, or give --overwrite again")
    auto = config.resume == AUTO
    source = _newest(directory, started) if restarted or auto else None
    same_run = restarted or source is not None
    if source is None:
        started = None
        if restarted:
            log.warning("Restarted before a state was saved in %s: starting over", directory)
    if source is None and config.resume and not auto:
        source = _state_of(config.resume)
        same_run = source.parent.resolve() == directory.resolve()
        started = str(checkpoint.read(source).get("started", "")) if same_run else None
    if not same_run and not config.overwrite and (states := _states(directory)):
        raise UserError(
            f"{directory} holds a run ({states[0].name}); --resume {directory} goes on with it, --overwrite starts "
            "over, another --experiment keeps both"
        )
    check_writable("--output", directory / ARGS if directory.is_dir() else directory)
    return Place(directory, started or datetime.datetime.now().isoformat(), source, same_run)


def _states(directory: Path) -> list[Path]:
    """The complete states in a directory, of any run."""
    parts = [path for path in directory.glob(f"*{PARTS}") if (path / ".metadata").is_file()]
    return sorted([*directory.glob(f"*{SUFFIX}"), *parts])


def _files(directory: Path) -> list[Path]:
    """Everything that a run writes to its directory."""
    names = ("summary.csv", "log.txt", "run.json", "tb", "train-batch-*.jpg", f"*{SUFFIX}", f"*{PARTS}", ARGS)
    return [path for name in names for path in directory.glob(name)]


def begin(place: Place, config: Config) -> None:
    """Start to write to the run's directory; `config`: with what building settled.

    Another run there with states moves to `OVERWRITTEN`, which goes when the new run has saved its first state.
    """
    try:
        place.directory.mkdir(parents=True, exist_ok=True)
        if not place.same_run and (place.directory / ARGS).exists():
            old = place.directory / OVERWRITTEN
            move = bool(_states(place.directory))
            if move:
                checkpoint.remove(old)
                old.mkdir()
            for path in _files(place.directory):
                path.rename(old / path.name) if move else checkpoint.remove(path)
        text = f"# started {place.started} {elastic.word()}\n{dump(lasting(config))}"
        write_text(place.directory / ARGS, text)
    except OSError as error:
        raise UserError(f"cannot write to {place.directory}: {error.strerror}; choose another --output") from None


def put_back(directory: Path) -> None:
    """Return the run in `OVERWRITTEN` to its place if the one that was to replace it has saved nothing."""
    old = directory / OVERWRITTEN
    if old.is_dir() and not _states(directory):
        for path in _files(directory):
            checkpoint.remove(path)
        for path in old.iterdir():
            path.rename(directory / path.name)
        old.rmdir()


def stored_settings(resume: str) -> dict[str, Any]:
    """What the run that `--resume` names was made with, for a command line that says no more than that.

    Raises:
        UserError: there is no such run.
    """
    if (path := Path(resume, ARGS)).is_file():
        found = read_yaml(str(path))
    else:
        stored = settings_of(checkpoint.read(_state_of(resume)))
        found = {key: value for key, value in stored.items() if key in FLAGS}
    return {key: value for key, value in found.items() if key not in (*OF_A_START, "output", "experiment")}


def _state_of(resume: str) -> Path:
    """The state that `--resume` names: a file, or the newest one of a directory's run.

    Raises:
        UserError: there is none.
    """
    path = Path(resume)
    if not path.exists():
        raise UserError(f"--resume {resume}: no such file or directory")
    if not path.is_dir() or path.suffix == PARTS:
        return path
    newest = _newest(path, _identity(path)[0])
    if newest is None:
        raise UserError(f"no complete training state in {resume}; name a checkpoint file or drop --resume")
    return newest


def _newest(directory: Path, started: str | None) -> Path | None:
    path, _, passed = checkpoint.newest(directory, started)
    for reason in passed:
        log.warning("Passed over: %s", reason)
    return path


def _directory(config: Config) -> Path:
    root = Path(config.output or "output/train")
    if config.experiment:
        return root / config.experiment
    if config.resume and Path(config.resume).is_dir() and Path(config.resume).suffix != PARTS:
        return Path(config.resume)
    model = safe_model_name(config.model)
    if elastic.restartable():  # the same name after a restart
        if not elastic.run_id():
            raise UserError("torchrun --max-restarts needs --experiment NAME, by which a restart finds its directory")
        return root / f"{elastic.run_id()}-{model}"
    return root / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{model}"


def _identity(directory: Path) -> tuple[str | None, str]:
    """(when the run in a directory was started, what its restarts know it by), from the first line of its args.yaml."""
    try:
        found = re.match(r"# started (\S+) *(\S*)", (directory / ARGS).read_text())
    except OSError:
        found = None
    return (found.group(1), found.group(2)) if found else (None, "")


def lasting(config: Config) -> Config:
    """Without how this start of the run was asked for."""
    return config.but(**{key: FLAGS[key].default for key in OF_A_START})


class Keeper:
    """Takes the state of a run, all processes together, and has rank 0 write it."""

    def __init__(self, run: Run, checkpoints: Checkpoints, control: Control, started: str) -> None:
        self.run, self.checkpoints, self.control, self.started = run, checkpoints, control, started

    def epoch(self, progress: Progress, metric: float | None) -> None:
        self._save(replace(progress, epoch_done=True), metric, self.checkpoints.save_epoch)

    def recovery(self, progress: Progress) -> None:
        self._save(progress, None, self.checkpoints.save_recovery)

    def _save(self, progress: Progress, metric: float | None, save: Callable[[TrainState], Any]) -> None:
        run, several = self.run, self.run.world.size > 1
        mine = {
            "rng": generators.take(run.world.device),
            "buffers": _buffers(run.model) if several else {},
            "ema_buffers": _buffers(run.ema.module) if several and run.ema is not None else {},
        }
        weights, averages = run.model.state_dict(), None if run.ema is None else run.ema.module.state_dict()
        optimizer = run.optimizer.state_dict()
        in_parts = run.config.checkpoint_format == "dcp"
        if run.config.fsdp and not in_parts:
            weights, averages, optimizer = sharding.taken([weights, averages, optimizer], run.world)
        ranks = self.control.gather(mine)
        if ranks is None and not in_parts:
            return
        state = TrainState(
            state_dict=weights,
            optimizer=optimizer,
            optimizer_layout=layout(run),
            epoch=progress.epoch,
            arch=run.config.model,
            args={key: value for key, value in vars(lasting(run.effective)).items() if key != "config"},
            metric=metric,
            state_dict_ema=averages,
            amp_scaler=None if run.scaler is None else run.scaler.state_dict(),
            scheduler=_plateau(run.scheduler),
            progress=asdict(progress),
            ranks=ranks or [],
            best=self.checkpoints.best,
            started=self.started,
            class_names=run.class_names,
        )
        save(state)


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """A process's own running statistics: ranks agree on them only where DDP or --dist-bn has shared them."""
    return {name: buffer.cpu() for name, buffer in model.named_buffers() if "running_" in name or "num_batches" in name}


def _plateau(scheduler: Any) -> dict[str, Any] | None:
    """Of timm's schedules only plateau has a state; the others follow from the count."""
    inner = getattr(scheduler, "lr_scheduler", None)
    return None if inner is None else {"inner": inner.state_dict(), "restore_lr": scheduler.restore_lr}


def restore(run: Run, source: Path, checkpoints: Checkpoints) -> tuple[Progress, dict[str, Any] | None]:
    """Put a state back; returns (where to go on, this process's random state to set before the next update)."""
    content = parts.loaded(source, partial(_like, run)) if source.suffix == PARTS else checkpoint.read(source)
    config = run.config
    changed = differences(run, content)
    if changed and run.world.is_rank_zero:
        told = ", ".join(f"{key} {before} -> {after}" for key, (before, after) in changed.items())
        log.warning("Other settings than in %s: %s", source, told)
    try:
        _load(run, run.model, content["state_dict"])
        if run.ema is not None:
            _load(run, run.ema.module, content.get("state_dict_ema") or content["state_dict"])
        if not config.no_resume_opt and "optimizer" in content:
            load_optimizer(run, source, content, changed)
        if run.scaler is not None and not config.no_resume_opt and "amp_scaler" in content:
            run.scaler.load_state_dict(content["amp_scaler"])
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        was = settings_of(content)
        wrote = f"--model {was.get('model')} --opt {was.get('opt')}"
        raise UserError(
            f"{source} does not fit --model {config.model} --opt {config.opt} (it was written by {wrote}): "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    if source.parent.resolve() == checkpoints.directory.resolve():
        checkpoints.best = content.get("best", checkpoints.best)
        checkpoints.last_good = source
    progress, ranks = checkpoint.progress_of(content), content.get("ranks", [])
    if config.start_epoch is not None:
        progress = Progress(epoch=config.start_epoch)
    elif progress.epoch_done:
        progress = Progress(progress.epoch + 1, skipped=progress.skipped, bad_in_a_row=progress.bad_in_a_row)
    rng = _restore_rank(run, progress, ranks)
    _restore_readers(run, progress, settings_of(content), len(ranks))
    move_schedule(run, progress, content.get("scheduler"))
    log.info("Continuing %s at epoch %d, update %d", source, progress.epoch, progress.updates)
    return progress, rng


def _like(run: Run, name: str) -> torch.Tensor | None:
    """What this run has for a tensor's name in a state in parts."""
    kind, _, rest = name.partition("/")
    if kind == "optimizer":
        held = [p for group in run.optimizer.param_groups for p in group["params"]]
        index = int(rest.partition("/")[0])
        return held[index] if index < len(held) else None
    model = run.model if kind == "state_dict" else None if run.ema is None else run.ema.module
    return None if model is None else model.state_dict().get(rest)


def _load(run: Run, model: nn.Module, state: dict[str, Any]) -> None:
    state = clean_state_dict(state)
    model.load_state_dict(sharding.given(state, model) if run.config.fsdp else state)


def differences(run: Run, content: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{setting: (in the checkpoint, in this run)} where they differ and it matters to the result."""
    was, now = settings_of(content), vars(lasting(run.effective))
    same = INDIFFERENT - READERS if isinstance(getattr(run.train_loader, "dataset", None), ShardStream) else INDIFFERENT
    keys = [key for key in now if key in was and key not in same]
    return {key: (was[key], now[key]) for key in keys if _plain(was[key]) != _plain(now[key])}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _restore_rank(run: Run, progress: Progress, ranks: list[dict[str, Any]]) -> dict[str, Any] | None:
    world = run.world
    if len(ranks) == world.size:
        mine = ranks[world.rank]
        run.model.load_state_dict(mine["buffers"], strict=False)
        if run.ema is not None:
            run.ema.module.load_state_dict(mine["ema_buffers"], strict=False)
        return mine["rng"]
    if ranks:
        log.warning(
            f"The state was saved by {len(ranks)} processes and continues on {world.size}: the epoch goes on after its "
            f"{progress.samples} samples, but the order of samples and the random numbers differ"
        )
        progress.updates = progress.samples // (world.size * run.config.batch_size * run.config.grad_accum_steps)
    utils.random_seed(run.config.seed + progress.epoch, world.rank)
    return None


def _restore_readers(run: Run, progress: Progress, was: Mapping[str, Any], processes: int) -> None:
    """Let other readers of shards share what those of the interrupted epoch have not given."""
    stream = getattr(run.train_loader, "dataset", None)
    if not isinstance(stream, ShardStream) or not progress.samples or not processes:
        return
    layouts = [ReaderLayout(*layout) for layout in progress.layouts]
    given = progress.samples - sum(layout.samples for layout in layouts)
    last = ReaderLayout(processes, was["batch_size"], max(1, was["workers"]), was["shuffle_buffer"])
    if last != stream.layout and given:
        layouts.append(last._replace(samples=given))
        say = log.warning if run.world.is_rank_zero else log.debug
        say("The epoch's shards were read by other readers before; those of now share what is left of it")
    progress.layouts = [list(layout) for layout in layouts]
    stream.layouts = (progress.epoch, layouts)


def move_schedule(run: Run, progress: Progress, plateau: dict[str, Any] | None = None) -> None:
    """Set the learning rate of the update after `progress`; `plateau` is the state of that schedule."""
    if run.scheduler is None:
        return
    if plateau is not None and hasattr(run.scheduler, "lr_scheduler"):
        run.scheduler.lr_scheduler.load_state_dict(plateau["inner"])
        vars(run.scheduler)["restore_lr"] = plateau["restore_lr"]
    elif run.config.sched_on_updates:
        run.scheduler.step_update(progress.epoch * run.updates_per_epoch + progress.updates)
    elif progress.epoch > 0 or run.config.start_epoch is not None:  # else the rate is the checkpoint's
        run.scheduler.step(progress.epoch)
