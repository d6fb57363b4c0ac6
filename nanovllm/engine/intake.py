"""Requests before they enter the engine: checked, tokenised, and refused with a reason."""

import logging
from collections.abc import Sequence
from typing import Any

from nanovllm.engine.prompts import Prompt, check_text, parse_prompt
from nanovllm.engine.request import PreparedRequest
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.tokenizer import RenderedText, check_start, encode, encode_words
from nanovllm.layers.temperature import Pieces
from nanovllm.sampling_params import SamplingParams, schedule_pieces
from nanovllm.utils.model_config import ModelConfig
from nanovllm.utils.text import counted

logger = logging.getLogger(__name__)

# Log-probabilities of a prompt, or of all its completions. As Python's objects so many take a few GB: all of the
# vocabulary of 151,936 for 110 tokens, or 128 a token for 131,072.
MAX_LOGPROBS = 2**24


class Intake:
    """Checks requests against the model and the KV cache.

    Args:
        model_config: The checkpoint's configuration.
        tokenizer: Its tokenizer, or None.
        default_params: Sampling parameters of requests without their own.
        max_model_len: Most tokens of a sequence.
        scheduler: Knows what the KV cache holds.
        max_logprobs: Most log-probabilities asked for at a token; -1 for no limit.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        tokenizer: Any,
        default_params: SamplingParams,
        max_model_len: int,
        scheduler: Scheduler,
        max_logprobs: int = -1,
    ) -> None:
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.default_params = default_params
        self.max_model_len = max_model_len
        self.scheduler = scheduler
        self.max_logprobs = max_logprobs
        self._has_warned_of_max_tokens = False
        self._encoded_words: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}  # of the latest bad_words

    def prepare(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | None], first_index: int = 0
    ) -> list[PreparedRequest | Exception]:
        """Check and tokenise prompts; changes nothing.

        Args:
            prompts: Strings, lists of token ids, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}``; an exception
                says why there is none.
            params: One a prompt; None takes the checkpoint's defaults.
            first_index: Number of the first prompt, for the messages; a single one from 0 on is "the prompt".

        Returns:
            For each prompt the request, or what is wrong with it: a TypeError or a ValueError that names it.
        """
        kept: dict[int, SamplingParams] = {}  # the caller may change the originals while the requests run
        single = len(prompts) == 1 and first_index == 0
        prepared: list[Any] = []
        texts: list[str] = []
        for index, (prompt, given) in enumerate(zip(prompts, params, strict=True), first_index):
            name = "the prompt" if single else f"prompt {index}"
            if isinstance(prompt, Exception):
                prepared.append(prompt)
                continue
            try:
                text, token_ids = parse_prompt(name, prompt)
                if given is not None and not isinstance(given, SamplingParams):
                    raise TypeError(f"the sampling_params of {name} are {given!r}; pass a SamplingParams")
                if token_ids is None and self.tokenizer is None:
                    raise ValueError(
                        f"{name} is text, which needs a tokenizer, and the engine was made with "
                        "skip_tokenizer_init=True; pass token ids"
                    )
                chosen = given or self.default_params
                if id(chosen) not in kept:
                    kept[id(chosen)] = _as_it_is(chosen)
                if token_ids is None and text is not None:
                    if kept[id(chosen)].truncate_prompt_tokens is None:
                        check_start(name, self.tokenizer, text, self.max_model_len)
                    texts.append(text)
                prepared.append((name, text, token_ids, kept[id(chosen)]))
            except (TypeError, ValueError) as error:
                prepared.append(error)
        encoded = iter(self._tokenize(texts))
        for index, request in enumerate(prepared):
            if isinstance(request, Exception):
                continue
            name, text, token_ids, chosen = request
            try:
                prepared[index] = self._prepare(name, text, next(encoded) if token_ids is None else token_ids, chosen)
            except (TypeError, ValueError) as error:
                prepared[index] = error
        return prepared

    def tokenize_pair(self, index: int, prompt: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and what follows it.

        Raises:
            TypeError: One has the wrong type.
            ValueError: One is empty, or text without a tokenizer.
        """
        names = f"prompt {index}", f"continuation {index}"
        (text, ids), (text_after, ids_after) = parse_prompt(names[0], prompt), parse_prompt(names[1], continuation)
        if self.tokenizer is None and (ids is None or ids_after is None):
            raise ValueError(f"{names[0]} or its continuation is text, which needs a tokenizer; pass token ids")
        for name, given, known in ((names[0], text, ids), (names[1], text_after, ids_after)):
            if given is not None and known is None:
                check_start(name, self.tokenizer, given, self.max_model_len)
        if ids is None:
            [ids] = self._tokenize([text or ""])
        if ids_after is None and self.tokenizer is not None:
            ids_after = encode(self.tokenizer, str(text_after), add_special_tokens=False)
            if text is not None:
                [together] = self._tokenize([f"{text}{text_after}"])
                if together[: len(ids)] == ids:
                    ids_after = together[len(ids) :]
        for name, token_ids in zip(names, (ids, ids_after), strict=True):
            if not token_ids:
                raise ValueError(f"{name} is empty; give at least one token")
        return ids, ids_after or []

    def prepare_scored(self, name: str, prompt: list[int], continuation: list[int]) -> PreparedRequest:
        """A request that computes the log-probabilities of ``continuation`` after ``prompt``, and no more.

        Raises:
            ValueError: They name a token that does not exist, or do not fit; the message says which.
        """
        token_ids = [*prompt, *continuation]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, ignore_eos=True, detokenize=False)
        limit = self._check_length(name, token_ids, params, self.max_model_len + 1)
        return PreparedRequest(None, token_ids, params, limit, first_logprob=len(prompt), num_shared_tokens=len(prompt))

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts or self.tokenizer is None:
            return []
        if any(isinstance(text, RenderedText) for text in texts):
            return [encode(self.tokenizer, text) for text in texts]
        return self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]

    def _prepare(self, name: str, text: str | None, token_ids: list[int], params: SamplingParams) -> PreparedRequest:
        """Check one request against the model."""
        for field in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            outside = [token for token in getattr(params, field) or () if token >= self.model_config.vocab_size]
            if outside:
                raise ValueError(
                    f"{field} of {name} has token id {outside[0]}; the vocabulary has ids 0 to "
                    f"{self.model_config.vocab_size - 1}"
                )
        if self.tokenizer is None and (params.stop or params.bad_words):
            field = "stop" if params.stop else "bad_words"
            raise ValueError(
                f"{field} of {name} needs a tokenizer, and the engine was made with skip_tokenizer_init=True; use "
                "stop_token_ids or logit_bias"
            )
        if params.truncate_prompt_tokens is not None:
            kept = params.truncate_prompt_tokens
            token_ids = token_ids[-(self.max_model_len - 1 if kept == -1 else kept) :]
        limit = self._check_length(name, token_ids, params, self.max_model_len)
        self._check_logprobs("prompt_logprobs", name, params.prompt_logprobs, len(token_ids) - 1)
        self._check_logprobs("logprobs", name, params.logprobs, limit * params.n)
        bad_words = self._encode_words(tuple(params.bad_words)) if params.bad_words else ()
        first_logprob = None if params.prompt_logprobs is None else 1
        return PreparedRequest(text, token_ids, params, limit, bad_words, first_logprob)

    def _encode_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Token ids of ``bad_words``; most requests of a call have the same."""
        if words not in self._encoded_words:
            for index, word in enumerate(words):
                check_text(f"bad_words[{index}]", word)
            spelt = encode_words(self.tokenizer, words)
            # The tokenizer may know tokens that the model lacks: what is spelt with one cannot be generated anyway.
            known = tuple(ids for ids in spelt if max(ids) < self.model_config.vocab_size)
            self._encoded_words = {words: known}
        return self._encoded_words[words]

    def _check_logprobs(self, field: str, name: str, number: int | None, num_tokens: int) -> None:
        """Refuse a ``number`` of log-probabilities (-1: all) for each of so many tokens that is over a limit."""
        if number is None:
            return
        vocab_size = self.model_config.vocab_size
        each = vocab_size if number == -1 else min(number, vocab_size)
        wanted = f"{field} of {name} is {number}" + (f" (all {vocab_size:,})" if number == -1 else "")
        if -1 < self.max_logprobs < each:
            raise ValueError(f"{wanted}; max_logprobs is {self.max_logprobs} (lower {field}, or raise max_logprobs)")
        if each * num_tokens > MAX_LOGPROBS:
            raise ValueError(
                f"{wanted}, which for {num_tokens:,} tokens makes up to {each * num_tokens:,} log-probabilities; at "
                f"most {MAX_LOGPROBS:,} are given of a request (lower {field}, or the number of tokens)"
            )

    def _check_length(self, name: str, token_ids: list[int], params: SamplingParams, longest: int) -> int:
        """Check a prompt's ids and room; returns the most tokens it may generate."""
        length, vocab_size = len(token_ids), self.model_config.vocab_size
        if not length:
            raise ValueError(f"{name} is empty; give at least one token")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name} has token id {low if low < 0 else high}; the vocabulary has ids 0 to {vocab_size - 1}"
            )
        if length >= longest:
            raise ValueError(
                f"{name} has {counted(length, 'token')}; max_model_len is {self.max_model_len}, prompt and "
                "output together "
                "(raise max_model_len or shorten the prompt)"
            )
        limit = longest - length
        capacity = self.scheduler.max_tokens_per_sequence()
        if params.max_tokens is None:
            limit = max(1, min(limit, capacity - length))
        else:
            if params.max_tokens > limit and not self._has_warned_of_max_tokens:
                self._has_warned_of_max_tokens = True
                logger.warning(
                    "max_tokens is %d, but %s has %d tokens and max_model_len is %d, prompt and output together: at "
                    "most %d are generated (raise max_model_len, or pass max_tokens=None for what fits; said once)",
                    params.max_tokens,
                    name,
                    length,
                    self.max_model_len,
                    limit,
                )
            limit = min(limit, params.max_tokens)
        if length + limit > capacity:
            manager = self.scheduler.block_manager
            blocks = manager.blocks_needed(length + limit - 1)
            raise ValueError(
                f"{name} has {counted(length, 'token')} and may generate {limit}, which takes "
                f"{counted(blocks, 'KV block')} of "
                f"{manager.block_size} tokens; the cache has {manager.num_blocks} (raise num_kvcache_blocks, lower "
                "max_tokens or shorten the prompt)"
            )
        return limit


def _as_it_is(params: SamplingParams) -> SamplingParams:
    """A copy that nothing outside can change, whatever was changed in place checked again.

    Raises:
        TypeError: An entry of ``logit_bias`` or of a temperature schedule of the caller's own has the wrong type.
        ValueError: One is outside its range.
    """
    kept = params.clone()
    if kept.logit_bias is not None:
        kept.logit_bias = kept.logit_bias  # an assignment checks
    if not isinstance(kept.temperature, (int, float)):
        kept.temperature = Pieces(tuple(schedule_pieces(kept.temperature)))
    return kept


def default_sampling_params(model_config: ModelConfig) -> SamplingParams:
    """The checkpoint's own sampling parameters; ValueError naming the file if they are invalid."""
    try:
        return SamplingParams.from_generation_config(model_config.generation_config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{model_config.path}/generation_config.json: {error}; correct the file") from error
