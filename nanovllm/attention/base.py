"""The interface of attention backends.

A backend owns the paged KV cache, in whatever layout suits it. Once a step it is told which tokens are computed
(:class:`AttentionMetadata`); then every layer hands it queries, keys and values: it writes keys and values into the
cache and attends.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The attention of a model on this rank.

    Args:
        num_layers: Layers, each with its own keys and values.
        num_heads: Query heads.
        num_kv_heads: Key-value heads; each serves ``num_heads / num_kv_heads`` query heads.
        head_dim: Elements of a head.
        dtype: Of queries, keys, values and the cache.
        device: Where they are.
        block_size: Tokens a KV block; None leaves it to the backend.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    block_size: int | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [f"{self.num_heads} query heads", f"{self.num_kv_heads} key-value heads of {self.head_dim}", dtype]
        parts += [] if self.block_size is None else [f"blocks of {self.block_size} tokens"]
        return ", ".join([*parts, f"on {self.device}"])

    def bytes_per_token(self) -> int:
        """KV bytes a token takes, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(slots=True)
class AttentionMetadata:
    """What a step computes, a row a sequence. The lengths are known on the host too, so nothing has to be read back.

    Args:
        query_lengths: Tokens of each row computed in this step.
        context_lengths: Tokens of each row to attend to, those computed in this step included (they come last).
        block_tables: [slots, blocks], int32 or int64: KV blocks in order; what lies beyond a context is ignored.
        slot_mapping: [tokens], int64: where each token's key and value go, ``block * block_size + offset``.
        slots: [rows], int64: each row's line of ``block_tables``; None if row i has line i.
        offsets: [tokens], int64: ``slot_mapping`` modulo the block size, if it is known.
    """

    query_lengths: list[int]
    context_lengths: list[int]
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    slots: torch.Tensor | None = None
    offsets: torch.Tensor | None = None


@dataclass(slots=True)
class DecodeMetadata:
    """A step of one token a row of which the host knows nothing but the number of rows: what a CUDA graph captures.

    All tensors stay where they are; each replay reads what they hold by then.

    Args:
        slots: [rows], int32: each row's line of ``block_tables``; -1 for a row that is none.
        context_lengths: [rows], int32: tokens to attend to, this step's included; 0 for a row that is none.
        block_tables: [slots, blocks], int32: the KV blocks of all residents.
        slot_mapping: [rows], int64: where each row's key and value go; -1 for a row that is none.
    """

    slots: torch.Tensor
    context_lengths: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor


class CacheTarget(NamedTuple):
    """Where a kernel that computes keys and values puts them itself.

    Args:
        keys: [blocks, kv_heads, block_size, head_dim], a layer's; the last dimension is packed, the others may not be.
        values: The same.
        slot_mapping: [tokens], int64: ``block * block_size + offset``; -1 for a token that is none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slot_mapping: torch.Tensor


class FusedStore(NamedTuple):
    """A kernel that normalises and rotates queries and keys, and writes keys and values to a layer's cache.

    Args:
        kernel: The device's ``qk_norm_rope_store``.
        target: What it takes to find the layer's cache.
    """

    kernel: Callable[..., torch.Tensor]
    target: tuple[Any, ...]


class AttentionStep(ABC):
    """One step's attention, for all layers."""

    @abstractmethod
    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write the step's keys and values into the layer's cache and attend.

        Each token attends to its sequence's tokens up to and including itself; softmax(q k^T / sqrt(head_dim)) v.

        Args:
            layer: The layer.
            q: [tokens, num_heads, head_dim].
            k: [tokens, num_kv_heads, head_dim].
            v: [tokens, num_kv_heads, head_dim].

        Returns:
            [tokens, num_heads, head_dim].
        """

    def fused_store(self, layer: int) -> "FusedStore | None":
        """How to write the layer's keys and values before :meth:`attend_cached`; None: :meth:`attend` does both."""
        return None

    def fused_attend(self, layer: int) -> "Callable[..., torch.Tensor] | None":
        """What takes a layer's projection to :meth:`attend`'s result in one kernel; None where there is nothing such.

        It is called with qkv [tokens, (num_heads + 2 * num_kv_heads) * head_dim], the weights of the queries' and keys'
        norms and their eps, cosines, sines and positions as in ``Rotation``, and the numbers of heads.
        """
        return None

    def attend_cached(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """:meth:`attend`, once the step's keys and values have been written by :meth:`fused_store`."""
        raise NotImplementedError(f"{type(self).__name__} writes keys and values itself")


class AttentionBackend(ABC):
    """Attention over a paged KV cache.

    Args:
        spec: The model's attention; its ``block_size`` is set.
    """

    name: ClassVar[str]
    default_block_size: ClassVar[int] = 16
    can_capture: ClassVar[bool] = False  # whether begin_decode is there, and its steps can be captured in CUDA graphs

    def __init__(self, spec: AttentionSpec) -> None:
        if spec.block_size is None:
            raise ValueError("block_size must be set")
        self.spec = spec
        self.block_size = spec.block_size
        self.scale = spec.head_dim**-0.5

    @classmethod
    @abstractmethod
    def why_not(cls, spec: AttentionSpec) -> str | None:
        """Why this backend cannot serve ``spec``; None if it can."""

    @abstractmethod
    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache of all layers. Before this, steps attend only within themselves."""

    def bytes_per_token(self) -> int:
        """Bytes of the cache a token takes, all layers."""
        return self.spec.bytes_per_token()

    @abstractmethod
    def begin_step(self, metadata: AttentionMetadata) -> AttentionStep:
        """Prepare a step: whatever all layers share is computed here, once."""

    def begin_decode(self, metadata: DecodeMetadata) -> AttentionStep:
        """Prepare a step of which the host knows only the number of rows: without a copy to or from the host."""
        raise NotImplementedError(f"{self.name} needs to know the context lengths on the host")

    def warm_up(self) -> None:  # noqa: B027  # most have nothing to do
        """Have compiled what only some steps need, so that none of them waits for it."""

    def kv_cache(self) -> Any:
        """The cache tensor, or None before it is allocated. For tests and diagnostics."""
        return None


def packed_heads(x: torch.Tensor) -> torch.Tensor:
    """``x`` [tokens, heads, head_dim], copied if a token's heads do not lie packed."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
