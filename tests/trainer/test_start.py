"""How runs begin: directories that hold one already, what a resumed run takes over, data that do not fit together."""

import csv
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from samon.errors import Stopped, UserError
from samon.evals.main import main as validate
from samon.trainer import main as train
from samon.trainer.build import Hooks
from tests.runs import BASE, WATCH, assert_same, last, run, run_stopped, stop_at, weights
from tests.sets import write_set


def start(tmp_path: Path, *args: str) -> dict[str, Any]:
    """As `run`, without --overwrite."""
    return train.main([*BASE, "--output", str(tmp_path), "--experiment", "run", *args])


def settings(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((directory / "args.yaml").read_text())
    return content


# --- the same directory again -----------------------------------------------------------------------------------------


def test_a_finished_run_is_not_written_over(tmp_path: Path) -> None:
    start(tmp_path, "--epochs", "2")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"run holds a run \(checkpoint-0.*--resume .*--overwrite"):
        start(tmp_path, "--epochs", "1")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    start(tmp_path, "--epochs", "1", "--overwrite")
    names = sorted(path.name for path in (tmp_path / "run").glob("*.pth.tar"))
    assert names == ["checkpoint-0.pth.tar", "last.pth.tar", "model_best.pth.tar"]  # nothing of the old run
    assert len((tmp_path / "run/summary.csv").read_text().splitlines()) == 2
    assert len(list((tmp_path / "run/tb").glob("events*"))) == 1
    assert settings(tmp_path / "run")["overwrite"] is False  # or -c args.yaml would delete it


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch."""
    return run(tmp_path_factory.mktemp("finished"), "--opt", "samon")[1]


@pytest.fixture
def whole(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be started over in."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize(
    "wrong",
    [
        ["--data-dir", "elsewhere"],
        ["--model", "resnet_of_nobody"],
        ["--opt", "samon", "--perturb", "nothing"],
        ["-b", "4096"],
        ["--initial-checkpoint", "RUN/summary.csv"],
        ["--sched", "step", "--decay-milestones", "x"],
    ],
    ids=lambda words: words[0],
)
def test_a_mistake_costs_no_run_that_is_to_be_replaced(whole: Path, wrong: list[str]) -> None:
    before = files(whole)
    with pytest.raises(UserError):
        start(whole.parent, "--overwrite", *(word.replace("RUN", str(whole)) for word in wrong))
    assert files(whole) == before


def test_a_run_can_start_from_the_one_that_it_replaces(whole: Path) -> None:
    start(whole.parent, "--overwrite", "--initial-checkpoint", str(whole / "last.pth.tar"), "--lr", "1e-9")
    assert not (whole / "overwritten").exists()
    assert settings(whole)["lr"] == 1e-9


@pytest.mark.parametrize("form", ["file", "dcp"])
def test_the_old_run_is_given_up_for_the_first_state_of_the_new(whole: Path, form: str) -> None:
    """A failure before it, such as a batch that does not fit into memory, brings the old run back."""
    before, seen = files(whole), list[list[str]]()

    def fails(job: Any, progress: Any, perturbed: bool) -> None:
        seen.append(sorted(files(whole / "overwritten")))
        raise torch.OutOfMemoryError

    words = ["--overwrite", "--checkpoint-format", form]
    with pytest.raises(torch.OutOfMemoryError):
        train.main([*BASE, "--output", str(whole.parent), "--experiment", "run", *words], type(WATCH)(updated=fails))
    assert seen == [sorted(before)]
    assert files(whole) == before
    stopped = stop_at(0, 2)
    with pytest.raises(Stopped):
        train.main([*BASE, "--output", str(whole.parent), "--experiment", "run", *words], stopped)
    assert not (whole / "overwritten").exists()
    (state,) = whole.glob("recovery-*")
    assert state.name.startswith("recovery-0-2")


def test_a_run_killed_before_its_first_state_leaves_the_old_one(whole: Path) -> None:
    before = files(whole)
    (whole / "overwritten").mkdir()
    for path in [path for path in whole.iterdir() if path.name != "overwritten"]:
        path.rename(whole / "overwritten" / path.name)
    (whole / "args.yaml").write_text("# started later \nlr: 1\n")
    with pytest.raises(UserError, match=r"overwritten holds the run that --overwrite .* move its files back"):
        start(whole.parent)
    assert files(whole / "overwritten") == before
    start(whole.parent, "--overwrite")
    assert not (whole / "overwritten").exists()


def test_a_failed_resume_leaves_the_settings(whole: Path) -> None:
    before = files(whole)
    with pytest.raises(UserError, match=r"does not fit --model test_vit .*Error\(s\) in loading .*: Missing key"):
        train.main(["--resume", str(whole), "--model", "test_vit", "--epochs", "2"])
    assert files(whole) == before
    train.main(["--resume", str(whole), "--epochs", "2"])
    assert last(whole)["epoch"] == 1


def test_resume_without_args_yaml_takes_the_states_settings(whole: Path) -> None:
    (whole / "args.yaml").unlink()
    train.main(["--resume", str(whole), "--epochs", "2"])
    assert settings(whole)["opt"] == "samon"
    assert last(whole)["epoch"] == 1


@pytest.mark.parametrize("more", [[], ["-c", "quickstart"]])
def test_a_missing_run_to_resume_is_the_one_mistake(tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(UserError, match=r"^--resume .*gone: no such file or directory"):
        train.main(["--resume", str(tmp_path / "gone"), "--output", str(tmp_path), *more])
    with pytest.raises(UserError, match=r"^no complete training state in"):
        train.main(["--resume", str(tmp_path), "--output", str(tmp_path), *more])


def test_a_run_that_saved_nothing_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.yaml").write_text("# started long ago\nlr: 1\n")
    (tmp_path / "run/log.txt").write_text("old\n")
    start(tmp_path)
    assert "old" not in (tmp_path / "run/log.txt").read_text()


def test_another_runs_state_does_not_open_a_third_runs_directory(tmp_path: Path) -> None:
    _, other = run(tmp_path, name="other")
    start(tmp_path)
    with pytest.raises(UserError, match="holds a run"):
        start(tmp_path, "--resume", str(other), "--epochs", "2")


# --- --resume ---------------------------------------------------------------------------------------------------------


def test_resume_alone_takes_the_runs_settings(tmp_path: Path) -> None:
    args = ("--opt", "samon-adamw", "--rho", "0.3", "--epochs", "2", "--smoothing", "0.2")
    _, whole = run(tmp_path, *args, name="whole")
    stopped = run_stopped(tmp_path, 1, 2, *args)
    moved = tmp_path / "elsewhere"
    shutil.move(stopped, moved)
    train.main(["--resume", str(moved)])
    assert_same(weights(moved), weights(whole))
    place = {"output", "experiment"}
    kept = {key: value for key, value in settings(moved).items() if key not in place}
    assert kept == {key: value for key, value in settings(whole).items() if key not in place}


def test_other_settings_are_told_and_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = ("--opt", "samon", "--rho", "0.1", "--weight-decay", "0.01", "--epochs", "3", "--sched", "none")
    stopped = run_stopped(tmp_path, 1, 2, *args)
    capfd.readouterr()
    seen: list[Any] = []
    hooks = type(WATCH)(begun=lambda job, progress: seen.append(job.optimizer.param_groups[1]))
    other = ["--rho", "0.4", "--weight-decay", "0.2", "--lr", "0.07"]
    train.main(["--resume", str(stopped), *other], hooks)
    told = next(line for line in capfd.readouterr().err.splitlines() if "Other settings" in line)
    for part in ("rho 0.1 -> 0.4", "weight_decay 0.01 -> 0.2", "lr 0.05 -> 0.07"):
        assert part in told
    assert "epochs" not in told
    assert (seen[-1]["lr"], seen[-1]["weight_decay"]) == (0.07, 0.2)
    assert settings(stopped)["rho"] == 0.4


def test_the_same_settings_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stopped = run_stopped(tmp_path, 0, 2, "--opt", "samon", "--epochs", "2")
    train.main(["--resume", str(stopped)])
    assert "Other settings" not in capfd.readouterr().err


def test_another_optimizer_brings_its_own_rho(tmp_path: Path) -> None:
    stopped = run_stopped(tmp_path, 0, 2, "--opt", "samon", "--epochs", "1")
    assert settings(stopped)["rho"] == 0.5
    train.main(["--resume", str(stopped), "--opt", "sam"])
    assert settings(stopped)["rho"] == 0.05


def test_settings_of_a_resumed_run_make_a_new_run(tmp_path: Path) -> None:
    stopped = run_stopped(tmp_path, 0, 2, "--epochs", "1")
    train.main(["--resume", str(stopped)])
    again = train.main(["-c", str(stopped / "args.yaml"), "--output", str(tmp_path), "--experiment", "again"])
    assert again["epoch"] == 0
    assert (tmp_path / "again/last.pth.tar").exists()


def test_other_workers_go_on_with_the_samples_that_are_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also when it is stopped again; sample i of these shards has label i."""
    root = write_set(tmp_path / "set", [4] * 7)
    args = ["--data-dir", root, "--num-classes", "28", "--train-num-samples", "28", "--val-split", "", "-b", "2"]
    seen: list[int] = []
    sample = Hooks(batch=lambda images, target: seen.extend(target.tolist()))
    for number, (workers, updates) in enumerate((("2", 5), ("1", 8), ("2", None))):
        how = [*BASE, *args, "-j", workers] if number == 0 else ["--resume", str(tmp_path / "run"), "-j", workers]
        where = ["--output", str(tmp_path), "--experiment", "run"] if number == 0 else []
        hooks = replace(stop_at(0, updates) if updates else Hooks(), batch=sample.batch)
        with pytest.raises(Stopped) if updates else nullcontext():
            train.main([*how, *where], hooks)
    assert len(seen) == len(set(seen)) == 28
    said = capfd.readouterr().err
    assert said.count("those of now share what is left") == 2
    assert "Other settings" in said
    assert "workers 2 -> 1" in said


# --- nothing to do ----------------------------------------------------------------------------------------------------


def test_a_finished_run_ends_as_it_did(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    metrics, directory = run(tmp_path, "--epochs", "2", "--opt", "samon")
    capfd.readouterr()
    again = train.main(["--resume", str(directory)])
    out, err = capfd.readouterr()
    assert "nothing is left to do" in err
    assert again == pytest.approx(metrics, rel=1e-6)
    assert str(directory) in out


@pytest.mark.parametrize("args", [["--start-epoch", "3"], ["--start-epoch", "1", "--epochs", "1"]])
def test_a_start_behind_the_end_is_a_mistake(tmp_path: Path, args: list[str]) -> None:
    with pytest.raises(UserError, match=r"--start-epoch is epoch \d of 1: nothing is left to train; raise --epochs"):
        run(tmp_path, *args)


def test_so_is_the_end_of_another_run(tmp_path: Path) -> None:
    _, other = run(tmp_path, name="other")
    with pytest.raises(UserError, match=r"last.pth.tar goes on at epoch 1 of 1|checkpoint-0.*nothing is left"):
        run(tmp_path, "--resume", str(other))


# --- splits that do not fit -------------------------------------------------------------------------------------------

FOLDER = ["--model", "test_resnet", "--img-size", "32", "-b", "8", "-j", "0", "--epochs", "1", "--warmup-epochs", "0"]


@pytest.fixture
def folders(tmp_path: Path) -> Callable[[str, str], Path]:
    """Image folders of the classes named for training and for validation, 8 and 4 images each, of one gray a class."""

    def make(train_classes: str, held_classes: str) -> Path:
        root = tmp_path / "images"
        for split, names, count in (("train", train_classes, 8), ("val", held_classes, 4)):
            for name in names.split():
                (root / split / name).mkdir(parents=True)
                for index in range(count):
                    gray = 40 * (ord(name[0]) - ord("a")) + index
                    Image.new("RGB", (36, 36), (gray, gray, gray)).save(root / split / name / f"{index}.png")
        return root

    return make


def on_folders(root: Path, tmp_path: Path, *args: str) -> Path:
    place = ["--output", str(tmp_path), "--experiment", "run", "--overwrite", "--val-split", "val"]
    train.main([*FOLDER, "--data-dir", str(root), *place, *args])
    return tmp_path / "run"


def test_the_head_takes_the_number_of_classes(folders: Any, tmp_path: Path) -> None:
    directory = on_folders(folders("ant bee cat", "ant bee cat"), tmp_path)
    assert settings(directory)["num_classes"] == 3
    assert last(directory)["state_dict"]["fc.weight"].shape[0] == 3
    assert last(directory)["class_names"] == ["ant", "bee", "cat"]


def test_another_number_of_classes_is_told(folders: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    on_folders(folders("ant bee", "ant bee"), tmp_path, "--num-classes", "5")
    assert "has 2 classes, the model 5; --num-classes 2 fits" in capfd.readouterr().err


def test_the_same_images_twice_are_refused(folders: Any, tmp_path: Path) -> None:
    root = folders("ant bee", "ant bee")
    with pytest.raises(UserError, match=r"share images, those of .*images/train; give --data-dir the directory above"):
        on_folders(root / "train", tmp_path)
    with pytest.raises(UserError, match="share images"):
        run(tmp_path, "--val-split", "train")


def test_a_renamed_class_is_refused(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images/val: class 'beee' is not among the 3 trained; did you mean 'bee'"):
        on_folders(folders("ant bee cat", "ant beee cat"), tmp_path)


def test_a_missing_class_shifts_no_label(folders: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In training and in validate.py: the figures are those of the set whose missing class is there but empty."""
    root = folders("ant bee cat", "ant cat")
    directory = on_folders(root, tmp_path, "--lr", "0.1", "--epochs", "2")
    assert "has 2 of the 3 classes: its labels are numbered as in training" in capfd.readouterr().err
    loss = figure("loss", "--checkpoint", str(directory))
    assert "numbered by the 3 classes" in capfd.readouterr().err
    assert loss == figure("loss", "--checkpoint", str(directory), "--class-map", str(class_map(tmp_path)))
    rows = list(csv.DictReader((directory / "summary.csv").read_text().splitlines()))
    best = max(rows, key=lambda row: float(row["eval_top1"]))
    assert float(best["eval_loss"]) == pytest.approx(loss, rel=1e-5)


def test_a_resumed_run_keeps_the_labels_of_its_classes(folders: Any, tmp_path: Path) -> None:
    root = folders("ant bee cat", "ant bee cat")
    directory = on_folders(root, tmp_path)
    for split in ("train", "val"):
        shutil.rmtree(root / split / "bee")
    seen: list[int] = []
    train.main(
        ["--resume", str(directory), "--epochs", "2"], Hooks(batch=lambda _, target: seen.extend(target.tolist()))
    )
    assert set(seen) == {0, 2}
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / "dog")
    with pytest.raises(UserError, match=r"images/train: class 'dog' is not among the 3 trained"):
        train.main(["--resume", str(directory), "--epochs", "3"])


def test_a_class_in_validation_only_is_named(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images/val: class 'cat' is not among the 2 trained"):
        on_folders(folders("ant bee", "ant bee cat"), tmp_path)


def figure(name: str, *args: str) -> float:
    (value,) = (row["value"] for row in validate([*args, "--device", "cpu"]) if row["metric"] == name)
    return float(value)


def class_map(tmp_path: Path) -> Path:
    path = tmp_path / "map.txt"
    path.write_text("ant\nbee\ncat\n")
    return path


# --- what is settled is told ------------------------------------------------------------------------------------------


def test_a_defaulted_rho_is_seen_everywhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train.main([*BASE, "--opt", "samon-eleml2orig", "--print-config"])
    printed = yaml.safe_load(capfd.readouterr().out)
    assert (printed["rho"], printed["eta"]) == (0.5, 0.01)
    seen: list[Any] = []
    _, directory = run(tmp_path, "--opt", "samon-eleml2orig", hooks=type(WATCH)(built=seen.append))
    assert "rho 0.5, eta 0.01; samon perturbs" in capfd.readouterr().err
    assert (settings(directory)["rho"], settings(directory)["eta"]) == (0.5, 0.01)
    assert repr(seen[0].optimizer).startswith("SAM(samon, geometry=eleml2orig, rho=0.5, eta=0.01, ")
    assert "SGD (" in repr(seen[0].optimizer)


def test_networks_of_one_image_size_take_another(tmp_path: Path) -> None:
    """As if --model-kwargs img_size had been given, in training and in validate.py; that flag wins."""
    _, directory = run(tmp_path, "--model", "test_vit", "--img-size", "64")
    assert last(directory)["state_dict"]["pos_embed"].shape[1] == 1 + (64 // 16) ** 2
    loss = figure("loss", "--checkpoint", str(directory), "--workers", "0")
    (row,) = csv.DictReader((directory / "summary.csv").read_text().splitlines())
    assert loss == pytest.approx(float(row["eval_loss"]), rel=1e-5)
    (one,) = (job.model for job in built(tmp_path, "--model-kwargs", "img_size=32", "dynamic_img_size=True"))
    assert one.pos_embed.shape[1] == 1 + (32 // 16) ** 2


def built(tmp_path: Path, *args: str) -> list[Any]:
    seen: list[Any] = []
    run(tmp_path, "--model", "test_vit", "--img-size", "64", *args, hooks=type(WATCH)(built=seen.append))
    return seen


# --- settings that do not do what they seem to -----------------------------------------------------------------------


def test_more_samples_than_there_are_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write_set(tmp_path / "data", lengths=(16, 16), num_classes=32)
    own = ["--data-dir", root, "--dataset", "wds/test", "--num-classes", "32", "--val-split", "", "-b", "16"]
    own += ["--in-chans", "3", "--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.2"]
    run(tmp_path, *own, "--train-num-samples", "48")
    assert "--train-num-samples 48: an epoch passes more than once over the 32 samples" in capfd.readouterr().err
    run(tmp_path, *own, "--train-num-samples", "32")
    assert "more than once" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("warmup", "prefix", "told"), [("1", [], True), ("1", ["--warmup-prefix"], False), ("0", [], False)]
)
def test_a_warm_up_without_an_end_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], warmup: str, prefix: list[str], told: bool
) -> None:
    run(tmp_path, "--warmup-epochs", warmup, *prefix)
    said = "--warmup-epochs 1 of 1 epochs: the learning rate never gets to its schedule"
    assert (said in capfd.readouterr().err) is told


def test_an_average_that_was_not_kept_cannot_be_evaluated(whole: Path) -> None:
    with pytest.raises(UserError, match=r"--use-ema: .*model_best\.pth\.tar has no averaged weights; drop it"):
        validate(["--checkpoint", str(whole), "--use-ema"])
    with pytest.raises(UserError, match=r"--use-ema: the model as it is created has no averaged"):
        validate(["--model", "test_resnet", "--use-ema", "--data-dir", "data/fashion-mnist"])
