"""Requests of random token ids, in fixed numbers: speed and scheduling do not depend on what they say.

Needs the standard library only: benchmarks draw them where the rest of the package cannot be imported.
"""

import random
from dataclasses import dataclass

MAX_TOKEN_ID = 10_000  # prompts draw from 0 to this, and wrap round in a smaller vocabulary
MOST_TOKENS = 100_000_000  # of all prompts: their ids are kept, which takes some 8 bytes each
FORM = "N:PROMPT_LO-PROMPT_HI:OUTPUT_LO-OUTPUT_HI[:SHARED_PREFIX], e.g. 16:64-256:64-128"


@dataclass
class Requests:
    """What an engine is asked: prompts of token ids, and how many tokens to generate for each."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def longest(self) -> int:
        """Prompt and output tokens of the longest request."""
        return max(len(prompt) + n for prompt, n in zip(self.prompts, self.output_lens, strict=True))

    def warm_up(self) -> "Requests":
        """A few short requests that fit wherever these fit."""
        prompts = [prompt[:32] for prompt in self.prompts[:4]]
        return Requests(prompts, [min(n, 8) for n in self.output_lens[:4]])


@dataclass(frozen=True)
class Workload:
    """How many requests, and the ranges that prompt and output lengths are drawn from.

    Args:
        num_requests: At least 1.
        prompt_len: Fewest and most tokens of a prompt, besides those that are shared.
        output_len: Fewest and most tokens to generate.
        shared_prefix: Tokens that all prompts begin with.
    """

    num_requests: int
    prompt_len: tuple[int, int]
    output_len: tuple[int, int]
    shared_prefix: int = 0

    @classmethod
    def parse(cls, spec: str) -> "Workload":
        """Read ``FORM``; ValueError if it is something else, or more than anybody runs."""
        number, *lengths = spec.split(":")
        try:
            if len(lengths) not in (2, 3):
                raise ValueError(f"it has {len(lengths) + 1} parts")
            prefix = whole_number(lengths[2], 0) if len(lengths) == 3 else 0
            workload = cls(whole_number(number, 1), length_range(lengths[0]), length_range(lengths[1]), prefix)
        except ValueError as error:
            raise ValueError(f"workload {spec!r} is not {FORM}: {error}") from None
        tokens = workload.num_requests * (prefix + workload.prompt_len[1])
        if tokens > MOST_TOKENS:
            raise ValueError(f"workload {spec!r} may have {tokens:,} prompt tokens; at most {MOST_TOKENS:,} are drawn")
        return workload

    def __str__(self) -> str:
        (prompt_lo, prompt_hi), (output_lo, output_hi) = self.prompt_len, self.output_len
        prefix = f":{self.shared_prefix}" if self.shared_prefix else ""
        return f"{self.num_requests}:{prompt_lo}-{prompt_hi}:{output_lo}-{output_hi}{prefix}"

    def draw(self, seed: int, vocab_size: int) -> Requests:
        """The requests of this seed: the order of the draws is fixed, so that figures stay comparable."""
        rng = random.Random(seed)

        def tokens(number: int) -> list[int]:
            return [rng.randint(0, MAX_TOKEN_ID) % vocab_size for _ in range(number)]

        prefix = tokens(self.shared_prefix)
        prompts = [prefix + tokens(rng.randint(*self.prompt_len)) for _ in range(self.num_requests)]
        return Requests(prompts, [rng.randint(*self.output_len) for _ in range(self.num_requests)])


def whole_number(text: str, least: int) -> int:
    """Read a number of at least ``least``; ValueError if it is none."""
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise ValueError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def length_range(text: str) -> tuple[int, int]:
    """Read ``LO-HI``, or one length of at least 1; ValueError if it is neither."""
    low, _, high = text.partition("-")
    bounds = whole_number(low, 1), whole_number(high or low, 1)
    if bounds[0] > bounds[1]:
        raise ValueError(f"{text!r} runs backwards")
    return bounds
