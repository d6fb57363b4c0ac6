"""Token embedding and output head, their vocabulary split over the ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm import kernels
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.product import PackableProduct, PackedWeight
from nanovllm.layers.top_tokens import BLOCK
from nanovllm.utils.loader import COPY, DifferentCopyError, Span, TensorSource, copy_span, equals_rows, new_parameter


def rows_per_rank(vocab_size: int, parallel: ParallelGroup) -> int:
    """Rows of the table that each rank keeps."""
    rows = -(-vocab_size // parallel.size)
    return rows + (-rows % BLOCK if parallel.size > 1 else 0)


class VocabParallelEmbedding(nn.Module):
    """Rows of a [vocab_size, hidden_size] table; each rank keeps as many, the last ones padded with zeros.

    Shares are whole blocks of the sampler's, so that each block is on one rank; of a small vocabulary some ranks get
    nothing.

    Args:
        vocab_size: Rows of the whole table.
        hidden_size: Its columns.
        parallel: This rank's share.
        tied_to: The embedding whose table this one is.
    """

    weight: nn.Parameter | None
    packed: PackedWeight | None = None  # in place of the weight, where the output head's serves both

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        parallel: ParallelGroup,
        dtype: torch.dtype,
        device: Any,
        tied_to: "VocabParallelEmbedding | None" = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.parallel = parallel
        self.rows = rows_per_rank(vocab_size, parallel)
        self.first_id = min(parallel.rank * self.rows, vocab_size)
        self.num_ids = min(self.rows, vocab_size - self.first_id)  # the rest of the rows is padding; 0 beyond the end
        shape = (self.rows, hidden_size)
        self.kernel = kernels.load("embedding", torch.device(device), dtype)
        self.tied_to = [tied_to] if tied_to else []  # in a list: it is not a part of this module
        self.weight = tied_to.weight if tied_to else new_parameter(shape, dtype, device, self._load)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [tokens] -> [tokens, hidden_size]."""
        if self.parallel.size == 1:
            return self._rows(token_ids)
        local = token_ids - self.first_id
        mine = (local >= 0) & (local < self.num_ids)
        return self.parallel.all_reduce(self._rows(local.where(mine, 0)) * mine.unsqueeze(-1))

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        if self.weight is not None:
            return (self.kernel or F.embedding)(ids, self.weight)
        assert self.packed is not None
        rows = self.packed.rows(ids)
        assert rows is not None
        return rows

    def _load(self, parameter: nn.Parameter, source: TensorSource, shard_id: str) -> None:
        rows, span = parameter.data[: self.num_ids], Span(self.first_id, self.num_ids, self.vocab_size)
        if shard_id != COPY:
            copy_span(rows, source, 0, span)
        elif not equals_rows(rows, source, span):
            # transformers 4 would tie the head nonetheless, transformers 5 use it: whoever trained it must say.
            raise DifferentCopyError(
                "differs from the embedding, though tie_word_embeddings is true (pass "
                "hf_overrides={'tie_word_embeddings': False} to use it, or delete it from the file to go without it)"
            )
        parameter.data[self.num_ids :].zero_()


class ParallelLMHead(VocabParallelEmbedding, PackableProduct):  # type: ignore[misc]  # its weight may be packed
    """Logits over the vocabulary from hidden states; may share its table with the embedding."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        parallel: ParallelGroup,
        dtype: torch.dtype,
        device: Any,
        tied_to: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__(vocab_size, hidden_size, parallel, dtype, device, tied_to)
        self.fused_linear = kernels.load("fused_linear", torch.device(device), dtype)

    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        fits = self.weight is not None and x.shape[0] <= kernels.FEW_ROWS and (out is None or out.dtype == x.dtype)
        if self.fused_linear is None or not fits:
            return super().product(x, bias, dtype, out)
        result = self.fused_linear(x, self.weight, bias, out=out)  # reads the table while the last layer still runs
        return result.to(dtype or x.dtype)

    def pack(self, packing: type[PackedWeight]) -> None:
        """Replace the weight by its packed form, and that of the embedding it is tied to, if rows can be read of it."""
        super().pack(packing)
        assert self.packed is not None
        for embedding in self.tied_to:
            if self.packed.rows(torch.zeros(1, dtype=torch.int64, device="cpu")) is not None:
                embedding.weight, embedding.packed = None, self.packed

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, hidden_size] -> float32 logits [rows, vocab_size], the same on every rank."""
        return self.whole(self.product(hidden, dtype=torch.float32))

    def share(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [rows, hidden_size] -> float32 logits of this rank's ids; -inf beyond the vocabulary's end.

        With ``out`` of that shape, they are written there in its dtype, without a float32 copy.
        """
        logits = self.product(hidden, dtype=torch.float32 if out is None else out.dtype, out=out)
        if self.num_ids < self.rows:
            logits[:, self.num_ids :] = float("-inf")
        return logits

    def whole(self, share: torch.Tensor) -> torch.Tensor:
        """The ranks' shares of some rows of logits -> those rows [rows, vocab_size], the same on every rank."""
        # Padding, if there is any, is the end of the last shares that hold rows, hence the end of the whole.
        return self.parallel.all_gather(share)[:, : self.vocab_size]
