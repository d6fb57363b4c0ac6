"""How much memory a model takes, and how many tokens fit beside it: the engine's arithmetic, without loading."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.diagnostics.inspect.findings import Findings
from nanovllm.diagnostics.inspect.support import Placement, model_without_memory, place
from nanovllm.engine.cuda_graphs import wants_graphs
from nanovllm.engine.kv_sizing import KVSizing
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.product import PackableProduct
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.utils.memory import cuda_kv_budget, free_memory, kv_budget
from nanovllm.utils.model_config import ModelConfig

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INT8_PANEL, _INT8_WORD, _INT8_FACTORS = 32, 4, 8  # outputs and inputs are padded to these; bytes beside an output


@dataclass(frozen=True, slots=True)
class DtypeMemory:
    """Bytes that a rank takes with everything in one dtype.

    Args:
        dtype: Its name; "int8" has linear layers and output head in eight bits, the rest in the engine's dtype.
        weight_bytes: Of the weights.
        kv_bytes_per_token: Of keys and values of a token, all layers.
        kv_bytes_per_sequence: Of a sequence of max_model_len tokens.
    """

    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine would have on this device now.

    Args:
        device: Where.
        dtype: Of weights and KV cache.
        free_bytes: Free on it now.
        weight_bytes: What the weights are going to take of that.
        table_bytes: What the tables are going to take.
        activation_bytes: What a step takes; on CUDA estimated, where the engine measures it; 0 elsewhere.
        kv_bytes: What the KV cache may take of the rest.
        block_size: Tokens a block.
        num_blocks: Blocks of the cache.
        num_tokens: Tokens these hold.
        num_full_sequences: Sequences of max_model_len that fit at once.
        limit: What bounds it: "memory", or "need", as max_num_seqs sequences of max_model_len can fill no more.
    """

    device: str
    dtype: str
    free_bytes: int
    weight_bytes: int
    table_bytes: int
    activation_bytes: int
    kv_bytes: int
    block_size: int
    num_blocks: int
    num_tokens: int
    num_full_sequences: int
    limit: str


@dataclass(frozen=True, slots=True)
class MemorySection:
    """The section "memory", of each rank; ``capacity`` is None where the model cannot run."""

    max_model_len: int
    max_num_seqs: int
    ranks: int
    dtypes: list[DtypeMemory]
    capacity: Capacity | None


def inspect_memory(config: EngineConfig, model: ModelConfig | None, findings: Findings) -> MemorySection | None:
    """The section "memory"; None if config.json could not be understood or names no model of ours."""
    if model is None:
        return None
    try:
        network = model_without_memory(config, model)
        placement = place(config, model)
    except (ValueError, OSError) as error:
        findings.problem("memory", "unsupported", error)
        return None
    numel = sum(parameter.numel() for parameter in network.parameters())
    length = placement.max_model_len
    elements = placement.spec.bytes_per_token() // placement.dtype.itemsize  # of keys and values, a token
    rows = [_memory(_name(dtype), numel * dtype.itemsize, elements * dtype.itemsize, length) for dtype in _DTYPES]
    item = placement.dtype.itemsize
    rows.append(_memory("int8", int8_bytes(network, item), elements * item, length))
    weights = rows[-1].weight_bytes if config.quantization == "int8" else numel * item
    capacity = _capacity(config, model, placement, weights)
    if capacity.num_blocks < 1:
        findings.note("memory", f"the model does not fit {placement.device} now: no memory is left for the KV cache")
    return MemorySection(length, config.max_num_seqs, config.tensor_parallel_size, rows, capacity)


def int8_bytes(network: Any, itemsize: int) -> int:
    """Bytes of a model's weights with ``quantization="int8"``: an embedding stays as it is, its head tied or not."""
    packed, products = 0, set()
    for module in network.modules():
        if isinstance(module, PackableProduct) and module.weight is not None:
            outputs, inputs = module.weight.shape
            depth = math.ceil(inputs / _INT8_WORD) * _INT8_WORD
            packed += math.ceil(outputs / _INT8_PANEL) * _INT8_PANEL * (depth + _INT8_FACTORS)
            products.add(id(module.weight))
    embedding = network.model.embed_tokens.weight
    plain = sum(p.numel() for p in network.parameters() if id(p) not in products)
    if id(embedding) in products:
        plain += embedding.numel()
    return packed + plain * itemsize


def _memory(name: str, weights: int, per_token: int, length: int) -> DtypeMemory:
    return DtypeMemory(name, weights, per_token, per_token * length)


def _capacity(config: EngineConfig, model: ModelConfig, placement: Placement, weights: int) -> Capacity:
    """As the model runner sizes its cache once the weights are loaded."""
    device, dtype, block_size = placement.device, placement.dtype, placement.spec.block_size
    assert block_size is not None
    length = placement.max_model_len
    sizing = KVSizing(
        config,
        model,
        ParallelGroup(0, config.tensor_parallel_size),
        device,
        dtype,
        length,
        block_size,
        placement.spec.bytes_per_token(),
        captures=wants_graphs(config, device, placement.backend),
    )
    activations = estimated_activations(config, model, dtype) if device.type == "cuda" else 0
    needed, free = sizing.beside_cache(activations), free_memory(device)
    # Rotary tables are allocated with the weights. Ranks on the CPU take their weights of the same memory.
    loaded = weights + RotaryEmbedding.num_bytes(model.head_dim, length)
    loaded *= config.tensor_parallel_size if device.type == "cpu" else 1
    budget = sizing.share(_budget(device, loaded, needed, config.gpu_memory_utilization))
    asked = config.num_kvcache_blocks
    blocks = max(0, sizing.blocks_within(budget)) if asked is None else asked
    return Capacity(
        device=str(device),
        dtype=_name(dtype),
        free_bytes=free,
        weight_bytes=weights,
        table_bytes=sizing.table_bytes(),
        activation_bytes=needed - sizing.table_bytes(),
        kv_bytes=budget,
        block_size=block_size,
        num_blocks=blocks,
        num_tokens=blocks * block_size,
        num_full_sequences=blocks // -(-length // block_size),
        limit="memory" if blocks == budget // sizing.block_bytes else "need",
    )


def _budget(device: torch.device, loaded: int, needed: int, utilization: float) -> int:
    """Bytes that the KV cache may take once ``loaded`` bytes are, and ``needed`` are left for the rest."""
    if device.type != "cuda":
        return kv_budget(device, loaded + needed, utilization)
    free, total = torch.cuda.mem_get_info(device)
    return cuda_kv_budget(total, free - loaded, loaded, needed, utilization)


def estimated_activations(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """About what the largest step takes on a CUDA device: its widest layer, or its logits while they are sampled."""
    size = config.tensor_parallel_size
    tokens, rows = config.max_num_batched_tokens, min(config.max_num_seqs, config.max_num_batched_tokens)
    layer = tokens * (2 * model.hidden_size + 3 * model.intermediate_size // size) * dtype.itemsize
    logits = rows * model.vocab_size * 4
    return max(layer, 4 * logits)  # a copy each of logits, weights, their order and sums


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
