"""A step that has been launched, and what it gives once the device is done."""

from dataclasses import dataclass

import torch

from nanovllm.engine.step_plan import StepResult, TokenLogprobs
from nanovllm.layers.logprobs import normalize, token_logprobs, top_logprobs
from nanovllm.utils.transfer import HostCopy

NO_TOKEN = (
    "the logits are not finite, or no token is allowed: the weights or the dtype overflow (try dtype='float32'), or "
    "allowed_token_ids, bad_words, min_tokens and logits_processors leave no token"
)


class DeviceMemoryError(MemoryError):
    """A step did not fit the device's memory. Nothing of it was run that cannot be run again."""


@dataclass(slots=True)
class DeviceLogprobs:
    """Log-probabilities of some rows of logits, on their way to the host: of given tokens, and the most likely ones."""

    tokens: HostCopy  # int64 [rows]
    logprobs: HostCopy  # float32 [rows]
    ranks: HostCopy  # int64 [rows]
    top_ids: HostCopy  # int64 [rows, most asked for]
    top_logprobs: HostCopy  # float32, the same
    numbers: list[int]  # by row, how many of those it asked for; -1 for all

    @classmethod
    def compute(cls, logits: torch.Tensor, tokens: torch.Tensor, numbers: list[int]) -> "DeviceLogprobs":
        """Of float32 logits [rows, vocab_size]."""
        most = logits.shape[1] if -1 in numbers else min(max(numbers), logits.shape[1])
        normalizer = normalize(logits)
        values, ids = top_logprobs(logits, most, normalizer)
        chosen, ranks = token_logprobs(logits, tokens, normalizer)
        return cls(HostCopy(tokens), HostCopy(chosen), HostCopy(ranks), HostCopy(ids), HostCopy(values), numbers)

    def to_host(self) -> list[TokenLogprobs]:
        rows = zip(
            self.tokens.wait().tolist(),
            self.logprobs.wait().tolist(),
            self.ranks.wait().tolist(),
            self.top_ids.wait().tolist(),
            self.top_logprobs.wait().tolist(),
            self.numbers,
            strict=True,
        )
        return [
            TokenLogprobs(token, logprob, rank, list(zip(ids, values, strict=True))[: None if n == -1 else n])
            for token, logprob, rank, ids, values, n in rows
        ]


class StepHandle:
    """A step that has been launched, its results already on their way to the host.

    Args:
        tokens: Integers [sampling rows], which the next step may overwrite on the device; None if no row samples.
        errors: By sampling row, what went wrong before sampling.
        logprobs: Of the sampled tokens: their rows, and what they asked for.
        prompt_logprobs: By row of the plan: first position, and what was computed from there on.
    """

    def __init__(
        self,
        tokens: torch.Tensor | None,
        errors: dict[int, str] | None = None,
        logprobs: tuple[list[int], DeviceLogprobs] | None = None,
        prompt_logprobs: dict[int, tuple[int, list[DeviceLogprobs]]] | None = None,
    ) -> None:
        self._tokens = None if tokens is None else HostCopy(tokens)
        self._errors = errors or {}
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs or {}

    def result(self) -> StepResult:
        """What the step gave. Waits for the device."""
        tokens = [] if self._tokens is None else self._tokens.wait().tolist()
        errors = {row: self._errors.get(row, NO_TOKEN) for row, token in enumerate(tokens) if token < 0}
        logprobs = {}
        if self._logprobs is not None:
            rows, computed = self._logprobs
            logprobs = dict(zip(rows, computed.to_host(), strict=True))
        prompt_logprobs = {
            row: (first, [logprob for piece in pieces for logprob in piece.to_host()])
            for row, (first, pieces) in self._prompt_logprobs.items()
        }
        return StepResult(tokens, errors, logprobs, prompt_logprobs)
