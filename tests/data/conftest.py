"""Ends the loader workers that a test started."""

import pytest

from tests import sets


@pytest.fixture(autouse=True)
def _end_workers():
    yield
    while sets.opened:
        sets.opened.pop().close()
