"""The facade a user calls."""

import difflib
import inspect
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NoReturn

from nanovllm.config import EngineConfig
from nanovllm.engine import calls
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.prompts import Prompt, as_prompt_list, check_text
from nanovllm.engine.request import PreparedRequest
from nanovllm.engine.tokenizer import (
    ChatOptions,
    RenderedText,
    as_conversations,
    check_conversation,
    check_start,
    encode,
    render_chat,
    template_options,
)
from nanovllm.outputs import RequestOutput, ScoreOutput, StreamOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.text import counted, kind_of
from nanovllm.utils.validation import unknown_argument, unknown_attribute
from nanovllm.utils.vllm_arguments import ATTRIBUTES, OF_CALLS, check_of_call

if TYPE_CHECKING:  # typing has it from Python 3.11 on
    from typing_extensions import Unpack

Params = SamplingParams | Sequence[SamplingParams | None] | None
ON_ERROR = ("raise", "return")


class LLM:
    """A language model, loaded and ready to generate.

    It is a context manager; :meth:`close`, or dropping the last reference, frees its memory. Several can live side
    by side. Calls from several threads share the engine's steps.

    Args:
        model: Directory of a checkpoint in the Hugging Face layout: config.json, ``*.safetensors`` (sharded or not),
            tokenizer.json with tokenizer_config.json, and generation_config.json if there is one. Or the name of one on
            the Hugging Face hub, ``"OWNER/NAME"``: it is taken from the Hugging Face cache, or downloaded into it.
        tokenizer: Directory, or name, of another tokenizer; the model's by default.
        revision: Branch, tag or commit of a model that is named; the main branch by default.
        tokenizer_revision: The same, of the tokenizer.
        download_dir: Instead of the Hugging Face cache.
        hf_token: The token to download with: a text, True for the one that this machine is logged in with, or that of
            ``HF_TOKEN``, False for none; by default the machine's if it has one. It is not kept.
        skip_tokenizer_init: Load no tokenizer; prompts are token ids and outputs have no text.
        dtype: Of weights, activations and KV cache: auto, bfloat16, float16, float32, or torch's dtypes. auto is the
            checkpoint's, but for bfloat16 float16 on MPS before macOS 14, and float32 on a CPU that multiplies bfloat16
            slowly.
        device: auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu.
        quantization: None, or int8: weights in eight bits, made of the checkpoint's when it is loaded (on the CPU).
        seed: The noise of requests without a seed of their own derives from this.
        tensor_parallel_size: Processes that share the model, one a GPU (Linux and macOS); must divide the attention
            heads.
        tensor_parallel_timeout: Seconds that a rank waits for another within a step before it takes it for hung.
        max_model_len: Most tokens of a sequence, prompt and output together; by default the model's, at most 4096.
        max_num_seqs: Most sequences resident at once.
        max_num_batched_tokens: Most tokens one step computes, longer prompts in chunks; on the CPU at most 512, which
            is faster there.
        gpu_memory_utilization: Share of a CUDA device's memory to use.
        enforce_eager: Never capture CUDA graphs, nor record steps on the CPU: launch decode steps operation by
            operation.
        enable_prefix_caching: Reuse the KV blocks of prompts that begin alike.
        max_logprobs: Most log-probabilities that a request may ask for at each token (``logprobs``,
            ``prompt_logprobs``); -1 sets no limit but that of a prompt, or of its completions, 2^24 in all.
        hf_overrides: Replaces entries of config.json, in either of its spellings.
        attention_backend: auto, which takes the first that fits; triton or flash_attn (CUDA; for the latter
            ``pip install "nanovllm[flash-attn]" --no-build-isolation``), cpu (numba's kernels), or matmul (any device).
        kvcache_block_size: Tokens a KV block; by default the backend's: 16, with triton 32, with flash_attn 256.
        num_kvcache_blocks: Size of the KV cache in blocks. By default from free memory: what ``max_num_seqs`` sequences
            of ``max_model_len`` can fill, on the CPU at most 40% of the available memory, of which pages are taken only
            as they are used, and on MPS at most 1,024 blocks or half of the free memory.

    Raises:
        TypeError: An argument is unknown or of the wrong type.
        ValueError: An argument is outside its range, the checkpoint cannot be served, or the device has no room for
            it; the message says why.
        FileNotFoundError: The checkpoint lacks a file.
        OSError: A checkpoint that is named can be neither found nor downloaded; the message says why, and what to do.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        download_dir: str | os.PathLike[str] | None = None,
        hf_token: bool | str | None = None,
        skip_tokenizer_init: bool = False,
        dtype: str = "auto",
        device: str = "auto",
        quantization: str | None = None,
        seed: int = 0,
        tensor_parallel_size: int = 1,
        tensor_parallel_timeout: float = 60.0,
        max_model_len: int | None = None,
        max_num_seqs: int = 512,
        max_num_batched_tokens: int = 16384,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        enable_prefix_caching: bool = True,
        max_logprobs: int = -1,
        hf_overrides: dict[str, Any] | None = None,
        attention_backend: str = "auto",
        kvcache_block_size: int | None = None,
        num_kvcache_blocks: int | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown.keys() & SamplingParams.__dataclass_fields__.keys():
            raise TypeError(f"LLM has no argument {name!r}; it goes into SamplingParams({name}=...)")
        config = EngineConfig.from_arguments(
            model,
            tokenizer=tokenizer,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            download_dir=download_dir,
            hf_token=hf_token,
            skip_tokenizer_init=skip_tokenizer_init,
            dtype=dtype,
            device=device,
            quantization=quantization,
            seed=seed,
            tensor_parallel_size=tensor_parallel_size,
            tensor_parallel_timeout=tensor_parallel_timeout,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            enable_prefix_caching=enable_prefix_caching,
            max_logprobs=max_logprobs,
            hf_overrides=hf_overrides,
            attention_backend=attention_backend,
            kvcache_block_size=kvcache_block_size,
            num_kvcache_blocks=num_kvcache_blocks,
            **unknown,
        )
        self._engine: LLMEngine | None = LLMEngine(config)

    if not TYPE_CHECKING:  # a type checker that saw it would let every name pass

        def __getattr__(self, name: str) -> Any:
            raise unknown_attribute(self, name, ATTRIBUTES.get(name))

    @property
    def engine(self) -> LLMEngine:
        """The engine behind the facade; RuntimeError after :meth:`close`."""
        if self._engine is None:
            raise RuntimeError("this LLM is closed; make a new one")
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        on_error: str = "raise",
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Generate completions for each prompt.

        Everything is checked before any work starts. If the call fails or is interrupted, its requests are dropped
        and the engine is ready for the next call.

        Args:
            prompts: One prompt or a list of them: a string, a list of token ids, ``{"prompt": text}``,
                ``{"prompt_token_ids": ids}``, or what a transformers tokenizer returns for one text. An empty list
                gives an empty list.
            sampling_params: For all prompts, or a list with one for each; None takes the defaults that the
                checkpoint's generation_config.json names.
            use_tqdm: Show a progress bar with prefill and decode tokens a second.
            on_error: "raise" runs nothing if any prompt is bad; "return" runs the good ones and gives for each bad one
                an output with finish reason "error" and the message in ``error``.

        Returns:
            An output a prompt, in the prompts' order.

        Raises:
            TypeError: A prompt or parameter has the wrong type.
            ValueError: A prompt is empty or does not fit, or there are not as many parameters as prompts.
            RuntimeError: The engine was closed, or a step failed in another thread, while the call ran.
        """
        self._no_unknown(self.generate, unknown)
        if isinstance(prompts, Iterator):
            raise TypeError(f"prompts is {kind_of(prompts)}; pass a list of prompts, or call generate_iter with it")
        prompt_list = as_prompt_list(prompts)
        return self._generate(prompt_list, _params_list(sampling_params, len(prompt_list)), use_tqdm, on_error)

    def chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        on_error: str = "raise",
        **options: "Unpack[ChatOptions]",
    ) -> list[RequestOutput]:
        """Answer conversations: render them with the chat template and generate.

        Args:
            messages: A conversation, ``[{"role": "user", "content": "..."}, ...]``, or a list of conversations.
            sampling_params: As for :meth:`generate`.
            use_tqdm: Show a progress bar.
            on_error: As for :meth:`generate`.
            options: How they are rendered: chat_template, add_generation_prompt, continue_final_message, tools and
                chat_template_kwargs (:class:`nanovllm.engine.tokenizer.ChatOptions`).

        Returns:
            An output a conversation, in their order.

        Raises:
            TypeError: A message or parameter has the wrong type.
            ValueError: The template refuses a conversation, or as :meth:`generate` does.
        """
        self._no_unknown(self.chat, options, ChatOptions.__optional_keys__)
        _check_on_error(on_error)
        prompts = self._render(messages, options)
        return self._generate(prompts, _params_list(sampling_params, len(prompts)), use_tqdm, on_error)

    def render_chat(self, messages: Any, **options: "Unpack[ChatOptions]") -> list[Prompt]:
        """Conversations as prompts, for :meth:`stream`, :meth:`generate_iter` and :meth:`score`.

        Arguments and errors are those of :meth:`chat`.
        """
        self._no_unknown(self.render_chat, options, ChatOptions.__optional_keys__)
        prompts = self._render(messages, options)
        for prompt in prompts:
            if isinstance(prompt, Exception):
                raise prompt
        return prompts

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, **unknown: Any
    ) -> Generator[StreamOutput, None, None]:
        """Generate, and yield each new piece of text as it is made.

        Everything is checked at once; the work starts when the first piece is asked for. Closing the generator, or
        dropping it, as leaving its loop does, aborts what is left. Other calls may run meanwhile.

        Args:
            prompts: As for :meth:`generate`.
            sampling_params: As for :meth:`generate`.

        Yields:
            Pieces in the order in which they come. A completion's pieces make up its text; the last one has its finish
            reason, and that of a request's last completion the whole output.

        Raises:
            TypeError: As :meth:`generate` does.
            ValueError: As :meth:`generate` does.
            RuntimeError: As :meth:`generate` does.
        """
        self._no_unknown(self.stream, unknown)
        prompt_list = as_prompt_list(prompts)
        prepared = self._prepare(prompt_list, _params_list(sampling_params, len(prompt_list)), "raise")
        return calls.stream(self.engine, [request for request in prepared if isinstance(request, PreparedRequest)])

    def stream_chat(
        self, messages: Any, sampling_params: Params = None, **options: "Unpack[ChatOptions]"
    ) -> Generator[StreamOutput, None, None]:
        """Answer conversations, and yield each new piece of text as it is made.

        Arguments are those of :meth:`chat`; pieces and errors are those of :meth:`stream`, whose ``prompt_index`` here
        tells the conversation.
        """
        self._no_unknown(self.stream_chat, options, ChatOptions.__optional_keys__)
        return self.stream(self.render_chat(messages, **options), sampling_params)

    def generate_iter(
        self,
        prompts: Iterable[Any],
        sampling_params: SamplingParams | None = None,
        *,
        ordered: bool = True,
        max_in_flight: int | None = None,
        on_error: str = "raise",
        **unknown: Any,
    ) -> Generator[RequestOutput, None, None]:
        """Generate for prompts from an iterator, which may be endless, and yield the outputs as they finish.

        Args:
            prompts: Prompts, or ``(prompt, SamplingParams)`` pairs. They are taken as there is room for them.
            sampling_params: Of prompts that come without their own; None takes the checkpoint's defaults.
            ordered: Yield in the order of the prompts. Otherwise as they finish: ``output.prompt_index`` tells which.
            max_in_flight: Most prompts taken whose requests have not finished; by default twice ``max_num_seqs``, which
                keeps the engine busy.
            on_error: "raise" ends at a bad prompt; "return" yields for it an output with finish reason "error".

        Yields:
            An output a prompt.

        Raises:
            TypeError: As :meth:`generate` does.
            ValueError: As :meth:`generate` does.
            Exception: Whatever the iterator raises. All errors come after the outputs of the prompts before.
        """
        self._no_unknown(self.generate_iter, unknown)
        _check_on_error(on_error)
        engine = self.engine
        room = max_in_flight if max_in_flight is not None else 2 * engine.config.max_num_seqs
        if isinstance(room, bool) or not isinstance(room, int) or room < 1:
            raise ValueError(f"max_in_flight is {max_in_flight!r}; it must be a whole number of at least 1")
        if sampling_params is not None and not isinstance(sampling_params, SamplingParams):
            raise TypeError(
                f"sampling_params is {kind_of(sampling_params)}; pass a SamplingParams, or (prompt, "
                "SamplingParams) pairs as prompts"
            )
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise TypeError(f"prompts is {kind_of(prompts)}; pass an iterable of prompts")
        return calls.iterate(engine, iter(prompts), sampling_params, ordered=ordered, room=room, on_error=on_error)

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
    ) -> list[ScoreOutput]:
        """Log-likelihoods of given continuations, without generating.

        Text is tokenised together, so that the tokens are those of the whole text; where they run across the border,
        the continuation's are its own.

        Args:
            prompts: One prompt for all continuations, or a list with one for each. With the prefix cache on, equal
                prompts are computed once.
            continuations: One or a list of them, in the forms of a prompt.
            use_tqdm: Show a progress bar.

        Returns:
            A score a continuation, in their order.

        Raises:
            TypeError: A prompt or continuation has the wrong type.
            ValueError: One is empty, they do not fit together into the context, or their numbers differ.
        """
        prompt_list, continuation_list = as_prompt_list(prompts), as_prompt_list(continuations, "continuations")
        if len(prompt_list) == 1:
            prompt_list = prompt_list * len(continuation_list)
        if len(prompt_list) != len(continuation_list):
            raise ValueError(
                f"there are {counted(len(prompt_list), 'prompt')} and "
                f"{counted(len(continuation_list), 'continuation')}; give as many, or "
                "one prompt for all"
            )
        engine = self.engine
        pairs = [
            engine.intake.tokenize_pair(index, prompt, continuation)
            for index, (prompt, continuation) in enumerate(zip(prompt_list, continuation_list, strict=True))
        ]
        requests = [engine.intake.prepare_scored(f"pair {index}", *pair) for index, pair in enumerate(pairs)]
        first: dict[tuple[int, ...], int] = {}  # the first pair with a prompt computes it for the others
        leaders = {index: first.setdefault(tuple(prompt), index) for index, (prompt, _) in enumerate(pairs)}
        outputs = calls.run(engine, requests, use_tqdm, leaders=leaders)
        return [_score(output, len(prompt)) for output, (prompt, _) in zip(outputs, pairs, strict=True)]

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, with finish reason "abort"; the call that waits for it gets what it has.

        May be called from anywhere: another thread, a signal handler, the loop over a stream.
        ``llm.engine.unfinished_request_ids`` names those that can be ended.

        Args:
            request_id: The request's name, as its outputs and stream pieces have it.

        Returns:
            What it has; None if no such request is unfinished, or if it ends with the step that is running.
        """
        return self.engine.abort(request_id)

    def get_tokenizer(self) -> Any:
        """The checkpoint's tokenizer (transformers'); ValueError with skip_tokenizer_init."""
        if self.engine.tokenizer is None:
            raise ValueError("there is no tokenizer: the LLM was made with skip_tokenizer_init=True")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The sampling parameters that the checkpoint's generation_config.json names."""
        return self.engine.default_params.clone()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self.engine.reset_prefix_cache()

    def get_metrics(self) -> dict[str, Any]:
        """Facts and totals since the start.

        Returns:
            A dictionary.

            - Facts: ``device``, ``dtype``, ``quantization``, ``attention_backend``, ``num_threads`` (of the host, which
              torch computes with in a step), ``startup_seconds``, ``num_kvcache_blocks``, ``kvcache_block_size``
              (tokens), ``kvcache_bytes``, ``num_graphs``, ``graph_bytes``, ``graph_capture_seconds``.
            - What is going on: ``waiting_requests``, ``running_requests``, ``kvcache_blocks_used``.
            - Totals: ``peak_kvcache_blocks_used``, ``output_tokens`` (sampled), ``prefill_tokens`` (computed of
              prompts, and of outputs again after a preemption), ``prefill_seconds`` (of steps that computed any),
              ``decode_tokens``, ``decode_seconds`` (of steps that only decoded), ``num_preemptions``.
            - Totals of the requests that ended: ``finished_requests``, ``prompt_tokens``, ``cached_tokens``,
              ``prefix_hit_rate`` (their quotient).
            - Of the latest requests: ``time_to_first_token`` and ``time_per_output_token`` (after the first), in
              seconds, as ``{"p50": ..., "p90": ..., "p99": ...}``; None before there are any.
        """
        return self.engine.metrics()

    def close(self) -> None:
        """Free the model and its KV cache. The LLM cannot be used afterwards; closing it twice does nothing.

        A call that runs in another thread ends with a RuntimeError.
        """
        engine = self._engine
        if engine is not None:
            engine.close()
            self._engine = None

    def __repr__(self) -> str:
        engine = self.__dict__.get("_engine")  # it has none where __init__ failed
        if engine is None:
            return "<LLM, closed>"
        dtype = str(engine.runner.dtype).removeprefix("torch.")
        return f"<LLM {engine.config.model!r} on {engine.runner.device} in {dtype}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an LLM cannot be pickled or copied: it belongs to the process that made it; give its work to threads, "
            "whose calls share its steps, or make an LLM in each process"
        )

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _no_unknown(
        self, method: Callable[..., Any], gathered: Mapping[str, Any], known: Set[str] = frozenset()
    ) -> None:
        """TypeError, saying where it belongs, if a method that gathers keywords was given any not ``known``.

        Those of vLLM's that ask for nothing may pass.
        """
        for name in [name for name in gathered if name not in known]:
            if name in OF_CALLS:
                check_of_call(method.__name__, name, gathered[name])
                continue
            parameters = inspect.signature(method).parameters.values()
            named = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
            where = f"{method.__name__} has no argument {name!r}"
            if name in SamplingParams.__dataclass_fields__ and "sampling_params" in named:
                raise TypeError(f"{where}; it goes into SamplingParams({name}=...)")
            if name in EngineConfig.__dataclass_fields__:
                raise TypeError(f"{where}; it is the engine's: LLM({name}=...)")
            if option := self._template_option(name):
                right = f"chat_template_kwargs={{{option!r}: {gathered[name]!r}}}"
                spelt = (
                    "it goes to the chat template" if option == name else "did you mean an option of the chat template"
                )
                right = right if known else f"chat(..., {right})"
                raise TypeError(f"{where}; {spelt}: {right}")
            if not known and name in ChatOptions.__optional_keys__:
                raise TypeError(f"{where}; it is chat's, which takes messages: chat(..., {name}=...)")
            raise unknown_argument(method.__name__, name, [*named, *known])

    def _template_option(self, name: str) -> str | None:
        """The option of the chat template that is called so, or nearly so; None if there is none."""
        tokenizer = None if self._engine is None else self._engine.tokenizer
        options = template_options(tokenizer) or () if tokenizer is not None else ()
        return next(iter(difflib.get_close_matches(name, options, n=1, cutoff=0.8)), None)

    def _render(self, messages: Any, options: Mapping[str, Any]) -> list[Any]:
        """For each conversation its prompt, or what is wrong with it. Options that are none of ours ask for nothing."""
        options = {name: value for name, value in options.items() if name not in OF_CALLS}
        tokenizer = self.get_tokenizer()
        if options.get("continue_final_message", False) and options.get("add_generation_prompt", True):
            raise ValueError("continue_final_message needs add_generation_prompt=False: it is one or the other")
        prompts: list[Any] = []
        for name, conversation in as_conversations(messages):
            try:
                text = render_chat(tokenizer, check_conversation(name, conversation), **options)
                check_text(name, text)
                prompts.append(self._rendered(text))
            except (TypeError, ValueError) as error:
                prompts.append(error)
        return prompts

    def _rendered(self, text: str) -> dict[str, Any]:
        """What a chat template gave as a prompt; without token ids where it is for the request to cut or refuse it."""
        rendered, tokenizer = RenderedText(text), self.get_tokenizer()
        try:
            check_start("the prompt", tokenizer, rendered, self.engine.max_model_len)
        except ValueError:
            return {"prompt": rendered}
        return {"prompt": text, "prompt_token_ids": encode(tokenizer, rendered)}

    def _generate(
        self, prompts: list[Any], params: list[SamplingParams | None], use_tqdm: bool, on_error: str
    ) -> list[RequestOutput]:
        return calls.run(self.engine, self._prepare(prompts, params, on_error), use_tqdm, prompts)

    def _prepare(
        self, prompts: list[Any], params: list[SamplingParams | None], on_error: str
    ) -> list[PreparedRequest | Exception]:
        _check_on_error(on_error)
        prepared = self.engine.intake.prepare(prompts, params)
        for request in prepared:
            if isinstance(request, Exception) and on_error == "raise":
                raise request
        return prepared


def _check_on_error(on_error: str) -> None:
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}; use one of {', '.join(ON_ERROR)}")


def _params_list(sampling_params: Any, num_prompts: int) -> list[SamplingParams | None]:
    """Parameters for each prompt."""
    if isinstance(sampling_params, (SamplingParams, type(None))):
        return [sampling_params] * num_prompts
    if not isinstance(sampling_params, Sequence) or isinstance(sampling_params, (str, bytes)):
        raise TypeError(f"sampling_params is {kind_of(sampling_params)}; pass a SamplingParams or a list of them")
    if len(sampling_params) != num_prompts:
        raise ValueError(
            f"there are {counted(num_prompts, 'prompt')} and {len(sampling_params)} sampling_params; "
            "give one for each prompt, or a single one for all"
        )
    return list(sampling_params)


def _score(output: RequestOutput, num_prompt_tokens: int) -> ScoreOutput:
    if output.outputs[0].finish_reason == "abort":
        raise RuntimeError(f"request {output.request_id} was aborted before it was scored")
    if output.error is not None or output.prompt_logprobs is None:
        raise RuntimeError(f"request {output.request_id} failed: {output.error}")
    token_ids = output.prompt_token_ids[num_prompt_tokens:]
    known = output.prompt_logprobs[num_prompt_tokens:]
    found = [entry[token] for token, entry in zip(token_ids, known, strict=True) if entry is not None]
    logprobs = [logprob.logprob for logprob in found]
    return ScoreOutput(sum(logprobs), token_ids, logprobs, all(logprob.rank == 1 for logprob in found))
