"""Engine configuration: checked once, then frozen."""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from typing import Any

from nanovllm.utils.text import kind_of
from nanovllm.utils.validation import check_bool, check_device, check_int, check_number, unknown_argument
from nanovllm.utils.vllm_arguments import ELSEWHERE, check_elsewhere

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
        keep("device", check_device(self.device))
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
                raise ValueError(
                    f"{name} is {path!r}, which is not a directory; give the path of a downloaded Hugging Face "
                    "checkpoint"
                )

    @classmethod
    def from_arguments(
        cls,
        model: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        download_dir: str | os.PathLike[str] | None = None,
        hf_token: bool | str | None = None,
        **arguments: Any,
    ) -> "EngineConfig":
        """Build the configuration from keyword arguments; a checkpoint that is named is found, or downloaded, last.

        Raises:
            TypeError: An argument has the wrong type, or is unknown; the message names the nearest known.
            ValueError: As the class does.
            OSError: As :func:`nanovllm.hub.find_checkpoint` does.
        """
        places = {"revision", "tokenizer_revision", "download_dir", "hf_token"}
        known = {f.name for f in dataclasses.fields(cls)} - {"model"} | places
        for name in [name for name in arguments if name in ELSEWHERE]:
            check_elsewhere(name, arguments.pop(name))
        for name in arguments:
            if name not in known:
                raise unknown_argument("LLM", name, known)
        if not isinstance(model, (str, os.PathLike)):
            raise TypeError(
                f"model is {model!r} ({type(model).__name__}); it must be the path of a checkpoint directory, or a name"
            )
        if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
            raise TypeError(
                f"tokenizer is {tokenizer!r} ({type(tokenizer).__name__}); it must be a directory's path, or a name"
            )
        for name, value in (("revision", revision), ("tokenizer_revision", tokenizer_revision)):
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a branch, tag or commit")
        token = _checked_token(hf_token)
        arguments["dtype"] = _dtype_name(arguments.get("dtype", "auto"))
        if arguments.get("hf_overrides", {}) is None:
            arguments["hf_overrides"] = {}
        cls(model=os.curdir, **arguments)  # a mistake is told before anything is downloaded

        from nanovllm.hub import find_checkpoint

        found = find_checkpoint(model, revision, download_dir, token=token)
        if tokenizer is None and tokenizer_revision not in (None, revision):
            tokenizer = model
        elif tokenizer is not None and tokenizer == model and tokenizer_revision is None:
            tokenizer_revision = revision
        if tokenizer is not None:
            tokenizer = find_checkpoint(tokenizer, tokenizer_revision, download_dir, kind="tokenizer", token=token)
        return cls(model=found, tokenizer=tokenizer, **arguments)


def _checked_token(token: Any) -> bool | str | None:
    """A token that a header can hold. No message shows it: those of the HTTP libraries would."""
    if token is None or isinstance(token, bool):
        return token
    if not isinstance(token, str):
        raise TypeError(f"hf_token is {kind_of(token)}; it must be a token's text, True, False or None")
    if not re.fullmatch(r"[!-~]+", token.strip()):
        raise ValueError("hf_token is empty, or has characters that no token has; copy it from the hub's settings")
    return token.strip()


def _dtype_name(dtype: Any) -> Any:
    """The name of a dtype that was given as torch's, or by one of its other names."""
    name = str(dtype).removeprefix("torch.")
    name = {"half": "float16", "float": "float32"}.get(name, name)
    return name if name in DTYPES else dtype
