"""Names that are imported of vLLM's modules and that ours lack: who asks for one is told what there is instead."""

import dis
import sys
from types import FrameType

from nanovllm.utils.vllm_arguments import ATTRIBUTES, NO_POOLING, STRUCTURED

_THREADS = (
    "there is no asyncio interface; calls from several threads share an LLM's steps: await "
    "asyncio.to_thread(llm.generate, prompt, params), and llm.stream in a thread gives text as it comes"
)
_ARGUMENTS = "pass its arguments to LLM(...)"
# By module and name, what to do instead.
NAMES: dict[str, dict[str, str]] = {
    "nanovllm": {
        "AsyncEngineArgs": f"{_ARGUMENTS}; {_THREADS}",
        "AsyncLLMEngine": _THREADS,
        "ClassificationRequestOutput": NO_POOLING,
        "DEMO_MODEL_PATH": "it is in nanovllm.demo",
        "EmbeddingRequestOutput": NO_POOLING,
        "EngineArgs": _ARGUMENTS,
        "LLMEngine": "make an LLM; its engine is llm.engine, a nanovllm.engine.llm_engine.LLMEngine",
        "Logprob": "it is in nanovllm.outputs",
        "ModelRegistry": "it is the dictionary nanovllm.models.registry.MODELS",
        "PoolingOutput": NO_POOLING,
        "PoolingParams": NO_POOLING,
        "PoolingRequestOutput": NO_POOLING,
        "ScoreOutput": "it is in nanovllm.outputs",
        "ScoringRequestOutput": NO_POOLING,
        "StreamOutput": "it is in nanovllm.outputs",
        "TextPrompt": "it is a dictionary here: pass {'prompt': '...'}, or the text itself",
        "TokensPrompt": "it is a dictionary here: pass {'prompt_token_ids': [...]}, or the list of token ids itself",
        "run_batch": "it is in nanovllm.batch",
    },
    "nanovllm.sampling_params": {
        "BeamSearchParams": ATTRIBUTES["beam_search"],
        "GuidedDecodingParams": STRUCTURED,
        "RequestOutputKind": "generate gives whole outputs, and stream new pieces",
        "StructuredOutputsParams": STRUCTURED,
    },
}


def missing_name(module: str, name: str) -> AttributeError | ImportError:
    """What a module's ``__getattr__`` is to raise for a name that it lacks.

    An import puts its own message in place of an AttributeError's, so that it is an ImportError there; ``hasattr`` and
    ``getattr`` want an AttributeError.
    """
    instead = NAMES[module].get(name)
    asking = sys._getframe(2)
    if instead is not None and _imports(asking):
        return ImportError(f"cannot import name {name!r} from {module!r}: {instead}", name=name)
    told = "" if instead is None else f": {instead}"
    return AttributeError(f"module {module!r} has no attribute {name!r}{told}")


def _imports(frame: FrameType) -> bool:
    """Whether the frame is at an import statement that takes a name out of a module."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] == "IMPORT_FROM"
