"""Arguments of ``LLM`` that the benchmark's options pass on. Apart from the engine, so that help needs no torch."""

INTEGER_OPTIONS = (  # passed on as they are
    "tensor_parallel_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kvcache_block_size",
    "num_kvcache_blocks",
)
OTHER_OPTIONS = (
    "attention_backend",
    "quantization",
    "gpu_memory_utilization",
    "enforce_eager",
    "enable_prefix_caching",
)
