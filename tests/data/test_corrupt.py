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

from samon.data import DataError, SampleError, shards
from samon.data.corrupt import WorkerError, explain_worker_error
from samon.errors import UserError
from tests.sets import change_info, flat, jpeg, make_loader, same, tar_of, targets, write_images, write_set

HALF = {"max_corrupt_fraction": 0.5}


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
CORRUPT = [
    ("jpg", b"not an image", "not an image: 12 bytes"),
    ("jpg", b"", "not an image: 0 bytes"),
    ("jpg", jpeg(0)[:-200], "cannot be decoded: OSError"),
    ("jpg", jpeg(0)[:100], "s0004"),
    ("jpg", EPS, "not an image"),
    ("jpg", png_bomb(), "exceeds limit|limit 89478485"),
    ("jpg", large_png(10_000, 9_000), "10000 x 9000 pixels, limit 89478485|exceeds limit"),
    ("jpg", None, "no image"),
    ("cls", None, "no label"),
    *(("cls", text, "is not an integer") for text in (b"three", b"1e3", b"", b"9" * 5000)),
    ("cls", b"-1", r"label -1 is not in 0\.\.7"),
]


@pytest.mark.parametrize("number", range(len(CORRUPT)))
def test_corrupt_samples_are_skipped_in_training_and_stop_evaluation(tmp_path, caplog, number):
    suffix, content, message = CORRUPT[number]
    workers = int(number == 2)  # once in a worker, whose log goes to the terminal
    root = write_set(tmp_path / "set", [8], {4: {suffix: content}})
    loader = make_loader(root, workers=workers, dataset=HALF)
    seen = flat(loader)
    assert len(seen) == 8, "no rank may run short"
    assert set(seen) == set(range(8)) - {4}
    assert loader.corrupt_samples == 1
    if not workers:
        assert "corrupt sample skipped: " in caplog.text
        assert "train-0000.tar s0004" in caplog.text
    with pytest.raises(SampleError, match=message) as caught:
        flat(make_loader(root, training=False, workers=workers))
    assert "train-0000.tar s0004" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_members_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_BYTES", 2000)
    root = write_set(tmp_path / "set", [4], {1: {"jpg": b"\0" * 2001}})
    with pytest.raises(SampleError, match=r"s0001\.jpg: 2001 bytes, limit 2000"):
        flat(make_loader(root, training=False))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("length", [3000, 2048, 700, 0])  # inside a member, at a header, inside the first, empty
def test_truncated_shards(tmp_path, length, compress):
    root = write_set(tmp_path / "set", [10, 10, 10])
    names = [f"train-{i:04d}.tar" for i in range(3)]
    if compress:
        for name in names:
            Path(root, f"{name}.gz").write_bytes(gzip.compress(Path(root, name).read_bytes()))
        names = [f"{name}.gz" for name in names]
        change_info(root, {"filenames": names})
    path = Path(root, names[1])
    path.write_bytes(path.read_bytes()[:length])
    loader = make_loader(root, dataset=HALF)
    seen = flat(loader)
    assert len(seen) == 30
    assert set(range(10)) | set(range(20, 30)) <= set(seen)
    lost = set(range(10, 20)) - set(seen)
    assert lost, "the shard lost samples"
    assert loader.corrupt_samples == len(lost)
    with pytest.raises(SampleError, match=r"of 10 cannot be read|no label") as caught:
        flat(make_loader(root, training=False))
    assert str(path) in str(caught.value)
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(SampleError, match="ReadError") as caught:
        flat(make_loader(root, training=False))
    assert "\n" not in str(caught.value)


def test_too_many_corrupt_samples_stop_training(tmp_path):
    root = write_set(tmp_path / "set", [10, 10], {i: {"jpg": b"broken"} for i in (2, 5, 13)})
    assert len(flat(make_loader(root, workers=2, dataset={"max_corrupt_fraction": 0.15}))) == 20
    with pytest.raises(DataError, match=r"3 corrupt samples in .*, more than 0.1 of the 20.*--max-corrupt-samples"):
        flat(make_loader(root, workers=2, dataset={"max_corrupt_fraction": 0.1}))
    with pytest.raises(DataError, match="1 corrupt samples in this epoch"):
        flat(make_loader(root))
    with pytest.raises(UserError, match="between 0 and 1"):
        make_loader(root, dataset={"max_corrupt_fraction": 2})
    root = write_set(tmp_path / "all", [20], {i: {"jpg": b"broken"} for i in range(20)})
    with pytest.raises(DataError, match="9 samples in a row are corrupt"):
        flat(make_loader(root, dataset={"max_corrupt_fraction": 1}))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_beyond_the_classes_is_a_wrong_setting(tmp_path, workers):
    root = write_set(tmp_path / "set", [4, 4])
    change_info(root, num_classes=None)
    loader = make_loader(root, workers=workers, dataset={"max_corrupt_fraction": 1, "num_classes": 7})
    with pytest.raises(DataError, match=r"s0007: label 7, but there are 7 classes.*--num-classes") as caught:
        flat(loader)
    assert not isinstance(caught.value, SampleError)
    assert loader.corrupt_samples == 0


def test_the_limit_is_per_epoch_and_the_total_per_run(tmp_path):
    root = write_set(tmp_path / "set", [10, 10], {2: {"jpg": b"broken"}})
    loader = make_loader(root, workers=2, dataset={"max_corrupt_fraction": 0.05})
    for epoch in range(3):
        loader.set_epoch(epoch)
        flat(loader)
        assert loader.corrupt_samples == epoch + 1


def test_corrupt_samples_do_not_disturb_resuming(tmp_path):
    root = write_set(tmp_path / "set", [6, 9, 7], {i: {"jpg": b"broken"} for i in (0, 1, 2, 9, 10, 21)})
    loader = make_loader(root, workers=2, interpolation="random", dataset=HALF | {"shuffle_buffer": 4})
    loader.set_epoch(1)
    expected = list(loader)
    for step in (1, 4, 9):
        loader.set_epoch(1, step * 2)
        assert same(list(loader), expected[step:])


def test_nothing_in_a_shard_is_executed(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    attack = pickle.dumps(Attack())
    extra = dict.fromkeys(["pyd", "pickle", "pkl", "pth", "npy"], attack)
    root = write_set(tmp_path / "set", [4], {0: extra, 1: {"cls": attack}, 2: {"jpg": attack}})
    assert set(flat(make_loader(root, dataset=HALF))) == {0, 3}
    assert not (tmp_path / "executed").exists()


def test_member_names_are_never_paths(tmp_path):
    members = [("../../escape.jpg", jpeg(0)), ("../../escape.cls", b"0"), ("__meta__", b"x"), ("noext", b"x")]
    members += [("/abs\x1b[31m\n.jpg", b"?"), ("/abs\x1b[31m\n.cls", b"1")]
    root = write_set(tmp_path / "set", [2])
    path = Path(root, "train-0000.tar")
    path.write_bytes(tar_of(members))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("/abs\x1b[31m\n.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(SampleError, match=r"not an image") as caught:
        flat(make_loader(root, training=False))
    assert r"/abs\x1b[31m\n" in str(caught.value), "control characters must not reach a terminal"
    assert not (tmp_path.parent / "escape.jpg").exists()


def test_damaged_files_in_folders(tmp_path):
    root = write_images(tmp_path, *(f"train/c{i}/image.jpg" for i in range(8)))
    (tmp_path / "train/c3/image.jpg").write_bytes(b"broken")
    loader = make_loader(root, name="", dataset=HALF)
    assert set(flat(loader)) == set(range(8)) - {3}
    assert loader.corrupt_samples == 1
    with pytest.raises(SampleError, match=r"c3/image\.jpg: not an image"):
        flat(make_loader(root, name="", training=False))


def test_an_exception_of_an_augmentation_names_the_file(tmp_path):
    def broken(image):
        raise IndexError("list index\nout of range")

    root = write_set(tmp_path / "set", [4])
    for training, message in ((True, "corrupt samples in this epoch"), (False, "s0000: IndexError: list index out of")):
        loader = make_loader(root, training=training)
        loader.dataset.transform = broken
        with pytest.raises(DataError, match=message) as caught:
            flat(loader)
        assert "train-0000.tar s0" in str(caught.value)


def test_labels_in_json(tmp_path):
    meta = {i: {"cls": None, "json": json.dumps({"label": {"fine": i}, "name": "x"}).encode()} for i in range(6)}
    meta[5] = {"cls": None, "json": b"[" * 100_000}
    root = write_set(tmp_path / "set", [6], meta)
    loader = make_loader(root, batch=1, dataset=HALF | {"target_key": "label/fine"})
    assert set(flat(loader)) == set(range(5))
    assert loader.corrupt_samples == 1
    with pytest.raises(UserError, match="several fields"):
        make_loader(root, dataset={"target_key": "a,b"})


def test_a_class_map_without_a_label(tmp_path):
    root = write_set(tmp_path / "set", [6])
    with pytest.raises(SampleError, match="label 5 is not in the class map"):
        flat(make_loader(root, training=False, dataset={"class_map": {i: (i + 1) % 6 for i in range(5)}}))


# --- workers ----------------------------------------------------------------------------------------------------------
def test_too_little_shared_memory_ends_a_loader(tmp_path, monkeypatch):
    """In a worker's own thread; PyTorch's other thread would lose the error, and the main process wait forever."""

    def raise_full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    loader = make_loader(write_set(tmp_path), workers=1)
    monkeypatch.setattr(torch.Tensor, "share_memory_", raise_full)
    with pytest.raises(WorkerError, match=r"^/dev/shm, \d+ MiB, is full: .*--shm-size 8g\), or use --workers 0$"):
        next(iter(loader))


@pytest.mark.parametrize("training", [True, False])
def test_killed_workers_are_started_again_at_the_next_batch(tmp_path, monkeypatch, training):
    """The loader records it, and a second time it ends."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    root, seen = write_set(tmp_path), []
    expected = targets(make_loader(root, training=training, workers=2))
    loader = make_loader(root, training=training, workers=2)
    for _, target in loader:
        seen.append(target.tolist())
        if len(seen) == 3:
            kill_workers()
    assert seen == expected
    assert "killed" in str(loader.worker_error)
    with pytest.raises(WorkerError, match="killed"):
        [kill_workers() for _ in loader]


def kill_workers():
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
        (SampleError("Caught\nTraceback\nsamon.data.corrupt.SampleError: x: y"), SampleError, "^x: y$"),
    ],
)
def test_what_ends_a_loader_is_one_line(error, kind, line):
    explained = explain_worker_error(error)
    assert type(explained) is kind
    assert re.search(line, str(explained))
