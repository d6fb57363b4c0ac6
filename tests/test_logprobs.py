"""Log-probabilities are those of the model's own distribution: transformers' to 1e-4, however a run is scheduled."""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine import intake
from nanovllm.layers.temperature import Linear
from nanovllm.outputs import Logprob
from tests.checkpoints import load_reference, reference_logits
from tests.ids import stable
from tests.threads import one_thread  # noqa: F401

VOCAB_SIZE = 211
TOLERANCE = 1e-4
Reference = Callable[[list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def reference(tiny_reference: Any) -> Reference:
    """transformers' log-probabilities after each token of a text, [tokens, vocab_size]."""
    return lambda ids: reference_logits(tiny_reference, ids).log_softmax(dim=-1)


@pytest.fixture(scope="module")
def demo_reference() -> Reference:
    model = load_reference(DEMO_MODEL_PATH)
    return lambda ids: reference_logits(model, ids).log_softmax(dim=-1)


@pytest.fixture(scope="module")
def shared_llm(tiny_checkpoint: Path) -> LLM:
    """For tests that need nothing special of the engine."""
    return make_llm(tiny_checkpoint)


@pytest.fixture(scope="module")
def demo_llm() -> LLM:
    return LLM(DEMO_MODEL_PATH, device="cpu", dtype="float32", num_kvcache_blocks=128)


class TestAgainstTransformers:
    """Of output and prompt tokens, for any chunking, block size, prefix hit and preemption."""

    @pytest.mark.parametrize("block_size", [1, 16])
    @pytest.mark.parametrize("budget", [1, 7, 64])
    def test_any_chunks_and_blocks(
        self, tiny_checkpoint: Path, reference: Reference, budget: int, block_size: int
    ) -> None:
        llm = make_llm(
            tiny_checkpoint,
            max_num_batched_tokens=budget,
            kvcache_block_size=block_size,
            num_kvcache_blocks=1024 // block_size,
        )
        lengths = [1, 2, 16, 17, 40]
        prompts = [make_prompt(length) for length in lengths]  # each the beginning of the next
        asked = itertools.cycle([(3, 2), (0, None), (None, 0), (-1, 1), (2, -1)])
        for number in range(2):  # the second time from cached prefixes, where prompts are not asked for
            params = [logprobs_params(*numbers) for numbers, _ in zip(asked, prompts, strict=False)]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            for output, wanted in zip(outputs, params, strict=True):
                check(output, wanted, reference)
                assert wanted.prompt_logprobs is None or output.num_cached_tokens == 0
            assert number == 0 or any(output.num_cached_tokens for output in outputs)
            next(asked)  # so that other prompts are asked for

    def test_a_prompt_longer_than_the_logits_held_at_a_time(self, tiny_checkpoint: Path, reference: Reference) -> None:
        llm = make_llm(tiny_checkpoint)
        params = logprobs_params(1, 4)
        prompts = [make_prompt(length, length) for length in (64, 65, 66, 200)]
        for output in llm.generate(prompts, params, use_tqdm=False):
            check(output, params, reference)

    def test_prompts_of_a_cached_prefix_are_complete(self, shared_llm: LLM, reference: Reference) -> None:
        prompt, plain, asking = make_prompt(50, 1), logprobs_params(2, None), logprobs_params(2, 2)
        found = []
        for params in (plain, plain, asking, asking, plain):
            [output] = shared_llm.generate([prompt], params, use_tqdm=False)
            check(output, params, reference)
            found.append(output)
        assert [output.num_cached_tokens for output in found] == [0, 48, 0, 0, 48]
        assert len({tuple(output["token_ids"]) for output in found}) == 1

    def test_after_preemptions(self, tiny_checkpoint: Path, reference: Reference) -> None:
        llm = make_llm(tiny_checkpoint, num_kvcache_blocks=24)
        prompts = [make_prompt(9 + seed, seed) for seed in range(4)]
        params = [logprobs_params(number, number, max_tokens=40) for number in range(4)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.get_metrics()["num_preemptions"] > 0
        for output, wanted in zip(outputs, params, strict=True):
            check(output, wanted, reference)

    def test_each_completion_has_its_own(self, shared_llm: LLM, reference: Reference) -> None:
        params = SamplingParams(n=3, seed=1, temperature=3.0, max_tokens=6, logprobs=2, prompt_logprobs=1)
        [output] = shared_llm.generate([make_prompt(20, 2)], params, use_tqdm=False)
        check(output, params, reference)
        assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3

    @pytest.mark.parametrize(
        "changes",
        [
            {"temperature": 5.0},
            {"temperature": Linear(9.0, 0.0, 8)},
            {"temperature": 1.0, "top_k": 1},
            {"temperature": 2.0, "top_p": 0.3, "min_p": 0.2},
            {"repetition_penalty": 3.0, "presence_penalty": 2.0, "frequency_penalty": -2.0},
            {"allowed_token_ids": [3, 4], "logit_bias": {3: -50.0}},
            {"logits_processors": [lambda output, logits: logits.mul_(-1)]},
            {"min_tokens": 8},
        ],
        ids=stable,
    )
    def test_nothing_that_is_asked_of_the_sampling_changes_them(
        self, shared_llm: LLM, reference: Reference, changes: dict[str, Any]
    ) -> None:
        params = SamplingParams(**{"temperature": 0, **changes}, max_tokens=8, seed=4, logprobs=3, prompt_logprobs=3)
        [output] = shared_llm.generate([make_prompt(12, 3)], params, use_tqdm=False)
        check(output, params, reference)

    def test_asking_changes_no_token(self, shared_llm: LLM) -> None:
        prompts = [make_prompt(length) for length in (3, 20)]
        found = []
        for numbers in [(None, None), (0, None), (5, 5), (-1, -1)]:
            params = [logprobs_params(*numbers, temperature=1.0, seed=3), logprobs_params(None, None)]
            outputs = shared_llm.generate(prompts, params, use_tqdm=False)
            assert outputs[1].outputs[0].logprobs is outputs[1].prompt_logprobs is None  # its neighbour's are not its
            found.append([output["token_ids"] for output in outputs])
        assert found == [found[0]] * 4


class TestStructure:
    """A dictionary by token id for each token."""

    def test_none_unless_asked_for(self, shared_llm: LLM) -> None:
        [output] = shared_llm.generate([[1, 2]], logprobs_params(None, None), use_tqdm=False)
        [completion] = output.outputs
        assert completion.logprobs is completion.cumulative_logprob is output.prompt_logprobs is None

    def test_zero_gives_the_token_alone(self, shared_llm: LLM) -> None:
        params = logprobs_params(0, 0, temperature=2.0, seed=1)
        [output] = shared_llm.generate([[1, 2, 3]], params, use_tqdm=False)
        [completion] = output.outputs
        assert [list(entry) for entry in completion.logprobs or []] == [[token] for token in completion.token_ids]
        assert output.prompt_logprobs is not None
        assert [entry and list(entry) for entry in output.prompt_logprobs] == [None, [2], [3]]

    def test_a_prompt_of_one_token(self, shared_llm: LLM) -> None:
        [output] = shared_llm.generate([[1]], logprobs_params(None, 5), use_tqdm=False)
        assert output.prompt_logprobs == [None]

    @pytest.mark.parametrize("number", [VOCAB_SIZE - 1, VOCAB_SIZE, VOCAB_SIZE + 5, 10**9, -1])
    def test_as_many_as_there_are(self, shared_llm: LLM, reference: Reference, number: int) -> None:
        params = logprobs_params(number, number, max_tokens=2)
        [output] = shared_llm.generate([[1, 2]], params, use_tqdm=False)
        check(output, params, reference)
        entries = [*(output.outputs[0].logprobs or []), (output.prompt_logprobs or [])[1]]
        for entry in entries:
            assert len(entry or {}) >= min(VOCAB_SIZE - 1, number % VOCAB_SIZE)
            if number != VOCAB_SIZE - 1:
                assert sum(math.exp(found.logprob) for found in (entry or {}).values()) == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
    def test_no_more_than_max_logprobs(self, tiny_checkpoint: Path, field: str) -> None:
        with make_llm(tiny_checkpoint, max_logprobs=20) as llm:
            assert llm.generate([[1, 2]], SamplingParams(max_tokens=2, **{field: 20}), use_tqdm=False)
            for number, shown in ((21, "21"), (-1, r"-1 \(all 211\)")):
                with pytest.raises(ValueError, match=rf"^{field} of the prompt is {shown}; max_logprobs is 20 \(lower"):
                    llm.generate([[1, 2]], SamplingParams(max_tokens=2, **{field: number}), use_tqdm=False)
        with make_llm(tiny_checkpoint, max_logprobs=VOCAB_SIZE) as llm:
            assert llm.generate([[1, 2]], SamplingParams(max_tokens=2, **{field: -1}), use_tqdm=False)

    @pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
    def test_no_more_than_memory_holds(self, shared_llm: LLM, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(intake, "MAX_LOGPROBS", 4 * VOCAB_SIZE)
        params = SamplingParams(max_tokens=4, **{field: -1})
        assert shared_llm.generate([[1] * 5], params, use_tqdm=False)
        params.max_tokens = 5
        message = rf"{field} of prompt 1 is -1 \(all 211\), which for 5 tokens makes up to 1,055 .* at most 844 are"
        with pytest.raises(ValueError, match=message):
            shared_llm.generate([[1], [1] * 6], [SamplingParams(), params], use_tqdm=False)

    def test_tokens_have_text(self, demo_llm: LLM) -> None:
        tokenizer = demo_llm.get_tokenizer()
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "add 12 and 30"}], tokenize=False, add_generation_prompt=True
        )
        params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=1)
        [output] = demo_llm.generate([prompt], params, use_tqdm=False)
        entries = [*(output.outputs[0].logprobs or []), *(output.prompt_logprobs or [])[1:]]
        for token, found in itertools.chain.from_iterable((entry or {}).items() for entry in entries):
            assert found.decoded_token == tokenizer.decode([token])
        end = output.prompt_token_ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        special = (output.prompt_logprobs or [])[end]
        assert "<|im_end|>" in [found.decoded_token for found in (special or {}).values()]

    def test_each_token_is_decoded_once(self, demo_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[int] = []
        decode = demo_llm.get_tokenizer().decode

        def counted(token_ids: list[int], **options: Any) -> str:
            decoded.extend(token_ids if len(token_ids) == 1 else [])
            return decode(token_ids, **options)

        monkeypatch.setattr(demo_llm.engine, "_token_texts", {})
        monkeypatch.setattr(demo_llm.engine.tokenizer, "decode", counted)
        params = SamplingParams(max_tokens=2, logprobs=3, ignore_eos=True, seed=1)
        [output] = demo_llm.generate("add 12 and 30", params, use_tqdm=False)
        [again] = demo_llm.generate("add 12 and 30", params, use_tqdm=False)
        assert again.outputs[0].logprobs == output.outputs[0].logprobs
        assert sorted(decoded) == sorted({token for entry in output.outputs[0].logprobs or () for token in entry})

    def test_without_text_there_is_none(self, demo_llm: LLM, shared_llm: LLM) -> None:
        for llm, params in [
            (shared_llm, logprobs_params(1, 1)),
            (demo_llm, SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=1, detokenize=False)),
        ]:
            [output] = llm.generate([[1, 2]], params, use_tqdm=False)
            entries = [*(output.outputs[0].logprobs or []), (output.prompt_logprobs or [])[1]]
            assert {found.decoded_token for entry in entries for found in (entry or {}).values()} == {None}

    def test_as_many_as_tokens_however_a_request_ends(self, shared_llm: LLM, reference: Reference) -> None:
        def fail_at_three(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            return logits if len(output) < 3 else logits / 0 * 0

        prompt = make_prompt(10, 5)
        [whole] = shared_llm.generate([prompt], logprobs_params(1, None, ignore_eos=True), use_tqdm=False)
        for changes, reason in [
            ({"stop_token_ids": [whole["token_ids"][2]]}, "stop"),
            ({"logits_processors": [fail_at_three]}, "error"),
        ]:
            params = logprobs_params(1, None, **changes)
            [output] = shared_llm.generate([prompt], params, use_tqdm=False)
            assert output.outputs[0].finish_reason == reason
            assert len(output["token_ids"]) == 3 or whole["token_ids"][2] in whole["token_ids"][:2]
            check(output, params, reference)

    def test_a_stream_ends_with_them(self, shared_llm: LLM, reference: Reference) -> None:
        params = logprobs_params(2, 2)
        pieces = list(shared_llm.stream([[1, 2, 3]], params))
        assert pieces[-1].output is not None
        check(pieces[-1].output, params, reference)


class TestScore:
    """``LLM.score`` gives the log-likelihoods of continuations."""

    def test_sums_of_transformers(self, shared_llm: LLM, reference: Reference) -> None:
        prompts = [make_prompt(length, length) for length in (1, 2, 15, 16, 17, 70)]
        continuations = [make_prompt(length, -length) for length in (1, 70, 16, 1, 3, 2)]
        scores = shared_llm.score(prompts, continuations, use_tqdm=False)
        for prompt, continuation, score in zip(prompts, continuations, scores, strict=True):
            logprobs = reference(prompt + continuation)[len(prompt) - 1 : -1]
            expected = logprobs.gather(1, torch.tensor(continuation)[:, None])[:, 0]
            assert score.token_ids == continuation
            assert score.token_logprobs == pytest.approx(expected.tolist(), abs=TOLERANCE)
            assert score.logprob == pytest.approx(float(expected.sum()), abs=TOLERANCE * len(continuation))
            assert score.is_greedy == bool((logprobs.argmax(dim=-1) == torch.tensor(continuation)).all())

    def test_what_greedy_decoding_generates_is_greedy(self, shared_llm: LLM) -> None:
        prompt = make_prompt(20, 6)
        [output] = shared_llm.generate([prompt], logprobs_params(0, None, ignore_eos=True), use_tqdm=False)
        greedy = output["token_ids"]
        other = [*greedy[:-1], (greedy[-1] + 1) % VOCAB_SIZE]
        scores = shared_llm.score(prompt, [greedy, greedy[:1], other, other[-1:]], use_tqdm=False)
        assert [score.is_greedy for score in scores] == [True, True, False, False]
        assert scores[0].logprob == pytest.approx(output.outputs[0].cumulative_logprob, abs=TOLERANCE)

    def test_of_equally_likely_tokens_the_one_that_greedy_decoding_takes_is_greedy(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Logits in bfloat16 are often equal; the token's rank alone would not tell which comes first."""
        monkeypatch.setenv("NANOVLLM_DISABLE", "linear")  # whose logits are float32
        prompts = [random.Random(seed).choices(range(1200), k=12) for seed in range(32)]
        with LLM(DEMO_MODEL_PATH, device="cpu", dtype="bfloat16", num_kvcache_blocks=256) as llm:
            params = logprobs_params(2, None, max_tokens=16, ignore_eos=True)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            continuations = [output["token_ids"] for output in outputs]
            scores = llm.score(prompts, continuations, use_tqdm=False)
        chosen = [
            (entry, token)
            for output in outputs
            for token, entry in zip(output["token_ids"], output.outputs[0].logprobs or [], strict=True)
        ]
        ties = [entry for entry, _ in chosen if len({found.logprob for found in entry.values()}) < len(entry)]
        assert ties, "no tokens are equally likely: the test tests nothing"
        assert all(entry[token].rank == 1 for entry, token in chosen)
        # One step computes what several did: where rounding differs, so may the choice.
        assert sum(score.is_greedy for score in scores) >= 30

    @pytest.mark.parametrize("budget", [5, 64, 512])
    def test_shared_prompts_are_computed_once(self, tiny_checkpoint: Path, reference: Reference, budget: int) -> None:
        llm = make_llm(tiny_checkpoint, max_num_batched_tokens=budget)
        prompt, continuations = make_prompt(61, 7), [make_prompt(3, seed) for seed in range(12)]
        scores = llm.score(prompt, continuations, use_tqdm=False)
        metrics = llm.get_metrics()
        assert metrics["cached_tokens"] == 11 * 60  # all but the first find 15 blocks of 4
        assert metrics["prefill_tokens"] + metrics["cached_tokens"] == 12 * 64
        for continuation, score in zip(continuations, scores, strict=True):
            logprobs = reference(prompt + continuation)
            expected = sum(float(logprobs[60 + place, token]) for place, token in enumerate(continuation))
            assert score.logprob == pytest.approx(expected, abs=3 * TOLERANCE)

    def test_continuations_that_are_cached_are_scored(self, shared_llm: LLM) -> None:
        prompt, continuation = make_prompt(30, 8), make_prompt(30, 9)
        first, again = (shared_llm.score(prompt, continuation, use_tqdm=False) for _ in range(2))
        assert len(again[0].token_logprobs) == 30
        assert again[0].token_logprobs == pytest.approx(first[0].token_logprobs, abs=TOLERANCE)

    def test_with_preemptions_beside_other_requests(self, tiny_checkpoint: Path, reference: Reference) -> None:
        llm = make_llm(tiny_checkpoint, num_kvcache_blocks=20)
        long = logprobs_params(None, None, max_tokens=60, ignore_eos=True)
        waiting = [llm.engine.add_request(make_prompt(8, seed), long) for seed in range(3)]
        prompt, continuation = make_prompt(20, 10), make_prompt(20, 11)
        [score] = llm.score(prompt, continuation, use_tqdm=False)
        finished = []
        while llm.engine.has_unfinished_requests:
            finished += llm.engine.step()
        assert sorted(output.request_id for output in finished) == sorted(waiting)
        logprobs = reference(prompt + continuation)
        expected = [float(logprobs[19 + place, token]) for place, token in enumerate(continuation)]
        assert score.token_logprobs == pytest.approx(expected, abs=TOLERANCE)

    @pytest.mark.parametrize(
        ("prompt", "continuation", "together"),
        [
            ("add 12 and", " 30", True),
            ("list all primes", " up to 50", True),
            ("cou", "nt from 3", False),  # "count" is a token
            ("the appl", "e river", False),
        ],
    )
    def test_text_is_tokenised_together(
        self, demo_llm: LLM, demo_reference: Reference, prompt: str, continuation: str, together: bool
    ) -> None:
        encode = demo_llm.get_tokenizer().encode
        ids, whole = encode(prompt), encode(prompt + continuation)
        assert (whole[: len(ids)] == ids) == together
        expected = whole[len(ids) :] if together else encode(continuation)
        [score] = demo_llm.score(prompt, continuation, use_tqdm=False)
        assert score.token_ids == expected
        logprobs = demo_reference(ids + expected)
        sums = sum(float(logprobs[len(ids) - 1 + place, token]) for place, token in enumerate(expected))
        assert score.logprob == pytest.approx(sums, abs=TOLERANCE * len(expected))

    def test_text_and_ids_may_be_mixed(self, demo_llm: LLM) -> None:
        encode = demo_llm.get_tokenizer().encode
        ids, after = encode("add 12 and"), encode(" 30")
        prompts = ["add 12 and", ids, {"prompt_token_ids": ids}, {"prompt": "add 12 and"}]
        pairs = itertools.product(prompts, [" 30", after])
        found = [demo_llm.score([prompt], [continuation], use_tqdm=False)[0] for prompt, continuation in pairs]
        assert {tuple(score.token_ids) for score in found} == {tuple(after)}
        assert [score.logprob for score in found] == pytest.approx([found[0].logprob] * len(found), abs=TOLERANCE)

    def test_exactly_as_long_as_the_context(self, tiny_checkpoint: Path, reference: Reference) -> None:
        llm = make_llm(tiny_checkpoint, max_model_len=64, num_kvcache_blocks=16)
        prompt = make_prompt(40, 12)
        [score] = llm.score(prompt, make_prompt(24, 13), use_tqdm=False)
        logprobs = reference(prompt + score.token_ids)
        expected = [float(logprobs[39 + place, token]) for place, token in enumerate(make_prompt(24, 13))]
        assert score.token_logprobs == pytest.approx(expected, abs=TOLERANCE)
        with pytest.raises(ValueError, match=r"^pair 0 has 65 tokens; max_model_len is 64"):
            llm.score(prompt, make_prompt(25, 13), use_tqdm=False)

    @pytest.mark.parametrize(
        ("prompts", "continuations", "error", "message"),
        [
            (
                [[1, 2], [3]],
                [[4], [5], [6]],
                ValueError,
                "there are 2 prompts and 3 continuations; give as many, or one prompt for all",
            ),
            ([[1, 2], [3]], [4, 5], ValueError, "there are 2 prompts and 1 continuation;"),
            ([[1, 2], []], [[4], [5]], ValueError, "prompt 1 is empty; give at least one token"),
            ([[1, 2], [3]], [[4], []], ValueError, "continuation 1 is empty; give at least one token"),
            ([1, 2], [[4], [211]], ValueError, "pair 1 has token id 211; the vocabulary has ids 0 to 210"),
            ([-1, 2], [[4], [5]], ValueError, "pair 0 has token id -1; the vocabulary has ids 0 to 210"),
            ([1] * 500, [[4], [5] * 13], ValueError, "pair 1 has 513 tokens; max_model_len is 512"),
            (["text"], [[4]], ValueError, "prompt 0 or its continuation is text, which needs a tokenizer"),
            ([[1, 2]], ["text"], ValueError, "prompt 0 or its continuation is text, which needs a tokenizer"),
            ([[1, 2]], [[1.5]], TypeError, "position 0 of continuation 0 is 1.5"),
            ([[1, "a"]], [[1]], TypeError, "position 1 of prompt 0 is 'a'"),
            (5, [[1]], TypeError, "prompts is an int"),
        ],
    )
    def test_what_cannot_be_scored_is_named(
        self, shared_llm: LLM, prompts: Any, continuations: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=f"^{message}"):
            shared_llm.score(prompts, continuations, use_tqdm=False)
        assert not shared_llm.engine.has_unfinished_requests

    @pytest.mark.parametrize(("prompt", "continuation", "empty"), [("", "a", "prompt"), ("a", "", "continuation")])
    def test_empty_text_is_named(self, demo_llm: LLM, prompt: str, continuation: str, empty: str) -> None:
        with pytest.raises(ValueError, match=f"^{empty} 0 is empty; give at least one token$"):
            demo_llm.score(prompt, continuation, use_tqdm=False)

    def test_nothing_to_score(self, shared_llm: LLM) -> None:
        assert shared_llm.score([], [], use_tqdm=False) == []
        assert shared_llm.score([1, 2], [], use_tqdm=False) == []


def make_llm(checkpoint: Path, **changes: Any) -> LLM:
    arguments = {"skip_tokenizer_init": True, "device": "cpu", "kvcache_block_size": 4, "num_kvcache_blocks": 256}
    return LLM(checkpoint, **{**arguments, **changes})


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def logprobs_params(number: int | None, prompt_number: int | None, **changes: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0, "max_tokens": 6, "logprobs": number, "prompt_logprobs": prompt_number, **changes}
    )


def check(output: RequestOutput, params: SamplingParams, reference: Reference) -> None:
    """All log-probabilities of an output are the reference's, as many and in the form asked for."""
    prompt = output.prompt_token_ids
    for completion in output.outputs:
        logprobs = reference(prompt + completion.token_ids)
        if params.logprobs is None:
            assert completion.logprobs is completion.cumulative_logprob is None
            continue
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        for place, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            check_entry(entry, token, params.logprobs, logprobs[len(prompt) - 1 + place])
        chosen = zip(completion.token_ids, completion.logprobs, strict=True)
        total = sum(entry[token].logprob for token, entry in chosen)
        assert completion.cumulative_logprob == pytest.approx(total)
    if params.prompt_logprobs is None:
        assert output.prompt_logprobs is None
        return
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    logprobs = reference(prompt)
    for place in range(1, len(prompt)):
        entry = output.prompt_logprobs[place]
        assert entry is not None
        check_entry(entry, prompt[place], params.prompt_logprobs, logprobs[place - 1])


def check_entry(entry: dict[int, Logprob], token: int, number: int, expected: torch.Tensor) -> None:
    """``entry`` holds ``token`` and the ``number`` most likely tokens, with the reference's log-probabilities."""
    number = len(expected) if number < 0 else min(number, len(expected))
    assert token in entry
    assert len(entry) in (number, number + 1)
    found = torch.tensor([logprob.logprob for logprob in entry.values()])
    torch.testing.assert_close(found, expected[list(entry)], rtol=0, atol=TOLERANCE)
    rank = entry[token].rank
    assert rank is not None
    # Ranks may differ where log-probabilities differ by no more than the tolerance.
    assert int((expected > expected[token] + TOLERANCE).sum()) < rank
    assert rank <= int((expected > expected[token] - TOLERANCE).sum())
    by_rank = sorted((logprob.rank, -logprob.logprob) for logprob in entry.values() if logprob.rank is not None)
    assert by_rank[:number] == sorted(by_rank[:number], key=lambda pair: pair[1])
    assert [rank for rank, _ in by_rank][:number] == list(range(1, number + 1))
    top = -torch.tensor([value for _, value in by_rank[:number]])
    torch.testing.assert_close(top, expected.topk(number).values, rtol=0, atol=TOLERANCE)
