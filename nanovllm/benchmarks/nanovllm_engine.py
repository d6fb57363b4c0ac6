"""The engine of this repository, as the benchmarks run it."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.benchmarks.engine_options import INTEGER_OPTIONS, OTHER_OPTIONS
from nanovllm.benchmarks.workloads import check_lengths, gib
from nanovllm.utils.random_requests import Requests
from nanovllm.utils.text import counted
from nanovllm.utils.threads import ThreadLimit

COUNTERS = ("prefill_tokens", "prefill_seconds", "decode_tokens", "decode_seconds", "num_preemptions")


class NanovllmEngine:
    """The engine of this repository."""

    name = "nanovllm"

    def __init__(self, model: Path, longest: int, args: argparse.Namespace, **extra: Any) -> None:
        """``extra`` goes to LLM, besides what the command line says."""
        options: dict[str, Any] = {"dtype": args.dtype, "device": args.device, "seed": args.seed, **extra}
        for name in INTEGER_OPTIONS + OTHER_OPTIONS:
            if getattr(args, name) is not None:
                options[name] = getattr(args, name)
        if longest > 4096:  # the default limit
            options.setdefault("max_model_len", longest)
        self.temperature = args.temperature
        start = time.perf_counter()
        self.llm = LLM(str(model), skip_tokenizer_init=True, **options)
        self.startup_seconds = time.perf_counter() - start

    def describe(self) -> str:
        m = self.llm.get_metrics()
        blocks = f"{counted(m['num_kvcache_blocks'], 'KV block')} of {m['kvcache_block_size']} tokens"
        where = f"{m['device']}, {m['dtype']}, attention {m['attention_backend']}"
        where += f", {m['quantization']}" if m["quantization"] else ""
        return f"{blocks} ({gib(m['kvcache_bytes'])}), {where}"

    def run(self, requests: Requests) -> tuple[float, dict[str, Any]]:
        common: dict[str, Any] = {"temperature": self.temperature, "ignore_eos": True}
        prompts = [{"prompt_token_ids": prompt} for prompt in requests.prompts]
        params = [SamplingParams(max_tokens=n, **common) for n in requests.output_lens]
        self.llm.reset_prefix_cache()  # or a repeat would find all of its prompts computed
        before = self.llm.get_metrics()
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
        seconds = time.perf_counter() - start  # the last token of all is on the host by now
        check_lengths("nanovllm", [len(out.outputs[0].token_ids) for out in outputs], requests.output_lens)
        after = self.llm.get_metrics()
        return seconds, {name: after[name] - before[name] for name in COUNTERS}

    def totals(self) -> dict[str, Any]:
        return self.llm.get_metrics()

    def close(self) -> None:
        self.llm.close()


class OneRankEngine(NanovllmEngine):
    """The same on one rank, with the threads that one of several has: what the others are worth."""

    name = "one-rank"

    def __init__(self, model: Path, longest: int, args: argparse.Namespace) -> None:
        ranks = args.tensor_parallel_size or 1
        self.threads = ThreadLimit(ranks).num_threads()
        super().__init__(model, longest, argparse.Namespace(**{**vars(args), "tensor_parallel_size": None}))

    def run(self, requests: Requests) -> tuple[float, dict[str, Any]]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return super().run(requests)
        finally:
            torch.set_num_threads(before)
