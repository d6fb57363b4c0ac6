"""Small random checkpoints, written by transformers, and what transformers answers with them."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

BASE = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 5,
    "rope_theta": 10000.0,
}

# Of BASE's heads, within its max_position_embeddings.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0 + 0.5 * i for i in range(16)],
    "original_max_position_embeddings": 512,
}


def write_checkpoint(path: str | os.PathLike[str], seed: int = 0, **changes: Any) -> Path:
    """Write a float32 checkpoint with BASE's configuration and ``changes``.

    The weights are large enough for greedy texts to wander instead of repeating a token, and biases and norm weights
    are random too, so that forgetting one shows.
    """
    model = make_model(seed, **changes)
    model.save_pretrained(path)
    return Path(path)


def make_model(seed: int = 0, **changes: Any) -> Any:
    """The transformers model that :func:`write_checkpoint` writes."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**{**BASE, **changes})).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0.0, 0.1)
            elif parameter.ndim > 1:
                parameter.normal_(0.0, 2.0 * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def load_reference(path: str | os.PathLike[str]) -> Any:
    """The checkpoint as transformers loads it, in float32."""
    return Qwen3ForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()


@torch.inference_mode()
def reference_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' greedy continuation of ``prompt``, one token at a time without a cache: the plainest there is."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.inference_mode()
def reference_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """transformers' logits at every position, float32 [len(ids), vocab_size]."""
    return model(torch.tensor([ids])).logits[0].float()
