"""Activations of gated MLPs."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm import kernels


class SiluAndMul(nn.Module):
    """SwiGLU's gate: silu(gate) * up (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.fused = kernels.load("silu_and_mul", device, dtype)

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[tokens, 2 * n], gate first -> [tokens, n]."""
        if self.fused is not None:
            return self.fused(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


def get_activation(name: str, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The gated activation that config.json calls ``name``; ValueError if it is not supported."""
    if name != "silu":
        raise ValueError(f"hidden_act is {name!r}; only 'silu' is supported")
    return SiluAndMul(device, dtype)
