"""vLLM on the CPU, with all of its processors and its prefix cache. Takes minutes to load."""

import os
import time
from typing import Any

from nanovllm.benchmarks.peers.protocol import serve, usable_cpus

CACHE_GB = 4


def environment() -> dict[str, str]:
    """What it reads when it is imported. By default it keeps a processor back."""
    cpus = usable_cpus()
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(len(cpus)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


class VLLMPeer:
    def __init__(self, settings: dict[str, Any]) -> None:
        for name, value in environment().items():
            os.environ.setdefault(name, value)
        import vllm

        self.llm = vllm.LLM(
            settings["model"],
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=max(4096, settings["longest"]),
            max_num_seqs=256,
        )
        self.temperature = settings["temperature"]
        self.setup = f"vLLM {vllm.__version__}, bfloat16, prefix cache of {CACHE_GB} GB"

    def run(self, prompts: list[list[int]], output_lens: list[int]) -> tuple[float, list[int]]:
        from vllm import SamplingParams

        common: dict[str, Any] = {"temperature": self.temperature, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(max_tokens=n, **common) for n in output_lens]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache, where a repeat finds all of its prompts")
        start = time.perf_counter()
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, [len(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    serve(VLLMPeer)


if __name__ == "__main__":
    main()
