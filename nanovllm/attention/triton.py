"""Attention by our own Triton kernels over the paged cache: NVIDIA GPUs from Ampere (sm_80) on.

Rows of one query each go to one kernel, which splits long contexts, and rows of several to another. Both read keys and
values from the cache, into which the step's own are written first. Keys and values are stored head-major, ``[blocks,
kv_heads, block_size, head_dim]``: a head's keys in a block are one piece of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nanovllm import kernels
from nanovllm.attention.base import (
    AttentionBackend,
    AttentionMetadata,
    AttentionSpec,
    AttentionStep,
    CacheTarget,
    DecodeMetadata,
    FusedStore,
    packed_heads,
)
from nanovllm.kernels import is_interpreted, why_no_triton
from nanovllm.utils.transfer import to_device

if TYPE_CHECKING:  # Triton is imported when a backend is made
    from nanovllm.kernels.decode_work import DecodeWork


Layers = list[tuple[torch.Tensor, torch.Tensor]]


class TritonAttention(AttentionBackend):
    """The ``triton`` backend: float32, float16 and bfloat16, heads of 64 to 256, blocks of a power of two."""

    name = "triton"
    # A tile of keys then lies in one block, which is looked up once: an H200 reads 4.1 TB/s of 256 contexts of 600, 3.8
    # in blocks of 16 (and tiles of 64). Larger blocks would make shared beginnings of prompts shorter.
    default_block_size = 32
    can_capture = True

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.fused_store = kernels.load("qk_norm_rope_store", spec.device)
        self.fused_attend = kernels.load("decode_few_rows", spec.device)
        from nanovllm.kernels import decode_few_rows, decode_work, paged_decode, paged_prefill, store_kv

        self.plan_decode = decode_work.plan_decode
        self.decode_kernels, self.prefill_kernels, self.store_kernels = paged_decode, paged_prefill, store_kv
        self.few_rows_kernels = decode_few_rows
        self.few_rows_suit = decode_few_rows.suits(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.dtype)
        self.queries_per_tile = paged_prefill.queries_per_tile(
            spec.dtype, spec.num_heads, spec.num_kv_heads, spec.head_dim
        )
        self.cache: torch.Tensor | None = None  # [layers, 2, blocks, kv_heads, block_size, head_dim]
        self.layers: Layers = []  # its keys and values, taken apart once

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> str | None:
        reason = why_no_triton(spec.device)
        if reason is not None:
            return reason
        if spec.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"dtype {spec.dtype} is not float32, float16 or bfloat16"
        if is_interpreted() and spec.dtype == torch.bfloat16:
            return "triton's interpreter multiplies no bfloat16"
        smallest = 8 if is_interpreted() else 64
        if spec.head_dim % 8 or not smallest <= spec.head_dim <= 256:
            return f"head_dim {spec.head_dim} is not a multiple of 8 from {smallest} to 256"
        block_size = spec.block_size
        if block_size is not None and (block_size < 16 or block_size & (block_size - 1)):
            return f"block_size {block_size} is not a power of two of at least 16"
        return None

    def allocate_cache(self, num_blocks: int) -> None:
        # Not zeroed: that would touch all of it at once, and what lies beyond a context is never read.
        self.cache = self._new_cache(self.spec.num_layers, num_blocks)
        self.layers = [(keys, values) for keys, values in self.cache]

    def _new_cache(self, num_layers: int, num_blocks: int) -> torch.Tensor:
        spec = self.spec
        shape = (num_layers, 2, num_blocks, spec.num_kv_heads, self.block_size, spec.head_dim)
        return torch.empty(shape, dtype=spec.dtype, device=spec.device)

    def begin_step(self, metadata: AttentionMetadata) -> TritonStep:
        if self.cache is None:
            return self._begin_without_cache(metadata)
        return self._begin(metadata, self.layers)

    def begin_decode(self, metadata: DecodeMetadata) -> TritonStep:
        assert self.cache is not None
        max_context = metadata.block_tables.shape[1] * self.block_size
        whole = self._attends_whole(len(metadata.slots))
        work = self._plan_decode(metadata.context_lengths, metadata.slots, None, max_context, whole)
        return TritonStep(self, self.layers, metadata.block_tables, metadata.slot_mapping, decode=work, whole=whole)

    def warm_up(self) -> None:
        spec = self.spec
        for rows in (1, 65):  # planned by two variants
            numbers = torch.zeros(rows, dtype=torch.int32, device=spec.device)
            work = self._plan_decode(numbers, numbers, numbers, self.block_size)
        # Few rows, which have a kernel of their own, need this one as soon as others prefill beside them.
        q = torch.zeros(1, spec.num_heads, spec.head_dim, dtype=spec.dtype, device=spec.device)
        out = torch.empty_like(q)
        self.decode_kernels.paged_decode(q, *self.layers[0], numbers.view(1, -1), work, self.scale, out)

    def kv_cache(self) -> torch.Tensor | None:
        return self.cache

    def _attends_whole(self, rows: int) -> bool:
        """Whether a step of decode rows alone is for the kernel that does all of a layer's attention."""
        return self.fused_attend is not None and rows <= kernels.FEW_ROWS and self.few_rows_suit

    def _plan_decode(
        self,
        context_lengths: torch.Tensor,
        slots: torch.Tensor,
        tokens: torch.Tensor | None,
        max_context: int,
        whole: bool = False,
    ) -> DecodeWork:
        spec = self.spec
        sizes = (max_context, spec.num_heads, spec.num_kv_heads, spec.head_dim)
        item_tokens = self.few_rows_kernels.TILE if whole else None
        return self.plan_decode(context_lengths, slots, tokens, *sizes, item_tokens)

    def _begin(self, metadata: AttentionMetadata, layers: Layers) -> TritonStep:
        """Plan a step of rows with known lengths, with one copy to the device."""
        queries = np.array(metadata.query_lengths, dtype=np.int32)
        contexts = np.array(metadata.context_lengths, dtype=np.int32)
        tokens = np.cumsum(queries, dtype=np.int32) - queries  # each row's first in the step
        decodes, prefills = np.nonzero(queries == 1)[0], np.nonzero(queries > 1)[0]
        tiles = self.prefill_kernels.plan_prefill(
            queries[prefills], contexts[prefills], tokens[prefills], prefills, self.queries_per_tile
        )
        # What begins on a multiple of four numbers is aligned to 16 bytes, for which the kernels are compiled.
        padding = np.zeros(-len(decodes) % 4, dtype=np.int32)
        pieces = [contexts[decodes], padding, tokens[decodes], padding, decodes, padding, tiles.ravel()]
        numbers = to_device(np.concatenate(pieces), torch.int32, self.spec.device)
        count, padded = len(decodes), len(decodes) + len(padding)
        step = TritonStep(self, layers, metadata.block_tables, metadata.slot_mapping, slots=metadata.slots)
        if count > 0:
            context_lengths, decode_tokens, rows = (numbers[i * padded :][:count] for i in range(3))
            slots = rows if metadata.slots is None else metadata.slots.index_select(0, rows).to(torch.int32)
            longest = int(contexts[decodes].max())
            step.whole = len(prefills) == 0 and self._attends_whole(count)
            step.decode = self._plan_decode(context_lengths, slots, decode_tokens, longest, step.whole)
        if len(prefills) > 0:
            step.tiles = numbers[3 * padded :].view(4, -1)
        return step

    def _begin_without_cache(self, metadata: AttentionMetadata) -> TritonStep:
        """Before there is a cache, one as large as the step serves all layers, each after the other."""
        lengths, size = metadata.query_lengths, self.block_size
        blocks = [-(-length // size) for length in lengths]
        firsts = np.cumsum(blocks) - blocks
        tables = firsts[:, None] + np.arange(max(blocks))
        places = [first * size + np.arange(length) for first, length in zip(firsts, lengths, strict=True)]
        step_metadata = AttentionMetadata(
            lengths,
            lengths,
            to_device(tables, torch.int32, self.spec.device),
            to_device(np.concatenate(places), torch.int64, self.spec.device),
        )
        keys, values = self._new_cache(1, sum(blocks))[0]
        return self._begin(step_metadata, [(keys, values)] * self.spec.num_layers)


class TritonStep(AttentionStep):
    """One step of the ``triton`` backend.

    Args:
        backend: Whose step it is.
        layers: Each layer's keys and values, [blocks, kv_heads, block_size, head_dim].
        block_tables: [lines, blocks], int32 or int64.
        slot_mapping: [tokens], int64.
        slots: [rows]: the lines that the tiles' rows have in ``block_tables``; None if row i has line i.
        decode: The rows of one query, planned; None if there are none.
        whole: Whether there are no others, and they are for the kernel that does all of a layer's attention.
    """

    def __init__(
        self,
        backend: TritonAttention,
        layers: Layers,
        block_tables: torch.Tensor,
        slot_mapping: torch.Tensor,
        slots: torch.Tensor | None = None,
        decode: DecodeWork | None = None,
        whole: bool = False,
    ) -> None:
        self.backend, self.layers, self.decode, self.whole = backend, layers, decode, whole
        self.block_tables, self.slot_mapping, self.slots = block_tables, slot_mapping, slots
        self.tiles: torch.Tensor | None = None  # [4, tiles], of rows of several queries

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.backend.store_kernels.store_kv(packed_heads(k), packed_heads(v), *self.target(layer))
        return self.attend_cached(layer, q)

    def fused_store(self, layer: int) -> FusedStore | None:
        kernel = self.backend.fused_store
        return None if kernel is None else FusedStore(kernel, self.target(layer))

    def fused_attend(self, layer: int) -> Callable[..., torch.Tensor] | None:
        kernel = self.backend.fused_attend
        if kernel is None or not self.whole:
            return None
        given = (*self.target(layer), self.block_tables, self.decode, self.backend.scale)

        def attend(qkv: torch.Tensor, *norms_and_rotation: Any, num_heads: int, num_kv_heads: int) -> torch.Tensor:
            return kernel(qkv, *norms_and_rotation, *given, num_heads, num_kv_heads)

        return attend

    def target(self, layer: int) -> CacheTarget:
        """Where the layer's keys and values go."""
        return CacheTarget(*self.layers[layer], self.slot_mapping)

    def attend_cached(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        backend, q = self.backend, packed_heads(q)
        keys, values = self.layers[layer]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if self.decode is not None:
            backend.decode_kernels.paged_decode(q, keys, values, self.block_tables, self.decode, backend.scale, out)
        if self.tiles is not None:
            backend.prefill_kernels.paged_prefill(
                q, keys, values, self.block_tables, self.slots, self.tiles, backend.scale, out
            )
        return out
