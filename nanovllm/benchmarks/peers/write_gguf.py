"""Write a Qwen3 checkpoint as GGUF, without its tokenizer: for llama.cpp, in whose environment this runs.

    python launch.py write_gguf CHECKPOINT FILE.gguf bf16|q8_0

Needs numpy and gguf.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of a Qwen3 checkpoint; KeyError if it is none of Qwen3's."""
    if name in WHOLE_MODEL:
        return WHOLE_MODEL[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{MODULES[module]}.{kind}"


def metadata(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of GGUF's header that say what config.json says, by the writer's ``add_`` methods."""
    rope = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "head_count": config["num_attention_heads"],
        "head_count_kv": config["num_key_value_heads"],
        "key_length": config["head_dim"],
        "value_length": config["head_dim"],
        "layer_norm_rms_eps": config["rms_norm_eps"],
        "rope_freq_base": float(rope),
        "vocab_size": config["vocab_size"],
        "tokenizer_model": "no_vocab",
    }


def bfloat16_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of a checkpoint's safetensors files, as the uint16 that bfloat16 is stored in."""
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path}: {name} is {entry['dtype']}; only BF16 can be written")
            offset = 8 + header_bytes + entry["data_offsets"][0]
            yield name, np.memmap(path, np.uint16, "r", offset, tuple(entry["shape"]))


def as_float32(bfloat16: np.ndarray) -> np.ndarray:
    return (bfloat16.astype(np.uint32) << 16).view(np.float32)


def write_gguf(checkpoint: Path, file: Path, kind: str) -> None:
    """Matrices in the given kind, "bf16" or "q8_0", vectors in float32, as llama.cpp wants them."""
    import gguf

    kinds = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    if kind not in kinds:
        raise ValueError(f"{kind!r} is not one of {', '.join(kinds)}")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(file), "qwen3")
    for name, value in metadata(config).items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in bfloat16_tensors(checkpoint):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue  # a copy of the embeddings
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), as_float32(tensor))
        elif kind == "bf16":
            writer.add_tensor(gguf_name(name), np.asarray(tensor).view(np.uint8), raw_dtype=kinds[kind])
        else:
            quantized = gguf.quants.quantize(as_float32(tensor), kinds[kind])
            writer.add_tensor(gguf_name(name), quantized, raw_dtype=kinds[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit("usage: python launch.py write_gguf CHECKPOINT FILE.gguf bf16|q8_0")
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])


if __name__ == "__main__":
    main()
