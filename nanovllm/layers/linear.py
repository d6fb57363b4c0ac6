"""Linear layers whose weights are split over the ranks of a tensor-parallel group.

Column-parallel layers split the outputs: each rank computes its own, and nothing is communicated. Row-parallel layers
split the inputs, which the rank already holds from the column-parallel layer before: the partial results are summed.
(Shoeybi et al., Megatron-LM, 2019, https://arxiv.org/abs/1909.08053, section 3.)

Every parameter carries its own loader, ``parameter.load(parameter, source, shard_id)``, so that the checkpoint loader
knows no layer. It reads from ``source`` only the rows or columns that this rank keeps.
"""

from typing import Any

import torch
from torch import nn

from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.product import PackableProduct
from nanovllm.utils.loader import Span, TensorSource, copy_span, new_parameter

__all__ = [
    "ColumnParallelLinear",
    "GateUpParallelLinear",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "RowParallelLinear",
]


class MergedColumnParallelLinear(PackableProduct):
    """Several linear layers of the same input, fused: y = x W^T + b, this rank's outputs of each behind one another.

    Args:
        input_size: Features of x.
        spans: For each fused layer, by its shard id in the order of the outputs: the rows of its checkpoint tensor
            that this rank keeps, and the tensor's full number of rows.
        bias: Whether there is a bias.
    """

    def __init__(self, input_size: int, spans: dict[str, Span], bias: bool, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.spans = spans
        self.offsets: dict[str, int] = {}
        output_size = 0
        for shard_id, span in spans.items():
            self.offsets[shard_id] = output_size
            output_size += span.length
        shards = tuple(spans)
        self.weight = new_parameter((output_size, input_size), dtype, device, self._load, shards)
        self.bias = new_parameter((output_size,), dtype, device, self._load, shards) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, input_size] -> [tokens, this rank's outputs]."""
        return self.product(x, self.bias)

    def _load(self, parameter: nn.Parameter, source: TensorSource, shard_id: str) -> None:
        span = self.spans[shard_id]
        target = parameter.data.narrow(0, self.offsets[shard_id], span.length)
        copy_span(target, source, 0, span)


class ColumnParallelLinear(MergedColumnParallelLinear):
    """y = x W^T + b with the outputs split over the ranks."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool,
        parallel: ParallelGroup,
        dtype: torch.dtype,
        device: Any,
    ) -> None:
        start, stop = parallel.shard(output_size, "output_size")
        super().__init__(input_size, {"": Span(start, stop - start, output_size)}, bias, dtype, device)


class GateUpParallelLinear(MergedColumnParallelLinear):
    """The gate and up projections of a gated MLP: x -> [gate, up], each split over the ranks."""

    def __init__(
        self,
        input_size: int,
        intermediate_size: int,
        parallel: ParallelGroup,
        dtype: torch.dtype,
        device: Any,
    ) -> None:
        start, stop = parallel.shard(intermediate_size, "intermediate_size")
        span = Span(start, stop - start, intermediate_size)
        super().__init__(input_size, {"gate": span, "up": span}, False, dtype, device)


class QKVParallelLinear(MergedColumnParallelLinear):
    """The query, key and value projections: x -> [q, k, v], the heads split over the ranks.

    With fewer KV heads than ranks, each KV head is kept by ``size / num_kv_heads`` neighbouring ranks.

    Attributes:
        num_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank.
    """

    def __init__(
        self,
        input_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        bias: bool,
        parallel: ParallelGroup,
        dtype: torch.dtype,
        device: Any,
    ) -> None:
        first, last = parallel.shard(num_heads, "num_attention_heads")
        self_heads = last - first
        if num_kv_heads >= parallel.size:
            kv_first, kv_last = parallel.shard(num_kv_heads, "num_key_value_heads")
        elif parallel.size % num_kv_heads == 0:
            kv_first = parallel.rank // (parallel.size // num_kv_heads)
            kv_last = kv_first + 1
        else:
            raise ValueError(
                f"{parallel.size} tensor-parallel ranks cannot share {num_kv_heads} key-value heads evenly"
            )
        q = Span(first * head_dim, self_heads * head_dim, num_heads * head_dim)
        kv = Span(kv_first * head_dim, (kv_last - kv_first) * head_dim, num_kv_heads * head_dim)
        super().__init__(input_size, {"q": q, "k": kv, "v": kv}, bias, dtype, device)
        self.num_heads = self_heads
        self.num_kv_heads = kv_last - kv_first


class RowParallelLinear(PackableProduct):
    """y = x W^T + b with the inputs split over the ranks and the partial results summed."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool,
        parallel: ParallelGroup,
        dtype: torch.dtype,
        device: Any,
    ) -> None:
        super().__init__()
        start, stop = parallel.shard(input_size, "input_size")
        self.span = Span(start, stop - start, input_size)
        self.parallel = parallel
        self.weight = new_parameter((output_size, self.span.length), dtype, device, self._load_weight)
        self.bias = new_parameter((output_size,), dtype, device, self._load_bias) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, this rank's inputs] -> [tokens, output_size]."""
        bias = self.bias if self.parallel.rank == 0 else None  # the sum over the ranks must hold it once
        return self.parallel.all_reduce(self.product(x, bias))

    def _load_weight(self, parameter: nn.Parameter, source: TensorSource, shard_id: str) -> None:
        copy_span(parameter.data, source, 1, self.span)

    def _load_bias(self, parameter: nn.Parameter, source: TensorSource, shard_id: str) -> None:
        copy_span(parameter.data, source, 0, Span.whole(parameter.shape[0]))
