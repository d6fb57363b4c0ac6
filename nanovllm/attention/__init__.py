"""Attention backends behind one interface, and the choice among them."""

import logging

from nanovllm.attention.base import AttentionBackend, AttentionSpec
from nanovllm.attention.cpu import CpuAttention
from nanovllm.attention.flash_attn import FlashAttention
from nanovllm.attention.matmul import MatmulAttention
from nanovllm.attention.triton import TritonAttention

__all__ = ["BACKENDS", "AttentionBackend", "AttentionSpec", "select_backend"]

logger = logging.getLogger(__name__)

# In the order in which "auto" tries them.
BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (TritonAttention, FlashAttention, CpuAttention, MatmulAttention)
}
# (Without a GPU, Triton's kernels could only be interpreted, which is to be asked for by name.)
_CANDIDATES = {
    "cuda": [TritonAttention.name, FlashAttention.name, MatmulAttention.name],
    "cpu": [CpuAttention.name, MatmulAttention.name],
}


def select_backend(name: str, spec: AttentionSpec) -> type[AttentionBackend]:
    """The backend called ``name``, or for "auto" the first that can serve ``spec``.

    Raises:
        ValueError: There is no such backend, or it (with "auto": each) cannot, with the reason.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention_backend is {name!r}; use auto, {', '.join(BACKENDS)}")
    names = [name] if name != "auto" else _CANDIDATES.get(spec.device.type, [MatmulAttention.name])
    reasons: dict[str, str] = {}
    for candidate in (BACKENDS[one] for one in names):
        reason = candidate.why_not(spec)
        if reason is None:
            logger.debug("attention backend %s for %s", candidate.name, spec)
            if candidate is MatmulAttention and reasons:
                # On CUDA it is slow enough to be asked about; on the CPU some dtypes and sizes have nothing else.
                level = logging.WARNING if spec.device.type == "cuda" else logging.INFO
                logger.log(
                    level, "attention falls back to matmul, which is slower, for %s (%s)", spec, _listed(reasons)
                )
            return candidate
        reasons[candidate.name] = reason
    if name != "auto":
        raise ValueError(
            f"attention_backend is {name!r}, but {reasons[name]} (it was to serve {spec}; attention_backend='auto' "
            "takes one that can)"
        )
    raise ValueError(f"no attention backend serves {spec} ({_listed(reasons)})")


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
