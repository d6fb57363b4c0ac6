"""100,000 draws against the exact distribution, and that the same check refuses samplers that are slightly wrong.

The seeds are fixed, so that a test passes always or never.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.engine.logit_rules import LogitRules
from nanovllm.engine.step_plan import SlotEntry
from nanovllm.layers import sampler as sampler_module
from nanovllm.layers.noise import token_words
from nanovllm.layers.sampler import Sampler, SamplingRows
from nanovllm.layers.top_tokens import BLOCK
from tests.test_sampler import exact_distribution, make_rows, request_keys
from tests.threads import one_thread  # noqa: F401

CPU = torch.device("cpu")
NUM_DRAWS = 100_000
ROWS = 4_000  # a batch, as large as fits the caches
LIMIT = 1e-4


def example_logits(vocab_size: int) -> torch.Tensor:
    """Bell-shaped, the likely tokens spread over all blocks."""
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))


def draw_many(logits: torch.Tensor, num_draws: int = NUM_DRAWS, **settings: Any) -> torch.Tensor:
    """Draws int64 [num_draws] of 100 requests at successive positions."""
    keys = request_keys(100).repeat(ROWS // 100, 1)
    sampler, batch = Sampler(len(logits), CPU), logits.expand(ROWS, -1).contiguous()
    tokens = []
    for first in range(0, num_draws, ROWS):
        positions = torch.arange(first, first + ROWS) // 100
        tokens.append(sampler(batch, make_rows(keys, positions, **settings)))
    return torch.cat(tokens)


def p_value(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's chi-squared test, the rarest tokens counted together; 0 if a token was drawn that cannot be."""
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    if counts[expected == 0].any():
        return 0.0
    want = expected * len(tokens)
    rare = want < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    want = torch.cat([want[~rare], want[rare].sum()[None]])
    if want[-1] < 5:  # too few to tell, unless it is none
        counts, want = counts[:-1], want[:-1]
    degrees = torch.tensor((len(want) - 1) / 2, dtype=torch.float64)
    if degrees == 0:
        return 1.0
    return float(torch.special.gammaincc(degrees, ((counts - want).square() / want).sum() / 2))


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.5},
    {"temperature": 1.0},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"min_p": 0.2},
    {"temperature": 0.5, "top_k": 20, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 90, "top_p": 0.7},
    {"temperature": 2.0, "min_p": 0.3, "top_p": 0.8},
    {"temperature": 0.7, "min_p": 0.05, "top_k": 40, "top_p": 0.95},
]


@pytest.mark.parametrize("vocab_size", [5, 300])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(f"{name}={value}" for name, value in s.items()))
def test_draws_follow_the_exact_distribution(vocab_size: int, settings: dict[str, Any]) -> None:
    logits = example_logits(vocab_size)
    assert p_value(draw_many(logits, **settings), exact_distribution(logits, **settings)) > LIMIT


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        pytest.param({"top_p": 0.3}, {"top_k": "nucleus + 1"}, id="top_p keeps one token too many"),
        pytest.param({"top_p": 0.9}, {"top_k": "nucleus + 1"}, id="top_p keeps one of many tokens too many"),
        pytest.param({"top_p": 0.3}, {"top_k": "nucleus - 1"}, id="top_p keeps one token too few"),
        pytest.param({"top_k": 20, "top_p": 0.5}, {"top_k": "nucleus"}, id="top_p before top_k"),
        pytest.param({"temperature": 2.0}, {"temperature": 0.5}, id="temperature multiplied"),
        pytest.param({"temperature": 2.0, "top_p": 0.8}, {"top_p": 0.8}, id="no temperature"),
        pytest.param({"min_p": 0.004}, {"min_p": "of 1"}, id="min_p of 1 rather than of the largest"),
        pytest.param({"min_p": 0.5, "top_p": 0.7}, {"top_p": 0.7}, id="min_p after top_p"),
    ],
)
def test_wrong_parameters_are_refused(asked: dict[str, Any], drawn: dict[str, Any]) -> None:
    """What a misread parameter would keep, drawn by the sampler as it is."""
    logits = example_logits(300)
    nucleus = int((exact_distribution(logits, top_p=asked.get("top_p", 1.0)) > 0).sum())
    values = {"nucleus": min(nucleus, asked.get("top_k", 300)), "nucleus + 1": nucleus + 1, "nucleus - 1": nucleus - 1}
    values["of 1"] = asked.get("min_p", 0.0) / float(torch.softmax(logits, dim=0).max())
    drawn = {name: values.get(value, value) for name, value in drawn.items()}
    assert p_value(draw_many(logits, **drawn), exact_distribution(logits, **asked)) < LIMIT


def block_noise_for_tokens(sampler: Sampler) -> None:
    sampler.token_words = sampler.block_words[:, None].expand(-1, BLOCK)


def tokens_and_blocks_share_words(sampler: Sampler) -> None:
    sampler.block_words = token_words(len(sampler.block_words), CPU)


def all_blocks_share_their_noise(sampler: Sampler) -> None:
    sampler.block_words = sampler.block_words[:1].expand_as(sampler.block_words)


def two_blocks_share_their_noise(sampler: Sampler) -> None:
    sampler.block_words[1] = sampler.block_words[0]


def two_tokens_share_their_noise(sampler: Sampler) -> None:
    sampler.token_words[:, 1] = sampler.token_words[:, 0]


@pytest.mark.parametrize(
    "mutate",
    [
        block_noise_for_tokens,
        tokens_and_blocks_share_words,
        all_blocks_share_their_noise,
        two_blocks_share_their_noise,
        two_tokens_share_their_noise,
    ],
)
def test_noise_that_is_not_independent_is_refused(
    monkeypatch: pytest.MonkeyPatch, mutate: Callable[[Sampler], None]
) -> None:
    original = Sampler.__init__

    def init(self: Sampler, vocab_size: int, device: torch.device) -> None:
        original(self, vocab_size, device)
        mutate(self)

    monkeypatch.setattr(Sampler, "__init__", init)
    logits = torch.zeros(300)
    assert p_value(draw_many(logits), exact_distribution(logits)) < LIMIT


def never_try_again(batch: Any, index: torch.Tensor) -> torch.Tensor:
    return batch._draw(index, batch.sums[index])


@pytest.mark.parametrize("wrong", ["keeps the first draw", "the same noise again", "noise of a rate of 2"])
def test_a_wrong_draw_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    original = sampler_module._Batch._noise
    if wrong == "keeps the first draw":
        monkeypatch.setattr(sampler_module._Batch, "_draw_nucleus", never_try_again)
    elif wrong == "the same noise again":
        monkeypatch.setattr(
            sampler_module._Batch, "_noise", lambda self, index, words, attempt=0: original(self, index, words)
        )
    else:  # of a rate that differs between tokens would be another distribution; a square of the noise is one too
        monkeypatch.setattr(
            sampler_module._Batch, "_noise", lambda self, index, words, attempt=0: original(self, index, words) ** 2
        )
    logits = example_logits(300) / 2
    assert p_value(draw_many(logits, top_p=0.6), exact_distribution(logits, top_p=0.6)) < LIMIT


@pytest.mark.parametrize("settings", [{}, {"top_k": 9}, {"top_p": 0.6}], ids=str)
def test_positions_and_rows_are_pairwise_independent(settings: dict[str, Any]) -> None:
    """Pairs of draws, in four classes of tokens each, of one request at successive positions and of two requests."""
    logits = torch.zeros(300)
    tokens = draw_many(logits, **settings).view(-1, 100)  # [positions, requests]
    kept = exact_distribution(logits, **settings)
    classes = torch.arange(300) * 7 % 4
    shares = torch.zeros(4, dtype=torch.float64).index_add_(0, classes, kept)
    pairs = torch.outer(shares, shares).flatten()
    drawn = classes[tokens]
    for other in (drawn.roll(-1, 0), drawn.roll(-1, 1), drawn.roll((-1, -1), (0, 1)), drawn.roll(-5, 0)):
        assert p_value((drawn * 4 + other).flatten(), pairs) > LIMIT
    assert p_value((drawn * 4 + drawn).flatten(), pairs) < LIMIT


def test_a_wide_vocabulary_is_drawn_from_evenly() -> None:
    """Of 20,000 equally likely tokens, by their residues and by their blocks."""
    sampler, logits, keys = Sampler(20_000, CPU), torch.zeros(200, 20_000), request_keys(200)
    rows: Callable[[int], SamplingRows] = lambda position: make_rows(keys, torch.full((200,), position))  # noqa: E731
    tokens = torch.cat([sampler(logits, rows(position)) for position in range(100)])
    blocks = torch.bincount(torch.arange(20_000) // BLOCK).double() / 20_000
    assert p_value(tokens // BLOCK, blocks) > LIMIT
    assert p_value(tokens % 125, torch.full((125,), 1 / 125, dtype=torch.float64)) > LIMIT


# Rules: prompt 1 2 3 1, output 4 5 4, of a vocabulary of 40
PROMPT, OUTPUT = [1, 2, 3, 1], [4, 5, 4]
RULES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"presence_penalty": 1.2},
    {"frequency_penalty": 0.9},
    {"logit_bias": {4: 1.5, 7: -2.0, 8: 3.0}},
    {"allowed_token_ids": [2, 4, 9, 11, 30]},
    {"min_tokens": 4, "stop_token_ids": [6, 10]},
    {"repetition_penalty": 0.6, "presence_penalty": -1.0, "frequency_penalty": 0.5, "logit_bias": {5: 1.0}},
    {"frequency_penalty": 0.9, "logit_bias": {4: 7.0}, "temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
]


def ruled_logits(params: SamplingParams, logits: list[float]) -> torch.Tensor:
    """What the rules leave of a row's logits, token by token."""
    found = []
    for token, logit in enumerate(logits):
        logit += (params.logit_bias or {}).get(token, 0.0)
        if token in PROMPT + OUTPUT:
            factor = params.repetition_penalty
            logit = logit / factor if logit > 0 else logit * factor
        logit -= params.presence_penalty * (token in OUTPUT) + params.frequency_penalty * OUTPUT.count(token)
        banned = len(OUTPUT) < params.min_tokens and token in params.stop_token_ids
        banned |= params.allowed_token_ids is not None and token not in params.allowed_token_ids
        found.append(-math.inf if banned else logit)
    return torch.tensor(found)


@pytest.mark.parametrize("settings", RULES, ids=lambda s: ",".join(s))
def test_draws_follow_the_rules_of_a_request(settings: dict[str, Any]) -> None:
    params, vocab_size, context = SamplingParams(**settings), 40, PROMPT + OUTPUT
    logits = example_logits(vocab_size) * 2
    rules = LogitRules(vocab_size, CPU)
    stops = tuple(params.stop_token_ids) if len(OUTPUT) < params.min_tokens else ()
    rules.enter(SlotEntry(0, context, [], params, 0, len(PROMPT), None, stops))
    row, position, zero = logits[None].clone(), torch.tensor([len(context)]), torch.zeros(1, dtype=torch.int64)
    rules.apply(row, [0], zero, position, len(context), torch.tensor([context], dtype=torch.int32))
    truncation = {name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in settings}
    tokens = draw_many(row[0], **truncation)
    assert p_value(tokens, exact_distribution(ruled_logits(params, logits.tolist()), **truncation)) > LIMIT
    for name in settings.keys() - truncation.keys() - {"stop_token_ids"}:  # without any one of them, it would not do
        less = ruled_logits(params_without(params, name), logits.tolist())
        assert p_value(tokens, exact_distribution(less, **truncation)) < 1e-9


def params_without(params: SamplingParams, name: str) -> SamplingParams:
    changed = params.clone()
    setattr(changed, name, getattr(SamplingParams(), name))
    return changed
