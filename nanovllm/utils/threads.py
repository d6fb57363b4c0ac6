"""How many threads an engine on the CPU computes with.

A decode step reads all weights once, so it is as fast as memory is. A second thread of a core adds nothing to that but
makes the first one wait; the memory of another socket is slower to reach, and every operation would wait for the
slowest of twice as many threads. So the number is that of the *physical cores of one socket*, of those that the
affinity mask of the process names, and no more than the CPU quota of its control groups. Threads are not bound: where
they run is the operating system's business, or that of whoever set the mask.

In a process that was forked from one that has computed with several, it is one: torch would wait for those for ever.

It is used within an engine's steps only (:class:`ThreadLimit`): the rest of the program keeps the number it had. And
it only replaces a number that torch chose by itself: OMP_NUM_THREADS, MKL_NUM_THREADS and ``torch.set_num_threads``
are the user's word.
"""

import logging
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import psutil
import torch

from nanovllm.utils.cgroups import ROOT, cpu_quota

logger = logging.getLogger(__name__)

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

_had_several = False  # threads, in this process
_has_lost_them = False


def _start_afresh() -> None:
    """In a forked process: GNU's OpenMP, which torch has on Linux, waits for ever for threads that its parent had."""
    global _had_several, _has_lost_them
    _had_several, _has_lost_them = False, _has_lost_them or _had_several


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)


def allowed_cpus() -> set[int] | None:
    """The logical CPUs this thread may run on; None where the system does not say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    try:
        return set(psutil.Process().cpu_affinity())  # Windows
    except (AttributeError, psutil.Error):
        return None


def cores_by_socket(cpus: Collection[int] | None, root: Path = ROOT) -> list[int]:
    """Physical cores that ``cpus`` belong to, a number a socket, the largest first.

    NUMA nodes of one socket count together: all of its memory is close to all of its cores. Sockets that share a node
    do too, for then memory is interleaved over them.

    Args:
        cpus: Logical CPUs; None for all.
        root: Where ``sys`` is looked for.

    Returns:
        At least one number. Where the system does not describe its processors, one of all cores.
    """
    described = root / "sys/devices/system/cpu"
    known = [cpu for cpu in cpus or () if (described / f"cpu{cpu}/topology").is_dir()]
    if not cpus or not known:
        return [_cores_by_proportion(cpus)]
    nodes = _node_of_cpu(root)
    sockets: list[tuple[set[str], set[str]]] = []  # of each, the nodes and packages it is known by, and its cores
    for cpu in known:
        topology = described / f"cpu{cpu}/topology"
        labels = {f"node {nodes.get(cpu)}"}
        package = _text(topology / "physical_package_id")
        if package not in ("", "-1"):  # which is to say that the firmware does not tell
            labels.add(f"package {package}")
        siblings = _text(topology / "core_cpus_list") or _text(topology / "thread_siblings_list") or str(cpu)
        cores = {siblings}
        for other in [socket for socket in sockets if socket[0] & labels]:
            sockets.remove(other)
            labels |= other[0]
            cores |= other[1]
        sockets.append((labels, cores))
    return sorted((len(cores) for _, cores in sockets), reverse=True)


def best_threads(cpus: Collection[int] | None, ranks: int = 1, root: Path = ROOT) -> int:
    """Threads that one of ``ranks`` processes, which share ``cpus`` and the quota, is fastest with; at least 1.

    A fraction of a CPU is worth a thread: it is stopped for the rest of each period, which loses less than not having
    it. Ranks are assumed to be spread over the sockets.
    """
    sockets = cores_by_socket(cpus, root)
    threads = min(sockets[0], sum(sockets) // ranks)
    quota = cpu_quota(root)
    if quota is not None:
        threads = min(threads, math.ceil(quota) // ranks)
    return max(1, threads)


def torch_defaults(cpus: Collection[int] | None, has_mkl: bool, root: Path = ROOT) -> set[int]:
    """Numbers of threads that torch may have chosen by itself.

    It takes the cores of the mask with MKL, else those of the machine, or where they are not known all logical CPUs.
    """
    machine = {int(path.name[3:]) for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*")}
    defaults = {sum(cores_by_socket(cpus, root)), sum(cores_by_socket(machine or None, root))}
    return defaults if has_mkl else {*defaults, len(cpus or ()), len(machine) or os.cpu_count() or 1}


class ThreadLimit:
    """A context in which torch computes with as many threads as are best, or as the user chose.

    torch keeps the number for each thread that calls it, so that engines in different threads do not disturb each
    other; what was set before is set again on the way out. Threads may enter in turns, any number of times.

    Args:
        ranks: Processes that share the cores.
        environ: The environment.
        root: Where ``sys`` and ``proc`` are looked for.
    """

    def __init__(self, ranks: int = 1, environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> None:
        if _has_lost_them:
            logger.warning(
                "computing with one thread, which is slower: this process was forked from one that has used an LLM, "
                "whose threads are not here (multiprocessing.get_context('spawn') starts processes that have all)"
            )
        self._best, self._defaults = 1, set[int]()  # those that give way to the best number
        # torch's own pool, in builds without OpenMP, cannot be resized once it has been used.
        if torch.backends.openmp.is_available() and not any(environ.get(name) for name in VARIABLES):
            cpus = allowed_cpus()
            self._best = best_threads(cpus, ranks, root)
            self._defaults = torch_defaults(cpus, torch.backends.mkl.is_available(), root)
        self._entered: list[tuple[int, int]] = []  # the number before, and inside

    def num_threads(self) -> int:
        """Threads that torch computes with inside, were this thread to enter now."""
        if _has_lost_them:
            return 1
        current = torch.get_num_threads()
        return min(current, self._best) if current in self._defaults else current

    def __enter__(self) -> None:
        global _had_several
        before, inside = torch.get_num_threads(), self.num_threads()
        _had_several = _had_several or inside > 1
        self._entered.append((before, inside))
        if inside != before:
            torch.set_num_threads(inside)

    def __exit__(self, *error: object) -> None:
        before, inside = self._entered.pop()
        if inside != before and torch.get_num_threads() == inside:  # else somebody chose another one meanwhile
            torch.set_num_threads(before)


def _node_of_cpu(root: Path) -> dict[int, str]:
    """The NUMA node of each logical CPU; nothing where there are none."""
    nodes = {}
    for directory in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        for cpu in _parse_list(_text(directory / "cpulist")):
            nodes[cpu] = directory.name
    return nodes


def _parse_list(text: str) -> list[int]:
    """The numbers of a list such as ``0-3,8``."""
    numbers: list[int] = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _cores_by_proportion(cpus: Collection[int] | None) -> int:
    """Cores of a machine that does not say which logical CPUs share one; at least 1."""
    logical = os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    return max(1, math.ceil((len(cpus) if cpus else logical) * physical / logical))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
