"""A recorded run as one HTML page that needs nothing else: its data, styles and script are inside."""

import json
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from nanovllm.diagnostics.books import KINDS, Event
from nanovllm.diagnostics.run_record import RunRecord, Step

STATES = ("queued", "prefill", "decode", "resident", "preempted")
PHASES = ("plan", "land", "between")


def trace_page(record: RunRecord) -> str:
    """The page of a run."""
    folder = files("nanovllm.diagnostics")
    parts = {
        "/*STYLE*/": folder.joinpath("trace_page.css").read_text("utf-8"),
        "/*SCRIPT*/": folder.joinpath("trace_page.js").read_text("utf-8"),
        # "</script" would end the element that the data is in, and "<!--<script" keep it from ending.
        "/*DATA*/": json.dumps(page_data(record), separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = folder.joinpath("trace_page.html").read_text("utf-8")
    for mark, part in parts.items():
        page = page.replace(mark, part, 1)
    return page


def page_data(record: RunRecord) -> dict[str, Any]:
    """What the page's script reads. Sequences go by their place in the list, times are whole microseconds.

    A step is [begin, microseconds until launched, until landed, until its end, waiting, running, prefill rows, rows
    that begin to decode, rows that no longer do, whether it was taken back]: a row that decodes advances by one token
    a step and is told only where it begins and ends. Prefill rows are [sequence, start, length, samples] one after
    another, and those that begin to decode [sequence, start]. An event is [kind, sequence, value, *blocks].
    """
    places = {number: place for place, number in enumerate(record.sequences)}
    sequences = list(record.sequences.values())
    return {
        "kinds": KINDS,
        "states": STATES,
        "phases": PHASES,
        "engine": record.engine,
        "totals": record.totals(),
        "violations": record.violations,
        "checked": record.is_checked,
        "sequences": [
            [
                seq.request_id if not seq.index else f"{seq.request_id}.{seq.index}",
                seq.num_prompt_tokens,
                seq.num_output_tokens,
                _micro(seq.added),
                None if seq.finished is None else _micro(seq.finished),
                seq.finish_reason,
                seq.prompt,
            ]
            for seq in sequences
        ],
        "steps": list(_steps(record.steps, places)),
        "segments": [
            [PHASES.index(segment.phase), segment.step, [_event(event, places) for event in segment.events]]
            for segment in record.segments
        ],
        "spans": [
            [places[span.sequence], STATES.index(span.state), span.first, span.last - span.first]
            for span in record.spans()
        ],
    }


def _steps(steps: Iterable[Step], places: dict[int, int]) -> Iterable[list[Any]]:
    decoding: dict[int, int] = {}  # where each goes on if it goes on
    for step in steps:
        prefill: list[int] = []
        now: dict[int, int] = {}
        began: list[int] = []
        for row in step.rows:
            place = places[row.sequence]
            if row.is_prefill or row.length != 1:
                prefill += [place, row.start, row.length, int(row.samples)]
                continue
            now[place] = row.start + 1
            if decoding.get(place) != row.start:
                began += [place, row.start]
        ended = [place for place in decoding if place not in now]
        decoding = now
        line = [_micro(step.begin)]
        line += [-1 if time is None else _micro(time - step.begin) for time in (step.launched, step.landed, step.end)]
        yield [*line, step.num_waiting, step.num_running, prefill, began, ended, int(step.was_taken_back)]


def _event(event: Event, places: dict[int, int]) -> list[Any]:
    # The blocks that a sequence gives back are those it holds, which the page knows.
    blocks = () if event.kind == "freed" else event.blocks
    value = 0 if event.value is None else event.value
    return [KINDS.index(event.kind), places.get(event.sequence, -1), value, *blocks]


def _micro(seconds: float) -> int:
    return round(seconds * 1e6)
