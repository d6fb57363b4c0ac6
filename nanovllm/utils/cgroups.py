"""What the control groups (containers, services, batch jobs) that this process is in leave it of the machine.

Linux only; elsewhere there are no such files, and nothing is limited. Groups are nested, and every one of them limits
all that is inside: the process's own group is named in ``/proc/self/cgroup``, and those around it are its parents.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # of the file system


def group_directories(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """The directories of this process's groups for "cpu" or "memory", of both versions, the innermost first.

    Not all of them need be there: in a container the files may show the group alone, as the root of the hierarchy,
    while the process is told its place in that of the machine.
    """
    mount = root / "sys/fs/cgroup"
    groups = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines() if line.count(":") >= 2]
    if not groups:
        groups = [["0", "", "/"], ["1", controller, "/"]]
    for _, controllers, path in groups:
        if not controllers:  # version 2, alone or beside version 1
            bases = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            bases = [mount / name for name in dict.fromkeys((controller, controllers))]
        else:
            continue
        parts = [part for part in path.split("/") if part]
        if ".." in parts:  # outside of what is shown here
            parts = []
        for base in bases:
            for depth in range(len(parts), -1, -1):
                yield base.joinpath(*parts[:depth])


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that this process may use: the smallest quota of its groups; None if there is none."""
    quotas = []
    for directory in group_directories("cpu", root):
        words = _read(directory / "cpu.max").split() or [
            *_read(directory / "cpu.cfs_quota_us").split(),
            *_read(directory / "cpu.cfs_period_us").split(),
        ]
        if len(words) == 2 and all(word.isdigit() and int(word) for word in words):  # not "max", nor -1
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_left(root: Path = ROOT) -> int | None:
    """Bytes this process can still take before one of its groups is full; None if none has a limit."""
    left = []
    for directory in group_directories("memory", root):
        usage = _numbers(directory, "memory.current", "memory.usage_in_bytes")
        limits = _numbers(directory, "memory.max", "memory.high", "memory.limit_in_bytes")
        if usage and limits:
            # A file that was read, such as a checkpoint, counts as usage until the kernel wants its pages back.
            left.append(max(0, min(limits) - usage[0] + _page_cache(directory)))
    return min(left, default=None)


def _page_cache(directory: Path) -> int:
    """Bytes of files that were not used lately, of a group and all within it."""
    entries = dict(line.split(maxsplit=1) for line in _read(directory / "memory.stat").splitlines() if " " in line)
    # Version 1 also has an inactive_file, of the group without those within it.
    return int(entries.get("total_inactive_file", entries.get("inactive_file", "0")))


def _numbers(directory: Path, *names: str) -> list[int]:
    """The numbers in those of the files that are there and hold one ("max" is none)."""
    texts = [_read(directory / name).strip() for name in names]
    return [int(text) for text in texts if text.isdigit()]


def _read(path: Path) -> str:
    """The text of a file; nothing if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
