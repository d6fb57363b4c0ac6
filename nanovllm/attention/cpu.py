"""Attention on the CPU by kernels of our own, which read each cached key and value once, where it lies.

``kernels/cpu/paged_attention.py`` computes, on a cache laid out as ``kernels/cpu/kv_cache.py`` says; ``cpu_items.py``
lays out a step's work for it.
"""

from dataclasses import replace
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
from nanovllm.utils import huge_pages

# Stretches of keys, shared or cut, that a row of a recorded step may have on average; with more, it is not replayed.
LINES_A_ROW = 8


class CpuAttention(AttentionBackend):
    """The ``cpu`` backend: bfloat16 and float32, even head sizes up to 256, block sizes that 16 divides."""

    name = "cpu"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        from nanovllm.attention import cpu_items
        from nanovllm.kernels.cpu import kv_cache, paged_attention

        self.items, self.layout, self.kernels = cpu_items, kv_cache, paged_attention
        self.fused_store = kernels.load("qk_norm_rope_store", spec.device, spec.dtype)
        paged_attention.attention_kernel(spec.dtype == torch.bfloat16)  # lest the first step wait for it
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # a layer's keys and values
        # Set by the kernel that stores a value which is not finite.
        self.overflow = torch.zeros(1, dtype=torch.int32, device="cpu")

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
            (huge_pages.empty(shapes[0], spec.dtype), huge_pages.empty(shapes[1], spec.dtype))
            for _ in range(spec.num_layers)
        ]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values."""
        assert self.cache is not None
        return self.cache[layer]

    def bytes_per_token(self) -> int:
        spec = self.spec
        elements = spec.head_dim + self.layout.value_columns(spec.head_dim)
        return spec.num_layers * spec.num_kv_heads * elements * spec.dtype.itemsize

    def begin_step(self, metadata: AttentionMetadata) -> AttentionStep:
        if self.cache is None:
            return MatmulAttention(self.spec).begin_step(metadata)
        return CpuStep(self, metadata)

    def static_decode(self, max_rows: int) -> "StaticDecode":
        """A step of one token a row, whose memory stays where it is."""
        return StaticDecode(self, max_rows)

    def workspace(self, lines: int) -> Any:
        """Memory for a step whose results come in so many lines."""
        spec = self.spec
        return self.kernels.Workspace(torch.get_num_threads(), lines, spec.num_heads, spec.head_dim)

    def lay_out(self, metadata: AttentionMetadata, careful: bool = False) -> Any:
        """The work of a step; see ``cpu_items``."""
        rows = len(metadata.query_lengths)
        lines = np.arange(rows) if metadata.slots is None else metadata.slots.numpy()
        queries = np.array(metadata.query_lengths, dtype=np.int64)
        contexts = np.array(metadata.context_lengths, dtype=np.int64)
        geometry = self.items.Geometry(
            self.block_size, self.spec.num_heads, self.spec.num_kv_heads, torch.get_num_threads()
        )
        table = metadata.block_tables.numpy()
        return self.items.lay_out(self.items.Rows(queries, contexts, lines, table), geometry, careful)

    def kv_cache(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        return self.cache


class _CpuStep(AttentionStep):
    """What steps have in common.

    Args:
        backend: Whose step it is; its cache is allocated.
        slot_mapping: [at least tokens], int64.
    """

    items: Any
    workspace: Any
    block_tables: torch.Tensor | None = None

    def __init__(self, backend: CpuAttention, slot_mapping: torch.Tensor) -> None:
        self.backend, self.slot_mapping = backend, slot_mapping

    def fused_store(self, layer: int) -> FusedStore | None:
        kernel = self.backend.fused_store
        if kernel is None:
            return None
        return FusedStore(kernel, (*self.backend.layer(layer), self.slot_mapping, self.backend.overflow))

    def attend_cached(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        keys, values = self.backend.layer(layer)
        scale = self.backend.scale
        assert self.block_tables is not None
        return self.backend.kernels.paged_attention(
            q, keys, values, self.block_tables, self.items, self.workspace, scale
        )


class CpuStep(_CpuStep):
    """One step of the ``cpu`` backend."""

    def __init__(self, backend: CpuAttention, metadata: AttentionMetadata) -> None:
        super().__init__(backend, metadata.slot_mapping)
        self.block_tables = metadata.block_tables.to(torch.int32).contiguous()
        self.metadata = replace(metadata, block_tables=self.block_tables)
        self.is_decode = max(metadata.query_lengths) == 1
        self._lay_out(careful=False)
        backend.overflow.zero_()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.backend.layout.store(*self.backend.layer(layer), self.slot_mapping, k, v)
        if not v.isfinite().all():
            self.backend.overflow.fill_(1)
        return self.attend_cached(layer, packed_heads(q).contiguous())

    def attend_cached(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        if not self.is_decode and not self.is_careful and int(self.backend.overflow):
            # A weight of 0 times a value that is not finite is NaN: no query may come near one that it does not see.
            self._lay_out(careful=True)
        return super().attend_cached(layer, q)

    def _lay_out(self, careful: bool) -> None:
        self.is_careful = careful
        self.items = self.backend.lay_out(self.metadata, careful)
        self.workspace = self.backend.workspace(len(self.items.tokens) if len(self.items.parts) else 0)


class StaticDecode(_CpuStep):
    """A step of one token a row, for a recording: each replay finds there what :meth:`update` has put there.

    Args:
        backend: Whose step it is; its cache is allocated.
        max_rows: Rows there is room for.
    """

    def __init__(self, backend: CpuAttention, max_rows: int) -> None:
        super().__init__(backend, torch.zeros(max_rows, dtype=torch.int64, device="cpu"))
        # One long context alone may be cut for many threads.
        lines = max(LINES_A_ROW * max_rows, backend.items.TASKS_A_THREAD * torch.get_num_threads() + max_rows)
        self.items, self.workspace = backend.kernels.Items.room_for(lines), backend.workspace(lines)

    def update(self, metadata: AttentionMetadata) -> tuple[int, int] | None:
        """Take in a step; returns how many items and how many split tokens it has, None if there is no room for it."""
        items = self.backend.lay_out(metadata)
        if not self.items.take(items):
            return None
        self.slot_mapping[: len(metadata.slot_mapping)] = metadata.slot_mapping
        tables = metadata.block_tables
        assert tables.dtype == torch.int32
        assert tables.is_contiguous()
        if self.block_tables is None:
            self.block_tables = tables
        assert tables.data_ptr() == self.block_tables.data_ptr(), "recordings know the tables by their address"
        return len(items.fields), len(items.split_tokens)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from nanovllm.kernels.cpu.recording import NotRecordableError

        raise NotRecordableError("torch's operators write the keys and values")
