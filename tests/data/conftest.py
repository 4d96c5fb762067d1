import pytest

from tests import sets


@pytest.fixture(autouse=True)
def _end_workers():
    """End the loader workers that a test started."""
    yield
    while sets.opened:
        sets.opened.pop().close()


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Shards of UNEVEN lengths."""
    return sets.write_set(tmp_path_factory.mktemp("uneven") / "set")
