"""The progress bar of a long call."""

import sys
import time
from contextlib import suppress
from typing import Any

from tqdm.auto import tqdm

REDRAW_SECONDS = 0.1  # a redraw a step would cost more than a small model's step
LOG_SECONDS = 10.0  # between two lines of a bar that goes to a file

_BROKEN = (OSError, ValueError)  # what writing to a stream that went away raises


class ProgressBar:
    """Finished requests, and prefill and decode speed, redrawn at most ten times a second.

    Args:
        engine: Its ``counters`` are read.
        total: Requests to finish; where there are none, nothing is shown.
        enabled: False shows nothing.
    """

    def __init__(self, engine: Any, total: int, enabled: bool) -> None:
        self._counters = engine.counters
        self._bar: Any = None
        if enabled and total and sys.stderr is not None:  # None: a program without a console
            with suppress(*_BROKEN):
                self._bar = tqdm(total=total, desc="Generating", unit="req", dynamic_ncols=True)
        # A file keeps every redraw. A notebook's stream is no terminal either, but its bar is drawn in place.
        logged = self._bar is not None and not sys.stderr.isatty() and "ipykernel" not in sys.modules
        self._redraw_seconds = LOG_SECONDS if logged else REDRAW_SECONDS
        self._start = self._totals()
        self._drawn = time.perf_counter() if logged else 0.0

    def update(self, num_finished: int) -> None:
        """Note that this many more requests have finished."""
        if self._bar is None:
            return
        self._bar.n += num_finished
        now = time.perf_counter()
        if now - self._drawn >= self._redraw_seconds:
            self._drawn = now
            self._draw()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._draw()
        if self._bar is not None:
            with suppress(*_BROKEN):
                self._bar.close()

    def _totals(self) -> tuple[int, float, int, float]:
        c = self._counters
        return c.prefill_tokens, c.prefill_seconds, c.decode_tokens, c.decode_seconds

    def _draw(self) -> None:
        spent = [now - before for now, before in zip(self._totals(), self._start, strict=True)]
        prefill = spent[0] / spent[1] if spent[1] else 0.0
        decode = spent[2] / spent[3] if spent[3] else 0.0
        try:
            self._bar.set_postfix_str(f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s", refresh=False)
            self._bar.refresh()
        except _BROKEN:  # a closed pipe must not cost the results
            self._bar = None
