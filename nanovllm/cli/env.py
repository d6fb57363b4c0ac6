"""``nanovllm env``: what this machine has, and what works on it."""

import argparse
from typing import Any

from nanovllm.cli.options import add_command
from nanovllm.utils.options import add_json_option, print_json
from nanovllm.utils.text import counted

GIB = 2**30


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "env",
        "show versions, devices, and what works here",
        "Show versions, devices, threads, memory, environment variables and caches, which dtypes are fast, which "
        "attention backends and kernels work here, and why the others do not. What to send along with a report of a "
        "defect.",
        "nanovllm env\nnanovllm env --json > environment.json",
    )
    add_json_option(parser, "all of it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from nanovllm.diagnostics.machine import machine_report

    report = machine_report()
    if args.json:
        print_json(report)
    else:
        print(as_text(report))
    return 0


def as_text(report: dict[str, Any]) -> str:
    """The report of :func:`nanovllm.diagnostics.machine.machine_report` to be read."""
    sections = [_versions(report), _machine(report)]
    sections += [_device(name, device) for name, device in report["devices"].items()]
    sections.append(_section("no other devices", report["missing_devices"]))
    sections.append(_section("environment variables in effect", report["variables"] or {"none": ""}))
    sections.append(_section("caches", {name: path or "nothing is kept" for name, path in report["caches"].items()}))
    return "\n\n".join(sections)


def _versions(report: dict[str, Any]) -> str:
    lines = {name: found or "not installed" for name, found in report["versions"].items()}
    lines["commit"] = report["versions"]["commit"] or "none: this is no checkout"
    return _section("versions", lines)


def _machine(report: dict[str, Any]) -> str:
    system, memory, threads = report["system"], report["memory"], report["threads"]
    left = memory["control_group_left_bytes"]
    limited = "" if left is None else f" (control groups leave {left / GIB:.1f} GiB)"
    available = f"{memory['available_bytes'] / GIB:.1f} of {memory['total_bytes'] / GIB:.1f} GiB available"
    return _section(
        "machine",
        {
            "platform": system["platform"],
            "processor": f"{system['cpu']}, {counted(system['cores'], 'core')}, "
            f"{counted(system['logical_cpus'], 'logical CPU')}",
            "memory": f"{available}{limited}",
            "threads": f"{threads['in_a_step']} in a step on the CPU: {threads['why']}",
        },
    )


def _device(name: str, device: dict[str, Any]) -> str:
    memory = device["memory"]
    total = f" of {memory['total_bytes'] / GIB:.1f}" if "total_bytes" in memory else ""
    lines = {
        "memory": f"{memory['free_bytes'] / GIB:.1f}{total} GiB free",
        "fast dtypes": f"{', '.join(device['fast_dtypes'])} ({device['dtype_note']})",
    }
    for backend, reasons in device["attention"].items():
        lines[f"attention {backend}"] = _by_dtype(reasons)
    for kind, found in device["kernels"].items():
        if kind in ("numba", "triton"):
            lines[f"kernels ({kind})"] = "work" if found is None else f"no: {found}"
        elif kind == "features":
            lines["vector features"] = ", ".join(feature for feature, there in found.items() if there) or "none of note"
        else:
            lines[kind.replace("_", " ")] = found or "none found"
    lines["quantization int8"] = _by_dtype(device["int8"])
    return _section(f"device {name}: {device['name']}", lines)


def _by_dtype(reasons: dict[str, str | None]) -> str:
    """For which dtypes something works, and why not for the others: dtypes of one reason together."""
    works = [dtype for dtype, reason in reasons.items() if reason is None]
    if len(works) == len(reasons):
        return "works"
    by_reason: dict[str, list[str]] = {}
    for dtype, reason in reasons.items():
        if reason is not None:
            by_reason.setdefault(reason, []).append(dtype)
    if not works and len(by_reason) == 1:
        return f"no: {next(iter(by_reason))}"
    parts = [f"{', '.join(dtypes)}: {reason}" for reason, dtypes in by_reason.items()]
    return f"works in {', '.join(works)} (not {'; not '.join(parts)})" if works else f"no: {'; '.join(parts)}"


def _section(title: str, lines: dict[str, Any]) -> str:
    width = max(map(len, lines), default=0)
    return "\n".join(
        [title, *(f"  {name:<{width}}  {' '.join(str(text).split())}".rstrip() for name, text in lines.items())]
    )
