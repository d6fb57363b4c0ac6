"""Attention on the CPU by kernels of our own, which read each cached key and value once, where it lies.

``nanovllm/kernels/cpu/paged_attention.py`` computes; here its work is laid out: which queries go through which stretch
of the cache together.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from nanovllm import kernels
from nanovllm.attention.base import (
    AttentionBackend,
    AttentionMetadata,
    AttentionSpec,
    AttentionStep,
    FusedStore,
    packed_heads,
)
from nanovllm.attention.matmul import MatmulAttention

# Tokens that sequences have in common from which on they go through them together.
MIN_SHARED_TOKENS = 64
# Tasks a thread at least, if the contexts are long enough to be cut.
TASKS_A_THREAD = 3


class CpuAttention(AttentionBackend):
    """The ``cpu`` backend: bfloat16 and float32, even head sizes up to 256, block sizes that 16 divides."""

    name = "cpu"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        from nanovllm.kernels.cpu import kv_cache, paged_attention

        self.layout, self.kernels = kv_cache, paged_attention
        self.fused_store = kernels.load("qk_norm_rope_store", spec.device, spec.dtype)
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # a layer's keys and values
        self.overflow = torch.zeros(1, dtype=torch.int32)  # set by the kernel that stores a value which is not finite

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"its kernels are for the CPU, not for {spec.device.type}"
        if spec.dtype not in (torch.bfloat16, torch.float32):
            return f"dtype {spec.dtype} is not bfloat16 or float32"
        if spec.head_dim % 2 or spec.head_dim > 256:
            return f"head_dim {spec.head_dim} is not an even number up to 256"
        if spec.block_size is not None and spec.block_size % 16:
            return f"block_size {spec.block_size} is not a multiple of 16"
        if spec.num_heads // spec.num_kv_heads > 64:
            return f"{spec.num_heads // spec.num_kv_heads} query heads share a key-value head; at most 64 may"
        return kernels.why_no_cpu_kernels()

    def allocate_cache(self, num_blocks: int) -> None:
        spec = self.spec
        shapes = self.layout.cache_shapes(num_blocks, spec.num_kv_heads, self.block_size, spec.head_dim, spec.dtype)
        # Not zeroed: that would touch all of it at once, and what lies beyond a context is never used.
        self.cache = [
            (torch.empty(shapes[0], dtype=spec.dtype), torch.empty(shapes[1], dtype=spec.dtype))
            for _ in range(spec.num_layers)
        ]

    def bytes_per_token(self) -> int:
        spec = self.spec
        elements = spec.head_dim + self.layout.value_columns(spec.head_dim)
        return spec.num_layers * spec.num_kv_heads * elements * spec.dtype.itemsize

    def begin_step(self, metadata: AttentionMetadata) -> AttentionStep:
        if self.cache is None:
            return MatmulAttention(self.spec).begin_step(metadata)
        return CpuStep(self, metadata)

    def kv_cache(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        return self.cache


class CpuStep(AttentionStep):
    """One step of the ``cpu`` backend."""

    def __init__(self, backend: CpuAttention, metadata: AttentionMetadata) -> None:
        self.backend, self.spec = backend, backend.spec
        self.slot_mapping = metadata.slot_mapping
        self.block_tables = metadata.block_tables.to(torch.int32).contiguous()
        self.queries = np.array(metadata.query_lengths, dtype=np.int64)
        self.contexts = np.array(metadata.context_lengths, dtype=np.int64)
        rows = len(self.queries)
        self.lines = np.arange(rows) if metadata.slots is None else metadata.slots.numpy()
        self.first_tokens = np.cumsum(self.queries) - self.queries
        self.is_decode = bool((self.queries == 1).all())
        backend.overflow.zero_()
        group = self.spec.num_heads // self.spec.num_kv_heads
        self.items = self._plan(backend.kernels.TILE_ROWS // group)
        self._careful_items: Any = None

    def fused_store(self, layer: int) -> FusedStore | None:
        kernel = self.backend.fused_store
        if kernel is None:
            return None
        assert self.backend.cache is not None
        return FusedStore(kernel, (*self.backend.cache[layer], self.slot_mapping, self.backend.overflow))

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert self.backend.cache is not None
        keys, values = self.backend.cache[layer]
        block, offset = self.slot_mapping // self.backend.block_size, self.slot_mapping % self.backend.block_size
        pair = keys.shape[-1]
        keys[block, :, :, offset] = k.unflatten(2, (-1, pair))
        values[block, :, offset // pair, : self.spec.head_dim, offset % pair] = v
        if not v.isfinite().all():
            self.backend.overflow.fill_(1)
        return self.attend_cached(layer, packed_heads(q).contiguous())

    def attend_cached(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        assert self.backend.cache is not None
        items = self.items
        if not self.is_decode and int(self.backend.overflow):
            # A weight of 0 times a value that is not finite is NaN: no query may come near one that it does not see.
            if self._careful_items is None:
                self._careful_items = self._plan(queries_an_item=1)
            items = self._careful_items
        keys, values = self.backend.cache[layer]
        return self.backend.kernels.paged_attention(q, keys, values, self.block_tables, items, self.backend.scale)

    def _plan(self, queries_an_item: int) -> Any:
        """Lay out the step's work in items of at most so many queries."""
        block_size = self.backend.block_size
        spans: list[tuple[list[int], int, int]] = []  # sequences that see a stretch of keys together: whole blocks
        starts = np.zeros(len(self.queries), dtype=np.int64)  # of what each sequence sees alone
        for rows, begin, end in self._shared():
            spans.append((rows, begin * block_size, end * block_size))
            starts[rows] = end * block_size
        pieces: list[tuple[np.ndarray, np.ndarray, int, int, int]] = []  # tokens, limits, line, first key, end
        for rows, begin, end in spans:
            tokens = np.concatenate([np.arange(self.queries[row]) + self.first_tokens[row] for row in rows])
            for some in _cut(tokens, queries_an_item):
                pieces.append((some, np.full(len(some), end), int(self.lines[rows[0]]), begin, end))
        if self.is_decode:
            tokens_of_rows = self.first_tokens
            for row, context in enumerate(self.contexts.tolist()):
                some = tokens_of_rows[row : row + 1]
                pieces.append((some, self.contexts[row : row + 1], int(self.lines[row]), int(starts[row]), context))
        else:
            for row, (count, context) in enumerate(zip(self.queries.tolist(), self.contexts.tolist(), strict=True)):
                for some in _cut(np.arange(count), queries_an_item):
                    limits = context - count + some + 1
                    tokens = some + self.first_tokens[row]
                    pieces.append((tokens, limits, int(self.lines[row]), int(starts[row]), int(limits[-1])))
        return self._items(self._split_keys(pieces))

    def _shared(self) -> Iterator[tuple[list[int], int, int]]:
        """Sequences whose tables name the same blocks: (rows, first block, end); all their queries see these."""
        if len(self.queries) < 2:
            return
        tables = self.block_tables.numpy()
        visible = (self.contexts - self.queries) // self.backend.block_size  # blocks before a row's first query
        least = -(-MIN_SHARED_TOKENS // self.backend.block_size)
        groups = [(list(range(len(self.queries))), 0, 0)]  # rows equal up to a block, and what is reported of them
        while groups:
            rows, reported, begin = groups.pop()
            by_block: dict[int, list[int]] = {}
            for row in rows:
                if visible[row] >= max(begin + 1, reported + least):
                    by_block.setdefault(int(tables[self.lines[row], begin]), []).append(row)
            for members in by_block.values():
                if len(members) < 2:
                    continue
                stretch = tables[self.lines[members], begin : visible[members].min()]
                differs = (stretch != stretch[0]).any(axis=0)
                end = begin + (int(differs.argmax()) if differs.any() else stretch.shape[1])
                if end - reported >= least:
                    yield members, reported, end
                    groups.append((members, end, end))
                else:
                    groups.append((members, reported, end))

    def _split_keys(
        self, pieces: list[tuple[np.ndarray, np.ndarray, int, int, int]]
    ) -> list[tuple[np.ndarray, np.ndarray, int, int, int]]:
        """Cut long stretches of keys where there is too little work to go round."""
        wanted = TASKS_A_THREAD * torch.get_num_threads()
        cuts = -(-wanted // max(1, len(pieces) * self.spec.num_kv_heads))
        if cuts == 1:
            return pieces
        chunk = self.backend.kernels.CHUNK
        result = []
        for tokens, limits, line, begin, end in pieces:
            step = max(1, math.ceil((end - begin) / cuts / chunk)) * chunk
            for first in range(begin, end, step):
                result.append((tokens, limits, line, first, min(end, first + step)))
        return result

    def _items(self, pieces: list[tuple[np.ndarray, np.ndarray, int, int, int]]) -> Any:
        """The arrays that the kernel reads."""
        tokens = np.concatenate([piece[0] for piece in pieces]).astype(np.int32)
        limits = np.concatenate([piece[1] for piece in pieces]).astype(np.int32)
        counts = np.array([len(piece[0]) for piece in pieces])
        lines_a_token = np.bincount(tokens)
        of_item = np.repeat(np.arange(len(pieces)), counts)
        partial = np.zeros(len(pieces), dtype=np.int64)
        partial[of_item[lines_a_token[tokens] > 1]] = 1
        fields = np.column_stack(
            [
                np.cumsum(counts) - counts,
                counts,
                np.array([piece[2:5] for piece in pieces]).reshape(-1, 3),
                partial,
            ]
        ).astype(np.int64)
        parts = np.nonzero(partial[of_item])[0]
        parts = parts[np.argsort(tokens[parts], kind="stable")].astype(np.int32)
        split_tokens, part_counts = np.unique(tokens[parts], return_counts=True)
        bounds = np.concatenate([[0], np.cumsum(part_counts)]).astype(np.int32)
        return self.backend.kernels.Items(fields, tokens, limits, parts, bounds, split_tokens.astype(np.int32))


def _cut(array: np.ndarray, length: int) -> Iterator[np.ndarray]:
    for first in range(0, len(array), length):
        yield array[first : first + length]
