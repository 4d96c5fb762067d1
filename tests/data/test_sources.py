"""Data sources: which names are accepted, and random access that gives what the streams give."""

import numpy as np
import pytest
from PIL import Image

from samon.data import ShardError, create_dataset, create_loader
from samon.data.arrays import read_npz
from samon.data.decode import decode_pil
from samon.data.sources import SOURCES, check_name, open_source
from samon.errors import UserError
from tests.sets import jpeg, write_set


@pytest.fixture
def folder(tmp_path):
    """Two images in each of the classes a9, a10 and b, whose natural order is not the alphabetical one."""
    for number, name in enumerate(["a9", "a10", "b"]):
        for i in range(2):
            path = tmp_path / f"set/train/{name}/{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(2 * number + i))
    return str(tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "root", "said"),
    [
        ("", None, "no data set; give --data-dir, the directory of its class folders"),
        ("imagenet", "", "--dataset imagenet needs --data-dir"),
        ("wds/x", None, "--dataset wds/x needs --data-dir, the directory or URL"),
        ("wds", None, "--dataset wds needs --data-dir"),
        ("npz/x", None, "--dataset npz/x needs --data-dir, the directory of NAME.npz"),
        ("tfds/x", "there", "tfds/ cannot be resumed or counted exactly; use wds/, hfds/"),
        ("HFIDS/x", None, "hfids/ cannot be resumed"),
        ("foo/x", "there", "--dataset foo/x: no such kind of data set; use wds/, npz/, torch/, hfds/, or no prefix"),
    ],
)
def test_names_that_are_refused(name, root, said):
    with pytest.raises(UserError) as caught:
        check_name(name, root)
    assert said in str(caught.value)
    with pytest.raises(UserError) as caught:
        open_source(name, root, "train")
    assert said in str(caught.value)


def test_names_that_are_accepted():
    for kind, row in SOURCES.items():
        check_name(f"{kind}/x" if kind else "", "there" if row.needs else None)
    check_name("imagenet", "there")
    assert [kind for kind, row in SOURCES.items() if not row.needs] == ["torch", "hfds"]


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
    assert [type(record) for record in source.read([3, 4])] == [ShardError, type(records[0])]


def test_folders_keep_timms_order_and_chosen_classes(folder):
    source = open_source("", folder, "train")
    assert (source.class_names, source.num_classes) == (["a9", "a10", "b"], 3)
    assert [(r.image, r.label) for r in source.read(range(6))] == [(jpeg(i), i // 2) for i in range(6)]
    assert source.read([2])[0].where == f"{folder}/train/a10/0.jpg"
    some = open_source("", folder, "train", keep={"b", "z"})
    assert [record.label for record in some.read(range(len(some)))] == [2, 2]
    with pytest.raises(UserError, match="holds no images of this set"):
        open_source("", folder, "train", keep={"z"})
    with pytest.raises(UserError, match="no such directory"):
        open_source("", f"{folder}/gone", "train")


def test_folders_by_a_class_map(folder, tmp_path):
    (tmp_path / "map.txt").write_text("b\na9\n")
    source = open_source("", folder, "train", class_map=str(tmp_path / "map.txt"))
    assert source.class_names == ["b", "a9"]
    assert [record.label for record in source.read(range(len(source)))] == [1, 1, 0, 0]
    with pytest.raises(UserError, match="Cannot locate specified class map"):
        open_source("", folder, "train", class_map="gone.txt")


def test_arrays_come_as_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "tiny.npz", x_train=pixels, y_train=[3, 1, 2, 0])
    source = open_source("npz/tiny", str(tmp_path), "train")
    first, second = source.read([2, 0])
    assert (first.label, second.label) == (2, 3)
    assert isinstance(first.image, Image.Image)
    assert (np.asarray(first.image) == pixels[2]).all()
    with pytest.raises(UserError, match="has 4 classes, the model 3; use --num-classes 4"):
        open_source("npz/tiny", str(tmp_path), "train", num_classes=3)


def test_a_part_of_an_array_split_holds_out_the_rest(tmp_path):
    pixels = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1).repeat(3, -1)
    np.savez(tmp_path / "tiny.npz", x_train=pixels, y_train=[3, 1, 2, 0])
    images, labels = read_npz("npz/tiny", str(tmp_path), "train[:3]")
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert labels.tolist() == [3, 1, 2]
    assert read_npz("npz/tiny", str(tmp_path), "train[3:]")[1].tolist() == [0]
    with pytest.raises(UserError, match="the part of train is empty, it has 4 images"):
        read_npz("npz/tiny", str(tmp_path), "train[4:]")
    with pytest.raises(UserError, match=r"unknown split 'train\[3\]'"):
        read_npz("npz/tiny", str(tmp_path), "train[3]")


def test_hub_data_sets_are_read_by_timms_reader(tmp_path, monkeypatch):
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
    stream = create_dataset(
        f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"), "train", is_training=True, batch_size=2
    )
    loader = create_loader(stream, (3, 8, 8), 2, True, num_workers=0, device="cpu", no_aug=True)
    assert sorted(label for _, target in loader for label in target.tolist()) == [0, 0, 0, 1, 1, 1]
