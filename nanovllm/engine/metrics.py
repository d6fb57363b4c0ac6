"""What an engine counts."""

from collections import deque
from dataclasses import dataclass, field

from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import StepPlan

REMEMBERED_REQUESTS = 10_000  # the latest, of which percentiles are taken


@dataclass(slots=True)
class Counters:
    """Running totals, since the engine was made."""

    startup_seconds: float = 0.0
    output_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0  # of steps that computed prompt tokens
    decode_tokens: int = 0  # sampled in steps that only decoded
    decode_seconds: float = 0.0  # of those steps
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finished_requests: int = 0
    first_token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED_REQUESTS))
    output_token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED_REQUESTS))

    def count_step(self, plan: StepPlan, sampled: int, seconds: float) -> None:
        """Note a step that took so long, and gave so many tokens that were wanted."""
        self.output_tokens += sampled
        self.prefill_tokens += plan.num_prefill_tokens
        if plan.num_prefill_tokens:
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds
            self.decode_tokens += sampled

    def count_request(self, sequences: list[Sequence]) -> None:
        """Note a request that has ended."""
        self.finished_requests += 1
        self.prompt_tokens += sum(seq.num_prompt_tokens for seq in sequences)
        self.cached_tokens += sum(seq.num_cached_tokens for seq in sequences)
        for seq in sequences:
            times = seq.metrics
            if times.first_token_time is None or times.finished_time is None:
                continue
            self.first_token_seconds.append(times.first_token_time - times.arrival_time)
            if seq.num_output_tokens > 1:
                spent = times.finished_time - times.first_token_time
                self.output_token_seconds.append(spent / (seq.num_output_tokens - 1))


def percentiles(values: deque[float]) -> dict[str, float] | None:
    """The 50th, 90th and 99th percentile (nearest rank); None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{share}": ordered[-(-len(ordered) * share // 100) - 1] for share in (50, 90, 99)}
