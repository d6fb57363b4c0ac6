"""Attention on the CPU: which work a step is cut into, and that the kernel computes what the reference does."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovllm import kernels
from nanovllm.attention.base import AttentionMetadata, AttentionSpec
from nanovllm.attention.cpu import CpuAttention
from nanovllm.attention.matmul import MatmulAttention

if (reason := kernels.why_no_cpu_kernels()) is not None:
    pytest.skip(reason, allow_module_level=True)

from nanovllm.attention import cpu_items
from nanovllm.kernels.cpu.paged_attention import TILE_ROWS, Items
from nanovllm.kernels.cpu.vectors import LANES
from tests.threads import one_thread, threads  # noqa: F401

CPU = torch.device("cpu")
ONE_BLOCK = 1  # of MIN_SHARED_TOKENS: whatever is shared is gone through together


def examples(count: int) -> settings:
    """The same ``count`` examples in every run."""
    return settings(derandomize=True, deadline=None, max_examples=count)


@dataclass(frozen=True)
class Row:
    """A sequence in a step.

    Args:
        parent: An earlier row with which it begins; None if it begins alone.
        shared: Blocks it has in common with that row; at most those that lie before either's first query.
        more: Tokens computed before this step, beyond the shared ones.
        queries: Tokens computed in this step.
    """

    parent: int | None
    shared: int
    more: int
    queries: int


class Batch:
    """The rows of a step, and their block tables.

    Lines of the tables are in another order than the rows, and beyond a row's blocks they name block 0, all alike.
    """

    def __init__(self, rows: list[Row], block_size: int, seed: int = 0) -> None:
        self.block_size = block_size
        random = np.random.default_rng(seed)
        histories: list[int] = []
        own: list[list[int]] = []
        names = iter(random.permutation(sum(-(-(row.more + row.queries) // block_size) + 2 for row in rows)).tolist())
        for row in rows:
            shared = 0 if row.parent is None else min(row.shared, histories[row.parent] // block_size)
            blocks = [] if row.parent is None else own[row.parent][:shared]
            histories.append(shared * block_size + row.more)
            needed = -(-(histories[-1] + row.queries) // block_size)
            own.append(blocks + [next(names) for _ in range(needed - shared)])
        self.num_blocks = 1 + max(max(blocks) for blocks in own)
        self.lines = random.permutation(len(rows) + 2)[: len(rows)]
        self.tables = np.zeros((len(rows) + 2, max(map(len, own)) + 1), dtype=np.int32)
        for line, blocks in zip(self.lines, own, strict=True):
            self.tables[line, : len(blocks)] = blocks
        self.queries = np.array([row.queries for row in rows])
        self.contexts = np.array(histories) + self.queries
        self.row_of_token = np.repeat(np.arange(len(rows)), self.queries)
        starts = np.repeat(np.cumsum(self.queries) - self.queries, self.queries)
        self.positions = np.array(histories)[self.row_of_token] + np.arange(len(starts)) - starts

    def rows(self) -> cpu_items.Rows:
        return cpu_items.Rows(self.queries, self.contexts, self.lines, self.tables)

    def slots(self, row: int, positions: np.ndarray) -> np.ndarray:
        """Where a row's tokens lie in the cache."""
        blocks = self.tables[self.lines[row], positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size

    def metadata(self) -> AttentionMetadata:
        mapping = [self.slots(row, np.array([p])) for row, p in zip(self.row_of_token, self.positions, strict=True)]
        return AttentionMetadata(
            self.queries.tolist(),
            self.contexts.tolist(),
            torch.from_numpy(self.tables.copy()),
            torch.from_numpy(np.concatenate(mapping)),
            torch.from_numpy(self.lines.copy()),
        )


@st.composite
def batches(draw: st.DrawFn, block_sizes: tuple[int, ...], is_decode: bool = False, longest: int = 700) -> Batch:
    """Rows that begin alike and differently, at any depth; with as many queries as a chunk of a prompt has, or one."""
    block_size = draw(st.sampled_from(block_sizes))
    most = max(1, longest // block_size)
    some = st.one_of(st.integers(0, 40), st.integers(0, longest), st.sampled_from((block_size, 2 * block_size, 128)))
    rows = []
    for number in range(draw(st.integers(1, 8))):
        parent = draw(st.one_of(st.none(), st.integers(0, number - 1))) if number else None
        queries = 1 if is_decode else draw(st.one_of(st.just(1), st.integers(1, 90)))
        rows.append(Row(parent, draw(st.integers(0, most)), draw(some), queries))
    return Batch(rows, block_size, draw(st.integers(0, 1000)))


def lay_out(batch: Batch, group: int, kv_heads: int, num_threads: int, careful: bool = False) -> Items:
    geometry = cpu_items.Geometry(batch.block_size, group * kv_heads, kv_heads, num_threads)
    return cpu_items.lay_out(batch.rows(), geometry, careful)


def assert_covers_what_is_visible_once(batch: Batch, items: Items) -> None:
    """Each key that a token sees is in one of its items, in the block where it lies; no other key is in any."""
    seen = [np.zeros(context, dtype=int) for context in batch.contexts[batch.row_of_token]]
    used = 0
    for first, count, line, begin, end, _ in items.fields.tolist():
        assert first == used, "items follow one another"
        used += count
        assert count >= 1
        assert begin < end
        for token, limit in zip(items.tokens[first:used].tolist(), items.limits[first:used].tolist(), strict=True):
            stop = min(end, limit)
            seen[token][begin : max(begin, stop)] += 1  # beyond the context, or twice: it shows
            assert stop <= len(seen[token])
            blocks = slice(begin // batch.block_size, -(-stop // batch.block_size))
            own = batch.lines[batch.row_of_token[token]]
            assert (batch.tables[line, blocks] == batch.tables[own, blocks]).all()
    assert used == len(items.tokens) == len(items.limits)
    for position, counts in zip(batch.positions.tolist(), seen, strict=True):
        assert (counts[: position + 1] == 1).all()
        assert (counts[position + 1 :] == 0).all()


def assert_parts_are_added_up(batch: Batch, items: Items) -> None:
    """A token's lines are partial if there are several, and each such token's are listed together, once."""
    is_partial = np.repeat(items.fields[:, 5], items.fields[:, 1])
    lines: dict[int, list[int]] = {}
    for line, token in enumerate(items.tokens.tolist()):
        lines.setdefault(token, []).append(line)
    assert sorted(lines) == list(range(len(batch.positions)))
    split = items.split_tokens.tolist()
    assert len(items.part_bounds) == len(split) + 1
    listed = {
        token: sorted(items.parts[begin:end].tolist())
        for token, begin, end in zip(split, items.part_bounds[:-1], items.part_bounds[1:], strict=True)
    }
    assert listed == {token: own for token, own in lines.items() if is_partial[own].any()}
    for own in lines.values():
        assert len(own) == 1 or is_partial[own].all()
    assert len(items.parts) == is_partial.sum() == sum(map(len, listed.values()))


class TestLayout:
    """What ``cpu_items`` makes of a step."""

    @examples(300)
    @given(
        batch=batches((16, 32, 48, 256)),
        heads=st.sampled_from(((1, 1), (3, 2), (8, 1), (5, 4), (64, 1))),
        num_threads=st.sampled_from((1, 2, 5, 64)),
        careful=st.booleans(),
        least=st.sampled_from((ONE_BLOCK, cpu_items.MIN_SHARED_TOKENS)),
    )
    def test_every_query_meets_every_key_it_sees_once(
        self, batch: Batch, heads: tuple[int, int], num_threads: int, careful: bool, least: int
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_items, "MIN_SHARED_TOKENS", least)
            items = lay_out(batch, *heads, num_threads, careful)
        assert_covers_what_is_visible_once(batch, items)
        assert_parts_are_added_up(batch, items)
        group, counts, begins = heads[0], items.fields[:, 1], items.fields[:, 3]
        assert (counts <= (1 if careful else TILE_ROWS // group)).all()
        assert (begins % LANES == 0).all(), "the kernel reads whole vectors"
        if careful:  # nobody comes near a value that it does not see
            assert (items.limits >= items.fields[:, 4]).all() or len(items.parts)

    @examples(300)
    @given(batch=batches((16, 32, 48, 256), is_decode=True), num_threads=st.sampled_from((1, 2, 5)))
    def test_what_sequences_share_is_read_once(self, batch: Batch, num_threads: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_items, "MIN_SHARED_TOKENS", ONE_BLOCK)
            items = lay_out(batch, 8, 2, num_threads)
        full = (batch.contexts - 1) // batch.block_size  # blocks before a row's query
        blocks = {block for line, count in zip(batch.lines, full, strict=True) for block in batch.tables[line, :count]}
        alone = (batch.contexts - full * batch.block_size).sum()
        assert (items.fields[:, 4] - items.fields[:, 3]).sum() == len(blocks) * batch.block_size + alone

    def test_nested_prefixes(self) -> None:
        """All share 2 blocks of 32 tokens, three of these 10; two others share one block, which is not worth it."""
        rows = [Row(None, 0, 320, 1), *[Row(0, 10, 7, 1)] * 2, Row(0, 2, 40, 1), Row(0, 2, 0, 1)]
        rows += [Row(None, 0, 32, 1), Row(5, 1, 3, 1)]
        batch = Batch(rows, 32)
        items = lay_out(batch, 2, 64, 1)
        shared = {}
        for first, count, _, begin, end, _ in items.fields.tolist():
            if count > 1:
                shared[begin, end] = items.tokens[first : first + count].tolist()
        assert shared == {(0, 64): [0, 1, 2, 3, 4], (64, 320): [0, 1, 2]}
        assert items.split_tokens.tolist() == [0, 1, 2, 3, 4]
        assert_covers_what_is_visible_once(batch, items)

    def test_a_beginning_that_is_too_short_for_all_is_part_of_what_some_share(self) -> None:
        batch = Batch([Row(None, 0, 130, 1), Row(0, 4, 9, 1), Row(0, 1, 60, 1)], 32)
        items = lay_out(batch, 2, 64, 1)
        tiles = [tuple(line[1:2] + line[3:5]) for line in items.fields.tolist()]
        assert Counter(tiles) == Counter([(2, 0, 128), (1, 128, 131), (1, 128, 138), (1, 0, 93)])

    def test_a_prefix_that_a_chunk_of_a_prompt_sees_is_read_once_a_tile(self) -> None:
        """32 queries a tile: 70 of one row and 1 of another are three tiles."""
        batch = Batch([Row(None, 0, 128, 70), Row(0, 8, 5, 1)], 16)
        items = lay_out(batch, 2, 8, 1)
        tiles = [tuple(line[1:2] + line[3:5]) for line in items.fields.tolist()]
        assert Counter(tiles) == Counter(
            [(32, 0, 128), (32, 0, 128), (7, 0, 128), (32, 128, 160), (32, 128, 192), (6, 128, 198), (1, 128, 134)]
        )

    @pytest.mark.parametrize(("num_threads", "parts"), [(1, 3), (2, 6), (5, 15), (1000, 40)])
    def test_a_long_context_is_cut_so_that_every_thread_has_work(self, num_threads: int, parts: int) -> None:
        batch = Batch([Row(None, 0, 5111, 1)], 16)
        items = lay_out(batch, 8, 1, num_threads)
        lengths = items.fields[:, 4] - items.fields[:, 3]
        assert len(lengths) in (parts, parts - 1)
        assert lengths.max() - lengths[:-1].min() == 0
        assert len(items.parts) == len(lengths)

    @pytest.mark.parametrize("rows", [[Row(None, 0, 100, 1)] * 6, [Row(None, 0, 0, 200)]])
    def test_what_is_work_for_all_is_not_cut(self, rows: list[Row]) -> None:
        assert not len(lay_out(Batch(rows, 16), 8, 8, 2).parts)

    def test_room_is_found_or_refused(self) -> None:
        items = lay_out(Batch([Row(None, 0, 1000, 1)], 16), 8, 1, 1)
        lines = len(items.tokens)
        assert lines == 3
        too_small, exact = Items.room_for(lines - 1), Items.room_for(lines)
        assert not too_small.take(items)
        assert exact.take(items)
        for mine, theirs in zip(exact.arrays(), items.arrays(), strict=True):
            assert np.array_equal(mine[: len(theirs)], theirs)


class World:
    """A step of both backends, on caches that hold the same tokens, and poison everywhere else.

    Args:
        batch: Its rows.
        loudness: Of the queries: the larger, the fewer keys have all of the weight.
        dtype: Of the ``cpu`` backend; the reference computes the same numbers in float32.
    """

    def __init__(
        self,
        batch: Batch,
        kv_heads: int,
        group: int,
        head_dim: int,
        dtype: torch.dtype,
        loudness: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.batch, self.loudness = batch, loudness
        self.random = torch.Generator().manual_seed(seed)
        heads = kv_heads * group
        spec = AttentionSpec(2, heads, kv_heads, head_dim, dtype, CPU, batch.block_size)
        self.dtype, self.layer = dtype, 1
        self.cpu = CpuAttention(spec)
        self.matmul = MatmulAttention(AttentionSpec(2, heads, kv_heads, head_dim, torch.float32, CPU, batch.block_size))
        self.cpu.allocate_cache(batch.num_blocks)
        self.matmul.allocate_cache(batch.num_blocks)
        for cache in (*self.cpu.layer(self.layer), self.matmul.cache):
            poison = torch.tensor([math.nan, math.inf, -math.inf], dtype=cache.dtype)
            cache.copy_(poison[torch.randint(3, cache.shape, generator=self.random)])
        histories = batch.contexts - batch.queries
        slots = np.unique(np.concatenate([batch.slots(row, np.arange(n)) for row, n in enumerate(histories)]))
        keys, values = (self.tensor(len(slots), kv_heads, head_dim) for _ in range(2))
        where = torch.from_numpy(slots)
        self.cpu.layout.store(*self.cpu.layer(self.layer), where, keys, values)
        block, offset = where // batch.block_size, where % batch.block_size
        for target, new in zip(self.matmul.cache[self.layer], (keys, values), strict=True):
            target[block, :, offset] = new.float()
        tokens = len(batch.positions)
        self.q = self.tensor(tokens, heads, head_dim, loudness)
        self.k, self.v = (self.tensor(tokens, kv_heads, head_dim) for _ in range(2))

    def tensor(self, tokens: int, heads: int, head_dim: int, loudness: float = 1.0) -> torch.Tensor:
        return (torch.randn(tokens, heads, head_dim, generator=self.random) * loudness).to(self.dtype)

    def actual(self) -> torch.Tensor:
        step = self.cpu.begin_step(self.batch.metadata())
        out = step.attend(self.layer, self.q, self.k, self.v)
        assert out.dtype == self.dtype
        assert out.is_contiguous()
        return out

    def expected(self, v: torch.Tensor | None = None) -> torch.Tensor:
        step = self.matmul.begin_step(self.batch.metadata())
        return step.attend(self.layer, self.q.float(), self.k.float(), (self.v if v is None else v).float())

    def assert_close(self, num_threads: int = 1) -> None:
        with threads(num_threads):
            actual = self.actual().float()
        expected = self.expected()
        cache = self.matmul.cache[self.layer, 1]
        cache.copy_(cache.abs())
        size = self.expected(self.v.abs())  # what the terms of each sum add up to
        bound = 1e-4 * self.loudness * size
        if self.dtype == torch.bfloat16:  # the weights are rounded, and so is the result
            bound += 2.0**-8 * (1.1 * size + expected.abs())
        assert actual.isfinite().all()
        assert ((actual - expected).abs() <= bound).all()


dtypes = st.sampled_from((torch.bfloat16, torch.float32))
head_dims = st.one_of(st.sampled_from((2, 64, 80, 128, 256)), st.integers(1, 128).map(lambda half: 2 * half))


class TestAgainstMatmul:
    """The kernel's results, whatever lies around the tokens that count."""

    @examples(80)
    @given(
        batch=batches((16, 32, 48, 256), longest=500),
        kv_heads=st.integers(1, 3),
        group=st.one_of(st.integers(1, 8), st.sampled_from((16, 64))),
        head_dim=head_dims,
        dtype=dtypes,
        loudness=st.sampled_from((1.0, 4.0)),
        num_threads=st.sampled_from((1, 1, 1, 2)),
        seed=st.integers(0, 1000),
    )
    def test_mixed_batches(self, batch, kv_heads, group, head_dim, dtype, loudness, num_threads, seed):
        World(batch, kv_heads, group, head_dim, dtype, loudness, seed).assert_close(num_threads)

    @examples(60)
    @given(
        batch=batches((16, 32, 48, 256), is_decode=True, longest=2500),
        kv_heads=st.integers(1, 2),
        group=st.integers(1, 8),
        head_dim=head_dims,
        dtype=dtypes,
        num_threads=st.sampled_from((1, 1, 1, 5)),
    )
    @example(Batch([Row(None, 0, 9000, 1)], 16), 1, 8, 64, torch.bfloat16, 5)
    @example(Batch([Row(None, 0, 9000, 1)], 256), 1, 1, 128, torch.float32, 2)
    def test_decode_steps_of_long_contexts(self, batch, kv_heads, group, head_dim, dtype, num_threads):
        World(batch, kv_heads, group, head_dim, dtype).assert_close(num_threads)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_the_largest_score_may_come_first_last_or_be_far_below_zero(self, dtype: torch.dtype) -> None:
        """Over several chunks of keys: the sums so far shrink to nothing, or what follows does."""
        batch = Batch([Row(None, 0, 999, 1), Row(None, 0, 470, 30)], 16)
        for place in (0, 500, 998):
            for sign in (1, -1):
                world = World(batch, 1, 2, 64, dtype)
                world.q.copy_(sign * world.q.abs())
                key = torch.full((1, 1, 64), 8.0, dtype=dtype)
                slot = torch.from_numpy(batch.slots(0, np.array([place])))
                zero = torch.zeros_like(key)
                world.cpu.layout.store(*world.cpu.layer(1), slot, key, zero)
                block, offset = slot // 16, slot % 16
                world.matmul.cache[1, 0][block, :, offset] = key.float()
                world.matmul.cache[1, 1][block, :, offset] = zero.float()
                world.loudness = 60.0
                world.assert_close()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_the_fused_kernel_leads_to_the_same(self, dtype: torch.dtype) -> None:
        """Norms of ones and rotations by nothing, so that it only stores."""
        batch = Batch([Row(None, 0, 100, 40), Row(0, 6, 9, 1)], 16)
        world = World(batch, 2, 3, 32, dtype)
        tokens = len(batch.positions)
        world.q, world.k = (F.rms_norm(x.float(), (32,), eps=0.0).to(dtype) for x in (world.q, world.k))
        step = world.cpu.begin_step(batch.metadata())
        fused = step.fused_store(1)
        assert fused is not None
        qkv = torch.cat([world.q, world.k, world.v], dim=1).flatten(1)
        ones, turn = torch.ones(32, dtype=dtype), (torch.ones(1, 16), torch.zeros(1, 16))
        q = fused.kernel(qkv, ones, ones, 0.0, *turn, torch.zeros(tokens, dtype=torch.int64), *fused.target, 6, 2)
        actual = step.attend_cached(1, q).float()
        assert (actual - world.expected()).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-4)


class TestOverflows:
    """What is not finite stays with those that see it."""

    BATCH = Batch([Row(None, 0, 200, 1), Row(0, 12, 5, 70), Row(None, 0, 0, 33), Row(0, 12, 30, 1)], 16)
    ROW, PLACE = 1, 41  # the token that overflows: one of the second row's queries

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("which", ["k", "v", "q"])
    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_earlier_tokens_and_other_sequences_are_as_they_were(
        self, value: float, which: str, dtype: torch.dtype
    ) -> None:
        for num_threads in (1, 2):
            with threads(num_threads):
                expected = World(self.BATCH, 2, 4, 64, dtype).actual()
                world = World(self.BATCH, 2, 4, 64, dtype)
                token = int(np.nonzero(self.BATCH.row_of_token == self.ROW)[0][self.PLACE])
                getattr(world, which)[token, 0, 9] = value
                actual = world.actual()
            sees = torch.zeros(len(actual), dtype=torch.bool)
            last = token if which == "q" else int(np.nonzero(self.BATCH.row_of_token == self.ROW)[0][-1])
            sees[token : last + 1] = True
            torch.testing.assert_close(actual[~sees], expected[~sees], rtol=1e-5, atol=1e-5)
            if which == "k":  # a weight is none, or nothing, by the sign of the query
                assert torch.equal(actual.isnan(), world.expected().isnan())
                assert actual[sees].isnan().any()
            else:
                heads = slice(0, 1 if which == "q" else 4)  # those of the first KV head
                assert not actual[sees][:, heads, 9].isfinite().any()
            torch.testing.assert_close(actual[sees][:, 4:], expected[sees][:, 4:], rtol=1e-5, atol=1e-5)

    def test_care_is_taken_in_the_step_that_needs_it_only(self) -> None:
        world = World(self.BATCH, 2, 4, 64, torch.bfloat16)
        world.v[3, 1, 0] = math.inf
        step = world.cpu.begin_step(self.BATCH.metadata())
        usual = len(step.items.fields)
        step.attend(1, world.q, world.k, world.v)
        assert len(step.items.fields) > 2 * usual
        step = world.cpu.begin_step(self.BATCH.metadata())
        step.attend(1, world.q, world.k, torch.zeros_like(world.v))
        assert len(step.items.fields) == usual

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_scores_that_are_infinite_or_hidden_are_no_numbers_as_in_torch(self, dtype: torch.dtype) -> None:
        """A softmax over nothing but minus infinity is none, over one plus infinity neither; one minus is left out."""
        batch = Batch([Row(None, 0, 0, 3)], 16)
        world = World(batch, 1, 1, 16, dtype)
        world.q.fill_(1)
        world.k.fill_(1)
        world.k[0, 0, 0] = -math.inf
        actual = world.actual()
        assert actual[0].isnan().all()
        torch.testing.assert_close(actual[1:], world.expected()[1:].to(dtype), rtol=0.02, atol=0.02)
        world.k[2, 0, 0] = math.inf
        actual = world.actual()
        assert actual[1].isfinite().all()
        assert actual[2].isnan().all()


class TestThreads:
    @pytest.mark.parametrize("number", [2, 5, 17])
    def test_more_threads_than_processors(self, number: int) -> None:
        """Each has memory of its own, and gets its share of the work or none."""
        batch = Batch([Row(None, 0, 1500, 1), Row(0, 60, 500, 1), Row(None, 0, 300, 50)], 16)
        with threads(number):
            world = World(batch, 2, 4, 64, torch.bfloat16)
            step = world.cpu.begin_step(batch.metadata())
            assert len(step.workspace.tiles) == number
            first = step.attend(1, world.q, world.k, world.v)
            for _ in range(10):
                assert torch.equal(step.attend_cached(1, world.q), first)
            world.assert_close()

    def test_more_threads_in_the_middle_of_nothing(self) -> None:
        """Their number is taken anew by each step."""
        batch = Batch([Row(None, 0, 700, 1)], 16)
        world = World(batch, 1, 4, 64, torch.float32)
        outs: list[Any] = []
        for number in (1, 5, 2, 1):
            with threads(number):
                outs.append(world.actual())
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-5)


class TestLimits:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"head_dim": 33}, "head_dim 33 is not an even number up to 256"),
            ({"head_dim": 258}, "head_dim 258 is not an even number up to 256"),
            ({"block_size": 24}, "block_size 24 is not a multiple of 16"),
            ({"dtype": torch.float16}, "dtype torch.float16 is not bfloat16 or float32"),
            ({"num_heads": 65, "num_kv_heads": 1}, "65 query heads share a key-value head; at most 64 may"),
            ({"device": torch.device("mps")}, "its kernels are for the CPU, not for mps"),
            ({}, None),
            ({"block_size": None}, None),
            ({"num_heads": 64, "num_kv_heads": 1, "head_dim": 256}, None),
        ],
    )
    def test_what_it_does_not_serve_is_told(self, changes: dict[str, Any], reason: str | None) -> None:
        spec = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16, "device": CPU}
        assert CpuAttention.why_not(AttentionSpec(**{"num_layers": 2, "block_size": 16, **spec, **changes})) == reason

    def test_bytes_of_a_token_are_those_of_the_cache(self) -> None:
        for head_dim, dtype in ((2, torch.bfloat16), (64, torch.float32), (80, torch.bfloat16)):
            backend = CpuAttention(AttentionSpec(3, 4, 2, head_dim, dtype, CPU, 16))
            backend.allocate_cache(5)
            cache = backend.kv_cache()
            assert len(cache) == 3
            assert sum(tensor.nbytes for layer in cache for tensor in layer) == 5 * 16 * backend.bytes_per_token()
