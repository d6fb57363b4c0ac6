"""``nanovllm profile``: the parts add up, and what is timed is left as it was."""

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, kernels
from nanovllm.cli import main
from nanovllm.cli.profile import report
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.diagnostics.device_trace import device_parts, device_usage
from nanovllm.diagnostics.replacing import replaced
from nanovllm.diagnostics.step_profile import StepProfile, profile_steps
from nanovllm.diagnostics.step_timer import MODEL_PARTS, StepTimer
from nanovllm.engine.request import Request
from nanovllm.engine.step_handle import StepHandle

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO_MODEL_PATH, device="cpu", max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def profile(llm: LLM) -> StepProfile:
    return profile_steps(llm, batch_size=3, prompt_len=20, output_len=5, rounds=2)


def test_prefill_and_decode_steps_are_told_apart(profile: StepProfile) -> None:
    prefill, decode = profile.phases["prefill"], profile.phases["decode"]
    assert (prefill.steps, prefill.rows, prefill.tokens) == (1, 3, 60)
    assert (decode.steps, decode.rows, decode.tokens) == (4, 3, 3)


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_every_part_of_the_model_is_timed(profile: StepProfile, name: str) -> None:
    phase = profile.phases[name]
    assert {part.name for part in phase.parts} >= {*MODEL_PARTS, "schedule", "batch state", "update"}
    calls = {part.name: part.calls for part in phase.parts}
    assert calls["embedding"] == calls["lm_head"] == calls["schedule"] == 1
    assert calls["qkv_proj"] == calls["attention"] == calls["mlp down"] == 4  # layers
    assert calls["norms"] == 9
    assert all(part.seconds >= 0 for part in phase.parts)


def test_the_parts_as_it_runs_add_up_to_the_step(profile: StepProfile) -> None:
    for phase in profile.phases.values():
        assert sum(part.seconds for part in phase.host) == pytest.approx(phase.seconds, rel=0.02)
        assert phase.idle_share is None


def test_operations_are_torchs_operators_and_our_kernels(profile: StepProfile) -> None:
    operations = profile.phases["decode"].operations
    assert operations == sorted(operations, key=lambda one: -one.seconds)
    assert any(one.name.startswith("aten::") and one.kind == "operator" for one in operations)
    if kernels.why_not_fused(torch.device("cpu")) is None:
        assert any(one.kind == "kernel" for one in operations)


def test_the_engine_is_left_as_it_was(llm: LLM) -> None:
    engine = llm.engine
    recorded = engine.runner.recorded
    profile_steps(llm, batch_size=2, prompt_len=4, output_len=3, rounds=1)
    assert engine.runner.recorded is recorded
    for owner, name in [(engine, "advance"), (engine.runner, "execute"), (engine.scheduler, "schedule")]:
        assert name not in vars(owner)
    assert "forward" not in vars(engine.runner.model.model.embed_tokens)
    assert StepHandle.result.__qualname__ == "StepHandle.result"
    assert Request._decode.__qualname__ == "Request._decode"
    with LLM(DEMO_MODEL_PATH, device="cpu", max_num_seqs=8) as other:
        asked = [1, 2, 3]
        expected = other.generate([asked], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    assert llm.generate([asked], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected


def test_a_part_is_timed_without_what_it_calls() -> None:
    timer = StepTimer()
    inner = timer.timed("inner", lambda: time.sleep(0.02))
    outer = timer.timed("outer", lambda: (time.sleep(0.01), inner(), inner()))
    outer()
    assert timer._calls == {"inner": 2, "outer": 1}
    assert timer._parts["inner"] >= 0.04
    assert 0.01 <= timer._parts["outer"] < timer._parts["inner"]


def test_products_of_few_rows_are_told_apart_by_their_weights() -> None:
    weights = {name: torch.zeros(1) for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
    modules = {name: SimpleNamespace(weight=weight) for name, weight in weights.items()}
    layer = SimpleNamespace(
        self_attn=SimpleNamespace(**modules),
        mlp=SimpleNamespace(**modules),
        fused_linear=lambda x, weight, bias=None, **keywords: (x, weight, keywords),
    )
    timer = StepTimer()
    fused = timer.fused(layer)
    x = torch.ones(1)
    for weight in weights.values():
        assert fused(x, weight, None, gated=True) == (x, weight, {"gated": True})
    assert timer._calls == {"qkv_proj": 1, "o_proj": 1, "mlp gate_up": 1, "mlp down": 1}


@pytest.mark.gpu
def test_on_a_gpu_the_parts_are_the_devices_time() -> None:
    with LLM(DEMO_MODEL_PATH, device="cuda", max_num_seqs=8) as llm:
        profile = profile_steps(llm, batch_size=4, prompt_len=64, output_len=20)
    for phase in profile.phases.values():
        assert phase.idle_share is not None
        assert 0 <= phase.idle_share < 1
        assert {part.name for part in phase.parts} >= {"qkv_proj", "attention", "mlp down", "lm_head"}
        assert all(one.kind == "kernel" for one in phase.operations)
    assert any(event.get("cat") == "kernel" for event in profile.device_events)


def test_an_attribute_is_put_back_where_it_was() -> None:
    class Thing:
        number = 1

    thing = Thing()
    with replaced(thing, "number", 2):
        assert thing.number == 2
    assert "number" not in vars(thing)
    assert thing.number == 1
    with replaced(Thing, "number", 3):
        assert thing.number == 3
    assert thing.number == 1


def test_a_devices_work_is_told_by_the_annotation_it_was_launched_in() -> None:
    def event(category: str, name: str, begin: float, duration: float, **args: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration, "tid": 1, "args": args}

    events = [
        event("user_annotation", "rest", 0, 100),
        event("user_annotation", "mlp", 10, 10),
        event("user_annotation", "norms", 30, 10),
        event("cuda_runtime", "cudaLaunchKernel", 12, 1, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 35, 1, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 50, 1, correlation=3),
        event("kernel", "gemm", 200, 40, correlation=1),
        event("kernel", "rms", 260, 5, correlation=2),
        event("gpu_memcpy", "copy", 300, 1, correlation=3),
        event("kernel", "unknown", 310, 2, correlation=9),
    ]
    assert device_parts(events) == {"mlp": (40, 1), "norms": (5, 1), "rest": (1, 1), "elsewhere": (2, 1)}
    assert device_usage(events, "kernel")["idle_share"] == pytest.approx(1 - 48 / 112)


def test_requests_that_do_not_fit_are_refused() -> None:
    with LLM(DEMO_MODEL_PATH, device="cpu", num_kvcache_blocks=8, max_num_seqs=4) as llm:
        with pytest.raises(ValueError, match="need 12 KV blocks, and there are 8"):
            profile_steps(llm, 4, 32, 8)
        with pytest.raises(ValueError, match="5, but 4 sequences run at once"):
            profile_steps(llm, 5, 4, 4)


def test_the_report_compares_the_parts_with_the_step_as_it_runs(profile: StepProfile) -> None:
    lines = report(profile, top=3).splitlines()
    assert lines[0].startswith("3 requests of 20 prompt and 5 output tokens on cpu")
    assert sum("sum of the parts" in line for line in lines) == 2
    assert any(line.startswith(("  as it runs, recorded", "  as it runs, one by one")) for line in lines)
    assert sum("than the sum of its parts" in line for line in lines) == 2


def test_the_command_prints_figures_and_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "p.json.gz"
    arguments = ["--batch-size", "2", "--prompt-len", "9", "--output-len", "3", "--rounds", "1", "--device", "cpu"]
    assert main(["profile", *arguments, "--json", "--perfetto", str(trace)]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert set(found["phases"]) == {"prefill", "decode"}
    parts = found["phases"]["decode"]["parts"]
    assert found["phases"]["decode"]["parts_seconds"] == pytest.approx(sum(part["seconds"] for part in parts))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert names >= {"attention", "sampling", "schedule"}
    assert "decode: 2 steps of 2 rows" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--output-len", "1"], "at least 2"),
        (["--top", "16"], "--top is 16; a profile lists 15"),
        (["--tensor-parallel-size", "2"], "one rank"),
        (["--perfetto", "nowhere/p.json"], "its folder does not exist"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--prompt-len", "100000"], "max_model_len is 4096"),
        (["--prompt-len", "4095", "--output-len", "2"], "4095 + 2 tokens do not fit: max_model_len is 4096"),
        (["--model", "nowhere"], "model is 'nowhere'"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
