"""What vLLM's ``LLM`` and ``SamplingParams`` have and ours lack: scripts written for it run, or are told what to do."""

import logging
from typing import Any

logger = logging.getLogger(__name__)

_HF_OVERRIDES = "pass hf_overrides={'rope_parameters': {...}}"
_OWN_PARAMS = "pass sampling_params to each call: SamplingParams() takes nothing from generation_config.json"
_MERGE = "merge the adapter into the checkpoint's weights first"
_SPLIT = "make an LLM in a process of its own for each GPU, and give it its share of the prompts"

# By name: what asks for nothing that we do not do anyway (None: any value, for what changes no answer), or our name.
ELSEWHERE: dict[str, tuple[Any, ...] | str | None] = {
    "block_size": "kvcache_block_size",
    "num_gpu_blocks_override": "num_kvcache_blocks",
    "additional_config": (None, {}),
    "allowed_local_media_path": None,
    "allowed_media_domains": None,
    "async_scheduling": None,
    "calculate_kv_scales": (False,),
    "chat_template": (None,),
    "compilation_config": None,
    "config_format": ("auto", "hf"),
    "convert": ("auto", "none"),
    "cpu_offload_gb": (0,),
    "cuda_graph_sizes": None,
    "data_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "disable_async_output_proc": None,
    "disable_cascade_attn": None,
    "disable_custom_all_reduce": None,
    "disable_log_stats": None,
    "disable_sliding_window": None,
    "distributed_executor_backend": None,
    "enable_chunked_prefill": (None, True),
    "enable_eplb": (False,),
    "enable_expert_parallel": (False,),
    "enable_lora": (None, False),
    "enable_sleep_mode": (False,),
    "fully_sharded_loras": None,
    "generation_config": ("auto",),
    "guided_decoding_backend": None,
    "hf_config_path": (None,),
    "ignore_patterns": None,
    "kv_cache_dtype": ("auto",),
    "kv_cache_memory_bytes": (None,),
    "kv_transfer_config": (None,),
    "limit_mm_per_prompt": None,
    "load_format": ("auto", "safetensors"),
    "logits_processors": (None, []),
    "logprobs_mode": ("raw_logprobs",),
    "long_prefill_token_threshold": None,
    "max_cpu_loras": None,
    "max_long_partial_prefills": None,
    "max_lora_rank": None,
    "max_loras": None,
    "max_num_partial_prefills": None,
    "max_parallel_loading_workers": None,
    "max_seq_len_to_capture": None,
    "mm_processor_kwargs": (None, {}),
    "model_impl": ("auto", "vllm"),
    "model_loader_extra_config": (None, {}),
    "num_scheduler_steps": None,
    "override_generation_config": (None, {}),
    "override_pooler_config": (None,),
    "pipeline_parallel_size": (1,),
    "pooler_config": (None,),
    "preemption_mode": (None, "recompute"),
    "prefix_caching_hash_algo": None,
    "rope_scaling": (None, {}),
    "rope_theta": (None,),
    "runner": ("auto", "generate"),
    "safetensors_load_strategy": None,
    "scheduler_delay_factor": None,
    "scheduling_policy": ("fcfs",),
    "served_model_name": None,
    "speculative_config": (None,),
    "structured_outputs_config": None,
    "swap_space": None,
    "task": ("auto", "generate"),
    "tokenizer_mode": ("auto", "fast", "hf"),
    "trust_remote_code": None,
    "use_tqdm_on_load": None,
    "use_v2_block_manager": None,
}
# What to do instead of some of them, where that is not just to leave them out.
INSTEAD = {
    "chat_template": "pass it to each call: chat(..., chat_template=...)",
    "data_parallel_size": _SPLIT,
    "enable_lora": _MERGE,
    "generation_config": _OWN_PARAMS,
    "kv_cache_memory_bytes": "set num_kvcache_blocks",
    "logits_processors": "pass them with each request: SamplingParams(logits_processors=[...])",
    "override_generation_config": _OWN_PARAMS,
    "pipeline_parallel_size": "share the model with tensor_parallel_size",
    "rope_scaling": _HF_OVERRIDES,
    "rope_theta": _HF_OVERRIDES,
}

STRUCTURED = "structured outputs come by logits_processors, as in examples/structured_output.py"
# Keywords of vLLM's calls, with what to do where they ask for something: None, 0 and what is empty ask for nothing.
OF_CALLS = {
    "chat_template_content_format": "leave it out: a message's content is a text, or a list of parts of type 'text'",
    "guided_options_request": STRUCTURED,
    "lora_request": _MERGE,
    "mm_processor_kwargs": "leave it out: there is no multi-modal input",
    "priority": "requests are served first come, first served: give the urgent ones first, or in a call of their own",
    "prompt_adapter_request": "leave it out",
    "prompt_token_ids": "pass the lists of token ids as prompts: generate([[1, 2, 3]])",
    "tokenization_kwargs": "use SamplingParams(truncate_prompt_tokens=...), or tokenise yourself, and pass the ids",
}
_BEAMS = "beam search is not there; leave it out, or take the best of n completions by their cumulative_logprob"
# Arguments of vLLM's SamplingParams, with what to do where they ask for something, and the value that, like None, does
# not.
OF_PARAMS: dict[str, tuple[str, object]] = {
    "best_of": (
        "leave it out, or generate n completions with logprobs=0 and take the best by their cumulative_logprob",
        1,
    ),
    "early_stopping": (_BEAMS, False),
    "extra_args": ("nothing would read them; leave it out", {}),
    "flat_logprobs": ("logprobs are a dictionary a token; leave it out", False),
    "guided_decoding": (f"{STRUCTURED}; leave it out", None),
    "length_penalty": (_BEAMS, 1.0),
    "output_kind": ("generate gives whole outputs and stream new pieces; leave it out", None),
    "skip_reading_prefix_cache": (
        "prompt_logprobs are computed whatever is cached; leave it out, or pass LLM(enable_prefix_caching=False)",
        False,
    ),
    "structured_outputs": (f"{STRUCTURED}; leave it out", None),
    "use_beam_search": (_BEAMS, False),
}
NO_POOLING = "it generates and scores; it has no embeddings, and token ids are llm.get_tokenizer().encode(text)"
_PROFILE = "the command nanovllm profile tells where a step's time goes, and nanovllm trace what each step does"
_SLEEP = "close() frees all memory; make a new LLM afterwards"
_WORKERS = "without tensor parallelism the model is in this process: llm.engine.runner.model"
# Methods and attributes of vLLM's, with what there is instead.
ATTRIBUTES = {
    "apply_model": _WORKERS,
    "beam_search": (
        "there is no beam search: take the best of generate(prompts, SamplingParams(n=8, logprobs=0)) by its "
        "cumulative_logprob"
    ),
    "classify": f"{NO_POOLING}; to choose among given answers, compare llm.score(prompt, answers)",
    "collective_rpc": _WORKERS,
    "embed": NO_POOLING,
    "encode": NO_POOLING,
    "llm_engine": "the engine is llm.engine, and its step() returns the requests that have ended",
    "model_config": "what was asked for is llm.engine.config, what config.json says llm.engine.model_config",
    "reward": NO_POOLING,
    "set_tokenizer": "name another tokenizer when it is made: LLM(..., tokenizer=...)",
    "sleep": _SLEEP,
    "start_profile": _PROFILE,
    "stop_profile": _PROFILE,
    "wake_up": _SLEEP,
}


def check_elsewhere(name: str, value: Any) -> None:
    """Refuse an argument in ``ELSEWHERE`` that asks for what we do not do.

    Raises:
        TypeError: It has another name here.
        ValueError: It asks for something.
    """
    if name == "trust_remote_code" and value:
        logger.info("trust_remote_code=True changes nothing: code that comes with a checkpoint is never run")
    allowed = ELSEWHERE[name]
    if isinstance(allowed, str):
        raise TypeError(f"LLM has no argument {name!r}; here it is {allowed!r}")
    if allowed is not None and value not in allowed:
        raise ValueError(f"{name} is {value!r}, which is not supported; {INSTEAD.get(name, 'leave it out')}")


def check_of_call(where: str, name: str, value: Any) -> None:
    """Refuse a keyword in ``OF_CALLS`` that asks for something; ``where`` is the method it was given to.

    Raises:
        TypeError: It asks for something.
    """
    # vLLM takes a list with one for each prompt, too.
    asks = any(value) if isinstance(value, (list, tuple)) else bool(value)
    if asks and (name, value) != ("chat_template_content_format", "auto"):
        raise TypeError(f"{where} has no argument {name!r}; {OF_CALLS[name]}")


def check_of_params(name: str, value: Any) -> None:
    """Refuse an argument in ``OF_PARAMS`` that asks for something.

    Raises:
        TypeError: It does.
    """
    instead, neutral = OF_PARAMS[name]
    if value is not None and value != neutral:
        raise TypeError(f"SamplingParams has no argument {name!r}: {instead}")
