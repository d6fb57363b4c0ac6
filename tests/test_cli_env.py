"""nanovllm env: what is reported of a machine, and that nothing that is broken there breaks it."""

import json

import pytest
import torch

from nanovllm import kernels
from nanovllm.attention import BACKENDS
from nanovllm.cli import main
from nanovllm.cli.env import _by_dtype, as_text
from nanovllm.diagnostics import machine
from nanovllm.utils import threads


def report_of(capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["env", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_everything_is_there_in_json_and_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys)
    assert report["versions"]["torch"] == torch.__version__
    assert set(machine.PACKAGES) < set(report["versions"])
    cpu = report["devices"]["cpu"]
    assert set(cpu["attention"]) == set(BACKENDS)
    assert cpu["attention"]["matmul"] == dict.fromkeys(("bfloat16", "float16", "float32"))
    assert "flash_attn has no kernels for cpu" in cpu["attention"]["flash_attn"]["bfloat16"]
    assert cpu["fast_dtypes"] in (["bfloat16"], ["float32"])
    assert report["memory"]["available_bytes"] > 0
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for part in ("versions\n", "fast dtypes", "attention cpu", "environment variables in effect", "caches\n"):
        assert part in text
    assert len(report["devices"]) + len(report["missing_devices"]) >= 3


def test_variables_in_effect_are_shown_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOVLLM_DISABLE", "rms_norm")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    report = report_of(capsys)
    assert report["variables"]["NANOVLLM_DISABLE"] == "rms_norm"
    assert report["variables"]["OMP_NUM_THREADS"] == "1"
    assert "secret" not in json.dumps(report)
    assert report["threads"]["why"] == "OMP_NUM_THREADS=1 says so"


def test_the_number_of_threads_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: 1.5)
    why = machine._threads()["why"]
    if torch.backends.openmp.is_available() and "set_num_threads" not in why:
        assert "physical cores in one socket" in why
        assert "control groups allow 1.5 CPUs" in why


def test_what_is_missing_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "why_no_cpu_kernels", lambda: "the package numba is not installed")
    report = report_of(capsys)
    cpu = report["devices"]["cpu"]
    assert cpu["kernels"]["numba"] == "the package numba is not installed"
    assert cpu["attention"]["cpu"]["float32"] == "the package numba is not installed"
    assert cpu["int8"]["bfloat16"] == "the package numba is not installed"
    assert report["caches"]["cpu_kernels"] is None
    text = as_text(report)
    assert "kernels (numba)" in text
    assert "no: the package numba is not installed" in text
    if not torch.cuda.is_available():
        assert "torch" in report["missing_devices"]["cuda"]


def test_a_question_that_fails_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(spec: object) -> None:
        raise OSError("libcuda is no library")

    monkeypatch.setattr(BACKENDS["triton"], "why_not", broken)
    found = machine._device(torch.device("cpu"))
    assert found["attention"]["triton"]["float32"] == "OSError: libcuda is no library"


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for what only a GPU can say."""
    for capability, fast in (((9, 0), ["bfloat16", "float16"]), ((7, 5), ["float16"])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
        assert machine._dtypes(torch.device("cuda", 0))["fast_dtypes"] == fast
        name = machine._name(torch.device("cuda", 0))
        assert name == f"A GPU (compute capability {capability[0]}.{capability[1]})"


def test_reasons_are_said_once() -> None:
    assert _by_dtype({"a": None, "b": None}) == "works"
    assert _by_dtype({"a": "it rains", "b": "it rains"}) == "no: it rains"
    assert _by_dtype({"a": None, "b": "it rains", "c": "it rains"}) == "works in a (not b, c: it rains)"
    assert _by_dtype({"a": "it rains", "b": "it snows"}) == "no: a: it rains; b: it snows"
