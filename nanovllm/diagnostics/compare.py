"""An engine against transformers: layers, tokens and weights, and what is to be made of them."""

from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.diagnostics.compare_layers import LayerComparison, OperationResult, compare_layers
from nanovllm.diagnostics.compare_reference import Reference
from nanovllm.diagnostics.compare_tokens import TokenComparison, compare_tokens
from nanovllm.diagnostics.compare_trace import fused_attributes, record
from nanovllm.diagnostics.compare_weights import WeightComparison, compare_weights
from nanovllm.llm import LLM
from nanovllm.utils.text import counted

# Tokens after the prompt whose operations are compared too.
NUM_DECODED = 2
# Whatever a path is called in a sentence.
PATHS = {"engine": "prompt, as the engine runs it", "plain": "prompt, no fused kernels", "decode": "decode steps"}


@dataclass(slots=True)
class Comparison:
    """What :func:`compare` has found.

    Args:
        token_ids: The prompt.
        dtype: The engine's.
        backend: Its attention backend.
        device: Where it runs.
        has_fused_kernels: Whether it has any here; without, there is no plain path besides.
        layers, tokens, weights: The parts.
    """

    token_ids: list[int]
    dtype: str
    backend: str
    device: str
    has_fused_kernels: bool
    layers: LayerComparison
    tokens: TokenComparison
    weights: list[WeightComparison]

    def departure(self) -> OperationResult | None:
        """The operation to blame; None if none is."""
        return self.layers.first_departure()

    def wrong_weights(self) -> list[WeightComparison]:
        return [weight for weight in self.weights if not weight.equal]

    def departs(self) -> bool:
        """Whether anything is beyond what is tolerated."""
        return bool(self.departure() or self.layers.first_sum() or self.tokens.departs() or self.wrong_weights())

    def summary(self) -> str:
        """One line: what departs first, by layer and operation where an operation is to blame."""
        first = self.departure()
        if first is not None:
            return f"departs: {describe(first)}"
        if wrong := self.wrong_weights():
            return f"departs: weights: {wrong[0].name} {wrong[0].hint}"
        if (total := self.layers.first_sum()) is not None and total.total is not None:
            return (
                f"departs: {place(total)}: no operation is wrong by itself, but up to here errors add up to "
                f"{total.total.absolute:.3g}, {total.total.ratio:.2g} times what is tolerated"
            )
        if (step := self.tokens.first_wrong_step()) is not None:
            return (
                f"departs: output token {step}: log-probabilities are off by {self.tokens.differences[step]:.3g}, "
                "though the operations agree when they are launched one by one; see captured steps (enforce_eager), "
                "sampling and the prefix cache"
            )
        if self.tokens.departs() and self.tokens.first_difference is not None:
            difference = self.tokens.first_difference
            return f"departs: output token {difference.step}: another token by a margin of {difference.margin:.3g}"
        return "equal within tolerance: every operation, log-probability and weight"


def place(result: OperationResult) -> str:
    """Layer and operation."""
    return result.operation if result.layer is None else f"layer {result.layer}, {result.operation}"


def describe(result: OperationResult) -> str:
    """Where an operation departs, by how much, and what it looks like."""
    words = f"{place(result)} ({PATHS[result.path]})"
    if result.own is not None:
        own = result.own
        head = "" if own.head is None else f", head {own.head}"
        words += (
            f": off by {own.absolute:.3g} (relative {own.relative:.2g}, {own.ratio:.2g} times what is tolerated) at "
            f"token {own.token}{head}, index {own.index}: {own.found:.6g} instead of {own.expected:.6g}"
        )
    return (
        f"{words}; it {result.hint}"
        if result.hint.startswith(("is ", "has ", "was "))
        else (f"{words}; {result.hint}" if result.hint else words)
    )


def check_ranks(tensor_parallel_size: int) -> None:
    """ValueError if there are several ranks, each of which knows only its share."""
    if tensor_parallel_size > 1:
        raise ValueError(
            f"tensor_parallel_size is {tensor_parallel_size}: layers are compared on one rank (compare several with "
            "one by --settings tensor_parallel_size=2 --against tensor_parallel_size=1)"
        )


def compare(
    llm: LLM,
    token_ids: list[int],
    max_tokens: int = 16,
    reference_device: str = "cpu",
    reference: Reference | None = None,
) -> Comparison:
    """Compare an engine with transformers, on a prompt.

    Args:
        llm: The engine, of one rank and idle.
        token_ids: The prompt.
        max_tokens: Greedy tokens to compare.
        reference_device: Where transformers runs.
        reference: Its model, if it has been loaded before.

    Raises:
        ValueError: The engine has several ranks, the prompt does not fit, or transformers cannot load the checkpoint.
    """
    runner: Any = llm.engine.runner
    config = llm.engine.config
    check_ranks(config.tensor_parallel_size)
    room = llm.engine.max_model_len - len(token_ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {counted(len(token_ids), 'token')}; max_model_len is {llm.engine.max_model_len}, "
            "prompt and output "
            "together (raise max_model_len or shorten the prompt)"
        )
    max_tokens = min(max_tokens, room)
    is_int8 = config.quantization == "int8"
    num_decoded = min(max(NUM_DECODED, max_tokens - 1 if is_int8 else 0), room - 1)
    has_fused_kernels = bool(fused_attributes(runner))
    # Without fused kernels, what the engine runs is the plain path.
    engine, decode, _ = record(llm, token_ids, num_decoded, plain=not has_fused_kernels, probe=True)
    prompts = [engine]
    if has_fused_kernels:
        prompts.append(record(llm, token_ids, plain=True, probe=True)[0])
    if reference is None:
        reference = Reference(config.model, runner.dtype, config.hf_overrides, reference_device)
    eager = torch.cat([trace.values["lm_head"] for trace in (engine, decode) if trace is not None])
    return Comparison(
        token_ids=token_ids,
        dtype=str(runner.dtype).removeprefix("torch."),
        backend=runner.attention.name,
        device=str(runner.device),
        has_fused_kernels=has_fused_kernels,
        layers=compare_layers(reference, prompts, decode, is_int8),
        tokens=compare_tokens(llm, reference, token_ids, max_tokens, eager[len(token_ids) - 1 :] if is_int8 else None),
        weights=compare_weights(llm),
    )
