"""Every shift set's label convention, on synthetic sets and a model whose answers are known.

An image is one colour that spells a number; the model reads it and answers with that ImageNet class.
"""

import argparse
import io
import json
import tarfile
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from torch import nn

from samon.errors import UserError
from samon.evals import accuracy, shifts
from samon.evals.entry import Entry, Target, batches
from samon.trainer.flag_rows import VALIDATE
from samon.trainer.flags import by_key

SYNSETS = shifts._timm_lines("imagenet_synsets.txt")
DATA_CONFIG = {
    "input_size": (3, 8, 8),
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def colour(number, size=8):
    """RGB image whose colour spells a number below 1000 in three digits."""
    digits = number // 100, number // 10 % 10, number % 10
    return Image.new("RGB", (size, size), tuple(20 * digit + 10 for digit in digits))


class Reader(nn.Module):
    """Answers with the number that the image spells; ``favourite`` outbids it with a class that is always
    there.
    """

    def __init__(self, favourite=None):
        super().__init__()
        self.favourite, self.unused = favourite, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        assert (x.flatten(2).amax(2) - x.flatten(2).amin(2)).max() < 0.02, "the image is not one colour"
        digits = ((x.mean((2, 3)) * 255 - 10) / 20).round().long().clamp(0, 9)
        logits = torch.zeros(len(x), 1000)
        logits[torch.arange(len(x)), digits[:, 0] * 100 + digits[:, 1] * 10 + digits[:, 2]] = 10.0
        if self.favourite is not None:
            logits[:, self.favourite] = 20.0
        return logits


def write(root, folders, border=None):
    """{folder: numbers to spell} as PNG files; ``border`` frames them with 2 pixels of another colour."""
    for folder, numbers in folders.items():
        (root / folder).mkdir(parents=True)
        for k, number in enumerate(numbers):
            image = colour(number)
            if border:
                framed = Image.new("RGB", (12, 12), border)
                framed.paste(image, (2, 2))
                image = framed
            image.save(root / folder / f"{k}.png")
    return root


def measure(kind, root, model=None, dataset="", split="", first=None, **changes):
    """{reading of the labels: {metric: row}}."""
    settings = {
        "num_samples": None,
        "seed": 0,
        "torchcompile": None,
        "batch_size": 64,
        "workers": 0,
        "retry": False,
        "bootstrap": 0,
        "class_report": "",
        "channels_last": False,
        "log_freq": 100,
        "crop_border_pixels": None,
        "pin_mem": False,
        "no_prefetcher": True,
        "valid_labels": "",
        "real_labels": "",
        "input_key": None,
        "shard_cache": None,
        "shard_cache_size": 1.0,
        "allow_shell_urls": False,
        "target_key": None,
        "class_map": "",
        "dataset_download": False,
        "dataset_trust_remote_code": False,
        "input_img_mode": None,
    }
    config = argparse.Namespace(**settings | {"fsdp": False} | changes)
    target = Target(config, model or Reader(), DATA_CONFIG, torch.device("cpu"), 0, 1, nullcontext)
    found = {}
    for row in accuracy.rows(target, Entry(kind, dataset, str(root), split, ["accuracy"], kind, first=first)):
        found.setdefault(row.get("setting", ""), {})[row["metric"]] = row
    return found


def test_v2_folders_are_integers(tmp_path):
    root = write(tmp_path, {str(i): [i] for i in range(1000)})
    row = measure("imagenetv2-matched-frequency", root)["1000 classes"]["top1"]
    assert row["value"] == 100
    assert row["num_samples"] == 1000
    assert row["mismatch"] == "1000 images, published 10000"
    # What is being avoided: as strings, only 12 of the 1,000 folders are in their place.
    assert sum(int(name) == place for place, name in enumerate(sorted(map(str, range(1000))))) == 12


def test_v2_with_other_folders_is_an_error_or_a_mismatch(tmp_path):
    root = write(tmp_path, {"0": [0], "7": [7]})
    row = measure("imagenetv2-top-images", root)["1000 classes"]["top1"]
    assert row["value"] == 100
    assert "2 classes, published 1000" in row["mismatch"]
    write(tmp_path, {"n01440764": [0]})
    with pytest.raises(UserError, match=r"'n01440764' is no integer 0\.\.999"):
        measure("imagenetv2-top-images", root)


@pytest.mark.parametrize("letter", ["r", "a"])
def test_r_and_a_are_read_by_synset_among_their_200_classes(tmp_path, letter):
    inside = shifts.subset_indices(letter)
    outside = min(set(range(1000)) - set(inside))
    root = write(tmp_path, {SYNSETS[i]: [i] for i in inside})
    found = measure(f"imagenet-{letter}", root, Reader(favourite=outside))
    assert list(found) == ["200 classes"]
    assert found["200 classes"]["top1"]["value"] == 100  # the mask removes the favourite
    assert measure(f"imagenet-{letter}", root, Reader(inside[5]))["200 classes"]["top1"]["value"] == 0.5
    assert "classes" not in found["200 classes"]["top1"]["mismatch"]  # 200, as published
    published = {"r": 30000, "a": 7500}[letter]
    assert found["200 classes"]["top1"]["mismatch"] == f"200 images, published {published}"


def test_imagenet_is_also_read_on_the_clean_subsets(tmp_path):
    a, r = shifts.subset_indices("a"), shifts.subset_indices("r")
    only_a, only_r = min(set(a) - set(r)), min(set(r) - set(a))
    neither = min(set(range(1000)) - set(a) - set(r))
    root = write(tmp_path / "validation", {SYNSETS[i]: [i, i] for i in (only_a, only_r, neither)})
    found = measure("imagenet", root.parent, Reader(neither), split="validation")
    assert found["1000 classes"]["top1"]["value"] == pytest.approx(100 / 3)
    for letter in "ar":
        row = found[f"clean subset of imagenet-{letter}"]["top1"]
        assert (row["value"], row["num_samples"]) == (100, 2)


def test_images_of_imagenet_c_are_not_resized_again(tmp_path):
    """A frame of one pixel is left where the image has the model's size, and cut off by the crop where it has not."""
    values = {key: flag.default for key, flag in by_key(VALIDATE).items()} | {"workers": 0, "no_prefetcher": True}
    data = DATA_CONFIG | {"crop_pct": 0.5}
    target = Target(argparse.Namespace(**values), Reader(), data, torch.device("cpu"), 0, 1, nullcontext)
    for size in (8, 16):
        (tmp_path / SYNSETS[0]).mkdir(exist_ok=True)
        framed = Image.new("RGB", (size, size), (255, 255, 255))
        framed.paste((0, 0, 0), (1, 1, size - 1, size - 1))
        framed.save(tmp_path / SYNSETS[0] / f"{size:02d}.png")
    for kind, kept in (("imagenet-c", [True, False]), ("imagenet", [False, False])):
        images = Entry(kind, "", str(tmp_path), "", [], kind).images(target)
        for raw in (True, False):
            ((_, _, x, _),) = batches(target, images, [0, 1], 2, raw=raw)
            framed = torch.ones(3, 8, 8)
            framed[:, 1:-1, 1:-1] = 0
            assert [torch.equal(image, framed) for image in x] == kept


def test_sketch_goes_by_synset(tmp_path):
    root = write(tmp_path, {SYNSETS[i]: [i] for i in (0, 3, 999)})
    found = measure("imagenet-sketch", root)["1000 classes"]
    assert found["top1"]["value"] == 100
    assert found["top1"]["mismatch"] == "3 classes, published 1000; 3 images, published 50889"
    write(tmp_path, {"tench": [0]})
    with pytest.raises(UserError, match="'tench' is no ImageNet synset"):
        measure("imagenet-sketch", root)


def test_objectnet_cuts_the_border_and_knows_both_conventions(tmp_path):
    classes = shifts.objectnet_classes()
    assert len(classes) == 113
    assert sum(len(indices) > 1 for indices in classes.values()) == 9
    folders = dict(classes)  # one image for each right index
    folders["not_in_imagenet"] = [1]
    root = write(tmp_path, folders, border=(255, 0, 0))
    found = measure("objectnet", root)
    count = sum(map(len, classes.values()))
    for setting in ("1000 classes", "113 classes"):
        assert found[setting]["top1"]["value"] == 100
        assert found[setting]["top1"]["num_samples"] == count
    foreign = min(set(range(1000)) - {i for indices in classes.values() for i in indices})
    found = measure("objectnet", root, Reader(foreign))
    assert found["1000 classes"]["top1"]["value"] == 0
    assert found["1000 classes"]["top5"]["value"] == 100
    assert found["113 classes"]["top1"]["value"] == 100
    assert found["113 classes"]["top1"]["mismatch"] == f"{count} images, published 18574"


def test_real_labels_go_by_file_name(tmp_path):
    labels = shifts.real_labels()
    several = int((labels.sum(1) > 1).nonzero()[0])
    none = int((labels.sum(1) == 0).nonzero()[0])
    single = int((labels.sum(1) == 1).nonzero()[0])
    wrong = int((~labels[single]).nonzero()[0])
    for number, answer in ((several, int(labels[several].nonzero()[-1])), (single, wrong), (none, 5)):
        colour(answer).save(tmp_path / f"ILSVRC2012_val_{number + 1:08d}.JPEG", quality=100)
    row = measure("imagenet-real", tmp_path)["1000 classes"]["top1"]
    assert (row["value"], row["num_samples"]) == (50, 2)  # the image without labels is not counted
    assert int(labels.any(1).sum()) == 46837
    plain = measure("", tmp_path, real_labels="real")["ReaL"]["top1"]
    assert (plain["value"], plain["num_samples"]) == (50, 2)
    colour(1).save(tmp_path / "tench.png")
    with pytest.raises(UserError, match=r"tench\.png: labels of .* go by"):
        measure("imagenet-real", tmp_path)


def pack(root, samples, names):
    """One shard `val.tar` of (key, number to spell, label)."""
    with tarfile.open(root / "val.tar", "w") as tar:
        for key, number, label in samples:
            buffer = io.BytesIO()
            colour(number).save(buffer, "PNG")
            for suffix, data in (("png", buffer.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    split = {"name": "val", "filenames": ["val.tar"], "shard_lengths": [len(samples)], "num_samples": len(samples)}
    info = {"splits": {"val": split}} | ({"class_names": names, "num_classes": len(names)} if names else {})
    (root / "_info.json").write_text(json.dumps(info))


def test_shards_go_by_the_class_names_of_their_info_file(tmp_path):
    names = sorted(map(str, range(20)))  # string order, as a packing tool may sort them
    pack(tmp_path, [(f"{k:03d}", int(name), k) for k, name in enumerate(names)], names)
    found = measure("imagenetv2-threshold0.7", tmp_path, dataset="wds", split="val")["1000 classes"]
    assert (found["top1"]["value"], found["top1"]["num_samples"]) == (100, 20)
    pack(tmp_path, [("0", 1, 0)], None)
    with pytest.raises(UserError, match="need class_names"):
        measure("imagenet-r", tmp_path, dataset="wds", split="val")


def test_real_labels_of_shards_go_by_key(tmp_path):
    labels = shifts.real_labels()
    answer = int(labels[6].nonzero()[0])
    pack(tmp_path, [("ILSVRC2012_val_00000007", answer, 0)], None)
    row = measure("imagenet-real", tmp_path, dataset="wds", split="val")["1000 classes"]["top1"]
    assert (row["value"], row["num_samples"]) == (100, 1)


def test_plain_set_with_valid_labels(tmp_path):
    root = write(tmp_path / "set", {"a": [6], "b": [11]})
    (tmp_path / "indices.txt").write_text("11\n6\n")  # a mask over the classes, as in timm: their order is nothing
    found = measure("", root, Reader(favourite=900), valid_labels=str(tmp_path / "indices.txt"))
    assert found["valid labels"]["top1"]["value"] == 100
    write(root, {"c": [12]})
    with pytest.raises(UserError, match=r"c/0\.png: label 2, but there are 2 classes \(0\.\.1\)"):
        measure("", root, valid_labels=str(tmp_path / "indices.txt"))
    with pytest.raises(UserError, match="no such directory"):
        measure("", tmp_path / "elsewhere")


@pytest.mark.parametrize("text", ["-1", "1000", "0.5", "n01440764", ""])
def test_valid_labels_are_classes_of_the_model(tmp_path, text):
    root = write(tmp_path / "set", {"a": [6]})
    (tmp_path / "indices.txt").write_text(text)
    with pytest.raises(UserError, match=rf"--valid-labels .*: '{text}' is no class; write numbers in 0\.\.999"):
        measure("", root, valid_labels=str(tmp_path / "indices.txt"))


def test_real_and_valid_labels_count_together(tmp_path):
    labels = shifts.real_labels()
    first, other = ((labels.sum(1) == 1).nonzero().flatten()[k].item() for k in (0, -1))
    right = labels[first].nonzero().item()
    for number in (first, other):
        colour(right).save(tmp_path / f"ILSVRC2012_val_{number + 1:08d}.JPEG", quality=100)
    (tmp_path / "indices.txt").write_text(f"{right}\n{(right + 1) % 1000}\n")
    settings = {"real_labels": "real", "valid_labels": str(tmp_path / "indices.txt")}
    (reading,) = measure("", tmp_path, Reader(favourite=(right + 5) % 1000), **settings).items()
    assert reading[0] == "ReaL, valid labels"
    assert (reading[1]["top1"]["value"], reading[1]["top1"]["num_samples"]) == (100, 1)  # the other's is no valid one


@pytest.mark.parametrize("wrong", [{"a": 1}, [[0]] * 49_999, [[-1]] * 50_000, [[1000]] * 50_000, [0] * 50_000, "{"])
def test_real_labels_are_lists_of_classes(tmp_path, wrong):
    (tmp_path / "real.json").write_text(wrong if isinstance(wrong, str) else json.dumps(wrong))
    colour(1).save(tmp_path / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UserError, match=r"--real-labels .*/real\.json: "):
        measure("", tmp_path, real_labels=str(tmp_path / "real.json"))


def test_real_labels_end_with_the_last_validation_image(tmp_path):
    colour(1).save(tmp_path / "ILSVRC2012_val_00050001.JPEG")
    with pytest.raises(UserError, match=r"00050001\.JPEG: labels of .* go by"):
        measure("", tmp_path, real_labels="real")


@pytest.mark.parametrize("flag", ["valid_labels", "real_labels"])
def test_a_set_and_flags_for_labels_exclude_each_other(tmp_path, flag):
    root = write(tmp_path, {SYNSETS[0]: [0]})
    with pytest.raises(UserError, match=f"imagenet decides by itself .* drop --{flag.replace('_', '-')}"):
        measure("imagenet", root, **{flag: "real"})


def test_images_outside_a_sets_200_classes_are_refused(tmp_path):
    root = write(tmp_path, {SYNSETS[0]: [0]})
    with pytest.raises(UserError, match="'n01440764' is not among the 200 classes of imagenet-r"):
        measure("imagenet-r", root)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_stops_the_evaluation(tmp_path, workers):
    root = write(tmp_path, {SYNSETS[0]: [0]})
    (root / SYNSETS[0] / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        measure("imagenet-sketch", root, workers=workers)
    where = root / SYNSETS[0] / "1.png"
    said = "not an image: 8 bytes starting b'no image'; repair the data set, evaluation skips nothing"
    assert str(caught.value) == f"{where}: {said}"


def test_a_sample_without_label_stops_the_evaluation(tmp_path):
    pack(tmp_path, [("a", 0, 0), ("b", 1, "one")], ["0", "1"])
    with pytest.raises(UserError, match=r"val\.tar b: .*'one'.*evaluation skips nothing"):
        measure("imagenetv2-top-images", tmp_path, dataset="wds", split="val")


def test_a_runs_own_validation_is_the_front_of_the_split(tmp_path):
    pack(tmp_path, [(f"{k:02d}", k, 0 if k > 3 else k) for k in range(10)], None)  # the first five are right or 4
    top1 = measure("", tmp_path, dataset="wds", split="val", first=5)[""]["top1"]
    assert (top1["value"], top1["num_samples"]) == (80, 5)
    assert measure("", tmp_path, dataset="wds", split="val", first=4)[""]["top1"]["value"] == 100
    assert measure("", tmp_path, dataset="wds", split="val")[""]["top1"]["value"] == 40
