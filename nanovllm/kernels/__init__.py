"""Triton kernels, an operation a file, each beside its plain torch reference of the same signature.

Triton is imported only when a kernel is loaded, so that the package imports on machines that have none. Whatever the
kernels do, the layers also do with torch's operators: ``load`` answers None where those are to be used.
"""

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Names of kernels, and "graphs" and "overlap": what is not to be used, to see what it is worth, or whether it is wrong.
DISABLE_VARIABLE = "NANOVLLM_DISABLE"


def is_enabled(feature: str) -> bool:
    """Whether the environment does not switch ``feature`` off."""
    return feature not in os.environ.get(DISABLE_VARIABLE, "").replace(",", " ").split()


def is_interpreted() -> bool:
    """Whether Triton's interpreter is asked for, which runs kernels on the CPU (slowly: for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def why_no_triton(device_type: str) -> str | None:
    """Why Triton kernels cannot run on a kind of device; None if they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and is_interpreted()):
        return None
    return f"triton has no kernels for {device_type}"


def load(name: str, device: torch.device) -> Callable[..., Any] | None:
    """The function ``name`` of ``kernels/<name>.py``; None where torch's operators are to be used instead."""
    if not is_enabled(name) or device.type != "cuda" or why_no_triton(device.type) is not None:
        return None
    return getattr(import_module(f"nanovllm.kernels.{name}"), name)


def load_or_reference(name: str, device: torch.device) -> Callable[..., Any]:
    """The function ``name`` of ``kernels/<name>.py``, or its torch reference; Triton must be installed for either."""
    module = import_module(f"nanovllm.kernels.{name}")
    return load(name, device) or getattr(module, f"{name}_reference")
