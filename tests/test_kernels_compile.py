"""Triton kernels compile for every architecture we serve, on any Linux machine, and fit it."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tools.compile_kernels import ARCHITECTURES, CALLS, Compiled, format_table, why_not

# What is compiled for sm_80 runs on sm_86 and sm_89 as well, but for what is "large": these have no more.
SHARED_LIMITS = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
LARGE_LIMIT = 163 * 1024  # of sm_80 itself
LOCAL_LIMIT = 64  # bytes a thread
ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "nanovllm" / "kernels").glob("*.py"))
# Names that a launch takes for itself: of JITFunction.run, and in the function it makes to bind a kernel's arguments.
TAKEN = {"self", "args", "kwargs", "grid", "warmup", "device", "device_type", "stream"}
TAKEN |= {"params", "specialization", "options", "specialize_impl", "backend", "JITCallable"}


pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def compile_elsewhere(module: str, folder: Path) -> list[Compiled]:
    """Compile a module's calls in a process that does not interpret, from scratch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / module), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "compile_kernels.py"), module, "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [Compiled(**one) for one in json.loads(result.stdout.splitlines()[-1])]


def shared_limit(compiled: Compiled) -> int:
    """Bytes of shared memory that a program may have on every GPU that it is launched on."""
    limit = SHARED_LIMITS[compiled.arch]
    return max(limit, LARGE_LIMIT) if "large shared memory" in compiled.label else limit


@pytest.fixture(scope="module")
def compilations(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[list[Compiled]]]]:
    """What every module compiles to whose test is selected, two at a time."""
    tests = [item for item in request.session.items if item.path == request.path]
    modules = [test.callspec.params["module"] for test in tests if hasattr(test, "callspec")]
    folder = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {module: pool.submit(compile_elsewhere, module, folder) for module in modules}


def kernels(path: Path) -> dict[str, list[str]]:
    """The functions in a file that are launched, by the convention for their names, and their arguments."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return {one.name: [arg.arg for arg in one.args.args] for one in functions if re.fullmatch(r"_\w+_kernel", one.name)}


def test_no_kernel_has_an_argument_that_a_launch_takes_for_itself() -> None:
    """It would fail, and not in the interpreter."""
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    taken = TAKEN | {field.name for field in dataclasses.fields(compiler.CUDAOptions)}
    found = [(name, set(arguments)) for path in FILES for name, arguments in kernels(path).items()]
    assert len(found) > len(CALLS)
    assert [(name, arguments & taken) for name, arguments in found if arguments & taken] == []


def test_every_module_of_kernels_has_calls() -> None:
    assert {path.stem for path in FILES if kernels(path)} == {*CALLS, "probe"}


@pytest.mark.slow
@pytest.mark.parametrize("module", CALLS)
def test_compiles(module: str, compilations: dict[str, Future[list[Compiled]]]) -> None:
    """All its kernels, without spilling registers, and in the shared memory there is."""
    compiled = compilations[module].result()
    print("\n" + format_table(compiled))
    [path] = [path for path in FILES if path.stem == module]
    expected = {(name, arch) for name in kernels(path) for arch in ARCHITECTURES}
    assert {(one.kernel, one.arch) for one in compiled} == expected
    unfit = [one for one in compiled if one.local > LOCAL_LIMIT or one.shared > shared_limit(one)]
    assert not unfit, "\n" + format_table(unfit)
