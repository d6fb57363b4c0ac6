"""Kernels: Triton's, an operation a file, each beside its torch reference of the same signature; the CPU's in ``cpu/``.

Triton is imported only when a kernel is loaded, so that the package imports on machines that have none. Whatever the
kernels do, the layers also do with torch's operators: ``load`` answers None where those are to be used.
"""

import logging
import math
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from nanovllm.utils.garbage import collection_paused

logger = logging.getLogger(__name__)

# What is not to be used, to see what it is worth, or whether it is to blame. (Attention: ``attention_backend``.)
DISABLE_VARIABLE = "NANOVLLM_DISABLE"
FEATURES = (
    "rms_norm",
    "silu_and_mul",
    "qk_norm_rope_store",
    "fused_linear",
    "decode_few_rows",
    "decode_inputs",
    "decode_outputs",
    "sample",
    "nucleus",
    "graphs",
    "overlap",
)
# e^x is 2^(x log2 e), and 2^x is what processors compute.
LOG2_E = math.log2(math.e)
# Rows up to which a step is a matter of reading weights, and has kernels of its own (``fused_linear``,
# ``decode_few_rows``).
FEW_ROWS = 4
# Of what a program has in shared memory at a time: GPUs have 99 KiB of it, or more, and something else needs some.
MOST_TILE_BYTES = 64 << 10
# A name for several.
GROUPS = {"batch_state": ("decode_inputs", "decode_outputs"), "few_rows": ("fused_linear", "decode_few_rows")}

# Kernels there are for the CPU, and the dtypes they are for. (Attention: the backend ``cpu``.)
CPU_ONLY = ("linear", "embedding", "block_sums")
CPU_KERNELS = ("rms_norm", "silu_and_mul", "qk_norm_rope_store", *CPU_ONLY)
CPU_DTYPES = (torch.bfloat16, torch.float32)


def is_enabled(feature: str) -> bool:
    """Whether the environment does not switch ``feature`` off; ValueError if it names one that there is not."""
    disabled = feature_names(os.environ.get(DISABLE_VARIABLE, ""), DISABLE_VARIABLE)
    return not any(feature in GROUPS.get(name, (name,)) for name in disabled)


def feature_names(text: str, where: str) -> list[str]:
    """What ``text`` names to be switched off; ValueError, which says ``where`` it stands, for what there is not."""
    names = text.replace(",", " ").split()
    known = dict.fromkeys((*FEATURES, *CPU_KERNELS, *GROUPS))
    for name in names:
        if name not in known:
            raise ValueError(f"{where} names {name!r}; it may name {', '.join(known)}")
    return names


def is_interpreted() -> bool:
    """Whether Triton's interpreter is asked for, which runs kernels on the CPU (slowly: for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def why_no_triton(device: torch.device) -> str | None:
    """Why our kernels cannot run on a device; None if they can."""
    interprets = device.type == "cpu" and is_interpreted()
    if device.type != "cuda" and not interprets:  # said first: no package would help
        return f"triton has no kernels for {device.type}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if interprets:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return (
            f"the kernels need compute capability 8.0 (Ampere) or newer; {device} has {capability[0]}.{capability[1]}"
        )
    try:
        import_module("nanovllm.kernels.probe").probe(device)
    except Exception as error:  # no C compiler, no headers of Python, a driver that is too old, ...
        return f"triton cannot launch a kernel here: {type(error).__name__}: {error}"
    return None


def why_not_fused(device: torch.device) -> str | None:
    """Why torch's operators must do the work of our kernels on a CUDA device; None on others, which have none."""
    return why_no_triton(device) if device.type == "cuda" else None


@cache
def why_no_cpu_kernels() -> str | None:
    """Why our kernels cannot run on the CPU; None if they can."""
    if find_spec("numba") is None:
        return "the package numba is not installed"
    try:
        with collection_paused():  # numba has very many objects
            import_module("nanovllm.kernels.cpu.rms_norm")
            import_module("nanovllm.kernels.cpu.linear").product_kernel(False)  # the most demanding of the compiler
            import_module("nanovllm.kernels.cpu.compilation").finish_compiling()
    except Exception as error:  # a numba that is too old or does not go with numpy, a processor it does not know, ...
        return f"numba cannot compile a kernel here: {type(error).__name__}: {error}"
    return None


def finish_compiling(device: torch.device) -> None:
    """Wait for the kernels that were loaded for ``device``: those of the CPU are compiled in the background."""
    if device.type == "cpu" and why_no_cpu_kernels() is None:
        import_module("nanovllm.kernels.cpu.compilation").finish_compiling()


def load(name: str, device: torch.device, dtype: torch.dtype | None = None) -> Callable[..., Any] | None:
    """The function ``name`` of a kernel for ``device``; None where torch's operators are to be used instead.

    On CUDA that of ``kernels/<name>.py``, on the CPU that of ``kernels/cpu/<name>.py``, which is for some dtypes only.
    """
    if not is_enabled(name):
        return None
    if device.type == "cuda" and name not in CPU_ONLY and why_no_triton(device) is None:
        return getattr(import_module(f"nanovllm.kernels.{name}"), name)
    if device.type == "cpu" and name in CPU_KERNELS and dtype in CPU_DTYPES and why_no_cpu_kernels() is None:
        return getattr(import_module(f"nanovllm.kernels.cpu.{name}"), name)
    return None


def load_or_reference(name: str, device: torch.device) -> Callable[..., Any]:
    """The function ``name`` of ``kernels/<name>.py``, or its torch reference; Triton must be installed for either."""
    module = import_module(f"nanovllm.kernels.{name}")
    return load(name, device) or getattr(module, f"{name}_reference")
