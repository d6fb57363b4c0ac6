"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864), of every type transformers knows.

The frequencies of the scaled types come from transformers' own functions, so that they are its to the last bit.
"""

import math

import torch
from torch import nn

from nanovllm.utils.model_config import ModelConfig

# Types whose frequencies transformers changes with the length of the text at hand; below the stated length they are
# fixed. Beyond it a token's key would depend on what came after it, which no cache can honour.
_LENGTH_DEPENDENT = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}


class RotaryEmbedding(nn.Module):
    """Tables of cosines and sines, and the rotation of queries and keys by them.

    Args:
        config: The model's configuration.
        max_model_len: Positions the tables cover.

    Raises:
        ValueError: The rope type is unknown, lacks a parameter, or cannot serve ``max_model_len`` positions.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: ModelConfig, max_model_len: int, device: torch.device) -> None:
        super().__init__()
        inverse_frequencies, scaling = rope_frequencies(config, max_model_len)
        positions = torch.arange(max_model_len, dtype=torch.float32, device=inverse_frequencies.device)
        angles = positions[:, None] * inverse_frequencies[None, :]
        # float32 [max_model_len, head_dim / 2]; both halves of a head turn by the same angles
        self.register_buffer("cos", (angles.cos() * scaling).to(device), persistent=False)
        self.register_buffer("sin", (angles.sin() * scaling).to(device), persistent=False)

    @staticmethod
    def num_bytes(head_dim: int, max_model_len: int) -> int:
        """Bytes of both tables."""
        return 4 * head_dim * max_model_len

    def forward(self, positions: torch.Tensor) -> "Rotation":
        """The rotation of tokens at ``positions`` [tokens], shared by all layers of a step."""
        return Rotation(self.cos, self.sin, positions)


class Rotation:
    """A rotation of each token by the angles of its position.

    Args:
        cos: float32 [max_model_len, head_dim / 2].
        sin: The same.
        positions: int64 [tokens].
    """

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
        self.cos, self.sin, self.positions = cos, sin, positions
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the tokens, float32 [tokens, 1, head_dim / 2]; gathered once for all layers."""
        if self._rows is None:
            self._rows = self.cos[self.positions].unsqueeze(1), self.sin[self.positions].unsqueeze(1)
        return self._rows


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` [tokens, heads, head_dim], first half against second; in float32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    half = x.shape[-1] // 2
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    out[..., half:] = (second * cos).addcmul_(first, sin)
    return out


def rope_frequencies(config: ModelConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, float32 [head_dim / 2], and the factor of cosines and sines.

    Raises:
        ValueError: See :class:`RotaryEmbedding`.
    """
    rope = config.rope
    for values in (rope.parameters, config.values):  # it stands in either place
        if values.get("partial_rotary_factor") not in (None, 1.0):
            raise ValueError(
                f"partial_rotary_factor is {values['partial_rotary_factor']}; only rotary embeddings of whole heads "
                "are supported"
            )
    if rope.rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
        frequencies, scaling = 1.0 / (rope.theta**exponents), 1.0
    else:
        frequencies, scaling = _scaled_frequencies(config, max_model_len)
    found = f"rope_type {rope.rope_type!r} with rope_theta {rope.theta} and {rope.parameters}"
    if not torch.isfinite(frequencies).all() or not math.isfinite(scaling):
        raise ValueError(f"{found} gives frequencies or a scaling of them that are not finite; check these entries")
    if frequencies.numel() * 2 != config.head_dim:
        raise ValueError(
            f"{found} rotates {frequencies.numel() * 2} of {config.head_dim} elements of a head; only whole heads are "
            "supported"
        )
    return frequencies.float(), float(scaling)


def _scaled_frequencies(config: ModelConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    """What transformers computes for a type other than the default."""
    rope = config.rope
    # Imported late: the default type, which nearly every checkpoint has, does without.
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = sorted(set(ROPE_INIT_FUNCTIONS) | {"default"})
    if rope.rope_type not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope_type is {rope.rope_type!r}; this transformers knows {', '.join(known)}")
    for name in ("short_factor", "long_factor"):
        factors = rope.parameters.get(name)
        if factors is not None and len(factors) != config.head_dim // 2:
            raise ValueError(
                f"{name} has {len(factors)} numbers; it must have one for every two of the head_dim of "
                f"{config.head_dim}: {config.head_dim // 2}"
            )
    # Some checkpoints keep this entry beside the rope parameters; like transformers, prefer it to the one among them.
    name = "original_max_position_embeddings"
    beside = {name: config.values[name]} if config.values.get(name) else {}
    limit_name = _LENGTH_DEPENDENT.get(rope.rope_type)
    if limit_name:
        limit = {**rope.parameters, **beside}.get(limit_name, config.max_position_embeddings)
        if max_model_len > limit:
            raise ValueError(
                f"max_model_len is {max_model_len}, but with rope_type {rope.rope_type!r} positions beyond "
                f"{limit} ({limit_name}) change with the length of the text, which no KV cache can follow; "
                f"use max_model_len={limit}, or a static type such as yarn"
            )
    try:
        hf_config = AutoConfig.for_model(
            config.model_type,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            rope_theta=rope.theta,
            rope_scaling={**rope.parameters, "rope_type": rope.rope_type},
            **beside,
        )
        return ROPE_INIT_FUNCTIONS[rope.rope_type](hf_config, torch.device("cpu"))
    except Exception as error:  # each version of transformers checks its configurations in its own way
        raise ValueError(
            f"rope_type {rope.rope_type!r} with {rope.parameters}: {error!r} is missing or wrong"
        ) from error
