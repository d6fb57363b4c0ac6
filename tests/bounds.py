"""Whether interpreted Triton kernels keep to the memory of their tensors, as a memory checker says on a GPU."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.watching import Watcher, watched


@pytest.fixture(scope="module", autouse=True)
def bounds() -> Iterator[None]:
    """In a module that imports this, kernels that read or write outside of all their arguments raise an error."""
    from nanovllm.kernels import is_interpreted

    if not is_interpreted():
        yield
        return
    with watched(Bounds()):
        yield


class Bounds(Watcher):
    """Raises an IndexError where memory is touched that is none of the arguments'."""

    def __init__(self) -> None:
        self.firsts = self.ends = np.empty(0, np.int64)

    def launch(self, kernel: str, arguments: tuple[Any, ...], is_early: bool) -> None:
        tensors = [getattr(one, "base", one) for one in arguments]  # of a descriptor: the tensor that it is of
        storages = [one.untyped_storage() for one in tensors if isinstance(one, torch.Tensor)]
        self.firsts = np.array([one.data_ptr() for one in storages], np.int64)
        self.ends = self.firsts + np.array([one.nbytes() for one in storages], np.int64)

    def read(self, addresses: np.ndarray, size: int) -> None:
        self.check(addresses, size, "reads")

    def write(self, addresses: np.ndarray, size: int) -> None:
        self.check(addresses, size, "writes")

    def check(self, addresses: np.ndarray, size: int, what: str) -> None:
        if len(addresses) == 0:
            return
        if ((addresses.min() >= self.firsts) & (addresses.max() + size <= self.ends)).any():  # one tensor has them all
            return
        inside = (addresses[:, None] >= self.firsts) & (addresses[:, None] + size <= self.ends)
        outside = addresses[~inside.any(axis=1)]
        if len(outside):
            raise IndexError(
                f"a kernel {what} {len(outside)} of {len(addresses)} elements outside of all tensors: {outside[:4]}"
            )
