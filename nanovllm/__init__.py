"""nanovllm: offline inference of language models, in process, from Python.

>>> from nanovllm import LLM, SamplingParams
"""

from nanovllm.utils.logging import configure_logging
from nanovllm.version import __version__

configure_logging()

from nanovllm.errors import EngineDeadError  # noqa: E402
from nanovllm.llm import LLM  # noqa: E402  (logging is configured first)
from nanovllm.outputs import CompletionOutput, RequestOutput  # noqa: E402
from nanovllm.sampling_params import SamplingParams  # noqa: E402

__all__ = ["LLM", "CompletionOutput", "EngineDeadError", "RequestOutput", "SamplingParams", "__version__"]
