"""SamplingParams: what is allowed, what is said about the rest, and what a checkpoint's own defaults are."""

import copy
import dataclasses
import json
import math
import pickle
import shutil
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.layers.temperature import Linear
from tests.ids import stable
from tests.threads import one_thread  # noqa: F401

BOOLEANS = [
    "include_stop_str_in_output",
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
]


class TestDefaults:
    """As documented, and checked whenever they change."""

    def test_values(self) -> None:
        assert SamplingParams() == SamplingParams(
            n=1,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            logit_bias=None,
            allowed_token_ids=None,
            bad_words=(),
            logits_processors=(),
            max_tokens=64,
            min_tokens=0,
            stop=(),
            include_stop_str_in_output=False,
            stop_token_ids=(),
            ignore_eos=False,
            seed=None,
            logprobs=None,
            prompt_logprobs=None,
            truncate_prompt_tokens=None,
            detokenize=True,
            skip_special_tokens=True,
            spaces_between_special_tokens=True,
        )

    def test_what_is_assigned_is_checked_and_a_bad_value_changes_nothing(self) -> None:
        params = SamplingParams()
        params.max_tokens, params.stop = 10, "x"
        assert params == SamplingParams(max_tokens=10, stop=("x",))
        for name, value in (("temperature", -1), ("stop", 5), ("min_tokens", 11), ("detokenize", False)):
            with pytest.raises(
                (TypeError, ValueError), match=name if name != "detokenize" else "stop needs detokenize"
            ):
                setattr(params, name, value)
        assert params == SamplingParams(max_tokens=10, stop=("x",))
        with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
            params.max_token = 5  # type: ignore[attr-defined]

    def test_a_clone_is_its_own(self) -> None:
        params = SamplingParams(n=2)
        copied = params.clone()
        copied.n = 3
        assert params.n == 2

    def test_a_clone_shares_no_dictionary(self) -> None:
        params = SamplingParams(logit_bias={1: 2.0})
        copied = params.clone()
        params.logit_bias[10**9] = 5.0  # type: ignore[index]
        assert copied == SamplingParams(logit_bias={1: 2.0})

    @pytest.mark.parametrize("pieces", [[], [(0, float("nan"), 1, 1, False)], [(0, 1.0, 1, -1.0, False)]])
    def test_a_schedule_that_would_fail_later_is_refused(self, pieces: list) -> None:
        class Mine:
            def at(self, position: int) -> float:
                return 1.0

            def pieces(self) -> list:
                return pieces

        with pytest.raises(ValueError, match="temperature"):
            SamplingParams(temperature=Mine())

    def test_names_are_required(self) -> None:
        with pytest.raises(TypeError, match="positional"):
            SamplingParams(0.5)  # type: ignore[misc]

    def test_unknown_names_are_refused(self) -> None:
        with pytest.raises(TypeError, match="temprature"):
            SamplingParams(temprature=0.5)  # type: ignore[call-arg]

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("temprature", "temperature"),
            ("temp", "temperature"),
            ("repetition", "repetition_penalty"),
            ("rep", "repetition_penalty"),
            ("max_new_tokens", "max_tokens"),
            ("min_new_tokens", "min_tokens"),
            ("stop_token_id", "stop_token_ids"),
            ("top_K", "top_k"),
            ("ignore", "ignore_eos"),
            ("stops", "stop"),
            ("prompt_logprob", "prompt_logprobs"),
            ("logits_processor", "logits_processors"),
        ],
    )
    def test_the_nearest_name_is_suggested_and_a_beginning_counts(self, wrong: str, right: str) -> None:
        with pytest.raises(TypeError, match=rf"^SamplingParams has no argument '{wrong}'; did you mean '{right}'\?$"):
            SamplingParams(**{wrong: 1})

    @pytest.mark.parametrize("wrong", ["beam", "x", "t", "do_sample"])
    def test_all_names_are_listed_where_none_is_near(self, wrong: str) -> None:
        names = "allowed_token_ids, .*, top_k, top_p, truncate_prompt_tokens"
        with pytest.raises(TypeError, match=rf"'{wrong}'; known arguments: {names}$"):
            SamplingParams(**{wrong: 1})


class TestValidation:
    """Every field says its name, the value and what it may be."""

    @pytest.mark.parametrize(
        ("field", "value", "allowed"),
        [
            ("temperature", -0.1, "finite number of at least 0.0"),
            ("temperature", math.nan, "finite number of at least 0.0"),
            ("temperature", math.inf, "finite number of at least 0.0"),
            ("top_k", -2, "whole number of at least -1"),
            ("top_p", -0.5, "finite number from 0.0 to 1.0"),
            ("top_p", 1.01, "finite number from 0.0 to 1.0"),
            ("top_p", math.nan, "finite number from 0.0 to 1.0"),
            ("top_p", 0.0, r"in \(0, 1\].*temperature=0"),
            ("top_p", 0, r"in \(0, 1\].*temperature=0"),
            ("max_tokens", 0, "whole number of at least 1"),
            ("max_tokens", -5, "whole number of at least 1"),
            ("n", 0, "whole number from 1 to 16384"),
            ("n", -1, "whole number from 1 to 16384"),
            ("min_p", -0.01, "finite number from 0.0 to 1.0"),
            ("min_p", 1.01, "finite number from 0.0 to 1.0"),
            ("min_p", math.nan, "finite number from 0.0 to 1.0"),
            ("presence_penalty", -2.1, "finite number from -2.0 to 2.0"),
            ("presence_penalty", 2.1, "finite number from -2.0 to 2.0"),
            ("frequency_penalty", -3.5, "finite number from -2.0 to 2.0"),
            ("frequency_penalty", math.inf, "finite number from -2.0 to 2.0"),
            ("repetition_penalty", -1.5, "finite number of at least 0.0"),
            ("repetition_penalty", 0.0, "number above 0"),
            ("repetition_penalty", math.inf, "finite number of at least 0.0"),
            ("min_tokens", -1, "whole number of at least 0"),
            ("logprobs", -2, "whole number of at least -1"),
            ("prompt_logprobs", -2, "whole number of at least -1"),
            ("seed", 2**64, f"whole number from {-(2**63)} to {2**64 - 1}"),
            ("seed", -(2**63) - 1, f"whole number from {-(2**63)} to {2**64 - 1}"),
        ],
    )
    def test_outside_the_range(self, field: str, value: Any, allowed: str) -> None:
        shown = "0" if value == 0 else str(value)
        with pytest.raises(ValueError, match=rf"^{field} is {shown}; it must be .*{allowed}"):
            SamplingParams(**{field: value})

    @pytest.mark.parametrize(
        ("field", "value", "allowed"),
        [
            ("temperature", "0.5", "number of at least 0.0"),
            ("temperature", None, "number of at least 0.0"),
            ("temperature", True, "number of at least 0.0"),
            ("temperature", [1.0], "number of at least 0.0"),
            ("top_k", 1.5, "whole number of at least -1"),
            ("top_k", 5.0, "whole number of at least -1"),
            ("top_k", None, "whole number of at least -1"),
            ("top_k", True, "whole number of at least -1"),
            ("top_p", "1", "number from 0.0 to 1.0"),
            ("top_p", None, "number from 0.0 to 1.0"),
            ("max_tokens", 12.5, "whole number of at least 1"),
            ("max_tokens", 12.0, "whole number of at least 1"),
            ("max_tokens", "12", "whole number of at least 1"),
            ("max_tokens", False, "whole number of at least 1"),
            ("ignore_eos", 1, "True or False"),
            ("ignore_eos", None, "True or False"),
            ("ignore_eos", "yes", "True or False"),
            ("n", 1.0, "whole number from 1 to 16384"),
            ("n", True, "whole number from 1 to 16384"),
            ("n", None, "whole number from 1 to 16384"),
            ("temperature", Linear, "number of at least 0.0"),
            ("min_p", None, "number from 0.0 to 1.0"),
            ("min_p", "0.1", "number from 0.0 to 1.0"),
            ("min_p", True, "number from 0.0 to 1.0"),
            ("presence_penalty", None, "number from -2.0 to 2.0"),
            ("presence_penalty", True, "number from -2.0 to 2.0"),
            ("frequency_penalty", "1", "number from -2.0 to 2.0"),
            ("repetition_penalty", None, "number of at least 0.0"),
            ("repetition_penalty", [1.1], "number of at least 0.0"),
            ("min_tokens", None, "whole number of at least 0"),
            ("min_tokens", 1.0, "whole number of at least 0"),
            ("min_tokens", True, "whole number of at least 0"),
            ("logit_bias", [(1, 2.0)], "must map token ids to numbers"),
            ("logit_bias", "1", "must map token ids to numbers"),
            ("logit_bias", 1.0, "must map token ids to numbers"),
            ("allowed_token_ids", 5, "list of token ids"),
            ("allowed_token_ids", "12", "list of token ids"),
            ("allowed_token_ids", {1: 2}, "list of token ids"),
            ("bad_words", "word", "list of strings"),
            ("bad_words", b"word", "list of strings"),
            ("bad_words", 1, "list of strings"),
            ("bad_words", {"a": 1}, "list of strings"),
            ("logits_processors", len, "list of callables"),
            ("logits_processors", "len", "list of callables"),
            ("stop", 1, "list of strings"),
            ("stop", b"end", "list of strings"),
            ("stop", {"a": 1}, "list of strings"),
            ("stop_token_ids", 7, "list of token ids"),
            ("stop_token_ids", "7", "list of token ids"),
            ("logprobs", True, "whole number of at least -1"),
            ("logprobs", 5.0, "whole number of at least -1"),
            ("logprobs", "5", "whole number of at least -1"),
            ("prompt_logprobs", False, "whole number of at least -1"),
            ("prompt_logprobs", [5], "whole number of at least -1"),
            *((name, value, "True or False") for name in BOOLEANS for value in (0, 1, None, "yes")),
            ("seed", 1.0, "whole number from"),
            ("seed", "1", "whole number from"),
            ("seed", True, "whole number from"),
        ],
    )
    def test_of_the_wrong_type(self, field: str, value: Any, allowed: str) -> None:
        with pytest.raises(TypeError) as caught:
            SamplingParams(**{field: value})
        message = str(caught.value)
        assert message.startswith(f"{field} is {value!r}")
        assert f"must be a {allowed}" in message or f"must be {allowed}" in message or f"it {allowed}" in message

    @pytest.mark.parametrize(
        ("field", "value", "error", "message"),
        [
            ("logit_bias", {"3": 1.0, 3: 2.0}, ValueError, "logit_bias names token id 3 twice"),
            ("top_p", Decimal("sNaN"), ValueError, "top_p is sNaN; it must be a finite number from 0.0 to 1.0"),
            ("logit_bias", {3: 100.5}, ValueError, "logit_bias[3] is 100.5; it must be a finite number from -100.0 to"),
            ("logit_bias", {3: -101}, ValueError, "logit_bias[3] is -101; it must be a finite number from -100.0 to"),
            ("logit_bias", {3: math.nan}, ValueError, "logit_bias[3] is nan; it must be a finite number"),
            ("logit_bias", {3: "1"}, TypeError, "logit_bias[3] is '1' (str); it must be a number from -100.0 to 100.0"),
            ("logit_bias", {3: None}, TypeError, "logit_bias[3] is None (NoneType); it must be a number"),
            ("logit_bias", {-1: 1.0}, ValueError, "a token id of logit_bias is -1; it must be a whole number of at"),
            ("logit_bias", {1.5: 1.0}, TypeError, "a token id of logit_bias is 1.5 (float); it must be a whole number"),
            ("logit_bias", {"one": 1.0}, TypeError, "a token id of logit_bias is 'one' (str); it must be a whole"),
            ("logit_bias", {"-1": 1.0}, TypeError, "a token id of logit_bias is '-1' (str); it must be a whole number"),
            ("logit_bias", {True: 1.0}, TypeError, "a token id of logit_bias is True (bool); it must be a whole"),
            ("allowed_token_ids", [], ValueError, "allowed_token_ids is empty; name at least one token id, or None"),
            ("allowed_token_ids", [1, -1], ValueError, "allowed_token_ids[1] is -1; it must be a whole number of at"),
            ("allowed_token_ids", [1, "2"], TypeError, "allowed_token_ids[1] is '2' (str); it must be a whole number"),
            ("allowed_token_ids", [True], TypeError, "allowed_token_ids[0] is True (bool); it must be a whole number"),
            (
                "allowed_token_ids",
                np.array([0.5]),
                TypeError,
                "allowed_token_ids[0] is 0.5 (float); it must be a whole",
            ),
            ("stop_token_ids", [-2], ValueError, "stop_token_ids[0] is -2; it must be a whole number of at least 0"),
            ("stop_token_ids", [1, None], TypeError, "stop_token_ids[1] is None (NoneType); it must be a whole number"),
            ("stop_token_ids", [[1]], TypeError, "stop_token_ids[0] is [1] (list); it must be a whole number"),
            ("bad_words", ["a", 1], TypeError, "bad_words[1] is 1 (int); it must be a string"),
            ("bad_words", [""], ValueError, "bad_words[0] is empty; it must be a string of at least one character"),
            ("stop", ["a", b"b"], TypeError, "stop[1] is b'b' (bytes); it must be a string"),
            ("stop", ["a", ""], ValueError, "stop[1] is empty; it must be a string of at least one character"),
            ("stop", "", ValueError, "stop[0] is empty; it must be a string of at least one character"),
            ("logits_processors", [len, 5], TypeError, "logits_processors[1] is 5; it must be callable"),
            ("logits_processors", [None], TypeError, "logits_processors[0] is None; it must be callable"),
        ],
        ids=repr,
    )
    def test_wrong_items_are_named(self, field: str, value: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error) as caught:
            SamplingParams(**{field: value})
        assert str(caught.value).startswith(message)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5; it must be at most max_tokens, 4"),
            ({"min_tokens": 65}, "min_tokens is 65; it must be at most max_tokens, 64"),
            ({"stop": ["a"], "detokenize": False}, "stop needs detokenize=True"),
        ],
    )
    def test_what_contradicts_itself(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SamplingParams(**values)

    @pytest.mark.parametrize(
        "values",
        [
            {"temperature": 0},
            {"temperature": 5e-324},
            {"temperature": 1e308},
            {"temperature": np.float32(0.5)},
            {"top_k": -1},
            {"top_k": 10**6},
            {"top_k": np.int64(3)},
            {"top_p": 1e-300},
            {"top_p": 1},
            {"max_tokens": 1},
            {"max_tokens": None},
            {"ignore_eos": True},
            {"seed": 0},
            {"seed": -(2**63)},
            {"seed": 2**64 - 1},
            {"n": 1000},
            {"min_p": 0},
            {"min_p": 1},
            {"presence_penalty": -2, "frequency_penalty": 2},
            {"repetition_penalty": 1e-300},
            {"repetition_penalty": 1e300},
            {"logit_bias": {0: -100, 1: 100}},
            {"min_tokens": 64},
            {"min_tokens": 10**6, "max_tokens": None},
            {"logprobs": 0, "prompt_logprobs": 0},
            {"logprobs": -1, "prompt_logprobs": -1},
            {"temperature": Linear(1.0, 0.0, 10)},
        ],
        ids=str,
    )
    def test_the_edges_of_what_is_allowed(self, values: dict[str, Any]) -> None:
        params = SamplingParams(**values)
        for name, value in values.items():
            assert getattr(params, name) == value

    @pytest.mark.parametrize(
        ("field", "given", "kept"),
        [
            ("n", np.int8(3), 3),
            ("temperature", np.float32(0.5), 0.5),
            ("temperature", torch.tensor(0.5), 0.5),
            ("temperature", Fraction(1, 2), 0.5),
            ("temperature", 1, 1.0),
            ("top_k", np.array(7), 7),
            ("top_p", np.float16(0.5), 0.5),
            ("min_p", torch.tensor(0.25), 0.25),
            ("presence_penalty", np.int64(1), 1.0),
            ("frequency_penalty", np.float64(-1), -1.0),
            ("repetition_penalty", np.float32(1.5), 1.5),
            ("max_tokens", np.uint16(9), 9),
            ("min_tokens", np.int64(9), 9),
            ("logprobs", np.int64(0), 0),
            ("prompt_logprobs", torch.tensor(-1), -1),
            ("seed", np.uint64(2**64 - 1), 2**64 - 1),
            ("seed", -1, None),
            ("seed", np.int64(-1), None),
            ("ignore_eos", np.bool_(True), True),
            ("detokenize", torch.tensor(False), False),
            ("logit_bias", {np.int64(3): np.float32(0.5)}, {3: 0.5}),
            ("logit_bias", {"3": 1}, {3: 1.0}),  # JSON has no other keys
            ("logit_bias", {}, None),
            ("allowed_token_ids", np.array([3, 1]), (3, 1)),
            ("allowed_token_ids", torch.tensor([3, 1]), (3, 1)),
            ("allowed_token_ids", range(3), (0, 1, 2)),
            ("stop_token_ids", (token for token in [4, 5]), (4, 5)),
            ("stop_token_ids", [np.int32(4)], (4,)),
            ("stop_token_ids", [], ()),
            ("stop", "end", ("end",)),
            ("stop", ["end", "stop"], ("end", "stop")),
            ("stop", {"end"}, ("end",)),
            ("bad_words", ["no", "never"], ("no", "never")),
            ("logits_processors", [len], (len,)),
        ],
        ids=stable,
    )
    def test_values_of_any_kind_are_kept_as_pythons_own(self, field: str, given: Any, kept: Any) -> None:
        found = getattr(SamplingParams(**{field: given}), field)
        assert found == kept
        assert type(found) is type(kept)
        if isinstance(found, tuple):
            assert [type(item) for item in found] == [type(item) for item in kept]
        if isinstance(found, dict):
            assert [(type(token), type(bias)) for token, bias in found.items()] == [(int, float)]

    @pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids", "stop", "bad_words"])
    def test_what_was_given_can_be_changed_afterwards(self, field: str) -> None:
        given: Any = {1: 2.0} if field == "logit_bias" else ["a"] if field in ("stop", "bad_words") else [1]
        params = SamplingParams(**{field: given})
        before = copy.deepcopy(getattr(params, field))
        given.clear()
        assert getattr(params, field) == before


class TestCopies:
    """A SamplingParams can be copied, changed on the way, and sent to another process."""

    PARAMS = SamplingParams(
        n=2,
        temperature=Linear(1.0, 0.1, 8),
        logit_bias={1: 2.0},
        allowed_token_ids=[1, 2],
        bad_words=["no"],
        logits_processors=[max],
        stop="end",
        stop_token_ids=[3],
        seed=5,
        logprobs=3,
    )

    @pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda params: pickle.loads(pickle.dumps(params))])
    def test_are_equal_and_independent(self, make: Any) -> None:
        made = make(self.PARAMS)
        assert made is not self.PARAMS
        assert made == self.PARAMS
        made.n = 3
        assert self.PARAMS.n == 2

    def test_replace_changes_one_field_and_checks_it(self) -> None:
        changed = dataclasses.replace(self.PARAMS, n=3)
        assert changed.n == 3
        assert dataclasses.replace(changed, n=2) == self.PARAMS
        with pytest.raises(ValueError, match="n is 0"):
            dataclasses.replace(self.PARAMS, n=0)
        with pytest.raises(TypeError, match="did you mean 'temperature'"):
            dataclasses.replace(self.PARAMS, temp=0)

    def test_as_a_dictionary_and_back(self) -> None:
        params = dataclasses.replace(self.PARAMS, temperature=0.5)
        assert SamplingParams(**dataclasses.asdict(params)) == params
        assert SamplingParams(**OrderedDict(dataclasses.asdict(params))) == params


class TestVocabulary:
    """Ids that the model does not have are refused by ``generate``, before any work."""

    @pytest.fixture(scope="class")
    def llm(self, tiny_checkpoint: Path) -> LLM:
        return LLM(tiny_checkpoint, device="cpu", skip_tokenizer_init=True, num_kvcache_blocks=64)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("stop_token_ids", [3, 211]),
            ("allowed_token_ids", [3, 211]),
            ("logit_bias", {3: 1.0, 211: 1.0}),
        ],
    )
    def test_ids_outside_are_refused_by_name(self, llm: LLM, field: str, value: Any) -> None:
        good, bad = SamplingParams(max_tokens=1), SamplingParams(max_tokens=1, **{field: value})
        message = f"^{field} of prompt 1 has token id 211; the vocabulary has ids 0 to 210$"
        with pytest.raises(ValueError, match=message):
            llm.generate([[1], [2]], [good, bad], use_tqdm=False)
        with pytest.raises(ValueError, match=f"^{field} of the prompt has token id 211"):
            llm.generate([1, 2], bad, use_tqdm=False)
        assert not llm.engine.has_unfinished_requests

    @pytest.mark.parametrize(
        ("field", "value"), [("stop_token_ids", [210]), ("allowed_token_ids", [210]), ("logit_bias", {210: 1.0})]
    )
    def test_the_last_id_is_inside(self, llm: LLM, field: str, value: Any) -> None:
        [output] = llm.generate([1, 2], SamplingParams(max_tokens=1, **{field: value}), use_tqdm=False)
        assert len(output["token_ids"]) == 1

    @pytest.mark.parametrize("field", ["stop", "bad_words"])
    def test_words_need_a_tokenizer(self, llm: LLM, field: str) -> None:
        with pytest.raises(ValueError, match=f"^{field} of the prompt needs a tokenizer, .* skip_tokenizer_init=True"):
            llm.generate([1, 2], SamplingParams(max_tokens=1, **{field: ["word"]}), use_tqdm=False)


class TestCheckpointDefaults:
    """generate(sampling_params=None) takes the checkpoint's generation_config.json."""

    @pytest.mark.parametrize(
        ("generation_config", "expected"),
        [
            ({}, SamplingParams()),
            (
                {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [7, 8]},
                SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
            ),
            ({"temperature": None, "top_k": None, "top_p": 0.5}, SamplingParams(top_p=0.5)),
            ({"temperature": 0}, SamplingParams(temperature=0)),
            ({"do_sample": False, "temperature": 0.6}, SamplingParams(temperature=0)),
            ({"max_new_tokens": 5}, SamplingParams(max_tokens=5)),
            (
                {"min_new_tokens": 2, "repetition_penalty": 1.05, "min_p": 0.1},
                SamplingParams(repetition_penalty=1.05, min_p=0.1),  # as vLLM: a least length is not inherited
            ),
        ],
    )
    def test_from_generation_config(self, generation_config: dict[str, Any], expected: SamplingParams) -> None:
        assert SamplingParams.from_generation_config(generation_config) == expected

    def test_nonsense_in_the_file_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"top_p is 1\.5"):
            SamplingParams.from_generation_config({"top_p": 1.5})

    @pytest.fixture
    def checkpoint(self, tiny_checkpoint: Path, tmp_path: Path) -> Path:
        path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
        defaults = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [5, 6]}
        defaults["max_new_tokens"] = 16
        (path / "generation_config.json").write_text(json.dumps(defaults))
        return path

    def test_generate_without_parameters_uses_them(self, checkpoint: Path) -> None:
        prompts = [[1, 2, 3], [4, 5], [6] * 20]
        explicit = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, max_tokens=16)

        def texts(params: Any) -> list[list[int]]:
            with LLM(checkpoint, device="cpu", skip_tokenizer_init=True, num_kvcache_blocks=64) as llm:
                assert llm.engine.default_params == explicit
                return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]

        assert texts(None) == texts(explicit) == texts([None, explicit, None])
        assert texts(None) != texts(SamplingParams(max_tokens=16))

    def test_explicit_parameters_inherit_only_the_end_of_sequence_ids(self, checkpoint: Path) -> None:
        with LLM(checkpoint, device="cpu", skip_tokenizer_init=True, num_kvcache_blocks=64) as llm:
            assert llm.engine.model_config.eos_token_ids == (5, 6)
            params = SamplingParams(temperature=8.0, max_tokens=100)
            outputs = llm.generate([[1, 2]] * 16, params, use_tqdm=False)
            ends = {output["token_ids"][-1] for output in outputs if output.outputs[0].finish_reason == "stop"}
            assert ends == {5, 6}
            assert len({token for output in outputs for token in output["token_ids"]}) > 100  # no top_k
