import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Networks this small are fastest on one thread, above all when other processes want the other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
