"""What a request gives back."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Args:
        index: Number of the completion among the request's.
        text: The generated text without special tokens; empty when the engine has no tokenizer.
        token_ids: The generated token ids, the end-of-sequence token included if one was generated.
        cumulative_logprob: Sum of the chosen tokens' log-probabilities, or None if none were asked for.
        logprobs: Log-probabilities by position, or None if none were asked for.
        finish_reason: "stop" (an end-of-sequence token), "length" (max_tokens or max_model_len) or "abort"; None
            while the request runs.
        stop_reason: The token id that ended the request where it was not the model's first EOS id, else None.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of ``time.perf_counter``; None where they have not.

    Args:
        arrival_time: The request was added.
        first_scheduled_time: Its first token was scheduled.
        first_token_time: Its first output token was known.
        finished_time: Its last output token was known.
        num_preemptions: How often it was preempted and recomputed.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its completions.

    ``output["text"]`` and ``output["token_ids"]`` read the first completion.

    Args:
        request_id: The engine's name for the request.
        prompt: The prompt's text; None if it was given as token ids.
        prompt_token_ids: The prompt's token ids.
        outputs: The completions.
        finished: Whether all completions have ended.
        num_cached_tokens: Prompt tokens whose KV came from the prefix cache.
        metrics: Times of the request.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = field(default=None)

    __iter__ = None  # or Python would try the keys 0, 1, ...

    def __contains__(self, key: object) -> bool:
        return key in ("text", "token_ids")

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(f"{key!r}; a RequestOutput answers 'text' and 'token_ids' (the rest are attributes)")
        return getattr(self.outputs[0], key)
