"""validate.py as a command: results, checkpoints, suites, processes, mistakes."""

import argparse
import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.utils import CheckpointSaver, ModelEmaV3

from samon.errors import UserError
from samon.evals.main import main, parse
from tests import efficientnet_lite0, runs

FASHION = ["--dataset", "wds/fashion-mnist", "--data-dir", "data/fashion-mnist"]
MODEL = ["--model", "resnet10t", "--no-pretrained", "--num-classes", "10", "--img-size", "32"]
UNTRAINED = ["--model", "resnet10t", "--num-classes", "10"]
TIMM_FORM = [*MODEL, *FASHION, "--results-format", "timm"]
SMALL = ["--workers", "0", "--device", "cpu"]


def command(*argv, processes=0):
    """The finished subprocess of validate.py, under torchrun if asked."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*start, "validate.py", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in timm's format whose averaged weights differ from its weights."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    ema = ModelEmaV3(model)
    with torch.no_grad():
        model.fc.bias[3] += 100  # always class 3
        ema.module.fc.bias[5] += 100
    directory = tmp_path_factory.mktemp("checkpoint")
    args = argparse.Namespace(model="resnet10t", num_classes=10, in_chans=1, img_size=32, mean=[0.5], std=[0.5])
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        args,
        ema,
        checkpoint_dir=str(directory),
        recovery_dir=str(directory),
    )
    saver.save_checkpoint(0, 10.0)
    return directory / "last.pth.tar"


def test_rows_are_the_contracts(tmp_path):
    for form in ("json", "csv", "md"):
        main(
            [
                *MODEL,
                *FASHION,
                *SMALL,
                "--num-samples",
                "64",
                "--evals",
                "accuracy,apgd",
                "--norm",
                "l2,linf",
                "--eps",
                "0.25,0.5/255",
                "--apgd-iters",
                "3",
                "--apgd-targets",
                "1",
                "--results-file",
                str(tmp_path / f"r.{form}"),
            ]
        )
    rows = json.loads((tmp_path / "r.json").read_text())
    for row in rows:
        assert {"model", "dataset", "split", "eval", "metric", "value", "num_samples"} <= set(row)
        assert (row["model"], row["dataset"], row["split"]) == ("resnet10t", "wds/fashion-mnist", "validation")
        assert row["num_samples"] == 64
    assert [row["metric"] for row in rows if row["eval"] == "accuracy"] == ["top1", "top5", "loss", "ece"]
    attacks = [(row["metric"], row["norm"], row["eps"]) for row in rows if row["eval"] == "apgd"]
    metrics = ("robust_top1_apgd-ce", "robust_top1_apgd-t", "robust_top1")
    assert attacks == [(m, *t) for t in (("l2", 0.25), ("linf", 0.5 / 255)) for m in metrics]
    with (tmp_path / "r.csv").open() as file:
        assert [row["metric"] for row in csv.DictReader(file)] == [row["metric"] for row in rows]
    table = (tmp_path / "r.md").read_text()
    assert "| wds/fashion-mnist | apgd linf 0.5/255 |" in table


def test_checkpoint_names_its_model_and_holds_averaged_weights(checkpoint, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "threes.npz", x_test=pixels, y_test=np.full(20, 3))
    threes = ["--dataset", "npz/threes", "--data-dir", str(tmp_path), "--split", "test"]
    for flags, right in (([], 100), (["--no-ema"], 100), (["--use-ema"], 0)):
        (top1, *_) = main(["--checkpoint", str(checkpoint), *threes, *SMALL, *flags])
        assert (top1["metric"], top1["value"], top1["num_samples"]) == ("top1", right, 20)
    two = main(
        [
            "--checkpoint",
            str(checkpoint),
            str(checkpoint.parent),
            "--evals",
            "norm_params",
            *SMALL,
            "--norm-figure",
            str(tmp_path / "norm.png"),
        ]
    )
    best = checkpoint.parent / "model_best.pth.tar"  # what a run's directory stands for
    assert {row["checkpoint"] for row in two} == {str(checkpoint), str(best)}
    assert (tmp_path / "norm.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_of_train_py_score_as_in_training(tmp_path):
    metrics, directory = runs.run(tmp_path, "--val-num-samples", "1000", "--model-ema", "--model-ema-decay", "0.5")
    scores = {}
    for flags in ([], ["--use-ema"], ["--no-ema"]):
        rows = main(["--checkpoint", str(directory / "last.pth.tar"), *FASHION, *SMALL, *flags])
        assert rows[0]["model"] == "test_resnet"
        scores[" ".join(flags)] = {row["metric"]: row["value"] for row in rows}
    assert scores[""] == scores["--use-ema"] != scores["--no-ema"]
    for key in ("top1", "top5", "loss"):  # training reports the averaged weights
        assert scores[""][key] == pytest.approx(metrics[f"eval_{key}"], rel=1e-4)


def test_one_and_two_processes_give_identical_figures(tmp_path):
    """All evaluations at once; the batches are the same whoever computes them, so every figure is."""
    flags = [
        *MODEL,
        *FASHION,
        *SMALL,
        "--num-samples",
        90,
        "--batch-size",
        32,
        "--evals",
        "accuracy,apgd,sharpness,feature_rank,norm_params",
        "--apgd-batch-size",
        20,
        "--apgd-iters",
        4,
        "--norm",
        "linf",
        "--eps",
        "1/255",
        "--apgd-targets",
        1,
        "--sharpness",
        "worst-linf-adaptive-3step@0.01",
        "average-l2-2step@0.01",
        "--sharpness-samples",
        96,
        "--sharpness-m",
        32,
        "--feature-samples",
        60,
        "--checkpoint",
        tmp_path / "net.pth",
    ]
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), tmp_path / "net.pth")
    found = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.json"
        done = command(*flags, "--results-file", path, processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(path.read_text()))
    assert found[0] == found[1]
    assert {row["eval"] for row in found[0]} == {"accuracy", "apgd", "sharpness", "feature_rank", "norm_params"}
    assert {row["num_samples"] for row in found[0] if row["eval"] in ("accuracy", "apgd")} == {90}


def test_published_weights_recognise_real_photographs(tmp_path):
    """EfficientNet-Lite0 with its ImageNet weights, through the whole program, on a set in ImageNet's layout.

    The photographs show an espresso, a tripod, a tabby cat and a rocket. All four are among the five
    likeliest of 1,000 classes (chance: 0.5 %); two of them first, as the cat is one of three kinds and the
    rocket's ramp fills the picture. Wrong preprocessing or key mapping leaves none.
    """
    weights = {"arch": "tf_efficientnet_lite0", "state_dict": efficientnet_lite0.state_dict()}
    torch.save(weights, tmp_path / "lite0.pth.tar")
    (tmp_path / "suite.yaml").write_text("- {set: imagenet, data_dir: tests/photographs}\n")
    rows = main(["--checkpoint", str(tmp_path / "lite0.pth.tar"), "--suite", str(tmp_path / "suite.yaml"), *SMALL])
    whole = {row["metric"]: row for row in rows if row["setting"] == "1000 classes"}
    assert whole["top1"]["num_samples"] == 4
    assert whole["top5"]["value"] == 100
    assert whole["top1"]["value"] >= 50
    assert whole["loss"]["value"] < 2  # chance: 6.9
    assert whole["top1"]["mismatch"] == "4 classes, published 1000; 4 images, published 50000"


def test_published_weights_are_sure_where_the_photograph_is_plain():
    model = efficientnet_lite0.create()
    transform = create_transform(**resolve_data_config({}, model=model))

    def probabilities(path):
        with torch.no_grad(), Image.open(path) as image:
            return model(transform(image.convert("RGB"))[None]).softmax(1)[0]

    assert probabilities("tests/photographs/n07920052/coffee.jpg")[967] > 0.7  # espresso
    assert probabilities("tests/photographs/n04485082/camera.jpg")[872] > 0.8  # tripod
    cat = probabilities("tests/photographs/n02123159/chelsea.jpg")
    assert cat[[281, 282, 285]].sum() > 0.8  # tabby, tiger cat, Egyptian cat


def test_suite_has_one_table_with_its_own_evaluations(tmp_path, capsys):
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "- {name: clean, dataset: wds/fashion-mnist, data_dir: data/fashion-mnist, split: validation}\n"
        "- {name: seen, dataset: wds/fashion-mnist, data_dir: data/fashion-mnist, split: train, evals: [accuracy]}\n"
    )
    rows = main(
        [
            *MODEL,
            *SMALL,
            "--suite",
            str(suite),
            "--evals",
            "accuracy,feature_rank",
            "--num-samples",
            "32",
            "--feature-samples",
            "32",
        ]
    )
    assert [(row["dataset"], row["eval"]) for row in rows if row["metric"] in ("top1", "feature_rank")] == [
        ("clean", "accuracy"),
        ("clean", "feature_rank"),
        ("clean", "feature_rank"),
        ("seen", "accuracy"),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| data set | evaluation | top-1 | top-5 | loss |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| clean", "| clean", "| clean", "| seen"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*MODEL, *FASHION, "--evals", "acuracy"], "unknown evaluation 'acuracy'; did you mean 'accuracy'?"),
        ([*UNTRAINED, *FASHION], "--num-classes 10: the pretrained weights of resnet10t have 1000"),
        (
            ["--model", "resnet18_cifar", *FASHION],
            "--model resnet18_cifar has no pretrained weights; give --checkpoint",
        ),
        (["--model", "vit_none*", *FASHION], "--model vit_none*: no model with pretrained weights"),
        ([*MODEL, *FASHION, "--test-pool", "--evals", "feature_rank"], "--test-pool replaces the pooling"),
        ([*TIMM_FORM, "--evals", "accuracy,apgd"], "--results-format timm has a place for accuracy alone"),
        (["--model", "resnet10tt", *FASHION], "unknown model 'resnet10tt'; did you mean"),
        (FASHION, "--model: name the model"),
        (MODEL, "no data set; give --data-dir"),
        ([*MODEL, *FASHION, "--split", "tset"], "no split 'tset'"),
        ([*MODEL, "--data-dir", "elsewhere"], "elsewhere: no such directory"),
        ([*MODEL, *FASHION, "--checkpoint", "none.pth"], "--checkpoint none.pth: no such file"),
        ([*MODEL, *FASHION, "--checkpoint", "LICENSE"], "--checkpoint LICENSE"),
        ([*MODEL, *FASHION, "--evals", "apgd", "--eps", "0"], "--eps '0': write positive numbers"),
        ([*MODEL, *FASHION, "--evals", "apgd", "--norm", "l1"], "--norm l1: use l2, linf"),
        ([*MODEL, *FASHION, "--evals", "sharpness", "--sharpness", "worst"], "sharpness measure 'worst'"),
        ([*MODEL, *FASHION, "--evals", "feature_rank", "--feature-layer", "layer9"], "no layer 'layer9'"),
        ([*MODEL, *FASHION, "--interpolation", "random"], "--interpolation random: use nearest, bilinear, bicubic"),
        ([*MODEL, *FASHION, "--crop-mode", "middle"], "--crop-mode"),
        ([*MODEL, *FASHION, "--num-gpu", "2"], "--num-gpu is not supported: use torchrun"),
        ([*MODEL, *FASHION, "--amp", "--evals", "apgd"], "--amp and --model-dtype are for accuracy"),
        ([*MODEL, *FASHION, "--results-file", "x.txt"], "--results-file x.txt: name it .json"),
        ([*MODEL, "--suite", "LICENSE"], "--suite LICENSE"),
        (
            ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--model-kwargs", "img_size=224", *FASHION],
            "Conflicting input image sizes",
        ),
        ([*MODEL, "--num-classes", "9", *FASHION], "has 10 classes, the model 9; give its classes' numbers"),
        ([*MODEL, *FASHION, "--suite", "sketch.yaml"], "needs a model of the 1000 ImageNet classes"),
    ],
)
def test_mistakes_are_user_errors(flags, message, tmp_path):
    (tmp_path / "sketch.yaml").write_text("- {set: imagenet-sketch, data_dir: tests/photographs}\n")
    flags = [str(tmp_path / flag) if flag == "sketch.yaml" else flag for flag in flags]

    with pytest.raises(UserError) as caught:
        main([*flags, *SMALL])
    assert message in str(caught.value)


SUITES = {
    "number": ("- {data_dir: 3}", "data_dir is 3; it must be a text"),
    "null": ("- {data_dir: x, split: }", "split is None; it must be a text"),
    "set": ("- {data_dir: x, set: {a: b}}", "set is {'a': 'b'}; it must be a text"),
    "no evals": ("- {data_dir: x, evals: []}", "evals is []; it must be a text"),
    "evals": ("- {data_dir: x, evals: [accuracy, 1]}", "evals is ['accuracy', 1]; it must be a text"),
    "key": ("- {1: x}", "unknown key 1; use set, name"),
    "twice": ("- {data_dir: a/val}\n- {data_dir: b/val}", "2 entries are called 'val validation'; give each a `name`"),
    "bytes": (b"- {data_dir: caf\xe9}", "cannot be read: "),
}


@pytest.mark.parametrize("case", SUITES)
def test_mistakes_in_a_suite_are_one_line(case, tmp_path):
    text, message = SUITES[case]
    path = tmp_path / "suite.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        parse([*MODEL, "--suite", str(path)])
    assert str(caught.value).startswith(f"--suite {path}")
    assert message in str(caught.value)


def test_a_model_of_one_channel_needs_no_mean(tmp_path):
    """Loader, attack and export take the same one, with and without the prefetcher."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict(), tmp_path / "net.pth")
    gray = ["--model", "test_resnet", "--no-pretrained", "--num-classes", "10", "--in-chans", "1", "--img-size", "32"]
    gray += ["--checkpoint", str(tmp_path / "net.pth")]
    attack = [
        "--evals",
        "accuracy,apgd",
        "--norm",
        "linf",
        "--eps",
        "1/255",
        "--apgd-iters",
        "1",
        "--apgd-targets",
        "1",
    ]
    found = [
        main([*gray, *FASHION, *SMALL, "--num-samples", "20", *attack, *more]) for more in ([], ["--no-prefetcher"])
    ]
    assert [row["value"] for row in found[0]] == pytest.approx([row["value"] for row in found[1]], rel=1e-5)
    values = {row["metric"]: row for row in found[0]}
    assert values["robust_top1"]["clean_top1"] == values["top1"]["value"]


def test_entries_of_a_suite_have_names_and_splits_of_their_own(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(
        "- {data_dir: x, split: train}\n- {data_dir: x, split: val}\n- {data_dir: y}\n"
        "- {set: imagenet-r, data_dir: r}\n- {set: imagenet-a, data_dir: a, dataset: wds}\n"
    )
    (job,) = parse(["--model", "resnet10t", "--suite", str(path)])
    found = [(entry.name, entry.split) for entry in job.entries]
    assert found[:3] == [("x train", "train"), ("x val", "val"), ("y", "validation")]
    assert found[3:] == [("imagenet-r", ""), ("imagenet-a", "validation")]  # shards always lie in a split


def test_files_of_checkpoints_with_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / place / "run/last.pth" for place in ("a", "b", "b/a")]
    for path in paths:
        path.parent.mkdir(parents=True)
        torch.save({}, path)
    found = [job.name for job in parse([*MODEL, *FASHION, "--checkpoint", *map(str, paths)])]
    assert found == [f"{tmp_path.name}/a/run/last.pth", f"{tmp_path.name}/b/run/last.pth", "b/a/run/last.pth"]
    assert [job.name for job in parse([*MODEL, *FASHION, "--checkpoint", str(paths[0])])] == ["run/last.pth"]
    assert [job.name for job in parse([*MODEL, *FASHION])] == ["resnet10t"]


def test_reports_that_would_overwrite_each_other_are_refused(tmp_path):
    """Slashes become underscores in the names of files."""
    path = tmp_path / "suite.yaml"
    path.write_text("- {name: a/b_c, data_dir: x}\n- {name: a_b/c, data_dir: y}\n")
    suite = [*MODEL, "--suite", str(path)]
    with pytest.raises(UserError, match=r"--class-report: .*a/b_c and .*a_b/c would both write .*a_b_c"):
        parse([*suite, "--class-report", str(tmp_path)])
    assert len(parse(suite)[0].entries) == 2
    files = [tmp_path / "a/b_c.pth", tmp_path / "a_b/c.pth"]
    for file in files:
        file.parent.mkdir()
        torch.save({}, file)
    both = [*MODEL, "--evals", "norm_params", "--checkpoint", *map(str, files)]
    with pytest.raises(UserError, match=r"--norm-tensorboard: a/b_c.pth and a_b/c.pth would both write a_b_c.pth"):
        parse([*both, "--norm-tensorboard", str(tmp_path)])


def test_accuracy_in_another_precision_than_the_runs_is_logged(tmp_path, caplog):
    args = argparse.Namespace(model="test_resnet", num_classes=10, in_chans=1, mean=[0.5], std=[0.5], amp=True)
    weights = timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict()
    torch.save({"arch": "test_resnet", "state_dict": weights, "args": args}, tmp_path / "last.pth")
    flags = ["--checkpoint", str(tmp_path / "last.pth"), *FASHION, *SMALL, "--img-size", "32", "--num-samples", "8"]
    for evals, said in (("accuracy", False), ("norm_params", False), ("accuracy,norm_params", True)):
        caplog.clear()
        main([*flags, "--evals", evals])
        assert ("accuracy is in float32" in caplog.text) is said


def test_too_few_classes_for_an_attack_are_found_before_any_work(tmp_path, caplog):
    np.savez(tmp_path / "x.npz", x_test=np.zeros((8, 32, 32, 3), np.uint8), y_test=np.arange(8) % 3)
    three = ["--model", "test_resnet", "--no-pretrained", "--num-classes", "3", "--img-size", "32", *SMALL]
    with pytest.raises(UserError, match="at least 4 classes, the model has 3"):
        main([*three, "--dataset", "npz/x", "--data-dir", str(tmp_path), "--evals", "accuracy,apgd"])
    assert "accuracy on" not in caplog.text


def test_processes_compare_the_classes_they_read(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", x_test=np.zeros((8, 32, 32, 3), np.uint8), y_test=np.arange(8) % 3)
    compared = []
    monkeypatch.setattr("samon.evals.entry.check_ranks", lambda *args: compared.append(args))
    main([*MODEL, *SMALL, "--dataset", "npz/x", "--data-dir", str(tmp_path)])
    assert compared[0][1] == 8


def test_a_mistake_is_one_line_and_status_2():
    done = command(*MODEL, *FASHION, "--evals", "apgdd")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --evals: unknown evaluation 'apgdd'")
    assert done.stderr.count("\n") == 1


def test_interrupted_attack_goes_on_from_its_state(tmp_path):
    flags = [
        *MODEL,
        *FASHION,
        *SMALL,
        "--num-samples",
        "40",
        "--evals",
        "apgd",
        "--norm",
        "linf",
        "--eps",
        "1/255",
        "--apgd-iters",
        "4",
        "--apgd-targets",
        "1",
        "--apgd-batch-size",
        "20",
        "--apgd-state",
        str(tmp_path / "state"),
        "--checkpoint",
        str(tmp_path / "net.pth"),
    ]
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), tmp_path / "net.pth")
    first = main(flags)
    stored = sorted((tmp_path / "state").iterdir())
    assert len(stored) == 2
    times = [path.stat().st_mtime_ns for path in stored]
    stored[0].unlink()  # as if stopped after one batch
    assert main(flags) == first
    assert sorted((tmp_path / "state").iterdir()) == stored
    assert stored[0].stat().st_mtime_ns > times[0]  # attacked again
    assert stored[1].stat().st_mtime_ns == times[1]  # taken from before


def test_arrays_and_folders_are_data_sets_too(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(40) % 10
    np.savez(tmp_path / "toy.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    for k in range(40):
        folder = tmp_path / "folder" / "val" / str(labels[k])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[k]).save(folder / f"{k}.png")
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), tmp_path / "net.pth")
    same = [*MODEL, *SMALL, "--checkpoint", str(tmp_path / "net.pth")]
    arrays = main([*same, "--dataset", "npz/toy", "--data-dir", str(tmp_path), "--split", "test"])
    folder = main([*same, "--data-dir", str(tmp_path / "folder")])
    assert [row["num_samples"] for row in arrays] == [40] * 4
    assert [row["value"] for row in arrays] == pytest.approx([row["value"] for row in folder], rel=1e-5)
