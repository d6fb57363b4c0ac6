"""Requests that ask for everything there is, a kind each, and what a batch of requests gave."""

from typing import Any

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.layers.temperature import Linear


def every_kind(max_tokens: int, n: int, called: list[int] | None = None) -> list[SamplingParams]:
    """Six requests; the last has a logits processor, whose calls are noted in ``called``, and prompt_logprobs."""

    def ban_even(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if called is not None:
            called.append(len(token_ids))
        logits[::2] = float("-inf")
        return logits

    common: dict[str, Any] = {"max_tokens": max_tokens}
    return [
        SamplingParams(temperature=1.0, seed=1, n=n, **common),
        SamplingParams(temperature=0.9, top_p=0.7, seed=2, stop_token_ids=list(range(0, 200, 7)), **common),
        SamplingParams(temperature=1.3, top_k=12, seed=3, repetition_penalty=1.2, logprobs=1, **common),
        SamplingParams(temperature=Linear(1.0, 0.0, num_tokens=6), seed=4, ignore_eos=True, **common),
        SamplingParams(temperature=1.5, min_p=0.02, seed=5, logit_bias={17: 3.0}, **common),
        SamplingParams(temperature=1.0, seed=6, logits_processors=[ban_even], prompt_logprobs=1, **common),
    ]


def tokens_of(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[list[int]]]:
    """By prompt and completion."""
    return [[c.token_ids for c in output.outputs] for output in llm.generate(prompts, params, use_tqdm=False)]
