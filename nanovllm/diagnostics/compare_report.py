"""What a comparison has found, as text and for machines."""

import dataclasses
import math
from typing import Any

from nanovllm.diagnostics.compare import PATHS, Comparison, describe
from nanovllm.diagnostics.compare_layers import Error, OperationResult
from nanovllm.diagnostics.compare_settings import SettingsComparison, place_of
from nanovllm.diagnostics.compare_tokens import TokenComparison
from nanovllm.diagnostics.compare_weights import WeightComparison
from nanovllm.utils.text import counted

# Longest prompt whose mask is drawn.
MOST_DRAWN_TOKENS = 64


def comparison_text(comparison: Comparison, verbose: bool = False) -> str:
    """A page: the summary first, then layers, mask, tokens and weights; with ``verbose`` every operation."""
    found = comparison
    lines = [found.summary(), ""]
    kernels = "fused kernels" if found.has_fused_kernels else "no fused kernels"
    lines.append(
        f"{counted(len(found.token_ids), 'prompt token')}, {found.dtype} on {found.device}, attention "
        f"{found.backend}, {kernels}; "
        "against transformers"
    )
    wrong = [result for result in found.layers.results if result.departs]
    if wrong:
        lines += ["", f"operations that are wrong by themselves ({len(wrong)}), errors of their inputs apart:"]
        lines += [f"  {describe(result)}" for result in (wrong if verbose else wrong[:8])]
        if len(wrong) > 8 and not verbose:
            lines.append(f"  ... and {len(wrong) - 8} more (--verbose lists them)")
    lines += ["", *_layer_table(found), ""]
    if verbose:
        lines += [*_operation_table(found.layers.results), ""]
    lines += _mask(found)
    lines += [*_tokens(found.tokens), ""]
    lines += _weights(found.weights, verbose)
    return "\n".join(lines)


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The same as a JSON object; numbers that JSON has no name for are strings."""
    first = comparison.departure()
    plain: dict[str, Any] = dataclasses.asdict(comparison)
    for weight, described in zip(comparison.weights, plain["weights"], strict=True):
        described["equal"] = weight.equal
    for result, described in zip(comparison.layers.results, plain["layers"]["results"], strict=True):
        described["layer"], described["operation"] = result.layer, result.operation
    head = {
        "summary": comparison.summary(),
        "departs": comparison.departs(),
        "first": None if first is None else {"layer": first.layer, "operation": first.operation, "path": first.path},
    }
    return _clean({**head, **plain})


def settings_text(comparison: SettingsComparison, verbose: bool = False) -> str:
    """A page about two settings."""
    found = comparison
    lines = [found.summary(), ""]
    for name, settings, answers, text in zip(
        ("the first setting", "the second setting"), found.settings, found.answers, found.texts, strict=True
    ):
        told = ", ".join(f"{key}={value}" for key, value in settings.items()) or "as it is"
        cached = answers[1].num_cached_tokens
        lines.append(
            f"{name} ({told}): {cached} of {counted(len(found.token_ids), 'prompt token')} cached when it came again"
        )
        lines.append(f"  tokens {answers[0].token_ids}")
        lines += [f"  text   {text!r}"] if text else []
        if not cached and settings.get("enable_prefix_caching", True):
            lines.append("  (no block was filled by it: a longer prompt would also show what the prefix cache does)")
    lines += ["", f"{'difference of log-probabilities':<58} {'largest':>9} {'at':>5} {'mean':>9}  first other token"]
    for difference in found.differences:
        other = "none"
        if difference.first_difference is not None and difference.tokens is not None:
            margin = "more than the likeliest tell" if difference.margin is None else f"{difference.margin:.3g}"
            one, two = difference.tokens
            other = f"number {difference.first_difference}: {one} or {two}, margin {margin}"
        at = "" if difference.position is None else difference.position
        lines.append(f"{difference.what:<58} {difference.largest:>9.3g} {at:>5} {difference.mean:>9.3g}  {other}")
    if found.operations:
        worst = max(found.operations, key=lambda name: found.operations[name])
        lines += ["", f"operations: the largest relative error is {found.operations[worst]:.2g}, of {place_of(worst)}"]
        if found.first_operation is not None:
            name, error, token = found.first_operation
            lines.append(
                f"the first that differs by more than dtypes explain: {place_of(name)}, {error:.2g} at token {token}"
            )
        if verbose:
            lines += [f"  {place_of(name):<36} {error:9.2g}" for name, error in found.operations.items()]
    if verbose:
        lines += ["", "by position (those of the output are behind the prompt's):"]
        lines += [f"  {position:>6} {value:9.3g}" for position, value in found.differences[0].by_position.items()]
    return "\n".join(lines)


def settings_json(comparison: SettingsComparison) -> dict[str, Any]:
    """The same as a JSON object."""
    head = {"summary": comparison.summary(), "departs": comparison.departs()}
    return _clean({**head, **dataclasses.asdict(comparison)})


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _clean(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _ratio(error: Error | None) -> float:
    return -1.0 if error is None else error.ratio


def _layer_table(found: Comparison) -> list[str]:
    """A row a layer and path: its worst operation, by its own error and by the total."""
    rows: dict[tuple[int | str, str], list[OperationResult]] = {}
    for result in found.layers.results:
        key = result.operation if result.layer is None else result.layer
        rows.setdefault((key, result.path), []).append(result)
    layers = sorted({key for key, _ in rows if isinstance(key, int)})
    order: list[int | str] = ["embed_tokens", *layers, "norm", "lm_head"]
    lines = [
        "errors as shares of what is tolerated (above 1 departs): an operation's own, from the same inputs; the total",
        f"{'layer':<14} {'path':<7} {'own':>8} {'of':<26} {'total':>8} of",
    ]
    for key in order:
        for path in PATHS:
            results = rows.get((key, path))
            if not results:
                continue
            own, total = max(results, key=lambda r: _ratio(r.own)), max(results, key=lambda r: _ratio(r.total))
            wrong = [result.operation for result in results if result.departs]
            note = f"  wrong: {', '.join(wrong)}" if wrong else ""
            if not wrong and _ratio(total.total) > 1:
                note = "  passes on what came before"
            sums = "" if total.total is None else f"{total.total.ratio:8.2g} {total.operation}"
            lines.append(f"{key!s:<14} {path:<7} {_ratio(own.own):8.2g} {own.operation:<26} {sums}{note}")
    return lines


def _operation_table(results: list[OperationResult]) -> list[str]:
    lines = [
        f"{'operation':<38} {'path':<7} {'own: abs':>9} {'rel':>8} {'share':>8}"
        f"   {'total: abs':>10} {'rel':>8} {'share':>8}"
    ]
    for result in results:
        cells = [
            f"{error.absolute:9.2g} {error.relative:8.2g} {error.ratio:8.2g}" if error else " " * 27
            for error in (result.own, result.total)
        ]
        lines.append(f"{place_of(result.name):<38} {result.path:<7} {cells[0]}    {cells[1]}")
        if result.operation == "attention" and result.own is not None:
            heads = " ".join(f"{ratio:.2g}" for ratio in result.own.by_head)
            lines.append(f"{'':<38} by head: {heads}")
    return lines


def _mask(found: Comparison) -> list[str]:
    """The mask of each path, drawn once if all its layers have the same."""
    if len(found.token_ids) > MOST_DRAWN_TOKENS:
        return []
    lines: list[str] = []
    drawn: dict[str, str] = {}
    for path, masks in found.layers.masks.items():
        for layer, mask in masks.items():
            drawn.setdefault("\n".join(mask), f"{PATHS[path]}, layer {layer}")
    for drawing, where in drawn.items():
        lines.append(f"what each query (a line) takes of each key (a column), from {where} on:")
        lines.append("  # attends  . does not  ! attends but must not  ? does not but must  + too little to tell")
        lines += [f"  {query:>3} {line}" for query, line in enumerate(drawing.split("\n"))]
        lines.append("")
    return lines


def _tokens(tokens: TokenComparison) -> list[str]:
    first = tokens.first_difference
    if first is None:
        lines = [f"greedy tokens: all {len(tokens.ours)} are the same"]
    else:
        call = "a close call: rounding decides" if first.is_close_call else "more than rounding explains"
        preferred = "theirs" if first.margin > 0 else "ours"
        lines = [
            f"greedy tokens: number {first.step} differs, {first.ours} here and {first.theirs} there; in float32 "
            f"transformers prefers {preferred} by {abs(first.margin):.3g} ({call})"
        ]
    lines += [f"  nanovllm     {tokens.ours}", f"  transformers {tokens.theirs}"]
    if tokens.our_text or tokens.their_text:
        lines += [f"  nanovllm     {tokens.our_text!r}", f"  transformers {tokens.their_text!r}"]
    if tokens.differences:
        step = max(range(len(tokens.differences)), key=lambda step: tokens.differences[step] / tokens.tolerated[step])
        lines.append(
            f"log-probabilities after our tokens: off by up to {max(tokens.differences):.3g}; worst at step {step}, "
            f"where {tokens.tolerated[step]:.3g} is tolerated"
        )
    return lines


def _weights(weights: list[WeightComparison], verbose: bool) -> list[str]:
    wrong = [weight for weight in weights if not weight.equal]
    lines = [
        f"weights: {len(weights) - len(wrong)} of {counted(len(weights), 'tensor')} of the checkpoint are what "
        "the engine has"
    ]
    for weight in weights if verbose else wrong:
        told = (
            "equal"
            if weight.equal
            else f"DIFFERS by up to {weight.difference:.3g} in {counted(weight.differing, 'element')}; {weight.hint}"
        )
        lines.append(
            f"  {weight.name} {weight.shape}: mean {weight.mean:.3g}, std {weight.std:.3g}, "
            f"largest {weight.largest:.3g}: {told}"
        )
    return lines
