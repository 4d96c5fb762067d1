"""Data sources: which names are accepted, and random access that gives what the streams give."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samon.data import SampleError, create_dataset, create_loader
from samon.data.decode import decode_pil
from samon.data.source_factory import is_sorted_by_class, open_source
from samon.data.sources import find_overlap
from samon.errors import UserError
from tests.sets import change_info, jpeg, write_images, write_set


@pytest.fixture
def folder(tmp_path):
    """Two images in each of the classes a9, a10 and b, whose natural order is not the alphabetical one."""
    return write_images(tmp_path / "set", *(f"train/{name}/{i}.jpg" for name in ("a9", "a10", "b") for i in range(2)))


def labels_of(source):
    return [record.label for record in source.read(range(len(source)))]


@pytest.mark.parametrize(
    ("name", "root", "said"),
    [
        ("", None, "no data set; give --data-dir, the directory of its class folders"),
        ("imagenet", "", "--dataset imagenet needs --data-dir"),
        ("wds/x", None, "--dataset wds/x needs --data-dir, the directory or URL"),
        ("wds", None, "--dataset wds needs --data-dir"),
        ("npz/x", None, "--dataset npz/x needs --data-dir, the directory of NAME.npz"),
        ("tfds/x", "there", "tfds/ cannot be read; use wds/, npz/, torch/, hfds/, or no prefix"),
    ],
)
def test_names_that_are_refused(name, root, said):
    with pytest.raises(UserError) as caught:
        open_source(name, root, "train")
    assert said in str(caught.value)


def test_shards_are_read_in_any_order_one_pass_each(tmp_path, monkeypatch):
    root = write_set(tmp_path / "set", [3, 1, 4])
    source = open_source("wds/x", root, "train")
    passes, read = [], source.reader.read
    monkeypatch.setattr(source.reader, "read", lambda url, *rest: passes.append(url) or read(url, *rest))
    order = [7, 0, 3, 0, 5]
    records = source.read(order)
    assert [(record.image, record.label) for record in records] == [(jpeg(i), i) for i in order]
    assert passes == list(source.shards.urls)
    assert len(source) == source.num_classes == 8
    assert open_source("wds/x", root, "train", class_map={i: i // 4 for i in range(8)}).num_classes == 2
    (tmp_path / "set/train-0001.tar").write_bytes(b"")
    assert [type(record) for record in source.read([3, 4])] == [SampleError, type(records[0])]


def test_folders_keep_timms_order_and_chosen_classes(folder):
    source = open_source("", folder, "train")
    assert (source.class_names, source.num_classes) == (["a9", "a10", "b"], 3)
    assert [(r.image, r.label) for r in source.read(range(6))] == [(jpeg(i), i // 2) for i in range(6)]
    assert source.read([2])[0].where == f"{folder}/train/a10/0.jpg"
    some = open_source("", folder, "train", keep={"b", "z"})
    assert [record.label for record in some.read(range(len(some)))] == [2, 2]
    with pytest.raises(UserError, match="no samples of the classes"):
        open_source("", folder, "train", keep={"z"})
    with pytest.raises(UserError, match="no such directory"):
        open_source("", f"{folder}/gone", "train")


def test_arrays_come_as_images_and_in_parts(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "tiny.npz", x_train=pixels, y_train=[3, 1, 2, 0])
    source = open_source("npz/tiny", str(tmp_path), "train")
    first, second = source.read([2, 0])
    assert (first.label, second.label) == (2, 3)
    assert isinstance(first.image, Image.Image)
    assert (np.asarray(first.image) == pixels[2]).all()
    assert labels_of(open_source("npz/tiny", str(tmp_path), "train[:3]")) == [3, 1, 2]
    (last,) = open_source("npz/tiny", str(tmp_path), "train[3:]").read([0])
    assert (np.asarray(last.image) == pixels[3]).all()
    for split, message in (
        ("train[4:]", r"the part of .*tiny.npz train is empty, it has 4 images"),
        ("train[3]", r"unknown split 'train\[3\]'"),
        ("trian", "unknown split 'trian'"),
    ):
        with pytest.raises(UserError, match=message):
            open_source("npz/tiny", str(tmp_path), split)


def test_hub_data_sets_train(tmp_path, monkeypatch):
    """The real library on a local set: its names of classes, every sample, and the class map."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()
    for index in range(6):
        path = tmp_path / "set/train" / ("ant", "bee")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(path)
    source = open_source(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"), "train")
    assert (len(source), source.num_classes, source.class_names) == (6, 2, ["ant", "bee"])
    found = sorted((decode_pil(r.image).getpixel((0, 0))[0], r.label) for r in source.read(range(6)))
    assert found == [(40 * index, index % 2) for index in range(6)]
    stream = create_dataset(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"), "train", is_training=True)
    loader = create_loader(stream, (3, 8, 8), 2, True, num_workers=0, device="cpu", no_aug=True)
    assert sorted(label for _, target in loader for label in target.tolist()) == [0, 0, 0, 1, 1, 1]


# --- folders ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("paths", [["flat.jpg", "other.jpg"], ["a/1.jpg", "b/1.jpg", "stray.jpg"]])
@pytest.mark.parametrize("name", ["", "torch/folder"])
def test_images_in_no_class_folder_are_refused(tmp_path, name, paths):
    root = write_images(tmp_path / "set", *paths)
    count = sum("/" not in path for path in paths)
    with pytest.raises(UserError, match=rf"set/(flat|stray).jpg is in no class folder \({count} of {len(paths)} "):
        open_source(name, root, "")


@pytest.mark.parametrize("name", ["", "torch/folder"])
def test_a_part_of_a_folder_has_as_many_images_of_each_class(name, folder):
    first, second = open_source(name, folder, "train[:4]"), open_source(name, folder, "train[4:]")
    assert labels_of(first) == [0, 0, 1, 2]
    assert labels_of(open_source(name, folder, "train[:3]")) == [0, 1, 2]
    assert first.num_classes == second.num_classes == 3
    whole = [record.where for record in open_source(name, folder, "train").read(range(6))]
    parts = [record.where for part in (first, second) for record in part.read(range(len(part)))]
    assert sorted(parts) == sorted(whole)
    assert not find_overlap(first.extents, second.extents)
    assert find_overlap(first.extents, open_source(name, folder, "train[3:]").extents)
    with pytest.raises(UserError, match="is empty, it has 6 images"):
        open_source(name, folder, "train[6:]")


def test_class_folders_at_several_places_are_mentioned(tmp_path, caplog):
    root = write_images(tmp_path, "cat/in/0.jpg", "dog/in/0.jpg")
    assert open_source("", root, "").class_names == ["in"]
    assert "each innermost folder is a class, in cat, dog, ...; --dataset torch/folder takes" in caplog.text
    assert open_source("torch/folder", root, "").class_names == ["cat", "dog"]


# --- --class-map ------------------------------------------------------------------------------------------------------
def test_a_class_map_applies_to_every_kind_that_names_its_classes(tmp_path, folder):
    root = write_set(tmp_path / "shards", [3])
    change_info(root, class_names=["x", "y", "z"])
    source = open_source("wds/x", root, "train", class_map={"z": 0, "y": 1, "x": 2})
    assert (labels_of(source), source.class_names) == ([2, 1, 0], ["z", "y", "x"])
    both = open_source("wds/x", root, "train", class_map={"z": 0, "y": 1, "x": 1})
    assert (labels_of(both), both.class_names, both.num_classes) == ([1, 1, 0], None, 2)
    for name in ("", "torch/folder"):
        assert labels_of(open_source(name, folder, "train", class_map={"b": 0, "a9": 1})) == [1, 1, 0, 0]
        with pytest.raises(UserError, match=r"--class-map gone.txt: Cannot locate specified class map"):
            open_source(name, folder, "train", class_map="gone.txt")
    with pytest.raises(UserError, match="--class-map has none of its classes; it lists 'n0', the data 'x'"):
        open_source("wds/x", root, "train", class_map={"n0": 0})


def test_a_class_map_of_names_is_refused_where_classes_have_none(tmp_path):
    np.savez(tmp_path / "tiny.npz", x_train=np.zeros((2, 4, 4, 3), np.uint8), y_train=[3, 1])
    with pytest.raises(UserError, match="its classes have no names; --class-map must map stored labels"):
        open_source("npz/tiny", str(tmp_path), "train", class_map={"cat": 0})
    assert labels_of(open_source("npz/tiny", str(tmp_path), "train", class_map={3: 0, 1: 1})) == [0, 1]


# --- torchvision's data sets ------------------------------------------------------------------------------------------
@pytest.fixture
def mnist(tmp_path):
    """MNIST's files with 5 training and 3 test images."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 5), ("t10k", 3)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            head = b"\0\0\x08" + bytes([len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
            values = np.arange(count) if kind == "labels-idx1" else np.full(shape, count)
            (raw / f"{name}-{kind}-ubyte").write_bytes(head + values.astype(np.uint8).tobytes())
    return str(tmp_path)


@pytest.mark.parametrize(
    ("split", "labels", "gray"),
    [
        *[("train", range(5), 5), ("training", range(5), 5), ("train[3:]", [3, 4], 5), ("train[:3]", [0, 1, 2], 5)],
        *[("validation", range(3), 3), ("test", range(3), 3), ("test[1:]", [1, 2], 3)],
    ],
)
def test_splits_of_torchvisions_sets_and_their_parts(mnist, split, labels, gray):
    source = open_source("torch/mnist", mnist, split)
    assert labels_of(source) == list(labels)
    assert {record.image.getpixel((0, 0)) for record in source.read(range(len(source)))} == {gray}
    assert source.num_classes == 10


def test_other_splits_of_torchvisions_sets_are_refused(mnist, tmp_path):
    for split in ("trian", "train[x]", "train[5:]"):
        with pytest.raises(UserError, match=r"unknown split|is empty"):
            open_source("torch/mnist", mnist, split)
    with pytest.raises(UserError, match="does not contain it, or only in part; add --dataset-download or name"):
        open_source("torch/cifar10", str(tmp_path), "train")


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        *[("train", "train[2:]", True), ("train[:3]", "train[2:]", True), ("train[:3]", "train[3:]", False)],
        *[("train", "validation", False), ("training", "train", True), ("val", "test", True)],
    ],
)
def test_splits_that_share_samples_are_known(mnist, tmp_path, first, second, shared):
    pixels = np.zeros((5, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "tiny.npz", x_train=pixels, y_train=range(5), x_test=pixels, y_test=range(5))
    for name in ("torch/mnist", "npz/tiny"):
        assert bool(find_overlap(*(open_source(name, mnist, split).extents for split in (first, second)))) == shared


@pytest.mark.parametrize("split", ["val", "val[:1]"])
def test_a_split_inside_the_folder_of_another_is_known(tmp_path, split):
    root = write_images(tmp_path, *(f"{folder}{name}/0.jpg" for folder in ("", "val/") for name in "ab"))
    whole, part = open_source("", root, "").extents, open_source("", root, split).extents
    assert find_overlap(whole, part) == find_overlap(part, whole) == f"{root}/val"


@pytest.mark.parametrize("kind", ["npz", "hfds"])
def test_a_part_without_some_classes_is_mentioned(tmp_path, caplog, monkeypatch, kind):
    """The first 4 of 6 images that lie class by class."""
    np.savez(tmp_path / "x.npz", x_train=np.zeros((6, 4, 4, 3), np.uint8), y_train=np.arange(6) // 2)
    name, root = "npz/x", str(tmp_path)
    if kind == "hfds":
        pytest.importorskip("datasets").disable_progress_bars()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        images = write_images(tmp_path / "set", *(f"train/{'abc'[i // 2]}/{i}.jpg" for i in range(6)))
        name, root = f"hfds/{images}", str(tmp_path / "cache")
    assert open_source(name, root, "train").num_classes == 3
    assert "classes" not in caplog.text
    assert set(labels_of(open_source(name, root, "train[:4]"))) == {0, 1}
    assert "train[:4] has images of 2 of the 3 classes" in caplog.text


def test_sets_whose_first_samples_are_of_few_classes():
    assert all(is_sorted_by_class(name) for name in ("", "hfds/x", "torch/imagenet", "torch/inat", "torch/places365"))
    assert not any(is_sorted_by_class(name) for name in ("wds/x", "npz/x", "torch/CIFAR10", "torch/mnist"))


def test_lists_of_shards_that_share_one_are_known(tmp_path):
    root = write_set(tmp_path / "set", [2, 2, 2])
    lists = "train-{0000..0001}.tar", "train-{0001..0002}.tar", "train-0002.tar"
    first, second, third = (open_source("wds/x", root, names).extents for names in lists)
    assert find_overlap(first, second).endswith("train-0001.tar")
    assert not find_overlap(first, third)


def test_torchvisions_imagenet_counts_classes_not_synonyms(tmp_path):
    import torch

    wnids = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish", "Carassius auratus")}
    torch.save((wnids, ["n01440764"]), tmp_path / "meta.bin")
    write_images(tmp_path, *(f"train/{name}/{i}.jpg" for name in wnids for i in range(2)))
    source = open_source("torch/imagenet", str(tmp_path), "training")
    assert (source.num_classes, source.class_names, labels_of(source)) == (2, list(wnids), [0, 0, 1, 1])


def test_torchvisions_folders_are_read_as_plain_ones_but_numbered_as_there(folder):
    Path(folder, "train/b/1.jpg").write_bytes(b"")
    source = open_source("torch/image_folder", folder, "train")
    assert (source.class_names, labels_of(source)) == (["a10", "a9", "b"], [0, 0, 1, 1, 2, 2])
    assert source.read([5])[0].image == b""
    with pytest.raises(UserError, match="no folder for split 'validation', it has train"):
        open_source("torch/image_folder", folder, "validation")


def test_whatever_a_data_set_raises_on_a_sample_is_its_error(mnist, monkeypatch):
    source = open_source("torch/mnist", mnist, "train")
    monkeypatch.setattr(source.pairs, "data", None)
    assert "mnist" in str(source.read([1])[0])
    assert type(source.read([1])[0]).__name__ == "SampleError"


# --- arrays -----------------------------------------------------------------------------------------------------------
IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (IMAGES, np.eye(2), r"y_train is float64 \[2, 2\], not one class number for each of the 2 images"),
        (IMAGES, np.zeros((2, 1, 1)), r"y_train is float64 \[2, 1, 1\], not one"),
        (IMAGES, [0.5, 1], "y_train: label 0.5 of image 0 is not a class number"),
        (IMAGES, [0, np.nan], "y_train: label nan of image 1 is not a class number"),
        (IMAGES, [0, np.inf], "y_train: label inf of image 1 is not a class number"),
        (IMAGES, [0, -1], "y_train: label -1 of image 1 is not a class number"),
        (IMAGES, ["a", "b"], r"y_train is <U1 \[2\]"),
        (IMAGES, [0], r"\[1\], not one class number for each of the 2 images"),
        (IMAGES.transpose(0, 3, 1, 2), [0, 1], r"x_train is uint8 \[2, 3, 4, 4\], not uint8 \[N, H, W, 3\]"),
        (IMAGES.astype(float), [0, 1], r"x_train is float64"),
        (IMAGES[0], [0, 1], r"y_train is int64 \[2\], not one"),
    ],
)
def test_arrays_that_are_no_images_with_a_class_each(tmp_path, images, labels, said):
    np.savez(tmp_path / "tiny.npz", x_train=images, y_train=labels)
    with pytest.raises(UserError, match=said):
        open_source("npz/tiny", str(tmp_path), "train")


def test_files_that_are_not_such_arrays(tmp_path):
    np.savez(tmp_path / "bad.npz", x_train=IMAGES)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "bad.npz").read_bytes()[:100])
    for name, reason in (("bad", "y_train is not a file"), ("cut", ""), ("other", "No such file")):
        with pytest.raises(UserError, match=rf"{name}\.npz: x_train and y_train cannot be read: .*{reason}"):
            open_source(f"npz/{name}", str(tmp_path), "train")


def test_arrays_that_are_images_with_a_class_each(tmp_path):
    np.savez(tmp_path / "tiny.npz", x_train=IMAGES[..., :1], y_train=np.array([[1.0], [0.0]]))
    source = open_source("npz/tiny", str(tmp_path), "train")
    assert labels_of(source) == [1, 0]
    assert source.read([0])[0].image.mode == "L"


# --- the hub ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch):
    """Saves nothing: `load_dataset` gives a split of the columns named."""
    datasets = pytest.importorskip("datasets")

    def make(**columns):
        features = {"ClassLabel": datasets.ClassLabel(names=["ant", "bee"]), "Image": datasets.Image()}
        kinds = {key: features.get(kind) or datasets.Value(kind) for key, (kind, _) in columns.items()}
        values = {key: values for key, (_, values) in columns.items()}
        made = datasets.Dataset.from_dict(values, features=datasets.Features(kinds))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)

    return make


PICTURES = ("Image", [{"bytes": jpeg(0), "path": None}, {"bytes": jpeg(1), "path": None}, None])


def test_columns_of_the_hubs_sets_are_named(hub):
    hub(img=PICTURES, fine=("ClassLabel", [0, 1, 0]))
    with pytest.raises(UserError, match=r"no column 'image'; it has img, fine: give --inp"):
        open_source("hfds/x", None, "train")
    with pytest.raises(UserError, match=r"no column 'label'.*give --target-key"):
        open_source("hfds/x", None, "train", input_key="img")
    source = open_source("hfds/x", None, "train", input_key="img", target_key="fine")
    assert source.class_names == ["ant", "bee"]


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_text_labels_of_the_hub_are_classes(hub, kind):
    hub(image=PICTURES, label=(kind, ["b10", "b9", None]))
    source = open_source("hfds/x", None, "train")
    assert source.class_names == ["b9", "b10"]
    assert [getattr(r, "label", str(r)) for r in source.read([0, 1])] == [1, 0]
    mapped = open_source("hfds/x", None, "train", class_map={"b10": 0, "b9": 5})
    assert [r.label for r in mapped.read([0, 1])] == [0, 5]


def test_samples_of_the_hub_without_image_or_label_are_corrupt(hub):
    hub(image=PICTURES, label=("ClassLabel", [0, None, 1]))
    kinds = [type(r).__name__ for r in open_source("hfds/x", None, "train").read(range(3))]
    assert kinds == ["RawSample", "SampleError", "SampleError"]
