"""Damaged and hostile data: skipped and counted in training, named and final in evaluation, never executed."""

import errno
import gzip
import io
import json
import multiprocessing
import pickle
import re
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from samon.data import DataError, ImageError, ImageTooLargeError, LabelError, SampleError, ShardError, shards
from samon.data.corrupt import WorkerError, explain_worker_error
from samon.errors import UserError
from tests.sets import flat, jpeg, make_loader, same, tar_of, targets, write_set

SOME = {"max_corrupt_fraction": 0.5}


def png_bomb():
    """A PNG of 65 bytes that states 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def large_png(width, height):
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) run\n%%EOF\n"
BAD = [
    ("jpg", b"not an image", ImageError, "not an image: 12 bytes"),
    ("jpg", b"", ImageError, "not an image: 0 bytes"),
    ("jpg", jpeg(0)[:-200], ImageError, "cannot be decoded: OSError"),
    ("jpg", jpeg(0)[:100], ImageError, "s0004"),
    ("jpg", EPS, ImageError, "not an image"),
    ("jpg", png_bomb(), ImageTooLargeError, "exceeds limit|limit 89478485"),
    ("jpg", large_png(10_000, 9_000), ImageTooLargeError, "10000 x 9000 pixels, limit 89478485|exceeds limit"),
    ("jpg", None, ShardError, "no image"),
    ("cls", None, LabelError, "no label"),
    ("cls", b"three", LabelError, "is no integer"),
    ("cls", b"1e3", LabelError, "is no integer"),
    ("cls", b"", LabelError, "is no integer"),
    ("cls", b"9" * 5000, LabelError, "is no integer"),
    ("cls", b"-1", LabelError, r"label -1 is not in 0\.\.7"),
]


@pytest.mark.parametrize(("suffix", "content", "kind", "said"), BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_skipped_in_training_and_stop_evaluation(
    tmp_path, caplog, suffix, content, kind, said, workers
):
    root = write_set(tmp_path / "set", [8], {4: {suffix: content}})
    loader = make_loader(root, batch=2, workers=workers, dataset=SOME)
    seen = flat(loader)
    assert len(seen) == 8, "no rank may run short"
    assert set(seen) == set(range(8)) - {4}
    assert loader.corrupt_samples == 1
    if not workers:  # a worker's log goes to the terminal
        assert "bad sample skipped" in caplog.text
        assert kind.__name__ in caplog.text
        assert "train-0000.tar s0004" in caplog.text
    with pytest.raises(kind, match=said) as caught:
        flat(make_loader(root, training=False, batch=2, workers=workers))
    assert "train-0000.tar s0004" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_members_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_BYTES", 2000)
    root = write_set(tmp_path / "set", [4], {1: {"jpg": b"\0" * 2001}})
    with pytest.raises(ImageTooLargeError, match=r"s0001\.jpg: 2001 bytes, limit 2000"):
        flat(make_loader(root, training=False))


def _damage(root, cut=None, compress=False):
    """Cut the second shard's bytes; gzip all shards first if asked."""
    info = json.loads(Path(root, "_info.json").read_text())
    split = info["splits"]["train"]
    if compress:
        for name in split["filenames"]:
            Path(root, name + ".gz").write_bytes(gzip.compress(Path(root, name).read_bytes()))
        split["filenames"] = [name + ".gz" for name in split["filenames"]]
        Path(root, "_info.json").write_text(json.dumps(info))
    path = Path(root, split["filenames"][1])
    path.write_bytes(path.read_bytes()[:cut])
    return str(path)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("cut", [3000, 2048, 700, 0])  # inside a member, at a header, inside the first, empty
def test_truncated_shards(tmp_path, cut, compress):
    root = write_set(tmp_path / "set", [10, 10, 10])
    path = _damage(root, cut, compress)
    loader = make_loader(root, batch=2, workers=2, dataset=SOME)
    seen = flat(loader)
    assert len(seen) == 30
    assert set(range(10)) | set(range(20, 30)) <= set(seen)
    lost = set(range(10, 20)) - set(seen)
    assert lost, "the cut shard lost samples"
    assert loader.corrupt_samples == len(lost)
    with pytest.raises(SampleError, match=r"of 10 cannot be read|no label") as caught:
        flat(make_loader(root, training=False))
    assert path in str(caught.value)


def test_bytes_that_are_no_tar(tmp_path):
    root = write_set(tmp_path / "set", [4, 4])
    Path(root, "train-0001.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ShardError, match="ReadError"):
        flat(make_loader(root, training=False))


def test_too_many_bad_samples_stop_training(tmp_path):
    root = write_set(tmp_path / "set", [10, 10], {i: {"jpg": b"broken"} for i in (2, 5, 13)})
    one_fourth = flat(make_loader(root, workers=2, dataset={"max_corrupt_fraction": 0.15}))
    assert len(one_fourth) == 20
    with pytest.raises(DataError, match=r"3 bad samples in this epoch, more than 0.1 of the 20.*--max-bad-samples"):
        flat(make_loader(root, workers=2, dataset={"max_corrupt_fraction": 0.1}))
    with pytest.raises(DataError, match="1 bad samples in this epoch"):
        flat(make_loader(root))
    with pytest.raises(UserError, match="between 0 and 1"):
        make_loader(root, dataset={"max_corrupt_fraction": 2})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_outside_the_classes_is_no_bad_sample_but_a_wrong_setting(tmp_path, workers):
    root = write_set(tmp_path / "set", [4, 4])
    info = json.loads(Path(root, "_info.json").read_text())
    Path(root, "_info.json").write_text(json.dumps(info | {"num_classes": None}))
    loader = make_loader(root, workers=workers, dataset={"max_corrupt_fraction": 1, "num_classes": 7})
    with pytest.raises(
        DataError, match=r"s0007: label 7, but there are 7 classes.*--num-classes or give --class-map"
    ) as caught:
        flat(loader)
    assert not isinstance(caught.value, SampleError)
    assert loader.corrupt_samples == 0
    with pytest.raises(UserError, match="has 8 classes, the model 7; use --num-classes 8"):
        make_loader(write_set(tmp_path / "told", [8]), dataset={"num_classes": 7})


def test_the_limit_holds_for_each_epoch_and_the_total_goes_on(tmp_path):
    root = write_set(tmp_path / "set", [10, 10], {2: {"jpg": b"broken"}})
    loader = make_loader(root, workers=2, dataset={"max_corrupt_fraction": 0.05})
    for epoch in range(3):
        loader.set_epoch(epoch)
        flat(loader)
        assert loader.corrupt_samples == epoch + 1


def test_bad_samples_do_not_disturb_resuming(tmp_path):
    root = write_set(tmp_path / "set", [6, 9, 7], {i: {"jpg": b"broken"} for i in (0, 1, 2, 9, 10, 21)})
    options = {"workers": 2, "interpolation": "random", "dataset": SOME | {"shuffle_buffer": 4}}
    whole = make_loader(root, **options)
    whole.set_epoch(1)
    expected = list(whole)
    for step in range(len(expected)):
        whole.set_epoch(1, step * 2)
        assert same(list(whole), expected[step:])


def test_all_samples_bad(tmp_path):
    root = write_set(tmp_path / "set", [20], {i: {"jpg": b"broken"} for i in range(20)})
    with pytest.raises(DataError, match="9 samples in a row are bad"):
        flat(make_loader(root, dataset={"max_corrupt_fraction": 1}))


def test_nothing_in_a_shard_is_executed(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    attack = pickle.dumps(Attack())
    extra = dict.fromkeys(["pyd", "pickle", "pkl", "pth", "npy"], attack)
    root = write_set(tmp_path / "set", [4], {0: extra, 1: {"cls": attack}, 2: {"jpg": attack}})
    assert set(flat(make_loader(root, dataset=SOME))) == {0, 3}
    assert not (tmp_path / "executed").exists()


def test_member_names_are_never_paths(tmp_path):
    members = [
        ("../../escape.jpg", jpeg(0)),
        ("../../escape.cls", b"0"),
        ("__meta__", b"x"),
        ("noext", b"x"),
        ("/abs\x1b[31m\n.jpg", b"?"),
        ("/abs\x1b[31m\n.cls", b"1"),
    ]
    root = write_set(tmp_path / "set", [2])
    path = Path(root, "train-0000.tar")
    path.write_bytes(tar_of(members))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("/abs\x1b[31m\n.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ImageError, match=r"not an image") as caught:
        flat(make_loader(root, training=False))
    assert r"/abs\x1b[31m\n" in str(caught.value), "control characters must not reach a terminal"
    assert not (tmp_path.parent / "escape.jpg").exists()


def test_a_longer_shard_than_stated_is_an_error(tmp_path):
    root = write_set(tmp_path / "set", [4, 4])
    info = json.loads(Path(root, "_info.json").read_text())
    info["splits"]["train"] |= {"shard_lengths": [4, 3], "num_samples": 7}
    Path(root, "_info.json").write_text(json.dumps(info))
    for training in (True, False):
        with pytest.raises(DataError, match=r"train-0001\.tar: holds more than the 3 samples"):
            flat(make_loader(root, training=training, batch=1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_samples": 9}, "contradicts itself"),
        ({"shard_lengths": [4]}, "contradicts itself"),
        ({"filenames": []}, "no list of filenames"),
        ({"filenames": "x.tar"}, "no list of filenames"),
        ({"shard_lengths": ["4", "4"]}, "no list of shard_lengths"),
        ({"shard_lengths": [-4, 12]}, "shard_lengths"),
        ({"filenames": ["train-0000.tar", "gone.tar"]}, "gone.tar: no such shard"),
        ({"filenames": ["train-0000.tar", "pipe:touch executed"]}, "runs a shell command"),
    ],
)
def test_info_files_that_lie(tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    root = write_set(tmp_path / "set", [4, 4])
    info = json.loads(Path(root, "_info.json").read_text())
    info["splits"]["train"] |= change
    Path(root, "_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=said):
        make_loader(root)
    assert not (tmp_path / "executed").exists()


def test_labels_from_json_and_class_maps(tmp_path):
    meta = {i: {"cls": None, "json": json.dumps({"label": {"fine": i}, "name": "x"}).encode()} for i in range(6)}
    meta[5] = {"cls": None, "json": b"[" * 100_000}
    root = write_set(tmp_path / "set", [6], meta)
    loader = make_loader(root, batch=1, dataset=SOME | {"target_key": "label/fine"})
    assert set(flat(loader)) == set(range(5))
    assert loader.corrupt_samples == 1
    mapped = {i: (i + 1) % 6 for i in range(5)}
    plain = write_set(tmp_path / "plain", [6])
    with pytest.raises(LabelError, match="label 5 is not in the class map"):
        flat(make_loader(plain, training=False, dataset={"class_map": mapped}))
    with pytest.raises(UserError, match="several fields"):
        make_loader(root, dataset={"target_key": "a,b"})


def test_unknown_splits_name_the_nearest(tmp_path):
    root = write_set(tmp_path / "set", [6])
    with pytest.raises(UserError, match="no split 'trian'; did you mean 'train'"):
        shards.load_split(root, "trian")
    with pytest.raises(UserError, match="not found or without splits"):
        shards.load_split(str(tmp_path), "train")
    assert shards.load_split(root, "training").lengths == (6,)


def test_shards_can_be_named_without_an_index(tmp_path):
    root = write_set(tmp_path / "set", [6, 3])
    expected = shards.load_split(root, "train")
    assert shards.load_split(root, "train-{0000..0001}.tar|9").lengths == expected.lengths
    Path(root, "_info.json").unlink()
    counted = shards.load_split(root, "train-{0000..0001}.tar")
    assert (counted.urls, counted.lengths) == (expected.urls, expected.lengths)
    with pytest.raises(UserError, match="says 10 samples, its shards hold 9"):
        shards.load_split(root, "train-{0000..0001}.tar|10")


def test_damaged_files_in_folders(tmp_path):
    for i in range(8):
        path = tmp_path / f"train/c{i}/image.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg(i) if i != 3 else b"broken")
    root = str(tmp_path)
    loader = make_loader(root, name="", dataset=SOME)
    assert set(flat(loader)) == set(range(8)) - {3}
    assert loader.corrupt_samples == 1
    with pytest.raises(ImageError, match=r"c3/image\.jpg: not an image"):
        flat(make_loader(root, name="", training=False))


@pytest.mark.parametrize(
    ("names", "lost"),
    [
        (["cat.v2.jpg", "cat.v2.cls"], "cat.v2.jpg"),
        (["0.jpg", "0.cls", "img.v2.JPG", "img.v2.cls"], "img.v2.JPG"),
        (["cat.jpg", "cat.cls", "cat.2.jpg", "cat.2.cls"], "cat.2.cls"),
    ],
)
def test_a_sample_with_a_dot_in_its_name_is_named(tmp_path, names, lost):
    content = {"jpg": jpeg(0), "cls": b"0"}
    (tmp_path / "a.tar").write_bytes(tar_of([(f"x/{name}", content[name[-3:].lower()]) for name in names]))
    with pytest.raises(DataError, match=rf"a.tar x/{lost}: a sample's name ends at its first dot"):
        shards.load_split(str(tmp_path), "a.tar")


def test_other_members_of_a_sample_are_no_samples(tmp_path):
    names = ["0.depth.png", "0.jpg", "0.cls", "0.seg.png", "._0.jpg", "x/._1.jpg", "1.jpg", "1.cls"]
    content = {"png": jpeg(9), "jpg": jpeg(0), "cls": b"1"}
    (tmp_path / "a.tar").write_bytes(tar_of([(name, content[name[-3:]]) for name in names]))
    assert shards.load_split(str(tmp_path), "a.tar").lengths == (2,)


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1)])
@pytest.mark.parametrize("decoder", ["auto", "torch", "pil"])
def test_images_one_pixel_wide_or_high_train(tmp_path, size, decoder):
    (tmp_path / "train/a").mkdir(parents=True)
    Image.new("RGB", size, (200,) * 3).save(tmp_path / "train/a/0.png")
    Image.new("RGB", size, (200,) * 3).save(tmp_path / "train/a/1.jpg")
    loader = make_loader(
        str(tmp_path),
        name="",
        batch=2,
        decoder=decoder,
        dataset={"max_corrupt_fraction": 0},
        mean=(0,) * 3,
        std=(1,) * 3,
    )
    for epoch in range(40):
        loader.set_epoch(epoch)
        ((images, target),) = loader
        assert target.tolist() == [0, 0]
        assert torch.equal(images.amin((2, 3)), images.amax((2, 3)))  # nothing from outside the image


def test_an_exception_of_an_augmentation_names_the_file(tmp_path):
    def broken(image):
        raise IndexError("list index\nout of range")

    root = write_set(tmp_path / "set", [4])
    for training, said in ((True, "bad samples in this epoch"), (False, r"s0000: IndexError: list index out of range")):
        loader = make_loader(root, training=training)
        loader.dataset.transform = broken
        with pytest.raises(DataError, match=said) as caught:
            flat(loader)
        assert "train-0000.tar s0" in str(caught.value)


# --- workers ----------------------------------------------------------------------------------------------------------


def shared_memory_is_full(self: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_too_little_shared_memory_ends_a_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker's own thread; PyTorch's other thread would lose the error, and the main process wait for ever."""
    loader = make_loader(write_set(tmp_path), workers=1)
    monkeypatch.setattr(torch.Tensor, "share_memory_", shared_memory_is_full)
    with pytest.raises(WorkerError, match=r"^/dev/shm, \d+ MiB, is full: .*--shm-size 8g\), or use --workers 0$"):
        next(iter(loader))


@pytest.mark.parametrize("training", [True, False])
def test_killed_workers_are_started_again_at_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """The loader says so, and a second time it ends."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    root, seen = write_set(tmp_path), list[list[int]]()
    whole = targets(make_loader(root, training=training, workers=2))
    loader = make_loader(root, training=training, workers=2)
    for _, target in loader:
        seen.append(target.tolist())
        if len(seen) == 3:
            kill_workers()
    assert seen == whole
    assert "killed" in str(loader.worker_error)
    with pytest.raises(WorkerError, match="killed"):
        [kill_workers() for _ in loader]


def kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), WorkerError, "a loader worker was"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), WorkerError, "fewer --workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It"), WorkerError, "/dev/shm"),
        (OSError(errno.ENOSPC, "No space left on device"), WorkerError, "/dev/shm"),
        (RuntimeError("CUDA error"), RuntimeError, "^CUDA error$"),
        (LabelError("Caught\nTraceback\nsamon.data.faults.LabelError: x: y"), LabelError, "^x: y$"),
    ],
)
def test_what_ends_a_loader_is_one_line(error: Exception, kind: type[Exception], line: str) -> None:
    found = explain_worker_error(error)
    assert type(found) is kind
    assert re.search(line, str(found))
