"""The matrix product of the linear layers, with the weight in the layout the processor likes best."""

import logging
from abc import ABC, abstractmethod
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm import kernels

logger = logging.getLogger(__name__)

# Rows for which oneDNN chooses the layout: a decode step of a small batch, where the layout matters most.
TYPICAL_ROWS = 16


class PackedWeight(ABC):
    """A weight [outputs, inputs] in an order of its own; it takes the place of the plain one."""

    @abstractmethod
    def __init__(self, weight: torch.Tensor) -> None: ...

    @abstractmethod
    def product(
        self, x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x W^T + bias: x [rows, inputs] -> [rows, outputs] in ``dtype``, x's own or float32, in ``out`` if given."""

    @classmethod
    @abstractmethod
    def suits(cls, weight: torch.Tensor) -> bool:
        """Whether ``weight`` gains from it on this machine."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Rows ``ids`` int64 [n] of the plain weight, [n, inputs]; None if they cannot be told any more."""
        return None


class OneDnnWeight(PackedWeight):
    """A bfloat16 weight in oneDNN's blocks.

    Given a plain one, oneDNN reorders it at every call. Packed once, a decode step of Qwen3-0.6B at batch 16 takes two
    thirds of the time on the CPU.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_ROWS)

    def product(
        self, x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        result = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return result.to(dtype) if out is None else out.copy_(result)

    @classmethod
    def suits(cls, weight: torch.Tensor) -> bool:
        """Whether oneDNN has kernels of bfloat16 for this CPU."""
        if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
            return False
        try:  # these operators are not public: another torch may lack or change them
            if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return False
            cls(weight.new_zeros(16, 16)).product(weight.new_zeros(1, 16), None, torch.bfloat16)
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            logger.info("oneDNN packs no weights: %s", error)
            return False
        return True


class TiledWeight(PackedWeight):
    """A bfloat16 weight in the order of our own kernel (``nanovllm/kernels/cpu/linear.py``).

    It asks for the next weights while it multiplies these. At 16 rows, where a step is half memory and half arithmetic,
    a product takes two thirds of oneDNN's time; never more (2 Zen 5 cores).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.kernel = import_module("nanovllm.kernels.cpu.linear")
        self.outputs = weight.shape[0]
        self.packed = self.kernel.pack(weight.detach())

    def product(
        self, x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.kernel.linear(x, self.packed, self.outputs, bias, dtype, out)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.kernel.unpack_rows(self.packed, ids)

    @classmethod
    def suits(cls, weight: torch.Tensor) -> bool:
        """Whether this CPU multiplies bfloat16 in AVX-512's registers, and has nothing faster (AMX)."""
        if weight.shape[1] % 2 or weight.dtype != torch.bfloat16:
            return False
        return kernels.load("linear", weight.device, weight.dtype) is not None and has_fast_tiles()


class Int8Weight(PackedWeight):
    """A weight in eight bits, a scale an output (``nanovllm/kernels/cpu/linear_int8.py``)."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.kernel = import_module("nanovllm.kernels.cpu.linear_int8")
        import_module("nanovllm.kernels.cpu.linear").product_kernel(True)  # compiled from now on
        self.weight = self.kernel.quantize(weight.detach())

    def product(
        self, x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.kernel.linear_int8(x, self.weight, bias, dtype, out)

    @classmethod
    def suits(cls, weight: torch.Tensor) -> bool:
        return cls.why_not(weight.dtype, weight.device) is None

    @classmethod
    def why_not(cls, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why weights of this dtype cannot be quantized on this device; None if they can."""
        if device.type != "cpu":
            return f"it is for the CPU, not for {device.type}"
        if dtype not in kernels.CPU_DTYPES:
            return f"it is not for {str(dtype).removeprefix('torch.')}; use dtype='bfloat16' or 'float32'"
        return kernels.why_no_cpu_kernels()


def has_fast_tiles() -> bool:
    """Whether our own products of bfloat16 are this CPU's fastest; the kernels must be there."""
    vectors = import_module("nanovllm.kernels.cpu.vectors")
    return vectors.HAS_BF16_PRODUCTS and not vectors.HAS_AMX


@cache
def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies by bfloat16 weights faster than by float32 ones, which are twice as much to read."""
    weight = torch.zeros(16, 16, dtype=torch.bfloat16, device="cpu")
    return TiledWeight.suits(weight) or OneDnnWeight.suits(weight)


class PackableProduct(nn.Module):
    """A module with a ``weight`` [outputs, inputs] that may be kept packed instead."""

    weight: nn.Parameter | None
    packed: PackedWeight | None = None

    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x W^T + bias: x [rows, inputs] -> [rows, outputs] in ``dtype``, x's own or float32, in ``out`` if given."""
        if self.packed is not None:
            return self.packed.product(x, bias, dtype or x.dtype, out)
        assert self.weight is not None
        if out is not None and bias is None and out.dtype == x.dtype:
            return torch.mm(x, self.weight.t(), out=out)
        result = F.linear(x, self.weight, bias)
        return result.to(dtype or x.dtype) if out is None else out.copy_(result)

    def pack(self, packing: type[PackedWeight]) -> None:
        """Replace the weight by its packed form."""
        assert self.weight is not None
        self.packed = packing(self.weight)
        self.weight = None  # a tied embedding keeps its own reference to the table


def pack_weights(model: nn.Module, quantization: str | None = None) -> None:
    """Pack the weights of a loaded model, in eight bits if that is asked for, else where the CPU gains from it."""
    modules = [module for module in model.modules() if isinstance(module, PackableProduct)]
    weights = [module.weight for module in modules if module.weight is not None]
    packings: list[type[PackedWeight]] = [Int8Weight] if quantization == "int8" else []
    packings += [packing for packing in (TiledWeight, OneDnnWeight) if all(map(packing.suits, weights))]
    if packings:
        for module in modules:
            module.pack(packings[0])
