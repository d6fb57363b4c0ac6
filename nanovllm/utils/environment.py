"""What a measurement was taken on: versions and hardware."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from nanovllm.version import __version__


def checkout() -> Path | None:
    """The git checkout whose ``nanovllm`` this is; None for an installed one, even if that lies within a checkout."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / ".git").exists() else None


def versions() -> dict[str, str | None]:
    """Of this package, its commit (None outside of a checkout), Python, torch and transformers."""
    here = checkout()
    return {
        "nanovllm": __version__,
        "commit": _output_of("git", "-C", str(here), "rev-parse", "--short=10", "HEAD") if here else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def hardware() -> dict[str, Any]:
    """The processor, its cores and memory (bytes), and the accelerators."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        "gpus": gpus or (["Apple MPS"] if torch.backends.mps.is_available() else []),
    }


def _cpu_model() -> str:
    name = None
    if sys.platform == "darwin":
        name = _output_of("sysctl", "-n", "machdep.cpu.brand_string")
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    return name or platform.processor() or platform.machine()


def _output_of(*command: str) -> str | None:
    """What the command prints, or None if it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
