"""A request: its sequences, their text, and what is given back."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.detokenizer import Detokenizer, decode
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import TokenLogprobs
from nanovllm.errors import EngineDeadError
from nanovllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamOutput
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PreparedRequest:
    """A request that has passed every check and waits to be added.

    Args:
        prompt: Its text; None if it was given as token ids.
        prompt_token_ids: At least one.
        params: Its sampling parameters.
        max_output_tokens: Most tokens it may generate.
        bad_words: Token ids of ``params.bad_words``.
        first_logprob: First prompt token whose log-probability is wanted; None for none.
        num_shared_tokens: Tokens at its beginning that it shares with the request it is said to follow.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_output_tokens: int
    bad_words: tuple[tuple[int, ...], ...] = ()
    first_logprob: int | None = None
    num_shared_tokens: int = 0


@dataclass(slots=True)
class LostRequest:
    """Stands for the output of a request that the engine had to drop."""

    request_id: str
    cause: BaseException | None

    def error(self, message: str) -> RuntimeError:
        """What tells its owner: after the end of a rank, all calls that went on raise the same kind."""
        return (EngineDeadError if isinstance(self.cause, EngineDeadError) else RuntimeError)(message)


Outcome = RequestOutput | StreamOutput | LostRequest


class Owner:
    """Whoever waits for requests: what they give is put into ``inbox``.

    Args:
        stream: Whether each new piece is wanted as it comes, and not the finished output only.
    """

    def __init__(self, stream: bool = False) -> None:
        self.stream = stream
        self.inbox: deque[Outcome] = deque()

    def take(self) -> Iterator[Outcome]:
        """What came since the last call, in order. Another thread may be putting more in."""
        while self.inbox:
            yield self.inbox.popleft()


@dataclass(slots=True)
class Request:
    """A request in the engine.

    Args:
        request_id: Its name.
        prompt: Its text; None if it was given as token ids.
        prompt_index: Position among the prompts of its call.
        params: Its sampling parameters.
        owner: Who waits for it; None for one that was added by hand.
        tokenizer: Makes text of tokens; None if no text is wanted.
        sequences: One a completion, in order.
        token_texts: What single tokens decode to, as far as any request has asked; shared by all.
    """

    request_id: str
    prompt: str | None
    prompt_index: int | None
    params: SamplingParams
    owner: Owner | None
    tokenizer: Any
    sequences: list[Sequence]
    token_texts: dict[int, str] = field(default_factory=dict)
    num_unfinished: int = 0  # sequences whose end was not told yet
    is_followed: bool = False  # whether tokens are looked at as they come, and not only when they are all there
    _detokenizers: dict[int, Detokenizer] = field(default_factory=dict)  # by completion, for those that need one
    _num_streamed: dict[int, int] = field(default_factory=dict)  # tokens given out, by completion

    def __post_init__(self) -> None:
        params = self.params
        self.num_unfinished = len(self.sequences)
        self.is_followed = bool(params.stop) or (self.owner is not None and self.owner.stream)
        if self.tokenizer is None or not self.is_followed:
            return  # the text is made at the end, at once
        for seq in self.sequences:
            self._detokenizers[seq.index] = Detokenizer(
                self.tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
                stop=tuple(params.stop or ()),
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )

    def follow(self, seq: Sequence) -> str | None:
        """Make text of the newest token of ``seq``; returns the stop string that it completed, if it did."""
        detokenizer = self._detokenizers.get(seq.index)
        if detokenizer is None or seq.finish_reason == "error":
            return None
        try:
            stop = None if self._hides_last_token(seq) else detokenizer.append([seq.token_ids[-1]])
            return detokenizer.finish() if stop is None and seq.finished else stop
        except Exception:  # whatever the tokenizer raises must not cost other requests their results
            self._give_up(detokenizer)
            return None

    def stream_output(self, seq: Sequence) -> StreamOutput | None:
        """What is new of a completion; None if there is nothing to tell yet."""
        detokenizer = self._detokenizers.get(seq.index)
        if seq.finished and detokenizer is not None:
            self._finish_text(detokenizer)
        text = detokenizer.take_delta(seq.finished) if detokenizer is not None else ""
        start = self._num_streamed.get(seq.index, 0)
        if not seq.finished and not text and detokenizer is not None:
            return None
        new = seq.token_ids[seq.num_prompt_tokens + start :].tolist()
        self._num_streamed[seq.index] = start + len(new)
        return StreamOutput(self.prompt_index or 0, self.request_id, seq.index, text, new, seq.finish_reason)

    def output(self) -> RequestOutput:
        """What the request gives back, now that all completions have ended."""
        first = self.sequences[0]
        prompt_token_ids = first.token_ids[: first.num_prompt_tokens].tolist()
        prompt_logprobs = None
        if self.params.prompt_logprobs is not None:
            known = first.prompt_logprobs
            prompt_logprobs = [
                self._logprobs(known[place]) if place in known else None for place in range(len(prompt_token_ids))
            ]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=[self._completion(seq) for seq in self.sequences],
            finished=True,
            num_cached_tokens=first.num_cached_tokens,
            metrics=self._metrics(),
            prompt_logprobs=prompt_logprobs,
            prompt_index=self.prompt_index,
            error=next((seq.error for seq in self.sequences if seq.error is not None), None),
        )

    def _metrics(self) -> RequestMetrics:
        """Times of the whole request: from the first that happened to any of its completions to the last one's end."""
        each = [seq.metrics for seq in self.sequences]

        def earliest(times: Iterable[float | None]) -> float | None:
            return min((time for time in times if time is not None), default=None)

        return RequestMetrics(
            arrival_time=each[0].arrival_time,
            first_scheduled_time=earliest(times.first_scheduled_time for times in each),
            first_token_time=earliest(times.first_token_time for times in each),
            finished_time=max((times.finished_time for times in each if times.finished_time is not None), default=None),
            num_preemptions=sum(times.num_preemptions for times in each),
        )

    def _completion(self, seq: Sequence) -> CompletionOutput:
        wanted = self.params.logprobs is not None
        return CompletionOutput(
            index=seq.index,
            text=self._text(seq),
            token_ids=seq.output_token_ids,
            cumulative_logprob=sum(logprob.logprob for logprob in seq.logprobs) if wanted else None,
            logprobs=[self._logprobs(logprob) for logprob in seq.logprobs] if wanted else None,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )

    def _text(self, seq: Sequence) -> str:
        if self.tokenizer is None:
            return ""
        detokenizer = self._detokenizers.get(seq.index)
        if detokenizer is not None:
            self._finish_text(detokenizer)
            return detokenizer.text
        token_ids = seq.output_token_ids[:-1] if self._hides_last_token(seq) else seq.output_token_ids
        return self._decode(token_ids, self.params.skip_special_tokens)

    def _hides_last_token(self, seq: Sequence) -> bool:
        """Whether a token ended the sequence that is not to show in its text."""
        by_token = seq.finish_reason == "stop" and not isinstance(seq.stop_reason, str)
        return by_token and not self.params.include_stop_str_in_output

    def _finish_text(self, detokenizer: Detokenizer) -> None:
        try:
            detokenizer.finish()
        except Exception:
            self._give_up(detokenizer)

    def _decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        try:
            return decode(
                self.tokenizer,
                token_ids,
                skip_special_tokens=skip_special_tokens,
                spaces_between_special_tokens=self.params.spaces_between_special_tokens,
            )
        except Exception:
            self._warn()
            return ""

    def _logprobs(self, known: TokenLogprobs) -> dict[int, Logprob]:
        """By token id: the token's own, and the most likely ones'."""
        found = {known.token_id: Logprob(known.logprob, known.rank)}
        for rank, (token, logprob) in enumerate(known.top, 1):
            found.setdefault(token, Logprob(logprob, rank))
        if self.tokenizer is not None:
            for token, entry in found.items():
                entry.decoded_token = self._token_text(token)
        return found

    def _token_text(self, token: int) -> str:
        """What a token decodes to by itself. Every position asks for the same few, and a decode takes 2 us or more."""
        text = self.token_texts.get(token)
        if text is None:
            text = self._decode([token], False)
            if text:  # or the tokenizer may have failed, this once
                self.token_texts[token] = text
        return text

    def _give_up(self, detokenizer: Detokenizer) -> None:
        """Decode no more of a completion; what its text is so far may have been given out, and stays."""
        self._warn()
        detokenizer.give_up()

    def _warn(self) -> None:
        message = "request %s: its tokens cannot be decoded; its text stays incomplete"
        logger.warning(message, self.request_id, exc_info=True)
