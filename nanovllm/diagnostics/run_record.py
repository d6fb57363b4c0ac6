"""What a run did, step by step: plain data, and what can be told from it."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.diagnostics.books import Books, Event
from nanovllm.version import __version__

FORMAT_VERSION = 1


class Row(NamedTuple):
    """What a step computed of one sequence: tokens ``start : start + length``, and the next one if it ``samples``."""

    sequence: int
    start: int
    length: int
    samples: bool
    is_prefill: bool


@dataclass(slots=True)
class Step:
    """A step: planned, run, and its results taken in. Times are seconds since the recording began.

    Args:
        number: From 0.
        rows: What it computed.
        begin: When planning began.
        launched: When the plan was there; the device's turn.
        landed: When its results were there; None if nobody asked for them (all its sequences had ended meanwhile).
        end: When they had been taken in; None likewise.
        num_waiting: Sequences in the queue once it was planned.
        num_running: Resident sequences then.
        num_held: Blocks held then.
        num_cached: Blocks then that nobody held and the prefix cache knew.
        was_taken_back: Whether it was never run, because it did not fit the device's memory.
    """

    number: int
    rows: list[Row]
    begin: float
    launched: float
    landed: float | None = None
    end: float | None = None
    num_waiting: int = 0
    num_running: int = 0
    num_held: int = 0
    num_cached: int = 0
    was_taken_back: bool = False

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of prompts, and of outputs computed again after a preemption."""
        return sum(row.length for row in self.rows if row.is_prefill)

    @property
    def num_decode_tokens(self) -> int:
        """Tokens of sequences that decode."""
        return sum(row.length for row in self.rows if not row.is_prefill)


@dataclass(slots=True)
class Segment:
    """Events of one stretch of the run, in order.

    Args:
        phase: "plan" or "land" (of a step), or "between".
        step: The step's number; for "between", that of the last one planned, -1 for none.
        events: What happened.
    """

    phase: str
    step: int
    events: list[Event] = field(default_factory=list)


@dataclass(slots=True)
class TracedSequence:
    """A sequence of the run.

    Args:
        number: The engine's.
        request_id: The request it belongs to.
        index: Number of the completion among its request's.
        num_prompt_tokens: Length of its prompt.
        max_output_tokens: Most tokens it could generate.
        added: Seconds after the beginning of the recording; 0 if it was there before.
        prompt: The beginning of the prompt's text, if it was given as text.
        num_output_tokens: Tokens it has generated.
        finished: When it ended; None if it did not.
        finish_reason: Why.
    """

    number: int
    request_id: str
    index: int
    num_prompt_tokens: int
    max_output_tokens: int
    added: float
    prompt: str | None = None
    num_output_tokens: int = 0
    finished: float | None = None
    finish_reason: str | None = None


class Span(NamedTuple):
    """Steps ``first`` to ``last`` in which a sequence was in one state: queued, prefill, decode, resident, preempted.

    "resident" is holding blocks while the step computes others; "preempted" is waiting to be computed again.
    """

    sequence: int
    state: str
    first: int
    last: int


@dataclass(slots=True)
class RunRecord:
    """A run.

    Args:
        engine: Facts of the engine: num_blocks, block_size, max_num_seqs, max_num_batched_tokens and, of an LLM, more.
        sequences: By number.
        steps: In the order in which they were planned.
        segments: All events, in the order in which they happened.
        violations: Where the block manager's books were wrong; empty if they never were.
        seconds: How long it was recorded.
        is_checked: Whether all of the books were checked after every operation, and not only what it touched.
    """

    engine: dict[str, Any] = field(default_factory=dict)
    sequences: dict[int, TracedSequence] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0
    is_checked: bool = False

    def events(self, kind: str | None = None) -> Iterator[Event]:
        """All events, or those of a kind."""
        for segment in self.segments:
            for event in segment.events:
                if kind is None or event.kind == kind:
                    yield event

    def replay(self) -> Iterator[tuple[Step, Books]]:
        """Each step, and the books as they were when it had been planned; the same object every time."""
        books = Books()
        for segment in self.segments:
            books.apply_all(segment.events)
            if segment.phase == "plan":
                yield self.steps[segment.step], books

    def spans(self) -> list[Span]:
        """Where each sequence was, step by step."""
        states: dict[int, str] = {}  # of those that are there, as of the step that is being looked at
        open_spans: dict[int, Span] = {}
        done: list[Span] = []
        for segment in self.segments:
            for event in segment.events:
                if event.kind == "added":
                    states[event.sequence] = "queued"
                elif event.kind in ("admitted", "preempted"):
                    states[event.sequence] = "resident" if event.kind == "admitted" else "preempted"
                elif event.kind == "finished":
                    states.pop(event.sequence, None)
            if segment.phase != "plan":
                continue
            here = {row.sequence: "prefill" if row.is_prefill else "decode" for row in self.steps[segment.step].rows}
            for sequence, state in states.items():
                state, span = here.get(sequence, state), open_spans.get(sequence)
                if span is not None and span.state == state and span.last == segment.step - 1:
                    open_spans[sequence] = span._replace(last=segment.step)
                else:
                    if span is not None:
                        done.append(span)
                    open_spans[sequence] = Span(sequence, state, segment.step, segment.step)
        return sorted([*done, *open_spans.values()], key=lambda span: (span.sequence, span.first))

    def totals(self) -> dict[str, Any]:
        """Sums over the run."""
        ran = [step for step in self.steps if not step.was_taken_back]
        admitted = list(self.events("admitted"))
        blocks: dict[str, int] = dict.fromkeys(("shared", "allocated", "evicted", "published", "freed"), 0)
        for event in self.events():
            if event.kind in blocks:
                blocks[event.kind] += len(event.blocks)
        times = sorted(step.end - step.begin for step in ran if step.end is not None)
        return {
            "sequences": len(self.sequences),
            "requests": len({seq.request_id for seq in self.sequences.values()}),
            "finished": sum(seq.finish_reason is not None for seq in self.sequences.values()),
            "steps": len(ran),
            "steps_with_prefill": sum(step.num_prefill_tokens > 0 for step in ran),
            "seconds": self.seconds,
            "prefill_tokens": sum(step.num_prefill_tokens for step in ran),
            "decode_tokens": sum(step.num_decode_tokens for step in ran),
            "output_tokens": sum(seq.num_output_tokens for seq in self.sequences.values()),
            "prompt_tokens": sum(seq.num_prompt_tokens for seq in self.sequences.values()),
            "prefix_hits": sum(bool(event.value) for event in admitted),
            "prefix_hit_tokens": sum(int(event.value or 0) for event in admitted),
            "preemptions": sum(1 for _ in self.events("preempted")),
            "blocks_shared": blocks["shared"],
            "blocks_allocated": blocks["allocated"],
            "blocks_evicted": blocks["evicted"],
            "blocks_published": blocks["published"],
            "blocks_freed": blocks["freed"],
            "peak_blocks_held": max((step.num_held for step in self.steps), default=0),
            "longest_queue": max((step.num_waiting for step in self.steps), default=0),
            "median_step_seconds": times[len(times) // 2] if times else 0.0,
            "longest_step_seconds": times[-1] if times else 0.0,
            "violations": len(self.violations),
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, for a machine to read."""
        return {
            "format": "nanovllm trace",
            "format_version": FORMAT_VERSION,
            "nanovllm": __version__,
            "engine": self.engine,
            "totals": self.totals(),
            "is_checked": self.is_checked,
            "violations": self.violations,
            "sequences": [asdict(seq) for seq in self.sequences.values()],
            "steps": [
                {**asdict(step), "rows": [row._asdict() for row in step.rows]}
                | {"num_prefill_tokens": step.num_prefill_tokens, "num_decode_tokens": step.num_decode_tokens}
                for step in self.steps
            ],
            "segments": [
                {
                    "phase": segment.phase,
                    "step": segment.step,
                    "events": [_event_json(event) for event in segment.events],
                }
                for segment in self.segments
            ],
        }

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to a file."""
        Path(path).write_text(json.dumps(self.to_json(), separators=(",", ":")) + "\n", encoding="utf-8")

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page that shows the run; it needs nothing but the file itself."""
        from nanovllm.diagnostics.trace_page import trace_page

        Path(path).write_text(trace_page(self), encoding="utf-8")

    def write_perfetto(self, path: str | os.PathLike[str]) -> None:
        """Write a trace for ui.perfetto.dev or chrome://tracing, compressed if the name ends in .gz."""
        from nanovllm.diagnostics.perfetto import run_events, write_trace

        write_trace(path, run_events(self))


def _event_json(event: Event) -> dict[str, Any]:
    line: dict[str, Any] = {"kind": event.kind}
    if event.sequence >= 0:
        line["sequence"] = event.sequence
    if event.blocks:
        line["blocks"] = event.blocks
    if event.value is not None:
        line["value"] = event.value
    return line
