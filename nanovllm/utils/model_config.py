"""A checkpoint's config.json and generation_config.json, read once into plain values.

Two spellings of config.json are in use: the published files have ``torch_dtype``, ``rope_theta`` and ``rope_scaling``,
newer ones ``dtype`` and ``rope_parameters``. Both are understood here, and nowhere else.
"""

import difflib
import json
import logging
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

# Several times as many as any model has. What reads the file makes something for each before it looks at the weights.
MAX_LAYERS = 2**10

# Keys that hf_overrides may set though a config.json leaves them out.
_OPTIONAL_KEYS = (
    "attention_bias",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "layer_types",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "torch_dtype",
    "use_sliding_window",
)

# Entries of rope_parameters, of all types. Those of the first kind are positive numbers.
_ROPE_POSITIVE = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "original_max_position_embeddings",
)
_ROPE_LISTS = ("long_factor", "short_factor")
_ROPE_OTHERS = ("mscale", "mscale_all_dim", "partial_rotary_factor", "truncate")
# One letter off in these and the model would run with another rope, without a word.
_ROPE_DECISIVE = ("rope_theta", "rope_type", "type")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    Args:
        rope_type: "default", or a type that transformers computes.
        theta: Base of the frequencies.
        parameters: What else the type takes, e.g. ``factor``.
    """

    rope_type: str
    theta: float
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the engine and the models read of a checkpoint's configuration; sizes in elements."""

    path: str
    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    attention_bias: bool
    tie_word_embeddings: bool
    rope: RopeConfig
    dtype: str | None  # as the file spells it; None if it does not say
    eos_token_ids: tuple[int, ...]  # the main one first; as the files name them, inside the vocabulary or not
    generation_config: dict[str, Any]
    values: dict[str, Any]  # config.json with the overrides applied


def load_model_config(path: str, overrides: dict[str, Any] | None = None) -> ModelConfig:
    """Read the configuration of a checkpoint.

    Args:
        path: The checkpoint's directory.
        overrides: Entries that replace config.json's, in either spelling.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: An entry is missing, malformed or of a kind that is not supported; the message names it.
    """
    values = _read_json(os.path.join(path, CONFIG_FILE))
    if values is None:
        raise FileNotFoundError(
            f"{path} has no {CONFIG_FILE}; give the directory of a Hugging Face checkpoint "
            "(config.json, *.safetensors, tokenizer.json)"
        )
    overrides = overrides or {}
    for key in overrides:
        if key not in values and key not in _OPTIONAL_KEYS:
            near = difflib.get_close_matches(key, [*values, *_OPTIONAL_KEYS], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"hf_overrides names {key!r}, which {CONFIG_FILE} does not have{hint}")
    rope = _read_rope(overrides, _read_rope(values, RopeConfig("default", 10000.0, {})))
    values = {**values, **overrides}
    rope = _checked_rope(rope, values)
    generation = _read_json(os.path.join(path, GENERATION_CONFIG_FILE)) or {}

    def integer(name: str, default: int | None = None, high: int | None = None) -> int:
        value = values.get(name, default)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (high is not None and value > high):
            found = "is missing" if value is None else f"is {value!r}"
            most = "" if high is None else f" of at most {high}"
            raise ValueError(f"{name} {found} in {path}/{CONFIG_FILE}; it must be a positive whole number{most}")
        return value

    def number(name: str, default: float) -> float:
        value = values.get(name, default)
        if not _is_number(value) or value < 0:
            raise ValueError(f"{name} is {value!r} in {path}/{CONFIG_FILE}; it must be a number of at least 0")
        return float(value)

    def boolean(name: str) -> bool:
        value = values.get(name)
        if not isinstance(value, bool | None):
            raise ValueError(f"{name} is {value!r} in {path}/{CONFIG_FILE}; it must be true or false")
        return bool(value)

    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"architectures is {architectures!r} in {path}/{CONFIG_FILE}; it must be a list of names")
    config = ModelConfig(
        path=path,
        architecture=architectures[0] if architectures else "",
        model_type=str(values.get("model_type", "")),
        vocab_size=integer("vocab_size"),
        hidden_size=integer("hidden_size"),
        intermediate_size=integer("intermediate_size"),
        num_hidden_layers=integer("num_hidden_layers", high=MAX_LAYERS),
        num_attention_heads=integer("num_attention_heads"),
        num_key_value_heads=integer("num_key_value_heads"),
        head_dim=integer("head_dim", 128),  # Qwen3's; never hidden_size / num_attention_heads
        max_position_embeddings=integer("max_position_embeddings", 32768),
        rms_norm_eps=number("rms_norm_eps", 1e-6),
        hidden_act=str(values.get("hidden_act", "silu")),
        attention_bias=boolean("attention_bias"),
        tie_word_embeddings=boolean("tie_word_embeddings"),
        rope=rope,
        dtype=overrides.get("dtype")
        or overrides.get("torch_dtype")
        or values.get("dtype")
        or values.get("torch_dtype"),
        eos_token_ids=_token_ids(overrides.get("eos_token_id"))
        or _token_ids(generation.get("eos_token_id"))
        or _token_ids(values.get("eos_token_id")),
        generation_config=generation,
        values=values,
    )
    unknown = [token for token in _token_ids(overrides.get("eos_token_id")) if token >= config.vocab_size]
    if unknown:
        raise ValueError(
            f"hf_overrides names eos_token_id {unknown[0]}; the vocabulary has ids 0 to {config.vocab_size - 1}"
        )
    _check_supported(config, boolean("use_sliding_window"))
    return config


def end_token_ids(config: ModelConfig) -> tuple[int, ...]:
    """The end-of-sequence ids that the model can generate; warns of others, which a stale file may name."""
    known = tuple(token for token in config.eos_token_ids if token < config.vocab_size)
    if known != config.eos_token_ids:
        logger.warning(
            "eos_token_id of %s names %s, but the vocabulary has ids 0 to %d: no text ends there (correct "
            "generation_config.json or config.json, or pass hf_overrides={'eos_token_id': ...})",
            config.path,
            ", ".join(str(token) for token in config.eos_token_ids if token not in known),
            config.vocab_size - 1,
        )
    return known


def _check_supported(config: ModelConfig, use_sliding_window: bool) -> None:
    values = config.values
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads is {config.num_attention_heads}, which num_key_value_heads "
            f"({config.num_key_value_heads}) does not divide"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim is {config.head_dim}; rotary embedding needs an even number")
    if values.get("quantization_config"):
        raise ValueError(f"{config.path} is quantized (quantization_config); use the unquantized checkpoint")
    layer_types = values.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"layer_types is {layer_types!r} in {config.path}/{CONFIG_FILE}; it must be a list of names")
    full_layers = values.get("max_window_layers") or 0
    if type(full_layers) is not int:
        raise ValueError(
            f"max_window_layers is {full_layers!r} in {config.path}/{CONFIG_FILE}; it must be a whole number"
        )
    if any(kind != "full_attention" for kind in layer_types) or (
        use_sliding_window and not layer_types and full_layers < config.num_hidden_layers
    ):
        raise ValueError(
            f"{config.path} uses sliding-window attention, which is not supported; if its window is larger than your "
            "texts, pass hf_overrides={'use_sliding_window': False, 'layer_types': None}"
        )


def _read_rope(values: dict[str, Any], base: RopeConfig) -> RopeConfig:
    """The rope entries of ``values``, in either spelling, over those of ``base``; unchecked as yet."""
    theta = values.get("rope_theta")
    theta = base.theta if theta is None else theta
    if "rope_parameters" not in values and "rope_scaling" not in values:
        return RopeConfig(base.rope_type, theta, base.parameters)
    parameters = values.get("rope_scaling") or values.get("rope_parameters")  # in transformers' order
    if parameters is not None and not isinstance(parameters, dict):
        raise ValueError(f"rope_parameters is {parameters!r}; it must be a dictionary with a rope_type")
    parameters = dict(parameters or {})
    own_theta = parameters.pop("rope_theta", None)
    theta = theta if own_theta is None else own_theta
    legacy_type = parameters.pop("type", None)
    rope_type = parameters.pop("rope_type", None) or legacy_type or "default"
    return RopeConfig(str(rope_type), theta, parameters)


def _checked_rope(rope: RopeConfig, values: dict[str, Any]) -> RopeConfig:
    """``rope`` without its empty entries; ValueError naming an entry that cannot be meant."""
    parameters = {str(name): value for name, value in rope.parameters.items() if value is not None}
    nested = [name for name, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"rope_parameters has a dictionary for each type of layer ({', '.join(nested)}); all layers use the same "
            f"here: pass hf_overrides={{'rope_parameters': {parameters[nested[0]]}}}"
        )
    known = (*_ROPE_POSITIVE, *_ROPE_LISTS, *_ROPE_OTHERS)
    for name in sorted(parameters.keys() - set(known)):
        near = difflib.get_close_matches(name, _ROPE_DECISIVE, n=1, cutoff=0.8)
        if near:
            raise ValueError(f"rope_parameters has an entry {name!r}; did you mean {near[0]!r}?")
        logger.warning("rope_parameters has an entry %r, which is not used; known are %s", name, ", ".join(known))
    length = "original_max_position_embeddings"  # may stand beside the others
    beside = {} if values.get(length) is None else {length: values[length]}
    positive = {name: value for name, value in parameters.items() if name in _ROPE_POSITIVE}
    for name, value in [("rope_theta", rope.theta), *positive.items(), *beside.items()]:
        if not _is_number(value) or value <= 0:
            raise ValueError(f"{name} is {value!r} (rope); it must be a positive, finite number")
    for name in ("mscale", "mscale_all_dim"):
        if not _is_number(parameters.get(name, 0)):
            raise ValueError(f"{name} is {parameters[name]!r} (rope); it must be a finite number")
    for name in _ROPE_LISTS:
        factors = parameters.get(name, [])
        if not isinstance(factors, list) or not all(_is_number(factor) and factor > 0 for factor in factors):
            raise ValueError(f"{name} is {factors!r} (rope); it must be a list of positive, finite numbers")
    return replace(rope, theta=float(rope.theta), parameters=parameters)


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a number that a float can hold: no bool, no NaN, not infinite, not 10**400."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"eos_token_id is {value!r}; it must be a token id or a list of them")
    return ids


def _read_json(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # not only JSON's own: text, numbers and nesting have limits
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    return values
