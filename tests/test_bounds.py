"""The check that interpreted kernels keep to their tensors notices those that do not."""

import pytest
import torch

from nanovllm.kernels import is_interpreted

pytest.importorskip("triton", reason="the package triton is not installed")
if torch.cuda.is_available() or not is_interpreted():
    pytest.skip("this is for triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl

from tests.bounds import bounds  # noqa: F401


@triton.jit
def _copy(x, out, first, length, SIZE: tl.constexpr):
    place = first + tl.arange(0, SIZE)
    tl.store(out + place, tl.load(x + place, mask=place < length), mask=place < length)


def copy(first: int, length: int, size: int, out_size: int) -> None:
    _copy[(1,)](torch.zeros(size), torch.empty(out_size), first, length, SIZE=8)


def test_what_is_inside_or_masked_is_fine() -> None:
    copy(first=0, length=5, size=5, out_size=5)


@pytest.mark.parametrize(
    ("first", "length", "size", "out_size", "message"),
    [(0, 6, 5, 6, "reads 1 of 6"), (0, 6, 6, 5, "writes 1 of 6"), (-1, 5, 5, 5, "reads 1 of 6")],
)
def test_what_is_outside_is_an_error(first: int, length: int, size: int, out_size: int, message: str) -> None:
    with pytest.raises(Exception, match=f"a kernel {message} elements outside of all tensors"):
        copy(first, length, size, out_size)
