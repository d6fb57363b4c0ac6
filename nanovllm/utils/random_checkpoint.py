"""Checkpoints with random weights in the published Qwen3 layout.

Speed and memory use do not depend on what the weights are, so a benchmark needs no download: it writes a
checkpoint of the published shape within seconds. There is no tokenizer in it; load it with
``LLM(path, skip_tokenizer_init=True)``.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nanovllm.utils.random_shapes import SHAPES

BUFFER_ELEMENTS = 2**24 - 3
"""Random numbers drawn in all. A prime, so that reading them round and round repeats no row of a matrix."""

SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def random_config(shape: str | dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The contents of config.json, spelt and ordered as in the published Qwen3 checkpoints.

    Args:
        shape: A key of ``SHAPES``, or config.json entries that replace those of ``tiny``.
        dtype: What ``torch_dtype`` says.

    Raises:
        ValueError: The shape is unknown, or an entry is none of the published config.json's.
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ValueError(f"unknown shape {shape!r}; choose from {', '.join(SHAPES)}")
        entries = SHAPES[shape]
    else:
        entries = {**SHAPES["tiny"], **shape}
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 0,
        "initializer_range": 0.02,
        "intermediate_size": 0,
        "max_position_embeddings": 40960,
        "max_window_layers": 0,
        "model_type": "qwen3",
        "num_attention_heads": 0,
        "num_hidden_layers": 0,
        "num_key_value_heads": 0,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    if unknown := sorted(entries.keys() - config.keys()):
        raise ValueError(f"unknown config.json entries {', '.join(unknown)}; known are {', '.join(config)}")
    return config | entries


def parameter_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a checkpoint needs, under the published names and in file order."""
    hidden, intermediate, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    projections = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    norms = {
        "self_attn.q_norm": head_dim,
        "self_attn.k_norm": head_dim,
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
    }
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in projections.items():
            yield f"model.layers.{layer}.{name}.weight", shape
            if config["attention_bias"] and name.startswith("self_attn"):
                yield f"model.layers.{layer}.{name}.bias", shape[:1]
        for name, size in norms.items():
            yield f"model.layers.{layer}.{name}.weight", (size,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def write_random_checkpoint(
    path: str | Path,
    shape: str | dict[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    *,
    max_shard_bytes: int = 4_000_000_000,
    store_tied_head: bool = False,
) -> Path:
    """Write config.json, generation_config.json and safetensors with random weights.

    Matrices and biases are normal with the config's ``initializer_range`` (0.02) as deviation, norms are ones.
    No shape takes more than 100 MB of memory to write, and 0.6B takes as long as the disk takes for 1.2 GB.

    Args:
        path: The folder, made if it does not exist. Checkpoint files already in it are replaced.
        shape: A key of ``SHAPES``, such as "qwen3-0.6b", or config.json entries that replace those of ``tiny``.
        dtype: bfloat16, float16 or float32.
        seed: Of the weights; the same seed writes the same bytes.
        max_shard_bytes: Weights that take more are split into shards of at most this, with an index.
        store_tied_head: Also store a tied lm_head.weight, a copy of the embeddings, as the published 0.6B and
            1.7B do (4B does not).

    Returns:
        The folder.

    Raises:
        ValueError: The shape or the dtype is unknown.
    """
    if dtype not in SAFETENSORS_DTYPES:
        raise ValueError(f"dtype is {dtype}; choose from {', '.join(map(str, SAFETENSORS_DTYPES))}")
    config = random_config(shape, dtype)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for old in path.glob("model*.safetensors*"):
        old.unlink()

    tensors = list(parameter_shapes(config))
    if store_tied_head and config["tie_word_embeddings"]:
        tensors.append(("lm_head.weight", tensors[0][1]))
    shards = _split(tensors, dtype.itemsize, max_shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    source = _RandomBytes(config["initializer_range"], dtype, seed)
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(path / name, shard, dtype, source, tied=config["tie_word_embeddings"])
    if len(shards) > 1:
        total = sum(math.prod(size) for shard in shards for _, size in shard) * dtype.itemsize
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(path / "model.safetensors.index.json", index)

    bos, eos = config["bos_token_id"], config["eos_token_id"]
    generation_config = {
        "bos_token_id": bos,
        "do_sample": True,
        "eos_token_id": [eos, bos],
        "pad_token_id": bos,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": config["transformers_version"],
    }
    _write_json(path / "generation_config.json", generation_config)
    _write_json(path / "config.json", config)
    return path


def cached_random_checkpoint(shape: str, cache: Path) -> Path:
    """The folder of this published shape in the cache, written if it is not there yet.

    Raises:
        ValueError: The shape is unknown, or the folder is there and has no config.json.
    """
    folder = cache / shape
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} exists but has no config.json; delete it and try again")
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{shape}-", dir=cache))
    try:
        write_random_checkpoint(unfinished, shape)
        unfinished.rename(folder)  # whole or not at all
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


Shard = list[tuple[str, tuple[int, ...]]]


def _split(tensors: Shard, itemsize: int, max_shard_bytes: int) -> list[Shard]:
    """Cut the list of tensors where the next one would take the shard over the limit."""
    shards: list[Shard] = [[]]
    used = 0
    for name, shape in tensors:
        size = math.prod(shape) * itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, shape))
        used += size
    return shards


class _RandomBytes:
    """A ring of normally distributed numbers: drawing billions of them afresh would take a minute."""

    def __init__(self, std: float, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.empty(BUFFER_ELEMENTS).normal_(0.0, std, generator=generator).to(dtype)
        self.ring = numbers.view(torch.uint8).numpy().data
        self.position = 0

    def write(self, file: BinaryIO, num_bytes: int) -> None:
        while num_bytes > 0:
            piece = self.ring[self.position : self.position + num_bytes]
            file.write(piece)
            num_bytes -= len(piece)
            self.position = (self.position + len(piece)) % len(self.ring)


def _write_safetensors(path: Path, tensors: Shard, dtype: torch.dtype, source: _RandomBytes, *, tied: bool) -> None:
    """Header length in 8 bytes, header in JSON, then one tensor after another, none ever held in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts 8-byte aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in tensors:
            if tied and name == "lm_head.weight":
                source.position = 0  # where the embeddings, the first tensor of all, were read
            if "norm" in name:
                file.write(bytes(torch.ones(shape, dtype=dtype).view(torch.uint8).numpy()))
            else:
                source.write(file, math.prod(shape) * dtype.itemsize)


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
