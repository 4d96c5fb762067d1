"""Shards: what may be opened, repeated attempts, a cache that stays in bounds, `_info.json`, keys of samples."""

import json
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from samon.cli.validate import main
from samon.data import DataError, SampleError, shards, urls
from samon.data.source_factory import open_source
from samon.errors import UserError
from tests.sets import RANDOM_MODEL, change_info, flat, jpeg, make_loader, tar_of, write_set


class Server(ThreadingHTTPServer):
    """Serves a directory; ``faults[path]`` requests for a path break off in the middle first."""

    def __init__(self, root):
        self.root, self.faults, self.requests = Path(root), {}, []
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=root))
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        super().do_GET()

    def copyfile(self, source, outputfile):
        data, faults = source.read(), self.server.faults
        if faults.get(self.path, 0) > 0:
            faults[self.path] -= 1
            data = data[: len(data) // 2]
        outputfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    write_set(tmp_path / "set", [6, 6, 6])
    server = Server(tmp_path / "set")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    waits = server.waits = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda t: waits.append(t) if t >= 1 else sleep(t))  # subprocess sleeps too
    yield server
    server.shutdown()
    server.server_close()


def test_broken_transfers_are_tried_again_with_longer_waits(server):
    server.faults = {"/train-0001.tar": 3, "/_info.json": 2}
    assert sorted(flat(make_loader(server.url, training=False))) == list(range(18))
    assert server.waits == [1, 2, 1, 2, 4]
    server.faults = {"/train-0001.tar": 99}
    with pytest.raises(SampleError, match=r"train-0001\.tar"):
        flat(make_loader(server.url, training=False))


def test_shards_that_are_not_there(server):
    (server.root / "train-0002.tar").unlink()
    with pytest.raises(SampleError, match=r"train-0002\.tar"):
        flat(make_loader(server.url, training=False))
    with pytest.raises(UserError, match=r"_info\.json"):
        make_loader(server.url + "/nowhere")


def test_cache_keeps_copies_and_stays_in_bounds(server, tmp_path):
    cache, other = tmp_path / "cache/samon-shards", tmp_path / "cache/other/file"
    options = {"shard_cache": str(tmp_path / "cache")}
    other.parent.mkdir(parents=True)
    other.write_bytes(b"x" * 1_000_000)
    for _ in range(2):
        assert sorted(flat(make_loader(server.url, training=False, dataset=options))) == list(range(18))
    assert server.requests.count("/train-0001.tar") == 1
    assert len(list(cache.iterdir())) == 3
    size = (server.root / "train-0000.tar").stat().st_size
    small = options | {"shard_cache_size": 2 * size}
    for path in cache.iterdir():
        path.unlink()
    assert sorted(flat(make_loader(server.url, training=False, dataset=small))) == list(range(18))
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 2 * size
    assert {path.name.split("-", 1)[1] for path in cache.iterdir()} == {"train-0001.tar", "train-0002.tar"}
    assert other.exists(), "files of others are left alone, and do not count"
    with pytest.raises(DataError, match="do not fit the shard cache"):
        flat(make_loader(server.url, training=False, dataset=options | {"shard_cache_size": 10}))


def test_broken_transfers_and_damaged_copies_are_fetched_again(server, tmp_path):
    cache, options = tmp_path / "cache/samon-shards", {"shard_cache": str(tmp_path / "cache")}
    server.faults = {"/train-0001.tar": 1}
    assert sorted(flat(make_loader(server.url, training=False, dataset=options))) == list(range(18))
    copy = next(path for path in cache.iterdir() if "0001" in path.name)
    copy.write_bytes(copy.read_bytes()[:3000])
    assert sorted(flat(make_loader(server.url, training=False, dataset=options))) == list(range(18))
    assert not [path for path in cache.iterdir() if path.suffix == ".part"]
    write_set(server.root, [6, 6, 6], {0: {"cls": b"17"}})  # packed again
    change_info(server.root, {"sha256": ["new", "", ""]})
    assert sorted(flat(make_loader(server.url, training=False, dataset=options))) == [*range(1, 18), 17]


@pytest.mark.parametrize("root", ["pipe:touch executed; cat x", "PIPE:touch executed"])
def test_shell_commands_need_permission(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--allow-shell-urls"):
        make_loader(root)
    with pytest.raises(UserError, match="--allow-shell-urls"):
        urls.join_url(str(tmp_path), root)
    monkeypatch.setenv("GOPEN_REWRITE", "http://data/=pipe:touch executed ")
    with pytest.raises(UserError, match="--allow-shell-urls"):
        urls.resolve_url("http://data/train.tar")
    for path in (f" {root}", f"\t{root}", "-", f"x {root}"):  # these only look like a command
        with pytest.raises(FileNotFoundError):
            urls.open_url(urls.resolve_url(path))
    assert not (tmp_path / "executed").exists()


def test_unknown_schemes_name_the_known_ones():
    with pytest.raises(UserError, match=r"s3:// URLs cannot be opened.*gs.*hf.*https"):
        urls.resolve_url("s3://bucket/train.tar")
    assert urls.resolve_url("gs://bucket/train.tar") == "gs://bucket/train.tar"
    assert urls.resolve_url("file:/data/x.tar") == urls.resolve_url("file:///data/x.tar") == "/data/x.tar"


def validate(*words):
    words += ("--num-classes", "18", "--batch-size", "4", "--split", "train", "--workers", "2")
    return main([*RANDOM_MODEL, *words])


def test_evaluation_fetches_each_shard_once(server):
    """Workers take turns at batches, and every one of them needs each shard."""
    rows = validate("--dataset", "wds/x", "--data-dir", server.url)
    assert rows[0]["num_samples"] == 18
    shards = [path for path in server.requests if path.endswith(".tar")]
    assert sorted(shards) == [f"/train-{i:04d}.tar" for i in range(3)]


def test_evaluation_reads_pipes_and_keeps_copies_where_asked(tmp_path, server):
    root, log = tmp_path / "set", tmp_path / "log"
    names = [f"train-{i:04d}.tar" for i in range(3)]
    change_info(root, {"filenames": [f"pipe:echo {name} >> {log}; cat {root}/{name}" for name in names]})
    set_of = ["--dataset", "wds/x", "--data-dir", str(root)]
    with pytest.raises(UserError, match="add --allow-shell-urls"):
        validate(*set_of)
    for _ in range(2):
        rows = validate(*set_of, "--allow-shell-urls", "--shard-cache", str(tmp_path / "copies"))
        assert rows[0]["num_samples"] == 18
    assert sorted(log.read_text().split()) == names
    assert len(list((tmp_path / "copies/samon-shards").iterdir())) == 3, "no lock or part stays behind"


# --- _info.json and samples -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": {"num_samples": 9}}, "contradicts itself"),
        ({"split": {"shard_lengths": [4]}}, "contradicts itself"),
        ({"split": {"filenames": []}}, "no list of filenames"),
        ({"split": {"filenames": "x.tar"}}, "no list of filenames"),
        ({"split": {"shard_lengths": ["4", "4"]}}, "no list of shard_lengths"),
        ({"split": {"shard_lengths": [-4, 12]}}, "shard_lengths"),
        ({"split": {"filenames": ["train-0000.tar", "gone.tar"]}}, "gone.tar: no such shard"),
        ({"split": {"filenames": ["train-0001.tar"] * 2}}, "lists .*train-0001.tar twice"),
        ({"split": {"filenames": ["train-0000.tar", "pipe:touch executed"]}}, "runs a shell command"),
        ({"class_names": [*"abcdefga"]}, "two classes are called 'a'"),
        ({"class_names": [*"abc"]}, "8 classes, but 3 class_names"),
    ],
)
def test_wrong_info_files(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    root = write_set(tmp_path / "set", [4, 4])
    change_info(root, **change)
    with pytest.raises(UserError, match=message):
        make_loader(root)
    assert not (tmp_path / "executed").exists()


def test_a_shard_longer_than_stated_is_an_error(tmp_path):
    root = write_set(tmp_path / "set", [4, 4])
    change_info(root, {"shard_lengths": [4, 3], "num_samples": 7})
    for training in (True, False):
        with pytest.raises(DataError, match=r"train-0001\.tar: holds more than the 3 samples"):
            flat(make_loader(root, training=training, batch=1))


def test_unknown_splits_name_the_nearest(tmp_path):
    root = write_set(tmp_path / "set", [6])
    with pytest.raises(UserError, match="no split 'trian'; did you mean 'train'"):
        shards.load_split(root, "trian")
    with pytest.raises(UserError, match="no split 'train'; write it with samon-shards"):
        shards.load_split(str(tmp_path), "train")
    assert shards.load_split(root, "training").lengths == (6,)


def test_shards_can_be_named_without_an_index(tmp_path):
    root = write_set(tmp_path / "set", [6, 3])
    expected = shards.load_split(root, "train")
    assert shards.load_split(root, "train-{0000..0001}.tar|9").lengths == expected.lengths
    split = json.loads(Path(root, "_info.json").read_text())["splits"]["train"]
    change_info(root, {"sha256": ["a", "b"], "alt_label": "fine"})
    for pattern in ("train-{0000..0001}.tar", f"{root}/train-{{0000..0001}}.tar"):
        described = shards.load_split(root, pattern)
        assert (described.label_key, [*described.digests.values()]) == ("fine", ["a", "b"])
    change_info(root, splits={"train": split, "coarse": split | {"alt_label": "coarse"}})
    with pytest.raises(UserError, match="different kinds of labels; name one by --target-key"):
        shards.load_split(root, "train-{0000..0001}.tar")
    assert open_source("wds/x", root, "train-{0000..0001}.tar", target_key="coarse").reader.label_key == "coarse"
    Path(root, "_info.json").unlink()
    counted = shards.load_split(root, "train-{0000..0001}.tar")
    assert (counted.urls, counted.lengths) == (expected.urls, expected.lengths)
    with pytest.raises(UserError, match="says 10 samples, its shards hold 9"):
        shards.load_split(root, "train-{0000..0001}.tar|10")


@pytest.mark.parametrize(
    ("names", "lost"),
    [
        (["cat.v2.jpg", "cat.v2.cls"], "cat.v2.jpg"),
        (["0.jpg", "0.cls", "img.v2.JPG", "img.v2.cls"], "img.v2.JPG"),
        (["cat.jpg", "cat.cls", "cat.2.jpg", "cat.2.cls"], "cat.2.cls"),
    ],
)
def test_a_sample_with_a_dot_in_its_name_is_an_error(tmp_path, names, lost):
    content = {"jpg": jpeg(0), "cls": b"0"}
    (tmp_path / "a.tar").write_bytes(tar_of([(f"x/{name}", content[name[-3:].lower()]) for name in names]))
    with pytest.raises(DataError, match=rf"a.tar x/{lost}: a sample's name ends at its first dot"):
        shards.load_split(str(tmp_path), "a.tar")


def test_other_members_of_a_sample_are_not_samples(tmp_path):
    names = ["0.depth.png", "0.jpg", "0.cls", "0.seg.png", "._0.jpg", "x/._1.jpg", "1.jpg", "1.cls"]
    content = {"png": jpeg(9), "jpg": jpeg(0), "cls": b"1"}
    (tmp_path / "a.tar").write_bytes(tar_of([(name, content[name[-3:]]) for name in names]))
    assert shards.load_split(str(tmp_path), "a.tar").lengths == (2,)
    assert open_source("wds/x", str(tmp_path), "a.tar", input_key="seg.png").read([0])[0].image == jpeg(9)
    (tmp_path / "b.tar").write_bytes(tar_of([("0.left.png", jpeg(2)), ("0.json", b'{"y": 1}'), ("1.txt", b"")]))
    source = open_source("wds/x", str(tmp_path), "b.tar", input_key="left.png", target_key="y")
    assert [sample.label for sample in source.read([*range(len(source))])] == [1]
