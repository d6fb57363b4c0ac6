"""Where kernels are used, and what is said where they cannot be."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from nanovllm import kernels
from nanovllm.utils.transfer import HostCopy, to_device

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
        if name not in ("graphs", "overlap"):
            assert kernels.load(name, CUDA) is not None
            monkeypatch.setenv("NANOVLLM_DISABLE", f"overlap, {name}")
            assert kernels.load(name, CUDA) is None
            assert kernels.load_or_reference(name, CUDA).__name__ == f"{name}_reference"
            monkeypatch.delenv("NANOVLLM_DISABLE")


def test_no_other_device_has_them() -> None:
    assert "no kernels for mps" in (kernels.why_no_triton(torch.device("mps")) or "")
    assert kernels.load("rms_norm", torch.device("cpu")) is None


def test_switching_off_what_there_is_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_DISABLE", "rmsnorm")
    with pytest.raises(ValueError, match=r"NANOVLLM_DISABLE names 'rmsnorm'; it may name rms_norm, "):
        kernels.is_enabled("overlap")


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


def test_copies_keep_their_values_whatever_comes_after_and_whatever_the_default_device() -> None:
    source = torch.arange(5)
    copy = HostCopy(source)
    source.zero_()
    assert copy.wait().tolist() == [0, 1, 2, 3, 4]
    with torch.device("meta"):
        values = to_device([1, 2, 3], torch.int32, torch.device("cpu"))
        assert values.device.type == "cpu"
        assert HostCopy(values).wait().tolist() == [1, 2, 3]
