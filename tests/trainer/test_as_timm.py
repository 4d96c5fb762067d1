"""Where timm's own train.py leads: the same schedule, epochs, averages and inputs for the same command line."""

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from timm.scheduler import create_scheduler_v2

from samon.errors import UserError
from samon.trainer import build, config, loop
from samon.trainer import main as train
from samon.trainer.distributed import DistInfo
from samon.trainer.resume import fast_forward_scheduler
from samon.trainer.state import Progress
from tests.runs import BASE, WATCH, assert_same, run, weights

CPU = DistInfo(torch.device("cpu"), 0, 1)


def built(*args: str) -> build.Run:
    return build.build(config.parse([*BASE, *args]), CPU)


def rates(made: build.Run) -> list[float]:
    return [group["lr"] for group in made.optimizer.param_groups]


def epochs(directory: Path) -> list[int]:
    return [int(line.split(",")[0]) for line in (directory / "summary.csv").read_text().splitlines()[1:]]


# --- epochs and schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], ["--sched-on-updates"]])
def test_start_epoch_moves_the_schedule(extra: list[str], tmp_path: Path) -> None:
    """The first update of an epoch has the learning rate that an uninterrupted run has there."""
    seen: list[float] = []
    hooks = type(WATCH)(begun=lambda job, progress: seen.extend(rates(job)[:1]))
    args = ["--epochs", "3", "--opt", "sgd", "--min-lr", "0.001", *extra]
    _, whole = run(tmp_path, *args, name="whole", hooks=hooks)
    expected = list(seen)
    assert len(set(expected)) == 3
    for start, resume in ((2, []), (1, []), (0, ["--resume", str(whole / "checkpoint-1.pth.tar")])):
        seen.clear()
        run(tmp_path, *args, *resume, "--start-epoch", str(start), "--stop-epoch", str(start + 1), hooks=hooks)
        assert seen == pytest.approx(expected[start : start + 1]), start


@pytest.mark.parametrize("opt", ["sgd", "samon", "lookahead_sgd"])
def test_layer_decay_without_a_schedule(opt: str) -> None:
    args = ["--opt", opt, "--model", "test_vit", "--layer-decay", "0.5", "--warmup-epochs", "0"]
    without, constant = built(*args, "--sched", "none"), built(*args, "--sched", "constant")
    assert rates(without) == rates(constant)
    assert min(rates(without)) < 0.05 == max(rates(without))


def test_schedule_flags_of_timm() -> None:
    args = ["--epochs", "8", "--opt", "sgd", "--sched", "rsqrt", "--decay-epochs", "3", "--warmup-epochs", "2"]
    made = built(*args, "--lr-decay-fn", "cosine", "--lr-stable-timescale", "1.5")
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    own = {"num_epochs": 8, "decay_epochs": 3.0, "warmup_epochs": 2, "warmup_lr": 1e-5}
    timms, _ = create_scheduler_v2(other, "rsqrt", decay_fn="cosine", stable_timescale=1.5, **own)
    for epoch in range(8):
        fast_forward_scheduler(made, Progress(epoch=epoch))
        timms.step(epoch)
        assert rates(made)[0] == other.param_groups[0]["lr"], epoch


def test_stop_and_milestones(tmp_path: Path) -> None:
    args = ["--epochs", "4", "--opt", "sgd", "--val-interval", "3", "--save-epochs", "1", "2"]
    _, whole = run(tmp_path, *args, name="whole")
    assert epochs(whole) == [0, 1, 2, 3]  # a milestone is evaluated, as is each third and the last
    _, directory = run(tmp_path, *args, "--stop-epoch", "2")
    assert epochs(directory) == [0, 1]
    names = {path.name for path in directory.glob("milestone-*")}
    assert names == {"milestone-1.pth.tar", "milestone-2.pth.tar"}
    assert [torch.load(directory / f"milestone-{n}.pth.tar", weights_only=True)["epoch"] for n in (1, 2)] == [0, 1]
    assert yaml.safe_load((directory / "args.yaml").read_text())["epochs"] == 4
    train.main(["--resume", str(directory)])  # the schedule is that of four epochs, and so is the rest of the run
    assert (whole / "summary.csv").read_text() == (directory / "summary.csv").read_text()
    assert_same(weights(whole), weights(directory))


def test_stop_beyond_the_end() -> None:
    with pytest.raises(UserError, match="--stop-epoch 3 of 2 epochs"):
        built("--epochs", "2", "--stop-epoch", "3")


def test_resume_auto(tmp_path: Path) -> None:
    """The same command starts, goes on, and finds nothing left to do."""
    args = [*BASE, "--opt", "sgd", "--epochs", "3", "--output", str(tmp_path), "--experiment", "run"]
    train.main([*args, "--resume", "auto", "--stop-epoch", "2"])
    assert epochs(tmp_path / "run") == [0, 1]
    train.main([*args, "--resume", "auto"])
    assert epochs(tmp_path / "run") == [0, 1, 2]
    before = (tmp_path / "run/last.pth.tar").read_bytes()
    assert train.main([*args, "--resume", "auto"])["epoch"] == 2
    assert (tmp_path / "run/last.pth.tar").read_bytes() == before
    (tmp_path / "other").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "other/last.pth.tar")
    with pytest.raises(UserError, match="holds a run"):  # another program's states are neither continued nor deleted
        train.main([*args, "--experiment", "other", "--resume", "auto"])


# --- averages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_average_of_half_precision_is_float32(dtype: str) -> None:
    """A step of the average is 1e-3 of the way, which weights of 8 or 11 bits lose in rounding."""
    made = built("--model-dtype", dtype, "--model-ema", "--model-ema-decay", "0.999")
    assert made.ema is not None
    name, weight = next(iter(made.model.named_parameters()))
    average = made.ema.module.state_dict()[name]
    with torch.no_grad():
        weight.fill_(1.0)
        average.fill_(0.0)
    for step in range(2, 102):
        made.ema.update(made.model, step=step)
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full_like(average, 1 - 0.999**100))


@pytest.mark.parametrize("extra", [["--model-ema"], []])
def test_half_precision_is_validated_without_the_prefetcher(extra: list[str], tmp_path: Path) -> None:
    metrics, _ = run(tmp_path, "--model-dtype", "bfloat16", "--no-prefetcher", *extra)
    assert 0 < metrics["eval_loss"] < 10


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_one_channel_without_the_prefetcher(tmp_path: Path) -> None:
    """timm's mean and deviation of three channels become one, with and without the prefetcher."""
    own = [item for item in BASE if item not in ("--mean", "0.286", "--std", "0.353")]
    seen: list[torch.Tensor] = []
    hooks = type(WATCH)(batch=lambda images, target: seen.append(images))
    for name, extra in (("with", []), ("without", ["--no-prefetcher"])):
        train.main([*own, "--no-aug", "--output", str(tmp_path), "--experiment", name, *extra], hooks)
    torch.testing.assert_close(seen[0], seen[4], atol=1e-5, rtol=0)
    assert abs(float(seen[0].mean())) < 1


def test_images_that_are_no_squares() -> None:
    own = [item for item in BASE if item not in ("--img-size", "32")]
    images, _ = next(iter(build.build(config.parse([*own, "--input-size", "1", "24", "40"]), CPU).train_loader))
    assert images.shape == (16, 1, 24, 40)


def test_the_size_of_a_fixed_model_may_be_its_own_argument() -> None:
    own = [item for item in BASE if item not in ("--img-size", "32")]
    argv = [*own, "--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", "depth=1"]
    made = build.build(config.parse(argv), CPU)
    images, _ = next(iter(made.train_loader))
    assert made.model(images).shape == (16, 10)
    assert images.shape == (16, 1, 32, 32)


def test_more_than_logits() -> None:
    """What inception_v3 returns in training with --model-kwargs aux_logits=True."""
    made = built("--model", "test_resnet")
    made.net = type("Auxiliary", (torch.nn.Module,), {"forward": lambda self, x: (x, x)})()
    with pytest.raises(UserError, match="--model test_resnet returns a tuple in training, not logits alone"):
        loop.forward(made, torch.zeros(2, 1, 32, 32), torch.zeros(2, dtype=torch.long))()


def test_a_number_of_samples_does_not_cut_an_image_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its files lie class by class, so that the first ones are of the first classes."""
    for index in range(12):
        path = tmp_path / f"images/{('train', 'val')[index % 2]}/{('cat', 'dog')[index // 6]}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), 20 * index).save(path)
    own = ["--dataset", "", "--data-dir", str(tmp_path / "images"), "--num-classes", "2", "-b", "2"]
    made = built(*own, "--train-num-samples", "2", "--val-num-samples", "3")
    assert made.eval_loader is not None
    assert (made.train_loader.num_samples, made.eval_loader.num_samples) == (6, 6)
    assert (made.effective.train_num_samples, made.effective.val_num_samples) == (None, None)  # as validate.py reads it
    assert "--train-num-samples and --val-num-samples: no effect on image folders" in caplog.text
    part = built(*own, "--val-split", "val[:2]")
    assert part.eval_loader is not None
    assert sorted(target.item() for _, targets in part.eval_loader for target in targets) == [0, 1]
