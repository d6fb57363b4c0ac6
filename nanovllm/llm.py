"""The facade a user calls."""

import os
import threading
from collections.abc import Sequence
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.prompts import Prompt, as_prompt_list
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.progress import ProgressBar


class LLM:
    """A language model, loaded and ready to generate.

    It is a context manager; :meth:`close`, or dropping the last reference, frees its memory. Several can live side
    by side.

    Args:
        model: Directory of a Hugging Face checkpoint.
        tokenizer: Directory of the tokenizer; the model's by default.
        skip_tokenizer_init: Load no tokenizer; prompts are token ids and outputs have no text.
        dtype: auto (the checkpoint's), bfloat16, float16 or float32.
        device: auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu.
        seed: The noise of requests without a seed of their own derives from this.
        tensor_parallel_size: Ranks that share the model.
        max_model_len: Most tokens of a sequence, prompt and output together; by default the model's, at most 4096.
        max_num_seqs: Most sequences resident at once.
        max_num_batched_tokens: Most tokens one step computes; on the CPU at most 512, which is faster there.
        gpu_memory_utilization: Share of a CUDA device's memory to use.
        enforce_eager: Never capture CUDA graphs.
        enable_prefix_caching: Reuse the KV blocks of prompts that begin alike.
        hf_overrides: Replaces entries of config.json.
        attention_backend: auto, or a backend's name.
        kvcache_block_size: Tokens a KV block; the backend's preferred size by default.
        num_kvcache_blocks: Size of the KV cache in blocks; from free memory by default.

    Raises:
        TypeError: An argument is unknown or of the wrong type.
        ValueError: An argument is outside its range, or the checkpoint cannot be served; the message says why.
        FileNotFoundError: The checkpoint lacks a file.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        skip_tokenizer_init: bool = False,
        dtype: str = "auto",
        device: str = "auto",
        seed: int = 0,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int = 512,
        max_num_batched_tokens: int = 16384,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        enable_prefix_caching: bool = True,
        hf_overrides: dict[str, Any] | None = None,
        attention_backend: str = "auto",
        kvcache_block_size: int | None = None,
        num_kvcache_blocks: int | None = None,
        **unknown: Any,
    ) -> None:
        config = EngineConfig.from_arguments(
            model,
            tokenizer=tokenizer,
            skip_tokenizer_init=skip_tokenizer_init,
            dtype=dtype,
            device=device,
            seed=seed,
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            enable_prefix_caching=enable_prefix_caching,
            hf_overrides=hf_overrides,
            attention_backend=attention_backend,
            kvcache_block_size=kvcache_block_size,
            num_kvcache_blocks=num_kvcache_blocks,
            **unknown,
        )
        self._engine: LLMEngine | None = LLMEngine(config)
        self._lock = threading.RLock()

    @property
    def engine(self) -> LLMEngine:
        """The engine behind the facade; RuntimeError after :meth:`close`."""
        if self._engine is None:
            raise RuntimeError("this LLM is closed; make a new one")
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate a completion for each prompt.

        Everything is checked before any work starts. If the call fails or is interrupted, its requests are dropped
        and the engine is ready for the next call.

        Args:
            prompts: One prompt or a list of them: a string, a list of token ids, or a dictionary with "prompt" or
                "prompt_token_ids".
            sampling_params: For all prompts, or a list with one for each; None takes the defaults that the
                checkpoint's generation_config.json names.
            use_tqdm: Show a progress bar.

        Returns:
            An output a prompt, in the prompts' order.

        Raises:
            TypeError: A prompt or parameter has the wrong type.
            ValueError: A prompt is empty or does not fit, or there are not as many parameters as prompts.
        """
        engine = self.engine
        prompt_list = as_prompt_list(prompts)
        if isinstance(sampling_params, (SamplingParams, type(None))):
            params: list[SamplingParams | None] = [sampling_params] * len(prompt_list)
        elif isinstance(sampling_params, Sequence) and not isinstance(sampling_params, (str, bytes)):
            params = list(sampling_params)
            if len(params) != len(prompt_list):
                raise ValueError(
                    f"there are {len(prompt_list)} prompts and {len(params)} sampling_params; "
                    "give one for each prompt, or a single one for all"
                )
        else:
            raise TypeError(
                f"sampling_params is a {type(sampling_params).__name__}; pass a SamplingParams or a list of them"
            )
        with self._lock:
            if engine.has_unfinished_requests:
                raise RuntimeError(
                    f"the engine still has unfinished requests ({engine.num_unfinished_requests}); run engine.step() "
                    "until they are finished, or abort them, before calling generate()"
                )
            requests = engine.prepare(prompt_list, params)
            try:
                ids = [engine.add_prepared(request) for request in requests]
                outputs = self._run(len(ids), use_tqdm)
            except BaseException:  # Ctrl-C included: nothing may be left over for the next call
                engine.reset()
                raise
        return [outputs[request_id] for request_id in ids]

    def get_tokenizer(self) -> Any:
        """The checkpoint's tokenizer (transformers'); ValueError with skip_tokenizer_init."""
        if self.engine.tokenizer is None:
            raise ValueError("there is no tokenizer: the LLM was made with skip_tokenizer_init=True")
        return self.engine.tokenizer

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self.engine.scheduler.block_manager.reset_prefix_cache()

    def get_metrics(self) -> dict[str, Any]:
        """Facts and totals since the start.

        Returns:
            device, dtype, attention_backend; startup_seconds; num_kvcache_blocks, kvcache_block_size (tokens),
            kvcache_bytes, kvcache_blocks_used, peak_kvcache_blocks_used; output_tokens (sampled); prefill_tokens
            (computed of prompts, and of outputs again after a preemption) and prefill_seconds (of steps that computed
            any); decode_tokens and decode_seconds (of steps that only decoded); prompt_tokens, cached_tokens and
            finished_requests of the requests that ended; num_preemptions.
        """
        return self.engine.metrics()

    def close(self) -> None:
        """Free the model and its KV cache. The LLM cannot be used afterwards; closing it twice does nothing.

        Waits for a call to generate in another thread.
        """
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, num_requests: int, use_tqdm: bool) -> dict[str, RequestOutput]:
        """Step until everything is finished."""
        engine = self.engine
        outputs: dict[str, RequestOutput] = {}
        with ProgressBar(engine, num_requests, enabled=use_tqdm) as bar:
            while engine.has_unfinished_requests:
                finished = engine.step()
                outputs.update((output.request_id, output) for output in finished)
                bar.update(len(finished))
        return outputs
