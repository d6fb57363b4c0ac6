"""What a wrong result looks like: the usual mistakes, tried one after another."""

from collections.abc import Callable, Iterator

import torch

from nanovllm.diagnostics.compare_reference import Redone
from nanovllm.utils.text import counted

# Weights of attention below this may be lost in rounding, so their absence says nothing.
SMALL_WEIGHT = 1e-4
# A guess explains a result if what is left of the error is this share of it.
EXPLAINED = 0.02


def find_mask(found: torch.Tensor, expected: torch.Tensor) -> tuple[list[str], str]:
    """Which keys each query attends to.

    Args:
        found: [tokens, heads, keys]: what it took of each key.
        expected: What it should have taken, from the same queries and keys.

    Returns:
        A line a query, a character a key: ``#`` attends, ``.`` does not, ``!`` attends though it must not, ``?`` does
        not though it must, ``+`` is too little to tell. And what is wrong with it in words; empty if nothing is.
    """
    tokens, _, keys = found.shape
    causal = torch.arange(keys)[None, :] <= torch.arange(tokens)[:, None]  # of a whole prompt
    attends = ((found > 0) | found.isnan()).any(dim=1)
    shuns = (~(found > 0) & (expected > SMALL_WEIGHT)).any(dim=1)
    lines: list[str] = []
    early: list[str] = []
    late: list[str] = []
    for query in range(tokens):
        line = ""
        for key in range(keys):
            if not causal[query, key]:
                line += "!" if attends[query, key] else "."
                if attends[query, key]:
                    early.append(f"query {query} attends to key {key}, which comes after it")
            elif shuns[query, key]:
                line += "?"
                late.append(f"query {query} does not attend to key {key}")
            else:
                line += "#" if attends[query, key] else "+"
        lines.append(line)
    wrong = [f"{places[0]} ({counted(len(places), 'such pair')})" for places in (early, late) if places]
    return lines, "the mask is wrong: " + "; ".join(wrong) if wrong else ""


def find_hint(name: str, redone: Redone) -> str:
    """What the result of an operation looks like that departs; empty if like nothing known.

    Args:
        name: The operation.
        redone: What it should be, with the trace that it departs in.
    """
    found, expected = redone.trace.values[name].float(), redone.expected(name).float().cpu()
    if not found.isfinite().all() and expected.isfinite().all():
        return "is not finite"
    if not found.any():
        return "is all zeros"
    for words, make in _guesses(name, redone):
        guess = make()
        if guess is not None and guess.shape == found.shape:
            guess = guess.float().cpu()
            left = float((found - guess).norm() / (found - expected).norm())
            if left < EXPLAINED:
                return words
    if name.endswith(".attention"):
        return _scale_hint(name, redone)
    return _head_hint(name, found, expected, redone)


Guess = Callable[[], torch.Tensor | None]


def _guesses(name: str, redone: Redone) -> Iterator[tuple[str, Guess]]:
    prefix, _, operation = name.rpartition(".")
    norms = {
        "input_layernorm": None,
        "post_attention_layernorm": "attention_residual",
        "q_norm": "q_proj",
        "k_norm": "k_proj",
        "norm": None,
    }
    if operation in norms:
        before = norms[operation]
        inner = redone.model.model
        if before is None:
            number = len(inner.layers) if operation == "norm" else int(prefix.split(".")[1])
            source = f"layers.{number - 1}.output" if number else "embed_tokens"
        else:
            source = f"{prefix}.{before}"
        yield (
            "is its input: the norm was not applied",
            lambda: redone.value(source).view(redone.trace.values[name].shape),
        )
    if operation in ("q_rope", "k_rope"):
        heads = redone.value(f"{prefix}.{operation[0]}_norm")
        half = heads.shape[-1] // 2
        yield "is its input: it was not rotated", lambda: heads
        for shift in (1, -1):
            yield f"is turned for positions {shift:+d}", lambda shift=shift: redone.rotated(heads, shift)  # type: ignore[misc]
        yield "is turned the wrong way", lambda: redone.rotated(heads.roll(half, -1)).roll(half, -1)
        apart = torch.arange(2 * half).view(half, 2).t().flatten()  # even places first
        together = apart.argsort()
        yield "has neighbours turned, not halves", lambda: redone.rotated(heads[..., apart])[..., together]
    pairs = {"gate_proj": "up_proj", "up_proj": "gate_proj", "q_proj": "k_proj", "k_proj": "v_proj", "v_proj": "k_proj"}
    if operation in pairs:
        other = f"{prefix}.{pairs[operation]}"
        yield f"is what {pairs[operation]} should be", lambda: redone.expected(other)
    if operation == "activation":
        mlp = redone.model.model.layers[int(prefix.split(".")[1])].mlp
        gate, up = (redone.value(f"{prefix}.{part}") for part in ("gate_proj", "up_proj"))
        yield "has gate and up swapped", lambda: mlp.act_fn(up) * gate
    if operation in ("attention_residual", "output"):
        added = f"{prefix}.{'o_proj' if operation == 'attention_residual' else 'down_proj'}"
        yield "is only what was to be added: the residual stream is missing", lambda: redone.value(added)
        yield "is only the residual stream: nothing was added", lambda: redone.expected(name) - redone.value(added)


def _scale_hint(name: str, redone: Redone) -> str:
    """The scale that explains the weights of attention, if one does."""
    layer = int(name.split(".")[1])
    found = redone.trace.attention_weights.get(layer)
    if found is None:
        return ""
    expected = redone.attention_weights(layer).cpu()
    # Within a row, logarithms of weights differ by the scale times the differences of the products.
    use = (found > SMALL_WEIGHT) & (expected > SMALL_WEIGHT)
    use &= use.sum(dim=-1, keepdim=True) > 1
    if not use.any():
        return ""
    count = use.sum(dim=-1, keepdim=True).clamp(min=1)
    logs = [torch.where(use, weights.clamp(min=1e-30).log(), 0.0) for weights in (found, expected)]
    theirs, right = (torch.where(use, log - log.sum(dim=-1, keepdim=True) / count, 0.0) for log in logs)
    factor = float((theirs * right).sum() / right.square().sum().clamp(min=1e-30))
    left = float((theirs - factor * right).norm() / theirs.norm().clamp(min=1e-30))
    if left > EXPLAINED or abs(factor - 1) < EXPLAINED:
        return ""
    scale = redone.model.model.layers[layer].self_attn.scaling
    return f"the scale of the scores is {scale * factor:.4g} instead of {scale:.4g}"


def _head_hint(name: str, found: torch.Tensor, expected: torch.Tensor, redone: Redone) -> str:
    """Heads that are in each other's place."""
    if not name.endswith(("q_proj", "k_proj", "v_proj")):
        return ""
    size = redone.model.model.layers[0].self_attn.head_dim
    ours, right = found.unflatten(-1, (-1, size)), expected.unflatten(-1, (-1, size))
    moved = []
    for head in range(right.shape[1]):
        distances = (right - ours[:, head : head + 1]).norm(dim=(0, 2)) / right.norm(dim=(0, 2)).clamp(min=1e-30)
        nearest = int(distances.argmin())
        if nearest != head and distances[nearest] < EXPLAINED:
            moved.append(f"head {head} is what head {nearest} should be")
    return ", ".join(moved)
