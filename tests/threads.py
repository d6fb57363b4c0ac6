"""The number of threads that tests of small models run on."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A module that imports this runs on one thread.

    Products as small as the tests' are slower on several, and slower by far where other work keeps the cores busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within it, torch and the kernels run on so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
