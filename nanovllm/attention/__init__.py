"""Attention backends behind one interface, and the choice among them."""

import logging

from nanovllm.attention.base import AttentionBackend, AttentionSpec
from nanovllm.attention.flash_attn import FlashAttention
from nanovllm.attention.matmul import MatmulAttention
from nanovllm.attention.triton import TritonAttention

__all__ = ["BACKENDS", "AttentionBackend", "AttentionSpec", "select_backend"]

logger = logging.getLogger(__name__)

# In the order in which "auto" tries them.
BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (TritonAttention, FlashAttention, MatmulAttention)
}


def select_backend(name: str, spec: AttentionSpec) -> type[AttentionBackend]:
    """The backend called ``name``, or for "auto" the first that can serve ``spec``.

    Raises:
        ValueError: There is no such backend, or it (with "auto": each) cannot, with the reason.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention_backend is {name!r}; use auto, {', '.join(BACKENDS)}")
    names = [name]
    if name == "auto":  # without a GPU, kernels could only be interpreted, which is to be asked for by name
        names = list(BACKENDS) if spec.device.type == "cuda" else [MatmulAttention.name]
    reasons: list[str] = []
    for candidate in (BACKENDS[one] for one in names):
        reason = candidate.why_not(spec)
        if reason is None:
            # Falling back to it on CUDA is slow enough to be asked about. (Elsewhere nothing is tried before it.)
            level = logging.WARNING if reasons and candidate is MatmulAttention else logging.DEBUG
            logger.log(level, "attention backend %s for %s (%s)", candidate.name, spec, "; ".join(reasons))
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    raise ValueError(f"no attention backend serves {spec}: {'; '.join(reasons)}")
