"""What the engine makes of a checkpoint on this machine, and what it refuses and why."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanovllm.attention import BACKENDS, AttentionBackend, AttentionSpec, select_backend
from nanovllm.config import EngineConfig
from nanovllm.diagnostics.inspect.findings import Findings
from nanovllm.engine.llm_engine import DEFAULT_MAX_MODEL_LEN
from nanovllm.engine.placement import resolve_device, resolve_dtype
from nanovllm.layers.activation import get_activation
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.product import Int8Weight
from nanovllm.layers.rotary_embedding import rope_frequencies
from nanovllm.models.registry import get_model_class
from nanovllm.utils.model_config import ModelConfig

MOST_RANKS = 64  # of which it is asked whether they can share the model
META = torch.device("meta")  # where tensors have a shape and no contents


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether the engine can do something with the checkpoint here.

    Args:
        what: The feature.
        value: What it would use, or whether it can; None if it cannot.
        reason: Why not; empty if it can.
    """

    what: str
    value: Any
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SupportSection:
    """The section "support".

    Args:
        answers: What the engine would use and what it refuses.
        tensor_parallel: Each number of ranks up to the number of heads, at most ``MOST_RANKS``, with the reason why it
            is refused, or "".
    """

    answers: list[Answer]
    tensor_parallel: dict[int, str]

    @property
    def allowed_ranks(self) -> list[int]:
        return [size for size, reason in self.tensor_parallel.items() if not reason]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how an engine of this configuration would run the model."""

    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    spec: AttentionSpec
    backend: type[AttentionBackend]


def max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Most tokens of a sequence."""
    return config.max_model_len or min(DEFAULT_MAX_MODEL_LEN, model.max_position_embeddings)


def place(config: EngineConfig, model: ModelConfig) -> Placement:
    """Where the model would run; ValueError if it cannot."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, model, device)
    spec = attention_spec(config, model, device, dtype)
    backend = select_backend(config.attention_backend, spec)
    spec = replace(spec, block_size=config.kvcache_block_size or backend.default_block_size)
    return Placement(device, dtype, max_model_len(config, model), spec, backend)


def attention_spec(config: EngineConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> AttentionSpec:
    """The attention of a rank."""
    size = config.tensor_parallel_size
    return AttentionSpec(
        num_layers=model.num_hidden_layers,
        num_heads=model.num_attention_heads // size,
        num_kv_heads=max(1, model.num_key_value_heads // size),
        head_dim=model.head_dim,
        dtype=dtype,
        device=device,
        block_size=config.kvcache_block_size,
    )


def model_without_memory(config: EngineConfig, model: ModelConfig) -> Any:
    """The model of rank 0 with parameters that have shapes only; ValueError if it cannot be made of ``model``."""
    parallel = ParallelGroup(0, config.tensor_parallel_size)
    return get_model_class(model.architecture)(model, 1, parallel, torch.float32, META)


def inspect_support(config: EngineConfig, model: ModelConfig | None, findings: Findings) -> SupportSection | None:
    """The section "support"; None if config.json could not be understood."""
    if model is None:
        return None
    answers: list[Answer] = []

    def ask(what: str, answer: Callable[[], Any], needed: bool = True) -> Any:
        """Take down an answer, or why there is none, which is a problem where the engine needs it."""
        try:
            value = answer()
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            answers.append(Answer(what, None, reason))
            if needed:
                findings.problem("support", "unsupported", reason)
            return None
        answers.append(Answer(what, value))
        return value

    ask("architecture", lambda: get_model_class(model.architecture).__name__)
    ask("activation", lambda: get_activation(model.hidden_act, META) and model.hidden_act)
    ask("rope", lambda: _rope(config, model))
    ask("max_model_len", lambda: _length(config, model))
    ask("device", lambda: str(resolve_device(config.device)))
    device = resolve_device(config.device)
    dtype = ask("dtype", lambda: _name(resolve_dtype(config.dtype, model, device)))
    if dtype:
        spec = attention_spec(config, model, device, getattr(torch, dtype))
        for name, backend in BACKENDS.items():
            reason = backend.why_not(spec)
            size = config.kvcache_block_size or backend.default_block_size
            answers.append(Answer(f"attention {name}", None if reason else f"blocks of {size} tokens", reason or ""))
        ask(f"attention {config.attention_backend}", lambda: place(config, model).backend.name)
        ask("quantization int8", lambda: _int8(getattr(torch, dtype), device), config.quantization == "int8")
    ranks = {size: _why_not_ranks(size, model) for size in range(1, min(model.num_attention_heads, MOST_RANKS) + 1)}
    chosen = config.tensor_parallel_size
    reason = ranks[chosen] if chosen in ranks else _why_not_ranks(chosen, model)
    if reason and model.architecture and not any(answer.reason for answer in answers[:2]):
        findings.problem("support", "unsupported", f"tensor_parallel_size {chosen}: {reason}")
    return SupportSection(answers, ranks)


def _rope(config: EngineConfig, model: ModelConfig) -> str:
    rope_frequencies(model, max_model_len(config, model))
    return f"{model.rope.rope_type}, theta {model.rope.theta:g}"


def _length(config: EngineConfig, model: ModelConfig) -> int:
    length = max_model_len(config, model)
    if length > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len is {length}, but the model has {model.max_position_embeddings} positions "
            "(max_position_embeddings); lower it, or extend the model with hf_overrides"
        )
    return length


def _int8(dtype: torch.dtype, device: torch.device) -> bool:
    reason = Int8Weight.why_not(dtype, device)
    if reason is not None:
        raise ValueError(f"quantization 'int8': {reason}")
    return True


def _why_not_ranks(size: int, model: ModelConfig) -> str:
    """Why ``size`` ranks cannot share the model: what its layers say when they are built; "" if they can."""
    try:
        layer = replace(model, num_hidden_layers=1, vocab_size=1)
        get_model_class(model.architecture)(layer, 1, ParallelGroup(0, size), torch.float32, META)
    except ValueError as error:
        return str(error)
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
