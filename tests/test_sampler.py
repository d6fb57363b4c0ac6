"""Draws follow the distribution that temperature, top-k and top-p define, and depend on nothing but their own request.

The seeds are fixed, so that a test passes always or never. Each check of a distribution is shown to have power: the
draws of a sampler that is slightly wrong do not pass it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.llm_engine import noise_key
from nanovllm.layers import sampler as sampler_module
from nanovllm.layers.logprobs import token_logprobs, top_logprobs
from nanovllm.layers.noise import block_words, exponential_noise, token_words
from nanovllm.layers.sampler import Sampler, SamplingRows
from nanovllm.layers.top_tokens import BLOCK, in_blocks, most_likely
from tests.threads import one_thread  # noqa: F401

CPU = torch.device("cpu")
NUM_REQUESTS, NUM_POSITIONS = 400, 300
# p-values: of the sampler as it is, and of any of the wrong ones
PASSES, FAILS = 1e-3, 1e-9


def request_keys(count: int) -> torch.Tensor:
    """The noise keys of requests with the seeds 0, 1, ...: int32 [count, 2]."""
    words = [noise_key("request", seed, 0) for seed in range(count)]
    return torch.tensor([word - 2**64 if word >> 63 else word for word in words]).view(torch.int32).view(-1, 2)


def make_rows(
    keys: torch.Tensor,
    positions: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
) -> SamplingRows:
    count = len(positions)
    temperatures = torch.as_tensor(temperature, dtype=torch.float32).expand(count)
    top_ks, top_ps = torch.as_tensor(top_k).expand(count), torch.as_tensor(top_p, dtype=torch.float32).expand(count)
    min_ps = torch.as_tensor(min_p, dtype=torch.float32).expand(count)
    sampled = temperatures > 0
    truncated = sampled & ((top_ks > 0) | (top_ps < 1))
    return SamplingRows(
        temperature=temperatures,
        top_k=top_ks,
        top_p=top_ps,
        keys=keys.expand(count, 2),
        positions=positions,
        all_greedy=not sampled.any(),
        any_greedy=not sampled.all(),
        any_truncated=bool(truncated.any()),
        num_candidates=int(top_ks[truncated].max()) if truncated.any() else 0,
        any_min_p=bool((sampled & (min_ps > 0)).any()),
        min_p=min_ps,
        any_unbounded=bool((truncated & (top_ks == 0)).any()),
    )


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Token ids; the logits stay as they are."""
    return Sampler(logits.shape[1], CPU)(logits.clone(), rows)


def draws(
    logits: torch.Tensor, unbounded: bool = False, num_positions: int = NUM_POSITIONS, **settings: Any
) -> torch.Tensor:
    """Draws from one row of logits, [requests, positions]: every request at every position.

    Args:
        logits: [vocab_size].
        unbounded: As in a batch with a row of top_p alone, whose kept tokens may be many.
        settings: temperature, top_k, top_p, min_p.
    """
    keys = request_keys(NUM_REQUESTS).repeat_interleave(num_positions, dim=0)
    positions = torch.arange(1, num_positions + 1).repeat(NUM_REQUESTS)
    rows = make_rows(keys, positions, **settings)
    if unbounded:
        rows.any_unbounded = True
    tokens = sample(logits.expand(len(positions), -1), rows)
    return tokens.view(NUM_REQUESTS, num_positions)


few_draws = partial(draws, num_positions=40)  # to see what is drawn at all


def exact_distribution(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """What the parameters mean, token by token in float64."""
    probabilities = torch.softmax(logits.double() / temperature, dim=0).tolist()
    ranking = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    ranking = [token for token in ranking if probabilities[token] >= min_p * probabilities[ranking[0]] - 1e-12]
    if top_k > 0:
        ranking = ranking[:top_k]
    total = sum(probabilities[token] for token in ranking)
    kept, reached = [], 0.0
    for token in ranking:
        kept.append(token)
        reached += probabilities[token] / total
        if top_p < 1 and reached >= top_p - 1e-9:
            break
    result = torch.zeros(len(probabilities), dtype=torch.float64)
    for token in kept:
        result[token] = probabilities[token]
    return result / result.sum()


def p_value(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's chi-squared test of draws against a distribution; 0 if a token was drawn that has no probability."""
    counts = torch.bincount(tokens.flatten(), minlength=len(expected)).double()
    possible = expected > 0
    if counts[~possible].any():
        return 0.0
    want = expected[possible] * tokens.numel()
    assert want.min() > 5, "too few draws for the test to hold"
    statistic = ((counts[possible] - want).square() / want).sum()
    if len(want) == 1:
        return 1.0
    degrees = torch.tensor((len(want) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))


LOGITS = torch.linspace(-1.5, 1.5, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(2))]


class TestDistribution:
    """120,000 draws against the exact probabilities."""

    @pytest.mark.parametrize("unbounded", [False, True])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"temperature": 0.6},
            {"temperature": 1.7},
            {"top_k": 1},
            {"top_k": 5},
            {"top_k": 24},
            {"top_k": 100},
            {"top_p": 0.02},
            {"top_p": 0.5},
            {"top_p": 0.95},
            {"top_k": 7, "top_p": 0.8},
            {"temperature": 0.7, "top_k": 10},
            {"temperature": 1.3, "top_p": 0.7},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ],
        ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()) or "plain",
    )
    def test_draws_follow_the_parameters(self, settings: dict[str, Any], unbounded: bool) -> None:
        assert p_value(draws(LOGITS, unbounded, **settings), exact_distribution(LOGITS, **settings)) > PASSES

    @pytest.mark.parametrize(
        ("asked", "drawn"),
        [
            ({"temperature": 0.8}, {"temperature": 0.84}),
            ({"temperature": 0.8}, {"temperature": 0.76}),
            ({"temperature": 2.0}, {"temperature": 0.5}),
            ({"top_k": 5}, {"top_k": 6}),
            ({"top_k": 5}, {"top_k": 4}),
            ({"top_p": 0.5}, {"top_p": 0.6}),
            ({"top_p": 0.5}, {"top_p": 0.4}),
            ({"top_k": 7, "top_p": 0.8}, {"top_k": 7}),
            ({"top_k": 7, "top_p": 0.8}, {"top_p": 0.8}),
            ({"temperature": 1.3, "top_p": 0.7}, {"top_p": 0.7}),
        ],
        ids=str,
    )
    def test_a_sampler_that_is_slightly_wrong_would_not_pass(
        self, asked: dict[str, Any], drawn: dict[str, Any]
    ) -> None:
        assert p_value(draws(LOGITS, **drawn), exact_distribution(LOGITS, **asked)) < FAILS

    def test_top_p_goes_by_the_probabilities_that_top_k_leaves(self) -> None:
        """Of .4 .3 .2 .1, top_k=2 leaves 4/7 and 3/7; half of that is the first alone, of the whole it is both."""
        logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
        assert few_draws(logits, top_k=2, top_p=0.5).unique().tolist() == [3]
        assert few_draws(logits, top_p=0.5).unique().tolist() == [2, 3]

    def test_top_p_goes_by_the_probabilities_at_the_temperature(self) -> None:
        logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
        assert few_draws(logits, temperature=0.25, top_p=0.6).unique().tolist() == [3]
        assert few_draws(logits, temperature=4.0, top_p=0.6).unique().tolist() == [1, 2, 3]

    def test_neighbouring_draws_are_independent(self) -> None:
        """Pairs of tokens at neighbouring positions, of neighbouring requests, and one position apart from these."""
        tokens = draws(torch.zeros(8))
        uniform = torch.full((64,), 1 / 64, dtype=torch.float64)
        for other in (tokens.roll(-1, 1), tokens.roll(-1, 0), tokens.roll((-1, -1), (0, 1)), tokens.roll(-16, 1)):
            assert p_value(tokens * 8 + other, uniform) > PASSES
        assert p_value(tokens * 8 + tokens, uniform) < FAILS

    def test_each_request_draws_from_the_whole_distribution(self) -> None:
        """No request is lucky: per request, the draws of 300 positions follow the distribution too."""
        tokens = draws(torch.zeros(4))
        quarter = torch.full((4,), 0.25, dtype=torch.float64)
        values = [p_value(row, quarter) for row in tokens]
        assert min(values) > 1e-2 / NUM_REQUESTS
        assert 0.4 < sum(values) / len(values) < 0.6


class TestWhatIsKept:
    """The borders of top-k and top-p."""

    @pytest.mark.parametrize(
        ("top_p", "kept"), [(0.3, [3]), (0.6, [2, 3]), (0.75, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])]
    )
    def test_the_smallest_set_that_reaches_top_p(self, top_p: float, kept: list[int]) -> None:
        logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
        assert few_draws(logits, top_p=top_p).unique().tolist() == kept

    @pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.5 + 1e-6, 3), (0.5 - 1e-6, 2)])
    def test_a_sum_that_reaches_top_p_exactly_is_enough(self, top_p: float, kept: int) -> None:
        """Quarters add up exactly, so `reaches` and `exceeds` differ."""
        assert few_draws(torch.zeros(4), top_p=top_p).unique().tolist() == list(range(kept))

    def test_one_token_always_stays(self) -> None:
        for top_p in (1e-9, 1e-30, 1e-50):
            assert few_draws(LOGITS, top_p=top_p).unique().tolist() == [int(LOGITS.argmax())]

    def test_top_p_of_one_keeps_all_whatever_the_sum_rounds_to(self) -> None:
        """In float32 the first probability is 1 already; but it only reaches any smaller top_p."""
        logits = torch.full((20,), 0.0)
        logits[3] = 18.0
        for top_k in (0, 5):
            kept = top_k or 20
            distribution = exact_distribution(logits, top_k=top_k)
            drawn = draws(logits, top_k=top_k, top_p=1.0, temperature=6.0)  # the others have a chance of 5 %
            assert len(drawn.unique()) == kept
            assert distribution[3] > 0.99
        logits[3] = 40.0
        assert few_draws(logits, top_k=0, top_p=1 - 2.0**-24).unique().tolist() == [3]

    def test_ties_are_kept_in_the_order_of_the_ids(self) -> None:
        logits = torch.tensor([0.0, 2.0, 2.0, 2.0, 0.0])
        assert few_draws(logits, top_k=2).unique().tolist() == [1, 2]
        assert few_draws(logits, temperature=0).unique().tolist() == [1]
        assert p_value(draws(logits, top_k=3), exact_distribution(logits, top_k=3)) > PASSES

    @pytest.mark.parametrize("settings", [{"top_k": 70}, {"top_k": 200}, {"top_p": 0.5}, {"top_k": 250, "top_p": 0.5}])
    def test_ties_among_many_are_kept_in_the_order_of_the_ids(self, settings: dict[str, Any]) -> None:
        """Across blocks, and beyond the tokens that are tried first."""
        for logits in (torch.zeros(300), (torch.arange(300) % 3 == 1).float()):
            kept = exact_distribution(logits, **settings).nonzero()[:, 0]
            assert torch.equal(few_draws(logits, **settings).unique(), kept)

    def test_min_p_goes_by_the_most_likely_token_before_top_k_and_top_p(self) -> None:
        logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
        assert few_draws(logits, min_p=0.45).unique().tolist() == [1, 2, 3]
        assert few_draws(logits, min_p=0.55).unique().tolist() == [2, 3]
        assert few_draws(logits, min_p=0.55, top_p=0.55).unique().tolist() == [
            3
        ]  # 4/7; of the whole it would take both
        assert few_draws(logits, min_p=1.0).unique().tolist() == [3]
        assert few_draws(logits, min_p=0.55, temperature=4.0).unique().tolist() == [0, 1, 2, 3]
        assert few_draws(torch.zeros(300), min_p=1.0).unique().tolist() == list(range(300))

    def test_a_row_that_asks_for_nothing_keeps_everything_beside_one_that_does(self) -> None:
        keys, positions = request_keys(2).repeat(300, 1), torch.arange(1, 301).repeat_interleave(2)
        rows = make_rows(keys, positions, top_k=torch.tensor([0, 3]).repeat(300))
        tokens = sample(torch.zeros(600, 10), rows).view(300, 2)
        assert [len(column.unique()) for column in tokens.T] == [10, 3]

    def test_impossible_tokens_stay_impossible(self) -> None:
        logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0])
        for settings in ({}, {"temperature": 100.0}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.1}):
            assert few_draws(logits, **settings).unique().tolist() == [1, 3]
        for settings in ({}, {"top_k": 200}, {"top_p": 0.999}):
            assert few_draws(logits.repeat(75), **settings).remainder(2).min() == 1


class TestTemperature:
    """From greedy to uniform."""

    def test_zero_is_the_argmax_whatever_the_other_rows_do(self) -> None:
        logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
        temperature = torch.tensor([0.0, 1.0, 0.0, 5.0, 0.7, 0.0])
        top_k, top_p = torch.tensor([3, 0, 0, 4, 0, 50]), torch.tensor([0.1, 1.0, 1.0, 0.5, 0.9, 1.0])
        greedy, drawn = [0, 2, 5], 0
        for position in range(1, 101):
            rows = make_rows(request_keys(6), torch.full((6,), position), temperature, top_k, top_p)
            tokens = sample(logits, rows)
            assert torch.equal(tokens[greedy], logits.argmax(dim=1)[greedy])
            drawn += int((tokens != logits.argmax(dim=1)).sum())
        assert drawn > 100
        assert torch.equal(sample(logits, make_rows(request_keys(6), torch.ones(6).long(), 0.0)), logits.argmax(dim=1))

    @pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}])
    def test_tiny_is_the_argmax(self, settings: dict[str, Any]) -> None:
        logits = torch.tensor([-3.0, 1e4, -1e4, 9999.0, 0.0])
        for temperature in (1e-3, 1e-20):
            assert few_draws(logits, temperature=temperature, **settings).unique().tolist() == [1]
            assert few_draws(logits - 2e4, temperature=temperature, **settings).unique().tolist() == [1]

    def test_huge_is_uniform(self) -> None:
        uniform = torch.full((24,), 1 / 24, dtype=torch.float64)
        for temperature in (1e6, 1e20):
            assert p_value(draws(LOGITS, temperature=temperature), uniform) > PASSES


class TestNoise:
    """exponential_noise: well distributed, and a function of key, position and token alone."""

    WORDS = token_words(4096, CPU)

    def test_rows_do_not_depend_on_their_batch(self) -> None:
        keys, positions = request_keys(50), torch.arange(1, 51)
        whole = exponential_noise(keys, positions, self.WORDS)
        order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
        assert torch.equal(exponential_noise(keys[order], positions[order], self.WORDS), whole[order])
        assert torch.equal(exponential_noise(keys[7:8], positions[7:8], self.WORDS), whole[7:8])
        assert torch.equal(exponential_noise(keys, positions, self.WORDS), whole)

    def test_a_larger_vocabulary_only_adds_tokens(self) -> None:
        keys, positions = request_keys(5), torch.arange(1, 6)
        small = exponential_noise(keys, positions, token_words(100, CPU))
        assert torch.equal(exponential_noise(keys, positions, self.WORDS)[:, :100], small)
        # so a rank that holds part of the vocabulary draws the same noise for it
        part = exponential_noise(keys, positions, self.WORDS[60:100])
        assert torch.equal(small[:, 60:], part)

    def test_both_words_of_the_key_and_the_position_count(self) -> None:
        keys = torch.tensor([[1, 1], [2, 1], [1, 2], [1, 1]], dtype=torch.int32)
        noise = exponential_noise(keys, torch.tensor([5, 5, 5, 6]), self.WORDS)
        for first in range(4):
            for second in range(first):
                assert (noise[first] == noise[second]).sum() < 3

    def test_moments_and_shape(self) -> None:
        noise = exponential_noise(request_keys(1024), torch.arange(1, 1025), self.WORDS).double()
        assert noise.mean() == pytest.approx(1, abs=2.5e-3)  # of 4 million draws: 5 standard errors
        assert noise.var() == pytest.approx(1, abs=7e-3)
        bins = (torch.exp(-noise) * 256).long().clamp(max=255)
        assert p_value(bins, torch.full((256,), 1 / 256, dtype=torch.float64)) > PASSES

    @pytest.mark.parametrize(
        "keys_and_positions",
        [
            lambda n: (request_keys(1).expand(n, 2), torch.arange(1, n + 1)),
            lambda n: (request_keys(n), torch.ones(n, dtype=torch.int64)),
            lambda n: (torch.tensor([[i, 0] for i in range(n)], dtype=torch.int32), torch.ones(n, dtype=torch.int64)),
            lambda n: (torch.tensor([[0, i] for i in range(n)], dtype=torch.int32), torch.ones(n, dtype=torch.int64)),
            lambda n: (torch.tensor([[i, i] for i in range(n)], dtype=torch.int32), torch.arange(n, 0, -1)),
        ],
        ids=["positions", "seeds", "low words", "high words", "keys against positions"],
    )
    def test_no_correlation_between_neighbours(
        self, keys_and_positions: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Of any two rows across the tokens, and of any two tokens across the rows."""
        n = 1024
        noise = exponential_noise(*keys_and_positions(n), self.WORDS)
        uniform = torch.exp(-noise.double())
        for matrix in (uniform, uniform[:, :n].T):
            correlation = torch.corrcoef(matrix).fill_diagonal_(0)
            deviation = matrix.shape[1] ** -0.5
            assert correlation.abs().max() < 6 * deviation  # half a million pairs
            assert correlation.diagonal(1).mean().abs() < 5 * deviation * n**-0.5
            assert correlation.std() == pytest.approx(deviation, rel=0.02)

    def test_every_draw_is_positive_and_finite(self) -> None:
        """Rows in which the hash of some token has its upper 24 bits all ones or all zeros.

        A draw of 0 would win against everything, one token in 2^24 of a row, whatever its probability; an infinite one
        would lose against the tokens that top-k excluded.
        """
        positions = torch.tensor([44, 48, 116, 132, 242, 297, 465, 545, 631, 723, 731, 736])
        noise = exponential_noise(
            torch.zeros(1, 2, dtype=torch.int32).expand(12, 2), positions, token_words(150000, CPU)
        )
        assert noise.min() > 0
        assert noise.max() < 17
        assert noise.log().isfinite().all()

    def test_a_token_of_no_consequence_is_never_drawn(self) -> None:
        """In the same rows: all tokens but one together have a probability of 10^-8."""
        positions = torch.tensor([44, 48, 116, 132, 242, 297, 465, 545, 631, 723, 731, 736])
        logits = torch.full((12, 150000), -30.0)
        logits[:, 7] = 0.0
        keys = torch.zeros(1, 2, dtype=torch.int32)
        for settings in ({}, {"top_k": 1}, {"top_p": 0.9}):
            assert sample(logits, make_rows(keys, positions, **settings)).unique().tolist() == [7]

    def test_rare_tokens_are_drawn_as_rarely_as_they_should(self) -> None:
        """The smallest draws decide for them, so these must be finely graded."""
        keys = request_keys(2048)
        rare = exponential_noise(keys, torch.arange(1, 2049), self.WORDS).flatten()
        for probability in (1e-3, 1e-5, 3e-6):
            expected = rare.numel() * probability
            assert int((rare < probability).sum()) == pytest.approx(expected, abs=5 * expected**0.5)
        smallest = rare.topk(2000, largest=False).values
        assert len(smallest.unique()) > 1990

    def test_blocks_and_tokens_draw_from_distinct_streams(self) -> None:
        tokens, blocks = token_words(200_000, CPU), block_words(2000, CPU)
        assert len(torch.cat([tokens, blocks]).unique()) == 202_000


def mixed_rows(count: int) -> SamplingRows:
    """Every kind of row in one batch."""
    number = torch.arange(count)
    return make_rows(
        request_keys(count),
        number % 9 + 1,
        temperature=torch.tensor([0.0, 0.5, 1.0, 1.5, 3.0])[number % 5],
        top_k=torch.tensor([0, 0, 1, 20, 63, 64, 65, 100, 299, 1000])[number % 10],
        top_p=torch.tensor([1.0, 0.9, 0.3, 1e-6, 1.0, 0.99, 0.6])[number % 7],
        min_p=torch.tensor([0.0, 0.0, 0.2])[number % 3],
    )


def part_of(rows: SamplingRows, index: torch.Tensor) -> SamplingRows:
    return make_rows(
        rows.keys[index],
        rows.positions[index],
        temperature=rows.temperature[index],
        top_k=rows.top_k[index],
        top_p=rows.top_p[index],
        min_p=0.0 if rows.min_p is None else rows.min_p[index],
    )


class TestBatches:
    """A row's token depends on that row alone."""

    @pytest.mark.parametrize("vocab_size", [1, 5, 127, 128, 129, 300, 1024])
    @pytest.mark.parametrize("kind", ["peaked", "flat", "ties"])
    def test_a_row_alone_gives_the_token_it_gives_in_any_batch(self, vocab_size: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(vocab_size)
        logits = torch.randn(210, vocab_size, generator=generator) * (5.0 if kind == "peaked" else 0.1)
        if kind == "ties":
            logits = (logits * 20).round() / 4
        rows = mixed_rows(210)
        whole = sample(logits, rows)
        assert whole.min() >= 0
        assert whole.max() < vocab_size
        assert torch.equal(whole, sample(logits, rows))
        order = torch.randperm(210, generator=generator)
        assert torch.equal(sample(logits[order], part_of(rows, order)), whole[order])
        for row in order[:40].split(1):
            assert torch.equal(sample(logits[row], part_of(rows, row)), whole[row])

    def test_no_path_for_devices_that_are_not_waited_for_changes_a_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Off the CPU all rows take every path, and what is theirs is kept."""
        logits = torch.randn(210, 300, generator=torch.Generator().manual_seed(0))
        rows = mixed_rows(210)
        truncated = make_rows(rows.keys, rows.positions, top_k=rows.top_k % 90 + 1, top_p=rows.top_p)
        expected = sample(logits, rows), sample(logits, truncated)

        class Elsewhere(sampler_module._Batch):
            host_may_look = property(lambda self: False, lambda self, value: None)

        monkeypatch.setattr(sampler_module, "_Batch", Elsewhere)
        assert torch.equal(sample(logits, rows), expected[0])
        assert torch.equal(sample(logits, truncated), expected[1])

    def test_the_logits_stay_as_they_are(self) -> None:
        logits = torch.randn(210, 256, generator=torch.Generator().manual_seed(0))
        before = logits.clone()
        Sampler(256, CPU)(logits, mixed_rows(210))
        assert torch.equal(logits, before)

    @pytest.mark.parametrize("greedy", [False, True])
    @pytest.mark.parametrize("vocab_size", [5, 300])
    def test_rows_that_nothing_can_be_sampled_from_give_minus_one(self, vocab_size: int, greedy: bool) -> None:
        """Rows with a NaN or an infinity anywhere, or without a finite logit; the others are not touched by them."""
        logits = torch.randn(210, vocab_size, generator=torch.Generator().manual_seed(0))
        rows = mixed_rows(210)
        if greedy:
            rows = make_rows(rows.keys, rows.positions, temperature=0.0)
        expected = sample(logits, rows)
        bad = torch.arange(0, 210, 3)
        for number, row in enumerate(bad.tolist()):
            if number % 3 == 2:
                logits[row] = -torch.inf
            else:
                logits[row, number % vocab_size] = (torch.nan, torch.inf)[number % 3]
        expected[bad] = -1
        assert torch.equal(sample(logits, rows), expected)


class TestMostLikely:
    """Exact, and in the order of a stable sort."""

    @pytest.mark.parametrize("vocab_size", [1, 100, 128, 129, 5000])
    @pytest.mark.parametrize("count", [1, 2, 64, 65, 1000, 5000])
    @pytest.mark.parametrize("distinct", [1, 3, 50, 10_000])
    def test_as_a_stable_sort_has_them(self, vocab_size: int, count: int, distinct: int) -> None:
        generator = torch.Generator().manual_seed(count)
        logits = torch.randint(-distinct, distinct, (6, vocab_size), generator=generator) / 7
        logits[2:4] = -logits[2:4].abs() * 0.0  # zeros of either sign
        logits[4, torch.rand(vocab_size, generator=generator) < 0.3] = -torch.inf
        blocks = in_blocks(logits)
        rows = torch.tensor([5, 3, 4, 2])
        count = min(count, vocab_size)
        values, ids = most_likely(blocks, blocks.amax(dim=-1), rows, count)
        ordered = logits[rows].sort(dim=-1, descending=True, stable=True)
        assert torch.equal(values, ordered.values[:, :count])
        assert torch.equal(ids, ordered.indices[:, :count])

    def test_blocks_are_a_view_where_they_can_be(self) -> None:
        logits = torch.zeros(2, 4 * BLOCK)
        assert in_blocks(logits).data_ptr() == logits.data_ptr()


class TestLogprobs:
    """Against log_softmax in float64."""

    @pytest.mark.parametrize("vocab_size", [1, 5, 300, 20_000])
    @pytest.mark.parametrize("scale", [0.1, 5.0])
    def test_of_the_most_likely_and_of_given_tokens(self, vocab_size: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(7, vocab_size, generator=generator) * scale + 10
        logits[1] = (logits[1] * 4).round() / 4  # ties
        logits[2, 1:] = -torch.inf
        before, exact = logits.clone(), torch.log_softmax(logits.double(), dim=-1)
        for num in {0, 1, min(20, vocab_size), vocab_size}:
            values, ids = top_logprobs(logits, num)
            assert torch.equal(ids, logits.sort(dim=-1, descending=True, stable=True).indices[:, :num])
            assert torch.allclose(values.double(), exact.gather(-1, ids), rtol=1e-6, atol=1e-5)
        tokens = torch.randint(vocab_size, (7,), generator=generator)
        tokens[0] = logits[0].argmax()
        values, ranks = token_logprobs(logits, tokens)
        assert torch.allclose(values.double(), exact.gather(-1, tokens[:, None])[:, 0], rtol=1e-6, atol=1e-5)
        order = logits.sort(dim=-1, descending=True, stable=True).indices.tolist()
        assert ranks.tolist() == [row.index(token) + 1 for row, token in zip(order, tokens.tolist(), strict=True)]
        assert ranks[0] == 1
        assert torch.equal(logits, before)

    def test_a_row_without_a_token_does_not_fail(self) -> None:
        token_logprobs(torch.zeros(2, 5), torch.tensor([-1, 3]))


@dataclass
class Wanted:
    """A request and the tokens it gets when it is alone."""

    prompt: list[int]
    params: SamplingParams
    tokens: list[int]


class TestThroughTheEngine:
    """The same request with the same seed: the same tokens, whatever happens around it."""

    def make_llm(self, path: Path, **arguments: Any) -> LLM:
        defaults = {"device": "cpu", "skip_tokenizer_init": True, "num_kvcache_blocks": 512, "max_model_len": 128}
        return LLM(path, **{**defaults, **arguments})

    @pytest.fixture(scope="class")
    def wanted(self, tiny_checkpoint: Path) -> list[Wanted]:
        draw = random.Random(0)
        shared = [draw.randrange(200) for _ in range(20)]
        result = []
        with self.make_llm(tiny_checkpoint, enable_prefix_caching=False) as llm:
            for number in range(64):
                prompt = (shared if number % 2 else []) + [draw.randrange(200) for _ in range(draw.randrange(1, 20))]
                params = SamplingParams(
                    temperature=draw.choice([0.0, 0.7, 1.0, 1.5]),
                    top_k=draw.choice([0, 0, 20]),
                    top_p=draw.choice([1.0, 1.0, 0.9]),
                    max_tokens=24 if number % 4 == 3 else 6,
                    ignore_eos=True,
                    seed=number * 7,
                )
                tokens = llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"]
                result.append(Wanted(prompt, params, tokens))
        return result

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"max_num_batched_tokens": 13, "kvcache_block_size": 4},
            {"max_num_seqs": 3},
            {"kvcache_block_size": 1, "num_kvcache_blocks": 110, "max_num_batched_tokens": 64},
        ],
        ids=["all at once", "in chunks", "three at a time", "with preemptions"],
    )
    def test_in_a_batch_of_64_in_any_order(
        self, tiny_checkpoint: Path, wanted: list[Wanted], arguments: dict[str, Any]
    ) -> None:
        shuffled = random.Random(1).sample(wanted, len(wanted))
        with self.make_llm(tiny_checkpoint, **arguments) as llm:
            for _ in range(2):  # the second time after prefix hits
                outputs = llm.generate(
                    [request.prompt for request in shuffled],
                    [request.params for request in shuffled],
                    use_tqdm=False,
                )
                assert [output["token_ids"] for output in outputs] == [request.tokens for request in shuffled]
            assert (llm.get_metrics()["num_preemptions"] > 0) == ("num_kvcache_blocks" in arguments)

    def test_seeds_matter_and_unseeded_requests_differ(self, tiny_checkpoint: Path) -> None:
        def texts(llm: LLM, seeds: list[int | None]) -> list[tuple[int, ...]]:
            params = [SamplingParams(temperature=1.5, max_tokens=8, ignore_eos=True, seed=seed) for seed in seeds]
            outputs = llm.generate([[1, 2, 3]] * len(seeds), params, use_tqdm=False)
            return [tuple(output["token_ids"]) for output in outputs]

        with self.make_llm(tiny_checkpoint, seed=5) as llm:
            first = texts(llm, [1, 2, 1, None, None])
            assert first[0] == first[2]
            assert len(set(first)) == 4
            second = texts(llm, [1, 2, 1, None, None])
            assert second[:3] == first[:3]
            assert not set(second[3:]) & set(first)  # later requests of the engine: other noise
        with self.make_llm(tiny_checkpoint, seed=5) as llm:
            assert texts(llm, [1, 2, 1, None, None]) == first
        with self.make_llm(tiny_checkpoint, seed=6) as llm:
            other = texts(llm, [1, 2, 1, None, None])
            assert other[:3] == first[:3]
            assert not set(other[3:]) & set(first)

    @pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-30, 1e-6])
    def test_the_smallest_temperatures_are_greedy(self, tiny_checkpoint: Path, temperature: float) -> None:
        def texts(chosen: float) -> list[list[int]]:
            params = SamplingParams(temperature=chosen, max_tokens=6, ignore_eos=True, top_p=0.9, seed=3)
            return [output["token_ids"] for output in llm.generate([[1, 2], [3, 4, 5]], params, use_tqdm=False)]

        with self.make_llm(tiny_checkpoint) as llm:
            assert texts(temperature) == texts(0.0)

    def test_the_largest_values_are_served(self, tiny_checkpoint: Path) -> None:
        params = [
            SamplingParams(temperature=temperature, top_k=top_k, max_tokens=6, ignore_eos=True, seed=seed)
            for temperature, top_k, seed in (
                (1e20, 0, 0),
                (1e38, 0, 0),
                (1.7e308, 0, 0),
                (1.7e308, 2**80, 0),
                (1.0, 2**63, 2**64 - 1),
                (1.0, -1, 2**64 - 1),
            )
        ]
        with self.make_llm(tiny_checkpoint) as llm:
            outputs = [output["token_ids"] for output in llm.generate([[1, 2]] * 6, params, use_tqdm=False)]
        assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
        assert outputs[4] == outputs[5] != outputs[0]

    def test_numbers_of_any_type_are_served(self, tiny_checkpoint: Path) -> None:
        params = [
            SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=6, ignore_eos=True, seed=1)
            for temperature, top_p, top_k in (
                (0.5, 0.75, 9),
                (Decimal("0.5"), Fraction(3, 4), np.int32(9)),
                (np.float16(0.5), torch.tensor(0.75), torch.tensor(9)),
            )
        ]
        with self.make_llm(tiny_checkpoint) as llm:
            outputs = [output["token_ids"] for output in llm.generate([[1, 2]] * 3, params, use_tqdm=False)]
        assert outputs[0] == outputs[1] == outputs[2]
