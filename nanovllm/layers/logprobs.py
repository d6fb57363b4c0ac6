"""Log-probabilities of tokens under the model's own distribution: the softmax of its raw logits.

Only a row's maximum and the sum of its exponentials are computed; log_softmax of the vocabulary is never held.
"""

import torch

from nanovllm.layers.top_tokens import in_blocks, most_likely, rows_at_a_time

Normalizer = tuple[torch.Tensor, torch.Tensor]


def top_logprobs(
    logits: torch.Tensor, num: int, normalizer: Normalizer | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely tokens.

    Args:
        logits: float32 [rows, vocab_size].
        num: How many a row; at most ``vocab_size``.
        normalizer: Of these logits, if it is known.

    Returns:
        Log-probabilities float32 [rows, num], the most likely first, and token ids int64 [rows, num]; of equally
        likely tokens the lower id comes first.
    """
    if num == 0:
        return logits[:, :0], torch.zeros(len(logits), 0, dtype=torch.int64, device=logits.device)
    if num * 16 >= logits.shape[1]:
        # On the host if need be: MPS does not say whether its sort is stable.
        place = torch.device("cpu") if logits.device.type == "mps" else logits.device
        values, ids = logits.to(place).sort(dim=-1, descending=True, stable=True)
        values, ids = values[:, :num].to(logits.device), ids[:, :num].to(logits.device)
    else:
        blocks = in_blocks(logits)
        rows = torch.arange(len(logits), device=logits.device)
        values, ids = most_likely(blocks, blocks.amax(dim=-1), rows, num)
    peak, log_total = normalizer or normalize(logits)
    return values - peak - log_total, ids


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, normalizer: Normalizer | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A given token of each row.

    Args:
        logits: float32 [rows, vocab_size].
        tokens: int64 [rows]; -1, a row of which nothing could be sampled, is taken as 0.
        normalizer: Of these logits, if it is known.

    Returns:
        Log-probabilities float32 [rows] and ranks int64 [rows], from 1: the token's place in the order of
        :func:`top_logprobs`.
    """
    tokens = tokens.clamp(min=0)[:, None]
    chosen = logits.gather(-1, tokens)
    ids = torch.arange(logits.shape[1], device=logits.device)
    before = [
        (part > value).sum(dim=-1) + ((part == value) & (ids < token)).sum(dim=-1)
        for part, value, token in _parts(logits, chosen, tokens)
    ]
    ranks = torch.cat(before) + 1
    peak, log_total = normalizer or normalize(logits)
    return (chosen - peak - log_total)[:, 0], ranks


def normalize(logits: torch.Tensor) -> Normalizer:
    """The largest logit, and the log of the sum of exponentials relative to it: float32 [rows, 1] each."""
    peak = logits.amax(dim=-1, keepdim=True)
    totals = [(part - top).exp_().sum(dim=-1, keepdim=True) for part, top in _parts(logits, peak)]
    return peak, torch.cat(totals).log_()


def _parts(logits: torch.Tensor, *columns: torch.Tensor) -> "zip[tuple[torch.Tensor, ...]]":
    step = rows_at_a_time(logits)
    return zip(*(tensor.split(step) for tensor in (logits, *columns)), strict=True)
