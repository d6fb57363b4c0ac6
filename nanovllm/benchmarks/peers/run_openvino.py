"""OpenVINO GenAI's continuous batching, in bfloat16, with its prefix cache."""

import json
import time
from pathlib import Path
from typing import Any

from nanovllm.benchmarks.peers.protocol import serve

CACHE_GB = 6
MAX_BATCHED_TOKENS = 4096
MAX_SEQUENCES = 256


class OpenVINOPeer:
    def __init__(self, settings: dict[str, Any]) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        scheduler.max_num_seqs = MAX_SEQUENCES
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        model = settings["model"]
        precision = {"INFERENCE_PRECISION_HINT": "bf16"}
        self.pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", precision)
        self.vocab_size = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))["vocab_size"]
        self.temperature = settings["temperature"]
        self.runs = 0
        self.setup = f"OpenVINO GenAI {genai.__version__}, bfloat16, prefix cache of {CACHE_GB} GB"

    def run(self, prompts: list[list[int]], output_lens: list[int]) -> tuple[float, list[int]]:
        import numpy as np
        import openvino

        # Nothing empties its prefix cache, where a repeat would find all of its prompts. Token ids shifted by one more
        # in each run keep lengths and shared prefixes as they are, and find nothing there.
        inputs = [
            openvino.Tensor((np.array([prompt], dtype=np.int64) + self.runs) % self.vocab_size) for prompt in prompts
        ]
        self.runs += 1
        configs = [self._config(n) for n in output_lens]
        start = time.perf_counter()
        results = self.pipeline.generate(inputs, configs)
        seconds = time.perf_counter() - start
        return seconds, [len(result.m_generation_ids[0]) for result in results]

    def _config(self, new_tokens: int) -> Any:
        import openvino_genai as genai

        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = new_tokens, True
        if self.temperature > 0:
            config.do_sample, config.temperature = True, self.temperature
        return config


def main() -> None:
    serve(OpenVINOPeer)


if __name__ == "__main__":
    main()
