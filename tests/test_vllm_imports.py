"""What is told of a name of vLLM's that is imported, and is not there."""

from importlib import import_module

import pytest

from nanovllm.utils.vllm_imports import NAMES


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("nanovllm", "AsyncLLMEngine", r"no asyncio interface; .* await asyncio\.to_thread\(llm\.generate"),
        ("nanovllm", "LLMEngine", r"its engine is llm\.engine"),
        ("nanovllm", "StreamOutput", r"it is in nanovllm\.outputs"),
        ("nanovllm", "TokensPrompt", "pass {'prompt_token_ids'"),
        ("nanovllm.sampling_params", "StructuredOutputsParams", r"examples/structured_output\.py"),
        ("nanovllm.sampling_params", "BeamSearchParams", "there is no beam search"),
    ],
)
def test_an_import_of_what_is_not_there_is_told_what_is(module: str, name: str, message: str) -> None:
    with pytest.raises(ImportError, match=f"cannot import name '{name}' from '{module}': .*{message}"):
        exec(f"from {module} import SamplingParams, {name}")
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute '{name}': .*{message}"):
        getattr(import_module(module), name)
    assert not hasattr(import_module(module), name)


def test_an_import_of_any_other_name_says_what_python_says() -> None:
    with pytest.raises(ImportError, match=r"cannot import name 'Llm' from 'nanovllm' \("):
        exec("from nanovllm import Llm")
    with pytest.raises(AttributeError, match=r"module 'nanovllm' has no attribute 'Llm'$"):
        _ = import_module("nanovllm").Llm


def test_what_is_said_of_imports_is_true() -> None:
    for module, names in NAMES.items():
        assert not names.keys() & set(dir(import_module(module)))
        for name, instead in names.items():
            if instead.startswith("it is in "):
                assert hasattr(import_module(instead.removeprefix("it is in ")), name)
    assert hasattr(import_module("nanovllm.models.registry"), "MODELS")
    assert hasattr(import_module("nanovllm.engine.llm_engine"), "LLMEngine")
