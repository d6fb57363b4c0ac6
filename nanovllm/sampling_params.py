"""How one request is sampled and when it ends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.utils.validation import check_int, check_number


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, checked when they are made.

    Names and meaning are vLLM's.

    Args:
        temperature: Divides the logits before sampling; 0 takes the most likely token (greedy).
        top_k: Sample among the k most likely tokens; 0 and -1 mean all.
        top_p: Sample among the smallest set of tokens whose probability reaches p, in (0, 1].
        max_tokens: Most tokens to generate; ``None`` means as many as the context and the KV cache hold. A
            request also ends at ``max_model_len``.
        ignore_eos: Generate past the end-of-sequence tokens.
        seed: Makes the request's sampling noise repeatable, whatever else runs beside it. ``None`` derives
            the noise from the engine's seed and the request's number.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int | None = 64
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:  # as Python's own number, whichever kind was given
            object.__setattr__(self, name, value)

        keep("temperature", check_number("temperature", self.temperature, low=0.0))
        keep("top_k", check_int("top_k", self.top_k, low=-1))
        keep("top_p", check_number("top_p", self.top_p, low=0.0, high=1.0))
        if self.top_p == 0.0:
            raise ValueError("top_p is 0; it must be in (0, 1] (use temperature=0 for the most likely token)")
        if self.max_tokens is not None:
            keep("max_tokens", check_int("max_tokens", self.max_tokens, low=1))
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos is {self.ignore_eos!r}; it must be True or False")
        if self.seed is not None:
            keep("seed", check_int("seed", self.seed, low=-(2**63), high=2**64 - 1))

    @classmethod
    def from_generation_config(cls, generation_config: Mapping[str, Any]) -> "SamplingParams":
        """The defaults a checkpoint ships in generation_config.json; what it leaves out keeps our default."""
        if generation_config.get("do_sample") is False:
            generation_config = {**generation_config, "temperature": 0.0}
        names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "max_new_tokens": "max_tokens"}
        found = {ours: generation_config[theirs] for theirs, ours in names.items() if theirs in generation_config}
        return cls(**{name: value for name, value in found.items() if value is not None})
