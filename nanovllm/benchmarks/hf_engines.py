"""transformers, as the benchmarks run it. Needs torch and transformers only, so that any environment can run it."""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from nanovllm.benchmarks.workloads import check_lengths
from nanovllm.utils.random_requests import Requests


class HFEngine:
    """transformers' generate on left-padded batches, each of which runs until its longest output is done."""

    name = "hf"

    def __init__(self, model: Path, longest: int, args: argparse.Namespace) -> None:
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        version = tuple(map(int, transformers.__version__.split(".")[:2]))
        dtype_keyword = "dtype" if version >= (4, 56) else "torch_dtype"
        dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        self.device = pick_device(args.device)
        self.seed, self.batch_size = args.seed, args.hf_batch_size
        if args.temperature > 0:
            sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
        else:  # None, because transformers warns of values that greedy search ignores
            sampling = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        self.options: dict[str, Any] = {"pad_token_id": 0, **sampling}
        start = time.perf_counter()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(str(model), **{dtype_keyword: dtype})
        self.model.to(self.device).eval()
        self.startup_seconds = time.perf_counter() - start

    def describe(self) -> str:
        batch = f"batches of {self.batch_size}" if self.batch_size else "one batch a workload"
        return f"{self.device}, {str(self.model.dtype).removeprefix('torch.')}, {batch}"

    def run(self, requests: Requests) -> tuple[float, dict[str, Any]]:
        torch.manual_seed(self.seed)
        size = self.batch_size or len(requests.prompts)
        start = time.perf_counter()
        for first in range(0, len(requests.prompts), size):
            outputs = requests.output_lens[first : first + size]
            made = self._generate(requests.prompts[first : first + size], max(outputs))
            check_lengths("hf", made, [max(outputs)] * len(outputs))
        return time.perf_counter() - start, {}

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            output = self.model.generate(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                **self.options,
            ).cpu()  # waits for the device
        return [len(row) - width for row in output]

    def totals(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        del self.model


class HFContinuousEngine(HFEngine):
    """transformers' continuous batching: a paged cache, and requests that join and leave as others finish."""

    name = "hf-cb"

    def __init__(self, model: Path, longest: int, args: argparse.Namespace) -> None:
        if not hasattr(transformers.generation, "ContinuousBatchingConfig"):
            raise ValueError(
                f"--engine hf-cb: transformers {transformers.__version__} has no continuous batching of this kind "
                "(use hf, or a newer transformers)"
            )
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        super().__init__(model, longest, args)
        start = time.perf_counter()
        options: dict[str, Any] = {}
        if self.device == "cpu":  # by default its cache takes most of the memory
            options["continuous_batching_config"] = transformers.generation.ContinuousBatchingConfig(
                max_memory_percent=0.02, max_batch_tokens=512
            )
        # Token -1 never comes: every request runs to its full length.
        config = transformers.GenerationConfig(max_new_tokens=longest, eos_token_id=-1, **self.options)
        self.manager = self.model.init_continuous_batching(generation_config=config, **options)
        if self.device.startswith("cuda") and hasattr(self.manager, "warmup"):
            self.manager.warmup()
        self.manager.start()
        self.startup_seconds += time.perf_counter() - start

    def describe(self) -> str:
        attention = self.model.config._attn_implementation
        return f"{self.device}, {str(self.model.dtype).removeprefix('torch.')}, attention {attention}"

    def run(self, requests: Requests) -> tuple[float, dict[str, Any]]:
        start = time.perf_counter()
        asked = zip(requests.prompts, requests.output_lens, strict=True)
        ids = [self.manager.add_request(prompt, max_new_tokens=n) for prompt, n in asked]
        done: dict[str, Any] = {}
        while len(done) < len(ids):
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(f"hf-cb: a request failed: {result.error}")
                done[result.request_id] = result
            elif result is None and not self.manager.is_running():
                raise RuntimeError("hf-cb: the thread that generates has ended")
        seconds = time.perf_counter() - start
        check_lengths(self.name, [len(done[name].generated_tokens) for name in ids], requests.output_lens)
        return seconds, {}

    def close(self) -> None:
        self.manager.stop(block=True)
        if hasattr(self.manager, "destroy"):
            self.manager.destroy()
        del self.manager
        super().close()


def pick_device(device: str) -> str:
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name in present if present[name])
    if not present[device.partition(":")[0]]:
        raise ValueError(f"--device {device}: this machine, or this build of torch, has none")
    return device
