"""Every evaluation of a set reads its labels alike, on sets whose labels are easily taken wrongly."""

import argparse
import tarfile
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from torch import nn

from samon.errors import UserError
from samon.evals import accuracy, evaluation, robustness, shifts
from samon.evals.entry import Among, Entry, Target, batches, one_label
from samon.evals.main import main
from samon.trainer.flag_rows import VALIDATE
from samon.trainer.flags import by_key
from tests.evals.test_shifts import DATA_CONFIG, SYNSETS, Reader, colour, pack, write

# Outside facts: positions in ImageNet's list of 1000 classes, and members of the published class lists.
GOLDFISH, BANANA, BLACK_GROUSE = ("n01443537", 1), ("n07753592", 954), ("n01795545", 80)


def target_of(model, **changes):
    values = {key: flag.default for key, flag in by_key(VALIDATE).items()}
    config = argparse.Namespace(**values | {"workers": 0, "no_prefetcher": True, "pin_mem": False} | changes)
    return Target(config, model, DATA_CONFIG, torch.device("cpu"), 0, 1, nullcontext)


class Slanted(Reader):
    """Logits that can be followed back to the image and the weights, so that it can be attacked and perturbed."""

    num_classes = 1000

    def forward(self, x):
        return super().forward(x) + self.unused + 0 * x.sum()


def test_lists_of_classes_are_the_published_ones():
    for synset, index in (GOLDFISH, BANANA, BLACK_GROUSE):
        assert shifts.synsets()[index] == synset
    a, r = shifts.subset_indices("a"), shifts.subset_indices("r")
    assert len(a) == len(r) == 200
    assert a[:5] == [6, 11, 13, 15, 17]  # Hendrycks et al. 2021: stingray, goldfinch, junco, robin, jay
    assert r[:5] == [1, 2, 4, 6, 8]  # goldfish, great white shark, hammerhead, stingray, hen
    assert BANANA[1] in a
    assert BANANA[1] in r
    objects = shifts.objectnet_classes()
    assert objects["banana"] == [954]
    assert objects["bench"] == [703]
    assert shifts.SETS["objectnet"].border == 2
    v2 = {name for name in shifts.SETS if name.startswith("imagenetv2")}
    assert v2 == {f"imagenetv2-{form}" for form in ("matched-frequency", "threshold0.7", "top-images")}


@pytest.mark.parametrize("what", ["sharpness", "apgd"])
def test_losses_of_a_restricted_set_see_its_classes_and_labels(tmp_path, what):
    inside = shifts.subset_indices("a")
    root = write(tmp_path, {SYNSETS[i]: [i] for i in inside})
    target, entry = target_of(Slanted()), Entry("a", "", str(root), "", [what], "imagenet-a")
    images = entry.images(target)
    net = one_label(what, entry, images, target.model)
    for _, index, x, label in batches(target, images, list(range(200)), 50):
        logits = net(x)
        assert logits.shape == (50, 200)
        assert torch.equal(logits.argmax(1), label)
        assert torch.equal(label, index)  # folders are in the order of the indices
    assert isinstance(net, Among)


def test_attacks_on_the_200_classes_end_with_figures(tmp_path, caplog):
    inside = shifts.subset_indices("r")[:4]
    root = write(tmp_path, {SYNSETS[i]: [i] for i in inside})
    target = target_of(Slanted(), norm="linf", eps="0.001", apgd_iters=1, apgd_targets=1)
    found = robustness.rows(target, Entry("r", "", str(root), "", ["apgd"], "imagenet-r"))
    assert {row["metric"]: row["value"] for row in found}["robust_top1"] == 100
    note = "gradients of 4 images are exactly zero: accuracy may be overstated"  # this model rounds what it sees
    assert {row["note"] for row in found} == {note}
    assert f"apgd r, linf 0.255/255: {note}" in caplog.text


@pytest.mark.parametrize("what", ["sharpness", "apgd"])
def test_several_right_classes_are_refused_with_the_reason(tmp_path, what):
    root = write(tmp_path, dict(shifts.objectnet_classes()))
    target, entry = target_of(Slanted()), Entry("objects", "", str(root), "", [what], "objectnet")
    with pytest.raises(UserError, match=f"{what} objects: its images have several right classes"):
        one_label(what, entry, entry.images(target), target.model)


def test_classes_go_by_synset_or_number_and_other_names_are_refused(tmp_path, caplog):
    root = write(tmp_path / "some", {SYNSETS[i]: [i] for i in (954, 1, 80)})
    target, entry = target_of(Slanted()), Entry("some", "", str(root), "", ["accuracy"])
    images = entry.images(target)
    one_label("x", entry, images, target.model)
    assert images.class_of == [1, 80, 954]
    assert "its 3 classes are called as ImageNet's and taken as these" in caplog.text
    root = write(tmp_path / "numbers", {"7": [7], "12": [12]})
    (top1, *_) = accuracy.rows(target, Entry("numbers", "", str(root), "", ["accuracy"]))
    assert top1["value"] == 100
    root = write(tmp_path / "others", {"cat": [0], "dog": [1]})
    entry = Entry("others", "", str(root), "", ["accuracy"])
    with pytest.raises(UserError, match=r"has 2 classes, the model 1000, and 'cat' does not tell .*--class-map"):
        entry.images(target)
    target.class_names = ["cat", "cow", "dog"]
    (top1, *_) = accuracy.rows(target, entry)
    assert top1["value"] == 50  # cat is 0, and dog 2 where the image says 1
    target.class_names = ["cat", "cow"]
    with pytest.raises(UserError, match="class 'dog' is not among the 2 trained"):
        entry.images(target)
    (tmp_path / "map.txt").write_text("cat\ndog\n")
    target = target_of(Slanted(), class_map=str(tmp_path / "map.txt"))
    assert accuracy.rows(target, entry)[0]["value"] == 100


def test_shards_whose_classes_are_in_another_order_are_renumbered(tmp_path):
    pack(tmp_path, [("a", 0, 0), ("b", 1, 1)], ["dog", "cat"])
    target, entry = target_of(Slanted()), Entry("x", "wds", str(tmp_path), "val", ["accuracy"])
    target.class_names = ["dog", "cat", *map(str, range(998))]
    assert accuracy.rows(target, entry)[0]["value"] == 100
    target.class_names = ["cat", "dog", *map(str, range(998))]
    assert accuracy.rows(target, entry)[0]["value"] == 0
    pack(tmp_path, [("a", 0, 0)], ["cow"])
    with pytest.raises(UserError, match=r"val\.tar: class 'cow' is not among the 1000 trained"):
        accuracy.rows(target, entry)


def test_a_set_is_not_read_from_several_splits_at_once(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / split, {SYNSETS[0]: [0]})
    with pytest.raises(UserError, match="holds the splits train, val; name one of them"):
        Entry("imagenet", "", str(tmp_path), "", [], "imagenet").images(target_of(Slanted()))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "train", "train")
        tar.add(tmp_path / "val", "val")
    with pytest.raises(UserError, match=r"all\.tar: holds the splits train, val; name one of them"):
        Entry("x", "", str(tmp_path / "all.tar"), "", []).images(target_of(Slanted()))


@pytest.mark.parametrize("what", ["accuracy", "apgd", "sharpness", "hessian"])
@pytest.mark.parametrize("label", [-1, -100, 1000])
def test_a_label_that_is_no_class_stops_every_evaluation(tmp_path, what, label):
    pack(tmp_path, [("a", 0, 0), ("b", 1, label)], None)
    here = {"sharpness_split": "val", "sharpness_m": 2, "sharpness": ["average-l2-1step@0.1"], "hessian_split": "val"}
    model = Slanted()
    model.norm = nn.BatchNorm2d(3)  # the Hessian is also along such parameters
    target = target_of(model, apgd_iters=1, **here)
    with pytest.raises(UserError, match=rf"val\.tar b: label {label}\b.*0\.\.999"):
        evaluation(what).rows(target, Entry("x", "wds", str(tmp_path), "val", [what]))


def test_gray_and_color_are_compared(tmp_path, caplog):
    root = write(tmp_path, {str(i): [i] for i in range(9)})
    for place, mode in (("0/0.png", "1"), ("4/0.png", "L")):  # what the first images are does not speak for all
        Image.new(mode, (8, 8)).save(root / place)
    target = target_of(Slanted())
    Entry("same", "", str(root), "", []).images(target)
    assert "its images are" not in caplog.text
    for place in ("0/0.png", "4/0.png"):
        colour(0).save(root / place)
    target.data_config = DATA_CONFIG | {"input_size": (1, 8, 8)}
    Entry("gray", "", str(root), "", []).images(target)
    assert "its images are RGB, the model takes L: they are made gray, their color is lost" in caplog.text


def test_a_border_wider_than_the_image_names_the_file(tmp_path):
    root = write(tmp_path, {"0": [0]})
    Image.new("RGB", (200, 9)).save(root / "0/0.png")
    entry = Entry("x", "", str(root), "", ["accuracy"])
    assert entry.images(target_of(Slanted(), crop_border_pixels=4)).__getitems__([0])[0][0].size == (192, 1)
    with pytest.raises(UserError, match=r"0/0\.png: 200 x 9 pixels, nothing is left inside a border of 5"):
        accuracy.rows(target_of(Slanted(), crop_border_pixels=5), entry)


def test_what_a_transform_raises_names_the_file(tmp_path):
    images = Entry("x", "", str(write(tmp_path, {"0": [0]})), "", []).images(target_of(Slanted()))
    images.transform = torch.tensor
    with pytest.raises(UserError, match=r"0/0\.png: \w+Error: .*evaluation skips nothing"):
        images.__getitems__([0])


def test_synsets_without_a_set_are_scored_right_by_the_program(tmp_path):
    """The four photographs, as in the suite: taken by position, every one would count as wrong."""
    from tests import efficientnet_lite0

    weights = {"arch": "tf_efficientnet_lite0", "state_dict": efficientnet_lite0.state_dict()}
    torch.save(weights, tmp_path / "lite0.pth.tar")
    flags = ["--data-dir", "tests/photographs", "--workers", "0", "--device", "cpu"]
    rows = main(["--checkpoint", str(tmp_path / "lite0.pth.tar"), *flags])
    assert {row["metric"]: row["value"] for row in rows}["top5"] == 100
