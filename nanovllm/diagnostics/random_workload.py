"""Requests of random token ids, in fixed numbers: speed and scheduling do not depend on what they say."""

import random
import re
from dataclasses import dataclass

MAX_TOKEN_ID = 10_000  # prompts draw from 0 to this, and wrap round in a smaller vocabulary
MOST_TOKENS = 100_000_000  # of all prompts: their ids are kept, which takes some 8 bytes each
FORM = "N:PROMPT_LO-PROMPT_HI:OUTPUT_LO-OUTPUT_HI[:SHARED_PREFIX], e.g. 16:64-256:64-128"


@dataclass(frozen=True, slots=True)
class RandomWorkload:
    """How many requests, and the ranges of their lengths.

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
    def parse(cls, spec: str) -> "RandomWorkload":
        """Read ``FORM``; ValueError if it is something else, or more than anybody runs."""
        found = re.fullmatch(r"(\d+):(\d+)(?:-(\d+))?:(\d+)(?:-(\d+))?(?::(\d+))?", spec, re.ASCII)
        if found is None:
            raise ValueError(f"workload {spec!r} is not {FORM}")
        number, prompt_lo, prompt_hi, output_lo, output_hi, prefix = (
            None if group is None else int(group) for group in found.groups()
        )
        assert number is not None and prompt_lo is not None and output_lo is not None  # noqa: PT018
        ranges = (
            (prompt_lo, prompt_lo if prompt_hi is None else prompt_hi),
            (
                output_lo,
                output_lo if output_hi is None else output_hi,
            ),
        )
        if number < 1 or any(low < 1 or low > high for low, high in ranges):
            raise ValueError(f"workload {spec!r} has a number below 1 or a range that runs backwards; it is {FORM}")
        tokens = number * ((prefix or 0) + ranges[0][1])
        if tokens > MOST_TOKENS:
            raise ValueError(f"workload {spec!r} may have {tokens:,} prompt tokens; at most {MOST_TOKENS:,} are drawn")
        return cls(number, *ranges, prefix or 0)

    def draw(self, seed: int, vocab_size: int) -> tuple[list[list[int]], list[int]]:
        """Prompts, and how many tokens to generate for each; the same every time for one seed."""
        rng = random.Random(seed)

        def tokens(number: int) -> list[int]:
            return [rng.randint(0, MAX_TOKEN_ID) % vocab_size for _ in range(number)]

        prefix = tokens(self.shared_prefix)
        prompts = [prefix + tokens(rng.randint(*self.prompt_len)) for _ in range(self.num_requests)]
        return prompts, [rng.randint(*self.output_len) for _ in range(self.num_requests)]
