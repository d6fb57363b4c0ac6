"""Where kernels are used, and what is said where they cannot be."""

import logging
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, kernels
from nanovllm.attention import AttentionSpec, select_backend
from nanovllm.utils import transfer
from nanovllm.utils.transfer import HostCopy, to_device
from tools import compile_kernels

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_memory_of_devices() -> Any:
    kernels.why_no_triton.cache_clear()
    yield
    kernels.why_no_triton.cache_clear()


def test_a_gpu_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    reason = kernels.why_no_triton(CUDA) or ""
    assert "8.0 (Ampere)" in reason
    assert "7.5" in reason
    assert kernels.load("rms_norm", CUDA) is None


def test_a_machine_without_a_compiler_is_told_and_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from nanovllm.kernels import probe

    def no_compiler(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(probe, "probe", no_compiler)
    assert "Failed to find C compiler" in (kernels.why_no_triton(CUDA) or "")
    assert kernels.load("sample", CUDA) is None


def test_a_gpu_that_runs_a_kernel_gets_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from nanovllm.kernels import probe

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(probe, "probe", lambda device: None)
    assert kernels.why_no_triton(CUDA) is None
    for name in kernels.FEATURES:
        if name not in ("graphs", "overlap", *kernels.CPU_ONLY):
            assert kernels.load(name, CUDA) is not None
            monkeypatch.setenv("NANOVLLM_DISABLE", f"overlap, {name}")
            assert kernels.load(name, CUDA) is None
            assert kernels.load_or_reference(name, CUDA).__name__ == f"{name}_reference"
            monkeypatch.delenv("NANOVLLM_DISABLE")


def test_a_gpu_is_not_asked_for_what_only_the_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "why_no_triton", lambda device: None)
    for name in kernels.CPU_ONLY:
        assert kernels.load(name, CUDA, torch.bfloat16) is None


def test_no_other_device_has_them() -> None:
    assert "no kernels for mps" in (kernels.why_no_triton(torch.device("mps")) or "")
    assert kernels.load("rms_norm", torch.device("cpu")) is None
    assert kernels.why_not_fused(torch.device("cpu")) is None, "they are not missed there"


@pytest.mark.parametrize("backend", ["triton", "flash_attn"])
def test_a_device_without_kernels_is_told_before_any_package(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for module in ("triton", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    spec = AttentionSpec(28, 16, 8, 128, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ValueError) as raised:
        select_backend(backend, spec)
    assert str(raised.value) == (
        f"attention_backend is '{backend}', but {backend} has no kernels for cpu (it was to serve 16 query heads, "
        "8 key-value heads of 128, bfloat16, on cpu; attention_backend='auto' takes one that can)"
    )


def test_an_interpreter_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert kernels.why_no_triton(torch.device("cpu")) == "the package triton is not installed"


@pytest.mark.parametrize("reason", ["the package triton is not installed", None])
def test_an_engine_without_fused_kernels_says_so_once(
    tiny_checkpoint: Path, reason: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "why_not_fused", lambda device: reason)
    for _ in range(2):
        caplog.clear()
        with (
            caplog.at_level(logging.WARNING, logger="nanovllm"),
            LLM(tiny_checkpoint, device="cpu", skip_tokenizer_init=True, num_kvcache_blocks=8) as llm,
        ):
            llm.generate([[1, 2]], use_tqdm=False)
        wanted = [f"torch's operators replace the fused kernels on cpu, which is slower: {reason}"] if reason else []
        assert [record.getMessage() for record in caplog.records] == wanted


def test_fused_kernels_are_missed_only_where_there_could_be_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "why_no_triton", lambda device: f"nothing launches on {device}")
    assert kernels.why_not_fused(CUDA) == "nothing launches on cuda:0"
    assert kernels.why_not_fused(torch.device("mps")) is None


def test_switching_off_what_there_is_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_DISABLE", "rmsnorm")
    with pytest.raises(ValueError, match=r"NANOVLLM_DISABLE names 'rmsnorm'; it may name rms_norm, "):
        kernels.is_enabled("overlap")


def test_a_group_is_switched_off_by_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_DISABLE", "batch_state,sample")
    off = {feature for feature in kernels.FEATURES if not kernels.is_enabled(feature)}
    assert off == {"decode_inputs", "decode_outputs", "sample"}
    monkeypatch.setenv("NANOVLLM_DISABLE", "batch")
    with pytest.raises(ValueError, match=r"NANOVLLM_DISABLE names 'batch'; it may name .*overlap, .*batch_state"):
        kernels.is_enabled("sample")


@pytest.mark.parametrize(
    ("machine", "installed", "version", "message"),
    [
        ("x86_64", False, "3.3.0", "the package triton is not installed (pip install 'triton>=3.3')"),
        ("aarch64", True, "3.2.1", "triton 3.2.1 does not know sm_100; 3.3 does (pip install 'triton>=3.3')"),
        ("riscv64", True, "3.3.0", "triton is for Linux on x86_64 and aarch64, not linux on riscv64"),
    ],
)
def test_the_tool_that_compiles_them_says_in_a_line_why_it_cannot(
    machine: str,
    installed: bool,
    version: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(compile_kernels, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(compile_kernels, "version", lambda name: version)
    with pytest.raises(SystemExit) as ended:
        compile_kernels.main(["rms_norm"])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(f": error: {message}")


def test_the_tool_that_compiles_them_names_its_modules(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compile_kernels.main(["rmsnorm"])
    assert ended.value.code == 2
    assert "no calls of 'rmsnorm'; there are some of decode_few_rows, " in capsys.readouterr().err


def test_the_probe_launches() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import contextlib, torch\n"
            "torch.cuda.device = lambda device: contextlib.nullcontext()\n"
            "from nanovllm.kernels.probe import probe\n"
            "probe(torch.device('cpu'))\n",
        ],
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("most_pinned", [1000, 0], ids=["pinned", "left on the device"])
def test_a_copy_waits_for_what_was_queued_before_it(most_pinned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA: whoever waits may be on another stream than the copy."""
    events: list[str] = []

    class Event:
        def record(self, stream: object) -> None:
            events.append("recorded")

        def synchronize(self) -> None:
            events.append("waited for")

    class OnCuda(torch.Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

        def clone(self) -> torch.Tensor:  # type: ignore[override]
            events.append("copied")
            return torch.tensor(self.tolist())

    class Pinned(torch.Tensor):
        def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:  # type: ignore[override]
            events.append("copied")
            return self.as_subclass(torch.Tensor).copy_(torch.tensor(source.tolist()))

    monkeypatch.setattr(transfer, "MOST_PINNED", most_pinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options).as_subclass(Pinned)
    )
    copy = HostCopy(torch.tensor([1, 2, 3]).as_subclass(OnCuda))
    assert events == ["copied", "recorded"]
    assert copy.wait().tolist() == [1, 2, 3]
    assert events == ["copied", "recorded", "waited for"]


def test_copies_keep_their_values_whatever_comes_after_and_whatever_the_default_device() -> None:
    source = torch.arange(5)
    copy = HostCopy(source)
    source.zero_()
    assert copy.wait().tolist() == [0, 1, 2, 3, 4]
    with torch.device("meta"):
        values = to_device([1, 2, 3], torch.int32, torch.device("cpu"))
        assert values.device.type == "cpu"
        assert HostCopy(values).wait().tolist() == [1, 2, 3]
