"""The directory of a run: which one it is, what a run resumes from, and how an earlier run there is replaced."""

import datetime
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from timm.models import safe_model_name

from samon.errors import UserError
from samon.files import check_writable, write_text
from samon.trainer.config import AUTO, FLAGS, Config, dump, read_yaml
from samon.trainer.distributed import is_restartable, restart_id, torchrun_id
from samon.trainer.state import DCP_SUFFIX, SUFFIX, Tree, find_newest, list_states, load_state

log = logging.getLogger("samon")
ARGS = "args.yaml"
OVERWRITTEN = "overwritten"  # holds the run that --overwrite replaces until the new one has saved a state
LAUNCH_FLAGS = ("resume", "no_resume_opt", "start_epoch", "stop_epoch", "overwrite")  # about one start of a run


@dataclass(frozen=True)
class RunDir:
    """The directory of a run, the same on all processes."""

    path: Path
    started: str = ""  # when the run was first started, which identifies it
    source: Path | None = None  # the checkpoint to resume from
    same_run: bool = False  # whether the directory already belongs to this run


def find_run_dir(config: Config) -> RunDir:
    """Find the run's directory and the checkpoint to resume from; writes nothing. Only rank 0 calls it."""
    path = _choose_path(config)
    started, previous_restart = _read_header(path)
    restarted = bool(previous_restart) and previous_restart == restart_id()
    old = path / OVERWRITTEN
    if old.is_dir() and not (restarted or config.overwrite or list_states(path)):
        text = f"{old} holds the run that --overwrite would have replaced; move its files back to {path}, or"
        raise UserError(f"{text} give --overwrite again")
    source = find_newest(path, started) if restarted or config.resume == AUTO else None
    same_run = restarted or source is not None
    if source is None:
        started = None
        if restarted:
            log.warning("Restarted before a state was saved in %s: starting over", path)
        if config.resume and config.resume != AUTO:
            source = _resolve_resume(config.resume)
            same_run = source.parent.resolve() == path.resolve()
            if same_run and config.start_epoch is None:
                started = _continued_run(source)
    if not same_run and not config.overwrite and (states := list_states(path)):
        text = f"{path} holds a run ({states[0].name}); --resume {path} continues it, --overwrite starts over,"
        raise UserError(f"{text} another --experiment keeps both")
    check_writable("--output", path / ARGS if path.is_dir() else path)
    return RunDir(path, started or datetime.datetime.now().isoformat(), source, same_run)


def prepare_run_dir(run_dir: RunDir, config: Config) -> None:
    """Create the directory and write args.yaml. Another run there that has states moves to `OVERWRITTEN`, which is
    deleted once the new run has saved its first state. `config` is that after building, without open choices."""
    path, old = run_dir.path, run_dir.path / OVERWRITTEN
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not run_dir.same_run and (path / ARGS).exists():
            move = bool(list_states(path))
            if move:
                remove_state(old)
                old.mkdir()
            for file in _run_files(path):
                file.rename(old / file.name) if move else remove_state(file)
        text = f"# started {run_dir.started} {restart_id()}\n{dump(without_launch_flags(config))}"
        write_text(path / ARGS, text)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another --output") from None


def restore_overwritten(path: Path) -> None:
    """Return the run in `OVERWRITTEN` to its place if the run that replaces it has saved nothing."""
    old = path / OVERWRITTEN
    if old.is_dir() and not list_states(path):
        for file in _run_files(path):
            remove_state(file)
        for file in old.iterdir():
            file.rename(path / file.name)
        old.rmdir()


def remove_state(path: Path) -> None:
    """Delete a file or directory. A sharded checkpoint that is deleted only in part counts as incomplete."""
    if path.is_dir():
        (path / ".metadata").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def load_run_settings(resume: str) -> Tree:
    """Read the settings of the run that `--resume` names, for a command line without --config."""
    if (path := Path(resume, ARGS)).is_file():
        settings = read_yaml(str(path))
    else:
        settings = {key: value for key, value in load_state(_resolve_resume(resume)).args.items() if key in FLAGS}
    return {key: value for key, value in settings.items() if key not in (*LAUNCH_FLAGS, "output", "experiment")}


def without_launch_flags(config: Config) -> Config:
    """The configuration with the flags of this start alone set to their defaults."""
    return config.but(**{key: FLAGS[key].default for key in LAUNCH_FLAGS})


def _resolve_resume(resume: str) -> Path:
    """The checkpoint that `--resume` names: itself, or the newest one of a directory's run."""
    path = Path(resume)
    if not path.exists():
        raise UserError(f"--resume {resume}: no such file or directory")
    if not path.is_dir() or path.suffix == DCP_SUFFIX:
        return path
    newest = find_newest(path, _read_header(path)[0])
    if newest is None:
        raise UserError(f"no complete training state in {resume}; name a checkpoint file or drop --resume")
    return newest


def _continued_run(source: Path) -> str | None:
    """What identifies a checkpoint's run; None if that has gone on from there, and its later states stay behind."""
    state = load_state(source)
    newest = find_newest(source.parent, state.started)
    at_its_end = newest is not None and (newest == source or load_state(newest).progress == state.progress)
    return state.started if at_its_end else None


def _choose_path(config: Config) -> Path:
    root, resume = Path(config.output or "output/train"), Path(config.resume or "")
    if config.experiment:
        return root / config.experiment
    if config.resume and resume.is_dir() and resume.suffix != DCP_SUFFIX:
        return resume
    name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if is_restartable() and not (name := torchrun_id()):  # the same name after a restart
        raise UserError("torchrun --max-restarts needs --experiment NAME, by which a restart finds its directory")
    return root / f"{name}-{safe_model_name(config.model)}"


def _read_header(path: Path) -> tuple[str | None, str]:
    """(when the run was started, its restart id), from the first line of args.yaml."""
    text = (path / ARGS).read_text() if (path / ARGS).is_file() else ""
    match = re.match(r"# started (\S+) *(\S*)", text)
    return (match[1], match[2]) if match else (None, "")


def _run_files(path: Path) -> list[Path]:
    """Everything that a run writes to its directory."""
    names = ["summary.csv", "log.txt", "run.json", "tb", "train-batch-*.jpg", ARGS]
    names += [f"*{suffix}" for suffix in (SUFFIX, DCP_SUFFIX)]
    return [file for name in names for file in path.glob(name)]
