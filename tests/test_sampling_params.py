"""SamplingParams: what is allowed, what is said about the rest, and what a checkpoint's own defaults are."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM, SamplingParams
from tests.threads import one_thread  # noqa: F401


class TestDefaults:
    """As documented, and fixed once made."""

    def test_values(self) -> None:
        assert SamplingParams() == SamplingParams(
            temperature=1.0, top_k=0, top_p=1.0, max_tokens=64, ignore_eos=False, seed=None
        )

    def test_frozen(self) -> None:
        params = SamplingParams()
        for field in dataclasses.fields(params):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(params, field.name, 1)

    def test_names_are_required(self) -> None:
        with pytest.raises(TypeError, match="positional"):
            SamplingParams(0.5)  # type: ignore[misc]

    def test_unknown_names_are_refused(self) -> None:
        with pytest.raises(TypeError, match="temprature"):
            SamplingParams(temprature=0.5)  # type: ignore[call-arg]


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
        assert f"must be a {allowed}" in message or f"must be {allowed}" in message

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
        ],
        ids=str,
    )
    def test_the_edges_of_what_is_allowed(self, values: dict[str, Any]) -> None:
        params = SamplingParams(**values)
        for name, value in values.items():
            assert getattr(params, name) == value


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
