"""What one step tells the model runner: only what changed since the last step, and which tokens to compute.

A plan is plain data. It is what travels to the other ranks under tensor parallelism, so it never holds
anything of the host's own bookkeeping, and its size does not grow with the length of the contexts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.text import counted


@dataclass(slots=True)
class SlotEntry:
    """A sequence that enters a slot.

    Args:
        slot: Row of the batch state it takes.
        token_ids: All its tokens so far: the prompt, and after a preemption what was generated before it.
        block_ids: Its KV blocks so far, in order.
        params: Its sampling parameters.
        noise_key: 64-bit key of its sampling noise.
        num_prompt_tokens: How many of the tokens are the prompt's.
        first_logprob: First prompt token whose log-probability is wanted; None for none.
        stop_token_ids: Tokens that are not sampled before ``params.min_tokens``.
        bad_words: Token ids of the words whose last token must not complete them.
        special: Whether it asks for more than a fixed temperature; None if that can be told from the rest.
    """

    slot: int
    token_ids: Sequence[int]
    block_ids: list[int]
    params: SamplingParams
    noise_key: int
    num_prompt_tokens: int = 0
    first_logprob: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    special: bool | None = None


@dataclass(slots=True)
class StepPlan:
    """One step of the model.

    The lists ``slots``, ``starts``, ``lengths`` and ``samples`` run in parallel, a row a scheduled sequence: compute
    tokens ``starts[i] : starts[i] + lengths[i]`` of the sequence in ``slots[i]``, and sample its next token if
    ``samples[i]``. A decode row has length 1; a prompt chunk any length. Changes apply before the computation, in
    the order of the fields.
    """

    released: list[int] = field(default_factory=list)
    entered: list[SlotEntry] = field(default_factory=list)
    appended_blocks: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, index in its table, block id)
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    num_prefill_tokens: int = 0  # of prompts, and of outputs computed again after a preemption; the rest decode

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return sum(self.lengths)

    @property
    def is_decode(self) -> bool:
        """Whether every row computes the token it sampled last, and nothing else."""
        return not self.num_prefill_tokens

    def __str__(self) -> str:
        rows = ", ".join(
            f"{slot}:{start}+{length}{'*' if sample else ''}"
            for slot, start, length, sample in zip(self.slots, self.starts, self.lengths, self.samples, strict=True)
        )
        return (
            f"{counted(self.num_tokens, 'token')} of {counted(len(self.slots), 'sequence')}; entered "
            f"{[e.slot for e in self.entered]}, "
            f"released {self.released}, {counted(len(self.appended_blocks), 'new block')}; rows "
            f"slot:start+length [{rows}]"
        )


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, natural logarithms.

    Args:
        token_id: The token that stands there.
        logprob: Its log-probability.
        rank: Its place among all tokens by likelihood, from 1; of equally likely ones the lower id comes first.
        top: The most likely tokens and their log-probabilities, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(slots=True)
class StepResult:
    """What a step gave; plain data, like the plan.

    Args:
        tokens: A token id a sampling row, in the order of the plan; -1 where none could be sampled.
        errors: By sampling row, why none could.
        logprobs: By sampling row, for those that asked.
        prompt_logprobs: By row of the plan, for those that asked: first position and, from there on, what was computed.
    """

    tokens: list[int]
    errors: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
