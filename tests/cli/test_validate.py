"""validate.py as a command: results, checkpoints, suites, processes, memory, mistakes."""

import argparse
import csv
import json

import numpy as np
import pytest
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV3

from samon.cli import eval_model
from samon.cli.validate import command_hash, main, parse
from samon.errors import UserError
from samon.evals import accuracy, apgd
from samon.evals.results import render
from samon.trainer.flag_rows import VALIDATE
from tests.eval_sets import FASHION, save_model
from tests.processes import launch

MODEL = ["--model", "test_resnet", "--no-pretrained", "--num-classes", "10", "--img-size", "32"]
SMALL = ["--workers", "0", "--device", "cpu"]
ATTACK = ["--norm", "linf", "--eps", "1/255", "--apgd-iters", "2", "--apgd-targets", "1"]


# --- results --------------------------------------------------------------------------------------------------------
def test_results_files_have_the_documented_columns(tmp_path):
    path = tmp_path / "r.json"
    flags = [*MODEL, *FASHION, *SMALL, *ATTACK, "--num-samples", "32", "--evals", "accuracy,apgd"]
    rows = main([*flags, "--norm", "l2,linf", "--eps", "0.25,0.5/255", "--results-file", str(path)])
    for row in rows:
        assert {"model", "dataset", "split", "eval", "metric", "value", "num_samples"} <= set(row)
        assert (row["model"], row["dataset"], row["split"]) == ("test_resnet", "wds/fashion-mnist", "validation")
        assert row["num_samples"] == 32
    assert [row["metric"] for row in rows if row["eval"] == "accuracy"] == ["top1", "top5", "loss", "ece"]
    attacks = [(row["metric"], row["norm"], row["eps"]) for row in rows if row["eval"] == "apgd"]
    metrics = ("robust_top1_apgd-ce", "robust_top1_apgd-t", "robust_top1")
    assert attacks == [(m, *t) for t in (("l2", 0.25), ("linf", 0.5 / 255)) for m in metrics]
    assert json.loads(path.read_text()) == rows
    table = csv.DictReader(render(rows, "csv").splitlines())
    assert [row["metric"] for row in table] == [row["metric"] for row in rows]
    assert "| wds/fashion-mnist | validation | apgd linf 0.5/255 |" in render(rows, "md")


def test_a_suite_is_one_table_and_entries_choose_their_evaluations(tmp_path, capsys):
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "- {name: clean, dataset: wds/fashion-mnist, data_dir: data/fashion-mnist, split: validation}\n"
        "- {name: seen, dataset: wds/fashion-mnist, data_dir: data/fashion-mnist, split: train, evals: [accuracy]}\n"
    )
    flags = ["--evals", "accuracy,feature_rank", "--num-samples", "32", "--feature-samples", "32"]
    flags += ["--feature-centering", "row,column,row"]
    rows = main([*MODEL, *SMALL, "--suite", str(suite), *flags])
    pairs = [(row["dataset"], row["eval"]) for row in rows if row["metric"] in ("top1", "feature_rank")]
    assert pairs == [("clean", "accuracy"), *[("clean", "feature_rank")] * 2, ("seen", "accuracy")]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| data set | split | evaluation | top-1 | top-5 | loss |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| clean", "| clean", "| clean", "| seen"]


def test_one_and_two_processes_give_identical_figures(tmp_path):
    """All evaluations at once; the batches are the same whoever computes them, so every figure is."""
    flags = [*MODEL, *FASHION, *SMALL, *ATTACK, "--checkpoint", save_model(tmp_path / "net.pth")]
    flags += ["--evals", "accuracy,apgd,sharpness,feature_rank,norm_params", "--num-samples", "90"]
    flags += ["--batch-size", "32", "--apgd-batch-size", "20", "--sharpness-samples", "96", "--sharpness-m", "32"]
    flags += ["--sharpness", "worst-linf-adaptive-3step@0.01", "average-l2-2step@0.01", "--feature-samples", "60"]
    one, two = main(flags), tmp_path / "two.json"
    launch(main, 2, [*flags, "--results-file", str(two)])
    assert json.loads(two.read_text()) == one
    assert {row["eval"] for row in one} == {"accuracy", "apgd", "sharpness", "feature_rank", "norm_params"}
    assert {row["num_samples"] for row in one if row["eval"] in ("accuracy", "apgd")} == {90}


def test_out_of_memory_names_the_flag_and_retry_halves_the_batch(monkeypatch, caplog):
    sizes, evaluate = [], accuracy.evaluate

    def limited(context, dataset):
        sizes.append(context.config.batch_size)
        if context.config.batch_size > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return evaluate(context, dataset)

    monkeypatch.setattr(accuracy, "evaluate", limited)
    flags = [*MODEL, *FASHION, *SMALL, "--num-samples", "20", "--batch-size", "32"]
    with pytest.raises(UserError, match="accuracy: out of memory with --batch-size 32; lower --batch-size"):
        main(flags)
    sizes.clear()
    assert main([*flags, "--retry"])[0]["num_samples"] == 20
    assert sizes == [32, 16, 8]
    assert "trying 8" in caplog.text
    monkeypatch.setattr(apgd, "evaluate", limited)
    with pytest.raises(UserError, match="apgd: out of memory with --apgd-batch-size 100; lower --apgd-batch-size"):
        main([*flags, "--evals", "apgd", "--retry"])


def test_results_go_on_only_with_the_same_labels(tmp_path):
    """The file of class indices may change while its name stays."""
    hashes, path = [], tmp_path / "labels.txt"
    for text in ("1 2", "2 1", "1 2"):
        path.write_text(text)
        hashes.append(command_hash(parse([*MODEL, *FASHION, "--valid-labels", str(path)])))
    assert hashes[0] == hashes[2] != hashes[1]


# --- checkpoints ----------------------------------------------------------------------------------------------------
def test_a_checkpoint_names_its_model_and_averaged_weights(tmp_path):
    """A checkpoint in timm's format whose averaged weights differ from its weights."""
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    ema = ModelEmaV3(model)
    with torch.no_grad():
        model.fc.bias[3] += 100  # always class 3
        ema.module.fc.bias[5] += 100
    args = argparse.Namespace(model="resnet10t", num_classes=10, in_chans=1, img_size=32, mean=[0.5], std=[0.5])
    directories = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    CheckpointSaver(model, torch.optim.SGD(model.parameters(), 0.1), args, ema, **directories).save_checkpoint(0, 10.0)
    last, best = str(tmp_path / "last.pth.tar"), str(tmp_path / "model_best.pth.tar")
    pixels = np.random.default_rng(0).integers(0, 255, (20, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "threes.npz", x_test=pixels, y_test=np.full(20, 3))
    threes = ["--dataset", "npz/threes", "--data-dir", str(tmp_path), "--split", "test"]
    for flags, right in (([], 100), (["--no-ema"], 100), (["--use-ema"], 0)):
        (top1, *_) = main(["--checkpoint", last, *threes, *SMALL, *flags])
        assert (top1["metric"], top1["value"], top1["num_samples"]) == ("top1", right, 20)
        assert (top1["model"], top1["ema"]) == ("resnet10t", flags == ["--use-ema"])
    figure = tmp_path / "norm.png"
    both = ["--checkpoint", last, str(tmp_path), "--evals", "norm_params"]
    rows = main([*both, *SMALL, "--norm-figure", str(figure)])
    assert {row["checkpoint"] for row in rows} == {last, best}  # a directory stands for its best
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_of_split_bn_is_that_of_its_main_layers(tmp_path):
    save_model(path := tmp_path / "net.pth")
    model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(path))
    torch.save(timm.layers.convert_splitbn_model(model, 3).state_dict(), split := tmp_path / "split.pth")
    checkpoints = ["--model", "test_resnet", "--checkpoint", str(path), str(split)]
    rows = main([*checkpoints, *MODEL[3:], *FASHION, *SMALL, "--num-samples", "32"])
    values = [row["value"] for row in rows]
    assert values[: len(values) // 2] == values[len(values) // 2 :]


def test_a_checkpoint_names_its_splits_and_settings_that_have_no_flag(tmp_path):
    split = {"val_split": "train[40:]", "train_split": "train[:40]"}
    args = argparse.Namespace(model="test_efficientnet", input_size=[3, 32, 32], bn_eps=0.5, dataset="npz/x", **split)
    path, suite = str(tmp_path / "net.pth"), tmp_path / "suite.yaml"
    torch.save({"state_dict": {}, "arch": args.model, "args": args}, path)
    suite.write_text("- {name: other, data_dir: x}\n")
    overrides = ["--img-size", "48", "--evals", "hessian", "--hessian-split", "a", "--model-kwargs", "drop_rate=0.1"]
    run, override, other, shards = (
        parse(["--checkpoint", path, "--data-dir", "x", *more])[0]
        for more in ([], overrides, ["--suite", str(suite)], ["--dataset", "wds/y"])
    )
    splits = (run.config.split, run.config.sharpness_split, run.config.hessian_split, run.config.feature_split)
    assert splits == ("train[40:]", *["train[:40]"] * 3)
    assert (other.specs[0].split, other.config.sharpness_split) == ("validation", "train")  # other data
    assert shards.config.sharpness_split == "train"  # a part of other data would mean other images, or nothing
    assert (override.config.hessian_split, override.config.img_size, override.config.input_size) == ("a", 48, None)
    assert run.config.input_size == [3, 32, 32]
    for config in (run.config, override.config):
        model = eval_model.create_model(config, pretrained=False)
        assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.5}


def test_reports_that_would_overwrite_each_other_are_refused(tmp_path):
    """Slashes become underscores in file names."""
    path = tmp_path / "suite.yaml"
    path.write_text("- {name: a/b_c, data_dir: x}\n- {name: a_b/c, data_dir: y}\n")
    suite = [*MODEL, "--suite", str(path)]
    for flag, name in (("--class-report", "accuracy"), ("--landscape-figure", "hessian")):
        with pytest.raises(UserError, match=rf"{flag}: .*a/b_c and .*a_b/c would both write .*a_b_c"):
            parse([*suite, "--evals", name, flag, str(tmp_path)])
    assert len(parse(suite)[0].specs) == 2
    files = [tmp_path / "a/b_c.pth", tmp_path / "a_b/c.pth"]
    for file in files:
        file.parent.mkdir()
        torch.save({}, file)
    both = [*MODEL, "--evals", "norm_params", "--checkpoint", *map(str, files)]
    with pytest.raises(UserError, match=r"--norm-tensorboard: a/b_c.pth and a_b/c.pth would both write a_b_c.pth"):
        parse([*both, "--norm-tensorboard", str(tmp_path)])


def test_accuracy_in_another_precision_than_the_runs_is_logged(tmp_path, caplog):
    args = argparse.Namespace(model="test_resnet", num_classes=10, img_size=32, amp=True)
    weights = {"state_dict": torch.load(save_model(tmp_path / "net.pth")), "arch": args.model, "args": args}
    torch.save(weights, tmp_path / "net.pth")
    flags = ["--checkpoint", str(tmp_path / "net.pth"), *FASHION, *SMALL]
    for evals, logged in (("accuracy", False), ("norm_params", False), ("accuracy,norm_params", True)):
        caplog.clear()
        main([*flags, "--evals", evals, *["--num-samples", "8"] * ("accuracy" in evals)])
        assert ("accuracy is in float32" in caplog.text) is logged
    for name, size in (("test_resnet", 32), ("test_resnet.r160_in1k", 32), ("test_vit", None)):
        assert parse([*flags, "--model", name])[0].config.img_size == size  # of the run, unless it is another model


# --- data -----------------------------------------------------------------------------------------------------------
def test_a_model_of_one_channel_needs_no_mean(tmp_path):
    """Loader and attack agree on the images, with and without the prefetcher."""
    flags = [*MODEL, *FASHION, *SMALL, *ATTACK, "--checkpoint", save_model(tmp_path / "net.pth", in_chans=1)]
    flags += ["--in-chans", "1", "--evals", "accuracy,apgd", "--num-samples", "20"]
    found = [main([*flags, *more]) for more in ([], ["--no-prefetcher"])]
    assert [row["value"] for row in found[0]] == pytest.approx([row["value"] for row in found[1]], rel=1e-5)
    rows = {row["metric"]: row for row in found[0]}
    assert rows["robust_top1"]["clean_top1"] == rows["top1"]["value"]


# --- mistakes -------------------------------------------------------------------------------------------------------
MISTAKES = [
    ("--evals acuracy", "unknown evaluation 'acuracy'; did you mean 'accuracy'?"),
    ("--pretrained --model resnet10t", "--num-classes 10: the pretrained weights of resnet10t have 1000"),
    ("--pretrained --model resnet18_cifar", "--model resnet18_cifar has no pretrained weights; give --checkpoint"),
    ("--model vit_none*", "--model vit_none*: no model with pretrained weights"),
    ("--model resnet10tt", "unknown model 'resnet10tt'; did you mean"),
    ("--test-pool --evals feature_rank", "--test-pool replaces the pooling"),
    ("--results-format timm --evals accuracy,apgd", "--results-format timm has columns for accuracy alone"),
    ("--split tset", "no split 'tset'"),
    ("--dataset= --data-dir elsewhere", "elsewhere: no such directory"),
    ("--dataset= --data-dir=", "no data set; give --data-dir"),
    ("--checkpoint none.pth", "--checkpoint none.pth: no such file"),
    ("--checkpoint LICENSE", "--checkpoint LICENSE is a text file"),
    ("--use-ema", "--use-ema: the model as created has no averaged weights"),
    ("--use-ema --no-ema", "--use-ema and --no-ema exclude each other"),
    ("--evals apgd --apgd-batch-size 0", "--apgd-batch-size: must be > 0"),
    ("--evals sharpness --sharpness-samples 4", "has 4 images; lower --sharpness-m"),
    ("--evals feature_rank --feature-layer layer9", "no layer 'layer9'"),
    ("--evals feature_rank --feature-centering rows", "--feature-centering rows: use row, column, none"),
    ("--interpolation random", "--interpolation must be nearest, bilinear, bicubic"),
    ("--crop-mode middle", "--crop-mode"),
    ("--num-gpu 2", "--num-gpu is not supported: use torchrun"),
    ("--evals feature_rank --split test", "--split needs --evals accuracy or apgd; add it, or drop --split"),
    ("--evals hessian --landscape-points 3", "--landscape-points needs --landscape-figure"),
    ("--evals sharpness --class-report x", "--class-report needs --evals accuracy; add it"),
    ("--evals sharpness --bootstrap 9", "--bootstrap needs --evals accuracy or apgd; add it"),
    ("--torchcompile-mode default", "--torchcompile-mode needs --torchcompile"),
    ("--amp-dtype bfloat16", "--amp-dtype needs --amp"),
    ("--results-format csv", "--results-format needs --results-file"),
    ("--results-format csv --results-file x.json", "x.json contradicts --results-format csv"),
    ("--amp --evals apgd", "--amp and --model-dtype are for accuracy"),
    ("--results-file x.txt", "--results-file x.txt: name it .json"),
    ("--suite LICENSE", "--suite LICENSE"),
    ("--model vit_tiny_patch16_224 --model-kwargs img_size=224", "Conflicting input image sizes"),
    ("--num-classes 9", "has 10 classes, the model 9; map its classes with --class-map"),
    ("--suite sketch.yaml", "needs a model of the 1000 ImageNet classes"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_are_user_errors(flags, message, tmp_path):
    (tmp_path / "sketch.yaml").write_text("- {set: imagenet-sketch, data_dir: tests/photographs}\n")
    words = flags.replace("sketch.yaml", str(tmp_path / "sketch.yaml")).split()
    with pytest.raises(UserError) as caught:
        main([*MODEL, *FASHION, *SMALL, *words])
    assert message in str(caught.value)


OF_ONE_EVALUATION = [f for title, rows in VALIDATE.items() if "--evals" in title for f in rows]


@pytest.mark.parametrize("flag", OF_ONE_EVALUATION, ids=lambda flag: flag.name)
def test_a_flag_of_an_evaluation_needs_it(flag):
    default = flag.default[0] if isinstance(flag.default, list) else flag.default
    with pytest.raises(UserError, match=rf"--{flag.name} needs --evals \w+; add it, or drop"):
        parse([*MODEL, *FASHION, f"--{flag.name}", str(default or "x")])


def test_the_model_must_be_named():
    with pytest.raises(UserError, match="--model: name the model"):
        parse([*FASHION])


def test_too_few_classes_for_an_attack(tmp_path):
    np.savez(tmp_path / "x.npz", x_test=np.zeros((8, 32, 32, 3), np.uint8), y_test=np.arange(8) % 3)
    data = ["--num-classes", "3", "--dataset", "npz/x", "--data-dir", str(tmp_path), *SMALL]
    with pytest.raises(UserError, match="at least 4 classes, the model has 3"):
        main([*MODEL, *data, "--evals", "apgd"])
