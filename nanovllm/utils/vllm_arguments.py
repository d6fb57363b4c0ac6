"""Arguments of vLLM's ``LLM`` that ours lacks, so that scripts written for it run, or are told what to change."""

from typing import Any

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
    "trust_remote_code": (False,),
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


def check_elsewhere(name: str, value: Any) -> None:
    """Refuse an argument in ``ELSEWHERE`` that asks for what we do not do.

    Raises:
        TypeError: It has another name here.
        ValueError: It asks for something.
    """
    allowed = ELSEWHERE[name]
    if isinstance(allowed, str):
        raise TypeError(f"LLM has no argument {name!r}; here it is {allowed!r}")
    if allowed is not None and value not in allowed:
        raise ValueError(f"{name} is {value!r}, which is not supported; {INSTEAD.get(name, 'leave it out')}")
