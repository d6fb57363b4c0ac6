"""One sequence's state on the host."""

import enum
from array import array

from nanovllm.engine.step_plan import TokenLogprobs
from nanovllm.outputs import RequestMetrics
from nanovllm.sampling_params import SamplingParams


class SequenceStatus(enum.Enum):
    """Where a sequence is."""

    WAITING = enum.auto()  # in the queue: new, or preempted
    RUNNING = enum.auto()  # resident: it has a slot and KV blocks
    FINISHED = enum.auto()


class Sequence:
    """A prompt and the tokens sampled for it so far.

    Args:
        request_id: The request it belongs to.
        number: Order of arrival in the engine; lower runs first.
        prompt_token_ids: At least one token id.
        params: Sampling parameters.
        max_output_tokens: When it ends at the latest, with ``params.max_tokens`` and the context already considered.
        eos_token_ids: Ids that end it besides ``params.stop_token_ids``, the model's main one first (empty with
            ``ignore_eos``).
        noise_key: 64-bit key of its sampling noise.
        arrival_time: For the metrics.
        index: Number of the completion among its request's.
        leader: A sequence added before, whose blocks of what they have in common it shares.
        num_shared_tokens: How many tokens that is; the whole prompt for another completion of the same request.
        first_logprob: First prompt token whose log-probability is wanted; None for none. It is computed, not taken
            from the prefix cache.
        bad_words: Token ids of the words it must not complete.
    """

    __slots__ = (
        "bad_words",
        "block_hashes",
        "block_table",
        "error",
        "finish_reason",
        "first_logprob",
        "index",
        "last_preemption",
        "leader",
        "logprobs",
        "main_eos_token_id",
        "max_computed_tokens",
        "max_output_tokens",
        "metrics",
        "noise_key",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_expected_tokens",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_shared_tokens",
        "number",
        "params",
        "prompt_logprobs",
        "request_id",
        "slot",
        "status",
        "stop_reason",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        number: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_output_tokens: int,
        eos_token_ids: tuple[int, ...] = (),
        noise_key: int = 0,
        arrival_time: float = 0.0,
        index: int = 0,
        leader: "Sequence | None" = None,
        num_shared_tokens: int = 0,
        first_logprob: int | None = None,
        bad_words: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        self.request_id = request_id
        self.number = number
        # A 32-bit array: slices of it are bytes ready for hashing, and a long prompt takes 4 bytes a token.
        self.token_ids = array("i", prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.params = params
        self.max_output_tokens = max_output_tokens
        self.max_computed_tokens = self.num_prompt_tokens + max_output_tokens - 1  # the last token's KV is never needed
        self.main_eos_token_id = eos_token_ids[0] if eos_token_ids else None
        self.stop_token_ids = frozenset(eos_token_ids) | frozenset(params.stop_token_ids or ())
        self.noise_key = noise_key
        self.status = SequenceStatus.WAITING
        self.slot = -1
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of its full blocks; kept when preempted, so that none is hashed twice
        self.num_published_blocks = 0  # leading blocks that the prefix cache knows
        self.num_computed_tokens = 0  # tokens whose KV is in the cache or will be once the steps in flight are done
        self.num_expected_tokens = len(prompt_token_ids)  # tokens it will have once the steps in flight are done
        self.last_preemption = 0  # number of its latest preemption among all that ever were; 0 for none
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache when it first ran
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.index = index
        self.leader = leader
        self.num_shared_tokens = num_shared_tokens
        self.first_logprob = first_logprob
        self.bad_words = bad_words
        self.logprobs: list[TokenLogprobs] = []  # of the sampled tokens, if asked for
        self.prompt_logprobs: dict[int, TokenLogprobs] = {}  # by position
        self.metrics = RequestMetrics(arrival_time)

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids are known."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Sampled tokens whose ids are known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The sampled tokens."""
        return self.token_ids[self.num_prompt_tokens :].tolist()

    @property
    def num_in_flight(self) -> int:
        """Tokens that steps in flight will sample; their ids are not known yet."""
        return self.num_expected_tokens - len(self.token_ids)

    @property
    def num_tokens_to_compute(self) -> int:
        """Tokens, known or in flight, whose KV is neither computed nor being computed."""
        if self.num_expected_tokens > self.max_computed_tokens:
            return 0  # its last token is on its way: nothing is left to run
        return self.num_expected_tokens - self.num_computed_tokens

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.status is SequenceStatus.FINISHED
