"""A conversation with a model, without its terminal: what was said, and what each answer cost."""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.text import counted

OPEN, CLOSE = "<think>", "</think>"


@dataclass(slots=True)
class Turn:
    """What an answer cost.

    Args:
        prompt_tokens: Of the conversation up to the answer.
        cached_tokens: Of those, the ones whose keys and values were still there from earlier turns; None if it was
            interrupted.
        output_tokens: Generated, thinking included.
        seconds: From the question to the end of the answer.
        first_seconds: From the question to the first piece; None if there was none.
        finish_reason: "stop", "length", or "interrupted".
    """

    prompt_tokens: int
    cached_tokens: int | None = None
    output_tokens: int = 0
    seconds: float = 0.0
    first_seconds: float | None = None
    finish_reason: str | None = None


class ContextFullError(ValueError):
    """The conversation has no room left for an answer."""


class ThoughtSplitter:
    """Tells the thinking in a stream of text from the answer; the tags belong to neither.

    Args:
        is_open: Whether the prompt has begun the thinking already.
    """

    def __init__(self, is_open: bool) -> None:
        self.is_thought = is_open
        self._held = ""  # what may turn out to begin a tag

    def feed(self, text: str, is_last: bool = False) -> Iterator[tuple[bool, str]]:
        """Pieces of ``text`` as (whether it is a thought, text)."""
        text, self._held = self._held + text, ""
        while text:
            tag = CLOSE if self.is_thought else OPEN
            before, found, text = text.partition(tag)
            if not found:
                held = 0 if is_last else max(n for n in range(len(tag)) if before.endswith(tag[:n]))
                before, self._held = before[: len(before) - held], before[len(before) - held :]
            if before:
                yield self.is_thought, before
            if found:
                self.is_thought = not self.is_thought


@dataclass(slots=True)
class ChatSession:
    """A conversation that goes on.

    The history holds answers without their thinking, as chat templates of models that think want it. What earlier
    turns have in common with the next prompt is found in the prefix cache.

    Args:
        llm: Answers.
        params: How it samples.
        template_kwargs: Arguments of the chat template.
        system: The system message.
    """

    llm: LLM
    params: SamplingParams
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.history.clear()

    def ask(self, text: str) -> Iterator[tuple[bool, str]]:
        """Answer a message, piece by piece.

        The turn enters the history when it ends, or when the iterator is closed or interrupted, if there is an answer
        by then; else the conversation is what it was before.

        Yields:
            (whether it is a thought, text).

        Raises:
            ContextFullError: There is no room for it.
            ValueError: The chat template or the engine refuses the conversation.
        """
        start = time.perf_counter()
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        question = {"role": "user", "content": text}
        prompt: Any = self.llm.render_chat(
            [*system, *self.history, question], chat_template_kwargs=self.template_kwargs
        )[0]
        length, limit = len(prompt["prompt_token_ids"]), self.llm.engine.max_model_len
        if length >= limit:
            raise ContextFullError(
                f"with this message the conversation has {counted(length, 'token')}, and max_model_len is "
                f"{limit}, answer included"
            )
        turn = Turn(length)
        answer: list[str] = []
        pieces = self.llm.stream(prompt, self._params_within(length, limit))
        try:
            splitter = ThoughtSplitter(prompt["prompt"].rstrip().endswith(OPEN))
            turn.finish_reason = "interrupted"
            for piece in pieces:
                turn.output_tokens += len(piece.token_ids)
                turn.first_seconds = turn.first_seconds or time.perf_counter() - start
                if piece.output is not None:
                    self._learn(turn, piece.output)
                for is_thought, part in splitter.feed(piece.text, piece.output is not None):
                    if not is_thought:
                        answer.append(part)
                    yield is_thought, part
        finally:
            pieces.close()
            turn.seconds = time.perf_counter() - start
            said = "".join(answer).strip()
            if turn.output_tokens:
                self.turns.append(turn)
            if said:
                self.history += [question, {"role": "assistant", "content": said}]

    def _params_within(self, length: int, limit: int) -> SamplingParams:
        """The parameters, no longer than there is room for."""
        if self.params.max_tokens is None:
            return self.params
        return dataclasses.replace(self.params, max_tokens=min(self.params.max_tokens, limit - length))

    def _learn(self, turn: Turn, output: RequestOutput) -> None:
        turn.cached_tokens = output.num_cached_tokens
        turn.output_tokens = len(output.outputs[0].token_ids)
        turn.finish_reason = output.outputs[0].finish_reason
