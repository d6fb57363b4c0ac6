"""Triton kernels compile for every architecture we serve, on any Linux machine, and fit it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tools.compile_kernels import ARCHITECTURES, Compiled, format_table, kernel_modules, why_not

SHARED_LIMITS = {80: 164 * 1024, 90: 227 * 1024, 100: 227 * 1024}
LOCAL_LIMIT = 64  # bytes a thread


pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def compile_elsewhere(module: str, folder: Path) -> list[Compiled]:
    """Compile a module's cases in a process that does not interpret, from scratch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / module), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, str(root / "tools" / "compile_kernels.py"), module, "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [Compiled(**one) for one in json.loads(result.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def compilations(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[list[Compiled]]]]:
    """What every module compiles to whose test is selected, two at a time."""
    tests = [item for item in request.session.items if item.path == request.path]
    modules = [test.callspec.params["module"] for test in tests]
    folder = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {module: pool.submit(compile_elsewhere, module, folder) for module in modules}


@pytest.mark.slow
@pytest.mark.parametrize("module", kernel_modules())
def test_compiles(module, compilations):
    """Without spilling registers, and in the shared memory there is."""
    compiled = compilations[module].result()
    print("\n" + format_table(compiled))
    assert {one.arch for one in compiled} == set(ARCHITECTURES)
    unfit = [one for one in compiled if one.local > LOCAL_LIMIT or one.shared > SHARED_LIMITS[one.arch]]
    assert not unfit, "\n" + format_table(unfit)
