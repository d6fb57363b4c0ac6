"""From tokens to text as they come, and where a stop string ends it."""

import io
from collections.abc import Sequence
from functools import partial
from typing import Any

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not UTF-8, or not yet
MAX_UNFINISHED = 3  # bytes of a character that lacks some, so that no more than 3 of those at the end can still change
WINDOW = 16  # tokens; more than an unfinished character has


def decode(
    tokenizer: Any,
    token_ids: list[int],
    *,
    skip_special_tokens: bool = True,
    spaces_between_special_tokens: bool = True,
) -> str:
    """The text of ``token_ids``, decoded at once.

    ``spaces_between_special_tokens`` is passed on only where it is False: True is what a tokenizer that knows it does
    anyway (transformers 4's slow ones; fast ones and transformers 5 take it and ignore it), and some refuse the name.
    """
    options = {} if spaces_between_special_tokens else {"spaces_between_special_tokens": False}
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **options)


def count_replacements(text: str) -> int:
    """How many replacement characters ``text`` ends with."""
    return len(text) - len(text.rstrip(REPLACEMENT))


class Detokenizer:
    """The text of one sequence, token by token, and its first stop string.

    Each token is decoded together with a short window of those before it, so that bytes become characters and leading
    spaces stay: a decode or two of a window, however long the sequence. Byte-level and SentencePiece decoders only
    ever add to their text. One that takes text back (a clean-up across tokens; an invalid byte token that spoils valid
    ones right before it) gives a stream that keeps what it has said and goes on with what the new tokens add; ``text``
    is what all tokens decode to nevertheless, once ``finish`` has been called and unless a stop string has cut it.

    Args:
        tokenizer: Has transformers' ``decode``; what that raises is passed on.
        skip_special_tokens: Leave special tokens out of the text.
        spaces_between_special_tokens: As in ``decode`` above.
        stop: The text ends at the first of these, which may begin in one token and end in another.
        include_stop_str_in_output: Cut the text after the stop string, not before it.
        min_tokens: A stop string counts only if the text of a later token than these completes it.

    Attributes:
        token_ids: All tokens so far; after a stop, up to the one that completed it.
        stop_reason: The stop string that ended the text, or None.

    Raises:
        ValueError: A stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.token_ids: list[int] = []
        self.stop_reason: str | None = None
        self._decode = partial(
            decode,
            tokenizer,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise ValueError("a stop string is empty; it would end the text before it begins (leave it out)")
        self._longest_stop = max(map(len, self._stop), default=0)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._stream = io.StringIO()  # the text that is certain; a string would be copied whole with each token
        self._length = 0  # of the stream
        self._taken = 0  # how much of the stream take_delta has given out
        self._final: str | None = None  # what all tokens decode to, once finished without a stop
        self._window: list[int] = []  # the last tokens, without those that never show
        self._decoded = ""  # what the window decodes to
        self._said = ""  # the beginning of it that is in the stream already
        self._settled = 0  # leading tokens of the window whose text is in the stream to its end

    @property
    def text(self) -> str:
        """All the text that is certain so far; the whole text after ``finish`` or a stop. Costs its length."""
        return self._stream.getvalue() if self._final is None else self._final

    def append(self, token_ids: Sequence[int]) -> str | None:
        """Take new tokens; return the stop string they complete, or None.

        Of several the one that ends earliest counts, and of those that end together the one that starts earliest.
        Tokens after it are dropped, in this call and in later ones, and so are those after the end of the text.
        """
        for token_id in token_ids:
            if self.stop_reason is not None or self._final is not None:
                break
            self.token_ids.append(token_id)
            self._extend(self._decode_next(token_id))
        return self.stop_reason

    def finish(self, token_ids: Sequence[int] = ()) -> str | None:
        """End the text after these last tokens: what was held back is now certain. Returns as ``append`` does."""
        self.append(token_ids)
        if self.stop_reason is None and self._final is None:
            if self._decoded.startswith(self._said):
                self._extend(self._decoded[len(self._said) :])
            else:
                self._extend(self._decode(self._window[self._settled :]))
            if self.stop_reason is None:
                self._final = self._decode(self.token_ids)
        return self.stop_reason

    def give_up(self) -> None:
        """End the text where it is certain now, and take no more tokens: for a tokenizer that has failed."""
        self._final = self._stream.getvalue()

    def take_delta(self, finished: bool) -> str:
        """The text that has become certain since the last call; with ``finished`` (after ``finish``) all that is left.

        Until then neither an unfinished character is given out nor what may be the beginning of a stop string.
        """
        end = self._length
        if not finished and self.stop_reason is None and not self._include_stop:
            end -= self._length_of_begun_stop()
        self._stream.seek(self._taken)
        delta = self._stream.read(max(0, end - self._taken))
        self._taken += len(delta)
        return delta

    def _decode_next(self, token_id: int) -> str:
        """The text that this token makes certain."""
        window = self._window
        decoded = self._decode([*window, token_id])
        if decoded == self._decoded and not self._decode([token_id, token_id]):
            return ""  # It shows nowhere: skipped, or beyond the vocabulary. (A space only shows after another token.)
        window.append(token_id)
        # More replacements than new tokens stand for one that shows as nothing yet: a space at the beginning.
        spoiled = not self._said and count_replacements(decoded) > len(window) - self._settled
        if spoiled or not decoded.startswith(self._said):
            # The decoder took text back: go on from where it was complete. This also happens with byte tokens in
            # SentencePiece, where the characters before an unfinished one look invalid until it is complete.
            del window[: self._settled]
            decoded, self._said, self._settled = self._decode(window), "", 0
        unfinished = min(MAX_UNFINISHED, count_replacements(decoded))
        end = max(len(self._said), len(decoded) - unfinished)
        new = decoded[len(self._said) : end]
        if end == len(decoded):
            if len(window) >= WINDOW:  # keep what came after the last character that was complete
                del window[: self._settled]
                decoded = self._decode(window)
            self._said, self._settled = decoded, len(window)
        else:
            if len(window) >= 2 * WINDOW:  # invalid bytes without end; an unfinished character is within the last few
                del window[:-WINDOW]
                unfinished, decoded = len(decoded) - end, self._decode(window)
                end, self._settled = max(0, len(decoded) - unfinished), WINDOW - unfinished
            self._said = decoded[:end]
        self._decoded = decoded
        return new

    def _extend(self, new: str) -> None:
        """Put text at the end of the stream, and cut it at a stop string that ends within the new text."""
        if not new:
            return
        before = self._length
        self._stream.seek(0, io.SEEK_END)
        self._stream.write(new)
        self._length += len(new)
        if not self._stop or len(self.token_ids) <= self._min_tokens:
            return
        start = max(0, before + 1 - self._longest_stop)
        self._stream.seek(start)
        tail = self._stream.read()
        found = [(tail.find(stop, max(0, before + 1 - len(stop) - start)), stop) for stop in self._stop]
        ends = [(at + len(stop), at, stop) for at, stop in found if at >= 0]
        if ends:
            end, at, self.stop_reason = min(ends)
            self._length = start + (end if self._include_stop else at)
            self._stream.truncate(self._length)

    def _length_of_begun_stop(self) -> int:
        """How much of the end of the stream may be the beginning of a stop string."""
        start = max(0, self._length + 1 - self._longest_stop)
        self._stream.seek(start)
        tail = self._stream.read()
        longest = 0
        for stop in self._stop:
            at = tail.find(stop[0], max(0, len(tail) + 1 - len(stop)))
            while at >= 0 and not stop.startswith(tail[at:]):
                at = tail.find(stop[0], at + 1)
            if at >= 0:
                longest = max(longest, len(tail) - at)
        return longest
