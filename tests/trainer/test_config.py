"""Command line and files become one configuration, and mistakes end with one line and exit status 2."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from samon.cli import program
from samon.errors import UserError
from samon.trainer import config
from samon.trainer import main as train
from samon.trainer.flag_rows_timm import TIMM
from samon.trainer.flags import by_key
from tests.runs import BASE, ROOT

Write = Callable[[str], str]


def parse(*argv: str) -> config.Config:
    return config.parse(list(argv))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a YAML file and returns its path."""

    def write_yaml(text: str, name: str = "c.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_yaml


def test_the_configuration_is_frozen() -> None:
    settings = parse("--lr", "0.5")
    with pytest.raises(AttributeError, match="frozen"):
        settings.lr = 1.0
    changed = settings.but(lr=1.0)
    assert (settings.lr, changed.lr, changed.opt) == (0.5, 1.0, settings.opt)


def test_precedence(write: Write) -> None:
    text = "lr: 0.2\nepochs: 7\nmomentum: 0.5\namp: true\nno_aug: true\nper_opt:\n  samon: {lr: 0.3, rho: 0.7}\n"
    file = write(text + "  sgd: {lr: 0.4}\n")
    c = parse("-c", file, "--opt", "samon", "--epochs", "9", "--no-amp")
    assert (c.lr, c.rho, c.epochs, c.momentum, c.weight_decay) == (0.3, 0.7, 9, 0.5, 2e-5)
    assert (c.amp, c.no_aug) == (False, True)
    assert parse("-c", file, "--opt", "samon", "--lr", "1").lr == 1.0
    assert parse("-c", file, "--opt", "SAMON").rho == 0.7  # timm ignores the case
    assert parse("-c", file).lr == 0.4  # per_opt of the default, sgd
    assert parse("-c", write("opt: samon\nper_opt: {samon: {rho: 0.7}}\n")).rho == 0.7


def test_values_of_a_file_are_typed(write: Write) -> None:
    c = parse("-c", write("lr: 1e-3\nmean: [0.5]\nmodel_kwargs: {a: 1}\ninput_size: [1, 28, 28]\namp: true\n"))
    assert (c.lr, c.mean, c.model_kwargs, c.input_size, c.amp) == (1e-3, [0.5], {"a": 1}, [1, 28, 28], True)
    assert parse("-c", write("opt: samon\nm_sharpness: 8\n")).m_sharpness == 8
    # A missing value is None for settings that can be off; merge keys may repeat a key.
    c = parse("-c", write("clip_grad: null\nmodel_kwargs:\nexperiment: null\n<<: {lr: 1.0}\nlr: 2.0\n"))
    assert (c.clip_grad, c.model_kwargs, c.experiment, c.lr) == (None, {}, "", 2.0)


def test_print_config_reads_back_and_touches_nothing(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--opt", "samon", "--data-dir", "/nowhere", "--global-batch-size", "7", "--print-config"]) == {}
    printed = capsys.readouterr().out
    assert (yaml.safe_load(printed)["opt"], yaml.safe_load(printed)["rho"]) == ("samon", 0.5)
    assert config.dump(parse("-c", write(printed), "--print-config")) == printed


def test_a_file_changes_the_one_that_it_is_based_on(write: Write) -> None:
    write("lr: 0.2\nepochs: 7\nper_opt:\n  samon: {rho: 0.7}\n  sam: {rho: 0.1, momentum: 0.5}\n", "base.yaml")
    file = write("base: ../base.yaml\nepochs: 9\nper_opt: {SAM: {rho: 0.3}}\n", "sub/own.yaml")
    c = parse("-c", file, "--opt", "samon")
    assert (c.lr, c.epochs, c.rho) == (0.2, 9, 0.7)
    c = parse("-c", file, "--opt", "sam")
    assert (c.rho, c.momentum) == (0.3, 0.5)
    with pytest.raises(UserError, match=r"gone\.yaml cannot be read"):
        parse("-c", write("base: gone.yaml\n"))
    own = write("base: other.yaml\n", "own.yaml")
    write("base: own.yaml\n", "other.yaml")
    with pytest.raises(UserError, match=r"own\.yaml: `base` leads from .*other\.yaml back to .*own\.yaml"):
        parse("-c", own)


def test_another_name_of_a_setting_replaces_what_a_file_says(write: Write) -> None:
    """A positional data directory was ignored beside the data_dir of a file or of a resumed run."""
    file = write("data_dir: /old\nlr: 0.1\ndrop_path: 0.1\n")
    c = parse("/new", "-c", file, "--lr-base", "0.4", "--drop-connect", "0.2")
    assert (c.data_dir, c.lr, c.lr_base, c.drop_path, c.drop_connect) == ("/new", None, 0.4, None, 0.2)


def test_another_optimizer_brings_its_own_rho_to_a_resumed_run() -> None:
    stored: Callable[[str], dict[str, object]] = lambda resume: {"opt": "samon", "rho": 0.7, "epochs": 7}  # noqa: E731
    for opt, rho in (([], 0.7), (["--opt", "samon"], 0.7), (["--opt", "sam"], 0.05)):
        c = config.parse(["--resume", "run", *opt], stored)
        assert (c.rho, c.epochs) == (rho, 7)


def test_recipes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("-c", "imagenet/resnet50", "--print-config").model == "resnet50"
    assert parse("-c", "cifar/ablations/fix_norm", "--opt", "sam", "--print-config").fix_norm  # based on another recipe
    with pytest.raises(UserError, match="No such file or directory; did you mean 'imagenet/resnet50'"):
        parse("-c", "imagnet/resnet50")
    (tmp_path / "quickstart").write_text("model: resnet18\n")
    assert parse("-c", "quickstart").model == "resnet18"  # a file of that name comes first


def test_an_args_yaml_of_timm_is_accepted(write: Write) -> None:
    """It has every key of timm's, refused ones at defaults that differ between versions of timm."""
    values = {flag.key: flag.default for flag in by_key(TIMM).values() if "train" in flag.programs}
    values |= {"prefetcher": True, "rank": 0, "kd_temperature": 1.0, "model": "resnet50", "batch_size": 128}
    for scale in ("none", "linear"):
        values |= {"variable_batch_loss_scale": scale, "naflex_loss_scale": scale}
        assert parse("-c", write(yaml.safe_dump(values))).model == "resnet50"
    for switch, word in (("train_batch_sizes: [8, 16]", "one size"), ("task: multilabel", "one label")):
        with pytest.raises(UserError, match=f"is not supported: .*{word}"):
            parse("-c", write(f"{switch}\nvariable_batch_loss_scale: none\ntarget_format: multihot\n"))


def test_the_name_of_a_loss_is_its_switch(write: Write) -> None:
    """timm writes `loss: bce` into args.yaml for --bce-loss."""
    file = write("loss: bce\nbce_loss: false\njsd_loss: false\n")
    for argv, bce in ((["--loss", "bce"], True), (["-c", file], True), (["-c", file, "--loss", "ce"], False)):
        c = parse(*argv)
        assert (c.bce_loss, c.jsd_loss, c.loss) == (bce, False, None)
    assert parse("--loss", "jsd", "--aug-splits", "3").jsd_loss


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 1\nopt: sgd\nlr: 2", "duplicate key 'lr'"),
        ("per_opt: {sgd: {lr: 1, lr: 2}}", "duplicate key 'lr'"),
        ("opt:", "has no value"),
        ("per_opt: {sgd: {batch_size: null}}", "batch_size in per_opt"),
        ("weight_deca: 1", "unknown key 'weight_deca'|did you mean 'weight_decay'"),
        ("per_opt: {samom: {}}", "unknown optimizer 'samom'; did you mean 'samon'"),
        ("per_opt: {samon: {roh: 1}}", "did you mean 'rho'"),
        ("per_opt: 3", "must map optimizer names"),
        ("lr: fast", "'fast' is not a float"),
        ("epochs: 1.5", "1.5 is not an int"),
        ("amp: 3", "takes true or false"),
        ("input_size: [1, 2]", "takes 3 values, got 2"),
        ("- 1", "contains no settings"),
        ("a: [", "is not YAML"),
        ("naflex_loader: true", "is not supported"),
        ("config: x.yaml", "unknown key 'config'"),
    ],
)
def test_bad_files(text: str, words: str, write: Write) -> None:
    file = write(text)
    with pytest.raises(UserError) as error:
        parse("-c", file)
    assert all(word in str(error.value) for word in [file, *words.split("|")])


def test_global_batch_size_counts_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["-b", "16", "--grad-accum-steps", "4", "--global-batch-size", "128"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse(*argv).global_batch_size == 128
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes x batch 16 x accumulation 4 make 256"):
        parse(*argv)


# Mistakes that are found before the data are read, and the others.
EARLY = {
    "--jsd": "unknown argument --jsd; did you mean '--jsd-loss'",  # no abbreviations
    "--no-no-aug": "unknown argument --no-no-aug",
    "--lr fast": "--lr: 'fast' is not a float",
    "--model-kwargs widthh": "is not KEY=VALUE",
    "--sched cosin": "did you mean 'cosine'",
    "--scale 0.5": "--scale: expected 2 arguments",
    "--opt samon --rho -0.1": "--rho: must be >= 0, got -0.1",
    "--opt samon --rho inf": "--rho: inf is not allowed",
    "--reprob 1.5": r"must be in \[0, 1\]",
    "--std 63": r"--std: must be in \(0, 1\], got 63",
    "--checkpoint-interval soon": "not a number of updates",
    "--checkpoint-interval nanm": "not a number of updates",
    "--opt samon --m-sharpness all": "not device, global or a number",
    "--opt samon --ascent evry:3": "--ascent: ascent must be one of batch, previous",
    "-c /nowhere.yaml": "--config /nowhere.yaml cannot be read",
    "--opt sgd --rho 0.1": "--rho has no effect with --opt sgd",
    "--opt samon-adamw --base-opt lion": "use --opt samon --base-opt lion",
    "--opt sam --mask-epochs 9": "--mask-epochs has no effect with --opt sam",
    "--opt ssam-d --fisher-samples 9": "--fisher-samples has no effect with --opt ssam-d",
    "--opt ssam-d --mask-epochs 9 --opt-kwargs mask_every=2": "--mask-epochs has no effect.* and mask_every",
    "--opt samon-layerl2 --eta 0.1": "--eta 0.1 has no effect: the geometry layerl2",
    "--opt-kwargs lr=0.3": "--opt-kwargs lr: .*give --lr",
    "--opt adamw --opt-betas 0.9": "--opt-betas: adamw has 2 betas, got 1",
    "--lr 0": "--lr: must be > 0",
    "--opt samon --m-sharpness 5": "not divisible by --m-sharpness 5",
    "--opt samon --m-sharpness 16 --mixup 0.2 --mixup-mode half": "batch of 8 images is not divisible",
    "--aug-repeats 1.5": "--aug-repeats 1.5: give a whole number",
    "--opt samon --m-sharpness 4 --aug-splits 2": "--aug-splits",
    "--opt samon --m-sharpness 4 --norm-dropout 0.1": "--norm-dropout",
    "--fsdp --opt ssam-f": "--opt ssam-f",
    "--amp --model-dtype bfloat16": "--amp needs float32",
    "--mixup 0.2 -b 15": "even --batch-size",
    "--aug-splits 1": "at least 2",
    "--loss ce --bce-loss": "--loss ce contradicts --bce-loss",
    "--train-img-sizes 16 32 --train-size-probs 1": "one value for each",
    "--opt lookahead_ssam-f --aug-splits 2 --jsd-loss --fisher-samples 9": "single images",
    "--opt samon --sam-tail 0.3 --tail-opt samon-muon": "--tail-opt samon-muon: .* is itself sharpness-aware",
    "--opt samon --sam-tail 0.3 --tail-opt mon": "--tail-opt: unknown optimizer 'mon'; did you mean 'muon'",
    "--opt samon --sam-tail 0.3 --tail-opt lookahead_sgd": "--tail-opt replaces .*drop lookahead_",
    "--opt samon --sam-tail 0.3 --tail-opt muon --opt lookahead_samon": "--tail-opt replaces .*drop lookahead_",
    "--opt samon --sam-tail 1 --tail-opt muon": "use --base-opt muon instead",
    "--opt samon --sam-tail 0.5 --tail-opt adahessian": "second derivatives",
    "--opt samon-layerl2 --base-opt lookahead_sgd": "Lookahead goes around it: use lookahead_samon-layerl2",
    "--opt samon --base-opt lambb": "did you mean 'lamb'",
    "--opt samon --perturb layer9": "--perturb 'layer9' matches none",
    "--opt sam --sparsity 0.5": "sparsity is for",
    "--opt samon --fix-norm": "no trainable parameter to perturb.*unfreeze",
    "--opt samon --model test_nfnet": "test_nfnet has no trainable parameter",
    "--opt samon --ascent-size 32": "--ascent-size 32",
    "--opt samon --ascent-size 24 --train-img-sizes 16 32": "--ascent-size 24 must be smaller",
    "--opt samon --ascent-size 8 --model test_vit": r"test_vit does not take images of \[1, 8, 8\]",
    "--train-img-sizes 32 8 --model test_vit": r"test_vit does not take images of \[1, 8, 8\]",
    "--opt samon --opt-kwargs rho=0.3": "--opt-kwargs rho: .*give --rho",
    "--opt samon --model resnet10t --img-size 28 --m-sharpness 1": r"layer4\.0\.bn1 normalizes over the batch",
    "--opt samon --model resnet10t --img-size 64 -b 1 --ascent-size 32": r"layer4\.0\.bn1 normalizes over the batch",
    "--model test_resnett": "unknown model 'test_resnett'; did you mean 'test_resnet'",
    "--model-kwargs widthh=3": "widthh",
    "--device tpux": "--device",
    "--mean 0.5 0.5": "mean must have one value or 1 values, got 2",
    "--img-size 32 --input-size 1 48 48": "Conflicting input image sizes",
    "--model test_vit --model-kwargs img_size=48": "Conflicting input image sizes",
    "--input-size 3 8 8": "Conflicting input channel counts",
    "--in-chans 7": "--in-chans 7: images are read as L, 1 channel",
    "--input-img-mode RGBX2": "--input-img-mode .* not: 'RGBX2'",
    "--initial-checkpoint /nowhere.pth": "--initial-checkpoint: no file /nowhere.pth",
    "--initial-checkpoint LICENSE": "--initial-checkpoint LICENSE is a text file",
    "--freeze layer9": "--freeze 'layer9' matches no parameter; names go from conv1.0.weight",
    "--freeze (": "--freeze .*not a regular expression",
    "--freeze .": "leaves nothing to train",
    "--pretrained-path /nowhere.pth": "--pretrained-path: no file /nowhere.pth",
    "--pretrained-path LICENSE": "--pretrained-path LICENSE is a text file",
    "--resume /nowhere.pth.tar": r"--resume /nowhere\.pth\.tar: no such file",
    "--output /proc/nothing": "it cannot be written",
    "--opt samon --perturb-frozen": "--perturb-frozen has no effect",
    "--opt samon --ascent previous --m-sharpness 4": r"--ascent 'previous' makes no ascent pass.*--m-sharpness",
}
LATE = {
    "--opt samon --rho-sched lr --sched none": "learning rate that is constant",
    "--opt samon --sam-tail 0.01": "is less than one; raise it",
    "--opt samon --sam-tail 0.1 --sched wsd --epochs 2 --warmup-epochs 0 --cooldown-epochs 2": "give --decay-epochs",
    "--opt samon --rho-warmup 5": "--rho-sched",
    "--opt samon --sam-start-epoch 1": "none of the 4 updates takes two passes; change --sam-start-epoch",
    "--opt samon --epochs 2 --sam-start-epoch 1 --sam-every 9": "none of the 8 updates",
    "--torchcompile nothing": "nothing",
    "--torchcompile --torchcompile-mode reduce-overhead": "reduce-overhead needs CUDA graphs",
    "--data-dir /nowhere/at/all": "/nowhere/at/all",
    "--fsdp": "--fsdp shards a model across processes",
    "--train-split trian": "no split 'trian'; did you mean 'train'",
    "--dataset wbs/x": "wbs/ cannot be read; use wds/",
    "--num-classes 3": "has 10 classes, the model 3; use --num-classes 10",
    "-b 128": "64 training samples do not fill one batch of 128",
    "--epochs 2 --stop-epoch 3": "--stop-epoch 3 of 2 epochs",
    "--epochs 2 --save-epochs 3 1": "--save-epochs 3 of 2 epochs",
}


@pytest.mark.parametrize("args", [*EARLY, *LATE])
def test_mistakes_end_with_one_line_and_status_2(args: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    places = ["--output", str(tmp_path), *(["--data-dir", "/nowhere"] if args in EARLY else [])]
    with pytest.raises(SystemExit) as stop:
        program.run_script(lambda: train.main([*BASE, *places, *args.split()]))
    printed = capfd.readouterr().err
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert re.search((EARLY | LATE)[args], error), error
    assert "Traceback" not in printed


def test_a_script_prints_nothing_else() -> None:
    command, env = [sys.executable, "train.py", "--opt", "samom"], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --opt: unknown optimizer 'samom'; did you mean 'samon'?\n"
