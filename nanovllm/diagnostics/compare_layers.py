"""Our model against transformers', operation by operation: which departs, and which only passes on what it was given.

Each result is judged twice. Its *own* error is the difference from what transformers' operation makes of our inputs:
there an operation answers for itself. Its *total* error is the difference from transformers' own run, where the
errors of everything before it have added up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nanovllm.diagnostics.compare_hints import find_hint, find_mask
from nanovllm.diagnostics.compare_reference import Redone, Reference, trace_reference
from nanovllm.diagnostics.compare_trace import HEAD_OPERATIONS, Trace, operation_names

# An operation's own error, of the largest number of its row (a token, or a head of it): in float32 a few units in the
# seventh digit, and the sums of large products some more.
OWN_FLOAT32 = 2e-5
# That of the whole run up to there.
TOTAL_FLOAT32 = 3e-4
# In 16 bits transformers' own operation, in the same dtype, is off by so much; ours may be off by so many times that,
OWN_FACTOR, TOTAL_FACTOR = 4.0, 6.0
# and by so many units in the last place, wherever it happens to be exact.
OWN_UNITS, TOTAL_UNITS = 2.0, 8.0
# A row may be small beside others that had a part in its sums: no scale is less than this share of the largest.
SMALLEST_SCALE = 1e-3
# int8: standard deviations of the rounding of weights and inputs. (Of millions of numbers one is 5.5 of them off.)
INT8_DEVIATIONS = 8.0


@dataclass(slots=True)
class Error:
    """The largest difference between two results of an operation, measured in what is tolerated.

    Args:
        ratio: Of the place where it is largest in relation to what is tolerated there; above 1 it departs.
        absolute: The difference there.
        relative: The same, of the largest number of the row.
        found, expected: The two numbers.
        token: Index of the token.
        head: Of the head; None where there are none.
        index: Within the row, or within the head.
        by_head: The largest ratio of each head.
    """

    ratio: float
    absolute: float
    relative: float
    found: float
    expected: float
    token: int
    head: int | None
    index: int
    by_head: list[float] = field(default_factory=list)


@dataclass(slots=True)
class OperationResult:
    """How one operation of one path compares.

    Args:
        path: As in ``Trace``.
        name: As in ``Trace``.
        own: None if the operation was not run by itself.
        total: The same.
        departs: Whether it gives something else than transformers' operation from the same inputs, or was left out.
        hint: What it looks like.
    """

    path: str
    name: str
    own: Error | None
    total: Error | None
    departs: bool = False
    hint: str = ""

    @property
    def layer(self) -> int | None:
        """Its layer; None for what is outside of them."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def operation(self) -> str:
        """Its name within the layer."""
        return self.name.rpartition(".")[2]


@dataclass(slots=True)
class LayerComparison:
    """What :func:`compare_layers` has found.

    Args:
        results: By path, in the order in which operations run.
        masks: By path and layer, a line a query: which keys it attends to. Of short prompts only.
    """

    results: list[OperationResult]
    masks: dict[str, dict[int, list[str]]]

    def first_departure(self) -> OperationResult | None:
        """The operation that is wrong: the earliest one, of whichever path; the plain path's is the most exact."""
        return self._first([result for result in self.results if result.departs])

    def first_sum(self) -> OperationResult | None:
        """The first one whose total error is more than is tolerated, whoever is to blame."""
        return self._first([result for result in self.results if result.total and result.total.ratio > 1])

    def _first(self, results: list[OperationResult]) -> OperationResult | None:
        layers = 1 + max((result.layer or 0 for result in self.results), default=0)
        order = {name: number for number, name in enumerate(operation_names(layers))}
        paths = ("engine", "plain", "decode")
        return min(results, key=lambda result: (order[result.name], paths.index(result.path)), default=None)


@torch.inference_mode()
def compare_layers(
    reference: Reference, prompts: Sequence[Trace], decode: Trace | None = None, is_int8: bool = False
) -> LayerComparison:
    """Judge what our model did.

    Args:
        reference: transformers' model.
        prompts: Traces of the same prompt, of one path each; the first is that of the engine.
        decode: What followed it there.
        is_int8: Whether our products are of eight bits.
    """
    context = prompts[0]
    token_ids = context.token_ids + (decode.token_ids if decode is not None else [])
    runs = [trace_reference(model, token_ids) for model in reference.models()]
    results: list[OperationResult] = []
    masks: dict[str, dict[int, list[str]]] = {}
    for trace in (*prompts, *([decode] if decode is not None else [])):
        judge = _Judge(reference, trace, context if trace is decode else None, runs, is_int8)
        results += judge.results()
        masks[trace.path] = judge.masks
    return LayerComparison(results, masks)


class _Judge:
    """Compares one trace."""

    def __init__(
        self, reference: Reference, trace: Trace, context: Trace | None, runs: list[Trace], is_int8: bool
    ) -> None:
        self.reference, self.trace, self.runs, self.is_int8 = reference, trace, runs, is_int8
        self.redone = [
            Redone(model, trace, None if context is None else Redone(model, context)) for model in reference.models()
        ]
        self.head_dim = reference.exact.model.layers[0].self_attn.head_dim
        self.masks: dict[int, list[str]] = {}
        self.unit = torch.finfo(reference.dtype).eps

    def results(self) -> list[OperationResult]:
        found = [self._judge(name) for name in operation_names(len(self.reference.exact.model.layers))]
        return [result for result in found if result is not None]

    def _judge(self, name: str) -> OperationResult | None:
        ours = self.trace.values.get(name)
        if ours is None:
            # Within a fused kernel nothing can be seen; but by itself every operation must have been run.
            if self.trace.path != "plain":
                return None
            return OperationResult("plain", name, None, None, True, "was not run")
        expected = [redone.expected(name).cpu() for redone in self.redone]
        if ours.shape != expected[0].shape:
            shapes = f"has shape {list(ours.shape)}, expected {list(expected[0].shape)}"
            return OperationResult(self.trace.path, name, None, None, True, shapes)
        own = self._error(name, ours, expected, OWN_FLOAT32, OWN_FACTOR, OWN_UNITS, self._int8_error(name))
        rows = slice(self.trace.positions[0], self.trace.positions[-1] + 1)
        runs = [run.values[name][rows] for run in self.runs]
        total = None
        if not self.is_int8:  # whose error nothing of the same kind tells
            total = self._error(name, ours, runs, TOTAL_FLOAT32, TOTAL_FACTOR, TOTAL_UNITS)
        result = OperationResult(self.trace.path, name, own, total, own.ratio > 1)
        if result.operation == "attention" and result.layer in self.trace.attention_weights:
            weights = self.trace.attention_weights[result.layer]
            mask, wrong = find_mask(weights, self.redone[0].attention_weights(result.layer))
            self.masks[result.layer] = mask
            if wrong:
                result.departs, result.hint = True, wrong
        if result.departs and not result.hint:
            result.hint = find_hint(name, self.redone[0])
        return result

    def _error(
        self,
        name: str,
        ours: torch.Tensor,
        expected: list[torch.Tensor],
        float32: float,
        factor: float,
        units: float,
        more: torch.Tensor | None = None,
    ) -> Error:
        exact = self._by_head(name, expected[0].float())
        scale = exact.abs().amax(dim=-1, keepdim=True)
        scale = scale.clamp(min=max(SMALLEST_SCALE * float(scale.max()), torch.finfo(torch.float32).tiny))
        if len(expected) == 1:
            tolerated = float32 * scale
        else:
            theirs = (self._by_head(name, expected[1].float()) - exact).abs().amax(dim=-1, keepdim=True) / scale
            theirs = theirs.maximum(theirs.mean())
            tolerated = (factor * theirs + units * self.unit) * scale
        found = self._by_head(name, ours.float())
        difference = (found - exact).abs_()
        if not difference.sum().isfinite():  # the same infinity, or NaN in both, is no difference
            difference[found.isnan() & exact.isnan() | (found == exact)] = 0.0
        if more is not None:  # tolerated by element
            tolerated = tolerated + self._by_head(name, more)
            shares = difference / tolerated
        else:
            shares = difference
        largest = shares.amax(dim=-1)  # [tokens], or [tokens, heads]
        ratios = largest if more is not None else largest / tolerated.squeeze(-1)
        ratios = ratios.nan_to_num(nan=math.inf, posinf=math.inf)
        row = torch.unravel_index(ratios.argmax(), ratios.shape)
        place = (*row, shares[row].nan_to_num(nan=math.inf, posinf=math.inf).argmax())
        heads = ratios.dim() == 2
        return Error(
            ratio=float(ratios[row]),
            absolute=float(difference[place]),
            relative=float(difference[place] / scale[row].squeeze()),
            found=float(found[place]),
            expected=float(exact[place]),
            token=int(place[0]),
            head=int(place[1]) if heads else None,
            index=int(place[-1]),
            by_head=ratios.amax(dim=0).tolist() if heads else [],
        )

    def _by_head(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """[tokens, n], or [tokens, heads, head_dim] where an operation's rows are heads."""
        if name.rpartition(".")[2] in HEAD_OPERATIONS and rows.dim() == 2 and rows.shape[1] > 1:
            return rows.unflatten(-1, (-1, self.head_dim))
        return rows

    def _int8_error(self, name: str) -> torch.Tensor | None:
        """How far rounding to eight bits may take a product, [tokens, outputs]; None where nothing is so rounded.

        Each weight and each input is off by at most half a step, evenly: a twelfth of the step's square on average.
        """
        factors = self.redone[0].linear(name) if self.is_int8 else None
        if factors is None:
            return None
        weight, x = (factor.float() for factor in factors)
        step_of_weight = weight.abs().amax(dim=1) / 127
        step_of_x = x.abs().amax(dim=1, keepdim=True) / 127
        from_weight = step_of_weight.square() * x.square().sum(dim=1, keepdim=True)
        from_x = step_of_x.square() * weight.square().sum(dim=1)
        return (INT8_DEVIATIONS * ((from_weight + from_x) / 12).sqrt()).cpu()
