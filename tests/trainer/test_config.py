"""The declaration of flags, what derives from it, and that mistakes end with one line and exit status 2."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from samon.cli import program as cli
from samon.errors import UserError
from samon.trainer import config
from samon.trainer import main as train
from samon.trainer.flag_rows import TRAIN, VALIDATE
from samon.trainer.flag_rows_timm import TIMM
from samon.trainer.flags import Groups, by_key, markdown
from tests.runs import BASE, ROOT

REFUSED = {flag.flag for flag in by_key(TRAIN).values() if flag.refused}


def parse(*argv: str) -> config.Config:
    return config.parse(list(argv))


def test_every_flag_is_declared_once() -> None:
    names = [flag.name for rows in TRAIN.values() for flag in rows]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("groups", "listed"), [(TRAIN, "train"), (VALIDATE, "validate")])
def test_timms_flags_are_all_there(groups: Groups, listed: str) -> None:
    """Every flag of timm 1.0.31's scripts, kept as a list of its own, honoured but for those refused by name."""
    flags = by_key(groups).values()
    known = {flag.flag for flag in flags} | {f"--{alias}" for flag in flags for alias in flag.aliases}
    wanted = set(Path(__file__).with_name(f"timm_{listed}_flags.txt").read_text().split())
    assert len(wanted) == {"train": 184, "validate": 59}[listed]
    assert wanted - known == set()


MULTILABEL = {"--task", "--target-format", "--multilabel-threshold", "--loss-class-weight", "--loss-pos-weight"}
MULTILABEL |= {"--loss-weight-power", "--class-stats", "--asl-gamma-pos", "--asl-gamma-neg", "--asl-clip"}
MULTILABEL |= {"--asl-reduction", "--poly-epsilon", "--poly-gamma", "--poly-alpha", "--twoway-tp", "--twoway-tn"}
MULTILABEL |= {"--db-neg-scale", "--db-init-bias", "--db-focal-gamma"}


def test_refused_flags() -> None:
    assert {f for f in REFUSED if not f.startswith(("--kd-", "--naflex-"))} == {
        "--fuser",
        "--torchscript",
        "--tta",
        "--distill-loss-weight",
        "--task-loss-weight",
        "--train-batch-sizes",
        "--variable-batch-loss-scale",
        *MULTILABEL,
    }


def test_both_programs_share_their_rows() -> None:
    """One table: what both programs know is the same flag, but for a default that differs where timm's does."""
    train, validate = by_key(TRAIN), by_key(VALIDATE)
    shared = train.keys() & validate.keys()
    different = {key: (train[key].default, validate[key].default) for key in shared if train[key] != validate[key]}
    assert different == {"model": ("resnet50", None), "batch_size": (128, 256)}
    assert {"num_classes", "data_dir", "mean", "amp", "workers", "device"} <= shared


def test_aliases_of_timm() -> None:
    argv = ("--train-img-sizes", "16", "32", "--train-steps-per-epoch", "7")
    assert parse(*argv).train_batches_per_epoch == 7


def test_the_names_of_earlier_releases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On the command line and in a file with a warning of one line each; in what a run has stored without one."""
    (tmp_path / "old.yaml").write_text("max_bad_steps: 7\nper_opt: {sgd: {checkpoint_format: parts}}\n")
    old = parse("-c", str(tmp_path / "old.yaml"), "--fsdp", "--fsdp-reshard=never")
    assert (old.max_nonfinite_steps, old.checkpoint_format, old.fsdp_reshard_after_forward) == (7, "dcp", "never")
    assert len(caplog.messages) == 3
    assert "deprecated: --fsdp-reshard is now --fsdp-reshard-after-forward" in caplog.text
    caplog.clear()
    stored = {"max_bad_steps": 7, "fsdp_reshard": "always", "checkpoint_format": "parts"}
    resumed = config.parse(["--resume", "x"], lambda resume: stored)
    assert (resumed.max_nonfinite_steps, resumed.checkpoint_format) == (7, "dcp")
    assert not caplog.messages
    assert not [old for old in ("max-bad-steps", "fsdp-reshard`", "centring") if old in markdown(TRAIN)]


def test_a_switch_of_a_file_can_be_taken_back(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("amp: true\nmodel_ema: true\nno_aug: true\n")
    found = config.parse(["-c", str(tmp_path / "recipe.yaml"), "--no-amp"])
    assert (found.amp, found.model_ema, found.no_aug) == (False, True, True)
    with pytest.raises(UserError, match="unknown argument --no-no-aug"):
        config.parse(["--no-no-aug"])


def test_the_configuration_is_frozen() -> None:
    settings = parse("--lr", "0.5")
    with pytest.raises(AttributeError, match="frozen"):
        settings.lr = 1.0
    changed = settings.but(lr=1.0)
    assert (settings.lr, changed.lr, changed.opt) == (0.5, 1.0, settings.opt)


def test_the_documentation_is_current() -> None:
    assert markdown(TRAIN).strip() in (ROOT / "docs/flags.md").read_text(), "run: python -m samon.trainer.flag_rows"


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag.flag in printed for flag in by_key(TRAIN).values())


def test_print_config_reads_back_and_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--opt", "samon", "--data-dir", "/nowhere", "--global-batch-size", "7", "--print-config"]) == {}
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["opt"] == "samon"
    (tmp_path / "again.yaml").write_text(printed)
    again = parse("-c", str(tmp_path / "again.yaml"), "--print-config")
    assert config.dump(again) == printed


def test_a_file_changes_the_one_it_is_based_on(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("lr: 0.2\nepochs: 7\nper_opt:\n  samon: {rho: 0.7}\n  sam: {rho: 0.1}\n")
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub/own.yaml"
    file.write_text("base: ../base.yaml\nepochs: 9\nper_opt: {sam: {rho: 0.3}}\n")
    config = parse("-c", str(file), "--opt", "samon")
    assert (config.lr, config.epochs, config.rho) == (0.2, 9, 0.7)
    assert parse("-c", str(file), "--opt", "sam").rho == 0.3
    file.write_text("base: gone.yaml\n")
    with pytest.raises(UserError, match=r"gone\.yaml cannot be read"):
        parse("-c", str(file))


def test_files_that_are_based_on_each_other_are_refused(tmp_path: Path) -> None:
    own, other = tmp_path / "own.yaml", tmp_path / "other.yaml"
    own.write_text("base: own.yaml\n")
    with pytest.raises(UserError, match=r"own\.yaml: `base` leads from .*own\.yaml back to .*own\.yaml"):
        parse("-c", str(own))
    own.write_text("base: other.yaml\n")
    other.write_text("base: own.yaml\n")
    with pytest.raises(UserError, match=r"own\.yaml: `base` leads from .*other\.yaml back to .*own\.yaml"):
        parse("-c", str(own))


def test_no_value_is_none_where_a_setting_can_be_off(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("clip_grad: null\nmodel_kwargs:\nexperiment: null\n<<: {lr: 1.0}\nlr: 2.0\n")
    config = parse("-c", str(tmp_path / "c.yaml"))
    assert (config.clip_grad, config.model_kwargs, config.experiment, config.lr) == (None, {}, "", 2.0)


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lr: 0.2\nepochs: 7\nmomentum: 0.5\nper_opt:\n  samon: {lr: 0.3, rho: 0.7}\n  sgd: {lr: 0.4}\n")
    c = parse("-c", str(file), "--opt", "samon", "--epochs", "9")
    assert (c.lr, c.rho, c.epochs, c.momentum, c.weight_decay) == (0.3, 0.7, 9, 0.5, 2e-5)
    assert parse("-c", str(file), "--opt", "samon", "--lr", "1").lr == 1.0
    assert parse("-c", str(file)).lr == 0.4  # per_opt of the default, sgd
    file.write_text("opt: samon\nper_opt: {samon: {rho: 0.7}}\n")
    assert parse("-c", str(file)).rho == 0.7


def test_recipes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("-c", "imagenet/resnet50", "--print-config").model == "resnet50"
    assert parse(
        "-c", "cifar/ablations/fix_norm", "--opt", "sam", "--print-config"
    ).fix_norm  # changes a recipe that it names by a path of its own
    with pytest.raises(UserError, match="No such file or directory; did you mean 'imagenet/resnet50'"):
        parse("-c", "imagnet/resnet50")
    (tmp_path / "quickstart").write_text("model: resnet18\n")
    assert parse("-c", "quickstart").model == "resnet18"  # a file of that name comes first


def test_yaml_values_are_typed(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lr: 1e-3\nmean: [0.5]\nm_sharpness: 8\nmodel_kwargs: {a: 1}\ninput_size: [1, 28, 28]\namp: true\n")
    c = parse("-c", str(file), "--opt", "samon")
    assert (c.lr, c.mean, c.m_sharpness, c.model_kwargs, c.input_size, c.amp) == (
        1e-3,
        [0.5],
        8,
        {"a": 1},
        [1, 28, 28],
        True,
    )


def test_an_args_yaml_of_timm_is_accepted(tmp_path: Path) -> None:
    """It holds every key of timm's, those refused here at their defaults."""
    file = tmp_path / "args.yaml"
    timm_flags = [flag for flag in by_key(TIMM).values() if "train" in flag.programs]
    values = {flag.key: flag.default for flag in timm_flags} | {"prefetcher": True, "rank": 0}
    file.write_text(yaml.safe_dump(values))
    assert parse("-c", str(file)).model == "resnet50"


def test_a_refused_flag_without_its_switch_has_any_value(tmp_path: Path) -> None:
    """Defaults differ between versions of timm: a loss scale matters only beside batches of several sizes."""
    file = tmp_path / "args.yaml"
    for scale in ("none", "linear"):
        file.write_text(f"variable_batch_loss_scale: {scale}\nnaflex_loss_scale: {scale}\nkd_temperature: 1.0\n")
        assert parse("-c", str(file)).epochs == 300
    for switch, word in (("train_batch_sizes: [8, 16]", "one size"), ("task: multilabel", "one label")):
        file.write_text(f"{switch}\nvariable_batch_loss_scale: none\ntarget_format: multihot\n")
        with pytest.raises(UserError, match=f"is not honoured: .*{word}"):
            parse("-c", str(file))


def test_the_name_of_a_loss_is_its_switch(tmp_path: Path) -> None:
    """timm writes `loss: bce` into args.yaml for --bce-loss."""
    file = tmp_path / "args.yaml"
    file.write_text("loss: bce\nbce_loss: false\njsd_loss: false\n")
    kinds = [parse(*argv) for argv in (["--loss", "bce"], ["-c", str(file)], ["-c", str(file), "--loss", "ce"])]
    assert [(kind.bce_loss, kind.jsd_loss, kind.loss) for kind in kinds] == [
        (True, False, None),
        (True, False, None),
        (False, False, None),
    ]
    assert parse("--loss", "jsd", "--aug-splits", "3").jsd_loss
    with pytest.raises(UserError, match="--loss ce contradicts --bce-loss"):
        parse("--loss", "ce", "--bce-loss")


def test_what_launchers_add_and_people_shorten() -> None:
    for argv in (["--local_rank=1"], ["--local-rank", "1"]):
        assert vars(parse(*argv)) == vars(parse())
    for short, flag in {
        "--jsd": "--jsd-loss",
        "--weight-deca": "--weight-decay",
        "--no-pref": "--no-prefetcher",
    }.items():
        with pytest.raises(UserError, match=f"unknown argument {short}; did you mean '{flag}'"):
            parse(short)


def test_every_refused_flag_says_why(tmp_path: Path) -> None:
    for name in sorted(REFUSED):
        with pytest.raises(UserError, match=f"^{name} is not honoured: .{{20,}}"):
            parse(name)
    assert parse("--tta", "0").tta == 0  # the default may be named
    (tmp_path / "c.yaml").write_text("naflex_loader: true\n")
    with pytest.raises(UserError, match=r"naflex_loader in .* is not honoured"):
        parse("-c", str(tmp_path / "c.yaml"))


def test_positional_directory_and_old_names() -> None:
    assert parse("/images").data_dir == "/images"
    assert parse("--dr", "0.3").decay_rate == 0.3
    assert parse("-vb", "7", "-j", "2", "-b", "5").validation_batch_size == 7


@pytest.mark.parametrize(("world", "right"), [("2", True), ("4", False)])
def test_global_batch_size_counts_processes(world: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    argv = ["-b", "16", "--grad-accum-steps", "4", "--global-batch-size", "128"]
    if right:
        assert parse(*argv).global_batch_size == 128
    else:
        with pytest.raises(UserError, match="4 processes x batch 16 x accumulation 4 make 256"):
            parse(*argv)


ONE_PIXEL = ["--opt", "samon", "--model", "resnet10t", "--img-size", "28", "--m-sharpness", "1"]
BAD: dict[str, tuple[list[str], str]] = {
    "flag": (["--learning-rat", "1"], "unknown argument --learning-rat"),
    "flag, near one": (["--weight-deca", "1"], "did you mean '--weight-decay'"),
    "optimizer": (["--opt", "samom"], "unknown optimizer 'samom'; did you mean 'samon'"),
    "base optimizer": (["--opt", "samon", "--base-opt", "lambb"], "did you mean 'lamb'"),
    "base is sharpness-aware": (["--opt", "samon", "--base-opt", "sam"], "itself sharpness-aware"),
    "model": (["--model", "test_resnett"], "unknown model 'test_resnett'; did you mean 'test_resnet'"),
    "model argument": (["--model-kwargs", "widthh=3"], "widthh"),
    "not a number": (["--lr", "fast"], "--lr: 'fast' is not a float"),
    "not a pair": (["--model-kwargs", "widthh"], "is not KEY=VALUE"),
    "choice": (["--sched", "cosin"], "did you mean 'cosine'"),
    "negative rho": (["--opt", "samon", "--rho", "-0.1"], "--rho: must be >= 0, got -0.1"),
    "scale": (["--scale", "0.5"], "--scale: expected 2 arguments"),
    "ratio": (["--ratio", "0.5"], "--ratio: expected 2 arguments"),
    "decay without that phase": (["--lr-decay-fn", "linear"], "--lr-decay-fn is for --sched wsd and rsqrt, not cosine"),
    "timescale": (["--sched", "wsd", "--lr-stable-timescale", "2"], "is for --sched rsqrt, not wsd"),
    "plateau from an epoch": (["--sched", "plateau", "--start-epoch", "1"], "drop --start-epoch"),
    "auto": (["--resume", "auto"], "--resume auto continues what --experiment names"),
    "milestones in parts": (["--save-epochs", "1", "--checkpoint-format", "dcp"], "--save-epochs keeps single files"),
    "multi-label": (["--task", "multilabel"], "--task is not honoured: each image has one label here"),
    "loss": (["--loss", "zlpr"], "--loss: 'zlpr' is not one of"),
    "range": (["--reprob", "1.5"], "must be in [0, 1]"),
    "infinite rho": (["--opt", "samon", "--rho", "inf"], "--rho: inf is not a value; give a finite number"),
    "infinite eta": (["--opt", "samon", "--eta", "inf"], "--eta: inf is not a value"),
    "regex": (["--opt", "samon", "--perturb", "layer("], "not a regular expression"),
    "regex without match": (["--opt", "samon", "--perturb", "layer9"], "layer9"),
    "no normalization layer": (["--opt", "samon", "--model", "test_nfnet"], "test_nfnet has no trainable parameter"),
    "rho for sgd": (["--opt", "sgd", "--rho", "0.1"], "--rho does nothing with --opt sgd"),
    "sparsity without mask": (["--opt", "sam", "--sparsity", "0.5"], "--sparsity is for"),
    "m does not divide": (["--opt", "samon", "--m-sharpness", "5"], "not divisible by --m-sharpness 5"),
    "m": (["--opt", "samon", "--m-sharpness", "all"], "not device, global or a number"),
    "no data": (["--data-dir", "/nowhere/at/all"], "/nowhere/at/all"),
    "no split": (["--train-split", "trian"], "no split 'trian'; did you mean 'train'"),
    "data set type": (["--dataset", "tfds/x"], "tfds/ cannot be resumed or counted exactly"),
    "unknown data set type": (["--dataset", "wbs/x"], "wbs/x: no such kind of data set"),
    "class count": (["--num-classes", "3"], "has 10 classes, the model 3; use --num-classes 10"),
    "global batch": (["--global-batch-size", "100"], "1 processes x batch 16 x accumulation 1 make 16"),
    "config": (["-c", "/nowhere.yaml"], "--config /nowhere.yaml cannot be read"),
    "no classes": (["--num-classes", "0"], "--num-classes: must be >= 1, got 0"),
    "mean of bytes": (["--mean", "127.5"], "--mean: must be in [0, 1], got 127.5"),
    "std of bytes": (["--std", "63"], "--std: must be in (0, 1], got 63"),
    "resume": (["--resume", "/nowhere.pth.tar"], "--resume /nowhere.pth.tar: no such file"),
    "initial checkpoint": (["--initial-checkpoint", "/nowhere.pth"], "--initial-checkpoint: no file /nowhere.pth"),
    "output": (["--output", "/proc/nothing"], "it cannot be written; choose another path"),
    "odd batch with mixup": (["--mixup", "0.2", "-b", "15"], "even --batch-size"),
    "jsd without splits": (["--jsd-loss"], "--aug-splits"),
    "amp with half weights": (["--amp", "--model-dtype", "bfloat16"], "--amp needs float32"),
    "refused": (["--torchscript"], "--torchscript is not honoured: TorchScript is retired"),
    "distillation": (["--kd-model-name", "resnet50"], "samon.timm_script"),
    "batch larger than the data": (["-b", "128"], "64 training samples do not fill one batch of 128"),
    "interval": (["--checkpoint-interval", "soon"], "not a number of updates"),
    "workers": (["-j", "-1"], "--workers: must be >= 0"),
    "ascent": (["--opt", "samon", "--ascent", "evry:3"], "--ascent: ascent must be one of batch, previous"),
    "ascent without a pass": (["--opt", "samon", "--ascent", "previous", "--m-sharpness", "4"], "no ascent pass"),
    "gsam without a pass": (
        ["--opt", "samon", "--ascent", "momentum", "--gsam-alpha", "0.1"],
        "needs the gradient at w",
    ),
    "ascent size": (["--opt", "samon", "--ascent-size", "32"], "--ascent-size 32 is to be smaller than the images"),
    "ascent size, both": (["--opt", "samon", "--ascent-size", "8", "--bn-stats", "both"], "--ascent-size excludes"),
    "ascent size of a ViT": (
        ["--opt", "samon", "--ascent-size", "8", "--model", "test_vit"],
        "does not take such images",
    ),
    "ascent of sgd": (["--opt", "sgd", "--ascent", "previous"], "--ascent does nothing with --opt sgd"),
    "fix-norm and SAM-ON": (["--opt", "samon", "--fix-norm"], "no trainable parameter to perturb"),
    "no norm to train": (["--fix-norm", "--train-only-norm"], "--fix-norm leaves no normalization parameters"),
    "two kinds of groups": (["--weight-decay-on", "all", "--layer-decay", "0.9"], "--weight-decay-on excludes"),
    "dropout in groups": (["--opt", "samon", "--norm-dropout", "0.1", "--m-sharpness", "4"], "--norm-dropout excludes"),
    "fisher of sam": (["--opt", "sam", "--fisher-samples", "9"], "are for ssam-f and ssam-d, not sam"),
    "compile backend": (["--torchcompile", "nothing"], "nothing"),
    "graphs of a GPU": (
        ["--torchcompile", "--torchcompile-mode", "reduce-overhead"],
        "reduce-overhead captures CUDA graphs, which --device cpu has not; drop the mode",
    ),
    "device": (["--device", "tpux"], "--device"),
    "two bases": (["--opt", "samon-adamw", "--base-opt", "lion"], "use --opt samon --base-opt lion"),
    "end before start": (["--opt", "samon", "--sam-end-epoch", "1", "--sam-start-epoch", "1"], "is not behind"),
    "start behind the end": (["--opt", "samon", "--sam-start-epoch", "1"], "--sam-start-epoch 1 of 1 epochs"),
    "m of one pixel": (ONE_PIXEL, "layer4.0.bn1 normalizes over the batch and sees one value"),
    "batch of one pixel": ([*ONE_PIXEL[:-2], "-b", "1"], "layer4.0.bn1 normalizes over the batch"),
    "means": (["--mean", "0.5", "0.5"], "mean must have one value or 1 values, got 2"),
    "deviations": (["--in-chans", "3", "--std", "0.5", "0.5"], "std must have one value or 3 values, got 2"),
    "two sizes": (["--img-size", "32", "--input-size", "1", "48", "48"], "Conflicting input image sizes"),
    "two sizes of a ViT": (["--model", "test_vit", "--model-kwargs", "img_size=48"], "Conflicting input image sizes"),
    "channels": (["--in-chans", "7"], "--in-chans 7: images are read as L, 1 channel; use 1 or 3"),
    "mode": (["--input-img-mode", "RGBX2"], "--input-img-mode RGBX2: Pillow knows no such mode"),
    "interpolation": (["--train-interpolation", "cubic"], "--train-interpolation: 'cubic' is not one of 'random', '"),
    "crop mode": (["--train-crop-mode", "foo"], "--train-crop-mode: 'foo' is not one of 'rrc', 'rkrc', 'rkrr', 'pad'"),
    "text as weights": (["--initial-checkpoint", "LICENSE"], "--initial-checkpoint LICENSE is a text file"),
    "text as pretrained": (["--pretrained-path", "LICENSE"], "--pretrained-path LICENSE is a text file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv, words = BAD[case]
    output = [] if "--output" in argv else ["--output", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        cli.run_script(lambda: train.main([*BASE, *output, *argv]))
    printed = capfd.readouterr().err
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert len(errors) == 1
    assert "Traceback" not in printed
    assert any(word in errors[0] for word in words.split("|")), errors[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 1\nopt: sgd\nlr: 2", "'lr' stands there twice"),
        ("per_opt: {sgd: {lr: 1, lr: 2}}", "'lr' stands there twice"),
        ("opt:", "has no value; give one, or remove the line"),
        ("mixup: null", "mixup in "),
        ("per_opt: {sgd: {batch_size: null}}", "batch_size in per_opt"),
        ("learning_rate: 1", "unknown key 'learning_rate'"),
        ("weight_deca: 1", "did you mean 'weight_decay'"),
        ("per_opt: {samom: {}}", "unknown optimizer 'samom'; did you mean 'samon'"),
        ("per_opt: {samon: {roh: 1}}", "did you mean 'rho'"),
        ("per_opt: 3", "must map optimizer names"),
        ("lr: fast", "'fast' is not a float"),
        ("epochs: 1.5", "1.5 is not an int"),
        ("amp: 3", "takes true or false"),
        ("input_size: [1, 2]", "takes 3 values, got 2"),
        ("- 1", "holds no settings"),
        ("a: [", "is not YAML"),
        ("kd_model_name: resnet50", "is not honoured"),
        ("config: x.yaml", "unknown key 'config'"),
    ],
)
def test_bad_yaml(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse("-c", str(file))
    assert words in str(error.value)
    assert str(file) in str(error.value)


def test_a_script_ends_with_one_line(tmp_path: Path) -> None:
    """A real process: nothing but the line on stderr, nothing on stdout."""
    done: Any = subprocess.run(
        [sys.executable, "train.py", "--opt", "samom"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["error: --opt: unknown optimizer 'samom'; did you mean 'samon'?"]


@pytest.mark.parametrize(
    ("module", "script", "name"),
    [
        (None, "/usr/bin/samon-train", "samon-train"),
        (None, "/a/train.py", "python train.py"),
        ("samon.cli.train", "/a/samon/cli/train.py", "python -m samon.cli.train"),
        ("samon.cli.validate", "/a/samon/cli/validate.py", "python -m samon.cli.validate"),
    ],
)
def test_programs_call_themselves_as_they_were_started(
    module: str | None, script: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module and SimpleNamespace(name=module))
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit):
        parse("--help")
    assert capsys.readouterr().out.startswith(f"usage: {name} ")
