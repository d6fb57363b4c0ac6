"""The tokenizer of a checkpoint: its vocabulary beside the model's, its special tokens, and texts there and back."""

import os
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from nanovllm.config import EngineConfig
from nanovllm.diagnostics.inspect.findings import Findings
from nanovllm.diagnostics.inspect.parameters import ParametersSection
from nanovllm.engine.tokenizer import load_tokenizer
from nanovllm.utils.model_config import ModelConfig
from nanovllm.utils.text import counted

# What becomes of a text on its way to token ids and back.
SAME, NORMALIZED, DIFFERENT = "same", "normalized", "different"

TEXTS = {
    "plain": "The quick brown fox jumps over the lazy dog.",
    "accents": "Ünïcödé: naïve café, Ærøskøbing, ¿qué?",
    "scripts": "日本語のテスト 한국어 العربية हिन्दी Ελληνικά русский",
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🇺🇳 ☃️",
    "whitespace": "  two  spaces,\ttabs\t\tand\n\n\nlines \r\n end  ",
    "code": "def f(x):\n    return {'a': x[0] ** 2, \"b\": None}  # -> dict\n",
    "numbers": "3.14159 1,000,000 -42 0x1F 6.02e+23",
    "combining": "e\u0301 a\u030a n\u0303",
    "invisible": "zero\u200bwidth no\u00a0break soft\u00adhyphen \ufeffmark",
    "beyond the plane": "\U0001d518\U0001d52b\U0001d526 \U00012000 \U0001f701",
    "control": "\x00\x01 \x1b[0m \x7f",
}
_CONTEXT = 12  # characters of a difference that are shown


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """A text that was tokenised and decoded.

    Args:
        name: What the text is to try.
        text: The text.
        token_ids: Its tokens.
        decoded: What they decode to.
        outcome: "same", "normalized" (equal once both are normalised as Unicode has it) or "different".
        difference: The first place where they differ, in words; empty if they do not.
    """

    name: str
    text: str
    token_ids: list[int]
    decoded: str
    outcome: str
    difference: str = ""


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that was added to the vocabulary.

    Args:
        id: Its id.
        text: Its text.
        special: Whether it is left out of texts.
        roles: What the tokenizer takes it for: "eos_token", "pad_token", ...
        ends_text: Whether the engine stops at it.
    """

    id: int
    text: str
    special: bool
    roles: list[str]
    ends_text: bool


@dataclass(frozen=True, slots=True)
class EndToken:
    """An id at which the engine stops, and its text; None if the tokenizer has no such token."""

    id: int
    text: str | None


@dataclass(frozen=True, slots=True)
class TokenizerSection:
    """The section "tokenizer".

    Args:
        kind: The tokenizer's class.
        num_tokens: Entries of its vocabulary, those added included.
        largest_id: The largest of their ids.
        vocab_size: The model's, by config.json; None if that could not be understood.
        embedding_rows: Rows of the embedding in the files; None if it is not there.
        head_rows: Rows of the output head in the files; None if it is not there.
        special_tokens: Added tokens, by id.
        end_tokens: Ids at which the engine stops, the main one first.
        round_trips: Texts there and back.
    """

    kind: str
    num_tokens: int
    largest_id: int
    vocab_size: int | None
    embedding_rows: int | None
    head_rows: int | None
    special_tokens: list[SpecialToken]
    end_tokens: list[EndToken]
    round_trips: list[RoundTrip]


def read_tokenizer(config: EngineConfig, findings: Findings) -> Any:
    """The tokenizer, or None if it cannot be loaded, which is a problem."""
    try:
        return load_tokenizer(config.tokenizer or config.model)
    except ValueError as error:
        findings.problem("tokenizer", "tokenizer", error)
        return None


def inspect_tokenizer(
    config: EngineConfig,
    model: ModelConfig | None,
    tokenizer: Any,
    weights: ParametersSection,
    findings: Findings,
) -> TokenizerSection | None:
    """The section "tokenizer"; None if there is none.

    Args:
        config: The engine's configuration.
        model: The checkpoint's, or None.
        tokenizer: From :func:`read_tokenizer`.
        weights: What the files hold; the headers will do.
        findings: What is wrong goes here.
    """
    if tokenizer is None:
        return None
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    rows = [
        None if tensor is None or not tensor.shape else tensor.shape[0]
        for tensor in (weights.find("model.embed_tokens.weight"), weights.find("lm_head.weight"))
    ]
    ends = () if model is None else model.eos_token_ids
    texts = {token_id: text for text, token_id in vocabulary.items()}
    section = TokenizerSection(
        kind=type(tokenizer).__name__,
        num_tokens=len(vocabulary),
        largest_id=largest,
        vocab_size=None if model is None else model.vocab_size,
        embedding_rows=rows[0],
        head_rows=rows[1],
        special_tokens=_special_tokens(tokenizer, ends),
        end_tokens=[EndToken(token_id, texts.get(token_id)) for token_id in ends],
        round_trips=[round_trip(tokenizer, name, text) for name, text in TEXTS.items()],
    )
    _judge_sizes(section, findings)
    _judge_ends(section, tokenizer, findings)
    for trip in section.round_trips:
        if trip.outcome == DIFFERENT:
            findings.problem("tokenizer", "round trip", f"the text {trip.name!r} comes back changed: {trip.difference}")
        elif trip.outcome == NORMALIZED:
            findings.note("tokenizer", f"the text {trip.name!r} comes back in another of Unicode's normal forms")
    for token in section.special_tokens:
        ids = list(tokenizer.encode(token.text, add_special_tokens=False))
        if ids != [token.id]:
            findings.problem(
                "tokenizer", "special token", f"{token.text!r} is id {token.id}, but its text becomes {ids}"
            )
    if config.tokenizer is not None and os.path.realpath(config.tokenizer) != os.path.realpath(config.model):
        findings.note("tokenizer", f"it is that of {config.tokenizer}")
    return section


def round_trip(tokenizer: Any, name: str, text: str) -> RoundTrip:
    """Tokenise a text and decode it, as the engine does."""
    ids = [int(token_id) for token_id in tokenizer.encode(text, add_special_tokens=False)]
    decoded = str(tokenizer.decode(ids, skip_special_tokens=False))
    if decoded == text:
        return RoundTrip(name, text, ids, decoded, SAME)
    forms: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
    is_normal = any(unicodedata.normalize(form, text) == decoded for form in forms)
    outcome = NORMALIZED if is_normal else DIFFERENT
    return RoundTrip(name, text, ids, decoded, outcome, _difference(text, decoded))


def _difference(text: str, decoded: str) -> str:
    """The first place where two texts differ, in words."""
    pairs = enumerate(zip(text, decoded, strict=False))
    at = next((index for index, (one, other) in pairs if one != other), min(len(text), len(decoded)))
    before, after = (one[at : at + _CONTEXT] for one in (text, decoded))
    return f"at character {at} {before!a} has become {after!a}"


def _special_tokens(tokenizer: Any, ends: tuple[int, ...]) -> list[SpecialToken]:
    roles: dict[str, list[str]] = {}
    for role, text in tokenizer.special_tokens_map.items():
        if isinstance(text, str):
            roles.setdefault(text, []).append(role)
    return [
        SpecialToken(token_id, str(token), bool(token.special), roles.get(str(token), []), token_id in ends)
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
    ]


def _judge_sizes(section: TokenizerSection, findings: Findings) -> None:
    """Compare vocabulary, embedding and tokenizer."""
    size = section.vocab_size
    if size is not None and section.largest_id >= size:
        findings.problem(
            "tokenizer",
            "vocabulary",
            f"the tokenizer has ids up to {section.largest_id}, beyond the model's vocab_size of {size}: prompts with "
            "such ids are refused; tokenizer and model do not belong together, or config.json is wrong",
        )
    for name, rows in (("embedding", section.embedding_rows), ("output head", section.head_rows)):
        if size is not None and rows is not None and rows != size:
            findings.problem("tokenizer", "vocabulary", f"the {name} has {counted(rows, 'row')}, vocab_size is {size}")
    if size is not None and section.largest_id + 1 < size:
        findings.note(
            "tokenizer",
            f"{counted(size - section.largest_id - 1, 'id')} of the model have no token (padding, as a rule)",
        )


def _judge_ends(section: TokenizerSection, tokenizer: Any, findings: Findings) -> None:
    """Compare the ids that the engine stops at with the vocabulary."""
    for end in section.end_tokens:
        if section.vocab_size is not None and end.id >= section.vocab_size:
            findings.problem(
                "tokenizer", "vocabulary", f"eos_token_id {end.id} is outside the vocabulary of {section.vocab_size}"
            )
        elif end.text is None:
            findings.problem("tokenizer", "vocabulary", f"eos_token_id {end.id} is no token of the tokenizer's")
    own = tokenizer.eos_token_id
    if own is not None and section.end_tokens and own not in [end.id for end in section.end_tokens]:
        findings.note(
            "tokenizer", f"the engine does not stop at the tokenizer's eos_token {tokenizer.eos_token!r} ({own})"
        )
