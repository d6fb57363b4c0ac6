"""How many blocks the KV cache has: what memory leaves once everything else has its part, and no more than any need."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.batch_state import BatchState
from nanovllm.engine.cuda_graphs import DecodeGraphs, batch_sizes
from nanovllm.layers.embed_head import rows_per_rank
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.utils.memory import MPS_DEFAULT_BLOCKS, free_memory, kv_budget
from nanovllm.utils.model_config import ModelConfig

# What captured steps take besides their static buffers and activations: what the driver keeps of each.
BYTES_PER_GRAPH = 4 << 20


@dataclass(frozen=True, slots=True)
class KVSizing:
    """What a rank's memory is for.

    Args:
        config: The engine's configuration.
        model_config: The checkpoint's.
        parallel: The rank's share of the model.
        device: Where everything is.
        dtype: Of the weights and the cache.
        max_model_len: Most tokens of a sequence.
        block_size: Tokens of a block.
        bytes_per_token: Of a token's keys and values, all layers.
        captures: Whether decode steps are captured in CUDA graphs.
        held_before: Bytes of a CUDA device that this process held before the weights were loaded.
    """

    config: EngineConfig
    model_config: ModelConfig
    parallel: ParallelGroup
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    block_size: int
    bytes_per_token: int
    captures: bool
    held_before: int = 0

    @property
    def num_slots(self) -> int:
        """Most sequences of a step: a resident holds at least one block, so more slots would never be filled."""
        return min(self.config.max_num_seqs, self.config.num_kvcache_blocks or self.config.max_num_seqs)

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.bytes_per_token

    def table_bytes(self) -> int:
        """Bytes of what is allocated after the KV cache: the batch state, and what captured steps need."""
        tables = BatchState.num_bytes(self.num_slots, self.max_model_len, self.block_size)
        if not self.captures:
            return tables
        columns = rows_per_rank(self.model_config.vocab_size, self.parallel)
        buffers = DecodeGraphs.num_bytes(self.num_slots, columns, self.dtype)
        return tables + buffers + BYTES_PER_GRAPH * len(batch_sizes(self.num_slots))

    def check_tables(self) -> None:
        """Refuse lengths whose tables alone do not fit, before anything large is allocated.

        Raises:
            ValueError: They do not.
        """
        rotary_bytes = RotaryEmbedding.num_bytes(self.model_config.head_dim, self.max_model_len)
        needed, free = self.table_bytes() + rotary_bytes, free_memory(self.device)
        if needed > free:
            raise ValueError(
                f"max_model_len is {self.max_model_len} and max_num_seqs {self.config.max_num_seqs}: their tables take "
                f"{needed:,} bytes, and {free:,} are free on {self.device} (lower one of them)"
            )

    def beside_cache(self, activations: int) -> int:
        """Bytes to be left for tables and steps, of which one of ``max_num_batched_tokens`` takes ``activations``."""
        captured = 0
        if self.captures:  # which keep the activations of the largest, a row a slot
            captured = min(2 * activations * self.num_slots // self.config.max_num_batched_tokens, activations)
        return activations + captured + self.table_bytes()

    def num_blocks(self, profile: Callable[[], int]) -> int:
        """As many as were asked for, else what memory and the largest possible need allow.

        Args:
            profile: Runs a worst-case step, and returns the bytes it takes.

        Raises:
            ValueError: Memory does not hold them, or not a single one.
        """
        if self.config.num_kvcache_blocks is not None:
            return self._as_asked(self.config.num_kvcache_blocks)
        needed = self.beside_cache(profile() if self.device.type == "cuda" else 0)
        budget = kv_budget(self.device, needed, self.config.gpu_memory_utilization, self.held_before)
        num_blocks = self.blocks_within(self.share(budget))
        if num_blocks < 1:
            raise ValueError(
                f"no memory is left for the KV cache on {self.device}: a block of {self.block_size} tokens takes "
                f"{self.block_bytes:,} bytes and {max(0, self.share(budget)):,} may be used (free memory, lower "
                "max_num_batched_tokens, max_num_seqs or max_model_len, raise gpu_memory_utilization on CUDA, or set "
                "num_kvcache_blocks)"
            )
        return num_blocks

    def blocks_within(self, budget: int) -> int:
        """Blocks that ``budget`` bytes hold, and that the largest possible need asks for."""
        needed = self.config.max_num_seqs * -(-self.max_model_len // self.block_size)
        num_blocks = min(budget // self.block_bytes, needed)
        return min(num_blocks, MPS_DEFAULT_BLOCKS) if self.device.type == "mps" else num_blocks

    def _as_asked(self, wanted: int) -> int:
        free = self.share(max(0, free_memory(self.device) - self.table_bytes()))
        if wanted * self.block_bytes > free:
            raise ValueError(
                f"num_kvcache_blocks is {wanted}: at {self.block_bytes:,} bytes each they take "
                f"{wanted * self.block_bytes:,} bytes, and {free:,} are free on {self.device}; at most "
                f"{free // self.block_bytes} blocks fit"
            )
        return wanted

    def remedy(self, *knobs: str, num_blocks: int | None = None) -> str:
        """What to do about a device that is full: settings to lower, with their values.

        Args:
            knobs: Their names.
            num_blocks: Blocks of the cache, where less of it would help as well.
        """
        known = {"max_model_len": self.max_model_len}  # which the configuration may leave to the model
        named = {knob: known.get(knob, getattr(self.config, knob)) for knob in knobs}
        if num_blocks is not None:
            is_share = self.device.type == "cuda" and self.config.num_kvcache_blocks is None
            share = {"gpu_memory_utilization": self.config.gpu_memory_utilization}
            named = (share if is_share else {"num_kvcache_blocks": num_blocks}) | named
        *others, last = (f"{knob}={value}" for knob, value in named.items())
        lower = f"{', '.join(others)} or {last}" if others else last
        return f"lower {lower}, or end other processes on the device"

    def share(self, num_bytes: int) -> int:
        """A rank's share: on the CPU they divide the memory of one machine."""
        return num_bytes // self.parallel.size if self.device.type == "cpu" else num_bytes
