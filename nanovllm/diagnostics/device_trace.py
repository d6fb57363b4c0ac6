"""What torch's profiler saw: Chrome trace events of a call, and what a device did in them."""

import bisect
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COPIES = ("gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")


def profiled_events(function: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Trace events of a call, times in microseconds; of the device's work too where it is a CUDA device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        text = path.read_text(encoding="utf-8", errors="replace")
    return json.loads(text, strict=False)["traceEvents"]  # names of kernels may hold anything


def work_of(events: list[dict[str, Any]], category: str) -> list[dict[str, Any]]:
    """The events of a category ("kernel" of a device's, "cpu_op" of the host's), and copies."""
    return [event for event in events if event.get("ph") == "X" and event.get("cat") in (category, *COPIES)]


def device_usage(events: list[dict[str, Any]], category: str, most: int = 15) -> dict[str, Any]:
    """Share of the time in which the device did nothing, and what it did otherwise.

    Args:
        events: Of a Chrome trace, times in microseconds.
        category: Of the events that count, besides copies.
        most: How many names are told, as (name, share of the work, count, mean microseconds), the largest first.
    """
    busy = work_of(events, category)
    if not busy:
        return {"events": 0, "top": []}
    by_name: dict[str, list[float]] = {}
    union, reached = 0.0, float("-inf")
    for event in sorted(busy, key=lambda event: event["ts"]):
        start, end = event["ts"], event["ts"] + event["dur"]
        union += max(0.0, end - max(start, reached))
        reached = max(reached, end)
        by_name.setdefault(event["name"], []).append(event["dur"])
    span = reached - min(event["ts"] for event in busy)
    total = sum(sum(times) for times in by_name.values())
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:most]
    top = [(name, sum(times) / total, len(times), sum(times) / len(times)) for name, times in ranked]
    return {"idle_share": 1 - union / span, "busy_us": union, "span_us": span, "events": len(busy), "top": top}


def device_parts(events: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Microseconds of the device's work, and launches, by the innermost annotation that they were launched in.

    A kernel is found by its launch, which bears the same correlation number, and the launch by its time and thread.
    """
    launches = {
        event["args"]["correlation"]: (event["tid"], event["ts"])
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    by_thread: dict[Any, list[tuple[float, float, str]]] = {}
    for event in events:
        if event.get("cat") == "user_annotation" and event.get("ph") == "X":
            by_thread.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"], event["name"]))
    for marks in by_thread.values():
        marks.sort()
    parts: dict[str, tuple[float, int]] = {}
    for event in work_of(events, "kernel"):
        thread, launched = launches.get(event.get("args", {}).get("correlation"), (None, 0.0))
        marks = by_thread.get(thread, [])
        place = bisect.bisect_right(marks, (launched, float("inf"), "")) - 1
        while place >= 0 and marks[place][1] < launched:  # over before the launch; those that began earlier may not be
            place -= 1
        name = marks[place][2] if place >= 0 else "elsewhere"
        spent, number = parts.get(name, (0.0, 0))
        parts[name] = spent + event["dur"], number + 1
    return parts
