"""The engine: takes requests, runs steps until they are finished, and turns tokens back into text."""

import logging
import os
import time
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any

import xxhash

from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import ModelRunner, resolve_device, resolve_dtype
from nanovllm.engine.prompts import Prompt, parse_prompt
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import StepPlan
from nanovllm.models.registry import get_model_class
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.model_config import ModelConfig, load_model_config

logger = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 4096
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
# What a generation_config.json may ask for that this version does not do, and the value that asks for nothing.
_NOT_HONOURED = {"repetition_penalty": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(slots=True)
class PreparedRequest:
    """A request that has passed every check and waits to be added."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_output_tokens: int


@dataclass(slots=True)
class _Counters:
    """Running totals, since the engine was made."""

    startup_seconds: float = 0.0
    output_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0  # of steps that computed prompt tokens
    decode_tokens: int = 0  # sampled in steps that only decoded
    decode_seconds: float = 0.0  # of those steps
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finished_requests: int = 0


class LLMEngine:
    """Runs requests to their end, a step at a time.

    Args:
        config: What the user asked for.

    Raises:
        ValueError: The configuration cannot be served by this checkpoint or this machine.
        FileNotFoundError: The checkpoint lacks a file.
    """

    def __init__(self, config: EngineConfig) -> None:
        started = time.perf_counter()
        if config.tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size is {config.tensor_parallel_size}; this version runs on one rank (use 1)"
            )
        self.config = config
        self.model_config = load_model_config(config.model, config.hf_overrides)
        longest = self.model_config.max_position_embeddings
        self.max_model_len = config.max_model_len or min(DEFAULT_MAX_MODEL_LEN, longest)
        if self.max_model_len > longest:
            raise ValueError(
                f"max_model_len is {self.max_model_len}, but the model has {longest} positions "
                "(max_position_embeddings); lower max_model_len, or extend the model with "
                "hf_overrides={'rope_parameters': {...}, 'max_position_embeddings': ...}"
            )
        # What can be refused quickly is refused before anything large is loaded.
        get_model_class(self.model_config.architecture)
        resolve_dtype(config.dtype, self.model_config)
        resolve_device(config.device)
        self.default_params = default_sampling_params(self.model_config)
        self.tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config.tokenizer or config.model)
        self.runner = ModelRunner(config, self.model_config, self.max_model_len)
        block_manager = BlockManager(
            self.runner.num_kvcache_blocks, self.runner.block_size, config.enable_prefix_caching
        )
        self.scheduler = Scheduler(block_manager, self.runner.num_slots, self.runner.max_step_tokens)
        self.counters = _Counters()
        self._requests: dict[str, tuple[str | None, Sequence]] = {}
        self._num_added = 0
        self.counters.startup_seconds = time.perf_counter() - started
        logger.info(
            "ready in %.2f s: %s on %s, %s attention, %d KV blocks of %d tokens",
            self.counters.startup_seconds,
            self.runner.dtype,
            self.runner.device,
            self.runner.attention.name,
            self.runner.num_kvcache_blocks,
            self.runner.block_size,
        )

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

    @property
    def num_unfinished_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def prepare(self, prompts: ListLike[Prompt], params: ListLike[SamplingParams | None]) -> list[PreparedRequest]:
        """Check and tokenise prompts; changes nothing.

        Args:
            prompts: Strings, lists of token ids, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}``.
            params: One a prompt; None takes the checkpoint's defaults.

        Raises:
            TypeError: A prompt or its parameters are of the wrong type.
            ValueError: A prompt is empty, names a token that does not exist, or cannot fit; the message says which.
        """
        names = [f"prompt {index}" if len(prompts) > 1 else "the prompt" for index in range(len(prompts))]
        parsed = [parse_prompt(name, prompt) for name, prompt in zip(names, prompts, strict=True)]
        texts = [text for text, ids in parsed if ids is None and text is not None]
        if texts and self.tokenizer is None:
            raise ValueError(
                "a text prompt needs a tokenizer, and the engine was made with skip_tokenizer_init=True; pass token ids"
            )
        encoded = iter(self._tokenize(texts))
        requests = []
        for name, (text, given_ids), given_params in zip(names, parsed, params, strict=True):
            token_ids = next(encoded) if given_ids is None else given_ids
            if given_params is not None and not isinstance(given_params, SamplingParams):
                raise TypeError(f"the sampling_params of {name} are {given_params!r}; pass a SamplingParams")
            chosen = given_params or self.default_params
            requests.append(PreparedRequest(text, token_ids, chosen, self._check_length(name, token_ids, chosen)))
        return requests

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Check a request and queue it; returns its id. Raises as :meth:`prepare` does."""
        return self.add_prepared(self.prepare([prompt], [params])[0], request_id)

    def add_prepared(self, request: PreparedRequest, request_id: str | None = None) -> str:
        """Queue a request that :meth:`prepare` made; returns its id."""
        number = self._num_added
        if request_id is None:
            request_id = str(number)
            while request_id in self._requests:  # the user gave that name to another request
                request_id = f"{request_id}+"
        elif not isinstance(request_id, str):
            raise TypeError(f"request_id is {request_id!r} ({type(request_id).__name__}); it must be a string")
        elif request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is taken by a request that has not finished")
        self._num_added += 1
        seed = request.params.seed
        seq = Sequence(
            request_id,
            number,
            request.prompt_token_ids,
            request.params,
            max_output_tokens=request.max_output_tokens,
            eos_token_ids=() if request.params.ignore_eos else self.model_config.eos_token_ids,
            noise_key=noise_key("request", seed, 0)
            if seed is not None
            else noise_key("engine", self.config.seed, number),
            arrival_time=time.perf_counter(),
        )
        try:
            self._requests[request_id] = (request.prompt, seq)
            self.scheduler.add(seq)
        except BaseException:  # Ctrl-C between the two
            self._requests.pop(request_id, None)
            self.scheduler.finish(seq, "abort")
            raise
        return request_id

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the requests that ended in it.

        If it fails or is interrupted, all requests are dropped and the engine is ready for new ones.
        """
        try:
            return self._step()
        except BaseException:  # Ctrl-C included
            self.reset()
            raise

    def _step(self) -> list[RequestOutput]:
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        logger.debug("step: %s", plan)
        tokens = self.runner.execute(plan).tokens()
        advanced = self.scheduler.update(plan, tokens)
        now = time.perf_counter()
        self._count(plan, now - started)
        outputs = []
        for seq in advanced:
            seq.metrics.first_token_time = seq.metrics.first_token_time or now
            if seq.finished:
                outputs.append(self._output(seq))
        return outputs

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; returns what it has, or None if no such request is unfinished."""
        if request_id not in self._requests:
            return None
        seq = self._requests[request_id][1]
        self.scheduler.finish(seq, "abort")
        return self._output(seq)

    def reset(self) -> None:
        """Drop all requests. The prefix cache stays. Safe after an exception or an interrupt anywhere in a step."""
        self.scheduler.reset()
        self._requests.clear()  # last: should this be interrupted too, the next call sees that there is work left

    def close(self) -> None:
        """Drop all requests and free the model and its KV cache, whoever still holds the engine."""
        self.reset()
        self.runner.close()

    def metrics(self) -> dict[str, Any]:
        """Facts and totals of the engine; see :meth:`nanovllm.LLM.get_metrics`."""
        counters, runner, manager = self.counters, self.runner, self.scheduler.block_manager
        return {
            "device": str(runner.device),
            "dtype": str(runner.dtype).removeprefix("torch."),
            "attention_backend": runner.attention.name,
            "startup_seconds": counters.startup_seconds,
            "num_kvcache_blocks": manager.num_blocks,
            "kvcache_block_size": manager.block_size,
            "kvcache_bytes": runner.kvcache_bytes(),
            "kvcache_blocks_used": manager.num_used_blocks,
            "peak_kvcache_blocks_used": manager.peak_num_used_blocks,
            "output_tokens": counters.output_tokens,
            "prefill_tokens": counters.prefill_tokens,
            "decode_tokens": counters.decode_tokens,
            "prefill_seconds": counters.prefill_seconds,
            "decode_seconds": counters.decode_seconds,
            "prompt_tokens": counters.prompt_tokens,
            "cached_tokens": counters.cached_tokens,
            "finished_requests": counters.finished_requests,
            "num_preemptions": self.scheduler.num_preemptions,
        }

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts or self.tokenizer is None:
            return []
        return self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]

    def _decode(self, request_id: str, token_ids: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        try:
            return self.tokenizer.decode(token_ids, skip_special_tokens=True)
        except Exception:  # whatever the tokenizer raises must not cost other requests their results
            logger.warning("request %s: its tokens cannot be decoded; its text stays empty", request_id, exc_info=True)
            return ""

    def _count(self, plan: StepPlan, seconds: float) -> None:
        sampled = sum(plan.samples)
        self.counters.output_tokens += sampled
        self.counters.prefill_tokens += plan.num_prefill_tokens
        if plan.num_prefill_tokens:
            self.counters.prefill_seconds += seconds
        else:
            self.counters.decode_seconds += seconds
            self.counters.decode_tokens += sampled

    def _check_length(self, name: str, token_ids: list[int], params: SamplingParams) -> int:
        """Check a prompt's ids and room; returns the most tokens it may generate."""
        length, vocab_size = len(token_ids), self.model_config.vocab_size
        if not length:
            raise ValueError(f"{name} is empty; give at least one token")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name} has token id {low if low < 0 else high}; the vocabulary has ids 0 to {vocab_size - 1}"
            )
        if length >= self.max_model_len:
            raise ValueError(
                f"{name} has {length} tokens; max_model_len is {self.max_model_len}, prompt and output together "
                "(raise max_model_len or shorten the prompt)"
            )
        limit = self.max_model_len - length
        capacity = self.scheduler.max_tokens_per_sequence()
        if params.max_tokens is None:
            limit = max(1, min(limit, capacity - length))
        else:
            limit = min(limit, params.max_tokens)
        if length + limit > capacity:
            manager = self.scheduler.block_manager
            raise ValueError(
                f"{name} has {length} tokens and may generate {limit}, which takes "
                f"{manager.blocks_needed(length + limit - 1)} KV blocks of {manager.block_size} tokens; the cache has "
                f"{manager.num_blocks} (raise num_kvcache_blocks, lower max_tokens or shorten the prompt)"
            )
        return limit

    def _output(self, seq: Sequence) -> RequestOutput:
        """What an ended sequence gives back; the engine forgets it."""
        prompt, _ = self._requests[seq.request_id]
        token_ids = seq.output_token_ids
        text = self._decode(seq.request_id, token_ids)
        del self._requests[seq.request_id]
        completion = CompletionOutput(
            index=0,
            text=text,
            token_ids=token_ids,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )
        seq.metrics.finished_time = time.perf_counter()
        self.counters.finished_requests += 1
        self.counters.prompt_tokens += seq.num_prompt_tokens
        self.counters.cached_tokens += seq.num_cached_tokens
        return RequestOutput(
            request_id=seq.request_id,
            prompt=prompt,
            prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens].tolist(),
            outputs=[completion],
            finished=True,
            num_cached_tokens=seq.num_cached_tokens,
            metrics=seq.metrics,
        )


def default_sampling_params(model_config: ModelConfig) -> SamplingParams:
    """The checkpoint's own sampling parameters; ValueError naming the file if they are invalid."""
    ignored = [
        name
        for name, neutral in _NOT_HONOURED.items()
        if model_config.generation_config.get(name) not in (None, neutral)
    ]
    if ignored:
        logger.warning("%s/generation_config.json: %s are ignored", model_config.path, ", ".join(ignored))
    try:
        return SamplingParams.from_generation_config(model_config.generation_config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{model_config.path}/generation_config.json: {error}; correct the file") from error


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint; ValueError saying what to do if it cannot be loaded."""
    from transformers import AutoTokenizer

    if not any(os.path.exists(os.path.join(path, name)) for name in TOKENIZER_FILES):
        # transformers 5 would make up an empty tokenizer
        raise ValueError(
            f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES)}); download it, name another directory with "
            "tokenizer=..., or pass skip_tokenizer_init=True and prompt with token ids"
        )
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ValueError(
            f"the tokenizer in {path} cannot be loaded ({error}); download tokenizer.json and tokenizer_config.json, "
            "name another directory with tokenizer=..., or pass skip_tokenizer_init=True and prompt with token ids"
        ) from error


def noise_key(kind: str, seed: int, index: int) -> int:
    """64-bit key of a request's sampling noise: of its own seed and sample index, or the engine's and its number."""
    return xxhash.xxh3_64_intdigest(f"{kind}:{seed}:{index}".encode())
