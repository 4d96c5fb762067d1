"""Labels and classes: one order on every process, one check, one way to follow other names."""

import pickle
from itertools import product

import numpy as np
import pytest

from samon.data import DataError, SampleError
from samon.data.classes import check_label, class_order, load_class_map
from samon.data.source_factory import open_source
from samon.errors import UserError
from tests.sets import write_images, write_set


def test_names_that_tie_in_natural_order_have_one_order(tmp_path):
    """Sixteen folders, so that an order by hashes, another one in each process, would not come out by chance."""
    expected = ["001", "01", "1", "A9", "a9", "a10", "B", "b"]
    for names in (expected[::-1], ["1", "01", "001", "B", "a9", "A9", "b", "a10"]):
        assert sorted(names, key=class_order) == expected
    names = sorted("".join(letters) for letters in product("aA", "bB", "cC", "1", ["2", "02"]))
    write_images(tmp_path, *(f"{name}/{file}.jpg" for name in names for file in ("1", "01")))
    source = open_source("", str(tmp_path), "")
    assert source.class_names == sorted(names, key=lambda name: (int(name[3:]), name))
    assert [entry.path.rpartition("/")[2] for entry in source.entries[:4]] == ["01.jpg", "1.jpg", "01.jpg", "1.jpg"]


def test_labels_are_integers_below_the_number_of_classes():
    assert check_label(np.int64(2), 3, "x") == 2
    assert check_label(7, None, "x") == 7
    for label, message in ((-1, r"here: label -1 is not in 0\.\.2"), (1.5, "1.5 is not"), (None, "None is not")):
        with pytest.raises(SampleError, match=message):
            check_label(label, 3, "here")
    with pytest.raises(DataError, match=r"here: label 3, but there are 3 classes \(0\.\.2\)"):
        check_label(3, 3, "here")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("map.txt", "a\nb\na\n", "listed twice"),
        ("map.csv", "a,b\n", "Unsupported class map file extension"),
        ("map.pkl", "no pickle", "--class-map .*map.pkl"),
        ("map.txt", "", "is empty"),
        ("map.pkl", pickle.dumps({"a": 1.5}), r"1\.5 of 'a' is not a label"),
    ],
)
def test_files_that_are_not_class_maps(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_class_map(name, str(tmp_path))


@pytest.mark.parametrize("class_map", [{"10": 0}, {2: 0, 10: 1}])
def test_classes_that_a_map_leaves_out_are_mentioned(tmp_path, caplog, class_map):
    """The integers are labels, not names of folders."""
    source = open_source("", write_images(tmp_path, "1/0.jpg", "2/0.jpg", "10/0.jpg"), "", class_map=class_map)
    assert [sample.label for sample in source.read(range(len(source)))] == [0]
    assert "2 classes are not in --class-map and are left out, such as '1'" in caplog.text


def test_an_empty_last_line_of_a_class_map_is_no_class(tmp_path):
    (tmp_path / "map.txt").write_text("\ufeffa\nb\n\n", "utf-8")  # with the mark of Windows editors
    assert load_class_map("map.txt", str(tmp_path)) == {"a": 0, "b": 1}


def test_a_permuted_set_of_shards_follows_the_trained_classes(tmp_path):
    source = open_source("wds/x", write_set(tmp_path / "set", [3]), "train")
    source.class_names = ["c", "a", "b"]
    with pytest.raises(UserError, match="class 'c' and 1 more is not among the 2 trained; did you mean 'cc'"):
        source.renumber(["cc", "a"])
    source.renumber(["a", "b", "c"])
    assert [sample.label for sample in source.read(range(3))] == [2, 0, 1]
    assert source.class_names == ["a", "b", "c"]
    source.renumber(["z", "c", "b", "a"])  # once more, as after a class map
    assert [sample.label for _, sample in source.read_shard(0, range(3))] == [1, 3, 2]
