"""The paged kernels against naive references, and the backends made of them. Without a GPU they are interpreted."""

import logging
import math
import sys
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

import triton

from nanovllm import LLM, SamplingParams
from nanovllm.attention import BACKENDS, AttentionSpec, select_backend
from nanovllm.attention.base import AttentionMetadata, DecodeMetadata
from nanovllm.attention.flash_attn import FlashAttention
from nanovllm.attention.triton import TritonAttention
from nanovllm.kernels import decode_few_rows, decode_work, paged_decode, paged_prefill, store_kv
from nanovllm.kernels.decode_work import plan_decode
from nanovllm.kernels.paged_prefill import plan_prefill
from tests.bounds import bounds  # noqa: F401
from tests.test_attention import SPEC, Case, Row, Simulation, assert_close, naive
from tests.threads import one_thread  # noqa: F401

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOWHERE = 2**30  # no block: whoever follows it reads what is not his

# The same examples in every run, and no limits of time: the machine may be busy.
few = settings(max_examples=30, deadline=None, derandomize=True)
many = settings(max_examples=60, deadline=None, derandomize=True)

# Running sums of int32 become int64 there, and each one stored overwrites its neighbour, which may be masked.
needs_running_sums = pytest.mark.skipif(
    DEVICE.type == "cpu" and triton.__version__.startswith("3.2."),
    reason="the interpreter of Triton 3.2 stores running sums with too many bytes",
)


@dataclass(frozen=True)
class Shape:
    """Heads, and the blocks of a cache."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group


shapes = st.builds(
    Shape,
    num_kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 8, 17]),
    head_dim=st.sampled_from([64, 80, 128]),
    block_size=st.sampled_from([16, 32, 256]),
    dtype=st.sampled_from([torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]),
)
# What the kernels of decoding and of prompts are given alike: queries may lie apart, tokens or heads first in a block.
layouts: dict[str, Any] = {
    "data": st.data(),
    "shape": shapes,
    "seed": st.integers(0, 100),
    "apart": st.booleans(),
    "by_token": st.booleans(),
}


class Cache:
    """A layer's cache that holds some contexts in shuffled blocks, and NaN wherever nothing was written.

    Args:
        contexts: Tokens of each line of the table.
        by_token: Whether a block holds tokens of all heads rather than heads of all tokens.
    """

    def __init__(self, shape: Shape, contexts: list[int], seed: int, by_token: bool = False) -> None:
        self.shape = shape
        self.random = torch.Generator().manual_seed(seed)
        size, heads = shape.block_size, shape.num_kv_heads
        counts = [-(-context // size) for context in contexts]
        num_blocks = sum(counts) + 2
        sizes = (num_blocks, size, heads) if by_token else (num_blocks, heads, size)
        pair = torch.full((2, *sizes, shape.head_dim), math.nan, dtype=shape.dtype, device=DEVICE)
        self.keys, self.values = pair.transpose(2, 3) if by_token else pair
        self.tables = torch.full((len(contexts), max([*counts, 1])), NOWHERE, dtype=torch.int32, device=DEVICE)
        self.k = [self.tensor(context, heads) for context in contexts]
        self.v = [self.tensor(context, heads) for context in contexts]
        order = torch.randperm(num_blocks, generator=self.random)[: sum(counts)].split(counts)
        for line, (blocks, context) in enumerate(zip(order, contexts, strict=True)):
            self.tables[line, : len(blocks)] = blocks.to(DEVICE)
            position = torch.arange(context)
            for cache, new in ((self.keys, self.k[line]), (self.values, self.v[line])):
                cache[blocks[position // size].to(DEVICE), :, (position % size).to(DEVICE)] = new

    def tensor(self, tokens: int, heads: int) -> torch.Tensor:
        values = torch.randn(tokens, heads, self.shape.head_dim, generator=self.random) * 2
        return values.to(self.shape.dtype).to(DEVICE)

    def queries(self, tokens: int, apart: bool) -> torch.Tensor:
        """[tokens, heads, head_dim], a token's heads packed; ``apart``: as part of a fused projection."""
        if not apart:
            return self.tensor(tokens, self.shape.num_heads)
        return self.tensor(tokens, self.shape.num_heads + 2)[:, : self.shape.num_heads]


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance)


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def edges(block_size: int) -> st.SearchStrategy[int]:
    """Contexts, some of which end with a block or a tile."""
    return st.one_of(st.integers(1, 150), st.sampled_from([1, 16, 17, 63, 64, 65, block_size, block_size + 1, 300]))


@pytest.fixture(params=["tiles of the interpreter", "tiles of float32"])
def exact_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller tiles that float32 is compiled with."""
    if request.param == "tiles of float32":
        for module in (paged_decode, paged_prefill):
            monkeypatch.setattr(module, "is_interpreted", lambda: False)


class TestDecode:
    """One query a row."""

    @few
    @given(**layouts, mixed=st.booleans())
    def test_equals_the_naive_reference(
        self, data: st.DataObject, shape: Shape, seed: int, apart: bool, mixed: bool, by_token: bool
    ) -> None:
        contexts = data.draw(st.lists(st.one_of(st.just(0), edges(shape.block_size)), min_size=1, max_size=5))
        cache = Cache(shape, contexts, seed, by_token)
        rows = torch.randperm(len(contexts), generator=cache.random).tolist()  # row i reads line rows[i]
        lengths = int32([contexts[line] for line in rows])
        slots = int32([line if contexts[line] else -1 for line in rows])
        tokens = int32([2 * row + 1 for row in range(len(rows))]) if mixed else None
        num_tokens = 2 * len(rows) + 1 if mixed else len(rows)
        q = cache.queries(num_tokens, apart)
        out = torch.full((num_tokens, shape.num_heads, shape.head_dim), 7.0, dtype=shape.dtype, device=DEVICE)
        work = plan_decode(lengths, slots, tokens, 4096, shape.num_heads, shape.num_kv_heads, shape.head_dim)
        scale = shape.head_dim**-0.5
        paged_decode.paged_decode(q, cache.keys, cache.values, cache.tables, work, scale, out)
        expected = torch.full(out.shape, 7.0, dtype=torch.float64)
        for row, line in enumerate(rows):
            token = 2 * row + 1 if mixed else row
            expected[token] = 0.0
            if contexts[line]:
                expected[token] = naive(q[token : token + 1].cpu(), cache.k[line].cpu(), cache.v[line].cpu())
        assert_near(out, expected, shape.dtype)
        also = torch.full_like(out, 7.0)
        paged_decode.paged_decode_reference(q, cache.keys, cache.values, cache.tables, work, scale, also)
        assert_near(also, expected, shape.dtype)

    @pytest.mark.usefixtures("exact_tiles")
    @pytest.mark.parametrize("head_dim", [96, 192, 256])
    def test_head_sizes(self, head_dim: int) -> None:
        shape = Shape(1, 2, head_dim, 16, torch.float32)
        contexts = [70, 5]
        cache = Cache(shape, contexts, 1, by_token=True)
        q = cache.queries(2, apart=True)
        out = torch.empty(2, 2, head_dim, device=DEVICE)
        work = plan_decode(int32(contexts), int32([0, 1]), None, 80, 2, 1, head_dim)
        paged_decode.paged_decode(q, cache.keys, cache.values, cache.tables, work, head_dim**-0.5, out)
        expected = torch.cat([naive(q[i : i + 1].cpu(), cache.k[i].cpu(), cache.v[i].cpu()) for i in range(2)])
        assert_near(out, expected, torch.float32)

    @pytest.mark.parametrize("programs", [1, 48])
    def test_few_long_items_and_many_short_ones(self, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(paged_decode, "PROGRAMS_PER_SM", programs)
        monkeypatch.setattr(decode_work, "ITEMS_PER_SM", programs)
        monkeypatch.setattr(decode_work, "RESIDENT", programs)
        monkeypatch.setattr(paged_decode, "REDUCE_TILE", 4)
        contexts = [1500, 3, 700]
        cache = Cache(Shape(1, 2, 64, 32, torch.float32), contexts, 4)
        work = plan_decode(int32(contexts), int32([0, 1, 2]), None, 1504, 2, 1, 64)
        if DEVICE.type == "cpu":
            longest = (work.items[3] - work.items[2])[: int(work.first_items[-1])].max()
            assert longest >= 500 if programs == 1 else longest == decode_work.MIN_CHUNK
        q, out = cache.queries(3, apart=False), torch.empty(3, 2, 64, device=DEVICE)
        paged_decode.paged_decode(q, cache.keys, cache.values, cache.tables, work, 0.125, out)
        expected = torch.cat([naive(q[i : i + 1].cpu(), cache.k[i].cpu(), cache.v[i].cpu()) for i in range(3)])
        assert_near(out, expected, torch.float32)

    def test_64_bit_tables_and_slots(self) -> None:
        shape = Shape(2, 2, 64, 32, torch.float32)
        cache = Cache(shape, [40, 100], 2)
        q, out = cache.queries(2, apart=False), torch.empty(2, 4, 64, device=DEVICE)
        cache.tables[cache.tables == NOWHERE] = 2**31 - 1
        work = plan_decode(int32([100, 40]), int32([1, 0]).long(), None, 128, 4, 2, 64)
        paged_decode.paged_decode(q, cache.keys, cache.values, cache.tables.long(), work, 0.125, out)
        expected = [naive(q[row : row + 1].cpu(), cache.k[1 - row].cpu(), cache.v[1 - row].cpu()) for row in range(2)]
        assert_near(out, torch.cat(expected), torch.float32)

    def test_no_rows(self) -> None:
        work = plan_decode(int32([]), int32([]), None, 4096, 2, 1, 64)
        cache = Cache(Shape(1, 2, 64, 16, torch.float32), [3], 0)
        out = torch.full((1, 2, 64), 7.0, device=DEVICE)
        paged_decode.paged_decode(cache.queries(1, False), cache.keys, cache.values, cache.tables, work, 1.0, out)
        assert (out == 7.0).all()


class TestDecodeOfFewRows:
    """The step's own keys and values computed and stored beside."""

    @few
    @given(data=st.data(), shape=shapes, seed=st.integers(0, 100), apart=st.booleans())
    def test_equals_separate_kernels(self, data: st.DataObject, shape: Shape, seed: int, apart: bool) -> None:
        if shape.group > decode_few_rows.MOST_GROUP:
            return
        contexts = data.draw(st.lists(st.one_of(st.just(0), edges(shape.block_size)), min_size=1, max_size=4))
        self.check(shape, contexts, seed, apart)

    @pytest.mark.parametrize("group", [1, 2, 5, 8])
    @pytest.mark.parametrize("head_dim", [8, 16, 72, 192, 256])
    def test_head_sizes(self, group: int, head_dim: int) -> None:
        self.check(Shape(1, group, head_dim, 32, torch.float32), [70, 0, 3], seed=1)

    def test_is_for_what_shared_memory_and_a_tile_have_room_for(self) -> None:
        """Of a program on a GPU that gives it 99 KiB: keys and values of float32 lie there."""
        assert decode_few_rows.suits(16, 8, 128, torch.float32)
        assert decode_few_rows.suits(64, 8, 256, torch.bfloat16)
        assert not decode_few_rows.suits(16, 8, 192, torch.float32)
        assert not decode_few_rows.suits(9, 1, 64, torch.bfloat16)

    @pytest.mark.parametrize(("head_dim", "whole"), [(128, True), (192, False)])
    def test_other_steps_are_left_to_the_separate_kernels(self, head_dim: int, whole: bool) -> None:
        backend = TritonAttention(AttentionSpec(1, 2, 1, head_dim, torch.float32, DEVICE, 32))
        backend.fused_attend = decode_few_rows.decode_few_rows  # as on a GPU
        assert backend._attends_whole(4) is whole
        assert not backend._attends_whole(5)

    def test_more_parts_than_are_combined_at_a_time(self) -> None:
        self.check(Shape(1, 2, 64, 32, torch.float32), [1500, 64], seed=2)

    def test_a_tile_of_more_lines_than_heads_and_a_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As Triton before 3.5 needs it."""
        monkeypatch.setattr(decode_few_rows, "LEAST_LINES", 16)
        self.check(Shape(2, 2, 64, 32, torch.float32), [70, 0, 200], seed=3)

    @staticmethod
    def check(shape: Shape, contexts: list[int], seed: int, apart: bool = False) -> None:
        cache, also = Cache(shape, contexts, seed), Cache(shape, contexts, seed)
        rows = torch.randperm(len(contexts), generator=cache.random).tolist()  # row i reads line rows[i]
        own = [contexts[line] for line in rows]
        size, heads, kv_heads = shape.block_size, shape.num_heads, shape.num_kv_heads
        targets = [
            int(cache.tables[line, (n - 1) // size]) * size + (n - 1) % size if n else -1
            for line, n in zip(rows, own, strict=True)
        ]
        for one in (cache, also):
            for target in targets:
                if target >= 0:  # the step writes them
                    one.keys[target // size, :, target % size] = math.nan
                    one.values[target // size, :, target % size] = math.nan
        qkv = cache.tensor(len(rows), heads + 2 * kv_heads + apart).flatten(1)
        qkv = qkv[:, : (heads + 2 * kv_heads) * shape.head_dim]
        norms = [cache.tensor(1, 1)[0, 0] for _ in range(2)]
        longest = max(*contexts, 400)
        angles = torch.rand(longest, shape.head_dim // 2, generator=cache.random).to(DEVICE) * 6.28
        positions = torch.tensor([max(n - 1, 0) for n in own], device=DEVICE)
        given_ = (*norms, 1e-6, angles.cos(), angles.sin(), positions)
        slots = int32([line if contexts[line] else -1 for line in rows])
        sizes = (longest, heads, kv_heads, shape.head_dim)
        work = plan_decode(int32(own), slots, None, *sizes, item_tokens=decode_few_rows.TILE)
        slot_mapping = torch.tensor(targets, device=DEVICE)
        results = []
        for kernel, one in (
            (decode_few_rows.decode_few_rows, cache),
            (decode_few_rows.decode_few_rows, cache),  # what it leaves behind is what it needs
            (decode_few_rows.decode_few_rows_reference, also),
        ):
            stored = (one.keys, one.values, slot_mapping, one.tables, work)
            results.append(kernel(qkv, *given_, *stored, shape.head_dim**-0.5, heads, kv_heads))
        assert torch.equal(results[0], results[1])
        assert_near(results[0], results[2], shape.dtype)
        for mine, other in ((cache.keys, also.keys), (cache.values, also.values)):
            assert_near(mine.nan_to_num(7.0), other.nan_to_num(7.0), shape.dtype)
        for row, context in enumerate(own):
            assert context or not results[0][row].any()

    def test_one_tile_an_item(self) -> None:
        work = plan_decode(int32([1000, 0, 65]), int32([0, -1, 2]), None, 4096, 4, 2, 64, item_tokens=64)
        items = work.items[:, : int(work.first_items[-1])].T.tolist()
        assert [(token, start, end) for token, _, start, end, *_ in items] == [
            *((0, start, min(start + 64, 1000)) for start in range(0, 1000, 64)),
            (1, 0, 0),
            (2, 0, 64),
            (2, 64, 65),
        ]


class TestDecodePlan:
    """Each token of each row belongs to one item, and the items are of similar size."""

    @staticmethod
    def check(contexts: list[int], max_context: int, num_kv_heads: int = 2) -> list[list[int]]:
        slots = [1000 + row for row in range(len(contexts))]
        tokens = [3 * row for row in range(len(contexts))]
        work = plan_decode(int32(contexts), int32(slots), int32(tokens), max_context, 4, num_kv_heads, 64)
        capacity = work.items.shape[1]
        assert work.partial_out.shape == (capacity, 4, 64)
        firsts, items = work.first_items.tolist(), work.items.T.tolist()
        assert firsts[0] == 0
        assert firsts[-1] <= capacity
        for row, context in enumerate(contexts):
            own = items[firsts[row] : firsts[row + 1]]
            covered = 0
            for token, slot, start, end, first, parts in own:
                assert (token, slot, first, parts) == (tokens[row], slots[row], firsts[row], len(own))
                assert start == covered
                assert start < end or context == 0
                assert start % decode_work.TILE == 0
                covered = end
            assert covered == context
        return items[: firsts[-1]]

    @many
    @given(
        contexts=st.lists(st.one_of(st.integers(0, 4000), st.integers(0, 3), st.just(4096)), min_size=1, max_size=70),
        num_kv_heads=st.sampled_from([1, 2, 4]),
    )
    def test_covers_every_token_once(self, contexts: list[int], num_kv_heads: int) -> None:
        self.check(contexts, 4096, num_kv_heads)

    @pytest.mark.parametrize("context", [0, 1, 64, 4096])
    @pytest.mark.parametrize("rows", [1, 64, 65, 1024, 1025, 2100])
    def test_any_number_of_rows(self, rows: int, context: int) -> None:
        items = self.check([context] * rows, 4096)
        assert len(items) >= rows

    def test_capacity_is_bounded_by_the_longest_context(self) -> None:
        work = plan_decode(int32([100]), int32([0]), None, 128, 4, 2, 64)
        assert work.items.shape[1] == 2

    @needs_running_sums
    def test_one_long_row_among_short_ones_is_split(self) -> None:
        items = self.check([10] * 30 + [100_000] + [7] * 30, 100_000)
        longest = max(end - start for _, _, start, end, *_ in items)
        target = decode_work.multiprocessors(DEVICE) * decode_work.ITEMS_PER_SM // 2
        assert longest <= max(100_510 / target + decode_work.TILE, decode_work.CHUNK) + decode_work.TILE

    def test_little_work_is_for_one_program_a_place(self) -> None:
        """What each multiprocessor holds at a time is enough of items."""
        places = decode_work.multiprocessors(DEVICE) * decode_work.RESIDENT // 2
        assert len(self.check([places * 128], places * 128)) == places
        assert len(self.check([64], 4096)) == 1

    @needs_running_sums
    def test_a_total_beyond_32_bits(self) -> None:
        self.check([2**30] * 5, 2**30)


class TestPrefill:
    """Rows of several queries."""

    @few
    @given(**layouts, with_slots=st.booleans())
    def test_equals_the_naive_reference(
        self, data: st.DataObject, shape: Shape, seed: int, apart: bool, with_slots: bool, by_token: bool
    ) -> None:
        rows = data.draw(st.lists(st.tuples(st.integers(0, 150), st.integers(1, 70)), min_size=1, max_size=3))
        self.check(shape, rows, seed, apart, with_slots, by_token)

    @pytest.mark.usefixtures("exact_tiles")
    @pytest.mark.parametrize("head_dim", [96, 192, 256])
    def test_head_sizes(self, head_dim: int) -> None:
        self.check(Shape(1, 2, head_dim, 16, torch.float32), [(70, 40), (0, 5)], 1, True, False)

    @pytest.mark.usefixtures("exact_tiles")
    @pytest.mark.parametrize("row", [(0, 64), (63, 2), (64, 64), (127, 1), (128, 65), (0, 129), (255, 3)])
    def test_ends_of_tiles(self, row: tuple[int, int]) -> None:
        self.check(Shape(1, 2, 64, 32, torch.float32), [row], 1, True, False)

    @staticmethod
    def check(
        shape: Shape, rows: list[tuple[int, int]], seed: int, apart: bool, with_slots: bool, by_token: bool = False
    ) -> None:
        contexts = [history + count for history, count in rows]
        cache = Cache(shape, contexts, seed, by_token)
        counts = np.array([count for _, count in rows])
        tokens = np.cumsum(counts) - counts + 2  # the step's first tokens belong to others
        slots = None
        if with_slots:  # the step's first row is another, and the lines of these are in reverse
            slots = torch.tensor([NOWHERE, *reversed(range(len(rows)))], device=DEVICE)
            cache.tables = cache.tables.flip(0)
        per_tile = paged_prefill.queries_per_tile(shape.dtype, shape.num_heads, shape.num_kv_heads, shape.head_dim)
        numbers = np.arange(len(rows)) + with_slots
        tiles = plan_prefill(counts, np.array(contexts), tokens, numbers, per_tile)
        q = cache.queries(int(counts.sum()) + 2, apart)
        out = torch.full((len(q), shape.num_heads, shape.head_dim), 7.0, dtype=shape.dtype, device=DEVICE)
        also = out.clone()
        scale, work = shape.head_dim**-0.5, torch.from_numpy(tiles).to(DEVICE)
        expected = torch.full(out.shape, 7.0, dtype=torch.float64)
        for row, (token, count) in enumerate(zip(tokens, counts, strict=True)):
            queries = q[token : token + count].cpu()
            expected[token : token + count] = naive(queries, cache.k[row].cpu(), cache.v[row].cpu())
        paged_prefill.paged_prefill(q, cache.keys, cache.values, cache.tables, slots, work, scale, out)
        assert_near(out, expected, shape.dtype)
        paged_prefill.paged_prefill_reference(q, cache.keys, cache.values, cache.tables, slots, work, scale, also)
        assert_near(also, expected, shape.dtype)

    @pytest.mark.usefixtures("exact_tiles")
    @pytest.mark.parametrize("where", [0, 30, 63, 64, 69])
    def test_an_overflow_reaches_those_that_see_it_alone(self, where: int) -> None:
        shape = Shape(1, 2, 64, 16, torch.float32)
        cache = Cache(shape, [70], 3)
        block, offset = int(cache.tables[0, where // 16]), where % 16
        q = cache.queries(70, False)
        expected = naive(q.cpu(), cache.k[0].cpu(), cache.v[0].cpu())
        cache.values[block, 0, offset, 5] = math.inf
        per_tile = paged_prefill.queries_per_tile(shape.dtype, 2, 1, 64)
        tiles = plan_prefill(np.array([70]), np.array([70]), np.array([0]), np.array([0]), per_tile)
        out = torch.empty(70, 2, 64, device=DEVICE)
        paged_prefill.paged_prefill(
            q, cache.keys, cache.values, cache.tables, None, torch.from_numpy(tiles).to(DEVICE), 0.125, out
        )
        assert_near(out[:where], expected[:where], torch.float32)
        assert not out[where:, :, 5].isfinite().any()

    @many
    @given(
        rows=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 300)), max_size=20),
        per_tile=st.sampled_from([1, 7, 42, 64, 128]),
    )
    def test_plan_lists_each_query_once_longest_first(self, rows: list[tuple[int, int]], per_tile: int) -> None:
        counts = np.array([count for _, count in rows], dtype=np.int32)
        histories = np.array([history for history, _ in rows], dtype=np.int32)
        firsts = np.cumsum(counts, dtype=np.int32) - counts
        tiles = plan_prefill(counts, histories + counts, firsts, np.arange(len(rows)) * 2, per_tile)
        assert tiles.dtype == np.int32
        assert tiles.shape[0] == 4
        queries = []
        for token, position, count, line in tiles.T.tolist():
            assert 1 <= count <= per_tile
            queries += [(token + i, position + i, line) for i in range(count)]
        wanted = []
        for row, (history, count) in enumerate(rows):
            wanted += [(int(firsts[row]) + i, history + i, 2 * row) for i in range(count)]
        assert sorted(queries) == wanted
        ends = (tiles[1] + tiles[2]).tolist()
        assert ends == sorted(ends, reverse=True)


class TestStore:
    """Keys and values go to their places, and nothing else is touched."""

    @few
    @given(shape=shapes, tokens=st.integers(0, 70), by_token=st.booleans(), apart=st.booleans(), seed=st.integers(0, 9))
    def test_equals_the_reference(self, shape: Shape, tokens: int, by_token: bool, apart: bool, seed: int) -> None:
        shape = replace(shape, num_kv_heads=3)
        pairs = [Cache(shape, [200], seed, by_token) for _ in range(2)]
        heads = 3 + 2 * apart
        k, v = (pairs[0].tensor(tokens, heads)[:, :3] for _ in range(2))
        places = torch.randperm(pairs[0].keys.shape[0] * shape.block_size, generator=pairs[0].random)[:tokens]
        places[1::4] = -1
        places = places.to(DEVICE)
        for cache, store in zip(pairs, (store_kv.store_kv, store_kv.store_kv_reference), strict=True):
            store(k, v, cache.keys, cache.values, places)
        for one, other in ((pairs[0].keys, pairs[1].keys), (pairs[0].values, pairs[1].values)):
            assert torch.equal(one.nan_to_num(nan=-77.0), other.nan_to_num(nan=-77.0))


ROWS = (Row(40, 1), Row(0, 33), Row(16, 5), Row(31, 1), Row(0, 1), Row(130, 1))


def decode_step(simulation: Simulation, rows: list[int]) -> torch.Tensor:
    """The rows' last tokens in a step of which the host knows nothing, with a row that is none in the middle."""
    ends = [row.history + row.queries for row in simulation.case.rows]
    size = simulation.case.block_size
    tables = simulation.tables.to(torch.int32)
    slots = [*rows[:1], -1, *rows[1:]]
    lengths = [ends[row] if row >= 0 else 0 for row in slots]
    places = [tables[row, (ends[row] - 1) // size] * size + (ends[row] - 1) % size if row >= 0 else -1 for row in slots]
    step = simulation.backend.begin_decode(
        DecodeMetadata(int32(slots).cpu(), int32(lengths).cpu(), tables, torch.tensor(places, dtype=torch.int64))
    )
    q = torch.stack([simulation.q[row][-1] for row in slots])
    k = torch.stack([simulation.k[row][-1] for row in slots])
    v = torch.stack([simulation.v[row][-1] for row in slots])
    out = step.attend(simulation.layer, q, k, v)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    return out[[index for index, row in enumerate(slots) if row >= 0]]


def last_expected(simulation: Simulation, rows: list[int]) -> torch.Tensor:
    return torch.cat([naive(simulation.q[row][-1:], simulation.k[row], simulation.v[row]) for row in rows])


def with_slots(metadata: AttentionMetadata) -> AttentionMetadata:
    """The same step, its rows' tables lines of a larger one."""
    tables = torch.full((len(metadata.query_lengths) + 2, metadata.block_tables.shape[1] + 3), NOWHERE)
    slots = torch.randperm(len(tables), generator=torch.Generator().manual_seed(1))[: len(metadata.query_lengths)]
    tables[slots, : metadata.block_tables.shape[1]] = metadata.block_tables
    return replace(metadata, block_tables=tables.to(torch.int32), slots=slots)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="interprets the kernels, which are compiled here")
class TestTritonBackend:
    """Mixed steps, decode steps, steps without a cache."""

    @few
    @given(
        rows=st.lists(st.builds(Row, st.sampled_from([0, 1, 15, 16, 40, 100]), st.sampled_from([1, 1, 2, 16, 40]))),
        seed=st.integers(0, 100),
        group=st.sampled_from([1, 3, 4]),
    )
    def test_mixed_steps(self, rows: list[Row], seed: int, group: int) -> None:
        simulation = Simulation(Case(2, group, 48, 32, (*rows[:4], Row(3, 1)), seed), "triton")
        simulation.compute_history()
        assert_close(simulation.compute_queries(), simulation.expected())

    def test_slots(self, monkeypatch: pytest.MonkeyPatch) -> None:
        simulation = Simulation(Case(2, 2, 16, 16, ROWS), "triton")
        simulation.compute_history()
        metadata = simulation.metadata
        monkeypatch.setattr(simulation, "metadata", lambda *arguments: with_slots(metadata(*arguments)))
        assert_close(simulation.compute_queries(), simulation.expected())

    @pytest.mark.parametrize("block_size", [16, 32, 256])
    def test_decode_steps(self, block_size: int) -> None:
        simulation = Simulation(Case(2, 2, 16, block_size, ROWS), "triton")
        simulation.compute_history()
        simulation.compute_queries()
        rows = [4, 0, 3, 5]
        assert_close(decode_step(simulation, rows), last_expected(simulation, rows))

    def test_keys_and_values_may_be_written_by_others(self) -> None:
        """What ``attend`` stores may be stored through ``target``."""
        simulation = Simulation(Case(2, 2, 16, 16, (Row(0, 7), Row(0, 1))), "triton")
        step = simulation.backend.begin_step(simulation.metadata([0, 0], [7, 1], [0, 1]))
        target = step.target(1)
        store_kv.store_kv_reference(torch.cat(simulation.k), torch.cat(simulation.v), *target)
        assert_close(step.attend_cached(1, torch.cat(simulation.q)), simulation.expected())

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"dtype": torch.float64}, "dtype torch.float64"),
            ({"dtype": torch.bfloat16}, "interpreter"),
            ({"head_dim": 12}, "head_dim 12"),
            ({"head_dim": 264}, "head_dim 264"),
            ({"block_size": 8}, "block_size 8"),
            ({"block_size": 48}, "block_size 48"),
            ({"device": torch.device("mps")}, "no kernels for mps"),
        ],
    )
    def test_what_it_does_not_serve(self, changes: dict[str, Any], reason: str) -> None:
        assert reason in (TritonAttention.why_not(replace(SPEC, **changes)) or "")

    def test_small_heads_are_for_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = replace(SPEC, device=torch.device("cuda"), dtype=torch.bfloat16)
        pretend_gpu(monkeypatch)
        assert "head_dim 16" in (TritonAttention.why_not(spec) or "")
        assert TritonAttention.why_not(replace(spec, head_dim=128)) is None


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that kernels can be launched on, as far as the choice of a backend goes."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for module in ("triton", "flash_attn"):
        reason = lambda device: None if device.type == "cuda" else f"triton has no kernels for {device.type}"  # noqa: E731
        monkeypatch.setattr(f"nanovllm.attention.{module}.why_no_triton", reason)


def fake_flash_attn() -> ModuleType:
    """A package with the two functions that are used, in plain torch, as strict about their arguments as the real."""
    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)

    def context(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
        blocks = table[: -(-length // cache.shape[1])].long()
        return cache[blocks].flatten(0, 1)[:length]

    def check_paged(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor) -> None:
        assert keys.shape == values.shape
        assert keys.shape[1] % 256 == 0
        assert keys.shape[3] == q.shape[-1]
        assert table.dtype == torch.int32
        assert table.stride(-1) == 1
        assert (table >= 0).all()
        assert q.stride(-1) == keys.stride(-1) == 1

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        block_table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert causal
        assert softmax_scale == q.shape[2] ** -0.5
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q.is_contiguous()
        assert cu_seqlens_k.is_contiguous()
        starts, ends = cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()
        lengths = cu_seqlens_k.diff().tolist()
        assert ends[-1] == len(q)
        assert max_seqlen_q == max(end - start for start, end in zip(starts, ends, strict=True))
        assert max_seqlen_k == max(lengths)
        pieces = []
        for row, (start, end, length) in enumerate(zip(starts, ends, lengths, strict=True)):
            if block_table is None:
                assert end - start == length
                keys, values = k[start:end], v[start:end]
            else:
                check_paged(q, k, v, block_table[row : row + 1, : -(-length // k.shape[1])])
                keys, values = context(k, block_table[row], length), context(v, block_table[row], length)
            pieces.append(naive(q[start:end], keys, values))
        return torch.cat(pieces).to(q.dtype)

    def flash_attn_with_kvcache(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        cache_seqlens: torch.Tensor,
        block_table: torch.Tensor,
        softmax_scale: float,
        causal: bool,
    ) -> torch.Tensor:
        assert causal
        assert q.shape[1] == 1
        assert softmax_scale == q.shape[3] ** -0.5
        assert cache_seqlens.dtype == torch.int32
        assert cache_seqlens.shape == (len(q),)
        assert block_table.shape[0] == len(q)
        check_paged(q, k_cache, v_cache, block_table[:, :1])
        out = torch.full(q.shape, math.nan, dtype=q.dtype)
        for row, length in enumerate(cache_seqlens.tolist()):
            if length:
                keys, values = context(k_cache, block_table[row], length), context(v_cache, block_table[row], length)
                out[row] = naive(q[row], keys, values).to(q.dtype)
        return out

    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    package.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    return package


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    package = fake_flash_attn()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return package


@pytest.mark.skipif(DEVICE.type != "cpu", reason="its fake computes on the CPU, where kernels are interpreted")
@pytest.mark.usefixtures("flash_attn")
class TestFlashAttention:
    """What is asked of the package, and what becomes of its answers."""

    CASE = Case(2, 2, 16, 256, (*ROWS, Row(300, 4), Row(255, 1)))

    @pytest.mark.parametrize("slots", [False, True])
    @pytest.mark.parametrize(
        "rows", [CASE.rows, (Row(40, 1), Row(255, 1)), (Row(0, 33), Row(300, 4))], ids=["mixed", "decode", "prefill"]
    )
    def test_steps(self, rows: tuple[Row, ...], slots: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        simulation = Simulation(replace(self.CASE, rows=rows), "flash_attn")
        simulation.tables = simulation.tables.clamp(min=0)
        simulation.compute_history()
        if slots:
            metadata = simulation.metadata
            monkeypatch.setattr(simulation, "metadata", lambda *arguments: with_slots(metadata(*arguments)))
        assert_close(simulation.compute_queries(), simulation.expected())

    def test_decode_steps(self) -> None:
        simulation = Simulation(self.CASE, "flash_attn")
        simulation.compute_history()
        simulation.compute_queries()
        rows = [4, 0, 3, 7]
        assert_close(decode_step(simulation, rows), last_expected(simulation, rows))

    def test_without_a_cache(self) -> None:
        case = Case(2, 2, 16, 256, (Row(0, 7), Row(0, 1), Row(0, 40)))
        simulation = Simulation(case, "flash_attn")
        counts = [row.queries for row in case.rows]
        bare = FlashAttention(simulation.spec)
        nowhere, mapping = torch.zeros(3, 0, dtype=torch.int64), torch.zeros(sum(counts), dtype=torch.int64)
        step = bare.begin_step(AttentionMetadata(counts, list(counts), nowhere, mapping))
        out = step.attend(0, torch.cat(simulation.q), torch.cat(simulation.k), torch.cat(simulation.v))
        assert_close(out, simulation.expected())
        assert step.target(0) is None

    def test_what_it_does_not_serve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = AttentionSpec(2, 16, 8, 128, torch.bfloat16, torch.device("cuda"), 256)
        pretend_gpu(monkeypatch)
        assert FlashAttention.why_not(spec) is None
        assert FlashAttention.why_not(replace(spec, block_size=None)) is None
        for changes, reason in (
            ({"dtype": torch.float32}, "dtype torch.float32 is not float16 or bfloat16"),
            ({"head_dim": 260}, "head_dim 260"),
            ({"block_size": 16}, "block_size 16 is not a multiple of 256"),
            ({"device": torch.device("cpu")}, "no kernels for cpu"),
        ):
            assert reason in (FlashAttention.why_not(replace(spec, **changes)) or "")
        monkeypatch.setattr("nanovllm.attention.flash_attn.why_no_triton", lambda device: "a GPU that is too old")
        assert FlashAttention.why_not(spec) == "a GPU that is too old"


class TestSelection:
    """Who serves whom."""

    def test_flash_attn_must_be_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("nanovllm.attention.flash_attn.find_spec", lambda _: None)
        spec = replace(SPEC, device=torch.device("cuda"))
        with pytest.raises(
            ValueError, match=r"attention_backend is 'flash_attn', but the package flash_attn is not installed \(it was"
        ):
            select_backend("flash_attn", spec)

    def test_a_gpu_gets_triton_unless_it_cannot(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        spec = AttentionSpec(2, 16, 8, 128, torch.bfloat16, torch.device("cuda"), 16)
        pretend_gpu(monkeypatch)
        monkeypatch.setattr("nanovllm.attention.flash_attn.find_spec", lambda _: None)
        with caplog.at_level(logging.WARNING, logger="nanovllm"):
            assert select_backend("auto", spec) is TritonAttention
            assert select_backend("matmul", spec) is BACKENDS["matmul"]
            assert caplog.text == "", "what was asked for is no news"
            assert select_backend("auto", replace(spec, head_dim=32)) is BACKENDS["matmul"]
        [record] = caplog.records
        assert record.getMessage() == (
            "attention falls back to matmul, which is slower, for 16 query heads, 8 key-value heads of 32, bfloat16, "
            "blocks of 16 tokens, on cuda (triton: head_dim 32 is not a multiple of 8 from 64 to 256; flash_attn: the "
            "package flash_attn is not installed)"
        )

    @pytest.mark.skipif(DEVICE.type != "cpu", reason="interprets the kernels, which are compiled here")
    def test_interpreted_kernels_are_to_be_asked_for(self) -> None:
        assert select_backend("auto", SPEC) is not TritonAttention
        assert select_backend("triton", SPEC) is TritonAttention


@pytest.mark.skipif(DEVICE.type != "cpu", reason="interprets the kernels, which are compiled here")
def test_greedy_texts_are_those_of_transformers(tiny_checkpoint: Path, tiny_reference: Any) -> None:
    """With chunked prompts, a cached beginning, and rows that end at different times."""
    shared = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]
    prompts = [shared, [7], [2, 7, 1, 8, 2, 8, 1], [*shared[:16], 8, 4, 6]]
    new_tokens = [5, 3, 6, 4]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in new_tokens]
    with LLM(
        tiny_checkpoint,
        device="cpu",
        attention_backend="triton",
        dtype="float32",
        skip_tokenizer_init=True,
        num_kvcache_blocks=32,
        max_model_len=64,
        max_num_batched_tokens=16,
    ) as llm:
        outputs = [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]
    for prompt, output, count in zip(prompts, outputs, new_tokens, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            for _ in range(count):
                ids = torch.cat([ids, tiny_reference(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert output == ids[0, len(prompt) :].tolist()
