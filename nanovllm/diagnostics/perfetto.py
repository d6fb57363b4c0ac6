"""Traces that ui.perfetto.dev and chrome://tracing show: the Trace Event Format, as JSON."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

from nanovllm.diagnostics.run_record import RunRecord, Span, Step

HOST, REQUESTS = 1, 2  # processes, as the viewer calls its groups


def write_trace(path: str | os.PathLike[str], events: list[dict[str, Any]]) -> None:
    """Write events to a file, compressed if its name ends in .gz."""
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))
    if os.fspath(path).endswith(".gz"):
        Path(path).write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        Path(path).write_text(text + "\n", encoding="utf-8")


def slice_event(
    name: str, category: str, begin: float, end: float, track: tuple[int, int], args: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Something that lasts from ``begin`` to ``end`` (seconds), on a track (process, thread)."""
    event = {"name": name, "cat": category, "ph": "X", "pid": track[0], "tid": track[1]}
    event |= {"ts": round(begin * 1e6, 3), "dur": round(max(0.0, end - begin) * 1e6, 3)}
    return event | ({"args": args} if args else {})


def name_events(process: int, name: str, threads: dict[int, str]) -> list[dict[str, Any]]:
    """What a process and its threads are called, in the order of their numbers."""
    events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}}]
    events.append({"name": "process_sort_index", "ph": "M", "pid": process, "args": {"sort_index": process}})
    for thread, thread_name in threads.items():
        where = {"ph": "M", "pid": process, "tid": thread}
        events.append({"name": "thread_name", **where, "args": {"name": thread_name}})
        events.append({"name": "thread_sort_index", **where, "args": {"sort_index": thread}})
    return events


def run_events(record: RunRecord) -> list[dict[str, Any]]:
    """A recorded run: what the host and the device did, a track a sequence, and counters."""
    events: list[dict[str, Any]] = []
    lanes: list[float] = []  # until when each is taken: steps in flight together must not share one
    steps = [step for step in record.steps if not step.was_taken_back]
    for step in steps:
        end = _end(step)
        lane = next((lane for lane, until in enumerate(lanes) if until <= step.begin), len(lanes))
        lanes[lane : lane + 1] = [end]
        events += _step_events(step, end, (HOST, 2 + lane))
    for step in steps:
        counters = {
            "KV blocks": {"held": step.num_held, "cached": step.num_cached},
            "sequences": {"running": step.num_running, "waiting": step.num_waiting},
            "tokens of the step": {"prefill": step.num_prefill_tokens, "decode": step.num_decode_tokens},
        }
        for name, values in counters.items():
            events.append({"name": name, "ph": "C", "pid": HOST, "ts": round(step.begin * 1e6, 3), "args": values})
    events += [_span_event(record, span) for span in record.spans()]
    for segment in record.segments:
        for event in segment.events:
            if event.kind in ("preempted", "finished") and record.steps:
                time = _time_of(record, segment.phase, segment.step, event.sequence)
                name = event.kind if event.value is None else f"{event.kind}: {event.value}"
                where = {"pid": REQUESTS, "tid": event.sequence, "ts": round(time * 1e6, 3)}
                events.append({"name": name, "cat": "sequence", "ph": "i", "s": "t", **where})
    threads = {1: "host", **{2 + lane: f"steps {lane + 1}" if lane else "steps" for lane in range(len(lanes))}}
    titles = {
        number: f"{seq.request_id}.{seq.index}" if seq.index else seq.request_id
        for number, seq in record.sequences.items()
    }
    return name_events(HOST, "engine", threads) + name_events(REQUESTS, "requests", titles) + events


def _end(step: Step) -> float:
    return step.launched if step.end is None else step.end


def _step_events(step: Step, end: float, track: tuple[int, int]) -> list[dict[str, Any]]:
    tokens = f"{step.num_prefill_tokens} prefill + {step.num_decode_tokens} decode"
    args = {
        "step": step.number,
        "rows": len(step.rows),
        "prefill_tokens": step.num_prefill_tokens,
        "decode_tokens": step.num_decode_tokens,
        "waiting": step.num_waiting,
        "blocks_held": step.num_held,
        "blocks_cached": step.num_cached,
    }
    events = [
        slice_event(f"step {step.number}: {tokens}", "step", step.begin, end, track, args),
        slice_event("schedule", "host", step.begin, step.launched, (HOST, 1), {"step": step.number}),
    ]
    if step.landed is not None:
        events.append(slice_event("update", "host", step.landed, end, (HOST, 1), {"step": step.number}))
    return events


def _span_event(record: RunRecord, span: Span) -> dict[str, Any]:
    first, last = record.steps[span.first], record.steps[span.last]
    begin, end = first.begin, _end(last)
    following = span.last + 1
    if following < len(record.steps):  # up to where the next one begins: steps that overlap would not nest
        end = min(end, record.steps[following].begin)
    args = {"steps": f"{span.first} to {span.last}"}
    return slice_event(span.state, "sequence", begin, end, (REQUESTS, span.sequence), args)


def _time_of(record: RunRecord, phase: str, step: int, sequence: int) -> float:
    finished = record.sequences[sequence].finished
    if phase == "plan" or finished is None:
        return record.steps[max(0, step)].begin
    return finished
