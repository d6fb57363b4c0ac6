"""Whatever SamplingParams and the intake accept costs no other request of the batch anything."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.layers.temperature import Cosine, Linear
from tests.threads import one_thread  # noqa: F401

VOCAB_SIZE = 211  # of the tiny checkpoint; the demo's tokenizer knows 1,280 tokens
PLAIN = SamplingParams(max_tokens=4, ignore_eos=True, seed=5)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    """A model with fewer tokens than its tokenizer."""
    with LLM(tiny_checkpoint, tokenizer=DEMO_MODEL_PATH, device="cpu", max_model_len=16, num_kvcache_blocks=64) as llm:
        yield llm


def run_beside(llm: LLM, params: SamplingParams, prompt: Any = (7, 8, 9)) -> RequestOutput:
    """The output of a request with these parameters; asserts that one beside it gets what it gets alone."""
    engine = llm.engine
    [alone] = llm.generate([[1, 2, 3]], PLAIN, use_tqdm=False)
    plain = engine.add_request([1, 2, 3], PLAIN)
    other = engine.add_request(list(prompt), params)
    finished: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests:
        finished |= {output.request_id: output for output in engine.step()}
    assert finished[plain]["token_ids"] == alone["token_ids"]
    assert not engine.scheduler.has_unfinished
    return finished[other]


class OwnSchedule:
    """A temperature schedule of somebody's own."""

    def __init__(self, pieces: Callable[[], Any]) -> None:
        self.pieces = pieces

    def at(self, position: int) -> float:
        return 1.0


class OddCallable:
    """A logits processor whose signature cannot be had."""

    __signature__ = 5

    def __call__(self, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits


@pytest.mark.parametrize("min_tokens", [2**31, 2**63, 10**30])
def test_min_tokens_beyond_any_integer_of_the_device(llm: LLM, min_tokens: int) -> None:
    output = run_beside(llm, SamplingParams(max_tokens=None, min_tokens=min_tokens))
    assert output.outputs[0].finish_reason == "length"


def test_words_that_only_the_tokenizer_can_spell_are_not_generated_anyway(llm: LLM) -> None:
    words = ["hello", "a"]  # the demo's ids of the first are beyond the model's, those of the second within
    spelt = [llm.get_tokenizer().encode(word, add_special_tokens=False) for word in words]
    assert max(spelt[0]) >= VOCAB_SIZE > max(spelt[1])
    biases = {spelt[1][0]: 100.0}
    output = run_beside(llm, SamplingParams(bad_words=words, logit_bias=biases, max_tokens=8, ignore_eos=True))
    assert len(output["token_ids"]) == 8
    assert spelt[1][0] not in output["token_ids"]


def test_thousands_of_bad_words(llm: LLM) -> None:
    words = [f"{first}{second}" for first in range(60) for second in range(60)]
    assert len(run_beside(llm, SamplingParams(bad_words=words, max_tokens=3, ignore_eos=True))["token_ids"]) == 3


def test_a_bad_word_that_is_no_text_is_refused_by_name(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"bad_words\[1\] is not valid Unicode"):
        llm.generate([[1]], SamplingParams(bad_words=["a", "\ud800"]), use_tqdm=False)


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_the_last_token_of_the_vocabulary_is_the_last_that_may_be_named(llm: LLM, field: str) -> None:
    def params(token: int) -> SamplingParams:
        return SamplingParams(max_tokens=3, min_tokens=1, **{field: {token: 1.0} if field == "logit_bias" else [token]})

    run_beside(llm, params(VOCAB_SIZE - 1))
    with pytest.raises(ValueError, match=rf"{field} of the prompt has token id 211; the vocabulary has ids 0 to 210"):
        llm.generate([[1]], params(VOCAB_SIZE), use_tqdm=False)


def test_more_completions_than_an_engine_can_make_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="n is 16385; it must be a whole number from 1 to 16384"):
        SamplingParams(n=2**14 + 1)


def test_a_schedule_that_gives_its_pieces_one_by_one_is_as_good_as_any(llm: LLM) -> None:
    def pieces() -> Iterator[tuple[float, float, float, float, bool]]:
        yield (0.0, 1e300, 1.0, 0.0, False)  # beyond what float32 holds

    assert len(run_beside(llm, SamplingParams(temperature=OwnSchedule(pieces), ignore_eos=True, max_tokens=4)).outputs)


def test_a_schedule_is_kept_as_it_was_when_the_request_was_added(llm: LLM) -> None:
    kept = [(0, 0.0, 1, 0.0, False)]
    params = SamplingParams(temperature=OwnSchedule(lambda: kept), max_tokens=4, ignore_eos=True)
    [expected] = llm.generate([[7, 8, 9]], params, use_tqdm=False)
    request_id = llm.engine.add_request([7, 8, 9], params)
    kept[0] = (0, "nonsense", 1, 0.0, False)  # type: ignore[call-overload]
    while llm.engine.has_unfinished_requests:
        found = {output.request_id: output for output in llm.engine.step()}
    assert found[request_id]["token_ids"] == expected["token_ids"]
    with pytest.raises(TypeError, match=r"a temperature of .* is 'nonsense'"):
        llm.engine.add_request([7, 8, 9], params)


@pytest.mark.parametrize("pieces", [lambda: [(0, 1, 1, 1, np.array([1, 0]))], lambda: 1 / 0, lambda: [(0, 1)]])
def test_a_schedule_whose_pieces_cannot_be_had_is_refused(pieces: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="whose pieces cannot be had"):
        SamplingParams(temperature=OwnSchedule(pieces))


def test_a_processor_without_a_signature_gets_the_outputs_tokens(llm: LLM) -> None:
    output = run_beside(llm, SamplingParams(logits_processors=[OddCallable()], max_tokens=3, ignore_eos=True))
    assert (len(output["token_ids"]), output.error) == (3, None)


class TestKept:
    """A request keeps its parameters as they were when it was taken."""

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize(
        "prompt",
        [[7, 0], {"prompt_token_ids": [7, 0]}, np.array([7, 0]), {"input_ids": np.array([7, 0])}, torch.tensor([7, 0])],
        ids=["list", "dict", "array", "encoding", "tensor"],
    )
    def test_an_iterator_may_change_what_it_yields(self, llm: LLM, prompt: Any, shared: bool) -> None:
        params = SamplingParams(temperature=0, max_tokens=1)
        ids = next(iter(prompt.values())) if isinstance(prompt, dict) else prompt

        def pairs() -> Iterator[Any]:
            for token in (10, 20, 30):
                params.logit_bias = {token: 100.0}
                ids[1] = token
                yield prompt if shared else (prompt, params)

        outputs = list(llm.generate_iter(pairs(), params))
        assert [output["token_ids"] for output in outputs] == [[10], [20], [30]]
        assert [output.prompt_token_ids for output in outputs] == [[7, 10], [7, 20], [7, 30]]

    def test_text_of_one_dictionary(self, tmp_path: Path) -> None:
        prompt = {"prompt": ""}

        def refilled() -> Iterator[Any]:
            for prompt["prompt"] in "abc":
                yield prompt

        with LLM(DEMO_MODEL_PATH, device="cpu", num_kvcache_blocks=8) as llm:
            outputs = llm.generate_iter(refilled(), SamplingParams(max_tokens=1))
            assert [output.prompt for output in outputs] == ["a", "b", "c"]

    def test_each_seed_of_one_object_counts(self, llm: LLM) -> None:
        params = SamplingParams(max_tokens=8, ignore_eos=True)

        def pairs() -> Iterator[Any]:
            for params.seed in range(3):
                yield [7, 8], params

        outputs = list(llm.generate_iter(pairs()))
        expected = llm.generate(
            [[7, 8]] * 3, [SamplingParams(max_tokens=8, ignore_eos=True, seed=seed) for seed in range(3)], False
        )
        assert [output["token_ids"] for output in outputs] == [output["token_ids"] for output in expected]

    def test_what_is_changed_in_place_reaches_no_running_request_and_is_checked_for_the_next(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logit_bias={10: 100.0})
        request_id = llm.engine.add_request([7, 8], params)
        llm.engine.step()
        for token, bias, message in ((10**9, 5.0, "token id 1000000000"), ("x", 1.0, "'x'"), (3, None, "None")):
            params.logit_bias[token] = bias  # type: ignore[index]
            with pytest.raises((TypeError, ValueError), match=f"logit_bias.*{message}"):
                llm.engine.add_request([7, 8], params)
            del params.logit_bias[token]  # type: ignore[attr-defined]
        while llm.engine.has_unfinished_requests:
            found = {output.request_id: output for output in llm.engine.step()}
        assert found[request_id]["token_ids"] == [10] * 4


class TestEndOfSequence:
    """Ids that the model's vocabulary does not have."""

    def test_a_stale_file_costs_a_warning_and_no_request(
        self, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "stale"))
        (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [10**6, 5, 2**40]}))
        with caplog.at_level(logging.WARNING), LLM(checkpoint, skip_tokenizer_init=True, num_kvcache_blocks=16) as llm:
            run_beside(llm, SamplingParams(max_tokens=4, min_tokens=1))
            biased = SamplingParams(logit_bias={5: 100.0}, max_tokens=3, temperature=0)
            assert run_beside(llm, biased).outputs[0].finish_reason == "stop"
        [warning] = [record.getMessage() for record in caplog.records if "eos_token_id" in record.getMessage()]
        assert "names 1000000, 1099511627776, but the vocabulary has ids 0 to 210" in warning

    def test_what_the_caller_names_is_refused(self, tiny_checkpoint: Path) -> None:
        with pytest.raises(ValueError, match="hf_overrides names eos_token_id 211; the vocabulary has ids 0 to 210"):
            LLM(tiny_checkpoint, skip_tokenizer_init=True, hf_overrides={"eos_token_id": [5, 211]})


def numbers(low: float, high: float) -> st.SearchStrategy[Any]:
    """Numbers of every kind, extremes among them."""
    extremes = [low, high, -0.0, 5e-324, 1e-45, 1e-30, 1e308, math.inf, math.nan, True]
    floats = st.floats(max(low, -1e308), min(high, 1e308))
    kinds = st.sampled_from([float, np.float64, np.float32, Decimal, Fraction])
    finite = st.builds(lambda kind, value: kind(value), kinds, floats)
    return st.sampled_from(extremes) | floats | finite | st.integers(-2, 3)


WHOLE = st.sampled_from(
    [-1, 0, 1, 2, VOCAB_SIZE - 1, VOCAB_SIZE, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1, 10**30, np.int8(3), 2.0, True]
) | st.integers(0, 2 * VOCAB_SIZE)  # fmt: skip
TOKENS = st.sampled_from([0, 5, VOCAB_SIZE - 1, VOCAB_SIZE, 2**31, 2**63]) | st.integers(0, VOCAB_SIZE - 1)
TOKEN_LISTS = st.lists(TOKENS, max_size=6) | st.just([0] * 3000) | st.just(np.arange(VOCAB_SIZE))
WORDS = st.lists(st.sampled_from(["a", "hello", "add 12", " ", "\u20ac", "\U0001f600", "0", "1 1"]), max_size=5)
TEMPERATURES = numbers(0, 1e308) | st.sampled_from(
    [
        Linear(1e300, 0, 3),
        Cosine(0, 1, 2),
        OwnSchedule(lambda: ((0.0, 0.0, 5e-324, 1e308, 1),)),
        OwnSchedule(lambda: iter([(0.0, 1.0, 0.0, 1.0, None), (2.0**24, 1.0, 0.0, 1.0, True)])),
    ]
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 3),
    "temperature": TEMPERATURES,
    "top_k": WHOLE,
    "top_p": numbers(0, 1),
    "min_p": numbers(0, 1),
    "presence_penalty": numbers(-2, 2),
    "frequency_penalty": numbers(-2, 2),
    "repetition_penalty": numbers(0, 1e308),
    "logit_bias": st.dictionaries(TOKENS, numbers(-100, 100), max_size=4),
    "allowed_token_ids": TOKEN_LISTS,
    "bad_words": WORDS,
    "logits_processors": st.lists(
        st.sampled_from([OddCallable(), lambda ids, logits: logits * math.nan, lambda ids, logits: logits.half(), min]),
        max_size=2,
    ),
    "max_tokens": st.none() | WHOLE,
    "min_tokens": WHOLE,
    "stop": WORDS | st.just("\ud800"),
    "include_stop_str_in_output": st.booleans(),
    "stop_token_ids": TOKEN_LISTS,
    "ignore_eos": st.booleans(),
    "seed": st.none() | WHOLE | st.sampled_from([-(2**63), -1, np.uint64(2**64 - 1)]),
    "logprobs": st.none() | WHOLE,
    "prompt_logprobs": st.none() | WHOLE,
    "truncate_prompt_tokens": st.none() | WHOLE,
    "detokenize": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "spaces_between_special_tokens": st.booleans(),
}


def test_every_field_is_drawn() -> None:
    assert FIELDS.keys() == SamplingParams.__dataclass_fields__.keys()


# A few fields at a time: of all at once some would nearly always be refused.
SOME_FIELDS = st.sets(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=4).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in sorted(names)})
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(fields=SOME_FIELDS)
def test_whatever_is_accepted_fails_no_other_request(llm: LLM, fields: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**fields)
        [prepared] = llm.engine.intake.prepare([[7, 8, 9]], [params])
        if isinstance(prepared, Exception):
            raise prepared
    except (TypeError, ValueError):
        return
    output = run_beside(llm, params)
    assert {completion.finish_reason for completion in output.outputs} <= {"stop", "length", "error"}
