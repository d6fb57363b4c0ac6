"""Compile the Triton kernels ahead of time, on a machine that needs no GPU, and print what each takes of one.

    python tools/compile_kernels.py [module ...] [--arch 80 90 100] [--json]

Modules are names in nanovllm/kernels; by default all that have a function ``compile_cases``. Registers are those of a
thread; local memory is what a thread spills to it, in bytes; shared memory is that of a program, in bytes. This needs
Triton 3.3 on Linux; the kernels themselves need 3.2.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100)


class Compiled(NamedTuple):
    """What a kernel takes on an architecture."""

    module: str
    kernel: str
    label: str
    arch: int
    registers: int
    local: int
    shared: int


def why_not() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"triton is for Linux on x86_64 and aarch64, not {sys.platform} on {platform.machine()}"
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install 'triton>=3.3')"
    with suppress(PackageNotFoundError):  # it may have come under another name, with a nightly build of torch
        found = version("triton")
        if tuple(map(int, found.split(".")[:2])) < (3, 3):
            return f"triton {found} does not know sm_100; 3.3 does (pip install 'triton>=3.3')"
    return None


def kernel_modules() -> list[str]:
    """Names of the modules in nanovllm/kernels that say what to compile."""
    paths = sorted((ROOT / "nanovllm" / "kernels").glob("*.py"))
    return [path.stem for path in paths if "def compile_cases(" in path.read_text()]


def compile_module(name: str, architectures: tuple[int, ...] = ARCHITECTURES) -> list[Compiled]:
    """Compile every case of a module; triton must not have been imported with TRITON_INTERPRET set."""
    cases = import_module(f"nanovllm.kernels.{name}").compile_cases()
    compiled = []
    for case in cases:
        for arch in architectures:
            try:
                compiled.append(_compile_case(name, case, arch))
            except Exception as error:
                raise RuntimeError(f"{name}, {case['label']!r}, sm_{arch}: {error}") from error
    return compiled


def _compile_case(module: str, case: dict[str, Any], arch: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case["kernel"]
    missing = set(kernel.arg_names) ^ set(case["signature"])
    if missing:
        raise ValueError(f"arguments and signature differ by {sorted(missing)}")
    signature = {name: case["signature"][name] for name in kernel.arg_names}
    # As at a launch: torch's tensors are aligned, and so are nearly all strides, save that of a packed dimension.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind in ("i32", "i64") and "stride" in name)
    }
    constexprs = dict(case["constexprs"])
    if "OVERLAPS" in constexprs:  # as kernels.dependent_launch has it
        constexprs["OVERLAPS"] = arch >= 90
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"]}
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, local = _resources(result.asm["cubin"])
    return Compiled(module, kernel.__name__, case["label"], arch, registers, local, result.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as ptxas has recorded them."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump prints no resource usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def format_table(compiled: list[Compiled]) -> str:
    """A line a kernel and architecture."""
    lines = [f"{'module':22}{'case':44}{'arch':>6}{'registers':>11}{'local':>7}{'shared':>8}"]
    for one in compiled:
        lines.append(f"{one.module:22}{one.label:44}{one.arch:>6}{one.registers:>11}{one.local:>7}{one.shared:>8}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Raises RuntimeError if a kernel does not compile, SystemExit (2) if none can be compiled here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="module", help="of nanovllm/kernels (default: all)")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES), help="compute capabilities x 10")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    reason = why_not()
    if reason is not None:
        parser.exit(2, f"{parser.prog}: error: {reason}\n")
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined, and then there is nothing to compile
    sys.path.insert(0, str(ROOT))
    compiled = []
    for name in arguments.modules or kernel_modules():
        compiled += compile_module(name, tuple(arguments.arch))
    print(json.dumps([one._asdict() for one in compiled]) if arguments.json else format_table(compiled))


if __name__ == "__main__":
    main()
