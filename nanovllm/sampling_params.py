"""How one request is sampled and when it ends."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from nanovllm.utils.validation import check_bool, check_int, check_number, unknown_argument
from nanovllm.utils.vllm_arguments import OF_PARAMS, check_of_params
from nanovllm.utils.vllm_imports import missing_name

# Beyond these a bias decides by itself; vLLM and OpenAI's interface keep it within them too.
MAX_LOGIT_BIAS = 100.0
# Of a temperature schedule: float32, in which it is evaluated, holds all whole numbers up to this.
MAX_POSITION = 2.0**24
# Each completion is a sequence with a copy of the prompt, made while everybody waits.
MAX_COMPLETIONS = 2**14


@runtime_checkable
class Schedule(Protocol):
    """A temperature that changes with the output position; see :mod:`nanovllm.layers.temperature`."""

    def at(self, position: int) -> float: ...

    def pieces(self) -> list[tuple[float, float, float, float, bool]]: ...


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, checked when they are made and whenever a field is assigned.

    A request keeps them as they were when it was added.

    Names and meaning are vLLM's. What is asked for applies in this order: ``logits_processors``; ``allowed_token_ids``,
    ``logit_bias``, ``bad_words`` and ``min_tokens``; the penalties; ``temperature``; ``min_p``; ``top_k``; ``top_p``.

    Args:
        n: Completions of the prompt, at most 16,384; they share its KV blocks.
        temperature: Divides the logits before sampling; 0 takes the most likely token (greedy). Or a schedule over the
            output positions (:mod:`nanovllm.layers.temperature`).
        top_k: Sample among the k most likely tokens; 0 and -1 mean all.
        top_p: Sample among the smallest set of tokens whose probability reaches p, in (0, 1].
        min_p: Sample among tokens at least this many times as likely as the most likely one, in [0, 1].
        presence_penalty: Subtracted from the logits of tokens that the output holds, in [-2, 2].
        frequency_penalty: Subtracted from them once for each time, in [-2, 2].
        repetition_penalty: Divides positive logits, and multiplies negative ones, of tokens that prompt or output
            hold; above 0, 1 is none.
        logit_bias: Token id -> what is added to its logit, in [-100, 100].
        allowed_token_ids: Only these can be sampled.
        bad_words: Words that must not be generated: the token that would complete one, begun in the output, is never
            sampled. Spelt with other tokens, they can still appear.
        logits_processors: Callables ``(output token ids, logits) -> logits`` or ``(prompt token ids, output token ids,
            logits) -> logits``, with logits float32 [vocab_size], run in order on the raw logits. One that raises ends
            its request with finish reason "error".
        max_tokens: Most tokens to generate; ``None`` means as many as the context and the KV cache hold. A
            request also ends at ``max_model_len``.
        min_tokens: Before so many tokens neither an end-of-sequence token, nor one of ``stop_token_ids``, nor a stop
            string ends the request; the tokens are not sampled.
        stop: A string, or several, that end the request when its text contains one; they may span tokens. Need
            ``detokenize``.
        include_stop_str_in_output: Keep the stop string at the end of the text, or the text of the token that ended the
            request.
        stop_token_ids: Tokens that end the request besides the checkpoint's end-of-sequence tokens; not shown in the
            text either.
        ignore_eos: Generate past the end-of-sequence tokens.
        seed: Makes the request's sampling noise repeatable, alone or in any batch (its tokens too, but for rounding of
            the logits). ``None`` and -1 derive the noise from the engine's seed and the request's number.
        logprobs: Give the log-probabilities of each sampled token and of this many of the most likely ones (-1: all),
            of the model's own distribution, before anything above changes it.
        prompt_logprobs: The same of each prompt token but the first.
        truncate_prompt_tokens: Keep only the last so many tokens of the prompt (-1: as many as ``max_model_len`` holds
            beside one of output); ``RequestOutput.prompt`` keeps its text. ``None`` refuses a prompt that is too long.
        detokenize: Make text of the output.
        skip_special_tokens: Leave special tokens out of the text.
        spaces_between_special_tokens: Put spaces between them; slow tokenizers only.

    Raises:
        TypeError: A field has the wrong type, or is unknown.
        ValueError: A field is outside its range.
    """

    n: int = 1
    temperature: float | Schedule = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Iterable[int] | None = None
    bad_words: Iterable[str] | None = None
    logits_processors: Iterable[Callable[..., Any]] | None = None
    max_tokens: int | None = 64
    min_tokens: int = 0
    stop: str | Iterable[str] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: Iterable[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __new__(cls, *args: Any, **arguments: Any) -> "SamplingParams":
        for name, value in arguments.items():
            if name in OF_PARAMS:
                check_of_params(name, value)
            elif name not in _FIELDS:
                raise unknown_argument("SamplingParams", name, _FIELDS)
        return object.__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _FIELDS:
            raise unknown_argument("SamplingParams", name, _FIELDS)
        made = hasattr(self, _LAST_FIELD)
        before = getattr(self, name) if made else None
        object.__setattr__(self, name, value)
        if made:
            try:
                self.__post_init__()
            except (TypeError, ValueError):
                object.__setattr__(self, name, before)
                raise

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:  # as Python's own, whichever kind was given
            object.__setattr__(self, name, value)

        keep("n", check_int("n", self.n, low=1, high=MAX_COMPLETIONS))
        if not isinstance(self.temperature, Schedule) or isinstance(self.temperature, type):
            keep("temperature", check_number("temperature", self.temperature, low=0.0))
        else:
            schedule_pieces(self.temperature)
        keep("top_k", check_int("top_k", self.top_k, low=-1))
        keep("top_p", check_number("top_p", self.top_p, low=0.0, high=1.0))
        if self.top_p == 0.0:
            raise ValueError("top_p is 0; it must be in (0, 1] (use temperature=0 for the most likely token)")
        keep("min_p", check_number("min_p", self.min_p, low=0.0, high=1.0))
        for name in ("presence_penalty", "frequency_penalty"):
            keep(name, check_number(name, getattr(self, name), low=-2.0, high=2.0))
        keep("repetition_penalty", check_number("repetition_penalty", self.repetition_penalty, low=0.0))
        if self.repetition_penalty == 0.0:
            raise ValueError("repetition_penalty is 0; it must be a number above 0 (1 is none)")
        keep("logit_bias", _bias(self.logit_bias))
        keep("allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
        if self.allowed_token_ids == ():
            raise ValueError("allowed_token_ids is empty; name at least one token id, or None to allow all")
        keep("bad_words", _strings("bad_words", self.bad_words))
        keep("logits_processors", _callables(self.logits_processors))
        if self.max_tokens is not None:
            keep("max_tokens", check_int("max_tokens", self.max_tokens, low=1))
        keep("min_tokens", check_int("min_tokens", self.min_tokens, low=0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; it must be at most max_tokens, {self.max_tokens}")
        keep("stop", _strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop))
        keep("stop_token_ids", _ids("stop_token_ids", self.stop_token_ids) or ())
        if self.seed is not None:
            seed = check_int("seed", self.seed, low=-(2**63), high=2**64 - 1)
            keep("seed", None if seed == -1 else seed)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                keep(name, check_int(name, getattr(self, name), low=-1))
        if self.truncate_prompt_tokens is not None:
            kept = check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, low=-1)
            if kept == 0:
                raise ValueError("truncate_prompt_tokens is 0; it must be at least 1, -1 (what fits) or None (all)")
            keep("truncate_prompt_tokens", kept)
        for name in _BOOLEANS:
            keep(name, check_bool(name, getattr(self, name)))
        if self.stop and not self.detokenize:
            raise ValueError("stop needs detokenize=True: stop strings are looked for in the text")

    def clone(self) -> "SamplingParams":
        """A copy, which can be changed without changing this."""
        made = object.__new__(type(self))
        for name in _FIELDS:  # not by assignment: each was checked when it was
            value = getattr(self, name)
            object.__setattr__(made, name, dict(value) if isinstance(value, dict) else value)
        return made

    @classmethod
    def from_generation_config(cls, generation_config: Mapping[str, Any]) -> "SamplingParams":
        """The defaults a checkpoint ships in generation_config.json; what it leaves out keeps our default."""
        if generation_config.get("do_sample") is False:
            generation_config = {**generation_config, "temperature": 0.0}
        names = {"max_new_tokens": "max_tokens"}
        names |= {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
        found = {ours: generation_config[theirs] for theirs, ours in names.items() if theirs in generation_config}
        return cls(**{name: value for name, value in found.items() if value is not None})


_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_LAST_FIELD = dataclasses.fields(SamplingParams)[-1].name
_BOOLEANS = (
    "include_stop_str_in_output",
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


_set_fields = SamplingParams.__init__


@functools.wraps(_set_fields)
def _initialise(self: SamplingParams, *args: Any, **arguments: Any) -> None:
    """Arguments of vLLM's that ``__new__`` lets pass ask for nothing."""
    _set_fields(self, *args, **{name: value for name, value in arguments.items() if name not in OF_PARAMS})


SamplingParams.__init__ = _initialise  # type: ignore[method-assign]


def schedule_pieces(schedule: Schedule) -> list[tuple[float, float, float, float, bool]]:
    """A schedule's pieces; ValueError if they would fail, or give nonsense, in the middle of a step."""
    try:
        pieces = [(start, low, end, high, bool(cosine)) for start, low, end, high, cosine in schedule.pieces()]
    except Exception as error:  # whatever somebody's own raises
        raise ValueError(f"temperature is {schedule!r}, whose pieces cannot be had: {error}") from error
    if not pieces:
        raise ValueError(f"temperature is {schedule!r}, which has no pieces; it needs at least one")

    def temperature(value: float) -> float:
        return check_number(f"a temperature of {schedule!r}", value, low=0.0)

    def position(value: float) -> float:
        return check_number(f"a position of {schedule!r}", value, low=0.0, high=MAX_POSITION)

    return [
        (position(start), temperature(low), position(end), temperature(high), cosine)
        for start, low, end, high, cosine in pieces
    ]


def _bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias is {value!r} ({type(value).__name__}); it must map token ids to numbers")
    found: dict[int, float] = {}
    for token, bias in value.items():
        if isinstance(token, str) and token.isdecimal():  # as JSON has it
            token = int(token)
        number = check_number(f"logit_bias[{token!r}]", bias, low=-MAX_LOGIT_BIAS, high=MAX_LOGIT_BIAS)
        token = check_int("a token id of logit_bias", token, low=0)
        if token in found:
            raise ValueError(f"logit_bias names token id {token} twice; give it one number")
        found[token] = number
    return found or None


def _items(name: str, value: Any, of: str) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a list of {of}")
    return list(value)


def _ids(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    return tuple(
        check_int(f"{name}[{index}]", token, low=0) for index, token in enumerate(_items(name, value, "token ids"))
    )


def _strings(name: str, value: Any) -> tuple[str, ...]:
    strings = [] if value is None else _items(name, value, "strings")
    for index, string in enumerate(strings):
        if not isinstance(string, str):
            raise TypeError(f"{name}[{index}] is {string!r} ({type(string).__name__}); it must be a string")
        if not string:
            raise ValueError(f"{name}[{index}] is empty; it must be a string of at least one character")
    return tuple(strings)


def _callables(value: Any) -> tuple[Callable[..., Any], ...]:
    processors = [] if value is None else _items("logits_processors", value, "callables")
    for index, processor in enumerate(processors):
        if not callable(processor):
            raise TypeError(f"logits_processors[{index}] is {processor!r}; it must be callable")
    return tuple(processors)


if not TYPE_CHECKING:  # a type checker that saw it would let every name pass

    def __getattr__(name: str) -> Any:
        raise missing_name(__name__, name)
