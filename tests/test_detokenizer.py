"""The text of a sequence comes token by token, is what all its tokens decode to, and ends at its first stop string."""

from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.detokenizer import WINDOW, Detokenizer, decode

# derandomize: the same texts on every machine; a failure elsewhere is a failure here.
checked = settings(deadline=None, derandomize=True, database=None, max_examples=200)

REPLACEMENT = "\ufffd"
FAMILY = "👩\u200d👩\u200d👧\u200d👦"  # 4 emoji and 3 joiners
CORPUS = [
    "The quick brown fox jumps over the lazy dog; don't stop, it said. " * 3,
    "你好世界。今天天气很好。我们去公园散步吧。" * 3,
    "日本語のテキストもあります。 한국어 문장도 있습니다. " * 3,
    "Привет, мир! Ελληνικά, עברית, العربية, हिन्दी, ภาษาไทย " * 3,
    f"😀😃🎉👍🏽 {FAMILY} 🏳️\u200d🌈 naïve cafe\u0301 {REPLACEMENT} " * 3,
]
SPECIAL = "<|im_end|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrap(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """As Qwen's, small: few merges, so that most characters beyond ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens(["<think>", "思考"])
    return wrap(tokenizer, clean_up_tokenization_spaces=False)


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: pieces with ▁ for a space, bytes for what has no piece, the first space stripped."""
    pieces = ["<unk>", *BYTES, "▁", "▁▁", "▁the", "▁Hello", "He", "llo", "s", "t", "op", "▁st", ".", "你", "é", "\n"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(tokenizer, clean_up_tokenization_spaces=False)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """As T5's: the first token loses all its leading spaces."""
    pieces = ["<unk>", "▁", "▁▁", "▁the", "▁Hello", "llo", "s", "t", "op", "▁st", ".", "你", "é"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    return wrap(tokenizer, clean_up_tokenization_spaces=False)


@cache
def word_piece(clean_up: bool = False) -> PreTrainedTokenizerFast:
    """As BERT's: spaces between words, none before ``##``; ``clean_up`` takes some away afterwards."""
    pieces = ["[UNK]", "hello", "do", "n", "'", "t", "##s", "##ing", ".", ",", "你", "##é", "stop", "'t", "not"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return wrap(tokenizer, clean_up_tokenization_spaces=clean_up)


@cache
def demo() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL_PATH)


TOKENIZERS: list[Callable[[], Any]] = [byte_level, byte_fallback, metaspace, word_piece, demo]


@cache
def byte_tokens() -> list[int]:
    """Byte-level token ids of the bytes 0 to 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return byte_level().convert_tokens_to_ids([characters[byte] for byte in range(256)])


def joined(parts: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def from_bytes(data: bytes) -> list[int]:
    return [byte_tokens()[byte] for byte in data]


CHARACTERS = st.one_of(
    st.sampled_from([*"ab .\n", "é", "e\u0301", "你", "好", "한", "😀", "👍🏽", FAMILY, "🏳️\u200d🌈", "\u200d", "\0"]),
    st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT),
)
TEXTS = st.lists(CHARACTERS, max_size=30).map("".join)
# Ids that show as nothing: one beyond the vocabulary and a special token.
UNSEEN = st.deferred(lambda: st.sampled_from([[100_000], [byte_level().convert_tokens_to_ids(SPECIAL)]]))
VALID = st.lists(
    st.one_of(
        TEXTS.map(lambda text: byte_level().encode(text)),
        TEXTS.map(lambda text: from_bytes(text.encode())),
        st.just(REPLACEMENT).map(lambda text: byte_level().encode(text)),
        UNSEEN,
    ),
    max_size=5,
).map(joined)
# Bytes that begin characters, continue them, or are never valid; cut characters; surrogates and overlong forms.
INVALID = st.one_of(
    st.binary(max_size=8),
    st.lists(st.sampled_from(list(b"\xf0\x9f\x98\x80\xe4\xbd\xa0\xc3\xa9\xff\xed\xc0A")), max_size=40).map(bytes),
).map(from_bytes)
ANYTHING = st.lists(st.one_of(VALID, INVALID, INVALID, UNSEEN), max_size=6).map(joined)


def at_once(ids: list[int], tokenizer: Any = None, *, skip_special_tokens: bool = True) -> str:
    return (tokenizer or byte_level()).decode(ids, skip_special_tokens=skip_special_tokens)


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    """Feed tokens one by one to their end, or to a stop; the deltas, the last one being the rest."""
    deltas = []
    for token_id in ids:
        if detokenizer.append([token_id]) is not None:
            break
        deltas.append(detokenizer.take_delta(finished=False))
    detokenizer.finish()
    return [*deltas, detokenizer.take_delta(finished=True)]


def text_of(ids: list[int], tokenizer: Any = None, **options: Any) -> str:
    detokenizer = Detokenizer(tokenizer or byte_level(), **options)
    detokenizer.append(ids)
    detokenizer.finish()
    return detokenizer.text


def shared(a: str, b: str) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class TestText:
    """Without a stop string, the text is what the tokens decode to at once."""

    @checked
    @given(ids=ANYTHING, skip=st.booleans())
    def test_deltas_and_text_are_what_all_tokens_decode_to_whatever_the_bytes(self, ids: list[int], skip: bool) -> None:
        detokenizer = Detokenizer(byte_level(), skip_special_tokens=skip)
        deltas = stream(detokenizer, ids)
        assert detokenizer.text == at_once(ids, skip_special_tokens=skip)
        assert "".join(deltas) == detokenizer.text
        assert detokenizer.token_ids == ids
        assert detokenizer.take_delta(finished=True) == ""

    @checked
    @given(ids=ANYTHING, later=ANYTHING)
    def test_what_is_certain_is_never_taken_back_and_lacks_three_characters_at_most(
        self, ids: list[int], later: list[int]
    ) -> None:
        detokenizer = Detokenizer(byte_level())
        detokenizer.append(ids)
        assert at_once(ids + later).startswith(detokenizer.text)
        assert at_once(ids).startswith(detokenizer.text)
        left_out = at_once(ids)[len(detokenizer.text) :]
        assert left_out in ("", REPLACEMENT, REPLACEMENT * 2, REPLACEMENT * 3)

    @checked
    @given(text=TEXTS, more=TEXTS)
    def test_characters_come_whole_and_at_once(self, text: str, more: str) -> None:
        ids = from_bytes((text + more).encode())
        detokenizer = Detokenizer(byte_level())
        so_far = ""
        for count in range(1, len(ids) + 1):
            detokenizer.append(ids[count - 1 : count])
            so_far += detokenizer.take_delta(finished=False)
            assert so_far == at_once(ids[:count]).rstrip(REPLACEMENT)
        assert so_far == text + more

    @checked
    @given(ids=ANYTHING, sizes=st.lists(st.integers(0, 7), max_size=20))
    def test_it_does_not_matter_how_many_tokens_come_at_a_time(self, ids: list[int], sizes: list[int]) -> None:
        detokenizer, one_by_one = Detokenizer(byte_level()), Detokenizer(byte_level())
        at = 0
        for size in sizes:
            detokenizer.append(ids[at : at + size])
            for token_id in ids[at : at + size]:
                one_by_one.append([token_id])
            assert detokenizer.text == one_by_one.text
            at += size
        detokenizer.finish(ids[at:])
        assert detokenizer.text == at_once(ids)

    @pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda make: make.__name__)
    @pytest.mark.parametrize("skip", [True, False])
    def test_any_decoder_that_only_adds_text(self, tokenizer: Callable[[], Any], skip: bool) -> None:
        made = tokenizer()
        bytes_of_pieces = set(made.convert_tokens_to_ids(BYTES)) if tokenizer is byte_fallback else set()
        pieces = st.integers(0, len(made) + 5).filter(lambda i: i not in bytes_of_pieces).map(lambda i: [i])
        if tokenizer is byte_fallback:  # valid characters only: an invalid byte takes back those next to it
            pieces |= TEXTS.map(lambda text: made.convert_tokens_to_ids([BYTES[byte] for byte in text.encode()]))

        @settings(checked, max_examples=100)
        @given(st.lists(pieces, max_size=60).map(joined))
        def check(ids: list[int]) -> None:
            detokenizer = Detokenizer(made, skip_special_tokens=skip)
            deltas = stream(detokenizer, ids)
            assert detokenizer.text == at_once(ids, made, skip_special_tokens=skip)
            assert "".join(deltas) == detokenizer.text

        check()

    def test_leading_spaces_are_those_of_the_whole_text(self) -> None:
        made = byte_fallback()
        special = made.convert_tokens_to_ids(SPECIAL)
        ids = [special, *made.convert_tokens_to_ids(["▁", "▁Hello"]), special, *made.convert_tokens_to_ids(["▁the"])]
        detokenizer = Detokenizer(made)
        assert stream(detokenizer, ids) == ["", "", " Hello", "", " the", ""]

    def test_a_character_or_a_space_survives_any_number_of_tokens_that_show_as_nothing(self) -> None:
        unseen = [byte_level().convert_tokens_to_ids(SPECIAL), 100_000] * 50
        first, *others = from_bytes("😀".encode())
        assert "".join(stream(Detokenizer(byte_level()), [first, *unseen, *others])) == "😀"
        made = metaspace()
        hello, the = made.convert_tokens_to_ids(["▁Hello", "▁the"])
        ids = [hello, *[made.convert_tokens_to_ids(SPECIAL), 100_000] * 50, the]
        assert "".join(stream(Detokenizer(made), ids)) == "Hello the"

    def test_byte_tokens_make_characters_as_they_come(self) -> None:
        ids = byte_fallback().convert_tokens_to_ids([BYTES[byte] for byte in "é你😀".encode()])
        assert stream(Detokenizer(byte_fallback()), ids) == ["", "é", "", "", "你", "", "", "", "😀", ""]

    @pytest.mark.parametrize("text", [" 😀", "  😀", " é", " 你a", "\n😀"])
    def test_a_space_at_the_beginning_looks_invalid_beside_an_unfinished_character(self, text: str) -> None:
        ids = byte_fallback().convert_tokens_to_ids([BYTES[byte] for byte in text.encode()])
        assert "".join(stream(Detokenizer(byte_fallback()), ids)) == at_once(ids, byte_fallback())

    def test_special_tokens_show_only_if_asked_for(self) -> None:
        ids = byte_level().encode(f"Hello{SPECIAL} world")
        assert text_of(ids) == "Hello world"
        assert text_of(ids, skip_special_tokens=False) == f"Hello{SPECIAL} world"

    def test_a_character_spans_a_special_token_that_is_skipped_and_not_one_that_shows(self) -> None:
        first, *others = from_bytes("你".encode())
        ids = [first, byte_level().convert_tokens_to_ids(SPECIAL), *others]
        assert text_of(ids) == "你"
        assert text_of(ids, skip_special_tokens=False) == f"{REPLACEMENT}{SPECIAL}{REPLACEMENT * 2}"

    def test_an_unfinished_character_at_the_end_becomes_a_replacement_character(self) -> None:
        detokenizer = Detokenizer(byte_level())
        assert stream(detokenizer, from_bytes("a😀".encode()[:-1])) == ["a", "", "", "", REPLACEMENT]

    def test_nothing_is_an_empty_text(self) -> None:
        assert stream(Detokenizer(byte_level(), stop=["a"]), []) == [""]

    @pytest.mark.parametrize("tokenizer", [byte_fallback, lambda: word_piece(clean_up=True)])
    def test_decoders_that_take_text_back_give_the_right_text_in_the_end(self, tokenizer: Callable[[], Any]) -> None:
        made = tokenizer()

        @settings(checked, max_examples=100)
        @given(st.lists(st.integers(0, len(made) + 5), max_size=80))
        def check(ids: list[int]) -> None:
            detokenizer = Detokenizer(made)
            stream(detokenizer, ids)
            assert detokenizer.text == at_once(ids, made)

        check()

    def test_bytes_taken_back_are_not_said_again(self) -> None:
        ids = byte_fallback().convert_tokens_to_ids([*("<0xE4>", "<0xBD>", "<0xA0>"), "<0xFF>", "op"])
        detokenizer = Detokenizer(byte_fallback())
        assert "".join(stream(detokenizer, ids)) == f"你{REPLACEMENT}op"
        assert detokenizer.text == f"{REPLACEMENT * 4}op"

    def test_a_clean_up_across_tokens(self) -> None:
        made = word_piece(clean_up=True)
        ids = made.convert_tokens_to_ids(["hello", ",", "do", "'", "t", "stop", "."])
        detokenizer = Detokenizer(made)
        assert "".join(stream(detokenizer, ids)) == "hello, do 't stop."
        assert detokenizer.text == at_once(ids, made) == "hello, do't stop."


def first_stop(text: str, stop: list[str], after: int) -> tuple[int, int, str] | None:
    """End, beginning and name of the stop string that ends first, though beyond ``after``, by trying every place."""
    for end in range(after + 1, len(text) + 1):
        found = [(end - len(name), name) for name in stop if text[:end].endswith(name)]
        if found:
            return (end, *min(found))
    return None


@st.composite
def texts_with_stops(draw: st.DrawFn) -> tuple[list[int], list[str]]:
    """Tokens, and stop strings that are often pieces of their text or nearly so."""
    few = st.text(st.sampled_from("ab😀"), min_size=1, max_size=20).map(lambda text: byte_level().encode(text))
    ids = draw(st.one_of(VALID, few, few))
    text = at_once(ids).replace(REPLACEMENT, "")
    stops = st.one_of(
        st.text(st.sampled_from("ab😀"), min_size=1, max_size=4),
        st.tuples(st.integers(0, len(text)), st.integers(1, 12)).map(lambda at: text[at[0] :][: at[1]] or "a"),
        st.tuples(st.integers(0, len(text)), st.integers(1, 6)).map(lambda at: text[at[0] :][: at[1]] + "b"),
    )
    return ids, draw(st.lists(stops, min_size=1, max_size=4))


class TestStop:
    """The text ends before, or after, the stop string that ends first."""

    @settings(checked, max_examples=400)
    @given(case=texts_with_stops(), include=st.booleans(), min_tokens=st.one_of(st.just(0), st.integers(0, 12)))
    def test_the_same_as_trying_every_place(
        self, case: tuple[list[int], list[str]], include: bool, min_tokens: int
    ) -> None:
        ids, stop = case
        text = at_once(ids)
        # A stop string counts if it ends in text that was not certain yet after min_tokens tokens.
        expected = first_stop(text, stop, after=shared(at_once(ids[:min_tokens]), text))
        detokenizer = Detokenizer(byte_level(), stop=stop, include_stop_str_in_output=include, min_tokens=min_tokens)
        deltas = stream(detokenizer, ids)
        assert "".join(deltas) == detokenizer.text
        if expected is None:
            assert detokenizer.stop_reason is None
            assert detokenizer.text == text
            return
        end, start, name = expected
        assert detokenizer.stop_reason == name
        assert detokenizer.text == text[: end if include else start]
        completed = next(n for n in range(len(ids) + 1) if shared(at_once(ids[:n]), text) >= end)
        assert detokenizer.token_ids == ids[:completed]

    @checked
    @given(case=texts_with_stops())
    def test_only_what_may_begin_a_stop_string_is_held_back(self, case: tuple[list[int], list[str]]) -> None:
        ids, stop = case
        detokenizer = Detokenizer(byte_level(), stop=stop)
        so_far = ""
        for token_id in ids:
            if detokenizer.append([token_id]) is not None:
                break
            so_far += detokenizer.take_delta(finished=False)
            begun = [n for name in stop for n in range(1, len(name)) if detokenizer.text.endswith(name[:n])]
            assert so_far == detokenizer.text[: len(detokenizer.text) - max(begun, default=0)]

    @checked
    @given(case=texts_with_stops(), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=20))
    def test_it_does_not_matter_how_many_tokens_come_at_a_time(
        self, case: tuple[list[int], list[str]], sizes: list[int]
    ) -> None:
        ids, stop = case
        one_by_one, detokenizer = Detokenizer(byte_level(), stop=stop), Detokenizer(byte_level(), stop=stop)
        stream(one_by_one, ids)
        at = 0
        for size in sizes:
            detokenizer.append(ids[at : at + size])
            at += size
        assert detokenizer.finish(ids[at:]) == one_by_one.stop_reason
        assert detokenizer.text == one_by_one.text
        assert detokenizer.token_ids == one_by_one.token_ids

    def test_a_stop_string_spans_tokens(self) -> None:
        detokenizer = Detokenizer(byte_level(), stop=["STOP"])
        assert stream(detokenizer, from_bytes(b"xSTSTOPy")) == ["x", "", "", "ST", "", "", ""]
        assert detokenizer.stop_reason == "STOP"
        assert detokenizer.text == "xST"

    def test_a_stop_string_within_one_token_cuts_it(self) -> None:
        token = byte_level().convert_tokens_to_ids("<think>")
        assert text_of([token], stop=["hi"]) == "<t"
        assert text_of([token], stop=["hi"], include_stop_str_in_output=True) == "<thi"

    def test_the_one_that_ends_first_and_then_the_one_that_starts_first(self) -> None:
        ids = [byte_level().convert_tokens_to_ids("<think>")]
        for stop, reason in ((["think", "in"], "in"), (["in", "thin"], "thin"), (["k>", "nk"], "nk")):
            assert Detokenizer(byte_level(), stop=stop).append(ids) == reason

    def test_special_tokens_that_show_can_be_stop_strings(self) -> None:
        ids = byte_level().encode(f"Hello{SPECIAL} world")
        assert text_of(ids, stop=["end|> w"]) == "Hello world"
        assert text_of(ids, stop=["end|> w"], skip_special_tokens=False) == "Hello<|im_"

    def test_nothing_of_the_first_min_tokens_stops_but_a_beginning_counts(self) -> None:
        ids = from_bytes(b"abcabcabc")
        assert text_of(ids, stop=["abc"], min_tokens=2) == ""
        assert text_of(ids, stop=["abc"], min_tokens=3) == "abc"
        assert text_of(ids, stop=["abc"], min_tokens=5) == "abc"
        assert text_of(ids, stop=["abc"], min_tokens=8) == "abcabc"
        assert text_of(ids, stop=["abc"], min_tokens=9) == "abcabcabc"

    def test_what_cannot_be_cut_is_not_held_back(self) -> None:
        ids = from_bytes(b"ab")
        for options in (
            {"stop": ["abc"], "include_stop_str_in_output": True},
            {"stop": ["ab", "xyz"], "min_tokens": 2},
        ):
            assert stream(Detokenizer(byte_level(), **options), ids)[:2] in (["a", "b"], ["", "ab"])

    def test_the_end_of_the_sequence_may_complete_a_stop_string(self) -> None:
        detokenizer = Detokenizer(byte_level(), stop=[f"a{REPLACEMENT}"])
        assert detokenizer.append(from_bytes(b"xa\xe4")) is None
        assert detokenizer.take_delta(finished=False) == "x"
        assert detokenizer.finish() == f"a{REPLACEMENT}"
        assert detokenizer.text == "x"

    def test_after_a_stop_nothing_changes(self) -> None:
        detokenizer = Detokenizer(byte_level(), stop=["b", "ac"])
        assert detokenizer.append(from_bytes(b"abc")) == "b"
        assert detokenizer.append(from_bytes(b"d")) == detokenizer.finish(from_bytes(b"e")) == "b"
        assert detokenizer.text == detokenizer.take_delta(finished=False) == "a"
        assert detokenizer.token_ids == from_bytes(b"ab")

    def test_an_empty_stop_string_is_refused(self) -> None:
        with pytest.raises(ValueError, match="empty"):
            Detokenizer(byte_level(), stop=["a", ""])


class Counting:
    """A tokenizer that notes how long each list was that it decoded, and what it was told."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.lengths: list[int] = []
        self.options: list[dict[str, bool]] = []

    def decode(self, token_ids: list[int], **options: bool) -> str:
        self.lengths.append(len(token_ids))
        self.options.append(options)
        return self.tokenizer.decode(token_ids, **options)


class TestCost:
    """Each token costs the same, however long the sequence and whatever the model emits."""

    @pytest.mark.parametrize(
        "data",
        [
            *(b"a", "你".encode(), "😀".encode(), FAMILY.encode(), REPLACEMENT.encode()),
            *(b"\xff", b"\xe4", b"\xf0\x9f", b"\xf0\x9f\x98", b"\x80"),
        ],
    )
    @pytest.mark.parametrize("kind", ["byte level", "byte fallback", "byte fallback after a character"])
    def test_windows_are_short_however_long_the_sequence(self, data: bytes, kind: str) -> None:
        ids = from_bytes(data * 1000)
        tokenizer = Counting(byte_level())
        if kind != "byte level":
            tokenizer = Counting(byte_fallback())
            before = "你".encode() if "after" in kind else b""
            ids = byte_fallback().convert_tokens_to_ids([BYTES[byte] for byte in before + data * 1000])
        self.check(tokenizer, ids)

    @pytest.mark.parametrize("name", [SPECIAL, "<think>", "beyond the vocabulary"])
    @pytest.mark.parametrize("before", [b"", b"a", b"\xf0\x9f"])
    def test_tokens_that_show_as_nothing_do_not_add_up(self, name: str, before: bytes) -> None:
        token = 100_000 if name == "beyond the vocabulary" else byte_level().convert_tokens_to_ids(name)
        self.check(Counting(byte_level()), from_bytes(before) + [token] * 2000)

    def check(self, tokenizer: Counting, ids: list[int]) -> None:
        detokenizer = Detokenizer(tokenizer, stop=["never"])
        for token_id in ids:
            detokenizer.append([token_id])
            detokenizer.take_delta(finished=False)
        assert len(tokenizer.lengths) <= 2 * len(ids)
        assert max(tokenizer.lengths) <= 2 * WINDOW
        detokenizer.finish()
        assert tokenizer.lengths[-1] == len(ids)  # the whole of it once

    def test_an_ordinary_text_takes_little_more_than_one_decode_a_token(self) -> None:
        tokenizer = Counting(byte_level())
        ids = byte_level().encode(" ".join(CORPUS))
        Detokenizer(tokenizer).append(ids)
        assert len(tokenizer.lengths) <= 1.2 * len(ids)


class TestOptions:
    """What the tokenizer is told."""

    @example(skip=True, spaces=True)
    @given(skip=st.booleans(), spaces=st.booleans())
    def test_spaces_between_special_tokens_is_passed_on_only_to_turn_them_off(self, skip: bool, spaces: bool) -> None:
        tokenizer = Counting(byte_level())
        options = {"skip_special_tokens": skip, "spaces_between_special_tokens": spaces}
        stream(Detokenizer(tokenizer, **options), from_bytes(b"ab"))
        decode(tokenizer, from_bytes(b"ab"), **options)
        told = {"skip_special_tokens": skip} | ({} if spaces else {"spaces_between_special_tokens": False})
        assert all(given == told for given in tokenizer.options)
