"""Caches of more elements than 32 bits count: the blocks at their ends are found like any others.

A GPU's cache is that large as a rule. Without one, the memory is only asked for: but for some blocks it is never
touched.
"""

import mmap
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available() and sys.platform != "linux":
    pytest.skip("only Linux is known to give memory that nobody touches", allow_module_level=True)

from nanovllm.kernels import decode_few_rows, paged_decode, paged_prefill, qk_norm_rope_store, store_kv
from nanovllm.kernels.decode_work import plan_decode
from nanovllm.kernels.paged_prefill import plan_prefill, queries_per_tile
from tests.bounds import bounds  # noqa: F401
from tests.threads import one_thread  # noqa: F401

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 2, 64, 32
BLOCK = KV_HEADS * BLOCK_SIZE * HEAD_DIM
NUM_BLOCKS = 2**32 // BLOCK + 8  # of keys, and of values
# One at the end, and those that begin where a signed and an unsigned number of 32 bits end.
BLOCKS = [NUM_BLOCKS - 1, 3, 2**31 // BLOCK, 2**32 // BLOCK]
CONTEXT = len(BLOCKS) * BLOCK_SIZE - 3


class Layer(NamedTuple):
    """A cache, and the blocks of a sequence in it."""

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor

    def place(self, positions: torch.Tensor) -> torch.Tensor:
        """``slot_mapping`` of the sequence's positions."""
        return self.table[0][positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE

    def of_sequence(self) -> torch.Tensor:
        """Its keys and values."""
        places = self.place(torch.arange(CONTEXT, device=DEVICE))
        pair = (x[places // BLOCK_SIZE, :, places % BLOCK_SIZE] for x in (self.keys, self.values))
        return torch.stack([*pair])


def memory(num_elements: int) -> torch.Tensor:
    """float16 [num_elements] that takes no memory before it is written."""
    if DEVICE.type == "cuda":
        return torch.empty(num_elements, dtype=torch.float16, device=DEVICE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, 2 * num_elements, flags=flags), dtype=torch.float16)


def layer(flat: torch.Tensor, blocks: list[int], by_token: bool) -> Layer:
    sizes = (BLOCK_SIZE, KV_HEADS) if by_token else (KV_HEADS, BLOCK_SIZE)
    pair = flat.view(2, -1, *sizes, HEAD_DIM)
    keys, values = pair.transpose(2, 3) if by_token else pair
    return Layer(keys, values, torch.tensor([blocks], dtype=torch.int32, device=DEVICE))


@pytest.fixture(scope="module")
def large() -> torch.Tensor:
    return memory(2 * NUM_BLOCKS * BLOCK)


@pytest.fixture(params=[False, True], ids=["heads of all tokens", "tokens of all heads"])
def layers(request: pytest.FixtureRequest, large: torch.Tensor) -> tuple[Layer, Layer]:
    """The same sequence in a large cache and in a small one."""
    small = memory(2 * len(BLOCKS) * BLOCK)
    both = (
        layer(large, BLOCKS, request.param),
        layer(small, list(range(len(BLOCKS))), request.param),
    )
    random = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, CONTEXT, KV_HEADS, HEAD_DIM, generator=random).half().to(DEVICE)
    for one in both:
        store_kv.store_kv(k, v, one.keys, one.values, one.place(torch.arange(CONTEXT, device=DEVICE)))
    return both


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random_half(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)


def test_store_kv(layers: tuple[Layer, Layer]) -> None:
    assert torch.equal(*(one.of_sequence() for one in layers))


def test_paged_decode(layers: tuple[Layer, Layer]) -> None:
    q, results = random_half(1, HEADS, HEAD_DIM), []
    for one in layers:
        work = plan_decode(int32(CONTEXT), int32(0), None, CONTEXT, HEADS, KV_HEADS, HEAD_DIM)
        results.append(torch.empty_like(q))
        paged_decode.paged_decode(q, one.keys, one.values, one.table, work, 0.125, results[-1])
    assert torch.equal(*results)


def test_paged_prefill(layers: tuple[Layer, Layer]) -> None:
    count = 80  # the first sees most of the keys unmasked, the last ones' tiles reach into the last block
    q, results = random_half(count, HEADS, HEAD_DIM), []
    per_tile = queries_per_tile(torch.float16, HEADS, KV_HEADS, HEAD_DIM)
    planned = plan_prefill(np.array([count]), np.array([CONTEXT]), np.array([0]), np.array([0]), per_tile)
    for one in layers:
        results.append(torch.empty_like(q))
        tiles = torch.from_numpy(planned).to(DEVICE)
        paged_prefill.paged_prefill(q, one.keys, one.values, one.table, None, tiles, 0.125, results[-1])
    assert torch.equal(*results)


@pytest.mark.parametrize("position", [CONTEXT - 1, 2 * BLOCK_SIZE + 5, 5])
def test_the_kernels_that_compute_keys(layers: tuple[Layer, Layer], position: int) -> None:
    qkv, weight = random_half(1, (HEADS + 2 * KV_HEADS) * HEAD_DIM), random_half(HEAD_DIM)
    angles = torch.rand(CONTEXT, HEAD_DIM // 2, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    positions = torch.tensor([position], device=DEVICE)
    given = qkv, weight, weight, 1e-6, angles.cos(), angles.sin(), positions
    attended, stored = [], []
    for one in layers:
        work = plan_decode(
            int32(position + 1), int32(0), None, CONTEXT, HEADS, KV_HEADS, HEAD_DIM, decode_few_rows.TILE
        )
        target, place = (one.keys, one.values), one.place(positions)
        attended.append(
            decode_few_rows.decode_few_rows(*given, *target, place, one.table, work, 0.125, HEADS, KV_HEADS)
        )
        stored.append(one.of_sequence())
        for cache in target:
            cache[place // BLOCK_SIZE, :, place % BLOCK_SIZE] = 0
        qk_norm_rope_store.qk_norm_rope_store(*given, *target, place, HEADS, KV_HEADS)
        stored.append(one.of_sequence())
    assert torch.equal(*attended)
    assert torch.equal(stored[0], stored[2])
    assert torch.equal(stored[1], stored[3])
