"""Draw a comparison: a panel a workload, a bar an engine.

python -m nanovllm.benchmarks.plot comparison.json comparison.png
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

OURS = ("#c2410c", "#f59e0b", "#fbbf24")
OTHERS = "#64748b"
INK, FAINT = "#111827", "#9ca3af"
MOST_COLUMNS = 3


def require_matplotlib() -> None:
    """Raise ValueError, with the remedy, if there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            'a comparison is drawn with matplotlib, which is not installed (pip install ".[bench]")'
        ) from None


def draw(report: dict[str, Any], file: Path) -> None:
    """Draw the report of a comparison; the file's ending says in which format (png, svg, pdf).

    Raises:
        ValueError: The report has no workload, matplotlib is missing, or does not know the format.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # draws without a display, and leaves pyplot's state alone

    workloads = report["workloads"]
    if not workloads:
        raise ValueError("there is nothing to draw: no workload has been measured")
    columns = min(MOST_COLUMNS, len(workloads))
    rows = math.ceil(len(workloads) / columns)
    engines = len(report["engines"])
    panel_height = 1.0 + 0.32 * engines
    size = (max(7.0, 4.4 * columns), rows * panel_height + 1.0)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    figure.suptitle(f"Output tokens a second, {report['model']}: longer is faster", color=INK, fontsize=12)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, entry in zip(panels, workloads, strict=False):
        _draw_workload(panel, entry, report["ours"])
    for panel in panels[len(workloads) :]:
        panel.set_axis_off()
    figure.supxlabel(_footnote(report), color=INK, fontsize=8)
    figure.savefig(file, dpi=120)


def _draw_workload(panel: Any, entry: dict[str, Any], ours: list[str]) -> None:
    results = entry["results"]
    fastest = [min(result["seconds"]) for result in results.values() if "error" not in result]
    longest = entry["output_tokens"] / min(fastest, default=entry["output_tokens"])
    for row, (name, result) in enumerate(results.items()):
        if "error" in result:
            panel.text(longest * 0.01, row, "failed", va="center", color=FAINT, fontsize=9, style="italic")
            continue
        rate, seconds = result["output_tokens_per_second"], result["seconds"]
        colour = OURS[min(ours.index(name), len(OURS) - 1)] if name in ours else OTHERS
        panel.barh(row, rate, height=0.7, color=colour)
        end = rate
        if len(seconds) > 1:
            slow, end = (entry["output_tokens"] / bound for bound in (max(seconds), min(seconds)))
            panel.plot([slow, end], [row, row], color=INK, linewidth=1.2, marker="|", markersize=5)
        label = f"{rate:.0f}" if rate >= 99.5 else f"{rate:.1f}"
        panel.text(end + longest * 0.02, row, label, va="center", color=INK, fontsize=9)
    panel.set_xlim(0, longest * 1.2)
    panel.set_ylim(len(results) - 0.4, -0.6)  # the first engine on top
    panel.set_yticks(range(len(results)), list(results), color=INK, fontsize=9)
    panel.tick_params(axis="x", colors=INK, labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.set_facecolor("white")
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    requests = "1 request" if entry["num_requests"] == 1 else f"{entry['num_requests']} requests"
    tokens = f"{entry['prompt_tokens']:,} prompt + {entry['output_tokens']:,} output tokens"
    panel.set_title(f"{entry['workload']}\n{requests}, {tokens}", color=INK, fontsize=9, loc="left")


def _footnote(report: dict[str, Any]) -> str:
    machine, repeats = report["hardware"], report["options"]["repeats"]
    rounds = f"medians of {repeats} alternating rounds, lines from slowest to fastest" if repeats > 1 else "one round"
    return f"{machine['cpu']}, {machine['threads']} threads; {rounds}; {report['date'][:10]}"


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m nanovllm.benchmarks.plot COMPARISON.json FILE.png")
    try:
        draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
