"""Attention by the package ``flash_attn`` (Dao, FlashAttention-2, 2023), whose kernels read the paged cache themselves.

They want it token-major, ``[blocks, block_size, kv_heads, head_dim]``, in blocks of a multiple of 256 tokens. Keys and
values are written into it by our own Triton kernel.
"""

from importlib.util import find_spec

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
from nanovllm.kernels import why_no_triton
from nanovllm.utils.transfer import to_device

PAGE_SIZE = 256


class FlashAttention(AttentionBackend):
    """The ``flash_attn`` backend: float16 and bfloat16 on NVIDIA GPUs from Ampere on, blocks of 256 tokens."""

    name = "flash_attn"
    default_block_size = PAGE_SIZE
    can_capture = True

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.fused_store = kernels.load("qk_norm_rope_store", spec.device)
        import flash_attn

        from nanovllm.kernels import store_kv

        self.flash_attn, self.store_kernels = flash_attn, store_kv
        self.cache: torch.Tensor | None = None  # [layers, 2, blocks, block_size, kv_heads, head_dim]

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> str | None:
        if spec.device.type != "cuda":
            return f"flash_attn has no kernels for {spec.device.type}"
        if find_spec("flash_attn") is None:
            return "the package flash_attn is not installed"
        return why_no_triton(spec.device) or cls._why_not_shape(spec)  # both need Ampere or newer

    @staticmethod
    def _why_not_shape(spec: AttentionSpec) -> str | None:
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"dtype {spec.dtype} is not float16 or bfloat16"
        if spec.head_dim % 8 or spec.head_dim > 256:
            return f"head_dim {spec.head_dim} is not a multiple of 8 up to 256"
        if spec.block_size is not None and spec.block_size % PAGE_SIZE:
            return f"block_size {spec.block_size} is not a multiple of {PAGE_SIZE}"
        return None

    def allocate_cache(self, num_blocks: int) -> None:
        spec = self.spec
        shape = (spec.num_layers, 2, num_blocks, self.block_size, spec.num_kv_heads, spec.head_dim)
        # Not zeroed: that would touch all of it at once, and what lies beyond a context is never used.
        self.cache = torch.empty(shape, dtype=spec.dtype, device=spec.device)

    def begin_step(self, metadata: AttentionMetadata) -> "FlashStep":
        step = FlashStep(self, metadata.slot_mapping)
        queries = np.array(metadata.query_lengths, dtype=np.int32)
        contexts = np.array(metadata.context_lengths, dtype=np.int32)
        tokens = np.cumsum(queries, dtype=np.int32) - queries  # each row's first in the step
        # Without a cache every row attends to the step's own keys and values, which only the other function does.
        single = queries == (1 if self.cache is not None else 0)
        decodes, prefills = np.nonzero(single)[0], np.nonzero(~single)[0]
        prefill_tokens = np.repeat(tokens[prefills], queries[prefills]) + _counts_up(queries[prefills])
        mixed = len(decodes) > 0 and len(prefills) > 0
        pieces: list[np.ndarray] = [decodes, contexts[decodes], tokens[decodes], prefills]
        pieces += [_bounds(queries[prefills]), _bounds(contexts[prefills]), prefill_tokens[: None if mixed else 0]]
        numbers = to_device(np.concatenate(pieces), torch.int32, self.spec.device)
        rows, lengths, positions, prefill_rows, query_bounds, context_bounds, prefill_positions = numbers.split(
            [len(piece) for piece in pieces]
        )
        if len(decodes) > 0:
            step.decode_lengths = lengths
            step.decode_tables = _lines(metadata, rows)
            step.decode_tokens = positions if mixed else None
        if len(prefills) > 0:
            step.prefill = {
                "cu_seqlens_q": query_bounds,
                "cu_seqlens_k": context_bounds,
                "max_seqlen_q": int(queries[prefills].max()),
                "max_seqlen_k": int(contexts[prefills].max()),
                "block_table": None if self.cache is None else _lines(metadata, prefill_rows),
            }
            step.prefill_tokens = prefill_positions if mixed else None
        return step

    def begin_decode(self, metadata: DecodeMetadata) -> "FlashStep":
        step = FlashStep(self, metadata.slot_mapping)
        step.decode_lengths = metadata.context_lengths
        step.decode_tables = metadata.block_tables.index_select(0, metadata.slots.clamp(min=0))
        step.real_rows = (metadata.context_lengths > 0)[:, None, None]
        return step

    def kv_cache(self) -> torch.Tensor | None:
        return self.cache


class FlashStep(AttentionStep):
    """One step of the ``flash_attn`` backend. What there is none of is None.

    Args:
        backend: Whose step it is.
        slot_mapping: [tokens], int64.
    """

    def __init__(self, backend: FlashAttention, slot_mapping: torch.Tensor) -> None:
        self.backend, self.slot_mapping = backend, slot_mapping
        self.decode_lengths: torch.Tensor | None = None  # [decode rows] int32: contexts of the rows of one query
        self.decode_tables: torch.Tensor | None = None  # [decode rows, blocks] int32
        self.decode_tokens: torch.Tensor | None = None  # [decode rows] int32: their tokens; None if they are all
        self.real_rows: torch.Tensor | None = None  # [decode rows, 1, 1] bool: that have a context; None if all have
        self.prefill: dict[str, torch.Tensor | int | None] | None = None  # arguments for the rows of several queries
        self.prefill_tokens: torch.Tensor | None = None  # int32: their tokens; None if they are all

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        target = self.target(layer)
        if target is None:
            return self._prefill(q.contiguous(), k.contiguous(), v.contiguous())
        self.backend.store_kernels.store_kv(packed_heads(k), packed_heads(v), *target)
        return self.attend_cached(layer, q)

    def fused_store(self, layer: int) -> FusedStore | None:
        kernel, target = self.backend.fused_store, self.target(layer)
        return None if kernel is None or target is None else FusedStore(kernel, target)

    def target(self, layer: int) -> CacheTarget | None:
        """Where the layer's keys and values go; None before there is a cache."""
        if self.backend.cache is None:
            return None
        keys, values = self.backend.cache[layer].transpose(2, 3)
        return CacheTarget(keys, values, self.slot_mapping)

    def attend_cached(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        assert self.backend.cache is not None
        keys, values = self.backend.cache[layer]
        q = packed_heads(q)
        if self.decode_lengths is None:
            return self._prefill(q, keys, values)
        if self.prefill is None:
            return self._decode(q, keys, values)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        out[self.prefill_tokens] = self._prefill(q[self.prefill_tokens], keys, values)
        out[self.decode_tokens] = self._decode(q[self.decode_tokens], keys, values)
        return out

    def _prefill(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        assert self.prefill is not None
        attend = self.backend.flash_attn.flash_attn_varlen_func
        return attend(q, keys, values, softmax_scale=self.backend.scale, causal=True, **self.prefill)

    def _decode(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        out = self.backend.flash_attn.flash_attn_with_kvcache(
            q[:, None],
            keys,
            values,
            cache_seqlens=self.decode_lengths,
            block_table=self.decode_tables,
            softmax_scale=self.backend.scale,
            causal=True,
        ).squeeze(1)
        return out if self.real_rows is None else torch.where(self.real_rows, out, torch.zeros_like(out))


def _lines(metadata: AttentionMetadata, rows: torch.Tensor) -> torch.Tensor:
    """The block tables of ``rows`` [rows]: int32 [rows, blocks], without entries that are not blocks."""
    slots = rows if metadata.slots is None else metadata.slots.index_select(0, rows)
    return metadata.block_tables.index_select(0, slots).to(torch.int32)


def _bounds(lengths: np.ndarray) -> np.ndarray:
    """0, and where each of ``lengths`` ends: [rows + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _counts_up(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of ``lengths``, one after the other: [sum of lengths]."""
    total = int(lengths.sum())
    return np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
