"""Where a model runs, and in which dtype."""

import logging
import os

import torch

from nanovllm.layers.product import has_fast_bfloat16
from nanovllm.utils.loader import checkpoint_dtype
from nanovllm.utils.model_config import ModelConfig

logger = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is CUDA, else MPS, else the CPU. ValueError if this machine lacks it."""
    has_cuda = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    kind = name.split(":")[0]
    if kind == "cuda" and not has_cuda:
        raise ValueError(f"device is {name!r}, but {why_no_cuda()}, or use device='cpu'")
    if kind == "mps" and not has_mps:
        raise ValueError(f"device is {name!r}, but torch {torch.__version__} finds none here; use device='cpu'")
    device = torch.device(name)
    if kind == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but there are {torch.cuda.device_count()} CUDA devices, from cuda:0")
    if kind == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def why_no_cuda() -> str:
    """Why torch finds no CUDA device, and what to do about it."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} was built without CUDA; install a build for CUDA (pytorch.org has the command "
            "for this machine)"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        f"torch {torch.__version__} sees no GPU; see that nvidia-smi lists one and that its driver is new enough for "
        f"CUDA {torch.version.cuda}" + ("" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})")
    )


def resolve_dtype(name: str, model_config: ModelConfig, device: torch.device) -> torch.dtype:
    """The torch dtype for ``name`` on ``device``; ValueError if it cannot be had.

    "auto" is the checkpoint's, unless that is bfloat16 and the device has none (MPS before macOS 14: float16) or
    multiplies it so slowly that float32 is faster (a CPU without AVX-512 or AMX).
    """
    lacks_bfloat16 = device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0)
    if name == "auto":
        name = model_config.dtype or checkpoint_dtype(model_config.path)
        name = str(name).removeprefix("torch.")
        if name not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"the checkpoint's dtype is {name!r}; pass dtype='bfloat16', 'float16' or 'float32'")
        if name == "bfloat16" and lacks_bfloat16:
            name = "float16"
            logger.warning(
                "the checkpoint's dtype is bfloat16, which MPS has from macOS 14 on: float16 is used, whose largest "
                "number is 65,504 (dtype='float32' is safe, and takes twice the memory)"
            )
        if name == "bfloat16" and device.type == "cpu" and not has_fast_bfloat16():
            name = "float32"
            logger.info("dtype auto is float32: this CPU multiplies bfloat16 slowly")
    elif name == "bfloat16" and lacks_bfloat16:
        raise ValueError("dtype is 'bfloat16', which MPS has from macOS 14 on; pass 'float16' or 'float32'")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
