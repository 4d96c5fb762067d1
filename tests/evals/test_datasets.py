"""Every shift set's label convention, labels matched to the model's classes, and suites."""

import pytest
import torch
from PIL import Image

from samon.cli.validate import main, parse, prepare
from samon.data.classes import class_map_digest
from samon.errors import UserError
from samon.evals import accuracy, load_evaluation, shifts
from samon.evals.datasets import open_dataset
from tests import efficientnet_lite0
from tests.eval_sets import (
    DATA_CONFIG,
    SYNSETS,
    DifferentiableReader,
    Reader,
    color,
    make_context,
    spec_of,
    write_folders,
    write_shard,
)


def evaluate(root, kind="", model=None, dataset="", split="", limit=None, **settings):
    """Rows of accuracy: {scoring: {metric: row}}."""
    context = make_context(model or Reader(), **settings)
    found = {}
    for row in accuracy.evaluate(context, open_dataset(context, spec_of(root, kind, dataset, split, limit))):
        found.setdefault(row.get("setting", ""), {})[row["metric"]] = row
    return found


def top1(rows):
    return rows["top1"]["value"], rows["top1"]["num_samples"]


# --- shift sets -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "count"), [("imagenetv2-matched-frequency", 10000), ("imagenet-sketch", 50889)])
def test_folders_are_integers_or_synsets(tmp_path, kind, count):
    classes = (0, 7, 10, 999)
    root = write_folders(tmp_path, {str(i) if "v2" in kind else SYNSETS[i]: [i] for i in classes})
    rows = evaluate(root, kind)["1000 classes"]
    assert top1(rows) == (100, 4)
    assert rows["top1"]["mismatch"] == f"4 classes, published 1000; 4 images, published {count}"


@pytest.mark.parametrize(("letter", "published"), [("r", 30000), ("a", 7500)])
def test_r_and_a_restrict_predictions_to_their_200_classes(tmp_path, letter, published):
    inside = shifts.subset_indices(letter)
    outside = min(set(range(1000)) - set(inside))
    root = write_folders(tmp_path, {SYNSETS[i]: [i] for i in inside})
    found = evaluate(root, f"imagenet-{letter}", Reader(outside))
    assert list(found) == ["200 classes"]
    assert top1(found["200 classes"]) == (100, 200)  # the favorite is no candidate
    assert found["200 classes"]["top1"]["mismatch"] == f"200 images, published {published}"  # and 200 classes
    assert top1(evaluate(root, f"imagenet-{letter}", Reader(inside[5]))["200 classes"]) == (0.5, 200)


def test_imagenet_is_also_scored_on_the_clean_subsets(tmp_path):
    a, r = shifts.subset_indices("a"), shifts.subset_indices("r")
    only_a, only_r = min(set(a) - set(r)), min(set(r) - set(a))
    neither = min(set(range(1000)) - set(a) - set(r))
    write_folders(tmp_path / "validation", {SYNSETS[i]: [i, i] for i in (only_a, only_r, neither)})
    found = evaluate(tmp_path, "imagenet", Reader(neither), split="validation")
    assert found["1000 classes"]["top1"]["value"] == pytest.approx(100 / 3)
    for letter in "ar":
        assert top1(found[f"clean subset of imagenet-{letter}"]) == (100, 2)
    write_folders(tmp_path / "other", {SYNSETS[neither]: [neither]})
    assert list(evaluate(tmp_path / "other", "imagenet")) == ["1000 classes"]  # no figure of no image


def test_objectnet_crops_the_border_and_has_both_conventions(tmp_path):
    classes = shifts.objectnet_classes()
    folders = classes | {"not_in_imagenet": [1]}  # one image per right class
    root = write_folders(tmp_path, folders, border=(255, 0, 0))
    found, count = evaluate(root, "objectnet"), sum(map(len, classes.values()))
    for setting in ("1000 classes", "113 classes"):
        assert top1(found[setting]) == (100, count)
    foreign = min(set(range(1000)) - {i for indices in classes.values() for i in indices})
    found = evaluate(root, "objectnet", Reader(foreign))
    assert top1(found["1000 classes"]) == (0, count)
    assert found["1000 classes"]["top5"]["value"] == 100
    assert top1(found["113 classes"]) == (100, count)
    assert found["113 classes"]["top1"]["mismatch"] == f"{count} images, published 18574"


def test_real_labels_go_by_file_name(tmp_path):
    labels = shifts.real_labels()
    several, none, single = (int(rows.nonzero()[0]) for rows in (labels.sum(1) > 1, ~labels.any(1), labels.sum(1) == 1))
    wrong = int((~labels[single]).nonzero()[0])
    for number, answer in ((several, int(labels[several].nonzero()[-1])), (single, wrong), (none, 5)):
        color(answer).save(tmp_path / f"ILSVRC2012_val_{number + 1:08d}.JPEG", quality=100)
    assert top1(evaluate(tmp_path, "imagenet-real")["1000 classes"]) == (50, 2)  # one image has no label
    assert top1(evaluate(tmp_path, real_labels="real")["ReaL"]) == (50, 2)


def test_shards_go_by_the_class_names_of_their_info_file_or_by_key(tmp_path):
    names = sorted(map(str, range(20)))  # text order, as a packing tool may sort them
    write_shard(tmp_path, [(f"{k:03d}", int(name), k) for k, name in enumerate(names)], names)
    rows = evaluate(tmp_path, "imagenetv2-threshold0.7", dataset="wds", split="val")["1000 classes"]
    assert top1(rows) == (100, 20)
    answer = int(shifts.real_labels()[6].nonzero()[0])
    write_shard(tmp_path, [("ILSVRC2012_val_00000007", answer, 0)])
    assert top1(evaluate(tmp_path, "imagenet-real", dataset="wds", split="val")["1000 classes"]) == (100, 1)


# --- --valid-labels and --real-labels -------------------------------------------------------------------------------
def test_valid_labels_restrict_predictions_and_number_the_labels(tmp_path):
    root = write_folders(tmp_path / "set", {"a": [6], "b": [11]})
    path = tmp_path / "indices.txt"
    for text, right in (("6\n11\n", 100), ("11\n6\n", 0)):  # line i is the class of label i
        path.write_text(text)
        assert top1(evaluate(root, model=Reader(900), valid_labels=str(path))["valid labels"]) == (right, 2)
    write_folders(root, {"c": [12]})
    with pytest.raises(UserError, match=r"c/0\.png: label 2, but there are 2 classes \(0\.\.1\)"):
        evaluate(root, valid_labels=str(path))
    for text in ("-1", "1000", "0.5", "n01440764", ""):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"--valid-labels .*: '{text}' is not a class; .* 0\.\.999"):
            evaluate(root, valid_labels=str(path))


def test_real_and_valid_labels_count_together(tmp_path):
    labels = shifts.real_labels()
    first, other = ((labels.sum(1) == 1).nonzero().flatten()[k].item() for k in (0, -1))
    right = labels[first].nonzero().item()
    for number in (first, other):
        color(right).save(tmp_path / f"ILSVRC2012_val_{number + 1:08d}.JPEG", quality=100)
    (tmp_path / "indices.txt").write_text(f"{right}\n{(right + 1) % 1000}\n")
    settings = {"real_labels": "real", "valid_labels": str(tmp_path / "indices.txt")}
    ((setting, rows),) = evaluate(tmp_path, model=Reader((right + 5) % 1000), **settings).items()
    assert setting == "ReaL, valid labels"
    assert top1(rows) == (100, 1)  # the other image's label is not valid


@pytest.mark.parametrize("flag", ["valid_labels", "real_labels"])
def test_a_set_excludes_flags_for_labels(tmp_path, flag):
    root = write_folders(tmp_path, {SYNSETS[0]: [0]})
    with pytest.raises(UserError, match=f"imagenet defines its labels; drop --{flag.replace('_', '-')}"):
        evaluate(root, "imagenet", **{flag: "real"})


# --- labels matched to the model's classes --------------------------------------------------------------------------
def test_classes_go_by_synset_or_number_and_other_names_are_refused(tmp_path, caplog):
    root = write_folders(tmp_path / "some", {SYNSETS[i]: [i] for i in (954, 1, 80)})
    assert top1(evaluate(root)[""]) == (100, 3)
    assert "its 3 class names are ImageNet synsets" in caplog.text
    root = write_folders(tmp_path / "trained", {SYNSETS[i]: [k] for k, i in enumerate((1, 80, 954))})
    context = make_context(Reader())  # a run of three classes that kept the pretrained head
    context.class_names = [SYNSETS[i] for i in (1, 80, 954)]
    assert accuracy.evaluate(context, open_dataset(context, spec_of(root)))[0]["value"] == 100
    root = write_folders(tmp_path / "numbers", {"7": [7], "12": [12]})
    assert top1(evaluate(root)[""]) == (100, 2)
    root = write_folders(tmp_path / "others", {"cat": [0], "dog": [1]})
    with pytest.raises(UserError, match=r"has 2 classes, the model 1000, and the name 'cat' .*--class-map"):
        evaluate(root)
    (tmp_path / "map.txt").write_text("cat\ndog\n")
    assert top1(evaluate(root, class_map=str(tmp_path / "map.txt"))[""]) == (100, 2)


@pytest.mark.parametrize("shards", [False, True])
def test_labels_are_renumbered_by_the_classes_of_the_training_data(tmp_path, shards):
    if shards:
        write_shard(tmp_path, [("a", 0, 0), ("b", 1, 1)], ["cat", "dog"])
    else:
        write_folders(tmp_path / "val", {"cat": [0], "dog": [1]})
    context, spec = make_context(Reader()), spec_of(tmp_path, dataset="wds" * shards, split="val")
    expected = {("cat", "dog", "cow"): 100, ("cat", "cow", "dog"): 50, ("dog", "cat", "cow"): 0}
    for names, value in expected.items():
        context.class_names = [*names, *map(str, range(997))]
        dataset = open_dataset(context, spec)
        assert accuracy.evaluate(context, dataset)[0]["value"] == value
        assert dataset.class_names == context.class_names
    context.class_names = ["cat", "cow"]
    with pytest.raises(UserError, match="class 'dog' is not among the 2 trained"):
        open_dataset(context, spec)
    (tmp_path / "map.txt").write_text("dog\ncat\n")
    context.config = context.config.but(class_map=str(tmp_path / "map.txt"))
    context.class_names = ["cat", "dog"]
    for digest, value in (("", 0), (class_map_digest({"dog": 0, "cat": 1}, None), 100)):  # given, or the run's own
        context.class_map_digest = digest
        assert accuracy.evaluate(context, open_dataset(context, spec))[0]["value"] == value


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("accuracy", 1000, r"label 1000\b.*0\.\.999"),
        ("accuracy", "one", "'one'"),
        ("apgd", -1, r"label -1\b.*0\.\.999"),
        ("sharpness", -100, r"label -100\b.*0\.\.999"),
        ("hessian", 1000, r"label 1000\b.*0\.\.999"),
    ],
)
def test_a_label_that_is_no_class_stops_every_evaluation(tmp_path, name, label, message):
    write_shard(tmp_path, [("a", 0, 0), ("b", 1, label)])
    settings = {"sharpness_split": "val", "sharpness_m": 2, "sharpness": ["average-l2-1step@0.1"]}
    context = make_context(DifferentiableReader(), apgd_iters=1, hessian_split="val", **settings)
    arguments = prepare(context, spec_of(tmp_path, dataset="wds", split="val"), name)
    with pytest.raises(UserError, match=rf"val\.tar b: .*{message}"):
        load_evaluation(name).evaluate(*arguments)


def test_processes_compare_the_classes_they_read(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr("samon.evals.datasets.check_ranks", lambda *args: compared.append(args))
    open_dataset(make_context(Reader()), spec_of(write_folders(tmp_path, {"0": [0, 1]})))
    assert compared[0][:2] == (["0"], 2)


def test_a_run_validates_on_the_first_images_of_its_split(tmp_path):
    write_shard(tmp_path, [(f"{k:02d}", k, 0 if k > 3 else k) for k in range(10)])  # the first four are right
    for limit, expected in ((5, (80, 5)), (4, (100, 4)), (None, (40, 10))):
        assert top1(evaluate(tmp_path, dataset="wds", split="val", limit=limit)[""]) == expected


def test_a_set_is_not_read_from_several_splits_at_once(tmp_path):
    for split in ("train", "val"):
        write_folders(tmp_path / split, {SYNSETS[0]: [0]})
    with pytest.raises(UserError, match="the splits train, val; name one of them"):
        open_dataset(make_context(Reader()), spec_of(tmp_path, "imagenet"))


# --- published weights ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("as_set", [True, False])
def test_published_weights_recognize_real_photographs(tmp_path, as_set):
    """EfficientNet-Lite0 with its ImageNet weights, through the whole program, on a set in ImageNet's layout.

    The photographs show an espresso, a tripod, a tabby cat and a rocket. All four are among the five likeliest of
    1,000 classes (chance: 0.5 %), two of them first, as the cat is one of three kinds and the rocket's ramp fills the
    picture. Wrong preprocessing, key mapping or labels by position leave none.
    """
    weights = {"arch": "tf_efficientnet_lite0", "state_dict": efficientnet_lite0.state_dict()}
    torch.save(weights, tmp_path / "lite0.pth.tar")
    (tmp_path / "suite.yaml").write_text("- {set: imagenet, data_dir: tests/photographs}\n")
    data = ["--suite", str(tmp_path / "suite.yaml")] if as_set else ["--data-dir", "tests/photographs"]
    rows = main(["--checkpoint", str(tmp_path / "lite0.pth.tar"), *data, "--workers", "0", "--device", "cpu"])
    whole = {row["metric"]: row for row in rows if row.get("setting", "1000 classes") == "1000 classes"}
    assert whole["top1"]["num_samples"] == 4
    assert whole["top5"]["value"] == 100
    assert whole["top1"]["value"] >= 50
    assert whole["loss"]["value"] < 2  # chance: 6.9
    if as_set:
        assert whole["top1"]["mismatch"] == "4 classes, published 1000; 4 images, published 50000"


# --- suites ---------------------------------------------------------------------------------------------------------
MODEL = ["--model", "test_resnet", "--no-pretrained"]
BAD_SUITES = {
    "number": ("- {data_dir: 3}", "data_dir is 3; it must be text"),
    "null": ("- {data_dir: x, split: }", "split is None; it must be text"),
    "set": ("- {data_dir: x, set: {a: b}}", "set is {'a': 'b'}; it must be text"),
    "no evals": ("- {data_dir: x, evals: []}", "evals is []; it must be text"),
    "evals": ("- {data_dir: x, evals: [accuracy, 1]}", "evals is ['accuracy', 1]; it must be text"),
    "key": ("- {1: x}", "unknown key 1; use set, name"),
    "twice": ("- {data_dir: a/val}\n- {data_dir: b/val}", "2 entries are called 'val validation'; give each a `name`"),
    "bytes": (b"- {data_dir: caf\xe9}", "cannot be read: "),
}


@pytest.mark.parametrize("case", BAD_SUITES)
def test_mistakes_in_a_suite_are_one_line(case, tmp_path):
    text, message = BAD_SUITES[case]
    path = tmp_path / "suite.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        parse([*MODEL, "--suite", str(path)])
    assert str(caught.value).startswith(f"--suite {path}")
    assert message in str(caught.value)


def test_entries_of_a_suite_are_distinguished_by_split(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(
        "- {data_dir: x, split: train}\n- {data_dir: x, split: val}\n- {data_dir: y}\n"
        "- {set: imagenet-r, data_dir: r}\n- {set: imagenet-a, data_dir: a, dataset: wds}\n"
    )
    (job,) = parse([*MODEL, "--suite", str(path), "--evals", "accuracy,accuracy"])
    assert job.specs[0].evals == ["accuracy"]
    specs = [(spec.name, spec.split) for spec in job.specs]
    assert specs[:3] == [("x train", "train"), ("x val", "val"), ("y", "validation")]
    assert specs[3:] == [("imagenet-r", ""), ("imagenet-a", "validation")]  # shards always have a split


def test_the_shipped_suite_names_the_papers_sets_under_the_data_dir(tmp_path):
    (job,) = parse([*MODEL, "--suite", "suites", "--data-dir", str(tmp_path)])
    v2 = [f"imagenetv2-{form}" for form in ("matched-frequency", "threshold0.7", "top-images")]
    others = ["imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet"]
    assert [spec.kind for spec in job.specs] == ["imagenet", "imagenet-real", *v2, *others]
    assert (job.specs[0].root, job.specs[0].split) == (str(tmp_path / "imagenet"), "validation")


def test_gray_and_color_are_compared(tmp_path, caplog):
    root = write_folders(tmp_path, {str(i): [i] for i in range(9)})
    for path, mode in (("0/0.png", "1"), ("4/0.png", "L")):  # the first images are not representative
        Image.new(mode, (8, 8)).save(root / path)
    open_dataset(make_context(Reader()), spec_of(root))
    assert "its images are" not in caplog.text
    for path in ("0/0.png", "4/0.png"):
        color(0).save(root / path)
    open_dataset(make_context(Reader(), DATA_CONFIG | {"input_size": (1, 8, 8)}), spec_of(root))
    assert "its images are RGB, the model takes L: they are converted to gray, their color is lost" in caplog.text
