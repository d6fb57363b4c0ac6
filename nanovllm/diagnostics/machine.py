"""What nanovllm finds on this machine: versions, devices, and what works on them, or why it does not."""

import os
import shutil
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nanovllm import kernels
from nanovllm.attention import BACKENDS, AttentionSpec
from nanovllm.engine.placement import why_no_cuda
from nanovllm.layers.product import Int8Weight, OneDnnWeight, TiledWeight, has_fast_bfloat16
from nanovllm.utils import threads
from nanovllm.utils.cgroups import cpu_quota, memory_left
from nanovllm.utils.environment import hardware, versions
from nanovllm.utils.memory import available_cpu_memory, free_memory
from nanovllm.utils.random_shapes import default_cache

PACKAGES = (
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "numba",
    "llvmlite",
    "triton",
    "flash-attn",
    "psutil",
    "xxhash",
)
# What changes what nanovllm, or the libraries below it, do. Others that begin with NANOVLLM_ are shown too.
VARIABLES = (
    "CC",
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "MKL_NUM_THREADS",
    "NUMBA_CPU_FEATURES",
    "NUMBA_CPU_NAME",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
    "XDG_CACHE_HOME",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The attention that backends are asked about: that of Qwen3-0.6B.
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 28, 16, 8, 128


def machine_report() -> dict[str, Any]:
    """Everything that decides how nanovllm runs here, as plain values for JSON."""
    machine, found, left = hardware(), versions(), memory_left()
    return {
        "versions": {
            "nanovllm": found["nanovllm"],
            "commit": found["commit"],
            "python": found["python"],
            "torch": found["torch"],
            **{name: _version(name) for name in PACKAGES},
        },
        "system": {
            "platform": machine["platform"],
            "cpu": machine["cpu"],
            "cores": machine["cores"],
            "logical_cpus": machine["threads"],
        },
        "memory": {
            "total_bytes": machine["ram_bytes"],
            "available_bytes": available_cpu_memory(),
            "control_group_left_bytes": left if left is not None and left < machine["ram_bytes"] else None,
        },
        "threads": _threads(),
        "devices": {str(device): _device(device) for device in _devices()},
        "missing_devices": _missing_devices(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in VARIABLES or name.startswith("NANOVLLM_")
        },
        "caches": _caches(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[torch.device]:
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return [*found, torch.device("cpu")]


def _missing_devices() -> dict[str, str]:
    """Why there is no device of a kind."""
    missing = {}
    if not torch.cuda.is_available():
        missing["cuda"] = why_no_cuda()
    if not torch.backends.mps.is_available():
        built = "" if torch.backends.mps.is_built() else ", and torch was built without it"
        missing["mps"] = f"it is for Macs with Apple silicon{built}"
    return missing


# ---- threads


def _threads() -> dict[str, Any]:
    """How many threads a step on the CPU has, and what decides that."""
    cpus, quota = threads.allowed_cpus(), cpu_quota()
    sockets = threads.cores_by_socket(cpus)
    limit = threads.ThreadLimit()
    chosen, current = limit.num_threads(), torch.get_num_threads()
    given = [f"{name}={os.environ[name]}" for name in threads.VARIABLES if os.environ.get(name)]
    if given:
        why = f"{' and '.join(given)} says so"
    elif not torch.backends.openmp.is_available():
        why = "torch's own number: this build has no OpenMP, and its threads cannot be resized"
    elif chosen == current and chosen != threads.best_threads(cpus):
        why = "torch.set_num_threads, or another of torch's own settings, says so"
    else:
        mask = "all" if cpus is None or len(cpus) == os.cpu_count() else str(len(cpus))
        usable = f"the process may use {mask} of {os.cpu_count()} logical CPUs"
        why = f"there are {sockets[0]} physical cores in one socket, and {usable}"
        if quota is not None:
            why += f"; control groups allow {quota:g} CPUs"
        if chosen < threads.best_threads(cpus):
            why += f"; torch uses {current}"
    return {
        "in_a_step": chosen,
        "why": why,
        "torch": current,
        "allowed_cpus": None if cpus is None else len(cpus),
        "cores_by_socket": sockets,
        "cpu_quota": quota,
    }


# ---- devices


def _device(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"name": _name(device), "memory": _memory(device), **_dtypes(device)}
    found["attention"] = {
        name: {dtype: _why_not(name, device, getattr(torch, dtype)) for dtype in map(_dtype_name, DTYPES)}
        for name in BACKENDS
    }
    found["kernels"] = _cpu_kernels() if device.type == "cpu" else _gpu_kernels(device)
    found["int8"] = {_dtype_name(dtype): _reason(lambda d=dtype: Int8Weight.why_not(d, device)) for dtype in DTYPES}
    return found


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    return "Apple MPS" if device.type == "mps" else hardware()["cpu"]


def _memory(device: torch.device) -> dict[str, int]:
    found = {"free_bytes": free_memory(device)}
    if device.type == "cuda":
        found["total_bytes"] = torch.cuda.mem_get_info(device)[1]
    return found


def _dtypes(device: torch.device) -> dict[str, Any]:
    """The dtypes that are fast, and why the others are not."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return {
                "fast_dtypes": ["bfloat16", "float16"],
                "dtype_note": "float32 takes twice the memory and more time",
            }
        return {"fast_dtypes": ["float16"], "dtype_note": "bfloat16 is fast from compute capability 8.0 on"}
    if device.type == "mps":
        if torch.backends.mps.is_macos_or_newer(14, 0):
            return {"fast_dtypes": ["bfloat16", "float16"], "dtype_note": "float32 takes twice the memory"}
        return {"fast_dtypes": ["float16"], "dtype_note": "bfloat16 is there from macOS 14 on"}
    if has_fast_bfloat16():
        note = "float32 takes twice the memory and more time; float16 has no kernels of ours"
        return {"fast_dtypes": ["bfloat16"], "dtype_note": note}
    note = "this CPU multiplies bfloat16 slowly (AVX-512 or AMX would be fast), so dtype auto takes float32 instead"
    return {"fast_dtypes": ["float32"], "dtype_note": note}


def _why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    spec = AttentionSpec(LAYERS, HEADS, KV_HEADS, HEAD_DIM, dtype, device)
    return _reason(lambda: BACKENDS[backend].why_not(spec))


def _reason(why_not: Any) -> str | None:
    """What a question why something does not work answers; what it raises is an answer, too."""
    try:
        return why_not()
    except Exception as error:  # this is to tell of what is broken, not to break on it
        return f"{type(error).__name__}: {error}"


def _cpu_kernels() -> dict[str, Any]:
    """Our kernels on the CPU, and who multiplies by bfloat16 weights."""
    why_not = _reason(kernels.why_no_cpu_kernels)
    found: dict[str, Any] = {"numba": why_not}
    if why_not is None:
        from nanovllm.kernels.cpu import vectors  # needs numba

        names = ("AVX512", "BF16_PRODUCTS", "AMX", "INT8_PRODUCTS")
        found["features"] = {name.lower(): bool(getattr(vectors, f"HAS_{name}")) for name in names}
        found["compiled_for"] = vectors.TARGET[1]
    weight = torch.zeros(16, 16, dtype=torch.bfloat16)
    suited = [kind.__name__ for kind in (TiledWeight, OneDnnWeight) if kind.suits(weight)]
    names_of = {"TiledWeight": "our own kernel", "OneDnnWeight": "oneDNN, weights packed"}
    found["bfloat16_products"] = names_of[suited[0]] if suited else "torch's operators"
    return found


def _gpu_kernels(device: torch.device) -> dict[str, Any]:
    """Our kernels on a GPU."""
    found: dict[str, Any] = {"triton": _reason(lambda: kernels.why_no_triton(device))}
    if device.type == "cuda":
        found["c_compiler"] = os.environ.get("CC") or next(
            filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None
        )
    return found


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- caches


def _caches() -> dict[str, Any]:
    """Where files are kept between processes; None where nothing is kept."""
    compiled = None
    if _reason(kernels.why_no_cpu_kernels) is None:
        from nanovllm.kernels.cpu.compilation import cache_directory

        compiled = cache_directory()
    triton = os.environ.get("TRITON_CACHE_DIR") or str(Path("~/.triton/cache").expanduser())
    return {
        "cpu_kernels": compiled,
        "random_weights": str(default_cache()),
        "triton_kernels": triton if _version("triton") else None,
        "huggingface": _reason(lambda: str(import_module("huggingface_hub.constants").HF_HUB_CACHE)),
    }
