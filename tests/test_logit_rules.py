"""What a request asks of its logits is what it gets, whatever else is in the batch, and no other row notices.

Against a plain reference, a row and a token at a time, with vLLM's meaning of each parameter; and through the engine
against transformers' own processors.
"""

import functools
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList, PreTrainedTokenizerFast
from transformers.generation import logits_process

from nanovllm import LLM, SamplingParams
from nanovllm.engine.logit_rules import LogitRules, takes_prompt
from nanovllm.engine.step_plan import SlotEntry
from tests.threads import one_thread  # noqa: F401

CPU = torch.device("cpu")
NUM_TOKENS = 24
SCHEDULES: dict[str, dict[str, Any]] = {
    "at once": {},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "a few blocks": {"num_kvcache_blocks": 30},  # of 4 tokens: preemptions
    "one at a time": {"max_num_seqs": 1},
}
VOCAB_SIZE, NUM_SLOTS, MAX_LENGTH = 17, 7, 48
COMMON = 4  # texts are made of the first few ids, so that tokens and words recur

# derandomize: the same batches on every machine; a failure elsewhere is a failure here.
checked = settings(deadline=None, derandomize=True, database=None)


class TestReference:
    """Random batches of random rules, over the lives of random texts."""

    @settings(checked, max_examples=300)
    @given(st.lists(st.integers(0, 2**32), min_size=1, max_size=9), st.integers(0, 2**32))
    def test_rows_are_as_the_reference_has_them(self, texts: list[int], seed: int) -> None:
        draw = random.Random(seed)
        world = World([Text.draw(random.Random(text)) for text in texts])
        for _ in range(12):
            world.move(draw)
            world.step(draw)

    @pytest.mark.parametrize(
        ("params", "logits", "expected"),
        [
            ({"logit_bias": {0: 2.0, 3: -100.0}}, [1, 1, 1, 1], [3, 1, 1, -99]),
            ({"allowed_token_ids": [2, 2, 1]}, [1, 2, 3, 4], [-np.inf, 2, 3, -np.inf]),
            ({"allowed_token_ids": [2], "logit_bias": {1: 5.0}}, [1, 2, 3, 4], [-np.inf, -np.inf, 3, -np.inf]),
            (
                {"logits_processors": [lambda output, logits: -logits], "logit_bias": {0: 1.0}},
                [1, 2, 3, 4],
                [0, -2, -3, -4],
            ),
            # The text is prompt 0 1 0, output 1 1 2: penalties of repetition count the prompt, the others do not.
            ({"repetition_penalty": 2.0}, [4, -4, 0, 8], [2, -8, 0, 8]),
            ({"repetition_penalty": 0.5}, [4, -4, 1, 8], [8, -2, 2, 8]),
            ({"presence_penalty": 1.5}, [4, 4, 4, 4], [4, 2.5, 2.5, 4]),
            ({"frequency_penalty": 1.5}, [4, 4, 4, 4], [4, 1, 2.5, 4]),
            ({"frequency_penalty": -1.0}, [4, 4, 4, 4], [4, 6, 5, 4]),
            ({"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 0.5}, [4] * 4, [2, 0, 0.5, 4]),
            ({"logit_bias": {0: -6.0}, "repetition_penalty": 2.0}, [4, 4, 4, 4], [-4, 2, 2, 4]),  # the bias first
            ({"repetition_penalty": 1e300}, [0, -1, 1, 1], [0, -1e20, 1e-20, 1]),  # neither is NaN
            (
                {"repetition_penalty": 1e-300, "allowed_token_ids": [1]},
                [1, -1, 1, 1],
                [-np.inf, -1e-20] + [-np.inf] * 2,
            ),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
    )
    def test_by_hand(self, params: dict[str, Any], logits: list[float], expected: list[float]) -> None:
        text = Text(SamplingParams(**params), [0, 1, 0], output=[1, 1, 2])
        found = apply_alone(text, torch.tensor([logits], dtype=torch.float32))
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-6)

    @pytest.mark.parametrize(
        ("word", "prompt", "output", "forbidden"),
        [
            ([3], [0], [], True),
            ([1, 3], [0], [1], True),
            ([1, 3], [0], [1, 2], False),
            ([1, 3], [0], [3, 1], True),
            ([1, 1, 3], [0], [1, 1], True),
            ([1, 1, 3], [0], [0, 1], False),
            ([1, 1, 3], [0], [1], False),
            # As in vLLM a word is what was generated: one that begins in the prompt may be completed.
            ([1, 3], [0, 1], [], False),
            ([1, 1, 3], [0, 1], [1], False),
            ([1, 1, 3], [1, 1], [1], False),
            ([1, 2, 0, 1, 2, 3], [0, 0], [1, 2, 0, 1, 2], True),
        ],
    )
    def test_the_last_token_of_a_bad_word_is_forbidden_after_the_others(
        self, word: list[int], prompt: list[int], output: list[int], forbidden: bool
    ) -> None:
        text = Text(SamplingParams(), prompt, bad_words=[tuple(word)], output=output)
        found = apply_alone(text, torch.ones(1, 4))[0]
        assert found.tolist() == [1, 1, 1, -np.inf if forbidden else 1]

    @pytest.mark.parametrize("num_output", range(4))
    def test_stop_tokens_are_forbidden_until_min_tokens(self, num_output: int) -> None:
        text = Text(SamplingParams(min_tokens=2), [0, 1], stop_token_ids=(1, 3), output=[0, 2, 2][:num_output])
        found = apply_alone(text, torch.ones(1, 4))[0]
        assert found.tolist() == ([1, -np.inf, 1, -np.inf] if num_output < 2 else [1] * 4)


class TestNeighbours:
    """Rows that ask for nothing are left alone, and cost nothing."""

    @settings(checked, max_examples=100)
    @given(st.integers(0, 2**32))
    @example(0)
    def test_rows_without_rules_stay_bitwise(self, seed: int) -> None:
        draw = random.Random(seed)
        plain = Text(SamplingParams(), draw_text(draw, 1))
        texts = [Text.draw(draw), plain, Text.draw(draw)]
        draw.shuffle(texts)
        world = World(texts)
        for text in texts:
            world.enter(text)
        logits = draw_logits(draw, len(texts))
        before = logits.clone()
        world.apply(logits, texts)
        assert torch.equal(logits[texts.index(plain)], before[texts.index(plain)])

    def test_a_batch_without_rules_does_no_tensor_operation(self) -> None:
        asking = Text(SamplingParams(repetition_penalty=2.0, logit_bias={1: 1.0}), [0, 1])
        plain = [Text(SamplingParams(temperature=t, top_k=3, min_p=0.1, logprobs=2), [0, 1]) for t in (0.0, 1.0)]
        world = World([asking, *plain])
        for text in plain:
            world.enter(text)
        with CountOperations() as counted:
            LogitRules(VOCAB_SIZE, CPU).enter(plain[0].entry())
        assert counted.number == 1  # the empty table of counts
        logits, before = torch.ones(2, VOCAB_SIZE), torch.ones(2, VOCAB_SIZE)
        for _ in range(2):  # without anybody who has rules, and with one who is not in the batch
            index = torch.tensor([text.slot for text in plain])
            positions = torch.tensor([2, 2])
            slots = index.tolist()
            with CountOperations() as counted:
                assert world.rules.apply(logits, slots, index, positions, 2, world.token_ids) == {}
                world.rules.record(slots, positions)
            assert counted.number == 0
            world.enter(asking)
        assert torch.equal(logits, before)

    def test_batches_of_the_same_rows_are_collected_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = [Text(SamplingParams(logit_bias={1: 1.0}, presence_penalty=1.0), [0, 1]) for _ in range(3)]
        world = World(texts)
        collected = count_calls(monkeypatch, LogitRules, "_collect")
        for text in texts:
            world.enter(text)
        draw = random.Random(0)
        for _ in range(5):
            world.step(draw, texts)
        assert len(collected) == 1
        world.leave(texts.pop())
        for _ in range(5):
            world.step(draw, texts)
        assert len(collected) == 2

    def test_rows_of_counts_are_used_again(self) -> None:
        text = Text(SamplingParams(presence_penalty=1.0), [0, 1])
        world, draw = World([text]), random.Random(0)
        for _ in range(50):
            world.enter(text)
            world.step(draw, [text])
            world.leave(text)
            text.output.clear()
        assert len(world.rules.counts) == 4


class TestProcessors:
    """Callables of the user."""

    @pytest.mark.parametrize(
        ("processor", "prompt_too"),
        [
            (lambda output, logits: logits, False),
            (lambda prompt, output, logits: logits, True),
            (lambda *arguments: arguments[-1], False),
            (lambda output, logits, scale=1.0: logits * scale, False),
            (functools.partial(lambda scale, prompt, output, logits: logits, 2.0), True),
            (functools.partial(lambda output, logits, scale: logits, scale=2.0), False),
            (max, False),  # a builtin without a signature
        ],
    )
    def test_get_the_prompt_if_they_need_three_arguments(self, processor: Callable, prompt_too: bool) -> None:
        assert takes_prompt(processor) is prompt_too

    def test_see_the_tokens_and_run_in_order(self) -> None:
        seen: list[Any] = []

        def two(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            seen.append((list(output), tuple(logits.shape), logits.dtype))
            return logits + 1

        class Three:
            def __call__(self, prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
                seen.append((list(prompt), list(output)))
                return logits.mul_(2)  # in place is fine

        text = Text(SamplingParams(logits_processors=[two, Three(), two]), [0, 1, 0], output=[2, 3])
        assert apply_alone(text, torch.ones(1, 4))[0].tolist() == [5.0] * 4
        assert seen == [([2, 3], (4,), torch.float32), ([0, 1, 0], [2, 3]), ([2, 3], (4,), torch.float32)]

    @pytest.mark.parametrize(
        ("processor", "message"),
        [
            (lambda output, logits: 1 / 0, "ZeroDivisionError: division by zero"),
            (lambda output, logits: None, "it must return logits of shape (4,), not NoneType"),
            (lambda output, logits: logits[:2], "it must return logits of shape (4,), not (2,)"),
            (lambda output, logits: logits[None], "it must return logits of shape (4,), not (1, 4)"),
            (lambda logits: logits, "TypeError: "),
        ],
    )
    def test_one_that_fails_fails_its_row(self, processor: Callable, message: str) -> None:
        world = World([Text(SamplingParams(logits_processors=[processor]), [0, 1]), Text(SamplingParams(), [0, 1])])
        for text in world.texts:
            world.enter(text)
        logits = torch.ones(2, 4)
        [(row, error)] = world.apply(logits, world.texts).items()
        assert (row, message in error, error.startswith("logits processor: ")) == (0, True, True)
        assert logits.isnan().all(dim=1).tolist() == [True, False]
        assert logits[1].tolist() == [1.0] * 4

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
    def test_may_return_another_dtype(self, dtype: torch.dtype) -> None:
        params = SamplingParams(logits_processors=[lambda output, logits: logits.to(dtype)])
        assert apply_alone(Text(params, [0]), torch.ones(1, 4))[0].tolist() == [1.0] * 4


class TestThroughTheEngine:
    """Greedy output is transformers' with its own processors, in float32, however it is scheduled."""

    @pytest.fixture(scope="class")
    def checkpoint(self, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """With a tokenizer whose words t0, t1, ... are the tokens."""
        path = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("rules") / "checkpoint"))
        tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(211)}, unk_token="t0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
        return path

    @pytest.fixture(scope="class", params=SCHEDULES)
    def llm(self, checkpoint: Path, request: pytest.FixtureRequest) -> LLM:
        return make_llm(checkpoint, **SCHEDULES[request.param])

    @pytest.fixture(scope="class")
    def cases(self, tiny_reference: Any) -> list[tuple[list[int], SamplingParams, list[int]]]:
        """Prompts, parameters, and what transformers answers."""
        prompts = [random.Random(length).choices(range(6, 211), k=length) for length in (5, 16, 21)]
        greedy = functools.partial(SamplingParams, temperature=0, max_tokens=NUM_TOKENS)
        found = []
        for number, prompt in enumerate(prompts):
            plain = reference(tiny_reference, prompt, NUM_TOKENS, [])
            eos, others = plain[2], [plain[1:3], plain[4:5], plain[5:8]]
            bad_words = [" ".join(f"t{token}" for token in word) for word in others]
            bias = {plain[0]: -8.0, plain[3]: 4.0, 7: 2.5}
            asked: list[tuple[SamplingParams, list[Any]]] = [
                (greedy(ignore_eos=True), []),
                (
                    greedy(ignore_eos=True, repetition_penalty=1.7),
                    [logits_process.RepetitionPenaltyLogitsProcessor(1.7)],
                ),
                (
                    greedy(ignore_eos=True, repetition_penalty=0.8),
                    [logits_process.RepetitionPenaltyLogitsProcessor(0.8)],
                ),
                (
                    greedy(ignore_eos=True, bad_words=bad_words),
                    [logits_process.NoBadWordsLogitsProcessor([list(word) for word in others])],
                ),
                (
                    greedy(stop_token_ids=[eos], min_tokens=10),
                    [logits_process.MinNewTokensLengthLogitsProcessor(len(prompt), 10, [eos, 5])],
                ),
                (
                    greedy(ignore_eos=True, allowed_token_ids=range(number, 211, 2)),
                    [logits_process.SuppressTokensLogitsProcessor(sorted({*range(211)} - {*range(number, 211, 2)}))],
                ),
                (
                    greedy(ignore_eos=True, logit_bias=bias),
                    [logits_process.SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()])],
                ),
                (
                    greedy(ignore_eos=True, allowed_token_ids=range(100), logit_bias=bias, repetition_penalty=1.3),
                    [
                        logits_process.SuppressTokensLogitsProcessor(list(range(100, 211))),
                        logits_process.SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()]),
                        logits_process.RepetitionPenaltyLogitsProcessor(1.3),
                    ],
                ),
                (
                    greedy(ignore_eos=True, presence_penalty=1.5, frequency_penalty=0.75),
                    [OutputPenalties(len(prompt), 1.5, 0.75)],
                ),
            ]
            for params, processors in asked:
                stop = [eos, 5] if params.min_tokens else []
                expected = reference(tiny_reference, prompt, NUM_TOKENS, processors, stop)
                if processors and not params.min_tokens:
                    assert expected != plain, "the rules change nothing: the case tests nothing"
                found.append((prompt, params, expected))
        return found

    def test_greedy_output_is_transformers(self, llm: LLM, cases: list[Any]) -> None:
        prompts, params, expected = map(list, zip(*cases, strict=True))
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == expected
        if llm.engine.runner.num_kvcache_blocks == 30:
            assert llm.get_metrics()["num_preemptions"] > 0
        again = llm.generate(prompts, params, use_tqdm=False)  # from cached prefixes
        assert [output["token_ids"] for output in again] == expected
        assert any(output.num_cached_tokens for output in again)

    def test_several_completions_have_their_own_counts(self, checkpoint: Path) -> None:
        """With seeds, as drawn alone; were counts shared, the completions would penalise each other's tokens."""
        llm = make_llm(checkpoint)
        params = SamplingParams(n=3, seed=1, ignore_eos=True, max_tokens=20, presence_penalty=2.0, top_k=3)
        [together] = llm.generate([1, 2, 3], params, use_tqdm=False)
        for completion in together.outputs:
            [alone] = llm.generate(
                [1, 2, 3],
                SamplingParams(
                    temperature=0, ignore_eos=True, max_tokens=20, logits_processors=[Follow(completion.token_ids)]
                ),
                use_tqdm=False,
            )
            assert alone["token_ids"] == completion.token_ids
        again = make_llm(checkpoint, max_num_seqs=1).generate([1, 2, 3], params, use_tqdm=False)[0]
        assert [c.token_ids for c in again.outputs] == [c.token_ids for c in together.outputs]
        assert len({tuple(c.token_ids) for c in together.outputs}) == 3

    def test_a_neighbour_without_rules_gets_what_it_gets_alone(self, llm: LLM, cases: list[Any]) -> None:
        plain = SamplingParams(seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)
        [alone] = llm.generate([7, 8, 9], plain, use_tqdm=False)
        prompts, params, _ = map(list, zip(*cases[:9], strict=True))
        together = llm.generate([*prompts, [7, 8, 9]], [*params, plain], use_tqdm=False)
        assert together[-1]["token_ids"] == alone["token_ids"]

    def test_batches_without_rules_do_nothing(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        llm = make_llm(checkpoint)
        rules = llm.engine.runner.batch_state.rules
        collected = count_calls(monkeypatch, LogitRules, "_collect")
        llm.generate([[1, 2], [3]], SamplingParams(max_tokens=8, top_k=5, logprobs=1), use_tqdm=False)
        assert not collected
        assert len(rules.counts) == 0

    @pytest.mark.parametrize("beside", [{}, {"allowed_token_ids": [1, 2]}, {"repetition_penalty": 1.5}])
    @pytest.mark.parametrize("temperature", [0, 1.0])
    def test_a_processor_that_fails_ends_its_own_request(
        self, llm: LLM, tiny_reference: Any, beside: dict[str, Any], temperature: float
    ) -> None:
        def fail_at_three(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output) == 3:
                raise KeyError("no such state")
            return logits

        good = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        bad = SamplingParams(
            temperature=temperature, max_tokens=8, ignore_eos=True, logits_processors=[fail_at_three], **beside
        )
        outputs = llm.generate([[9, 8], [7, 6, 5], [4]], [good, bad, good], use_tqdm=False)
        assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
        assert outputs[1].error == "logits processor: KeyError: 'no such state'"
        assert len(outputs[1]["token_ids"]) == 3
        assert [outputs[0].error, outputs[2].error] == [None, None]
        assert outputs[0]["token_ids"] == reference(tiny_reference, [9, 8], 8, [])
        llm.engine.scheduler.check_integrity()
        assert not llm.engine.has_unfinished_requests

    def test_a_row_that_no_token_is_left_for_says_so(self, llm: LLM) -> None:
        params = SamplingParams(
            max_tokens=4, allowed_token_ids=[5], min_tokens=2, temperature=0, stop_token_ids=[5], ignore_eos=True
        )
        [output] = llm.generate([1, 2], params, use_tqdm=False)
        assert output.outputs[0].finish_reason == "error"
        assert "allowed_token_ids, bad_words, min_tokens and logits_processors leave no token" in str(output.error)

    def test_processors_see_prompt_and_output_after_a_preemption(self, checkpoint: Path) -> None:
        llm = make_llm(checkpoint, num_kvcache_blocks=24)
        prompts = [random.Random(seed).choices(range(6, 211), k=9) for seed in range(4)]
        recorders = [Record(prompt) for prompt in prompts]
        params = [
            SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logits_processors=[recorder])
            for recorder in recorders
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.get_metrics()["num_preemptions"] > 0
        for output, recorder in zip(outputs, recorders, strict=True):
            assert recorder.outputs == [output["token_ids"][:length] for length in range(40)]


# Texts, and what the reference makes of their logits


class Text:
    """A sequence as far as the rules know it."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: list[int],
        bad_words: list[tuple[int, ...]] | None = None,
        stop_token_ids: tuple[int, ...] = (),
        output: list[int] | None = None,
    ) -> None:
        self.params = params
        self.prompt = prompt
        self.bad_words = bad_words or []
        self.stop_token_ids = stop_token_ids
        self.output = output or []
        self.slot = -1

    @classmethod
    def draw(cls, draw: random.Random) -> "Text":
        """One with some of the rules; each sixth has none."""
        if draw.randrange(6) == 0:
            return cls(SamplingParams(), draw_text(draw, 1))
        some = functools.partial(draw.choices, range(VOCAB_SIZE))
        asked: dict[str, Any] = {
            "logit_bias": {token: draw.uniform(-100, 100) for token in some(k=3)},
            "allowed_token_ids": some(k=draw.randint(1, 12)),
            "min_tokens": draw.randint(1, 6),
            "repetition_penalty": draw.uniform(0.3, 3),
            "presence_penalty": draw.uniform(-2, 2),
            "frequency_penalty": draw.uniform(-2, 2),
            "logits_processors": draw.choices(PROCESSORS, k=draw.randint(1, 2)),
        }
        chosen = {name: value for name, value in asked.items() if draw.random() < 0.4}
        words = [tuple(draw_text(draw, 1, 4)) for _ in range(draw.choice([0, 0, 1, 6]))]
        return cls(SamplingParams(**chosen), draw_text(draw, 1), words, tuple(set(some(k=2))))

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    def entry(self) -> SlotEntry:
        return SlotEntry(
            self.slot,
            self.tokens,
            [],
            self.params,
            0,
            num_prompt_tokens=len(self.prompt),
            stop_token_ids=self.stop_token_ids if len(self.output) < self.params.min_tokens else (),
            bad_words=tuple(self.bad_words),
        )

    def expected(self, logits: np.ndarray) -> np.ndarray:
        """The logits [vocab_size] of the next token with everything applied, one thing and one token at a time."""
        params, logits = self.params, logits.copy()
        for processor in params.logits_processors or ():
            row = torch.from_numpy(logits.copy())
            before = (self.prompt, self.output) if takes_prompt(processor) else (self.output,)
            logits = processor(*[list(tokens) for tokens in before], row).numpy()
        for token in range(len(logits)):
            if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
                logits[token] = -np.inf
            logits[token] += np.float32((params.logit_bias or {}).get(token, 0.0))
        for *before, last in self.bad_words:
            if len(before) <= len(self.output) and self.output[len(self.output) - len(before) :] == before:
                logits[last] = -np.inf
        if len(self.output) < params.min_tokens:
            for token in self.stop_token_ids:
                logits[token] = -np.inf
        counts = Counter(self.output)
        for token in set(self.tokens):
            if logits[token] > 0:
                logits[token] /= np.float32(params.repetition_penalty)
            else:
                logits[token] *= np.float32(params.repetition_penalty)
        for token, count in counts.items():
            logits[token] -= np.float32(params.frequency_penalty) * count
            logits[token] -= np.float32(params.presence_penalty)
        return logits


class World:
    """LogitRules, the table of tokens beside it, and the texts that enter and leave its slots."""

    def __init__(self, texts: list[Text]) -> None:
        self.texts = texts
        self.rules = LogitRules(VOCAB_SIZE, CPU)
        self.token_ids = torch.zeros(NUM_SLOTS, MAX_LENGTH, dtype=torch.int32)
        self.free = list(range(NUM_SLOTS))

    @property
    def residents(self) -> list[Text]:
        return [text for text in self.texts if text.slot >= 0]

    def enter(self, text: Text) -> None:
        text.slot = self.free.pop()
        self.rules.enter(text.entry())
        self.token_ids[text.slot, : len(text.tokens)] = torch.tensor(text.tokens, dtype=torch.int32)

    def leave(self, text: Text) -> None:
        self.rules.release(text.slot)
        self.free.append(text.slot)
        text.slot = -1

    def move(self, draw: random.Random) -> None:
        """Let some leave, as they do when they are preempted, and some (again) enter."""
        for text in self.residents:
            if draw.random() < 0.2 or len(text.tokens) >= MAX_LENGTH - 1:
                self.leave(text)
        draw.shuffle(self.free)
        for text in draw.sample(self.texts, len(self.texts)):
            if text.slot < 0 and self.free and len(text.tokens) < MAX_LENGTH - 1:
                self.enter(text)

    def step(self, draw: random.Random, rows: list[Text] | None = None) -> None:
        """Compare the logits of some residents, in any order, with the reference, and let them grow by a token."""
        if rows is None:
            rows = draw.sample(self.residents, draw.randint(min(1, len(self.residents)), len(self.residents)))
        if not rows:
            return
        logits = draw_logits(draw, len(rows))
        expected = np.stack([text.expected(row.numpy()) for text, row in zip(rows, logits, strict=True)])
        assert self.apply(logits, rows) == {}
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=1e-5)
        tokens = [draw_text(draw, 1, 1)[0] for _ in rows]
        for text, token in zip(rows, tokens, strict=True):
            self.token_ids[text.slot, len(text.tokens)] = token
            text.output.append(token)
        self.rules.record([text.slot for text in rows], torch.tensor(tokens))

    def apply(self, logits: torch.Tensor, rows: list[Text]) -> dict[int, str]:
        slots = [text.slot for text in rows]
        lengths = [len(text.tokens) for text in rows]
        index, positions = torch.tensor(slots), torch.tensor(lengths)
        return self.rules.apply(logits, slots, index, positions, max(lengths), self.token_ids)


def apply_alone(text: Text, logits: torch.Tensor) -> torch.Tensor:
    """What the rules make of the logits [1, vocab_size] of one text."""
    world = World([text])
    world.enter(text)
    assert world.apply(logits, [text]) == {}
    return logits


def draw_text(draw: random.Random, shortest: int, longest: int = 12) -> list[int]:
    return draw.choices([*range(COMMON), VOCAB_SIZE - 1], k=draw.randint(shortest, longest))


def draw_logits(draw: random.Random, rows: int) -> torch.Tensor:
    """float32 [rows, VOCAB_SIZE], some exactly 0."""
    logits = torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(draw.randrange(2**32))) * 3
    return torch.where(torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) < 0.1, 0.0, logits)


def _cool(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits / (1 + len(output))


def _shift(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits.add_(1.5)


def _favour(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[[prompt[0], *output[-1:]]] = 9.0
    return logits


PROCESSORS = [_cool, _shift, _favour]


class CountOperations(TorchDispatchMode):
    """Counts the tensor operations within it."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[None]:
    """A list that grows with each call of a method."""
    original, calls = getattr(owner, name), []

    def counting(self: Any, *args: Any) -> Any:
        calls.append(None)
        return original(self, *args)

    monkeypatch.setattr(owner, name, counting)
    return calls


# Engines and transformers


def make_llm(checkpoint: Path, **changes: Any) -> LLM:
    return LLM(checkpoint, **{"device": "cpu", "kvcache_block_size": 4, "num_kvcache_blocks": 512, **changes})


@torch.inference_mode()
def reference(
    model: Any, prompt: list[int], num_tokens: int, processors: list[Any], stop: list[int] | None = None
) -> list[int]:
    """transformers' greedy continuation with its logits processors, one token at a time without a cache."""
    process, ids = LogitsProcessorList(processors), torch.tensor([prompt])
    for _ in range(num_tokens):
        token = process(ids, model(ids).logits[:, -1].float()).argmax(dim=-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
        if int(token) in (stop or ()):
            break
    return ids[0, len(prompt) :].tolist()


class OutputPenalties(logits_process.LogitsProcessor):
    """Presence and frequency penalties, which transformers lacks."""

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self.prompt_length, self.presence, self.frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for token, count in Counter(input_ids[0, self.prompt_length :].tolist()).items():
            scores[0, token] -= self.presence + self.frequency * count
        return scores


class Follow:
    """A processor that makes the output the one given."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids

    def __call__(self, output: list[int], logits: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(logits, float("-inf"))
        kept[self.token_ids[len(output)]] = 0.0
        return kept


class Record:
    """A processor that notes what it sees and changes nothing."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt, self.outputs = prompt, list[list[int]]()

    def __call__(self, prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        assert prompt == self.prompt
        self.outputs.append(output)
        return logits
