"""What a checkpoint holds, how the engine understands it, and what is wrong with it."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.diagnostics.inspect.chat import inspect_chat
from nanovllm.diagnostics.inspect.configuration import inspect_config, read_config
from nanovllm.diagnostics.inspect.findings import Findings, Problem
from nanovllm.diagnostics.inspect.memory import inspect_memory
from nanovllm.diagnostics.inspect.parameters import inspect_parameters, read_headers
from nanovllm.diagnostics.inspect.support import inspect_support
from nanovllm.diagnostics.inspect.tokens import inspect_tokenizer, read_tokenizer
from nanovllm.engine.placement import resolve_device, resolve_dtype
from nanovllm.utils.model_config import ModelConfig

__all__ = ["SECTIONS", "Inspection", "Problem", "inspect_checkpoint"]

SECTIONS = ("config", "support", "parameters", "memory", "tokenizer", "chat")


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found.

    Args:
        model: The checkpoint's directory.
        sections: What was looked at, in the order of ``SECTIONS``: for each section its dataclass
            (``nanovllm.diagnostics.inspect.parameters.ParametersSection`` and so on), or None where a problem left
            nothing to show.
        findings: Problems and notes.
    """

    model: str
    sections: dict[str, Any]
    findings: Findings

    @property
    def problems(self) -> list[Problem]:
        """What is wrong; empty if nothing is."""
        return self.findings.problems

    def to_json(self) -> dict[str, Any]:
        """All of it in what JSON has; text a JSON file cannot hold is left as it is."""
        return {
            "model": self.model,
            "sections": {
                name: None if section is None else dataclasses.asdict(section)
                for name, section in self.sections.items()
            },
            "notes": [{"section": section, "message": message} for section, message in self.findings.notes],
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
        }


def inspect_checkpoint(
    model: str | os.PathLike[str],
    sections: Sequence[str] | None = None,
    *,
    statistics: bool = True,
    **arguments: Any,
) -> Inspection:
    """Look at a checkpoint without loading it; tensors are read one after another, a piece at a time.

    Args:
        model: Its directory.
        sections: Which of ``SECTIONS`` to look at; all by default. Only what they look at can be a problem.
        statistics: Whether to read the tensors; otherwise only their names, dtypes and shapes.
        arguments: Those of :class:`nanovllm.LLM`, such as ``device``, ``dtype`` and ``max_model_len``, for an engine
            that is made so.

    Raises:
        TypeError: An argument is unknown or of the wrong type.
        ValueError: A section or an argument's value is unknown, or this machine has no such device.
        FileNotFoundError: The directory has no config.json.
    """
    chosen = SECTIONS if sections is None else tuple(sections)
    for name in chosen:
        if name not in SECTIONS:
            raise ValueError(f"section is {name!r}; choose from {', '.join(SECTIONS)}")
    config = EngineConfig.from_arguments(model, **arguments)
    device = resolve_device(config.device)
    findings = Findings()
    model_config = read_config(config, findings)
    found: dict[str, Any] = {}
    if "config" in chosen:
        found["config"] = inspect_config(config, model_config, findings)
    if "support" in chosen:
        found["support"] = inspect_support(config, model_config, findings)
    weights = None
    if "parameters" in chosen:
        dtype = _dtype(config, model_config, device)
        weights = found["parameters"] = inspect_parameters(config, model_config, findings, dtype, statistics=statistics)
    if "memory" in chosen:
        found["memory"] = inspect_memory(config, model_config, findings)
    if "tokenizer" in chosen or "chat" in chosen:
        tokenizer = read_tokenizer(config, findings)
        if "tokenizer" in chosen:
            weights = weights or read_headers(config.model, Findings())
            found["tokenizer"] = inspect_tokenizer(config, model_config, tokenizer, weights, findings)
        if "chat" in chosen:
            found["chat"] = inspect_chat(model_config, tokenizer, findings)
    return Inspection(config.model, found, findings)


def _dtype(config: EngineConfig, model: ModelConfig | None, device: torch.device) -> torch.dtype | None:
    """What the weights would be held in; None if that cannot be told."""
    if model is None:
        return None
    try:
        return resolve_dtype(config.dtype, model, device)
    except (ValueError, OSError):  # which the section "support" tells
        return None
