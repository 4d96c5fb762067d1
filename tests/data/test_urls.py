"""Remote shards: what may be opened, trying again, and a cache that stays in bounds."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from samon.data import ShardError
from samon.data import shards as urls
from samon.errors import UserError
from samon.evals.main import main
from tests.sets import flat, make_loader, write_set


class Server(ThreadingHTTPServer):
    """Serves a directory; ``faults[path]`` requests for a path break off in the middle first."""

    def __init__(self, root):
        self.root, self.faults, self.requests = Path(root), {}, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """GET only."""

    def do_GET(self):
        self.server.requests.append(self.path)
        file = self.server.root / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        broken = self.server.faults.get(self.path, 0) > 0
        if broken:
            self.server.faults[self.path] -= 1
        self.wfile.write(data[: len(data) // 2] if broken else data)

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


def test_shards_over_http(server):
    assert sorted(flat(make_loader(server.url, training=False))) == list(range(18))
    assert server.waits == []


def test_broken_transfers_are_tried_again_with_longer_waits(server):
    server.faults = {"/train-0001.tar": 3, "/_info.json": 2}
    assert sorted(flat(make_loader(server.url, training=False))) == list(range(18))
    assert server.waits == [1, 2, 1, 2, 4]
    server.faults = {"/train-0001.tar": 99}
    with pytest.raises(ShardError, match=r"train-0001\.tar"):
        flat(make_loader(server.url, training=False))


def test_shards_that_are_not_there(server):
    (server.root / "train-0002.tar").unlink()
    with pytest.raises(ShardError, match=r"train-0002\.tar"):
        flat(make_loader(server.url, training=False))
    with pytest.raises(UserError, match=r"_info\.json"):
        make_loader(server.url + "/nowhere")


def test_cache_keeps_copies_and_stays_in_bounds(server, tmp_path):
    cache = tmp_path / "cache"
    options = {"shard_cache": str(cache)}
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
    with pytest.raises(ShardError, match="does not fit the shard cache"):
        flat(make_loader(server.url, training=False, dataset=options | {"shard_cache_size": 10}))


def test_broken_transfers_and_damaged_copies_are_fetched_again(server, tmp_path):
    cache = tmp_path / "cache"
    options = {"shard_cache": str(cache)}
    server.faults = {"/train-0001.tar": 1}
    assert sorted(flat(make_loader(server.url, training=False, dataset=options))) == list(range(18))
    copy = next(path for path in cache.iterdir() if "0001" in path.name)
    copy.write_bytes(copy.read_bytes()[:3000])
    assert sorted(flat(make_loader(server.url, training=False, dataset=options))) == list(range(18))
    assert not [path for path in cache.iterdir() if path.suffix == ".part"]


def test_two_urls_with_one_name_do_not_share_a_copy(tmp_path):
    cache = urls.ShardCache(tmp_path, 1 << 30)
    assert cache.path("http://a/train/0000.tar") != cache.path("http://a/val/0000.tar")


@pytest.mark.parametrize("root", ["pipe:touch executed; cat x", "PIPE:touch executed", "pipe:touch executed #"])
def test_shell_commands_need_permission(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--allow-shell-urls"):
        make_loader(root)
    with pytest.raises(UserError, match="--allow-shell-urls"):
        urls.join(str(tmp_path), root)
    assert not (tmp_path / "executed").exists()


def test_rewriting_to_a_shell_command_needs_permission_too(monkeypatch):
    monkeypatch.setenv("GOPEN_REWRITE", "http://data/=pipe:touch executed ")
    with pytest.raises(UserError, match="--allow-shell-urls"):
        urls.checked_url("http://data/train.tar")


@pytest.mark.parametrize("url", [" pipe:touch executed", "\tpipe:touch executed", "-", "x pipe:touch executed"])
def test_what_only_looks_like_a_command_is_a_local_path(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    assert urls.checked_url(url) == str(tmp_path / url)
    with pytest.raises(FileNotFoundError):
        urls.open_url(urls.checked_url(url))
    assert not (tmp_path / "executed").exists()


def test_commands_run_when_they_are_allowed(tmp_path):
    root = write_set(tmp_path / "set", [3])
    with pytest.raises(UserError, match="allow-shell-urls"):
        make_loader(f"pipe:cat {root}", training=False)
    loader = make_loader(f"pipe:cat {root}", training=False, dataset={"allow_shell_urls": True})
    assert flat(loader) == [0, 1, 2]


def test_unknown_schemes_name_the_known_ones():
    with pytest.raises(UserError, match=r"no way to open s3:// URLs.*gs.*hf.*https"):
        urls.checked_url("s3://bucket/train.tar")
    assert urls.checked_url("gs://bucket/train.tar") == "gs://bucket/train.tar"
    assert urls.checked_url("file:/data/x.tar") == urls.checked_url("file:///data/x.tar") == "/data/x.tar"


def validate(*words):
    flags = [
        "--model",
        "test_resnet",
        "--no-pretrained",
        "--num-classes",
        "18",
        "--img-size",
        "32",
        "--batch-size",
        "4",
    ]
    return main([*flags, "--split", "train", "--workers", "2", "--device", "cpu", *words])


def test_evaluation_fetches_each_shard_once(server):
    """Workers take turns at batches, and every one of them needs each shard."""
    rows = validate("--dataset", "wds/x", "--data-dir", server.url)
    assert rows[0]["num_samples"] == 18
    shards = [path for path in server.requests if path.endswith(".tar")]
    assert sorted(shards) == [f"/train-{i:04d}.tar" for i in range(3)]


def test_evaluation_reads_pipes_and_keeps_copies_where_asked(tmp_path, server):
    root, log = tmp_path / "set", tmp_path / "log"
    info = json.loads((root / "_info.json").read_text())
    names = info["splits"]["train"]["filenames"]
    info["splits"]["train"]["filenames"] = [f"pipe:echo {name} >> {log}; cat {root}/{name}" for name in names]
    (root / "_info.json").write_text(json.dumps(info))
    set_of = ["--dataset", "wds/x", "--data-dir", str(root)]
    with pytest.raises(UserError, match="add --allow-shell-urls"):
        validate(*set_of)
    for _ in range(2):
        rows = validate(*set_of, "--allow-shell-urls", "--shard-cache", str(tmp_path / "copies"))
        assert rows[0]["num_samples"] == 18
    assert sorted(log.read_text().split()) == names
    assert len(list((tmp_path / "copies").iterdir())) == 3, "no lock or part stays behind"
