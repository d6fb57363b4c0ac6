"""Greedy tokens and log-probabilities of the engine as it runs, beside transformers'."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from nanovllm.diagnostics.compare_reference import Reference
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

# Most likely tokens whose log-probabilities are compared.
NUM_LOGPROBS = 5
# A log-probability may be off by so much in float32,
LOGPROB_FLOAT32 = 1e-3
# and in 16 bits by so many times what transformers' own are off by, which is at least so much.
LOGPROB_FACTOR, LOGPROB_FLOOR = 6.0, 0.01


@dataclass(slots=True)
class FirstDifference:
    """Where two greedy texts part.

    Args:
        step: Number of the output token, from 0.
        ours, theirs: The tokens.
        margin: By how much transformers' exact logits prefer theirs to ours.
        tolerated: A margin up to which rounding decides.
    """

    step: int
    ours: int
    theirs: int
    margin: float
    tolerated: float

    @property
    def is_close_call(self) -> bool:
        return self.margin <= self.tolerated


@dataclass(slots=True)
class TokenComparison:
    """Two greedy continuations of a prompt.

    Args:
        ours: The engine's, with the settings it has: captured and recorded steps included.
        theirs: transformers', in the engine's dtype.
        our_text, their_text: The same as text; empty without a tokenizer.
        first_difference: Where they part; None if they do not.
        differences: Of each of our steps, the largest difference of a log-probability from transformers' exact one
            after the same tokens.
        tolerated: The same, as far as it is tolerated.
    """

    ours: list[int]
    theirs: list[int]
    our_text: str = ""
    their_text: str = ""
    first_difference: FirstDifference | None = None
    differences: list[float] = field(default_factory=list)
    tolerated: list[float] = field(default_factory=list)

    def first_wrong_step(self) -> int | None:
        """The first step whose log-probabilities depart; None if none does."""
        both = enumerate(zip(self.differences, self.tolerated, strict=True))
        return next((step for step, (found, most) in both if not found <= most), None)

    def departs(self) -> bool:
        return self.first_wrong_step() is not None or bool(
            self.first_difference and not self.first_difference.is_close_call
        )


@torch.inference_mode()
def compare_tokens(
    llm: LLM, reference: Reference, token_ids: list[int], max_tokens: int, eager: torch.Tensor | None = None
) -> TokenComparison:
    """Continue a prompt by both, greedily.

    Args:
        llm: The engine.
        reference: transformers' model.
        token_ids: The prompt.
        max_tokens: Most tokens of a continuation; an end-of-sequence token ends it, too.
        eager: Logits [steps, vocab_size] of the engine's own steps, launched one operation at a time. With eight-bit
            weights they are what it is judged by, as transformers has no such weights.
    """
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=NUM_LOGPROBS, detokenize=False)
    [output] = llm.generate([token_ids], params, use_tqdm=False)
    completion = output.outputs[0]
    ours = list(completion.token_ids)
    ends = set(llm.engine.model_config.eos_token_ids)
    theirs = _greedy(reference.rounded, token_ids, max_tokens, ends)
    exact, *rounded = (_logits(model, token_ids, ours) for model in reference.models())
    noise = (rounded[0] - exact).abs().amax(dim=1).tolist() if rounded else [0.0] * len(ours)
    result = TokenComparison(ours, theirs)
    is_comparable = True  # the eager steps come after the same tokens only as long as they take them
    for step, entries in enumerate(completion.logprobs or []):
        ids = torch.tensor(list(entries))
        found = torch.tensor([entry.logprob for entry in entries.values()])

        def off(logits: torch.Tensor, ids: torch.Tensor = ids, found: torch.Tensor = found) -> float:
            return float((found - logits.float().log_softmax(-1)[ids]).abs().max())

        if eager is not None:
            is_comparable = is_comparable and step < len(eager)
            result.differences.append(off(eager[step]) if is_comparable else 0.0)
            result.tolerated.append(LOGPROB_FACTOR * LOGPROB_FLOOR)
            is_comparable = is_comparable and int(eager[step].argmax()) == ours[step]
            continue
        result.differences.append(off(exact[step]))
        most = LOGPROB_FLOAT32
        if rounded:
            right = exact[step].log_softmax(-1)[ids]
            most = LOGPROB_FACTOR * max(off(rounded[0][step], ids, right), LOGPROB_FLOOR)
        result.tolerated.append(most)
    if rounded:  # one step's luck is no measure
        typical = sum(result.tolerated) / max(len(result.tolerated), 1)
        result.tolerated = [max(most, typical) for most in result.tolerated]
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            margin = float(exact[step, other] - exact[step, mine])
            tolerated = math.inf if eager is not None else 2 * max(noise[step], LOGPROB_FLOAT32)
            result.first_difference = FirstDifference(step, mine, other, margin, tolerated)
            break
    tokenizer: Any = llm.engine.tokenizer
    if tokenizer is not None:
        result.our_text, result.their_text = tokenizer.decode(ours), tokenizer.decode(theirs)
    return result


def _greedy(model: Any, token_ids: list[int], max_tokens: int, ends: set[int]) -> list[int]:
    from transformers import DynamicCache

    device = next(model.parameters()).device
    found: list[int] = []
    # Its name has changed between versions; it is filled in place.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = {name: DynamicCache()}
    ids = torch.tensor([token_ids], device=device)
    while len(found) < max_tokens and not (found and found[-1] in ends):
        out = model(ids, use_cache=True, **cache)
        found.append(int(out.logits[0, -1].argmax()))
        ids = torch.tensor([found[-1:]], device=device)
    return found


def _logits(model: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Logits that each token of ``output`` is taken from: float32 [len(output), vocab_size]."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *output[:-1]]], device=device)
    return model(ids, use_cache=False).logits[0, len(prompt) - 1 :].float().cpu()
