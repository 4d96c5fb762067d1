"""Image files: which are found, in directories and in tars, and what a directory without them has."""

import os

import pytest

from samon.data.images import find_images
from samon.data.source_factory import open_source
from samon.errors import UserError
from tests.sets import jpeg, tar_of, write_images, write_set


def test_hidden_names_are_left_out_with_a_count(tmp_path, caplog):
    shown = ["cat/1.jpg", "dog/1.jpg"]
    hidden = [".ipynb_checkpoints/1.jpg", "cat/._1.jpg", "cat/.ipynb_checkpoints/1.jpg", "__MACOSX/cat/1.jpg"]
    root = write_images(tmp_path / "set", *shown, *hidden)
    source = open_source("", root, "")
    assert (source.class_names, len(source)) == (["cat", "dog"], 2)
    assert "4 hidden files or folders are left out, such as " in caplog.text
    (tmp_path / "set.tar").write_bytes(tar_of([(f"./{name}", jpeg(0)) for name in (*shown, *hidden)]))
    assert [entry.folder for entry in find_images(tmp_path / "set.tar")] == ["cat", "dog"]
    torch = open_source("torch/image_folder", root, "")
    assert (torch.class_names, len(torch)) == (["cat", "dog"], 2)


def test_images_of_other_formats_are_counted_and_can_be_named(tmp_path, caplog):
    root = write_images(tmp_path, "a/1.jpg", "a/2.WEBP", "b/3.gif")
    assert open_source("", root, "").class_names == ["a"]
    assert "images with other endings are left out (1 .gif, 1 .webp)" in caplog.text
    for name in ("", "torch/folder"):
        source = open_source(name, root, "", input_key="jpg;.webp; .GIF")
        assert [s.label for s in source.read(range(len(source)))] == [0, 0, 1]
    with pytest.raises(UserError, match=r"no images found \(.png\); it has 1 .gif, 1 .jpg, 1 .webp"):
        find_images(root, ".png")


def test_an_image_that_would_count_twice_is_an_error(tmp_path):
    root = write_images(tmp_path / "set", "train/a/0.jpg")
    (tmp_path / "set/train/a.tar").write_bytes(tar_of([("0.jpg", jpeg(0))]))
    with pytest.raises(UserError, match=r"train/a/0.jpg occurs twice, as in a tar and beside it"):
        find_images(root, tars=True)
    (tmp_path / "set/train/up").symlink_to("..")
    with pytest.raises(UserError, match=r"train/up: links to a folder that contains it"):
        open_source("", root, "train")


def test_places_that_hold_something_else_are_named(tmp_path):
    with pytest.raises(UserError, match="it has tar files: shards are read with --dataset wds/NAME"):
        open_source("", write_set(tmp_path / "shards", [2]), "train")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="not an uncompressed tar archive"):
        find_images(tmp_path / "a.zip")
    with pytest.raises(UserError, match=r"a.zip: no such directory; extract it, or pack it with samon-shards"):
        open_source("", str(tmp_path / "a.zip"), "")


def test_a_class_folder_that_cannot_be_read_is_no_missing_class(tmp_path, monkeypatch):
    root = write_images(tmp_path, "a/1.jpg", "b/1.jpg")

    def scandir(path, scan=os.scandir):
        if path.endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="Permission denied"):
        open_source("", root, "")
