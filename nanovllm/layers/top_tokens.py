"""The most likely tokens of rows of logits, found block by block instead of by sorting the vocabulary."""

import torch
import torch.nn.functional as F

BLOCK = 128
SUBBLOCK = 32

# float32 elements of a temporary. On the CPU a few rows at a time: each pass then finds its data in the cache.
CACHED_ELEMENTS = 1 << 17
DEVICE_ELEMENTS = 1 << 24


def in_blocks(logits: torch.Tensor) -> torch.Tensor:
    """[rows, vocab_size] as [rows, blocks, BLOCK], with -inf after the last token: a view if BLOCK divides it."""
    if logits.shape[1] % BLOCK:
        logits = F.pad(logits, (0, -logits.shape[1] % BLOCK), value=float("-inf"))
    return logits.reshape(len(logits), logits.shape[1] // BLOCK, BLOCK)


def rows_at_a_time(logits: torch.Tensor) -> int:
    """Rows that temporaries as large as the logits should hold."""
    limit = CACHED_ELEMENTS if logits.device.type == "cpu" else DEVICE_ELEMENTS
    return max(1, limit // (logits.numel() // len(logits)))


def most_likely(
    blocks: torch.Tensor, maxima: torch.Tensor, rows: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely tokens of some rows, without sorting the others.

    A token is preferred for its logit, then for its lower id. If k blocks are preferred to a token's block, each for
    its preferred token, k tokens are preferred to that token. So the k first blocks hold the k first tokens.

    Args:
        blocks: float32 [all rows, blocks, BLOCK].
        maxima: float32 [all rows, blocks], their largest logits.
        rows: int64 [rows], which of the rows.
        count: How many a row.

    Returns:
        Logits float32 and token ids int64, [rows, count] each, in the order of preference.
    """
    num_blocks = blocks.shape[1]
    values = maxima[rows]
    ids = torch.arange(num_blocks, device=blocks.device).expand_as(values)
    ids = ids.gather(1, _preferred(values, ids, min(count, num_blocks)))  # [rows, chosen blocks]
    parts = blocks.reshape(-1, BLOCK).index_select(0, (rows[:, None] * num_blocks + ids).flatten())
    for width in (SUBBLOCK, 1):  # each time cut up what is left, and keep as many parts as tokens are wanted
        pieces = parts.shape[1] // width
        parts = parts.view(-1, width)
        values = parts.amax(dim=1).view(len(rows), -1)
        ids = (ids[:, :, None] * pieces + torch.arange(pieces, device=ids.device)).flatten(1)
        chosen = _preferred(values, ids, min(count, ids.shape[1]))
        offsets = torch.arange(len(rows), device=ids.device)[:, None] * ids.shape[1]
        parts = parts.index_select(0, (chosen + offsets).flatten())
        ids = ids.gather(1, chosen)
    return parts.view(len(rows), -1), ids


def _preferred(values: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Where the ``count`` largest of [rows, n] are, the lower id first among equals. (topk alone takes any.)"""
    if values.device.type == "mps":
        return _preferred_by_floats(values, ids.float(), count)
    bits = (values + 0.0).view(torch.int32)  # 0.0 rather than -0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the floats
    return ((ordered.long() << 31) - ids).topk(count, dim=-1).indices


def _preferred_by_floats(values: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    """:func:`_preferred` of float32 ids, below 2^24, for a device whose topk cuts integers to 32 bits."""
    lowest_first = -ids  # no two are equal, so that topk has no choice
    least = values.topk(count, dim=-1).values[:, -1:]
    above, equal = values > least, values == least
    # Of those that equal the last one wanted, the lowest ids, as many as are still missing.
    missing = count - above.sum(dim=-1, keepdim=True)
    by_id = lowest_first.masked_fill(~equal, float("-inf")).topk(count, dim=-1).values
    last = by_id.gather(1, (missing - 1).clamp(min=0))
    chosen = above | (equal & (lowest_first >= last))
    where = lowest_first.masked_fill(~chosen, float("-inf")).topk(count, dim=-1).indices  # lowest ids first
    values = values.gather(1, where)
    places = torch.cat([_places(part) for part in values.split(max(1, DEVICE_ELEMENTS // count**2))])
    ordered = torch.zeros_like(where)  # places of NaN coincide
    ordered[torch.arange(len(where), device=where.device)[:, None], places] = where
    return ordered


def _places(values: torch.Tensor) -> torch.Tensor:
    """The place of each of [rows, n] in the order from the largest down, the earlier first among equals: int64."""
    order = torch.arange(values.shape[1], device=values.device)
    step = max(1, DEVICE_ELEMENTS // values.numel())
    places = []
    for mine, here in zip(values.split(step, dim=1), order.split(step), strict=True):
        larger = values[:, None, :] > mine[:, :, None]
        tied = (values[:, None, :] == mine[:, :, None]) & (order < here[:, None])
        places.append((larger | tied).sum(dim=-1))
    return torch.cat(places, dim=1)
