"""Compile the Triton kernels ahead of time, on a machine that needs no GPU, and print what each takes of one.

    python tools/compile_kernels.py [module ...] [--arch 80 90 100] [--json]

The kernels' own functions are called, with arguments as models have them; whatever they would launch, Triton compiles
as it would on a GPU of the architecture. Modules are names in nanovllm/kernels, by default all in ``CALLS``. Registers
are those of a thread; local memory is what a thread spills to it, in bytes; shared memory is that of a program, in
bytes. This needs Triton 3.3 on Linux; the kernels themselves need 3.2.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS, MAX_LEN, VOCABULARY, MULTIPROCESSORS = 256, 4096, 151_936, 132


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


def compile_module(name: str, architectures: tuple[int, ...] = ARCHITECTURES) -> list[Compiled]:
    """Compile what every call of a module launches; for a process that neither interprets nor launches kernels."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    module = import_module(f"nanovllm.kernels.{name}")
    compiled = []
    run = JITFunction.run

    def compile_instead(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if kernel.fn.__module__ != module.__name__:  # a preparation
            return
        result = run(kernel, *arguments, grid=grid, warmup=True, **options)
        registers, local = _resources(result.asm["cubin"])
        compiled.append(Compiled(name, kernel.__name__, label, arch, registers, local, result.metadata.shared))

    with patch.object(JITFunction, "run", compile_instead):
        for label, function, arguments in CALLS[name]():
            for arch in architectures:
                driver.set_active(_Driver(arch))
                try:
                    with _as_on(arch, module):
                        function(*arguments)
                except Exception as error:
                    raise RuntimeError(f"{name}, {label!r}, sm_{arch}: {error}") from error
    return compiled


class _Driver:
    """What Triton asks of a GPU's driver to compile for it; the architecture is the number of the device as well."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def _as_on(arch: int, module: ModuleType) -> Iterator[None]:
    """Kernels of the module are launched as on a large GPU of the architecture."""
    from nanovllm.kernels import dependent_launch

    answers: dict[str, Any] = {"multiprocessors": MULTIPROCESSORS}
    with patch("torch.cuda.get_device_capability", lambda device: divmod(arch, 10)):
        answers["has_hopper_features"] = dependent_launch.has_hopper_features.__wrapped__(torch.device("cuda"))
    with ExitStack() as stack:
        for name, answer in answers.items():
            for place in (module, dependent_launch):
                if hasattr(place, name):
                    stack.enter_context(patch.object(place, name, lambda device, answer=answer: answer))
        launch_options = dependent_launch.launch_options.__wrapped__
        if hasattr(module, "launch_options"):
            stack.enter_context(patch.object(module, "launch_options", launch_options))
        yield


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
    lines = [f"{'kernel':28}{'case':44}{'arch':>6}{'registers':>11}{'local':>7}{'shared':>8}"]
    for one in compiled:
        lines.append(f"{one.kernel:28}{one.label:44}{one.arch:>6}{one.registers:>11}{one.local:>7}{one.shared:>8}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- what is called

# What tells a call from others of its module, the function, and its arguments: their values are never read.
Calls = Iterator[tuple[str, Callable[..., object], tuple[Any, ...]]]

_ints = partial(torch.empty, dtype=torch.int32)
_longs = partial(torch.empty, dtype=torch.int64)
_floats = partial(torch.empty, dtype=torch.float32)


def _cache(of: Callable[..., torch.Tensor], kv_heads: int, block_size: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Keys and values of a layer."""
    return of(2, 8, kv_heads, block_size, head_dim).unbind()


def _kinds(*cases: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Cases that begin with the name of a dtype, with what makes tensors of it put behind that."""
    for name, *sizes in cases:
        yield name, partial(torch.empty, dtype=DTYPES[name]), *sizes


def _decode_few_rows() -> Calls:
    from nanovllm.kernels.decode_few_rows import TILE, decode_few_rows
    from nanovllm.kernels.decode_work import plan_decode

    rows = 4
    for name, of, kv_heads, group, head_dim in _kinds(
        ("bf16", 8, 2, 128),
        ("bf16", 8, 4, 128),
        ("bf16", 8, 8, 80),
        ("fp16", 8, 2, 128),
        ("fp32", 8, 2, 128),
        ("fp32", 8, 8, 128),
    ):
        sizes = kv_heads * group, kv_heads
        rotation = _floats(MAX_LEN, head_dim // 2), _floats(MAX_LEN, head_dim // 2), _longs(rows)
        cached = *_cache(of, kv_heads, 32, head_dim), _longs(rows), _ints(ROWS, MAX_LEN // 32)
        work = plan_decode(_ints(rows), _ints(rows), None, MAX_LEN, *sizes, head_dim, TILE)
        qkv = of(rows, kv_heads * (group + 2) * head_dim)
        arguments = qkv, of(head_dim), of(head_dim), 1e-6, *rotation, *cached, work, head_dim**-0.5, *sizes
        yield f"{name} {kv_heads}x{group}x{head_dim}", decode_few_rows, arguments


def _decode_inputs() -> Calls:
    from nanovllm.kernels.decode_inputs import decode_inputs

    tables = _ints(ROWS), _ints(ROWS), _ints(ROWS, MAX_LEN + 1), _ints(ROWS, MAX_LEN // 16), 16, _ints(ROWS, 6)
    written = _longs(ROWS), _longs(ROWS), _longs(ROWS), _ints(ROWS), _ints(ROWS, 6)
    yield "block size 16", decode_inputs, (*tables, *written)


def _decode_outputs() -> Calls:
    from nanovllm.kernels.decode_outputs import decode_outputs

    arguments = _ints(ROWS), _longs(ROWS), _ints(ROWS), _ints(ROWS, MAX_LEN + 1), _ints(ROWS)
    yield "int32 tables", decode_outputs, arguments


def _decode_work() -> Calls:
    from nanovllm.kernels.decode_work import plan_decode

    yield "plan", plan_decode, (_ints(ROWS), _ints(ROWS), _ints(ROWS), MAX_LEN, 16, 8, 128)


def _fused_linear() -> Calls:
    from nanovllm.kernels.fused_linear import fused_linear

    for name, of, rows, inputs, outputs, flags in _kinds(
        ("bf16", 1, 1024, 4096, "norm"),
        ("bf16", 1, 2048, 1024, "residual holds back"),
        ("bf16", 1, 1024, 3072, "norm gated"),
        ("bf16", 4, 1024, 3072, "norm gated"),
        ("bf16", 1, 3072, 1024, "residual bias"),
        ("bf16", 4, 25600, 5120, "residual"),
        ("fp16", 4, 1024, 3072, "norm gated"),
        ("fp32", 2, 1024, 3072, "norm gated"),
        ("fp32", 4, 12288, 4096, "residual"),
    ):
        gated = "gated" in flags
        bias, norm = of(outputs) if "bias" in flags else None, of(inputs) if "norm" in flags else None
        residual = of(rows, outputs) if "residual" in flags else None
        weight = of(2 * outputs if gated else outputs, inputs)
        arguments = of(rows, inputs), weight, bias, norm, 1e-6, residual, gated, None, "holds back" in flags
        yield f"{name} {rows}x{inputs}x{outputs} {flags}", fused_linear, arguments


def _nucleus() -> Calls:
    from nanovllm.kernels.nucleus import nucleus

    for name, of, has_min_p in _kinds(("bf16", False), ("bf16", True), ("fp16", True), ("fp32", False), ("fp32", True)):
        measures = _floats(ROWS, 1187), _floats(ROWS), _floats(ROWS), _floats(ROWS) if has_min_p else None
        pending = torch.empty(ROWS, dtype=torch.bool)
        arguments = *measures, _floats(ROWS), _ints(ROWS, 2), _longs(ROWS), pending, _longs(ROWS), VOCABULARY
        yield f"{name}{', min_p' if has_min_p else ''}", nucleus, (of(ROWS, VOCABULARY), *arguments)


def _paged_decode() -> Calls:
    from nanovllm.kernels.decode_work import plan_decode
    from nanovllm.kernels.paged_decode import paged_decode

    for name, of, kv_heads, group, head_dim, block_size in _kinds(
        ("bf16", 8, 2, 128, 16),
        ("bf16", 8, 2, 128, 32),
        ("bf16", 8, 8, 80, 256),
        ("bf16", 1, 71, 64, 32),
        ("bf16", 4, 1, 256, 32),
        ("fp16", 8, 2, 128, 32),
        ("fp32", 8, 2, 128, 32),
        ("fp32", 8, 4, 256, 32),
    ):
        heads = kv_heads * group
        q = of(ROWS, heads + 2 * kv_heads, head_dim)[:, :heads]
        work = plan_decode(_ints(ROWS), _ints(ROWS), None, MAX_LEN, heads, kv_heads, head_dim)
        cached = *_cache(of, kv_heads, block_size, head_dim), _ints(ROWS, MAX_LEN // block_size)
        label = f"{name} {kv_heads}x{group}x{head_dim}, blocks of {block_size}"
        yield label, paged_decode, (q, *cached, work, head_dim**-0.5, of(ROWS, heads, head_dim))


def _paged_prefill() -> Calls:
    from nanovllm.kernels import paged_prefill

    for name, of, kv_heads, group, head_dim, block_size, large in _kinds(
        ("bf16", 8, 2, 128, 16, True),
        ("bf16", 8, 2, 128, 16, False),
        ("bf16", 4, 5, 80, 32, False),
        ("bf16", 8, 4, 64, 256, True),
        ("bf16", 4, 1, 256, 32, True),
        ("fp16", 8, 2, 128, 16, True),
        ("fp32", 8, 2, 128, 32, True),
        ("fp32", 8, 4, 256, 32, True),
    ):
        heads = kv_heads * group
        q = of(MAX_LEN, heads + 2 * kv_heads, head_dim)[:, :heads]
        cached = *_cache(of, kv_heads, block_size, head_dim), _ints(ROWS, MAX_LEN // block_size)
        arguments = q, *cached, _ints(ROWS), _ints(4, 99), head_dim**-0.5, of(MAX_LEN, heads, head_dim)
        label = f"{name} {kv_heads}x{group}x{head_dim}, {'large' if large else 'small'} shared memory"
        with patch.object(paged_prefill, "_has_large_shared_memory", lambda device, large=large: large):
            yield label, paged_prefill.paged_prefill, arguments


def _qk_norm_rope_store() -> Calls:
    from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store

    for name, of, heads, kv_heads, head_dim in _kinds(
        ("bf16", 16, 8, 128), ("bf16", 64, 8, 80), ("fp32", 16, 8, 128), ("fp32", 16, 16, 256)
    ):
        rotation = _floats(MAX_LEN, head_dim // 2), _floats(MAX_LEN, head_dim // 2), _longs(ROWS)
        cached = *_cache(of, kv_heads, 16, head_dim), _longs(ROWS)
        qkv = of(ROWS, (heads + 2 * kv_heads) * head_dim)
        arguments = qkv, of(head_dim), of(head_dim), 1e-6, *rotation, *cached, heads, kv_heads
        yield f"{name} {heads}/{kv_heads} heads of {head_dim}", qk_norm_rope_store, arguments


def _rms_norm() -> Calls:
    from nanovllm.kernels.rms_norm import rms_norm

    for name, of, size, residual in _kinds(
        ("bf16", 1024, True), ("bf16", 5120, False), ("fp32", 1024, True), ("fp32", 16384, True)
    ):
        arguments = of(ROWS, size), of(size), 1e-6, of(ROWS, size) if residual else None
        yield f"{name} size {size}{' residual' if residual else ''}", rms_norm, arguments


def _sample() -> Calls:
    from nanovllm.kernels.sample import sample

    for name, of in _kinds(("bf16",), ("fp16",), ("fp32",)):
        arguments = of(ROWS, VOCABULARY), _floats(ROWS), _ints(ROWS, 2), _longs(ROWS), VOCABULARY
        yield name, sample, arguments


def _silu_and_mul() -> Calls:
    from nanovllm.kernels.silu_and_mul import silu_and_mul

    for name, of in _kinds(("bf16",), ("fp32",)):
        yield f"{name} n 3072", silu_and_mul, (of(ROWS, 2 * 3072),)


def _store_kv() -> Calls:
    from nanovllm.kernels.store_kv import store_kv

    for name, of in _kinds(("bf16",), ("fp32",)):
        _, k, v = of(ROWS, 32, 128).split((16, 8, 8), dim=1)
        yield name, store_kv, (k, v, *_cache(of, 8, 32, 128), _longs(ROWS))


CALLS: dict[str, Callable[[], Calls]] = {
    "decode_few_rows": _decode_few_rows,
    "decode_inputs": _decode_inputs,
    "decode_outputs": _decode_outputs,
    "decode_work": _decode_work,
    "fused_linear": _fused_linear,
    "nucleus": _nucleus,
    "paged_decode": _paged_decode,
    "paged_prefill": _paged_prefill,
    "qk_norm_rope_store": _qk_norm_rope_store,
    "rms_norm": _rms_norm,
    "sample": _sample,
    "silu_and_mul": _silu_and_mul,
    "store_kv": _store_kv,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Raises RuntimeError if a kernel does not compile, SystemExit (2) if none can be compiled here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="module", help=f"of {', '.join(CALLS)} (default: all)")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES), help="compute capabilities x 10")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.modules if name not in CALLS]
    if unknown:
        parser.error(f"no calls of {unknown[0]!r}; there are some of {', '.join(CALLS)}")
    reason = why_not()
    if reason is not None:
        parser.exit(2, f"{parser.prog}: error: {reason}\n")
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined, and then there is nothing to compile
    sys.path.insert(0, str(ROOT))
    compiled = []
    for name in arguments.modules or CALLS:
        compiled += compile_module(name, tuple(arguments.arch))
    print(json.dumps([one._asdict() for one in compiled]) if arguments.json else format_table(compiled))


if __name__ == "__main__":
    main()
