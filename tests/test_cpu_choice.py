"""Where the CPU's kernels are used, what takes their place elsewhere, and where compiled ones are kept."""

import logging
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, kernels
from nanovllm.attention import AttentionSpec, select_backend
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.layers import product
from tests.checkpoints import write_checkpoint
from tests.threads import one_thread  # noqa: F401

if (reason := kernels.why_no_cpu_kernels()) is not None:
    pytest.skip(reason, allow_module_level=True)

from nanovllm.kernels.cpu import compilation, launch, silu_and_mul, vectors

ROOT = Path(__file__).resolve().parent.parent
SPEC = AttentionSpec(2, 8, 2, 64, torch.bfloat16, torch.device("cpu"), 16)
PROMPTS = [list(range(5, 45)), [7, 8, 9]]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """What is found out about the machine is found out again, before and after."""

    def forget() -> None:
        for remembered in (kernels.why_no_cpu_kernels, product.has_fast_bfloat16, compilation.cache_directory):
            remembered.cache_clear()

    forget()
    yield
    forget()


def make_llm(checkpoint: str | Path = DEMO_MODEL_PATH, **changes: Any) -> LLM:
    arguments = {"device": "cpu", "skip_tokenizer_init": True, "max_model_len": 128, "num_kvcache_blocks": 64}
    return LLM(checkpoint, **{**arguments, "max_num_seqs": 4, **changes})


def generate(llm: LLM, max_tokens: int = 8) -> tuple[list[list[int]], list[float]]:
    """Greedy tokens, and the log-probability of each first one."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    completions = [output.outputs[0] for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    first = [completion.logprobs[0][completion.token_ids[0]].logprob for completion in completions]
    return [completion.token_ids for completion in completions], first


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[list[list[int]], list[float]]]:
    """What all kernels together give, by dtype."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        with make_llm(dtype=dtype) as llm:
            assert llm.get_metrics()["attention_backend"] == "cpu"
            found[dtype] = generate(llm)
    return found


# Without kernels


def assert_matmul_answers(llm: LLM, expected: dict[str, Any]) -> None:
    metrics = llm.get_metrics()
    assert metrics["attention_backend"] == "matmul"
    tokens, first = generate(llm)
    if metrics["dtype"] == "float32":
        assert tokens == expected["float32"][0]
    assert first == pytest.approx(expected["float32"][1], abs=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_without_numba_torch_does_the_work(dtype: str, monkeypatch: pytest.MonkeyPatch, expected: Any) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert kernels.why_no_cpu_kernels() == "the package numba is not installed"
    assert all(kernels.load(name, SPEC.device, SPEC.dtype) is None for name in kernels.CPU_KERNELS)
    with make_llm(dtype=dtype) as llm:
        assert_matmul_answers(llm, expected)
    with pytest.raises(ValueError, match="attention_backend is 'cpu', but the package numba is not installed"):
        select_backend("cpu", SPEC)


def test_with_a_numba_that_compiles_nothing_too(monkeypatch: pytest.MonkeyPatch, expected: Any) -> None:
    monkeypatch.setitem(sys.modules, "nanovllm.kernels.cpu.rms_norm", None)
    assert (kernels.why_no_cpu_kernels() or "").startswith("numba cannot compile a kernel here: ModuleNotFoundError")
    with make_llm(dtype="float32") as llm:
        assert_matmul_answers(llm, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*kernels.CPU_KERNELS, "graphs", " ".join(kernels.CPU_KERNELS)])
def test_each_kernel_can_be_switched_off(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch, expected: Any) -> None:
    monkeypatch.setattr(product, "has_fast_tiles", lambda: True)
    monkeypatch.setenv("NANOVLLM_DISABLE", name)
    with make_llm(dtype=dtype) as llm:
        assert llm.get_metrics()["attention_backend"] == "cpu"
        tokens, first = generate(llm)
        recorded = llm.engine.runner.recorded
        assert (recorded is None) == (name == "graphs")
        # The sampler is no part of what is recorded, and a tied embedding is the output head's packed weight.
        is_all_kernels = dtype == "bfloat16" and name in ("block_sums", "embedding")
        assert recorded is None or bool(recorded.recordings) == is_all_kernels
    assert first == pytest.approx(expected[dtype][1], abs=0.05 if dtype == "bfloat16" else 1e-4)
    if dtype == "float32":
        assert tokens == expected[dtype][0]


@pytest.mark.parametrize("changes", [{"kvcache_block_size": 4}, {"kvcache_block_size": 24}, {"dtype": "float16"}])
def test_what_the_cpu_backend_does_not_serve_matmul_does(
    changes: dict[str, Any], expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="nanovllm"), make_llm(**{"dtype": "float32", **changes}) as llm:
        assert_matmul_answers(llm, expected)
    assert any("attention falls back to matmul" in record.getMessage() for record in caplog.records)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_heads_that_are_too_large_for_it_too(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, head_dim=258, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    for dtype in ("float32", "bfloat16"):
        with make_llm(path, dtype=dtype) as llm:
            assert llm.get_metrics()["attention_backend"] == "matmul"
            assert [len(tokens) for tokens in generate(llm)[0]] == [8, 8]
        with pytest.raises(ValueError, match="attention_backend is 'cpu', but head_dim 258 is not an even number"):
            make_llm(path, dtype=dtype, attention_backend="cpu")


# Where compiled kernels are kept


def compiled_silu() -> torch.Tensor:
    """The result of a kernel that has just been compiled, or read from the cache."""
    kernel = launch.Kernel(silu_and_mul._silu_and_mul, reorders=False)
    x, out = torch.full((1, 6), 2.0), torch.zeros(1, 3)
    kernel(1, x.data_ptr(), 6, out.data_ptr(), 3, False, 1)
    torch.testing.assert_close(out, torch.nn.functional.silu(x[:, :3]) * 2)
    return out


def files(directory: Path) -> dict[str, int]:
    """Files of a cache, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def test_the_cache_is_where_the_variable_says_and_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "some" / "where"
    monkeypatch.setenv("NANOVLLM_CACHE", str(place))
    compiled_silu()
    written = files(place)
    assert sorted(Path(name).suffix for name in written) == [".nbc", ".nbi"]
    compiled_silu()
    assert files(place) == written
    monkeypatch.setattr(compilation, "TARGET", ("some", "other", "+processor"))
    compilation.cache_directory.cache_clear()
    compiled_silu()
    assert len(list(place.iterdir())) == 2, "a kind of processor has a directory of its own"


def test_the_cache_is_the_users_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert compilation._user_cache() == os.path.join("~/.cache", "nanovllm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compilation._user_cache() == os.path.join("/somewhere", "nanovllm")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compilation._user_cache() == "~/Library/Caches/nanovllm"


@pytest.mark.parametrize("place", ["file/within", "~nobody-of-this-name/cache"])
def test_where_nothing_can_be_kept_kernels_are_compiled_each_time(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What stands in the way is a file, or that there is no home directory."""
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOVLLM_CACHE", place)
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        compiled_silu()
    assert compilation.cache_directory() is None
    assert any("compiled kernels are not kept" in record.getMessage() for record in caplog.records)
    assert files(tmp_path).keys() == {"file"}


@pytest.mark.parametrize("content", [b"", b"nonsense", None], ids=["empty", "nonsense", "half"])
@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_files_of_the_cache_that_are_none_are_replaced(
    suffix: str, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    compiled_silu()
    [path] = tmp_path.rglob(f"*{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    compiled_silu()
    assert len(path.read_bytes()) == len(whole)
    written = files(tmp_path)
    assert len(written) == 2
    compiled_silu()
    assert files(tmp_path) == written, "it is read, not made again"


def test_a_directory_that_nobody_can_write_to_any_more_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another process removes it, because it is old, between the look at it and its use."""
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    directory = Path(compilation.cache_directory() or "")
    directory.rmdir()
    directory.write_text("a file where the directory was")
    compiled_silu()
    assert directory.read_text() == "a file where the directory was"


def aged(path: Path, days: float) -> Path:
    """A directory with a file in it, last used so many days ago."""
    path.mkdir()
    (path / "linear.nbc").write_bytes(b"code")
    then = time.time() - days * 24 * 3600
    os.utime(path, (then, then))
    return path


def test_kernels_that_nobody_has_used_for_a_month_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    own = Path(compilation.cache_directory() or "")
    then = time.time() - 90 * 24 * 3600
    os.utime(own, (then, then))
    aged(tmp_path / "kernels-0123456789abcdef", days=31)
    aged(tmp_path / "removed-kernels-fedcba9876543210-77", days=31)  # of a process that was killed
    kept = [
        aged(tmp_path / "kernels-1123456789abcdef", days=29),
        aged(tmp_path / "kernels-of-mine", days=400),
        aged(tmp_path / "random-weights", days=400),
    ]
    compilation.cache_directory.cache_clear()
    assert compilation.cache_directory() == str(own)
    assert sorted(tmp_path.iterdir()) == sorted([own, *kept])
    assert all((path / "linear.nbc").exists() for path in kept)
    assert own.stat().st_mtime > time.time() - 3600, "its use was noted"


def test_what_cannot_be_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process was faster, or uses it on Windows."""
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    old = aged(tmp_path / "kernels-0123456789abcdef", days=31)

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "in use")

    monkeypatch.setattr(Path, "rename", refuse)
    compiled_silu()
    assert (old / "linear.nbc").exists()


# Compiling in the background


def test_calls_are_made_in_order_by_a_thread_that_ends() -> None:
    background, order, go_on = compilation._Background(), list[int](), threading.Event()

    def call(number: int) -> int:
        assert go_on.wait(10)
        order.append(number)
        return 10 * number

    futures = [background.submit(lambda number=number: call(number)) for number in range(3)]  # type: ignore[misc]
    assert not any(future.done() for future in futures), "who submits does not wait"
    assert [thread.name for thread in threading.enumerate()].count("nanovllm-compiler") == 1
    go_on.set()
    background.finish()
    assert (order, [future.result() for future in futures]) == ([0, 1, 2], [0, 10, 20])
    wait_until(lambda: not background._is_running)
    assert background.submit(lambda: 7).result(10) == 7, "a new thread is begun"


def test_what_fails_is_told_to_who_waits_and_the_rest_is_done() -> None:
    background = compilation._Background()

    def fail() -> int:
        raise ValueError("no such instruction")

    failed, done = background.submit(fail), background.submit(lambda: 1)
    with pytest.raises(ValueError, match="no such instruction"):
        background.finish()
    with pytest.raises(ValueError, match="no such instruction"):
        failed.result(10)
    assert done.result(10) == 1
    background.finish()  # it has been said once


def test_a_kernel_that_cannot_be_compiled_says_so_when_it_is_waited_for() -> None:
    def unknown(arguments: Any) -> None:
        nothing_of_that_name(arguments)  # type: ignore[name-defined]  # noqa: F821

    kernel = launch.Kernel(unknown)
    with pytest.raises(Exception, match="nothing_of_that_name"):
        compilation.finish_compiling()
    with pytest.raises(Exception, match="nothing_of_that_name"):
        kernel(1)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_an_engine_is_ready_when_all_is_compiled(quantization: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "has_fast_tiles", lambda: True)
    begun: list[str] = []
    submit = launch.compile_soon

    def noted(function: Any, reorders: bool) -> Any:
        begun.append(function.__name__)
        return submit(function, reorders)

    with make_llm(dtype="bfloat16", quantization=quantization) as llm:
        wait_until(lambda: not compilation._background._is_running)
        monkeypatch.setattr(launch, "compile_soon", noted)
        generate(llm)
    assert begun == []


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


# Other processors, other processes


CHECK_ATTENTION = """
import torch
from nanovllm.kernels.cpu import tiles, vectors
print(vectors.HAS_AVX512, vectors.HAS_BF16_PRODUCTS, vectors.HAS_INT8_PRODUCTS, tiles.MAX_ROWS)
from tests.test_cpu_attention import Batch, Row, World
rows = [Row(None, 0, 200, 1), Row(0, 8, 3, 40), Row(None, 0, 0, 3)]
World(Batch(rows, 16), 2, 3, 66, torch.bfloat16).assert_close()
"""
CHECK_LINEAR = """
from nanovllm.kernels.cpu import linear
x, weight = (torch.randint(-8, 9, (n, 66)).bfloat16() for n in (29, 70))
out = linear.linear(x, linear.pack(weight), 70, None, torch.float32)
assert torch.equal(out, x.float() @ weight.float().t())
"""


def start(code: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "NANOVLLM_CACHE": str(cache), "NANOVLLM_DISABLE": "qk_norm_rope_store", **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out.strip()


def features(without: tuple[str, ...]) -> str:
    """This processor's features but for some."""
    return ",".join("-" + name[1:] if name[1:] in without else name for name in vectors.TARGET[2].split(","))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="these are x86's")
@pytest.mark.parametrize("kind", ["avx2", "avx512"])
def test_without_products_of_bfloat16_they_are_made_of_others(kind: str, tmp_path: Path) -> None:
    """As numba is told which features the processor has, kernels must ask it and not the processor."""
    if f"+{kind.replace('512', '512f')}" not in vectors.TARGET[2].split(","):
        pytest.skip(f"this processor has no {kind}")
    if kind == "avx2":
        environment, wanted = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}, "False False False 2"
    else:
        environment = {"NUMBA_CPU_FEATURES": features(without=("avx512bf16", "avx512vnni", "amx-bf16"))}
        wanted = "True False False 12"
    assert output_of(start(CHECK_ATTENTION + CHECK_LINEAR, tmp_path, **environment)) == wanted
    [index] = [name for name in files(tmp_path) if "paged_attention_" in name and name.endswith(".nbi")]
    assert "bfloat16" in index, "float32 has a file of its own"


@pytest.mark.slow
def test_processes_that_compile_into_the_same_empty_cache_at_once_both_work(tmp_path: Path) -> None:
    """One begins with the kernel that the other ends with, of the same name; a third finds both."""
    code = "import torch\nfrom nanovllm.kernels.cpu import linear\n[linear.product_kernel(one).address for one in {}]\n"
    processes = [start(code.format(order) + CHECK_LINEAR, tmp_path) for order in ((False, True), (True, False))]
    for process in processes:
        output_of(process)
    written = files(tmp_path)
    kept = [name for name in written if name.endswith(".nbi")]
    assert len([name for name in kept if "linear.product_kernel" in name]) == 2, "a file each, which nobody overwrites"
    assert len(written) == 2 * len(kept), "nothing half-written is left"
    output_of(start(code.format((True, False)) + CHECK_LINEAR, tmp_path))
    assert files(tmp_path) == written
