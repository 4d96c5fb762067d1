"""tools/make_shards.py: the layouts it knows, original bytes, continuing, verifying, timm's reader on the result."""

import gc
import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image

from samon.cli import make_shards
from samon.data import create_dataset
from samon.errors import UserError
from tests.sets import jpeg, tar_of

SYNSETS = ["n01440764", "n01443537", "n01484850"]


def pack(*arguments):
    """Run the tool in this process; its error's one line if it fails."""
    try:
        make_shards.main(list(map(str, arguments)))
        return ""
    except UserError as error:
        return str(error)


def folders(root, classes, count=3, splits=("",), suffix="JPEG"):
    """``count`` images in each class folder of each split; their bytes by path."""
    made = {}
    for split in splits:
        for name in classes:
            for i in range(count):
                path = root / split / name / f"im.{i}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                made[path] = jpeg(len(made))
                path.write_bytes(made[path])
    return made


def samples(output, split):
    """[(image bytes, label)] by our reader."""
    stream = create_dataset("wds/x", str(output), split)
    stream.decode = None
    return list(stream)


def info(output):
    return json.loads((output / "_info.json").read_text())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm's reader closes no shard
def test_folders_keep_their_bytes_and_timm_reads_them(tmp_path):
    made = folders(tmp_path / "in", ["b", "a10", "a9"], splits=("train", "val"))
    assert pack("--source", tmp_path / "in", "--output", tmp_path / "out", "--samples-per-shard", 4) == ""
    assert info(tmp_path / "out")["class_names"] == ["a9", "a10", "b"]  # timm's natural order
    for split in ("train", "val"):
        expected = {
            data: ["a9", "a10", "b"].index(path.parent.name) for path, data in made.items() if split in path.parts
        }
        assert dict(samples(tmp_path / "out", split)) == expected
        assert info(tmp_path / "out")["splits"][split]["shard_lengths"] == [4, 4, 1]
        theirs = timm.data.create_dataset("wds/x", str(tmp_path / "out"), split=split)
        assert sorted(label for _, label in theirs) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        del theirs
        gc.collect()
    assert len(samples(tmp_path / "out", "validation")) == 9  # timm's synonyms
    assert pack("--verify", "--output", tmp_path / "out") == ""


def test_same_seed_same_bytes(tmp_path):
    folders(tmp_path / "in", ["a", "b"], 20)
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert pack("--source", tmp_path / "in", "--output", tmp_path / name, "--seed", seed) == ""
    digests = [
        [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / name).glob("*.tar"))]
        for name in ("one", "two", "three")
    ]
    assert len(digests[0]) == 16
    assert digests[0] == digests[1] != digests[2]


def test_a_class_missing_from_a_split_does_not_shift_labels(tmp_path):
    folders(tmp_path / "in", ["a", "b", "c"], splits=("train",))
    folders(tmp_path / "in", ["a", "c"], splits=("val",))
    assert pack("--source", tmp_path / "in", "--output", tmp_path / "out") == ""
    assert {label for _, label in samples(tmp_path / "out", "val")} == {0, 2}


def test_finished_or_foreign_output_is_never_overwritten(tmp_path):
    folders(tmp_path / "in", ["a", "b"])
    arguments = ("--source", tmp_path / "in", "--output", tmp_path / "out")
    assert pack(*arguments) == ""
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "has split train already" in pack(*arguments)
    assert pack(*arguments, "--split", "more") == ""
    assert set(info(tmp_path / "out")["splits"]) == {"train", "more"}
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != "_info.json")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/train-0000.tar").write_bytes(b"mine")
    assert "exists already" in pack("--source", tmp_path / "in", "--output", tmp_path / "other")
    assert (tmp_path / "other/train-0000.tar").read_bytes() == b"mine"


def test_continues_where_it_was_interrupted(tmp_path, monkeypatch):
    folders(tmp_path / "in", ["a", "b"], 8)
    arguments = ("--source", tmp_path / "in", "--output", tmp_path / "out", "--samples-per-shard", 2, "--workers", 1)
    real = make_shards.encode_image
    calls = []

    def interrupted(*given):
        calls.append(1)
        if len(calls) > 7:
            raise OSError("disk full")
        return real(*given)

    monkeypatch.setattr(make_shards, "encode_image", interrupted)
    with pytest.raises(OSError, match="disk full"):
        pack(*arguments)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("train-*.tar")}
    assert len(done) == 3
    assert not (tmp_path / "out/_info.json").exists()
    assert "not finished" in pack("--verify", "--output", tmp_path / "out")
    assert "another conversion was interrupted" in pack(*arguments, "--seed", 1)
    monkeypatch.setattr(make_shards, "encode_image", real)
    assert pack(*arguments) == ""
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in done.items())
    assert pack("--verify", "--output", tmp_path / "out") == ""
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_info.json",
        *(f"train-{i:04d}.tar" for i in range(8)),
    ]


def test_verify_finds_damage(tmp_path, capsys):
    folders(tmp_path / "in", ["a", "b"], 6)
    assert pack("--source", tmp_path / "in", "--output", tmp_path / "out", "--samples-per-shard", 4) == ""
    stored = info(tmp_path / "out")
    path = tmp_path / "out/train-0001.tar"
    with tarfile.open(path) as tar:
        at = next(m.offset_data for m in tar if m.name.endswith(".jpg"))
    data = bytearray(path.read_bytes())
    data[at : at + 10] = b"0123456789"
    path.write_bytes(data)
    said = pack("--verify", "--output", tmp_path / "out")
    assert "2 faults" in said
    assert "SHA-256" in said
    assert ": not an image" in capsys.readouterr().err
    del stored["splits"]["train"]["sha256"][1:]  # of a set that was edited by hand
    (tmp_path / "out/_info.json").write_text(json.dumps(stored))
    assert "1 faults" in pack("--verify", "--output", tmp_path / "out")


@pytest.mark.parametrize("arguments", [("--split", "train"), ()])
def test_splits_are_never_packed_as_one(tmp_path, arguments):
    folders(tmp_path / "in", ["a", "b"], splits=("train", "val"))
    if not arguments:
        folders(tmp_path / "in", ["figures"])
    said = pack("--source", tmp_path / "in", "--output", tmp_path / "out", *arguments)
    assert "images of train, val (and others) would become one split" in said


def test_endings_can_be_named(tmp_path):
    folders(tmp_path / "in", ["a"])
    folders(tmp_path / "in", ["b"], suffix="webp")
    assert pack("--source", tmp_path / "in", "--output", tmp_path / "out", "--input-key", ".jpeg;webp") == ""
    assert info(tmp_path / "out")["class_names"] == ["a", "b"]


def test_images_that_are_none_stop_the_conversion(tmp_path):
    folders(tmp_path / "in", ["a"])
    for content in (b"text", b""):
        (tmp_path / "in/a/bad.jpg").write_bytes(content)
        said = pack("--source", tmp_path / "in", "--output", tmp_path / f"out{len(content)}")
        assert f"a/bad.jpg: not an image: {len(content)} bytes" in said
    left = {path.suffix for path in (tmp_path / "out4").iterdir()}
    assert left == {".tar", ".json"}, "no part of a shard stays behind"


def test_resize_re_encodes_only_what_is_larger(tmp_path):
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/a/small.jpg").write_bytes(jpeg(0, (40, 30)))
    (tmp_path / "in/a/large.png").write_bytes(jpeg(1, (400, 300)))
    assert pack("--source", tmp_path / "in", "--output", tmp_path / "out", "--resize", 50) == ""
    sizes = {Image.open(io.BytesIO(data)).size for data, _ in samples(tmp_path / "out", "train")}
    assert sizes == {(40, 30), (67, 50)}
    assert jpeg(0, (40, 30)) in [data for data, _ in samples(tmp_path / "out", "train")]


def _imagenet(root, labels):
    """Training as a tar of class tars, validation as flat files."""
    inner = {name: tar_of([(f"{name}_{i}.JPEG", jpeg(10 * k + i)) for i in range(3)]) for k, name in enumerate(SYNSETS)}
    root.mkdir()
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of([(f"{name}.tar", data) for name, data in inner.items()]))
    (root / "ILSVRC2012_img_val").mkdir()
    for i in range(len(labels)):
        (root / f"ILSVRC2012_img_val/ILSVRC2012_val_{i + 1:08d}.JPEG").write_bytes(jpeg(100 + i))


def write_devkit(directory, order):
    scipy_io = pytest.importorskip("scipy.io", reason="the devkit's .mat file needs scipy")
    (directory / "data").mkdir(parents=True)
    ids = [2, 3, 1]  # the devkit numbers classes in an order of its own
    columns = [("ILSVRC2012_ID", object), ("WNID", object)]
    rows = np.array(list(zip(ids, SYNSETS, strict=True)), dtype=columns)
    scipy_io.savemat(directory / "data/meta.mat", {"synsets": rows})
    (directory / "data/ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(str(ids[k]) for k in order))


@pytest.mark.parametrize("kind", ["list", "names", "csv", "marked csv", "devkit"])
def test_imagenet(tmp_path, kind):
    order = [2, 0, 1, 1, 0]
    _imagenet(tmp_path / "in", order)
    labels, rows = tmp_path / "labels", list(enumerate((SYNSETS[k] for k in order), 1))
    csv = [f"ILSVRC2012_val_{i:08d},{synset} 1 2 3 4 {SYNSETS[0]} 5 6 7 8" for i, synset in reversed(rows)]
    if kind == "devkit":
        write_devkit(labels, order)
    elif kind == "list":
        labels.write_text("\n".join(synset for _, synset in rows))
    elif kind == "names":
        labels.write_text("\r\n".join(f"ILSVRC2012_val_{i:08d}.JPEG {synset}" for i, synset in reversed(rows)))
    else:
        labels.write_text("\n".join(["\ufeff" * (kind == "marked csv") + "ImageId,PredictionString", *csv]))
    if kind == "names":  # extracted by a tool that renames
        for path in (tmp_path / "in/ILSVRC2012_img_val").iterdir():
            path.rename(path.with_suffix(".png"))
    arguments = ("--source", tmp_path / "in", "--output", tmp_path / "out", "--format", "imagenet")
    assert "give their labels with --val-labels" in pack(*arguments)
    assert pack(*arguments, "--val-labels", labels) == ""
    assert info(tmp_path / "out")["class_names"] == SYNSETS
    assert dict(samples(tmp_path / "out", "train")) == {jpeg(10 * k + i): k for k in range(3) for i in range(3)}
    assert dict(samples(tmp_path / "out", "validation")) == {jpeg(100 + i): k for i, k in enumerate(order)}
    with tarfile.open(tmp_path / "out/validation-0000.tar") as tar:
        assert "ILSVRC2012_val_0000000" in tar.getnames()[0]  # ReaL labels go by this name


def test_imagenet_beside_its_archive_is_not_packed_twice(tmp_path):
    _imagenet(tmp_path / "in", [])
    (tmp_path / f"in/extracted/{SYNSETS[0]}").mkdir(parents=True)
    (tmp_path / f"in/extracted/{SYNSETS[0]}/{SYNSETS[0]}_1.JPEG").write_bytes(jpeg(0))
    said = pack("--source", tmp_path / "in", "--output", tmp_path / "out", "--format", "imagenet")
    assert f"{SYNSETS[0]}_1.JPEG occurs twice, as in a tar and extracted" in said


def test_names_of_imagenet_classes_may_repeat_in_others(tmp_path):
    """As in subsets whose images were renamed."""
    for synset in SYNSETS:
        (tmp_path / f"in/train/{synset}").mkdir(parents=True)
        (tmp_path / f"in/train/{synset}/0001.JPEG").write_bytes(jpeg(0))
    assert pack("--source", tmp_path / "in", "--output", tmp_path / "out", "--format", "imagenet") == ""


NOT_LABELS = {
    "numbers": ("490\n361\n171\n", "line 1 '490' names no image's synset"),
    "caffe": ("ILSVRC2012_val_00000001.JPEG 65\n", "line 1 'ILSVRC2012_val_00000001.JPEG 65' names no"),
    "synset words": ("n01440764 tench, Tinca tinca\n", "line 1 'n01440764 tench, Tinca tinca' names no"),
    "classes": ("\n".join(f"n{i:08d}" for i in range(1000)), "lists every class once"),
    "other images": ("ILSVRC2012_val_00000009.JPEG n01440764\n", "1 labels, none for .*ILSVRC2012_val_00000001.JPEG"),
}


@pytest.mark.parametrize("kind", NOT_LABELS)
def test_labels_of_validation_images_are_synsets(tmp_path, kind):
    _imagenet(tmp_path / "in", [0])
    text, said = NOT_LABELS[kind]
    (tmp_path / "labels.txt").write_text(text)
    arguments = ("--source", tmp_path / "in", "--output", tmp_path / "out", "--format", "imagenet")
    assert re.search(said, pack(*arguments, "--val-labels", tmp_path / "labels.txt"))
    assert not (tmp_path / "out").exists()


def test_cifar_is_found_by_the_directory_it_lies_in(tmp_path, monkeypatch):
    seen = []

    class Fake:
        classes = ("a", "b")

        def __init__(self, root, train):
            seen.append((Path(root), self.base_folder))
            if not list((Path(root) / self.base_folder).iterdir()):
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            self.data, self.targets = np.zeros((2, 32, 32, 3), np.uint8), [0, 1]

    for name, folder in (("CIFAR10", "cifar-10-batches-py"), ("CIFAR100", "cifar-100-python")):
        monkeypatch.setattr(f"torchvision.datasets.{name}", type(name, (Fake,), {"base_folder": folder}))
        (tmp_path / "in" / folder).mkdir(parents=True)
    source = ("--format", "cifar", "--output", tmp_path / "out", "--source")
    for both in (tmp_path / "in", tmp_path):
        assert f"{both}: give the extracted cifar-10-batches-py or cifar-100-python" in pack(*source, both)
    inner = tmp_path / "in/cifar-10-batches-py"
    assert f"{inner}: files are missing or damaged" in pack(*source, inner)
    (inner / "data_batch_1").touch()
    assert pack(*source, inner) == ""
    assert set(seen) == {(tmp_path / "in", "cifar-10-batches-py")}
    assert [label for _, label in samples(tmp_path / "out", "validation")] in ([0, 1], [1, 0])


def test_cifar_arrays(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8),
        "y_train": np.arange(30) % 10,
        "x_test": rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8),
        "y_test": np.arange(10),
    }
    np.savez(tmp_path / "cifar10.npz", **arrays)
    source = ("--source", tmp_path / "cifar10.npz", "--format", "cifar")
    assert pack(*source, "--output", tmp_path / "out") == ""
    for split, part in (("train", "train"), ("validation", "test")):
        found = {
            np.asarray(Image.open(io.BytesIO(data))).tobytes(): label
            for data, label in samples(tmp_path / "out", split)
        }
        assert found == {x.tobytes(): int(y) for x, y in zip(arrays[f"x_{part}"], arrays[f"y_{part}"], strict=True)}
    np.savez(tmp_path / "cifar10.npz", x_train=arrays["x_train"])
    assert "y_train is not a file in the archive" in pack(*source, "--output", tmp_path / "other")


def test_shift_sets_as_distributed(tmp_path):
    """One validation split; evaluation checks the classes."""
    folders(tmp_path / "in/images", SYNSETS, 2)
    (tmp_path / "in/README.txt").write_text("as distributed")
    assert pack("--source", tmp_path / "in", "--format", "imagenet-sketch", "--output", tmp_path / "out") == ""
    assert info(tmp_path / "out")["class_names"] == SYNSETS
    assert info(tmp_path / "out")["splits"]["validation"]["num_samples"] == 6


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: None, "no such file or directory"),
        (lambda root: root.mkdir(), "no images found"),
        (lambda root: folders(root, [""]), "no class folder"),
        (lambda root: (folders(root, [""], splits=("test",)), folders(root, ["a"], splits=("train",))), "flat"),
        (lambda root: root.write_bytes(b"zip?"), "not an uncompressed tar archive"),
    ],
)
def test_sources_that_cannot_be_packed(tmp_path, make, said):
    make(tmp_path / "in")
    assert said in pack("--source", tmp_path / "in", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_are_unique_and_without_dots():
    taken = set()
    keys = [
        make_shards.sample_key(path, "train", taken)
        for path in ("a/x.1.jpg", "a/x_1.png", "train/x.jpg", "__init__/y.jpg", "deep/er/b/z.jpg")
    ]
    assert keys == ["a/x_1", "a/x_1-2", "x", "init__/y", "b/z"]
