"""Attention by plain matrix products: no kernel of our own and none of torch's fused ones, so it runs anywhere.

It is the backend of Apple MPS, whose fused attention gives wrong results for one query and many keys, and everybody's
reference. Three cases:

- no cache (the profiling run) and prompts without history attend to the keys and values just computed;
- rows with history gather their blocks from the cache;
- decode rows are gathered and multiplied together, rows of similar context length in one batch.

Keys and values are stored head-major, ``[blocks, kv_heads, block_size, head_dim]``: gathering (block, head) pairs
then yields each head's keys in one piece, ready for a batched product. The query heads that share a KV head are the
rows of one product, so that no head is ever repeated in memory.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.attention.base import AttentionBackend, AttentionMetadata, AttentionSpec, AttentionStep
from nanovllm.utils.transfer import upload

# float32 scores that exist at a time in a prefill (64 MiB): longer prompts attend in slices of their queries.
MAX_SCORES = 1 << 24
# Elements of keys that decode rows gather at a time (128 MiB in bfloat16), and as many of values.
MAX_GATHERED = 1 << 26
# Decode rows share a batch while the shortest context is at least this share of the longest, which pads it.
MIN_FILL = 0.8


class MatmulAttention(AttentionBackend):
    """The ``matmul`` backend: any device, floating-point dtype, head size and block size."""

    name = "matmul"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.cache: torch.Tensor | None = None  # [layers, 2, blocks, kv_heads, block_size, head_dim]
        # Only the CPU may look at numbers between two operations: elsewhere the host would wait for the device.
        self.can_look = spec.device.type == "cpu"
        self.takes_offsets = spec.device.type != "mps"  # index_select copies a view that begins inside its storage

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> str | None:
        return None if spec.dtype.is_floating_point else f"dtype {spec.dtype} is not a floating-point type"

    def allocate_cache(self, num_blocks: int) -> None:
        spec = self.spec
        shape = (spec.num_layers, 2, num_blocks, spec.num_kv_heads, self.block_size, spec.head_dim)
        # Not zeroed: that would touch all of it at once, and what lies beyond a context is masked in any case.
        self.cache = torch.empty(shape, dtype=spec.dtype, device=spec.device)

    def begin_step(self, metadata: AttentionMetadata) -> "MatmulStep":
        return MatmulStep(self, metadata)

    def kv_cache(self) -> torch.Tensor | None:
        return self.cache


@dataclass(slots=True)
class _PrefillRow:
    """A row of several queries, or of one without history."""

    tokens: slice  # of the step
    start: int  # position of its first query
    gather: torch.Tensor | None  # [kv_heads * blocks]: (block, head) pairs of its context; None without history


@dataclass(slots=True)
class _DecodeGroup:
    """Rows of one query each, of similar context length, that share a batched product."""

    tokens: torch.Tensor  # [rows]: their tokens in the step
    gather: torch.Tensor  # [rows * kv_heads * blocks]: (block, head) pairs
    beyond: torch.Tensor  # [rows, 1, 1, length] bool: positions past the row's context


class MatmulStep(AttentionStep):
    """One step of the ``matmul`` backend."""

    def __init__(self, backend: MatmulAttention, metadata: AttentionMetadata) -> None:
        self.backend = backend
        self.spec = backend.spec
        self.prefills: list[_PrefillRow] = []
        self.decodes: list[_DecodeGroup] = []
        tables = self._tables(metadata)
        decode_rows: list[tuple[int, int, int]] = []  # (context length, row, token)
        token = 0
        for row, (length, context) in enumerate(zip(metadata.query_lengths, metadata.context_lengths, strict=True)):
            if length == 1 and context > 1 and backend.cache is not None:
                decode_rows.append((context, row, token))
            else:
                gather = self._gather_index(tables[row : row + 1], context) if context > length else None
                self.prefills.append(_PrefillRow(slice(token, token + length), context - length, gather))
            token += length
        self._group_decodes(decode_rows, tables)
        if backend.cache is not None:
            # [tokens, kv_heads] rows of the cache seen as [blocks * kv_heads * block_size, head_dim]
            slots, offsets = metadata.slot_mapping, metadata.offsets
            if offsets is None:
                offsets = slots % backend.block_size
            first = (slots - offsets) * self.spec.num_kv_heads + offsets  # of each token: that of its first head
            self.write_index = (first[:, None] + self._heads() * backend.block_size).flatten()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = k, v  # without a cache every row attends to the step's own
        if self.backend.cache is not None:
            keys, values = self.backend.cache[layer]
            for cache, new in ((keys, k), (values, v)):
                # assignment rather than index_copy_, which MPS has only since torch 2.8, and slowly
                cache.view(-1, self.spec.head_dim)[self.write_index] = new.reshape(-1, self.spec.head_dim)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        # Masked positions get weight 0, but 0 times infinity is NaN: an overflow must not reach the tokens before it,
        # whose keys and values others may share.
        overflow = bool(self.prefills) and not (self.backend.can_look and bool(v.isfinite().all()))
        for row in self.prefills:
            if row.gather is None:
                row_keys, row_values = k[row.tokens].transpose(0, 1), v[row.tokens].transpose(0, 1)
            else:
                length = row.start + row.tokens.stop - row.tokens.start
                row_keys, row_values = (
                    self._gathered(cache, row.gather, self.spec.num_kv_heads)[:, :length] for cache in (keys, values)
                )
            self._prefill(q[row.tokens], row_keys, row_values, row.start, out[row.tokens], overflow)
        for group in self.decodes:
            out[group.tokens] = self._decode(q.index_select(0, group.tokens), keys, values, group)
        return out

    def _prefill(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int,
        out: torch.Tensor,
        overflow: bool,
    ) -> None:
        """Attend queries at positions ``start, start + 1, ...`` to keys and values [kv_heads, context, head_dim].

        ``overflow`` says that values may be infinite or NaN.
        """
        spec = self.spec
        group = spec.num_heads // spec.num_kv_heads
        step = max(1, MAX_SCORES // (spec.num_heads * keys.shape[1]))
        for first in range(0, q.shape[0], step):
            queries = q[first : first + step]
            n, length = (
                queries.shape[0],
                start + first + queries.shape[0],
            )  # later keys are masked for all of them
            # the query heads of a KV head are rows of one product: [kv_heads, group * n, head_dim]
            queries = queries.view(n, spec.num_kv_heads, group, spec.head_dim).permute(1, 2, 0, 3)
            queries = queries.reshape(spec.num_kv_heads, group * n, spec.head_dim)
            scores = self._scores(queries, keys[:, :length])
            scores = scores.view(spec.num_kv_heads, group, n, length)
            positions = torch.arange(length, device=q.device)
            future = positions[None, :] > positions[length - n :, None]
            scores.masked_fill_(future, float("-inf"))
            weights = torch.softmax(scores, dim=-1).to(values.dtype).view(spec.num_kv_heads, group * n, length)
            visible = values[:, :length]
            bad = ~visible.isfinite().all(dim=-1) if overflow else None  # [kv_heads, length]
            if bad is not None:
                visible = visible.masked_fill(bad[..., None], 0)
            attended = torch.matmul(weights, visible).view(spec.num_kv_heads, group, n, spec.head_dim)
            if bad is not None:  # those that may see a bad position answer NaN, as they should
                sees = bad.float().cumsum(dim=-1)[:, length - n :] > 0
                attended.masked_fill_(sees[:, None, :, None], float("nan"))
            out[first : first + n].view(n, spec.num_kv_heads, group, spec.head_dim).copy_(attended.permute(2, 0, 1, 3))

    def _decode(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: _DecodeGroup) -> torch.Tensor:
        """Attend one query a row, q [rows, num_heads, head_dim], to the rows' cached contexts."""
        spec, rows = self.spec, q.shape[0]
        pairs = rows * spec.num_kv_heads
        queries = q.reshape(pairs, spec.num_heads // spec.num_kv_heads, spec.head_dim)
        scores = self._scores(queries, self._gathered(keys, group.gather, pairs))
        scores = scores.view(rows, spec.num_kv_heads, queries.shape[1], -1)
        weights = torch.softmax(scores.masked_fill_(group.beyond, float("-inf")), dim=-1).to(values.dtype)
        weights = weights.view(pairs, queries.shape[1], -1)
        context = self._gathered(values, group.gather, pairs)
        # Positions past a context hold what some earlier sequence left, or nothing yet. Their weight is 0, but times an
        # infinity that is NaN. On the CPU a look at the small product is cheaper than to clear them every time.
        attended = torch.bmm(weights, context) if self.backend.can_look else None
        if attended is None or not attended.isfinite().all():
            beyond = group.beyond.transpose(2, 3)  # [rows, 1, length, 1]
            context.view(rows, spec.num_kv_heads, -1, spec.head_dim).masked_fill_(beyond, 0)
            attended = torch.bmm(weights, context)
        return attended.view(rows, spec.num_heads, spec.head_dim)

    def _scores(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Scaled products of queries [pairs, n, head_dim] and keys [pairs, length, head_dim], at least in float32."""
        scale = self.backend.scale
        if queries.dtype == torch.float16:  # its largest number is 65,504: scale before the product is rounded to it
            exact = 2.0 ** math.floor(math.log2(scale))
            queries, scale = queries * exact, scale / exact
        scores = torch.bmm(queries, keys.transpose(1, 2))
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale)

    def _gathered(self, cache: torch.Tensor, index: torch.Tensor, pairs: int) -> torch.Tensor:
        """A copy of the (block, head) pairs ``index``: [pairs, positions, head_dim]."""
        flat = cache.view(-1, self.backend.block_size * self.spec.head_dim)
        gathered = flat.index_select(0, index) if self.backend.takes_offsets else flat[index]
        return gathered.view(pairs, -1, self.spec.head_dim)

    def _tables(self, metadata: AttentionMetadata) -> torch.Tensor:
        """The rows' block tables, int64 [rows, blocks], as wide as the longest context needs."""
        width = -(-max(metadata.context_lengths) // self.backend.block_size)
        tables = metadata.block_tables[:, :width]
        return (tables if metadata.slots is None else tables[metadata.slots]).long()

    def _heads(self) -> torch.Tensor:
        return torch.arange(self.spec.num_kv_heads, device=self.spec.device)

    def _gather_index(self, tables: torch.Tensor, context: int) -> torch.Tensor:
        """Pairs that hold the first ``context`` tokens of the rows of ``tables``: [rows * kv_heads * blocks]."""
        blocks = tables[:, : -(-context // self.backend.block_size)]
        return (blocks[:, None, :] * self.spec.num_kv_heads + self._heads()[None, :, None]).flatten()

    def _group_decodes(self, rows: list[tuple[int, int, int]], all_tables: torch.Tensor) -> None:
        rows.sort(reverse=True)
        device, block_size = self.spec.device, self.backend.block_size
        while rows:
            longest = rows[0][0]
            # short contexts are always worth batching: their products cost less than another launch of each operation
            end = next((i for i, row in enumerate(rows) if row[0] < MIN_FILL * longest - 2 * block_size), len(rows))
            end = min(end, max(1, MAX_GATHERED // (longest * self.spec.num_kv_heads * self.spec.head_dim)))
            members, rows = rows[:end], rows[end:]
            contexts, lines, tokens = upload(list(np.array(members).T), device)
            padded = -(-longest // block_size) * block_size
            beyond = torch.arange(padded, device=device)[None, :] >= contexts[:, None]  # [rows, padded]
            # A released slot's table may name any block: whatever is beyond the context is masked.
            self.decodes.append(
                _DecodeGroup(
                    tokens=tokens,
                    gather=self._gather_index(all_tables[lines], longest),
                    beyond=beyond[:, None, None, :],
                )
            )
