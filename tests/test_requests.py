"""What may be asked of LLM beyond plain generation: chat, streams, iterators, several completions, stops, aborts."""

import copy
import dataclasses
import gc
import inspect
import itertools
import pickle
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.metrics import percentiles
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.tokenizer import ChatOptions, template_options
from nanovllm.utils.progress import ProgressBar
from nanovllm.utils.vllm_arguments import ATTRIBUTES, ELSEWHERE, INSTEAD, OF_CALLS
from tests.checkpoints import make_model
from tests.simulation import interrupt_at_lines
from tests.threads import one_thread  # noqa: F401

QUESTION = [{"role": "user", "content": "list all primes up to 30"}]
ANSWER = "The prime numbers up to 30: 2, 3, 5, 7, 11, 13, 17, 19, 23, 29."
OFF: dict[str, Any] = {"enable_thinking": False}


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM(DEMO_MODEL_PATH, device="cpu", dtype="float32", num_kvcache_blocks=512) as llm:
        yield llm


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Iterator[LLM]:
    with make_tiny(tiny_checkpoint) as llm:
        yield llm


def make_tiny(checkpoint: Path, **changes: Any) -> LLM:
    arguments = {"skip_tokenizer_init": True, "device": "cpu", "kvcache_block_size": 4, "num_kvcache_blocks": 64}
    return LLM(checkpoint, **{**arguments, **changes})


def greedy(max_tokens: int | None = 60, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **changes)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def assert_empty(llm: LLM) -> None:
    engine = llm.engine
    assert not engine.has_unfinished_requests
    assert engine.scheduler.block_manager.num_used_blocks == 0
    engine.scheduler.check_integrity()


class TestChat:
    """Conversations, rendered with the chat template."""

    def test_one_conversation(self, demo: LLM) -> None:
        [output] = demo.chat(QUESTION, greedy(), use_tqdm=False, chat_template_kwargs=OFF)
        assert output["text"] == ANSWER
        assert output.prompt.endswith("<think>\n\n</think>\n\n")
        assert output.prompt_token_ids == demo.get_tokenizer().encode(output.prompt, add_special_tokens=False)

    def test_several_conversations_with_their_own_parameters(self, demo: LLM) -> None:
        sums = [[{"role": "user", "content": f"add {n} and 30"}] for n in (12, 13)]
        outputs = demo.chat(sums, [greedy(), greedy(2)], use_tqdm=False, chat_template_kwargs=OFF)
        assert texts(outputs)[0] == "12 + 30 = 42"
        assert len(outputs[1]["token_ids"]) == 2

    def test_what_was_said_before_counts(self, demo: LLM) -> None:
        first = {"role": "user", "content": "My favorite color is green."}
        [reply] = demo.chat([first], greedy(), use_tqdm=False, chat_template_kwargs=OFF)
        history = [first, {"role": "assistant", "content": reply["text"]}]
        again = [*history, {"role": "user", "content": "What is my favorite color?"}]
        [output] = demo.chat(again, greedy(), use_tqdm=False, chat_template_kwargs=OFF)
        assert "green" in output["text"]

    def test_the_last_message_can_be_continued(self, demo: LLM) -> None:
        begun = [*QUESTION, {"role": "assistant", "content": "The prime numbers up to 30: 2, 3, 5,"}]
        [output] = demo.chat(begun, greedy(), use_tqdm=False, add_generation_prompt=False, continue_final_message=True)
        assert output["text"].endswith(" 7, 11, 13, 17, 19, 23, 29.")

    def test_a_template_of_the_users(self, demo: LLM) -> None:
        template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ extra }}{% endfor %}"
        [prompt] = demo.render_chat(QUESTION, chat_template=template, chat_template_kwargs={"extra": "!"})
        assert prompt["prompt"] == "[user] list all primes up to 30!"

    def test_parts_of_text_are_joined(self, demo: LLM) -> None:
        parts = [{"type": "text", "text": "list all primes "}, {"type": "text", "text": "up to 30"}]
        assert demo.render_chat([{"role": "user", "content": parts}]) == demo.render_chat(QUESTION)

    @pytest.mark.parametrize(
        ("messages", "error", "message"),
        [
            ("hello", TypeError, "messages is a str; pass a list of"),
            ([{"role": "user", "content": "x\ud800"}], ValueError, "messages is not valid Unicode"),
            ({"role": "user", "content": "x"}, TypeError, "messages is a dict"),
            ([{"content": "x"}], ValueError, r"messages\[0\] has no 'role'"),
            ([QUESTION, ["x"]], TypeError, r"conversation 1\[0\] is a str"),
            ([QUESTION, []], ValueError, "conversation 1 is empty"),
            ([{"role": "user", "text": "x"}], ValueError, r"messages\[0\] has no 'content', only 'role', 'text'"),
            ([{"role": "user", "content": 5}], TypeError, r"messages\[0\]\['content'\] is 5"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], TypeError, "parts of type 'text'"),
            ([{"role": "user", "content": [{"type": "text", "text": None}]}], TypeError, "parts of type 'text'"),
            ([{"role": "user", "content": [{"type": "text"}]}], TypeError, "parts of type 'text'"),
        ],
    )
    def test_bad_messages_are_named(self, demo: LLM, messages: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            demo.chat(messages, use_tqdm=False)

    def test_no_conversations_give_no_outputs_and_no_bar(self, demo: LLM, capsys: pytest.CaptureFixture[str]) -> None:
        assert demo.chat([]) == demo.generate([]) == []
        assert capsys.readouterr().err == ""
        demo.generate("hello", greedy(1))
        assert "Generating: 100%" in capsys.readouterr().err

    def test_options_of_the_wrong_type(self, demo: LLM) -> None:
        with pytest.raises(TypeError, match="chat_template_kwargs is 5; it must be a dictionary"):
            demo.chat(QUESTION, chat_template_kwargs=5)  # type: ignore[arg-type]

    def test_options_that_contradict_each_other_or_are_misspelt(self, demo: LLM) -> None:
        with pytest.raises(ValueError, match="continue_final_message needs add_generation_prompt=False"):
            demo.chat(QUESTION, continue_final_message=True)
        with pytest.raises(TypeError, match="chat has no argument 'chat_templat'; did you mean 'chat_template'"):
            demo.chat(QUESTION, chat_templat="x")
        for method in (demo.render_chat, demo.stream_chat):
            with pytest.raises(ValueError, match="continue_final_message needs add_generation_prompt=False"):
                method(QUESTION, continue_final_message=True)
            with pytest.raises(TypeError, match=r"_chat has no argument 'tool'; did you mean 'tools'"):
                method(QUESTION, tool=[])
        for text_method in (demo.generate, demo.stream, demo.generate_iter):
            name = text_method.__name__
            with pytest.raises(TypeError, match=f"^{name} has no argument 'sampling_param'; did you mean"):
                text_method(["x"], sampling_param=None)
            with pytest.raises(TypeError, match=rf"^{name} .* 'top_k'; it goes into SamplingParams\(top_k=\.\.\.\)"):
                text_method(["x"], top_k=3)

    def test_an_iterator_is_told_its_call(self, demo: LLM) -> None:
        with pytest.raises(TypeError, match="prompts is a generator; pass a list of prompts, or call generate_iter"):
            demo.generate(text for text in ("a", "b"))

    def test_what_is_a_completion_s_is_told_its_place(self, demo: LLM) -> None:
        [output] = demo.generate("x", greedy(1), use_tqdm=False)
        for name in ("text", "token_ids", "finish_reason", "logprobs"):
            with pytest.raises(AttributeError, match=rf"no attribute '{name}': .* output\.outputs\[0\]\.{name}$"):
                getattr(output, name)
        with pytest.raises(AttributeError, match=r"^'RequestOutput' object has no attribute 'promt'$") as caught:
            output.promt  # noqa: B018
        assert (caught.value.name, caught.value.obj) == ("promt", output)
        assert copy.deepcopy(output) == pickle.loads(pickle.dumps(output)) == output

    @pytest.mark.parametrize(
        ("keyword", "hint"),
        [
            ("enable_thinking", "it goes to the chat template: chat_template_kwargs={'enable_thinking': False}"),
            ("enable_thinkin", "did you mean an option of the chat template: chat_template_kwargs={'enable_thinking'"),
            ("temperature", "it goes into SamplingParams(temperature=...)"),
            ("max_model_len", "it is the engine's: LLM(max_model_len=...)"),
        ],
    )
    def test_an_argument_of_something_else_is_told_its_place(self, demo: LLM, keyword: str, hint: str) -> None:
        for method in (demo.chat, demo.render_chat):
            if keyword == "temperature" and method == demo.render_chat:
                continue
            with pytest.raises(TypeError, match=re.escape(f"{method.__name__} has no argument '{keyword}'; {hint}")):
                method(QUESTION, **{keyword: False})
        with pytest.raises(TypeError, match=rf"generate has no argument '{keyword}'; .*(chat|LLM|SamplingParams)\("):
            demo.generate("x", **{keyword: False})
        with pytest.raises(TypeError, match=r"generate has no argument 'tools'; it is chat's.*chat\(\.\.\., tools="):
            demo.generate("x", tools=[])

    def test_an_option_that_the_template_does_not_read_is_warned_of_once(
        self, demo: LLM, caplog: pytest.LogCaptureFixture
    ) -> None:
        for options in (
            {"enable_thinking": False},
            {"bos_token": "x"},
            {"enable_thinkingg": 1},
            {"enable_thinkingg": 1},
        ):
            demo.render_chat(QUESTION, chat_template_kwargs=options)
        [record] = caplog.records
        assert record.getMessage() == (
            "chat_template_kwargs has 'enable_thinkingg', which the chat template does not read, so it does nothing; "
            "the options that it reads: enable_thinking"
        )

    def test_the_options_of_a_template_are_those_it_looks_up(self, demo: LLM) -> None:
        template = (
            "{% set a = 1 %}{% for m in messages %}{{ m.content ~ a ~ bos_token ~ raise_exception }}"
            "{% generation %}{{ within }}{% endgeneration %}{% break %}{% endfor %}"
            "{% if style is defined %}{{ range(3) | tojson }}{% endif %}{{ tools }}"
        )
        assert template_options(demo.get_tokenizer(), template) == {"within", "style"}
        assert template_options(demo.get_tokenizer(), "{% if %}") is None
        assert template_options(demo.get_tokenizer()) == {"enable_thinking"}

    def test_bad_conversations_beside_good_ones(self, demo: LLM) -> None:
        outputs = demo.chat(
            [QUESTION, [], [{"content": "x"}]], greedy(), use_tqdm=False, chat_template_kwargs=OFF, on_error="return"
        )
        assert [output.error for output in outputs] == [
            None,
            "conversation 1 is empty; give at least one message",
            "conversation 2[0] has no 'role'; use 'system', 'user', 'assistant' or 'tool'",
        ]
        assert outputs[0]["text"] == ANSWER

    def test_a_template_that_fails_says_so(self, demo: LLM) -> None:
        with pytest.raises(ValueError, match="the chat template refuses the conversation"):
            demo.chat(QUESTION, chat_template="{{ raise_exception('no') }}")


class TestStop:
    """Stop strings and stop tokens."""

    def ask(self, demo: LLM, **changes: Any) -> Any:
        [output] = demo.chat(QUESTION, greedy(**changes), use_tqdm=False, chat_template_kwargs=OFF)
        return output.outputs[0]

    def test_a_stop_string_ends_the_text_before_it(self, demo: LLM) -> None:
        completion = self.ask(demo, stop="13, 1")  # it spans tokens
        assert completion.text == ANSWER[: ANSWER.index("13, 1")]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", "13, 1")
        assert demo.get_tokenizer().decode(completion.token_ids) == ANSWER[: ANSWER.index("13, 1") + 5]

    def test_it_may_be_kept(self, demo: LLM) -> None:
        completion = self.ask(demo, stop=["nowhere", " 13"], include_stop_str_in_output=True)
        assert completion.text == ANSWER[: ANSWER.index(" 13") + 3]

    def test_it_does_not_count_before_min_tokens(self, demo: LLM) -> None:
        assert self.ask(demo, stop=",").text == "The prime numbers up to 30: 2"
        late = self.ask(demo, stop=",", min_tokens=12)
        assert late.text.startswith("The prime numbers up to 30: 2, 3")
        assert len(late.token_ids) >= 12

    def test_a_stop_token_is_named_and_kept_in_the_tokens(self, demo: LLM) -> None:
        everything = self.ask(demo).token_ids
        completion = self.ask(demo, stop_token_ids=[everything[12]])
        end = everything.index(everything[12])
        assert completion.token_ids == everything[: end + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", everything[12])
        # Its text is left out, as a stop string's is, unless that is asked for.
        assert completion.text == demo.get_tokenizer().decode(everything[:end])
        kept = self.ask(demo, stop_token_ids=[everything[12]], include_stop_str_in_output=True)
        assert kept.text == demo.get_tokenizer().decode(everything[: end + 1])

    def test_a_stop_token_counts_with_ignore_eos_too(self, demo: LLM) -> None:
        everything = self.ask(demo).token_ids
        completion = self.ask(demo, stop_token_ids=[everything[5]], ignore_eos=True)
        assert completion.stop_reason == everything[5]

    def test_min_tokens_keeps_the_end_of_sequence_away(self, demo: LLM) -> None:
        short = self.ask(demo)
        assert short.finish_reason == "stop"
        longer = self.ask(demo, min_tokens=len(short.token_ids) + 5)
        assert len(longer.token_ids) > len(short.token_ids) + 5 or longer.finish_reason == "length"
        assert longer.token_ids[: len(short.token_ids) - 1] == short.token_ids[:-1]

    def test_without_text(self, demo: LLM) -> None:
        completion = self.ask(demo, detokenize=False)
        assert completion.text == ""
        assert completion.token_ids == self.ask(demo).token_ids

    def test_special_tokens_can_be_shown(self, demo: LLM) -> None:
        assert self.ask(demo, skip_special_tokens=False).text == ANSWER
        shown = self.ask(demo, skip_special_tokens=False, include_stop_str_in_output=True)
        assert shown.text == f"{ANSWER}<|im_end|>"

    def test_stop_strings_need_a_tokenizer(self, tiny: LLM) -> None:
        for field in ({"stop": "x"}, {"bad_words": ["x"]}):
            with pytest.raises(ValueError, match=f"{next(iter(field))} of the prompt needs a tokenizer"):
                tiny.generate([[1, 2]], SamplingParams(**field))


class TestSeveralCompletions:
    """n > 1."""

    @pytest.mark.parametrize("caching", [True, False])
    def test_they_share_the_prompts_blocks(self, tiny_checkpoint: Path, caching: bool) -> None:
        prompt = list(range(100, 133))  # 8 blocks of 4, and a token
        with make_tiny(tiny_checkpoint, enable_prefix_caching=caching) as llm:
            params = SamplingParams(n=5, max_tokens=3, seed=3, ignore_eos=True)
            [output] = llm.generate([prompt], params, use_tqdm=False)
            assert [completion.index for completion in output.outputs] == list(range(5))
            assert llm.get_metrics()["peak_kvcache_blocks_used"] == 8 + 5  # the last block is everybody's own
            assert llm.get_metrics()["prefill_tokens"] == 33 + 4
            assert_empty(llm)

    def test_each_is_what_it_would_be_alone(self, tiny_checkpoint: Path) -> None:
        prompt = [7, 8, 9, 10, 11]
        params = SamplingParams(n=4, max_tokens=12, seed=5, ignore_eos=True)
        with make_tiny(tiny_checkpoint) as llm:
            [together] = llm.generate([prompt], params, use_tqdm=False)
        with make_tiny(tiny_checkpoint, max_num_seqs=1) as llm:
            [one_by_one] = llm.generate([prompt], params, use_tqdm=False)
        with make_tiny(tiny_checkpoint, num_kvcache_blocks=6, max_num_batched_tokens=2) as llm:  # preempted
            [cramped] = llm.generate([prompt], params, use_tqdm=False)
            assert cramped.metrics.num_preemptions == llm.get_metrics()["num_preemptions"] > 0
        found = [completion.token_ids for completion in together.outputs]
        assert len({tuple(tokens) for tokens in found}) == 4
        assert found == [c.token_ids for c in one_by_one.outputs] == [c.token_ids for c in cramped.outputs]

    def test_its_times_are_those_of_the_whole_request(self, tiny: LLM) -> None:
        for seed in range(100):
            params = SamplingParams(n=4, max_tokens=30, seed=seed, stop_token_ids=range(20))
            tiny.engine.add_request([1, 2, 3], params)
            outputs: list[RequestOutput] = []
            while not outputs:
                last_step = time.perf_counter()
                outputs = tiny.engine.step()
            [output] = outputs
            lengths = [len(completion.token_ids) for completion in output.outputs]
            if lengths[0] < max(lengths):
                break
        times = output.metrics
        assert times.first_scheduled_time < times.first_token_time < last_step < times.finished_time, lengths

    def test_the_first_is_that_of_n_1(self, tiny: LLM) -> None:
        def first(n: int) -> list[int]:
            params = SamplingParams(n=n, max_tokens=8, seed=5, ignore_eos=True)
            return tiny.generate([[1, 2, 3]], params, use_tqdm=False)[0]["token_ids"]

        assert first(1) == first(3)

    def test_an_abort_ends_all_of_them(self, tiny: LLM) -> None:
        request_id = tiny.engine.add_request([1] * 9, SamplingParams(n=3, max_tokens=50, ignore_eos=True))
        tiny.engine.step()
        output = tiny.abort(request_id)
        assert [completion.finish_reason for completion in output.outputs] == ["abort"] * 3
        assert_empty(tiny)


class TestArgumentsOfVllm:
    """Arguments that we lack are taken where they ask for nothing, and else refused with the reason."""

    def test_values_that_ask_for_nothing(self, tiny_checkpoint: Path) -> None:
        arguments = {"trust_remote_code": True, "quantization": None, "swap_space": 4, "enable_chunked_prefill": True}
        arguments |= {"generation_config": "auto", "enable_lora": False, "data_parallel_size": 1, "rope_scaling": {}}
        arguments |= {"max_seq_len_to_capture": 8192, "disable_custom_all_reduce": True, "compilation_config": 3}
        arguments |= {"tokenizer_revision": None, "speculative_config": None, "task": "generate", "hf_token": None}
        make_tiny(tiny_checkpoint, **arguments).close()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"quantization": "awq"}, ValueError, "quantization is 'awq', which is not supported"),
            ({"block_size": 16}, TypeError, "has no argument 'block_size'; here it is 'kvcache_block_size'"),
            ({"pipeline_parallel_size": 2}, ValueError, "pipeline_parallel_size is 2.* with tensor_parallel_size"),
            ({"enable_lora": True}, ValueError, "enable_lora is True, .*; merge the adapter"),
            ({"generation_config": "vllm"}, ValueError, "'vllm', .*; pass sampling_params to each call"),
            ({"rope_scaling": {"factor": 2}}, ValueError, "rope_scaling is .*; pass hf_overrides="),
            ({"speculative_config": {"model": "x"}}, ValueError, "speculative_config is .*; leave it out"),
        ],
    )
    def test_others(self, tiny_checkpoint: Path, arguments: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            make_tiny(tiny_checkpoint, **arguments)

    def test_what_explains_itself_is_of_an_argument_that_is_refused(self) -> None:
        assert INSTEAD.keys() <= {name for name, allowed in ELSEWHERE.items() if isinstance(allowed, tuple)}
        assert not ELSEWHERE.keys() & EngineConfig.__dataclass_fields__.keys()

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("guided_decoding", {"json": {}}, "structured outputs come by logits_processors"),
            ("structured_outputs", {"json": {}}, "structured outputs come by logits_processors"),
            ("use_beam_search", True, "beam search is not there"),
            ("best_of", 4, "generate n completions with logprobs=0"),
            ("output_kind", 2, "leave it out"),
        ],
    )
    def test_sampling_parameters(self, name: str, value: Any, message: str) -> None:
        with pytest.raises(TypeError, match=f"SamplingParams has no argument '{name}': .*{message}"):
            SamplingParams(**{name: value})

    def test_sampling_parameters_that_ask_for_nothing(self) -> None:
        nothing = {"best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "guided_decoding": None}
        params = SamplingParams(n=2, max_tokens=3, **nothing)
        assert params == SamplingParams(n=2, max_tokens=3)
        assert not hasattr(params, "best_of")
        assert dataclasses.replace(params, seed=1).seed == 1
        assert list(inspect.signature(SamplingParams.__init__).parameters)[1:3] == ["n", "temperature"]

    def test_no_code_of_a_checkpoint_is_run_and_the_log_says_so(
        self, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level("INFO", "nanovllm"):
            make_tiny(tiny_checkpoint, trust_remote_code=False).close()
            assert "trust_remote_code" not in caplog.text
            make_tiny(tiny_checkpoint, trust_remote_code=True).close()
        assert "trust_remote_code=True changes nothing: code that comes with a checkpoint is never run" in caplog.text

    def test_keywords_of_calls_that_ask_for_nothing(self, demo: LLM) -> None:
        nothing: dict[str, Any] = {"lora_request": None, "priority": [0], "tokenization_kwargs": {}}
        nothing |= {"mm_processor_kwargs": None, "chat_template_content_format": "auto"}
        without = demo.chat(QUESTION, greedy(4), use_tqdm=False)[0]
        [output] = demo.chat(QUESTION, greedy(4), use_tqdm=False, **nothing)
        assert output["token_ids"] == without["token_ids"]
        [output] = demo.generate(without.prompt, greedy(4), use_tqdm=False, **nothing)
        assert output["token_ids"] == without["token_ids"]
        pieces = list(demo.stream_chat(QUESTION, greedy(4), **nothing))
        assert pieces[-1].output["token_ids"] == without["token_ids"]
        assert demo.render_chat(QUESTION, **nothing) == demo.render_chat(QUESTION)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("lora_request", object(), "merge the adapter into the checkpoint's weights first"),
            ("lora_request", [None, object()], "merge the adapter"),
            ("priority", [0, 1], "first come, first served"),
            ("prompt_token_ids", [[1]], "pass the lists of token ids as prompts"),
            ("chat_template_content_format", "openai", "leave it out"),
        ],
    )
    def test_keywords_of_calls_that_ask_for_something(self, demo: LLM, name: str, value: Any, message: str) -> None:
        for method, prompts in ((demo.generate, ["a", "b"]), (demo.chat, QUESTION)):
            with pytest.raises(TypeError, match=f"{method.__name__} has no argument '{name}'; .*{message}"):
                method(prompts, greedy(1), use_tqdm=False, **{name: value})

    def test_keywords_and_attributes_of_vllm_are_none_of_ours(self) -> None:
        ours = {name for method in (LLM.generate, LLM.chat) for name in inspect.signature(method).parameters}
        assert not OF_CALLS.keys() & (ours | ChatOptions.__optional_keys__)
        assert not ATTRIBUTES.keys() & set(dir(LLM))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("llm_engine", r"the engine is llm\.engine"),
            ("encode", r"no embeddings, and token ids are llm\.get_tokenizer\(\)\.encode"),
            ("beam_search", r"take the best of generate\(prompts, SamplingParams\(n=8, logprobs=0\)\)"),
        ],
    )
    def test_attributes(self, demo: LLM, name: str, message: str) -> None:
        assert not hasattr(demo, name)
        with pytest.raises(AttributeError, match=f"^'LLM' object has no attribute '{name}': .*{message}"):
            getattr(demo, name)

    def test_other_attributes_are_python_s(self, demo: LLM) -> None:
        with pytest.raises(AttributeError, match=r"^'LLM' object has no attribute 'generat'$") as caught:
            demo.generat  # noqa: B018
        assert (caught.value.name, caught.value.obj) == ("generat", demo)  # of which Python makes its suggestion

    def test_messages_are_not_prompts(self, demo: LLM) -> None:
        for prompts in (QUESTION, [QUESTION]):
            with pytest.raises(ValueError, match=r"answer conversations with llm\.chat"):
                demo.generate(prompts, use_tqdm=False)


class TestTruncation:
    """truncate_prompt_tokens."""

    @pytest.mark.parametrize(("wanted", "kept"), [(None, 9), (9, 9), (100, 9), (3, 3), (1, 1), (-1, 9)])
    def test_the_last_tokens_are_kept(self, tiny: LLM, wanted: int | None, kept: int) -> None:
        prompt = list(range(30, 39))
        params = greedy(4, ignore_eos=True, truncate_prompt_tokens=wanted, prompt_logprobs=0)
        [output] = tiny.generate([prompt], params, use_tqdm=False)
        assert output.prompt_token_ids == prompt[-kept:]
        assert len(output.prompt_logprobs) == kept
        [expected] = tiny.generate([prompt[-kept:]], greedy(4, ignore_eos=True), use_tqdm=False)
        assert output["token_ids"] == expected["token_ids"]

    def test_a_prompt_longer_than_the_context_is_brought_to_what_fits(self, tiny_checkpoint: Path) -> None:
        with make_tiny(tiny_checkpoint, max_model_len=16) as llm:
            prompt = list(range(40))
            with pytest.raises(ValueError, match="the prompt has 40 tokens; max_model_len is 16"):
                llm.generate([prompt], greedy(), use_tqdm=False)
            [output] = llm.generate([prompt], greedy(None, truncate_prompt_tokens=-1), use_tqdm=False)
            assert output.prompt_token_ids == prompt[-15:]
            assert len(output["token_ids"]) == 1
            with pytest.raises(ValueError, match="the prompt has 20 tokens; max_model_len is 16"):
                llm.generate([prompt], greedy(None, truncate_prompt_tokens=20), use_tqdm=False)

    @pytest.mark.parametrize("wrong", [0, -2, 1.5, True])
    def test_others_are_refused(self, wrong: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="truncate_prompt_tokens is"):
            SamplingParams(truncate_prompt_tokens=wrong)


class TestStream:
    """Text as it is made."""

    def test_the_pieces_make_up_the_outputs(self, demo: LLM) -> None:
        prompts = demo.render_chat([QUESTION, [{"role": "user", "content": "introduce yourself"}]])
        params = [greedy(), SamplingParams(n=2, seed=1, max_tokens=30, stop=["name"])]
        expected = demo.generate(prompts, params, use_tqdm=False)
        text: dict[tuple[int, int], str] = {}
        tokens: dict[tuple[int, int], list[int]] = {}
        outputs: dict[int, RequestOutput] = {}
        for piece in demo.stream(prompts, params):
            key = (piece.prompt_index, piece.index)
            text[key] = text.get(key, "") + piece.text
            tokens.setdefault(key, []).extend(piece.token_ids)
            if piece.output is not None:
                outputs[piece.prompt_index] = piece.output
        for index, output in enumerate(expected):
            assert outputs[index].outputs == output.outputs
            for completion in output.outputs:
                assert text[index, completion.index] == completion.text
                assert tokens[index, completion.index] == completion.token_ids

    def test_a_chat_is_streamed_as_it_is_answered(self, demo: LLM) -> None:
        conversations = [QUESTION, [{"role": "user", "content": "introduce yourself"}]]
        params = [greedy(), SamplingParams(seed=1, max_tokens=30)]
        for options in ({}, {"chat_template_kwargs": OFF}):
            expected = demo.chat(conversations, params, use_tqdm=False, **options)
            text = ["", ""]
            for piece in demo.stream_chat(conversations, params, **options):
                text[piece.prompt_index] += piece.text
                if piece.output is not None:
                    assert piece.output.prompt == expected[piece.prompt_index].prompt
            assert text == texts(expected)

    def test_one_message_can_be_continued_in_a_stream(self, demo: LLM) -> None:
        begun = [*QUESTION, {"role": "assistant", "content": "The prime numbers up to 30: 2, 3, 5,"}]
        pieces = demo.stream_chat(begun, greedy(), add_generation_prompt=False, continue_final_message=True)
        assert "".join(piece.text for piece in pieces).endswith(" 7, 11, 13, 17, 19, 23, 29.")
        assert list(demo.stream_chat([])) == []

    def test_leaving_the_loop_aborts_what_is_left(self, demo: LLM) -> None:
        for number, piece in enumerate(demo.stream(["hello", "you"], greedy(100, ignore_eos=True))):
            assert piece.request_id
            if number == 5:
                break
        del piece
        gc.collect()
        assert_empty(demo)

    def test_other_calls_may_run_meanwhile(self, demo: LLM) -> None:
        stream = demo.stream(demo.render_chat(QUESTION, chat_template_kwargs=OFF), greedy())
        first = next(stream)
        [other] = demo.chat(QUESTION, greedy(), use_tqdm=False, chat_template_kwargs=OFF)
        assert other["text"] == first.text + "".join(piece.text for piece in stream) == ANSWER

    def test_a_request_that_is_aborted_ends_its_stream(self, demo: LLM) -> None:
        pieces = []
        for piece in demo.stream(["hello"], greedy(100, ignore_eos=True)):
            pieces.append(piece)
            if len(pieces) == 3:
                demo.abort(piece.request_id)
        assert pieces[-1].finish_reason == "abort"
        assert "".join(piece.text for piece in pieces) == pieces[-1].output["text"]

    def test_without_a_tokenizer_it_streams_tokens(self, tiny: LLM) -> None:
        pieces = list(tiny.stream([[1, 2]], greedy(4, ignore_eos=True)))
        assert [len(piece.token_ids) for piece in pieces] == [1] * 4

    def test_bad_prompts_are_refused_at_once(self, demo: LLM) -> None:
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            demo.stream(["a", ""])
        with pytest.raises(ValueError, match="conversation 1 is empty"):
            demo.stream_chat([QUESTION, []])
        with pytest.raises(ValueError, match=r"answer conversations with .* llm\.stream_chat\(messages\)"):
            demo.stream(QUESTION)


class TestIterator:
    """Prompts from an iterator."""

    def test_outputs_come_in_order(self, tiny: LLM) -> None:
        prompts = [[n + 1, 2] for n in range(150)]
        params = [greedy(1 + n % 7, ignore_eos=True) for n in range(150)]
        expected = tiny.generate(prompts, params, use_tqdm=False)
        found = list(tiny.generate_iter(zip(prompts, params, strict=True), max_in_flight=20))
        assert [output.prompt_index for output in found] == list(range(150))
        assert [output["token_ids"] for output in found] == [output["token_ids"] for output in expected]

    def test_or_as_they_finish(self, tiny: LLM) -> None:
        long, short = greedy(30, ignore_eos=True), greedy(2, ignore_eos=True)
        found = list(tiny.generate_iter([([1, 2], long), ([3, 4], short)], ordered=False))
        assert [output.prompt_index for output in found] == [1, 0]

    def test_it_takes_no_more_than_it_may_and_the_engine_never_starves(self, tiny_checkpoint: Path) -> None:
        taken, running = 0, []

        def source() -> Iterator[list[int]]:
            nonlocal taken
            for number in itertools.count():
                taken += 1
                yield [number % 200 + 1, 3]

        with make_tiny(tiny_checkpoint, max_num_seqs=4) as llm:
            iterator = llm.generate_iter(source(), greedy(3, ignore_eos=True))
            for number, output in enumerate(itertools.islice(iterator, 100)):
                assert output.prompt_index == number
                assert taken - number <= 8 + 4  # 8 in flight, and those that a step has finished together
                running.append(llm.get_metrics()["running_requests"] + llm.get_metrics()["waiting_requests"])
            iterator.close()
            assert min(running) >= 4
            assert_empty(llm)

    def test_what_the_iterator_raises_comes_after_the_outputs(self, tiny: LLM) -> None:
        def source() -> Iterator[list[int]]:
            yield from ([n, 1] for n in range(1, 6))
            raise OSError("the file is gone")

        found: list[int] = []
        iterator = tiny.generate_iter(source(), greedy(3))
        with pytest.raises(OSError, match="the file is gone"):
            found.extend(output.prompt_index for output in iterator)
        assert found == [0, 1, 2, 3, 4]
        assert_empty(tiny)

    def test_bad_prompts(self, tiny: LLM) -> None:
        prompts = [[1], [], [3]]
        outputs = list(tiny.generate_iter(prompts, greedy(2), on_error="return"))
        assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
        assert outputs[1].error == "prompt 1 is empty; give at least one token"
        iterator = tiny.generate_iter(prompts, greedy(2))
        assert next(iterator).prompt_index == 0
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            next(iterator)

    def test_bad_prompts_without_end_are_told_of_as_they_come(self, tiny: LLM) -> None:
        iterator = tiny.generate_iter(itertools.repeat([]), greedy(2), on_error="return")
        assert [output.prompt_index for output in itertools.islice(iterator, 500)] == list(range(500))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"prompts": "hello"}, TypeError, "prompts is a str; pass an iterable"),
            ({"prompts": 5}, TypeError, "prompts is an int"),
            ({"prompts": [], "max_in_flight": 0}, ValueError, "max_in_flight is 0"),
            ({"prompts": [], "on_error": "ignore"}, ValueError, "on_error is 'ignore'; use one of raise, return"),
            ({"prompts": [], "sampling_params": [greedy()]}, TypeError, "sampling_params is a list"),
        ],
    )
    def test_bad_arguments(self, tiny: LLM, arguments: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            tiny.generate_iter(**arguments)


class TestErrors:
    """Bad prompts beside good ones, and requests that fail on the way."""

    def test_good_prompts_run_and_bad_ones_say_why(self, demo: LLM) -> None:
        prompts: list[Any] = ["hello", "", [99999], 5.5, {"prompt": "x", "promt": "y"}, "you"]
        outputs = demo.generate(prompts, greedy(2), use_tqdm=False, on_error="return")
        assert [output.prompt_index for output in outputs] == list(range(6))
        assert [output.error is None for output in outputs] == [True, False, False, False, False, True]
        assert outputs[1].error == "prompt 1 is empty; give at least one token"
        assert "prompt 2 has token id 99999" in outputs[2].error
        assert [output.outputs[0].finish_reason for output in outputs[1:5]] == ["error"] * 4
        assert all(output["text"] == "" for output in outputs[1:5])

    def test_parameters_that_do_not_fit_the_model(self, demo: LLM) -> None:
        params = [greedy(2), greedy(2, stop_token_ids=[5000]), "x"]
        outputs = demo.generate(["a", "b", "c"], params, use_tqdm=False, on_error="return")
        assert outputs[0].error is None
        assert "stop_token_ids of prompt 1 has token id 5000; the vocabulary has ids 0 to" in outputs[1].error
        assert "the sampling_params of prompt 2 are 'x'" in outputs[2].error
        with pytest.raises(ValueError, match="stop_token_ids of prompt 1"):
            demo.generate(["a", "b", "c"], params)

    def test_logits_that_are_not_finite_end_their_request_only(self, tmp_path: Path) -> None:
        model = make_model(tie_word_embeddings=False)
        with torch.no_grad():
            model.model.embed_tokens.weight[7] = float("inf")
        model.save_pretrained(tmp_path)
        with make_tiny(tmp_path) as llm:
            bad, good = llm.generate([[3, 7], [3, 4]], greedy(4, ignore_eos=True), use_tqdm=False)
            assert (bad.outputs[0].finish_reason, bad.outputs[0].token_ids) == ("error", [])
            assert "try dtype='float32'" in bad.error
            assert len(good["token_ids"]) == 4
            assert_empty(llm)


class TestInterrupts:
    """Whatever happens in the middle, the engine is empty and usable afterwards."""

    def test_an_abort_during_generate_gives_what_there_is(self, tiny: LLM) -> None:
        call_during_step(tiny, 3, lambda: tiny.abort("1"))
        outputs = tiny.generate([[1, 2], [3, 4], [5, 6]], greedy(20, ignore_eos=True), use_tqdm=False)
        assert [output.outputs[0].finish_reason for output in outputs] == ["length", "abort", "length"]
        assert len(outputs[1]["token_ids"]) == 3
        assert_empty(tiny)

    @pytest.mark.parametrize("name", ["close", "reset"])
    def test_nobody_pulls_the_engine_from_under_a_step(self, tiny: LLM, name: str) -> None:
        said: list[str] = []

        def interfere() -> None:
            with pytest.raises(RuntimeError, match="from inside one of its own steps"):
                (tiny.close if name == "close" else tiny.engine.reset)()
            with pytest.raises(RuntimeError, match="from inside one of its own steps"):
                tiny.generate([[1]])
            said.append(name)

        call_during_step(tiny, 2, interfere)
        [output] = tiny.generate([[1, 2]], greedy(5, ignore_eos=True), use_tqdm=False)
        assert (len(output["token_ids"]), said) == (5, [name])

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")
    def test_a_signal_handler_may_abort(self, tiny: LLM) -> None:
        seen: list[Any] = []

        def handler(*_: Any) -> None:
            tiny.abort(next(iter(tiny.engine._requests), "none"))
            seen.append(True)

        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            outputs = tiny.generate([[1, 2], [3, 4]], greedy(200, ignore_eos=True), use_tqdm=False)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert len(outputs) == 2
        assert seen
        assert "abort" in {output.outputs[0].finish_reason for output in outputs}
        assert_empty(tiny)

    def test_a_second_interrupt_while_the_first_is_cleared_away(
        self, tiny: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = tiny.generate([[1, 2]], greedy(6), use_tqdm=False)[0]["token_ids"]
        for owner, name in ((ProgressBar, "update"), (Scheduler, "schedule"), (ModelRunner, "execute")):
            for second in ((BlockManager, "release_everything"), (Scheduler, "reset"), (Scheduler, "finish_all")):
                with monkeypatch.context() as patch:
                    interrupt_once(patch, owner, name)
                    interrupt_once(patch, *second)
                    with pytest.raises(KeyboardInterrupt):
                        tiny.generate([[1, 2], [3]], greedy(20), use_tqdm=False)
                assert not tiny.engine.has_unfinished_requests
                assert tiny.generate([[1, 2]], greedy(6), use_tqdm=False)[0]["token_ids"] == expected
                assert_empty(tiny)

    @pytest.mark.parametrize(("owner", "name"), [(Scheduler, "_vacate"), (BlockManager, "free")])
    def test_an_interrupt_inside_abort(
        self, tiny: LLM, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
    ) -> None:
        request_id = tiny.engine.add_request([1, 2], greedy(20))
        tiny.engine.step()
        with monkeypatch.context() as patch:
            interrupt_once(patch, owner, name)
            with pytest.raises(KeyboardInterrupt):
                tiny.abort(request_id)
        with pytest.raises(RuntimeError, match=f"requests were dropped by another call that failed: {request_id}: "):
            tiny.engine.step()
        assert_empty(tiny)
        assert tiny.abort(request_id) is None
        assert len(tiny.generate([[1, 2]], greedy(4, ignore_eos=True), use_tqdm=False)[0]["token_ids"]) == 4

    def test_an_interrupt_at_any_line_of_a_stream(self, tiny: LLM) -> None:
        expected = tiny.generate([[1, 2, 3]], greedy(5), use_tqdm=False)[0]["token_ids"]
        number = 0
        params = SamplingParams(n=2, max_tokens=3, logprobs=1, presence_penalty=1.0)
        for place in interrupt_at_lines(lambda: lambda: list(tiny.stream([[1, 2], [3]], params)), every=13):
            gc.collect()
            assert not tiny.engine.has_unfinished_requests, place
            assert tiny.generate([[1, 2, 3]], greedy(5), use_tqdm=False)[0]["token_ids"] == expected, place
            assert_empty(tiny)
            number += 1
        assert number > 20

    def test_a_closed_engine_says_so(self, tiny_checkpoint: Path) -> None:
        llm = make_tiny(tiny_checkpoint)
        engine = llm.engine
        llm.close()
        for call in (lambda: engine.add_request([1]), engine.step, engine.metrics, lambda: engine.abort("0")):
            with pytest.raises(RuntimeError, match="this engine is closed; make a new LLM"):
                call()
        engine.close()

    def test_what_is_aborted_from_inside_a_step_is_not_lost(self, tiny: LLM) -> None:
        request_id = tiny.engine.add_request([1, 2], greedy(20, ignore_eos=True))
        call_during_step(tiny, 2, lambda: tiny.abort(request_id))
        outputs = []
        while tiny.engine.has_unfinished_requests:
            outputs += tiny.engine.step()
        assert [(o.request_id, o.outputs[0].finish_reason) for o in outputs] == [(request_id, "abort")]

    def test_a_request_keeps_its_parameters(self, tiny: LLM) -> None:
        params = greedy(5, ignore_eos=True)
        tiny.engine.add_request([1, 2], params)
        params.max_tokens = 2
        while not (outputs := tiny.engine.step()):
            pass
        assert len(outputs[0]["token_ids"]) == 5

    def test_abort_takes_names(self, tiny: LLM) -> None:
        with pytest.raises(TypeError, match=r"request_id is 0 \(int\); it must be a string"):
            tiny.abort(0)  # type: ignore[arg-type]
        assert tiny.abort("nobody") is None


class TestThreads:
    """Calls from several threads share the engine."""

    def test_calls_run_together(self, tiny: LLM) -> None:
        prompts = [[n + 1, n + 2] for n in range(6)]
        expected = [tiny.generate([p], greedy(15), use_tqdm=False)[0]["token_ids"] for p in prompts]
        found: dict[int, list[int]] = {}

        def work(number: int) -> None:
            found[number] = tiny.generate([prompts[number]], greedy(15), use_tqdm=False)[0]["token_ids"]

        most = [0]
        count_running(tiny, most)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[number] for number in range(6)] == expected
        assert most[0] > 1, "no step ran requests of more than one call"
        assert_empty(tiny)

    def test_metrics_may_be_read_meanwhile(self, tiny: LLM) -> None:
        done = threading.Event()
        problems: list[Exception] = []

        def watch() -> None:
            while not done.is_set():
                try:
                    tiny.get_metrics()
                except Exception as error:
                    problems.append(error)

        thread = threading.Thread(target=watch)
        thread.start()
        tiny.generate([[1, 2]] * 300, greedy(1), use_tqdm=False)
        done.set()
        thread.join()
        assert problems == []

    def test_a_request_added_during_generate_is_not_lost(self, tiny: LLM) -> None:
        added: list[str] = []
        thread = threading.Thread(target=lambda: added.append(tiny.engine.add_request([9, 9], greedy(3))))
        call_during_step(tiny, 2, lambda: None, before=thread.start)
        tiny.generate([[1, 2]], greedy(30, ignore_eos=True), use_tqdm=False)
        thread.join()
        outputs = []
        while tiny.engine.has_unfinished_requests:
            outputs += tiny.engine.step()
        assert [output.request_id for output in outputs] == added

    def test_a_close_ends_the_calls_of_others(self, tiny_checkpoint: Path) -> None:
        llm = make_tiny(tiny_checkpoint, num_kvcache_blocks=200)
        raised: list[str] = []
        running = threading.Event()
        call_during_step(llm, 2, running.set)

        def work() -> None:
            try:
                llm.generate([[1, 2]], greedy(480, ignore_eos=True), use_tqdm=False)
            except RuntimeError as error:
                raised.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        running.wait()
        llm.close()
        thread.join()
        assert len(raised) == 1
        assert "closed" in raised[0]


def test_only_tokens_that_somebody_reads_are_looked_at_as_they_come(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[int] = []
    follow = Request.follow

    def noting(request: Request, seq: Any) -> str | None:
        followed.append(seq.num_output_tokens)
        return follow(request, seq)

    monkeypatch.setattr(Request, "follow", noting)
    demo.generate("Once", greedy(5, ignore_eos=True), use_tqdm=False)
    assert followed == [5]
    followed.clear()
    demo.generate("Once", greedy(5, ignore_eos=True, stop="not to be found"), use_tqdm=False)
    assert followed == [1, 2, 3, 4, 5]
    followed.clear()
    for _ in demo.stream("Once", greedy(5, ignore_eos=True)):
        pass
    assert followed == [1, 2, 3, 4, 5]


class TestMetrics:
    """What the engine says of itself."""

    def test_a_call_shows(self, tiny_checkpoint: Path) -> None:
        with make_tiny(tiny_checkpoint) as llm:
            assert llm.get_metrics()["time_to_first_token"] is None
            started = time.perf_counter()
            llm.generate([[1] * 9, [1] * 9], greedy(5, ignore_eos=True), use_tqdm=False)
            llm.generate([[1] * 9], greedy(5, ignore_eos=True), use_tqdm=False)
            spent = time.perf_counter() - started
            metrics = llm.get_metrics()
        assert metrics["finished_requests"] == 3
        assert metrics["prefix_hit_rate"] == pytest.approx(8 / 27)
        assert metrics["waiting_requests"] == metrics["running_requests"] == 0
        for name in ("time_to_first_token", "time_per_output_token"):
            assert 0 < metrics[name]["p50"] <= metrics[name]["p90"] <= metrics[name]["p99"] < spent

    def test_percentiles_are_of_the_nearest_rank(self) -> None:
        assert percentiles(deque(map(float, range(1, 101)))) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
        assert percentiles(deque([2.0, 1.0])) == {"p50": 1.0, "p90": 2.0, "p99": 2.0}
        assert percentiles(deque()) is None


class TestScriptsOfOthers:
    """Scripts written for vLLM's and nano-vllm's offline interfaces run with the import changed."""

    def test_vllm_basic(self, capsys: pytest.CaptureFixture[str]) -> None:
        prompts = ["Hello, my name is", "The president of the United States is", "The future of AI is"]
        sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
        llm = LLM(model=DEMO_MODEL_PATH)
        outputs = llm.generate(prompts, sampling_params)
        for output in outputs:
            prompt = output.prompt
            generated_text = output.outputs[0].text
            print(f"Prompt: {prompt!r}\nOutput:    {generated_text!r}")
        assert capsys.readouterr().out.count("Output:") == 3
        assert [output.prompt for output in outputs] == prompts

    def test_vllm_chat_and_batch(self) -> None:
        llm = LLM(model=DEMO_MODEL_PATH, max_model_len=2048, enforce_eager=True, gpu_memory_utilization=0.8)
        sampling_params = llm.get_default_sampling_params()
        sampling_params.max_tokens = 10
        sampling_params.temperature = 0.5
        conversation = [
            {"role": "system", "content": "You are a helpful assistant"},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello! How can I assist you today?"},
            {"role": "user", "content": "introduce yourself"},
        ]
        outputs = llm.chat(conversation, sampling_params, use_tqdm=False)
        assert outputs[0].outputs[0].text
        outputs = llm.chat(messages=[conversation for _ in range(10)], sampling_params=sampling_params, use_tqdm=True)
        assert len(outputs) == 10

    def test_vllm_logprobs_and_n(self) -> None:
        llm = LLM(model=DEMO_MODEL_PATH, seed=1)
        params = SamplingParams(n=2, temperature=0.8, top_p=0.95, logprobs=1, prompt_logprobs=1, max_tokens=4)
        [output] = llm.generate({"prompt": "add 1 and 2"}, params)
        assert output.prompt_logprobs[0] is None
        for completion in output.outputs:
            assert completion.cumulative_logprob < 0
            for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
                assert entry[token_id].rank >= 1
                assert isinstance(entry[token_id].decoded_token, str)

    def test_nano_vllm(self) -> None:
        path = DEMO_MODEL_PATH
        llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)
        tokenizer = llm.get_tokenizer()
        sampling_params = SamplingParams(temperature=0.6, max_tokens=256)
        prompts = ["introduce yourself", "list all prime numbers within 100"]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        outputs = llm.generate(prompts, sampling_params)
        for _prompt, output in zip(prompts, outputs, strict=True):
            assert output["text"]
            assert output["token_ids"]


def count_running(llm: LLM, most: list[int]) -> None:
    """Note the most rows of a step in ``most``."""
    runner, execute = llm.engine.runner, llm.engine.runner.execute

    def wrapped(plan: Any) -> Any:
        most[0] = max(most[0], len(plan.slots))
        return execute(plan)

    runner.execute = wrapped  # type: ignore[method-assign]


def call_during_step(llm: LLM, number: int, call: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> None:
    """Have the ``number``-th step call something, in the middle of it."""
    runner, execute = llm.engine.runner, llm.engine.runner.execute
    steps = itertools.count(1)

    def wrapped(plan: Any) -> Any:
        if next(steps) == number:
            before()
            call()
        return execute(plan)

    runner.execute = wrapped  # type: ignore[method-assign]


def interrupt_once(patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Have the next call of a method raise KeyboardInterrupt."""
    original = getattr(owner, name)
    calls = itertools.count()

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 0:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    patch.setattr(owner, name, call)
