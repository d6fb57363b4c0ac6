"""A checkpoint's configuration as the engine understands it, and where each value comes from."""

from dataclasses import asdict, dataclass
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.diagnostics.inspect.findings import Findings
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.model_config import ModelConfig, load_model_config

DEFAULT = "default"

# What a file may ask for that the engine refuses, and the overrides that take it away, so that the rest can be seen.
_SET_ASIDE: dict[str, dict[str, Any]] = {
    "quantization_config": {"quantization_config": None},
    "sliding-window attention": {"use_sliding_window": False, "layer_types": None},
}
# What config.json calls a field of ModelConfig; the field's own name where it is not listed.
_SPELLINGS = {"architecture": ("architectures",), "dtype": ("dtype", "torch_dtype"), "eos_token_ids": ("eos_token_id",)}
_FIELDS = (
    "architecture",
    "model_type",
    "dtype",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
    "tie_word_embeddings",
)
# Entries that are read besides: the rope's, and what is only looked at to be refused.
_ALSO_READ = (
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "quantization_config",
    "layer_types",
    "max_window_layers",
    "use_sliding_window",
)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")


@dataclass(frozen=True, slots=True)
class Entry:
    """A value that the engine goes by.

    Args:
        name: The engine's name for it.
        value: As the engine reads it.
        source: The file (or "hf_overrides") and the entry there, or "default".
        other_spellings: Names that would have been understood as well.
    """

    name: str
    value: Any
    source: str
    other_spellings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Heads:
    """How the attention is cut into heads.

    Args:
        query: Query heads.
        key_value: Key-value heads.
        group: Query heads that share a key-value head.
        head_dim: Elements of a head.
        query_size: Elements of all query heads of a token.
        key_value_size: Elements of all its keys; of its values too.
    """

    query: int
    key_value: int
    group: int
    head_dim: int
    query_size: int
    key_value_size: int


@dataclass(frozen=True, slots=True)
class ConfigSection:
    """The section "config"; ``unused`` are entries of config.json that the engine does not read."""

    entries: list[Entry]
    sampling: list[Entry]
    heads: Heads
    unused: list[str]


def read_config(config: EngineConfig, findings: Findings) -> ModelConfig | None:
    """The checkpoint's configuration, with what is not supported set aside; None if it cannot be understood.

    Raises:
        FileNotFoundError: There is no config.json: the directory is no checkpoint.
    """
    overrides = dict(config.hf_overrides)
    left = dict(_SET_ASIDE)
    while True:
        try:
            return load_model_config(config.model, overrides)
        except ValueError as error:
            findings.problem("config", "configuration", error)
            known = next((words for words in left if words in str(error)), None)
            if known is None:
                return None
            overrides |= left.pop(known)


def inspect_config(config: EngineConfig, model: ModelConfig | None, findings: Findings) -> ConfigSection | None:
    """The section "config"; None if config.json could not be understood, which is a problem already."""
    if model is None:
        return None
    values, overrides = model.values, config.hf_overrides
    entries = [_entry(name, getattr(model, name), values, overrides) for name in _FIELDS]
    entries += _rope_entries(model, overrides)
    entries.append(_eos_entry(model, overrides))
    if model.dtype is None:
        findings.note("config", "no dtype is named; dtype 'auto' takes that of the first tensor")
    _note_contradictions(values, findings)
    if not model.eos_token_ids:
        findings.note("config", "no eos_token_id is named: only limits and stop conditions of a request's own end it")
    heads = Heads(
        query=model.num_attention_heads,
        key_value=model.num_key_value_heads,
        group=model.num_attention_heads // model.num_key_value_heads,
        head_dim=model.head_dim,
        query_size=model.num_attention_heads * model.head_dim,
        key_value_size=model.num_key_value_heads * model.head_dim,
    )
    read = {*_FIELDS, *_ALSO_READ, *(name for names in _SPELLINGS.values() for name in names)}
    return ConfigSection(entries, _sampling_entries(model, findings), heads, sorted(values.keys() - read))


def _entry(name: str, value: Any, values: dict[str, Any], overrides: dict[str, Any]) -> Entry:
    spellings = _SPELLINGS.get(name, (name,))
    for where, found in (("hf_overrides", overrides), ("config.json", values)):
        for spelling in spellings:
            if found.get(spelling) not in (None, []):
                others = tuple(one for one in spellings if one != spelling)
                return Entry(name, value, f"{where}: {spelling}", others)
    return Entry(name, value, DEFAULT, spellings if len(spellings) > 1 else ())


def _rope_entries(model: ModelConfig, overrides: dict[str, Any]) -> list[Entry]:
    """The rope's entries, which may stand by themselves or together, under two names."""
    length = "original_max_position_embeddings"
    named = {"rope_type": model.rope.rope_type, "rope_theta": model.rope.theta, **model.rope.parameters}
    entries = []
    for name, value in named.items():
        if name != length or model.values.get(length) is None:
            entries.append(Entry(name, value, *_rope_source(name, model.values, overrides)))
    if model.values.get(length) is not None:  # beside the others it counts before the one among them
        entries.append(_entry(length, model.values[length], model.values, overrides))
    return entries


def _rope_source(name: str, values: dict[str, Any], overrides: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Where a rope entry stands, and the other places where it might have stood."""
    aliases = ("rope_type", "type") if name == "rope_type" else (name,)
    places = [(place, alias) for place in ("rope_scaling", "rope_parameters") for alias in aliases]
    alone = (name,) if name == "rope_theta" else ()
    spellings = [*alone, *(f"{place}.{name}" for place in ("rope_scaling", "rope_parameters"))]
    for where, found in (("hf_overrides", overrides), ("config.json", values)):
        spelling = next((f"{place}.{alias}" for place, alias in places if (found.get(place) or {}).get(alias)), None)
        if spelling is None and alone and found.get(name) is not None:
            spelling = name
        if spelling is not None:
            used = spelling.partition(".")[0]
            return f"{where}: {spelling}", tuple(one for one in spellings if one.partition(".")[0] != used)
    return DEFAULT, tuple(spellings)


def _eos_entry(model: ModelConfig, overrides: dict[str, Any]) -> Entry:
    ids = list(model.eos_token_ids)
    if overrides.get("eos_token_id") is not None:
        return Entry("eos_token_ids", ids, "hf_overrides: eos_token_id")
    for where, values in (("generation_config.json", model.generation_config), ("config.json", model.values)):
        if values.get("eos_token_id") is not None:
            return Entry("eos_token_ids", ids, f"{where}: eos_token_id")
    return Entry("eos_token_ids", ids, DEFAULT)


def _note_contradictions(values: dict[str, Any], findings: Findings) -> None:
    """Both spellings of a thing, and not the same value."""
    for first, second in (("dtype", "torch_dtype"), ("rope_scaling", "rope_parameters")):
        one, other = values.get(first), values.get(second)
        if one is not None and other is not None and one != other:
            findings.note("config", f"{first} and {second} are both there and differ; {first} counts")
    theta = values.get("rope_theta")
    for place in ("rope_scaling", "rope_parameters"):
        nested = (values.get(place) or {}).get("rope_theta")
        if theta is not None and nested is not None and theta != nested:
            findings.note("config", f"rope_theta and {place}.rope_theta are both there and differ; the latter counts")


def _sampling_entries(model: ModelConfig, findings: Findings) -> list[Entry]:
    """What requests are sampled with that say nothing themselves."""
    generation = model.generation_config
    if not generation:
        findings.note("config", "there is no generation_config.json, or nothing in it: sampling defaults are our own")
    try:
        params = asdict(SamplingParams.from_generation_config(generation))
    except (TypeError, ValueError) as error:
        findings.problem("config", "configuration", f"generation_config.json: {error}; correct the file")
        return []
    entries = []
    for name in _SAMPLING:
        theirs = "max_new_tokens" if name == "max_tokens" else name
        source = f"generation_config.json: {theirs}" if generation.get(theirs) is not None else DEFAULT
        if name == "temperature" and generation.get("do_sample") is False:
            source = "generation_config.json: do_sample"
        entries.append(Entry(name, params[name], source))
    return entries
