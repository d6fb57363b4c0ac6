"""nanovllm: offline inference of language models, in process, from Python.

>>> from nanovllm import LLM, SamplingParams
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nanovllm.utils.logging import configure_logging
from nanovllm.utils.openmp import spin_briefly
from nanovllm.version import __version__

if TYPE_CHECKING:
    from nanovllm.errors import EngineDeadError
    from nanovllm.llm import LLM
    from nanovllm.outputs import CompletionOutput, RequestOutput
    from nanovllm.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "EngineDeadError", "RequestOutput", "SamplingParams", "__version__"]

configure_logging()
spin_briefly()

# Imported when they are first asked for: torch takes a second, and help, a version or a mistake needs none of it.
_HOMES = {
    "LLM": "nanovllm.llm",
    "CompletionOutput": "nanovllm.outputs",
    "EngineDeadError": "nanovllm.errors",
    "RequestOutput": "nanovllm.outputs",
    "SamplingParams": "nanovllm.sampling_params",
}

if not TYPE_CHECKING:  # a type checker that saw it would let every name pass

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            from nanovllm.utils.vllm_imports import missing_name

            raise missing_name(__name__, name)
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
