"""Two settings of the engine, on the same prompt: tokens, log-probabilities, and the layers where they can be seen."""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from nanovllm import kernels
from nanovllm.config import EngineConfig
from nanovllm.diagnostics.compare_trace import Trace, operation_names, record
from nanovllm.llm import LLM
from nanovllm.outputs import Logprob
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.validation import unknown_argument

# Not a field of the configuration: kernels to switch off, as NANOVLLM_DISABLE does.
DISABLE = "disable"
NUM_LOGPROBS = 5
# What two log-probabilities may differ by: in float32, in 16 bits, and where eight bits are in play.
TOLERANCES = {"float32": 1e-3, "half": 0.25, "int8": 1.0}
# The same of an operation's result, of the largest number of its row.
OPERATION_TOLERANCES = {"float32": 1e-3, "half": 0.1, "int8": 0.5}


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``name=value`` pairs of the engine's arguments, and ``disable=kernel,kernel``.

    Raises:
        ValueError: One is no such pair, its value cannot be read, or there is no such kernel.
        TypeError: There is no such argument; the message names the nearest.
    """
    fields = {one.name: one for one in dataclasses.fields(EngineConfig)}
    types_of = typing.get_type_hints(EngineConfig)
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} is not name=value, such as attention_backend=matmul")
        if name == DISABLE:
            kernels.feature_names(text, f"{DISABLE}={text}")
            found[name] = text
            continue
        if name not in fields:
            raise unknown_argument("LLM", name, [*fields, DISABLE])
        found[name] = _parsed(name, text, types_of[name])
    return found


def _parsed(name: str, text: str, kind: Any) -> Any:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds:
        known = {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
        }
        if text.lower() not in known:
            raise ValueError(f"{name} is {text!r}; use true or false")
        return known[text.lower()]
    if str in kinds:
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, which is not a value for it") from None


@dataclass(slots=True)
class Answer:
    """What an engine gave in one run of the prompt.

    Args:
        token_ids: Its greedy tokens.
        logprobs: Of each of them, and of the most likely ones, by token id.
        prompt_logprobs: Of the prompt's tokens from the second on; empty if they were not asked for.
        num_cached_tokens: Prompt tokens that came from the prefix cache.
    """

    token_ids: list[int]
    logprobs: list[dict[int, float]]
    prompt_logprobs: list[float]
    num_cached_tokens: int


@dataclass(slots=True)
class Difference:
    """Two runs of a prompt.

    Args:
        what: Which.
        largest: The largest difference of a log-probability after the same tokens.
        mean: Their mean.
        position: Where it is largest; an output token's position is behind the prompt's.
        by_position: All of them, from position 1 on.
        first_difference: Number of the first output token that differs; None if none does.
        tokens: That of each.
        margin: By how much each prefers its own there; None if the other's is not among its most likely.
    """

    what: str
    largest: float = 0.0
    mean: float = 0.0
    position: int | None = None
    by_position: dict[int, float] = field(default_factory=dict)
    first_difference: int | None = None
    tokens: tuple[int, int] | None = None
    margin: float | None = None

    def departs(self, tolerance: float) -> bool:
        """A difference of tokens is no departure where rounding may decide between them."""
        far = self.first_difference is not None and (self.margin is None or self.margin > 2 * tolerance)
        return far or not self.largest <= tolerance


@dataclass(slots=True)
class SettingsComparison:
    """What :func:`compare_settings` has found.

    Args:
        settings: The two.
        token_ids: The prompt.
        answers: Of each, its two runs; of the second no log-probabilities of the prompt are asked, so that the prefix
            cache may serve it.
        texts: Of each, the first run's text; empty without a tokenizer.
        differences: Between the settings, and between the runs of each.
        tolerance: Of log-probabilities.
        first_operation: The first one whose results differ beyond what their dtypes explain, as (name, relative
            error, token); None if there is none, or the layers of one cannot be seen (several ranks).
        operations: By name, the relative error of each that both can show.
    """

    settings: tuple[dict[str, Any], dict[str, Any]]
    token_ids: list[int]
    answers: tuple[list[Answer], list[Answer]]
    texts: tuple[str, str]
    differences: list[Difference]
    tolerance: float
    first_operation: tuple[str, float, int] | None
    operations: dict[str, float]

    def departs(self) -> bool:
        return any(difference.departs(self.tolerance) for difference in self.differences)

    def summary(self) -> str:
        """One line."""
        for difference in self.differences:
            if not difference.departs(self.tolerance):
                continue
            where = ""
            if self.first_operation is not None:
                where = f"{place_of(self.first_operation[0])}: "
            if difference.largest > self.tolerance:
                found = (
                    f"log-probabilities differ by up to {difference.largest:.3g} (at position {difference.position})"
                )
            else:
                found = f"output token {difference.first_difference} differs, and not by a close call"
            return f"departs: {where}{difference.what}: {found}; tolerated are {self.tolerance:g}"
        largest = max(difference.largest for difference in self.differences)
        return (
            f"equal within tolerance: log-probabilities differ by up to {largest:.3g}; tolerated are {self.tolerance:g}"
        )


def place_of(name: str) -> str:
    """``layers.1.q_norm`` in words."""
    parts = name.split(".")
    return name if len(parts) == 1 else f"layer {parts[1]}, {parts[2]}"


def compare_settings(
    arguments: dict[str, Any],
    first: dict[str, Any],
    second: dict[str, Any],
    token_ids: list[int],
    max_tokens: int = 16,
    tolerance: float | None = None,
) -> SettingsComparison:
    """Run a prompt twice under each of two settings, one engine after the other.

    Args:
        arguments: Of ``LLM``, for both.
        first: Those that only the first has, and perhaps ``disable``.
        second: The same of the second.
        token_ids: The prompt.
        max_tokens: Greedy tokens.
        tolerance: Of log-probabilities; by default what the dtypes explain.

    Raises:
        TypeError: An argument is unknown or of the wrong type.
        ValueError: An engine cannot be had so, or the prompt does not fit.
    """
    runs = [_run({**arguments, **settings}, token_ids, max_tokens) for settings in (first, second)]
    (a, trace_a, text_a, kind_a), (b, trace_b, text_b, kind_b) = runs
    kind = max(kind_a, kind_b, key=list(TOLERANCES).index)
    first_operation: tuple[str, float, int] | None = None
    operations: dict[str, float] = {}
    if trace_a is not None and trace_b is not None:
        operations, first_operation = _operations(trace_a, trace_b, OPERATION_TOLERANCES[kind])
    return SettingsComparison(
        (first, second),
        token_ids,
        (a, b),
        (text_a, text_b),
        [
            _difference("one setting and the other", a[0], b[0], len(token_ids)),
            _difference("one setting and the other, when the prompt comes again", a[1], b[1], len(token_ids)),
            _difference("the first setting, when the prompt comes again", a[0], a[1], len(token_ids)),
            _difference("the second setting, when the prompt comes again", b[0], b[1], len(token_ids)),
        ],
        TOLERANCES[kind] if tolerance is None else tolerance,
        first_operation,
        operations,
    )


def _run(
    arguments: dict[str, Any], token_ids: list[int], max_tokens: int
) -> tuple[list[Answer], Trace | None, str, str]:
    """Two runs, what the layers give, the text, and the key of its tolerance."""
    disabled = arguments.pop(DISABLE, "")
    with without_kernels(disabled), LLM(**arguments) as llm:
        config = llm.engine.config
        dtype = llm.engine.runner.dtype
        kind = "int8" if config.quantization else "float32" if dtype == torch.float32 else "half"
        answers = [_ask(llm, token_ids, max_tokens, prompt_logprobs) for prompt_logprobs in (1, None)]
        trace = record(llm, token_ids)[0] if config.tensor_parallel_size == 1 else None
        tokenizer: Any = llm.engine.tokenizer
        text = "" if tokenizer is None else tokenizer.decode(answers[0].token_ids)
    return answers, trace, text, kind


@contextmanager
def without_kernels(names: str) -> Iterator[None]:
    """Kernels switched off while an engine is made and used."""
    before = os.environ.get(kernels.DISABLE_VARIABLE)
    if names:
        os.environ[kernels.DISABLE_VARIABLE] = f"{before or ''} {names}"
    try:
        yield
    finally:
        if names and before is None:
            del os.environ[kernels.DISABLE_VARIABLE]
        elif names and before is not None:
            os.environ[kernels.DISABLE_VARIABLE] = before


def _ask(llm: LLM, token_ids: list[int], max_tokens: int, prompt_logprobs: int | None) -> Answer:
    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        logprobs=NUM_LOGPROBS,
        prompt_logprobs=prompt_logprobs,
        detokenize=False,
    )
    [output] = llm.generate([token_ids], params, use_tqdm=False)
    completion = output.outputs[0]
    known: list[dict[int, Logprob] | None] = list(output.prompt_logprobs or [])
    of_prompt = [entry[token].logprob for token, entry in zip(token_ids, known, strict=False) if entry is not None]
    logprobs = [{token: entry.logprob for token, entry in step.items()} for step in completion.logprobs or []]
    return Answer(list(completion.token_ids), logprobs, of_prompt, output.num_cached_tokens)


def _difference(what: str, a: Answer, b: Answer, num_prompt_tokens: int) -> Difference:
    found = Difference(what)
    for position, (one, other) in enumerate(zip(a.prompt_logprobs, b.prompt_logprobs, strict=False), 1):
        found.by_position[position] = abs(one - other)
    for step, (mine, theirs) in enumerate(zip(a.logprobs, b.logprobs, strict=False)):
        # The token they both took, and what else both have among the likeliest.
        both = [abs(mine[token] - theirs[token]) for token in mine.keys() & theirs.keys()]
        found.by_position[num_prompt_tokens + step] = max(both, default=float("inf"))
        if a.token_ids[step] != b.token_ids[step]:
            found.first_difference = step
            token, other = found.tokens = a.token_ids[step], b.token_ids[step]
            if other in mine and token in theirs:
                found.margin = max(mine[token] - mine[other], theirs[other] - theirs[token])
            break
    if found.by_position:
        found.position = max(found.by_position, key=lambda position: found.by_position[position])
        found.largest = found.by_position[found.position]
        found.mean = sum(found.by_position.values()) / len(found.by_position)
    return found


def _operations(a: Trace, b: Trace, tolerance: float) -> tuple[dict[str, float], tuple[str, float, int] | None]:
    """Relative errors of what both show, and the first of them that is beyond ``tolerance``."""
    layers = 1 + max((int(name.split(".")[1]) for name in a.values if name.startswith("layers.")), default=0)
    errors: dict[str, float] = {}
    first = None
    for name in operation_names(layers):
        if name not in a.values or name not in b.values:
            continue
        one, other = (trace.values[name].float().flatten(1) for trace in (a, b))
        by_token = (one - other).abs().amax(dim=1) / one.abs().amax(dim=1).clamp(min=1e-30)
        by_token[(one == other).all(dim=1)] = 0.0
        errors[name] = float(by_token.nan_to_num(nan=float("inf")).max())
        if first is None and errors[name] > tolerance:
            first = name, errors[name], int(by_token.nan_to_num(nan=float("inf")).argmax())
    return errors, first
