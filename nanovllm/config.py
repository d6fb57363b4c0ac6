"""Engine configuration: checked once, then frozen."""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from typing import Any

from nanovllm.utils.validation import check_bool, check_int, check_number, unknown_argument

QUANTIZATIONS = (None, "int8")
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user asked of an engine. Names and defaults are vLLM's where vLLM has the thing.

    Args:
        model: Directory of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer.json).
        tokenizer: Directory of the tokenizer; the model's by default.
        skip_tokenizer_init: Load no tokenizer; prompts are token ids and outputs have no text.
        dtype: Of weights, activations and KV cache: auto (the checkpoint's; float16 for bfloat16 on MPS before macOS
            14), bfloat16, float16 or float32.
        device: auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu; a ``torch.device`` is kept by its name.
        quantization: None, or int8: weights in eight bits, made of the checkpoint's when it is loaded (on the CPU).
        seed: The noise of requests that have no seed of their own derives from this.
        tensor_parallel_size: Ranks that share the model, each in a process of its own.
        tensor_parallel_timeout: Seconds that a rank waits for another within a step before it takes it for hung.
        max_model_len: Most tokens of a sequence, prompt and output together; by default the model's, at most 4096.
        max_num_seqs: Most sequences resident at once.
        max_num_batched_tokens: Most tokens one step computes, prompt chunks and decode tokens together; on
            the CPU at most 512, which is faster there.
        gpu_memory_utilization: Share of a CUDA device's memory the engine may use.
        enforce_eager: Never capture CUDA graphs, nor record steps on the CPU.
        enable_prefix_caching: Reuse the KV blocks of prompts that begin alike.
        max_logprobs: Most log-probabilities that a request may ask for at each token; -1 sets no limit.
        hf_overrides: Replaces entries of config.json, e.g. ``{"rope_parameters": {...}}``.
        attention_backend: auto, or the name of a backend in ``nanovllm.attention``.
        kvcache_block_size: Tokens a KV block holds; the backend's preferred size by default.
        num_kvcache_blocks: Size of the KV cache in blocks; sized from free memory by default.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is outside its range; the message names it.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    device: str = "auto"
    quantization: str | None = None
    seed: int = 0
    tensor_parallel_size: int = 1
    tensor_parallel_timeout: float = 60.0
    max_model_len: int | None = None
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 16384
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    max_logprobs: int = -1
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    attention_backend: str = "auto"
    kvcache_block_size: int | None = None
    num_kvcache_blocks: int | None = None

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:  # as Python's own, whichever kind was given
            object.__setattr__(self, name, value)

        for name in ("skip_tokenizer_init", "enforce_eager", "enable_prefix_caching"):
            keep(name, check_bool(name, getattr(self, name)))
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; use one of {', '.join(DTYPES)}")
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization is {self.quantization!r}, which is not supported; use None or 'int8'")
        device = str(self.device)  # torch.device writes itself like this, too
        if not re.fullmatch(r"auto|(cpu|mps)(:0)?|cuda(:[0-9]+)?", device):
            raise ValueError(f"device is {self.device!r}; use auto, cuda, cuda:N, mps or cpu")
        keep("device", device if device.startswith("cuda") else device.removesuffix(":0"))
        if not isinstance(self.attention_backend, str):
            raise TypeError(
                f"attention_backend is {self.attention_backend!r} ({type(self.attention_backend).__name__}); "
                "it must be auto or the name of a backend"
            )
        if not isinstance(self.hf_overrides, dict):
            raise TypeError(f"hf_overrides is {self.hf_overrides!r}; it must be a dictionary of config.json entries")
        for key in self.hf_overrides:
            if not isinstance(key, str):
                raise TypeError(
                    f"hf_overrides has the key {key!r} ({type(key).__name__}); its keys must be names of "
                    "config.json entries"
                )
        keep("seed", check_int("seed", self.seed, low=-(2**63), high=2**64 - 1))
        keep("max_logprobs", check_int("max_logprobs", self.max_logprobs, low=-1))
        for name in ("tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens"):
            keep(name, check_int(name, getattr(self, name), low=1))
        for name in ("kvcache_block_size", "num_kvcache_blocks"):
            if getattr(self, name) is not None:
                keep(name, check_int(name, getattr(self, name), low=1))
        if self.max_model_len is not None:  # one prompt token and one output token
            keep("max_model_len", check_int("max_model_len", self.max_model_len, low=2))
        utilization = check_number("gpu_memory_utilization", self.gpu_memory_utilization, low=0.01, high=1.0)
        keep("gpu_memory_utilization", utilization)
        timeout = check_number("tensor_parallel_timeout", self.tensor_parallel_timeout, low=1.0, high=86400.0)
        keep("tensor_parallel_timeout", timeout)
        for name in ("model", "tokenizer"):
            path = getattr(self, name)
            if path is not None and not os.path.isdir(path):
                how = "give the path of a downloaded Hugging Face checkpoint"
                if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) and not os.path.exists(path.split("/")[0]):
                    how = f"download it first: nanovllm download {path}, then {name}={path.split('/')[1]!r}"
                raise ValueError(f"{name} is {path!r}, which is not a directory; {how}")

    @classmethod
    def from_arguments(cls, model: str | os.PathLike[str], **arguments: Any) -> "EngineConfig":
        """Build the configuration from keyword arguments; an unknown one raises TypeError with the nearest known."""
        known = {f.name for f in dataclasses.fields(cls)} - {"model"}
        for name in [name for name in arguments if name in _ELSEWHERE]:
            _check_elsewhere(name, arguments.pop(name))
        for name in arguments:
            if name not in known:
                raise unknown_argument("LLM", name, known)
        if not isinstance(model, (str, os.PathLike)):
            raise TypeError(
                f"model is {model!r} ({type(model).__name__}); it must be the path of a checkpoint directory"
            )
        if arguments.get("tokenizer") is not None:
            tokenizer = arguments["tokenizer"]
            if not isinstance(tokenizer, (str, os.PathLike)):
                raise TypeError(
                    f"tokenizer is {tokenizer!r} ({type(tokenizer).__name__}); it must be the path of a directory"
                )
            arguments["tokenizer"] = os.path.expanduser(os.fspath(tokenizer))
        arguments["dtype"] = _dtype_name(arguments.get("dtype", "auto"))
        if arguments.get("hf_overrides", {}) is None:
            arguments["hf_overrides"] = {}
        return cls(model=os.path.expanduser(os.fspath(model)), **arguments)


_HF_OVERRIDES = "pass hf_overrides={'rope_parameters': {...}}"
_DOWNLOAD = "download that revision (nanovllm download MODEL --revision ...), and name its directory"
_OWN_PARAMS = "pass sampling_params to each call: SamplingParams() takes nothing from generation_config.json"
_MERGE = "merge the adapter into the checkpoint's weights first"
_SPLIT = "make an LLM in a process of its own for each GPU, and give it its share of the prompts"

# Arguments of vLLM's that we lack: what asks for nothing that we do not do anyway (None: any value, for what changes no
# answer), or our name.
_ELSEWHERE: dict[str, tuple[Any, ...] | str | None] = {
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
    "download_dir": None,
    "enable_chunked_prefill": (None, True),
    "enable_eplb": (False,),
    "enable_expert_parallel": (False,),
    "enable_lora": (None, False),
    "enable_sleep_mode": (False,),
    "fully_sharded_loras": None,
    "generation_config": ("auto",),
    "guided_decoding_backend": None,
    "hf_config_path": (None,),
    "hf_token": None,
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
    "revision": (None,),
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
    "tokenizer_revision": (None,),
    "trust_remote_code": (False,),
    "use_tqdm_on_load": None,
    "use_v2_block_manager": None,
}
# What to do instead of some of them, where that is not just to leave them out.
_INSTEAD = {
    "chat_template": "pass it to each call: chat(..., chat_template=...)",
    "data_parallel_size": _SPLIT,
    "enable_lora": _MERGE,
    "generation_config": _OWN_PARAMS,
    "kv_cache_memory_bytes": "set num_kvcache_blocks",
    "logits_processors": "pass them with each request: SamplingParams(logits_processors=[...])",
    "override_generation_config": _OWN_PARAMS,
    "pipeline_parallel_size": "share the model with tensor_parallel_size",
    "revision": _DOWNLOAD,
    "rope_scaling": _HF_OVERRIDES,
    "rope_theta": _HF_OVERRIDES,
    "tokenizer_revision": _DOWNLOAD,
}


def _check_elsewhere(name: str, value: Any) -> None:
    allowed = _ELSEWHERE[name]
    if isinstance(allowed, str):
        raise TypeError(f"LLM has no argument {name!r}; here it is {allowed!r}")
    if allowed is not None and value not in allowed:
        raise ValueError(f"{name} is {value!r}, which is not supported; {_INSTEAD.get(name, 'leave it out')}")


def _dtype_name(dtype: Any) -> Any:
    """The name of a dtype that was given as torch's, or by one of its other names."""
    name = str(dtype).removeprefix("torch.")
    name = {"half": "float16", "float": "float32"}.get(name, name)
    return name if name in DTYPES else dtype
