"""Whether interpreted Triton kernels keep to the memory of their tensors, as a memory checker says on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def bounds() -> Iterator[None]:
    """In a module that imports this, kernels are checked."""
    with checked_bounds():
        yield


@contextmanager
def checked_bounds() -> Iterator[None]:
    """Raise an error where a kernel reads or writes outside of all its arguments. Does nothing on a GPU."""
    from nanovllm.kernels import is_interpreted

    if not is_interpreted():
        yield
        return
    import triton.runtime.interpreter as interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    call, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    update = builder.create_atomic_rmw
    firsts, ends = np.empty(0, np.int64), np.empty(0, np.int64)

    def noting_call(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal firsts, ends
        storages = [one.untyped_storage() for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        firsts = np.array([one.data_ptr() for one in storages], np.int64)
        ends = firsts + np.array([one.nbytes() for one in storages], np.int64)
        call(self, *args, **kwargs)

    def check(pointers: Any, mask: Any, what: str) -> None:
        addresses = np.asarray(pointers.data)
        wanted = addresses[np.broadcast_to(np.asarray(mask.data), addresses.shape).astype(bool)].astype(np.int64)
        if len(wanted) == 0:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        if ((wanted.min() >= firsts) & (wanted.max() + size <= ends)).any():  # nearly always: one tensor holds them all
            return
        inside = (wanted[:, None] >= firsts) & (wanted[:, None] + size <= ends)
        outside = wanted[~inside.any(axis=1)]
        if len(outside):
            raise IndexError(f"{what} {len(outside)} of {len(wanted)} elements outside of all tensors: {outside[:4]}")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "a kernel reads")
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "a kernel writes")
        return store(self, pointers, value, mask, *rest)

    def checked_update(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "a kernel updates")
        return update(self, operation, pointers, value, mask, *rest)

    with (
        patch.object(executor, "__call__", noting_call),
        patch.object(builder, "create_masked_load", checked_load),
        patch.object(builder, "create_masked_store", checked_store),
        patch.object(builder, "create_atomic_rmw", checked_update),
    ):
        yield
