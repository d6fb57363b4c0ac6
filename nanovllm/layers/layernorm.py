"""RMSNorm (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467)."""

from typing import Any

import torch
from torch import nn

from nanovllm import kernels
from nanovllm.utils.loader import Span, TensorSource, copy_span, new_parameter


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32.

    Args:
        size: Length of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.eps = eps
        self.fused_add = kernels.load("rms_norm", torch.device(device), dtype)
        self.weight = new_parameter((size,), dtype, device, self._load)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape and dtype."""
        # Nothing here works in place: x may be the residual stream. The norm is taken in float32 without a float32
        # copy of x, and the product with the float32 scale is float32 by promotion.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + self.eps)
        return (x * scale).to(x.dtype) * self.weight

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Add ``x`` to the residual stream and normalise the sum: returns (normalised, sum). None starts the stream."""
        if self.fused_add is not None:
            return self.fused_add(x, self.weight, self.eps, residual)
        total = x if residual is None else x + residual
        return self.forward(total), total

    def _load(self, parameter: nn.Parameter, source: TensorSource, shard_id: str) -> None:
        copy_span(parameter.data, source, 0, Span.whole(parameter.shape[0]))
