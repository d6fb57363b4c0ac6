"""Which class runs which architecture."""

from importlib import import_module
from typing import Any

# architecture named in config.json -> (module, class)
MODELS: dict[str, tuple[str, str]] = {
    "Qwen3ForCausalLM": ("nanovllm.models.qwen3", "Qwen3ForCausalLM"),
}


def get_model_class(architecture: str) -> Any:
    """The class for an architecture; ValueError listing the supported ones for any other."""
    if architecture not in MODELS:
        raise ValueError(
            f"architecture {architecture!r} (config.json, architectures) is not supported; "
            f"supported: {', '.join(MODELS)}"
        )
    module, name = MODELS[architecture]
    return getattr(import_module(module), name)
