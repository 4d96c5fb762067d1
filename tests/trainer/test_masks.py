"""Sparse masks renewed by epochs: SSAM-F's from the Fisher diagonal over images, one by one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from samon.trainer.build import Hooks, Run
from tests.runs import assert_same, run, run_stopped, weights

SHORT = ["--opt", "ssam-f", "--sparsity", "0.9", "--mask-epochs", "2", "--fisher-samples", "20", "--epochs", "3"]


def test_the_first_mask_comes_from_the_first_images_one_by_one(tmp_path: Path) -> None:
    """The entries whose squared gradients, summed over 20 images in eval mode, are largest (float32: the same sums)."""
    seen: dict[str, Any] = {"batches": []}

    def built(job: Run) -> None:
        seen["model"], seen["loss"] = copy.deepcopy(job.model).eval(), job.loss

    def batch(images: torch.Tensor, target: torch.Tensor) -> None:
        seen["batches"].append((images.clone(), target.clone()))

    def updated(job: Run, progress: Any, perturbed: bool) -> None:
        assert job.sam is not None
        assert job.sam.mask is not None
        seen.setdefault("mask", torch.cat([m.flatten() for m in job.sam.mask.masks]).clone())

    run(tmp_path, *SHORT, hooks=Hooks(built=built, batch=batch, updated=updated))
    model, (one, two) = seen["model"], seen["batches"][:2]
    images, target = torch.cat([one[0], two[0]])[:20], torch.cat([one[1], two[1]])[:20]
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in zip(images.split(1), target.split(1), strict=True):
        model.zero_grad()
        seen["loss"](model(x), y).backward()
        total = [t + p.grad.square() for t, p in zip(total, model.parameters(), strict=True)]
    flat = torch.cat([t.flatten() for t in total])
    keep = round(0.1 * flat.numel())
    assert seen["mask"].sum() == keep
    assert flat[seen["mask"]].min() >= flat[~seen["mask"]].max()


def test_masks_change_at_their_epochs_alone(tmp_path: Path) -> None:
    masks: dict[tuple[int, int], torch.Tensor] = {}

    def updated(job: Run, progress: Any, perturbed: bool) -> None:
        assert job.sam is not None
        assert job.sam.mask is not None
        masks[progress.epoch, progress.updates] = torch.cat([m.flatten() for m in job.sam.mask.masks]).clone()

    run(tmp_path, *SHORT, hooks=Hooks(updated=updated))
    first, others = masks[0, 1], [m for (epoch, _), m in masks.items() if epoch < 2]
    assert first.sum() == round(0.1 * first.numel())
    assert all(torch.equal(first, m) for m in others)
    renewed = [m for (epoch, _), m in masks.items() if epoch == 2]
    assert not torch.equal(first, renewed[0])
    assert all(torch.equal(renewed[0], m) for m in renewed)


@pytest.mark.parametrize("opt", ["ssam-f", "ssam-d"])
def test_a_restart_does_not_renew_again(opt: str, tmp_path: Path) -> None:
    args = ["--opt", opt, "--sparsity", "0.9", "--mask-epochs", "1", "--fisher-samples", "20", "--epochs", "2"]
    _, whole = run(tmp_path, *args, name="whole")
    stopped = run_stopped(tmp_path, 1, 2, *args)
    run(tmp_path, *args, "--resume", str(stopped), name="stopped")
    assert_same(weights(whole), weights(stopped))
