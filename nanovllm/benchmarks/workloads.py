"""What a benchmark asks of an engine: random token ids in fixed numbers. Needs the standard library only."""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass

MAX_TOKEN_ID = 10_000  # prompts draw from 0 to this, and wrap round in a smaller vocabulary
PRESETS = {"full": "256:100-1024:100-1024", "mini": "16:64-256:64-128"}


@dataclass
class Requests:
    """What every engine is given: prompts of token ids, and how many tokens to generate for each."""

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
        return max(len(prompt) + n for prompt, n in zip(self.prompts, self.output_lens, strict=True))

    def warm_up(self) -> "Requests":
        """A few short requests that fit wherever these fit."""
        prompts = [prompt[:32] for prompt in self.prompts[:4]]
        return Requests(prompts, [min(n, 8) for n in self.output_lens[:4]])


@dataclass(frozen=True)
class Workload:
    """How many requests, and the ranges that prompt and output lengths are drawn from.

    Each prompt starts with the same ``shared_prefix`` tokens, on top of its own length.
    """

    num_requests: int
    prompt_len: tuple[int, int]
    output_len: tuple[int, int]
    shared_prefix: int = 0

    @classmethod
    def parse(cls, spec: str) -> "Workload":
        """Read ``N:PROMPT_LO-PROMPT_HI:OUTPUT_LO-OUTPUT_HI[:SHARED_PREFIX]``."""
        number, *lengths = spec.split(":")
        try:
            if len(lengths) not in (2, 3):
                raise argparse.ArgumentTypeError(f"it has {len(lengths) + 1} parts")
            prefix = whole_number(0)(lengths[2]) if len(lengths) == 3 else 0
            return cls(whole_number(1)(number), length_range(lengths[0]), length_range(lengths[1]), prefix)
        except argparse.ArgumentTypeError as error:
            form = f"N:PROMPT_LO-PROMPT_HI:OUTPUT_LO-OUTPUT_HI[:SHARED_PREFIX], e.g. {PRESETS['mini']}"
            raise argparse.ArgumentTypeError(f"{spec!r} is not {form}: {error}") from None

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


def check_lengths(engine: str, made: list[int], asked: list[int]) -> None:
    if made != asked:
        raise RuntimeError(f"{engine} returned {sum(made)} output tokens; {sum(asked)} were asked for")


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def whole_number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def length_range(text: str) -> tuple[int, int]:
    """Read ``LO-HI``, or one length."""
    low, _, high = text.partition("-")
    bounds = whole_number(1)(low), whole_number(1)(high or low)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r} runs backwards")
    return bounds
