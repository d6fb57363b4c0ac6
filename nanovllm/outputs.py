"""What a request gives back."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanovllm.utils.validation import unknown_attribute


@dataclass(slots=True)
class Logprob:
    """A token's log-probability.

    Args:
        logprob: Natural logarithm of its probability under the model, before penalties, temperature and the like.
        rank: Its place among all tokens, 1 for the most likely; of equally likely ones the lower id comes first.
        decoded_token: Its text; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Args:
        index: Number of the completion among the request's.
        text: The generated text, without special tokens unless asked for; empty when the engine has no tokenizer.
        token_ids: The generated token ids, the end-of-sequence token or those of a stop string included.
        cumulative_logprob: Sum of the generated tokens' log-probabilities, or None if none were asked for.
        logprobs: For each generated token, its own and the most likely tokens' log-probabilities by token id; None if
            none were asked for.
        finish_reason: "stop" (an end-of-sequence token, a stop token or a stop string), "length" (max_tokens or
            max_model_len), "abort" or "error"; None while the request runs.
        stop_reason: The stop string, or the id of the token that ended the request where it was not the model's first
            EOS id, else None.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of ``time.perf_counter``; None where they have not.

    Args:
        arrival_time: The request was added.
        first_scheduled_time: Its first token was scheduled.
        first_token_time: Its first output token was known, of whichever completion.
        finished_time: The last output token of its last completion was known.
        num_preemptions: How often one of its completions was preempted and recomputed.
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
        prompt_logprobs: For each prompt token its own and the most likely tokens' log-probabilities by token id, None
            for the first; None if none were asked for.
        prompt_index: Position of the prompt among those of its call; None for a request added to the engine by hand.
        error: What went wrong, where a completion's finish_reason is "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    prompt_index: int | None = None
    error: str | None = None

    __iter__ = None  # or Python would try the keys 0, 1, ...

    def __contains__(self, key: object) -> bool:
        return key in ("text", "token_ids")

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(f"{key!r}; a RequestOutput answers 'text' and 'token_ids' (the rest are attributes)")
        return getattr(self.outputs[0], key)

    if not TYPE_CHECKING:  # a type checker that saw it would let every name pass

        def __getattr__(self, name: str) -> Any:
            is_a_completions = name in CompletionOutput.__dataclass_fields__
            instead = f"it is a completion's, output.outputs[0].{name}" if is_a_completions else None
            raise unknown_attribute(self, name, instead)


@dataclass(slots=True)
class StreamOutput:
    """A piece of a completion, as :meth:`nanovllm.LLM.stream` yields it.

    Args:
        prompt_index: Position of the prompt among those of the call.
        request_id: The engine's name for the request.
        index: Number of the completion among the request's.
        text: Text that has become certain since the completion's last piece, never half a character nor what may become
            a stop string; all pieces together are its text.
        token_ids: Tokens generated since the last piece.
        finish_reason: Why the completion ended, with its last piece; None before.
        output: The whole request, with the last piece of its last completion; None before.
    """

    prompt_index: int
    request_id: str
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    output: RequestOutput | None = None


@dataclass(slots=True)
class ScoreOutput:
    """How likely a continuation is, as :meth:`nanovllm.LLM.score` gives it.

    Args:
        logprob: Log-probability of the continuation given the prompt: the sum of its tokens'.
        token_ids: The continuation's tokens.
        token_logprobs: Their log-probabilities, each given everything before it.
        is_greedy: Whether each is the most likely token, as greedy decoding would have taken.
    """

    logprob: float
    token_ids: list[int]
    token_logprobs: list[float]
    is_greedy: bool
