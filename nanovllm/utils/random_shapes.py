"""Published shapes that checkpoints with random weights can have. Apart from what writes them, which needs torch."""

import os
from pathlib import Path
from typing import Any


def _shape(layers: int, hidden: int, heads: int, intermediate: int, tied: bool, kv_heads: int = 8) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_shape(2, 64, 4, 128, tied=True, kv_heads=2),
        "head_dim": 32,
        "vocab_size": 1024,
        "bos_token_id": 1022,
        "eos_token_id": 1023,
        "max_position_embeddings": 4096,
    },
    "qwen3-0.6b": _shape(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _shape(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _shape(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _shape(36, 4096, 32, 12288, tied=False),
    "qwen3-14b": _shape(40, 5120, 40, 17408, tied=False),
    "qwen3-32b": _shape(64, 5120, 64, 25600, tied=False),
}
"""Where each published shape differs from the others, and ``tiny``, a shape for tests."""


def default_cache() -> Path:
    """Where random checkpoints are kept for the next benchmark unless told."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm" / "random-weights"
