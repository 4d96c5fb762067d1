"""Checkpoints of a run: which are written, atomically, and which remain."""

import re
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from samon import rng
from samon.errors import RunError
from samon.files import atomic_write, link_or_copy
from samon.trainer.build import Run
from samon.trainer.dcp import convert_to_file, save_sharded
from samon.trainer.distributed import gloo_group
from samon.trainer.fsdp import gather_full
from samon.trainer.resume import describe_optimizer, restore_run
from samon.trainer.run_dir import OVERWRITTEN, RunDir, remove_state, without_launch_flags
from samon.trainer.state import DCP_SUFFIX, SUFFIX, TrainState, Tree, list_states


class CheckpointManager:
    """Writes and restores the checkpoints of a run; all processes call its methods together.

    A directory holds the best `--checkpoint-hist` epochs (`checkpoint-N`), `last`, `model_best`, milestones, and the
    two newest states within an epoch (`recovery-EPOCH-UPDATES`). Sharded checkpoints are written in the background;
    what they replace is deleted once they are complete, and the run ends by converting `last` and `model_best`.

    Attributes:
        best: metric and epoch of the best epoch, and `kept`: [file, metric] of --checkpoint-hist epochs, best first.
        last_good: the newest complete checkpoint that this process knows of.
    """

    def __init__(self, run: Run, run_dir: RunDir) -> None:
        self.run, self.run_dir, self.directory = run, run_dir, run_dir.path
        self.best: Tree = {"metric": None, "epoch": None, "kept": []}
        self.last_good: Path | None = None
        self.sharded = run.config.checkpoint_format == "dcp"
        self.suffix = DCP_SUFFIX if self.sharded else SUFFIX
        self.group = gloo_group()
        self._writing: tuple[Future[object], Path] | None = None
        self._outdated: list[Path] = []

    def save_epoch(self, metric: float | None) -> None:
        """Save after an epoch and its validation, and delete the worst epochs beyond --checkpoint-hist."""
        config, epoch = self.run.config, self.run.progress.epoch
        path = self.directory / f"checkpoint-{epoch}{self.suffix}"
        newest = [path.name, metric]
        ranking = [pair for pair in self.best["kept"] if pair[0] != path.name] + [newest]
        ranking.sort(key=lambda pair: self._loss(pair[1]))
        self.best["kept"] = ranking[: config.checkpoint_hist]
        if self.sharded and newest not in self.best["kept"]:  # sharded checkpoints have no `last`
            self.best["kept"].append(newest)
        outdated = [self.directory / pair[0] for pair in ranking if pair not in self.best["kept"]]
        outdated += self.directory.glob("recovery-*")
        if self._loss(metric) < self._loss(self.best["metric"]):
            self.best |= {"metric": metric, "epoch": epoch}
        # A run that goes back to an earlier epoch finds the best of its first attempt there.
        links = {"last": path, "model_best": self._best_path()}
        if epoch + 1 in config.save_epochs:
            links[f"milestone-{epoch + 1}"] = path
        self.run.progress.epoch_done = True
        self._save(path, metric, links)
        self._delete(outdated)

    def save_recovery(self) -> None:
        """Save within an epoch; the previous such state stays until the next one."""
        progress = self.run.progress
        self._save(self.directory / f"recovery-{progress.epoch}-{progress.updates}{self.suffix}", None, {})
        self._delete(sorted(self.directory.glob("recovery-*"), key=_numbers)[:-2])

    def restore(self, source: Path) -> Tree | None:
        """Restore the run from a checkpoint; return this process's random state, to be set before the next update."""
        state, random_state = restore_run(self.run, source, self.run_dir.started)
        if self.run_dir.same_run:
            self.best, self.last_good = state.best or self.best, source
        return random_state

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete, and delete what it replaces.

        Raises:
            RunError: it could not be written.
        """
        if self._writing is not None:
            (future, path), self._writing = self._writing, None
            try:
                future.result()
            except Exception as error:  # from a thread of PyTorch's
                raise self._write_error(path, error) from error
            self.last_good = path
        while self._outdated:
            remove_state(self._outdated.pop())

    def finish(self) -> None:
        """Complete the run's checkpoints; of sharded ones write the last and the best as timm's single files too."""
        self.wait()
        if self.sharded and self.run.dist_info.is_rank_zero and self.best["kept"]:
            for name, path in (("last", self.last_good), ("model_best", self._best_path())):
                if path is not None and path.is_dir():
                    convert_to_file(path, self.directory / f"{name}{SUFFIX}")

    def describe_last_good(self) -> str:
        """The checkpoint to resume from after a failure, for error messages."""
        path = self.last_good or max(list_states(self.directory), key=_numbers, default=None)
        if path is None or not path.exists():
            return "no checkpoint was written before it"
        return f"the last good checkpoint is {path}; remove the cause and use --resume {self.directory}"

    def _best_path(self) -> Path:
        return self.directory / f"checkpoint-{self.best['epoch']}{self.suffix}"

    def _save(self, path: Path, metric: float | None, links: Mapping[str, Path]) -> None:
        self.wait()
        state = self._collect_state(metric)
        try:
            if self.sharded:
                self._writing = save_sharded(state, path, self.group), path
            elif self.run.dist_info.is_rank_zero:
                with atomic_write(path) as file:
                    torch.save(state.to_dict(), file)
                for name, source in links.items():
                    if source.exists():
                        link_or_copy(source, self.directory / f"{name}{SUFFIX}")
                self.last_good = self.directory / f"last{SUFFIX}" if links else path
        except OSError as error:
            raise self._write_error(path, error) from error

    def _collect_state(self, metric: float | None) -> TrainState:
        """This run's state, complete on rank 0; FSDP's shards are gathered there unless each process writes its own."""
        run = self.run
        trees: list[Tree | None] = [run.model.state_dict(), run.optimizer.state_dict()]
        trees.append(None if run.ema is None else run.ema.module.state_dict())
        if run.config.fsdp and not self.sharded:
            trees = gather_full(trees, run.dist_info)
        rank: Tree = {"rng": rng.get_state(run.dist_info.device), "buffers": {}, "ema_buffers": {}}
        ranks = [rank]
        if self.group is not None:
            rank["buffers"] = _running_statistics(run.model)
            rank["ema_buffers"] = {} if run.ema is None else _running_statistics(run.ema.module)
            ranks = [{} for _ in range(run.dist_info.size)]
            dist.gather_object(rank, ranks if run.dist_info.is_rank_zero else None, dst=0, group=self.group)
        # Only timm's plateau schedule has a state of its own; the others follow from the number of updates.
        plateau = getattr(run.scheduler, "lr_scheduler", None)
        return TrainState(
            state_dict=trees[0] or {},
            optimizer=trees[1],
            state_dict_ema=trees[2],
            optimizer_layout=describe_optimizer(run),
            epoch=run.progress.epoch,
            arch=run.config.model,
            args={key: value for key, value in vars(without_launch_flags(run.config)).items() if key != "config"},
            metric=metric,
            amp_scaler=None if run.scaler is None else run.scaler.state_dict(),
            scheduler=plateau and {"inner": plateau.state_dict(), "restore_lr": vars(run.scheduler)["restore_lr"]},
            progress=run.progress,
            ranks=ranks,
            best=self.best,
            started=self.run_dir.started,
            class_names=run.class_names,
            class_map_digest=run.class_map_digest,
        )

    def _delete(self, outdated: list[Path]) -> None:
        """Delete replaced files on rank 0: now, or once a checkpoint that is being written is complete."""
        if self.run.dist_info.is_rank_zero:
            self._outdated += [*outdated, self.directory / OVERWRITTEN]
        if not self.sharded:
            self.wait()

    def _loss(self, metric: float | None) -> float:
        """The metric as a number of which less is better."""
        if metric is None or metric != metric:
            return float("inf")
        return metric if self.run.metric == "loss" else -metric

    def _write_error(self, path: Path, error: Exception) -> RunError:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        return RunError(f"cannot write {path}: {reason}; {self.describe_last_good()}")


def _numbers(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)]


def _running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """BatchNorm buffers, which differ between processes unless DDP or --dist-bn has shared them."""
    return {name: buffer.cpu() for name, buffer in model.named_buffers() if "running_" in name or "num_batches" in name}
