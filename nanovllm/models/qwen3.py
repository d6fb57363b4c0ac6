"""Qwen3: a decoder with grouped-query attention, RMSNorm on queries and keys, and a SwiGLU MLP.

(Qwen3 Technical Report, 2025, https://arxiv.org/abs/2505.09388.)
"""

from collections.abc import Callable

import torch
from torch import nn

from nanovllm import kernels
from nanovllm.attention.base import AttentionStep
from nanovllm.layers.activation import get_activation
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import GateUpParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.rotary_embedding import RotaryEmbedding, Rotation, apply_rotary
from nanovllm.utils.loader import COPY
from nanovllm.utils.model_config import ModelConfig


class Qwen3Attention(nn.Module):
    """Attention over the paged KV cache, with queries and keys normalised per head before they are rotated."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        parallel: ParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.attention_bias,
            parallel,
            dtype,
            device,
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            config.attention_bias,
            parallel,
            dtype,
            device,
        )
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device)

    def attend(self, qkv: torch.Tensor, rotation: Rotation, attention: AttentionStep) -> torch.Tensor:
        """Projected [tokens, this rank's q, k and v] -> what its query heads attend to, [tokens, heads * head_dim]."""
        heads, kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        tables = rotation.cos, rotation.sin, rotation.positions
        attend = attention.fused_attend(self.layer)
        if attend is not None:
            return attend(qkv, *norms, *tables, num_heads=heads, num_kv_heads=kv_heads).flatten(1)
        fused = attention.fused_store(self.layer)
        if fused is not None:
            q = fused.kernel(qkv, *norms, *tables, *fused.target, heads, kv_heads)
            return attention.attend_cached(self.layer, q).flatten(1)
        q, k, v = qkv.view(-1, heads + 2 * kv_heads, self.head_dim).split((heads, kv_heads, kv_heads), dim=1)
        q = apply_rotary(self.q_norm(q), *rotation.rows())  # [tokens, heads, head_dim]
        k = apply_rotary(self.k_norm(k), *rotation.rows())
        return attention.attend(self.layer, q, k, v).flatten(1)


class Qwen3MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, parallel: ParallelGroup, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up_proj = GateUpParallelLinear(config.hidden_size, config.intermediate_size, parallel, dtype, device)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, False, parallel, dtype, device)
        self.activation = get_activation(config.hidden_act, device, dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(hidden)))


class Qwen3DecoderLayer(nn.Module):
    """Attention, then the MLP, each on the normalised residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        parallel: ParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.self_attn = Qwen3Attention(config, layer, parallel, dtype, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.mlp = Qwen3MLP(config, parallel, dtype, device)
        # Several ranks add up the products of theirs before the residual stream is added.
        self.fused_linear = kernels.load("fused_linear", device, dtype) if parallel.size == 1 else None

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation,
        attention: AttentionStep,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The stream is ``hidden + residual`` before and after; ``hidden`` alone where ``residual`` is None.

        With ``rows`` int64 [n], only those tokens go on after attention.
        """
        if self.fused_linear is not None and residual is None and hidden.shape[0] <= kernels.FEW_ROWS:
            return self._forward_few_rows(self.fused_linear, hidden, rotation, attention, rows), None
        hidden, residual = self.input_layernorm.add(hidden, residual)
        attended = self.self_attn.attend(self.self_attn.qkv_proj(hidden), rotation, attention)
        if rows is not None:
            attended, residual = attended.index_select(0, rows), residual.index_select(0, rows)
        hidden, residual = self.post_attention_layernorm.add(self.self_attn.o_proj(attended), residual)
        return self.mlp(hidden), residual

    def _forward_few_rows(
        self,
        fused_linear: Callable[..., torch.Tensor],
        stream: torch.Tensor,
        rotation: Rotation,
        attention: AttentionStep,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same with the norms, the gate and the residual additions inside the products' kernels."""
        attn, mlp, norms = self.self_attn, self.mlp, (self.input_layernorm, self.post_attention_layernorm)
        first, second = ({"norm_weight": norm.weight, "eps": norm.eps} for norm in norms)
        qkv = fused_linear(stream, attn.qkv_proj.weight, attn.qkv_proj.bias, **first)
        attended = attn.attend(qkv, rotation, attention)
        if rows is not None:
            attended, stream = attended.index_select(0, rows), stream.index_select(0, rows)
        # The kernels behind the output projection are held back while attention has keys and values to read.
        stream = fused_linear(attended, attn.o_proj.weight, attn.o_proj.bias, residual=stream, holds_back=True)
        gated = fused_linear(stream, mlp.gate_up_proj.weight, **second, gated=True)
        return fused_linear(gated, mlp.down_proj.weight, residual=stream)


class Qwen3Model(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(
        self,
        config: ModelConfig,
        max_model_len: int,
        parallel: ParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, parallel, dtype, device)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, layer, parallel, dtype, device) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.rotary = RotaryEmbedding(config, max_model_len, device)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionStep,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rotation = self.rotary(positions)  # once a step: all layers turn by the same angles
        hidden, residual = self.embed_tokens(token_ids), None
        *others, last = self.layers
        for layer in others:
            hidden, residual = layer(hidden, residual, rotation, attention)
        hidden, residual = last(hidden, residual, rotation, attention, rows)
        return self.norm.add(hidden, residual)[0]


class Qwen3ForCausalLM(nn.Module):
    """Qwen3 with its output head.

    Args:
        config: The checkpoint's configuration.
        max_model_len: Positions the rotary tables cover.
        parallel: This rank's share.
        dtype: Of weights and activations.
        device: Where they live.
    """

    # Checkpoint tensors that are fused here: name in the checkpoint -> (name here, shard id).
    FUSED = {  # noqa: RUF012
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    }

    def __init__(
        self,
        config: ModelConfig,
        max_model_len: int,
        parallel: ParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.tied = config.tie_word_embeddings
        self.model = Qwen3Model(config, max_model_len, parallel, dtype, device)
        table = self.model.embed_tokens if self.tied else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, parallel, dtype, device, table)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionStep,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of a step.

        Args:
            token_ids: [tokens], the rows' tokens one row after another.
            positions: [tokens], each token's position in its sequence.
            attention: The step's attention, which knows the rows' bounds and the KV cache.
            rows: int64 [n]: the tokens whose hidden states are wanted; None for all. The last layer computes no others.

        Returns:
            [tokens, hidden_size] after the final norm, or [n, hidden_size].
        """
        return self.model(token_ids, positions, attention, rows)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, hidden_size] -> float32 logits [rows, vocab_size], the same on every rank."""
        return self.lm_head(hidden)

    def compute_share(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The same of the ids that this rank holds, all if it is alone; with ``out``, there and in its dtype."""
        return self.lm_head.share(hidden, out)

    def whole_logits(self, share: torch.Tensor) -> torch.Tensor:
        """The ranks' shares of some rows -> those rows, [rows, vocab_size]."""
        return self.lm_head.whole(share)

    def resolve_weight(self, name: str) -> tuple[str, str] | None:
        """(parameter, shard id) that a checkpoint tensor fills; None if the model has no use for it."""
        if name.endswith("rotary_emb.inv_freq"):
            return None
        if self.tied and name == "lm_head.weight":  # published Qwen3-0.6B holds one
            return "model.embed_tokens.weight", COPY
        module, _, leaf = name.rpartition(".")
        parent, _, child = module.rpartition(".")
        fused, shard_id = self.FUSED.get(child, (child, ""))
        return f"{parent}.{fused}.{leaf}" if parent else f"{fused}.{leaf}", shard_id
