"""The training loop: which gradient each update takes, when it validates, and what it leaves."""

from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import load_checkpoint
from torch import Tensor

from samon.cli.validate import parse
from samon.engines.masks import Mask
from samon.evals.accuracy import accuracy
from samon.trainer import loop
from samon.trainer.build import Run
from samon.trainer.logging import RunLogger, summary_rows
from samon.trainer.meter import Timer
from samon.trainer.run_dir import RunDir
from samon.trainer.state import Progress, validated_with_ema
from tests.graph_memory import Pool
from tests.runs import assert_same, built, last, run, watch_batches


# --- the gradient of an update ----------------------------------------------------------------------------------------
def first_gradient(*args: str) -> dict[str, Tensor]:
    """The gradients and buffers of the first update."""
    torch.manual_seed(0)
    made = built(*args)
    count = made.config.grad_accum_steps
    batches = (loop.to_device(made, *batch) for batch in islice(made.train_loader, count))
    loop.compute_gradient(made, batches, count, made.update in made.two_pass_updates)
    grads = {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}
    return grads | dict(made.model.named_buffers())


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, as a fraction of its largest value."""
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max() / b[n].double().abs().max().clamp(1e-6)) for n in a)


ROUNDING = 1e-3  # float32 sums in another order, through a small network


FLAGS = ["--perturb stages|layer", "--m-sharpness 4", "--ascent-fraction 0.5", "--ascent-size 24", "--bn-stats second"]
FLAGS += ["--model test_vit -b 8 --grad-accum-steps 2"]  # micro-batches have their own perturbations


@pytest.mark.parametrize("args", FLAGS)
def test_sam_flags_change_the_update(args: str) -> None:
    words = args.split()
    own, plain = (first_gradient("--opt", "samon", *w) for w in (words, words[:2] if "--model" in words else []))
    assert largest_difference(own, plain) > 1e-2


@pytest.mark.parametrize(
    ("args", "same"),
    [
        ("--perturb layer4|stages.3", "--no-replay"),
        ("--model test_vit", "--torchcompile eager"),
        ("--model test_vit --m-sharpness 4", "--torchcompile eager"),
        ("--model test_vit --perturb blocks.[4-9]|^norm", "--grad-checkpointing"),
        ("--model test_vit --rho 0", "-b 8 --grad-accum-steps 2"),  # the mean over micro-batches, not their sum
        ("--model test_vit --m-sharpness global", "-b 8 --grad-accum-steps 2"),  # one perturbation for both
    ],
)
def test_flags_that_change_no_gradient(args: str, same: str) -> None:
    one, two = (first_gradient("--opt", "samon", *args.split(), *extra) for extra in ([], same.split()))
    assert largest_difference(one, two) < ROUNDING


def test_m_sharpness_in_groups_equals_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scope samon runs all sub-batches at once, any other scope one after the other: the same step on one model."""
    args = ["--opt", "samon", "--m-sharpness", "4", "--model", "test_vit"]
    groups = first_gradient(*args)
    monkeypatch.setattr("samon.sam.SAM.can_group", property(lambda self: False))
    assert largest_difference(groups, first_gradient(*args)) < ROUNDING


@pytest.mark.parametrize("opt", ["sgd", "samon"])
def test_micro_batches_on_cuda_graphs(opt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients must not be summed in memory that the next backward overwrites."""
    args, pool = ["--opt", opt, "--model", "test_vit", "--grad-accum-steps", "2"], Pool()
    eager = first_gradient(*args)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", pool.begin)
    compiled: Callable[..., Any] = lambda config, model: torch.compile(model, backend=pool.backend)  # noqa: E731
    monkeypatch.setattr("samon.trainer.model.compile_model", compiled)
    captured = first_gradient(*args, "--torchcompile", "eager", "--torchcompile-mode", "max-autotune")
    assert pool.tensors
    assert largest_difference(eager, captured) < ROUNDING


# --- updates ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--sam-start-epoch 1", [False] * 4 + [True] * 4),
        ("--sam-end-epoch 1", [True] * 4 + [False] * 4),
        ("--sam-every 3", [True, False, False, True, False, False, True, False]),
        ("--sam-every 3 --sam-start-epoch 1", [False] * 6 + [True, False]),
        ("--sam-tail 0.4", [False] * 5 + [True] * 3),
    ],
)
def test_when_the_two_pass_step_is_used(args: str, expected: list[bool]) -> None:
    made = built("--opt", "samon", "--epochs", "2", *args.split())
    assert [update in made.two_pass_updates for update in range(8)] == expected


def test_accumulation_of_a_remainder(tmp_path: Path) -> None:
    """4 batches in updates of 3: the last update has one, weighted as one."""
    made = built("--opt", "samon", "--grad-accum-steps", "3")
    with closing(RunLogger(made, RunDir(tmp_path))) as logger:
        updates = loop.updates(made, Timer(made.progress), logger, None)
        assert [(len(list(batches)), count) for batches, count in updates] == [(3, 3), (1, 1)]
    assert made.updates_per_epoch == 2


# --- after an epoch ---------------------------------------------------------------------------------------------------
def test_timm_reads_the_checkpoints(tmp_path: Path) -> None:
    metrics, directory = run(tmp_path, "--opt", "samon", "--model-ema", "--model-ema-decay", "0.5")
    content = last(directory)
    assert {"epoch", "arch", "state_dict", "state_dict_ema", "optimizer", "args", "version", "metric"} <= content.keys()
    path = str(directory / "last.pth.tar")
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1, checkpoint_path=path)
    assert_same(dict(model.state_dict()), content["state_dict_ema"])  # timm takes the average if there is one
    load_checkpoint(model, path, use_ema=False)
    assert_same(dict(model.state_dict()), content["state_dict"])
    load_checkpoint(model, path, use_ema=True)
    figures = accuracy(model, built().eval_loader, device="cpu")
    assert (figures["top1"], figures["loss"]) == pytest.approx((metrics["eval_top1"], metrics["eval_loss"]))


@pytest.mark.parametrize("metric", ["top1", "loss"])
def test_validation_interval_and_best_checkpoint(metric: str, tmp_path: Path) -> None:
    args = ["--epochs", "5", "--val-interval", "2", "--checkpoint-hist", "2", "--eval-metric", metric]
    metrics, directory = run(tmp_path, "--opt", "adamw", "--lr", "1e-3", *args)
    rows = summary_rows(directory / "summary.csv")
    values = {int(row["epoch"]): float(row[f"eval_{metric}"]) for row in rows}
    assert list(values) == [1, 3, 4]
    best = min(values, key=lambda epoch: (values[epoch] if metric == "loss" else -values[epoch], epoch))
    assert (metrics["best_epoch"], metrics["best_metric"]) == (best, values[best])
    assert torch.load(directory / "model_best.pth.tar", weights_only=True)["epoch"] == best
    assert last(directory)["epoch"] == 4
    kept = {int(path.name.split("-")[1].split(".")[0]) for path in directory.glob("checkpoint-*")}
    assert len(kept) == 2
    assert best in kept


def test_average_on_the_cpu_is_not_validated(tmp_path: Path) -> None:
    metrics, directory = run(tmp_path, "--opt", "sgd", "--model-ema", "--model-ema-force-cpu", "--model-ema-decay", "1")
    content = last(directory)
    assert any(not torch.equal(value, content["state_dict_ema"][name]) for name, value in content["state_dict"].items())
    assert metrics["eval_loss"] == run(tmp_path, "--opt", "sgd", name="plain")[0]["eval_loss"]
    assert not validated_with_ema(content)
    (job,) = parse(["--checkpoint", str(directory)])
    assert (job.use_ema, job.checkpoint) == (False, str(directory / "model_best.pth.tar"))


@pytest.mark.parametrize("extra", [["--model-ema"], []])
def test_half_precision_is_validated_without_the_prefetcher(extra: list[str], tmp_path: Path) -> None:
    metrics, _ = run(tmp_path, "--model-dtype", "bfloat16", "--no-prefetcher", *extra)
    assert 0 < metrics["eval_loss"] < 10


# --- sparse masks -----------------------------------------------------------------------------------------------------
MASKED = ["--opt", "ssam-f", "--sparsity", "0.9", "--mask-epochs", "2", "--fisher-samples", "20", "--val-split", ""]


def test_masks_are_renewed_at_their_epochs_from_single_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first mask holds the entries whose squared gradients, summed over 20 images in eval mode, are largest."""
    masks: dict[tuple[int, int], Tensor] = {}
    batches: list[tuple[Tensor, Tensor]] = []

    def on_update(run: Run, progress: Progress, two_pass: bool) -> None:
        assert run.sam is not None
        assert isinstance(run.sam.mask, Mask)
        masks[progress.epoch, progress.updates] = torch.cat([m.flatten() for m in run.sam.mask.masks])

    watch_batches(monkeypatch, lambda images, target: batches.append((images.clone(), target.clone())))
    run(tmp_path, *MASKED, "--epochs", "3", on_update=on_update)
    first, renewed = masks[0, 1], masks[2, 1]
    assert all(torch.equal(mask, first if epoch < 2 else renewed) for (epoch, _), mask in masks.items())
    assert not torch.equal(first, renewed)
    torch.manual_seed(42)  # --seed's default
    made = built(*MASKED)
    model = made.model.eval()
    total = [torch.zeros_like(p) for p in model.parameters()]
    images, target = (torch.cat(parts)[:20] for parts in zip(*batches[:2], strict=True))
    for x, y in zip(images.split(1), target.split(1), strict=True):
        model.zero_grad()
        made.task(x, y)["loss"].backward()
        total = [t + p.grad.square() for t, p in zip(total, model.parameters(), strict=True)]
    flat = torch.cat([t.flatten() for t in total])
    assert first.sum() == round(0.1 * flat.numel())
    assert flat[first].min() >= flat[~first].max()
