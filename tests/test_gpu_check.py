"""tools/gpu_check.py gets through its stages without a GPU, computes its ceilings rightly, and survives failures."""

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from operator import mul
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nanovllm.engine.admission import AdmissionPolicy
from nanovllm.kernels import FEATURES, is_enabled
from nanovllm.utils.random_checkpoint import parameter_shapes, random_config
from nanovllm.utils.random_requests import Workload
from nanovllm.utils.random_shapes import SHAPES

ROOT = Path(__file__).parent.parent
STAGES = [
    "device",
    "kernels",
    "compiled",
    "backends",
    "tests",
    "parity",
    "graphs",
    "standard",
    "latency",
    "few_rows",
    "profile",
    "memory",
    "many",
    "ablation",
    "tune",
    "hf",
]


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("gpu_check")


@pytest.fixture
def gpu_measure(gpu_check: ModuleType) -> ModuleType:
    return importlib.import_module("gpu_measure")


class TestRehearsal:
    """All stages on the CPU, as small as can be."""

    @pytest.fixture(scope="class")
    def out(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("gpu_check")
        command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--out", str(out), "--quick", "--same-process"]
        done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        assert done.stdout.endswith((out / "gpu_check.txt").read_text()), "the table is printed last"
        return out

    @pytest.fixture(scope="class")
    def report(self, out: Path) -> dict[str, Any]:
        return json.loads((out / "gpu_check.json").read_text())

    @pytest.mark.slow
    def test_every_stage_is_there(self, report: dict[str, Any], gpu_check: ModuleType) -> None:
        assert list(report["stages"]) == list(gpu_check.STAGES) == STAGES

    @pytest.mark.slow
    @pytest.mark.parametrize("name", STAGES)
    def test_a_stage_is_in_order_and_found_something(self, report: dict[str, Any], out: Path, name: str) -> None:
        stage = report["stages"][name]
        assert stage["ok"], stage["errors"]
        assert stage["results"]
        assert f"{name}: ok in " in (out / "gpu_check.txt").read_text()

    @pytest.mark.slow
    def test_few_small_files_are_left(self, out: Path) -> None:
        names = {"gpu_check.json", "gpu_check.txt", "trace_1.json.gz", "trace_2.json.gz"}
        assert {file.name for file in out.iterdir()} == names

    @pytest.mark.slow
    @pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted on machines without a GPU")
    def test_kernels_were_compared(self, report: dict[str, Any]) -> None:
        pytest.importorskip("triton")
        found = report["stages"]["kernels"]["results"]
        assert len(found) > 20
        assert all(result.get("equal", 1) == 1 and result.get("error", 0) < 1e-2 for result in found.values())


class TestFailures:
    def test_a_stage_that_fails_is_noted_and_the_next_one_runs(
        self, gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def bad(check: Any) -> None:
            check.note("before", 1)
            raise ZeroDivisionError("of mine")

        def half_bad(check: Any) -> None:
            check.part("first", lambda: 1 / 0)
            check.part("second", lambda: {"us": 2.5})

        def good(check: Any) -> None:
            check.note("earlier", str(check.earlier["bad"]))

        stages = {"bad": (bad, 9), "half": (half_bad, 9), "good": (good, 9)}
        monkeypatch.setattr(gpu_check, "STAGES", stages)
        assert gpu_check.main(["--out", str(tmp_path), "--device", "cpu", "--same-process"]) == 1
        found = json.loads((tmp_path / "gpu_check.json").read_text())["stages"]
        assert [found[name]["ok"] for name in stages] == [False, False, True]
        assert "ZeroDivisionError: of mine" in found["bad"]["errors"]["stage"]
        assert found["bad"]["results"]["before"] == 1
        assert list(found["half"]["errors"]) == ["first"]
        assert found["half"]["results"]["second"] == {"us": 2.5}
        assert found["good"]["results"]["earlier"] == str(found["bad"]["results"])
        table = capsys.readouterr().out
        assert "    stage: FAILED: ZeroDivisionError: of mine\n" in table
        assert "    second: us 2.5\n" in table

    def supervised(
        self, gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, seconds: float
    ) -> dict[str, Any]:
        """What is found by a worker that does ``body`` with the parts it is to do."""
        script = tmp_path / "worker.py"
        script.write_text(f"""
import json, os, sys, time
out = sys.argv[sys.argv.index("--out") + 1] + "/stage.json"
skip = sys.argv[sys.argv.index("--skip") + 1 :] if "--skip" in sys.argv else []
found = {{"results": {{}}, "errors": {{}}, "tried": []}}
def do(part):
    found["tried"].append(part)
    json.dump(found, open(out, "w"))
def note(part, value):
    found["results"][part] = value
    json.dump(found, open(out, "w"))
for part in [part for part in "abc" if part not in skip]:
    do(part)
    {body}
    note(part, 1)
""")
        monkeypatch.setattr(gpu_check, "WORKER", [sys.executable, str(script)])
        args = gpu_check.build_parser().parse_args(["--out", str(tmp_path), "--device", "cpu"])
        return gpu_check.supervise("device", args, {}, seconds)

    def test_a_part_that_kills_the_process_is_noted_and_the_others_run(
        self, gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        body = "os.kill(os.getpid(), 9) if part == 'b' else None"
        found = self.supervised(gpu_check, tmp_path, monkeypatch, body, 60)
        assert found["tried"] == ["a", "b", "c"]
        assert found["results"] == {"a": 1, "b": "FAILED: the process ended with exit code -9", "c": 1}
        assert list(found["errors"]) == ["b"]

    def test_a_part_that_loses_the_device_keeps_its_own_words(
        self, gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        body = """if part == 'a':
        found["errors"]["a"] = "illegal memory access"
        note("a", "FAILED: illegal memory access")
        sys.exit(75)"""
        found = self.supervised(gpu_check, tmp_path, monkeypatch, body, 60)
        assert found["errors"] == {"a": "illegal memory access"}
        assert found["results"] == {"a": "FAILED: illegal memory access", "b": 1, "c": 1}

    def test_a_stage_that_takes_too_long_is_ended_with_what_it_had(
        self, gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started = time.monotonic()
        body = "time.sleep(60 if part == 'b' else 0)"
        found = self.supervised(gpu_check, tmp_path, monkeypatch, body, 3)
        assert time.monotonic() - started < 30
        assert found["results"]["a"] == 1
        assert "ended after 3 s" in found["errors"]["b"]

    def test_a_process_of_its_own_does_a_stage(self, gpu_check: ModuleType, tmp_path: Path) -> None:
        argv = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--stages", "device"]
        assert gpu_check.main(argv) == 0
        report = json.loads((tmp_path / "gpu_check.json").read_text())
        assert report["stages"]["device"]["results"]["copy_bandwidth_tb_s"] > 0

    def test_stages_without_time_are_not_run(self, gpu_check: ModuleType, tmp_path: Path) -> None:
        argv = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--stages", "device", "--minutes", "0"]
        assert gpu_check.main(argv) == 1
        assert "no time was left" in (tmp_path / "gpu_check.txt").read_text()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_a_missing_gpu_is_said_at_once(
        self, gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            gpu_check.main(["--out", str(tmp_path)])
        assert "there is no CUDA device here" in capsys.readouterr().err


def test_an_ablation_switches_off_what_there_is(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    off: dict[str, set[str]] = {}
    for name, disabled in importlib.import_module("gpu_speed").ABLATIONS.items():
        monkeypatch.setenv("NANOVLLM_DISABLE", disabled)
        off[name] = {feature for feature in FEATURES if not is_enabled(feature)}
    assert off["nothing"] == off["nothing, again"] == set()
    assert off["batch_state"] == {"decode_inputs", "decode_outputs"}
    assert off["few_rows"] == {"fused_linear", "decode_few_rows"}
    assert off["all kernels"] == set(FEATURES) - {"graphs", "overlap"}
    assert set().union(*(features for name, features in off.items() if name != "all kernels")) == set(FEATURES) - {
        "nucleus"
    }


class TestRoofline:
    CONFIG = random_config("qwen3-0.6b")
    PARAMETERS = 596_049_920

    def test_the_weights_are_read_once_a_decode_step(self, gpu_measure: ModuleType) -> None:
        limit = gpu_measure.roofline([5, 9], [4, 11], self.CONFIG, bandwidth=1e12, flops=1e30)
        assert limit.decode_steps == 10
        assert limit.weights == pytest.approx(10 * 2 * self.PARAMETERS / 1e12)

    def test_a_head_of_its_own_is_read_and_the_embeddings_are_not(self, gpu_measure: ModuleType) -> None:
        config = random_config("qwen3-8b")
        limit = gpu_measure.roofline([1], [2], config, bandwidth=1.0, flops=1e30)
        elements = sum(
            torch.Size(size).numel() for name, size in parameter_shapes(config) if "embed_tokens" not in name
        )
        assert limit.weights == 2 * elements

    def test_keys_and_values_are_those_of_every_context_step_by_step(self, gpu_measure: ModuleType) -> None:
        prompts, outputs = [3, 40, 1], [1, 7, 20]
        tokens = sum(p + k for p, n in zip(prompts, outputs, strict=True) for k in range(1, n))
        limit = gpu_measure.roofline(prompts, outputs, self.CONFIG, bandwidth=1.0, flops=1e30)
        assert limit.kv == tokens * 112 * 1024

    def test_prompts_cost_two_operations_a_weight_and_token(self, gpu_measure: ModuleType) -> None:
        limit = gpu_measure.roofline([100], [1], self.CONFIG, bandwidth=1e30, flops=1.0)
        head = 151_936 * 1024
        norms = 28 * (2 * 1024 + 2 * 128) + 1024
        pairs = sum(range(1, 101))
        attention = 4 * 28 * 16 * 128 * pairs  # a product with the keys and one with the values
        assert limit.prefill == 2 * 100 * (self.PARAMETERS - head - norms) + 2 * head + attention
        assert limit.total == pytest.approx(limit.prefill)

    def test_more_requests_than_rows_take_more_steps(self, gpu_measure: ModuleType) -> None:
        limit = gpu_measure.roofline([1] * 8, [11] * 8, self.CONFIG, 1.0, 1.0, max_rows=2)
        assert limit.decode_steps == 8 * 10 // 2


class TestContinuousBatching:
    """Which requests transformers is given: each step without flash-attn costs with the square of them."""

    @pytest.fixture
    def asked(
        self, gpu_check: ModuleType, gpu_measure: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> Callable[..., list[str]]:
        stage = importlib.import_module("gpu_speed")

        def ask(flash_attn: bool, seconds: dict[str, float]) -> list[str]:
            made: list[str] = []

            def bench_process(check: Any, workload: str, options: list[str], *rest: Any) -> dict[str, float]:
                made.append(workload)
                return {"median_seconds": seconds[workload.partition(":")[0]]}

            monkeypatch.setattr(stage.transformers.generation, "ContinuousBatchingConfig", object, raising=False)
            monkeypatch.setattr(stage, "find_spec", lambda name: object() if flash_attn else None)
            monkeypatch.setattr(stage, "bench_process", bench_process)
            check = gpu_measure.Check(torch.device("cuda"), False, tmp_path)
            stage.check_hf(check)
            assert not check.errors
            return [*made, *(key for key, value in check.results.items() if isinstance(value, str))]

        return ask

    def test_those_of_the_standard_run_with_flash_attn(self, asked: Callable[..., list[str]]) -> None:
        assert asked(True, {"256": 10.0}) == ["256:100-1024:100-1024"]

    def test_without_it_twice_as_many_until_they_take_too_long(self, asked: Callable[..., list[str]]) -> None:
        made = asked(False, {"8": 4.0, "16": 9.0, "32": 20.0})
        assert made == [*(f"{n}:100-1024:100-1024" for n in (8, 16, 32)), "hf-cb 64"]


class TestReplayOfAdmission:
    @pytest.fixture
    def tool(self, gpu_check: ModuleType) -> ModuleType:
        return importlib.import_module("replay_admission")

    @pytest.mark.parametrize("policy", [AdmissionPolicy(), AdmissionPolicy(mixed=False), AdmissionPolicy(vacancies=3)])
    def test_every_token_is_computed_once(self, tool: ModuleType, policy: AdmissionPolicy) -> None:
        requests = Workload.parse("20:4-9:3-8").draw(0, tool.VOCAB_SIZE)
        steps = tool.replay("20:4-9:3-8", policy, slots=4)
        lengths = list(zip(map(len, requests.prompts), requests.output_lens, strict=True))
        assert steps.prompt_tokens == sum(prompt for prompt, _ in lengths)
        assert steps.contexts == sum(prompt + k for prompt, output in lengths for k in range(1, output))
        assert steps.output_tokens == sum(output for _, output in lengths)
        assert steps.decode > 0
        assert steps.prompt > 0

    def test_costs_are_those_that_made_the_runs(self, tool: ModuleType) -> None:
        costs, key = [0.5, 2.0, 0.1], 0.01
        runs = [tool.Steps(decode=10, prompt=2, prompt_tokens=30, contexts=100)]
        runs += [tool.Steps(decode=7, prompt=5, prompt_tokens=60, contexts=90), tool.Steps(decode=1, prompt=9)]
        timed = [(run, sum(map(mul, run.counts, costs)) + run.contexts * key) for run in runs]
        assert tool.fit(timed, key).tolist() == pytest.approx(costs)

    def test_it_has_the_results_that_are_kept(self, tool: ModuleType) -> None:
        seconds, bandwidth = tool.measured(tool.RESULTS)
        assert set(tool.FITTED) < set(seconds)
        assert 3e12 < bandwidth < 5e12


class TestGraphs:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="the stage itself runs there")
    def test_a_replay_that_differs_in_one_bit_is_an_error(
        self, gpu_check: ModuleType, gpu_measure: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        pytest.importorskip("triton", reason="triton is not installed")
        stages = importlib.import_module("gpu_stages")
        monkeypatch.setattr(stages, "replay_difference", lambda *arguments: 2.0**-24)
        check = gpu_measure.Check(torch.device("cpu"), True, tmp_path)
        with pytest.raises(RuntimeError, match="'replay_bitwise_equal': '0 of 2 batch sizes'"):
            stages.compare_graphs(check, "float32")


class TestDeviceUsage:
    def test_overlapping_kernels_count_once(self, gpu_check: ModuleType) -> None:
        def kernel(name: str, start: float, duration: float, category: str = "kernel") -> dict[str, Any]:
            return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

        events = [
            kernel("a", 10, 10),
            kernel("b", 15, 10),
            kernel("a", 40, 5),
            kernel("copy", 45, 5, "gpu_memcpy"),
            kernel("host", 0, 100, "cpu_op"),
            {"ph": "f", "cat": "kernel", "name": "flow", "ts": 0},
        ]
        usage = importlib.import_module("gpu_speed").device_usage(events, "kernel")
        assert usage["busy_us"] == 25
        assert usage["span_us"] == 40
        assert usage["idle_share"] == pytest.approx(15 / 40)
        assert usage["top"] == [
            ("a", 0.5, 2, 7.5),
            ("b", pytest.approx(1 / 3), 1, 10),
            ("copy", pytest.approx(1 / 6), 1, 5),
        ]

    def test_a_trace_without_kernels_is_said_to_be_empty(self, gpu_check: ModuleType) -> None:
        usage = importlib.import_module("gpu_speed").device_usage([], "kernel")
        assert usage == {"events": 0, "top": []}


class TestSettingsOfFewRows:
    @pytest.fixture
    def stage(self, gpu_check: ModuleType) -> ModuleType:
        return importlib.import_module("gpu_few_rows")

    def test_each_is_of_a_constant_there_is_and_another_value(self, stage: ModuleType) -> None:
        pytest.importorskip("triton", reason="triton is not installed")
        for name, settings in [*stage.SETTINGS.items(), *stage.SETTINGS_OF_MORE.items()]:
            modules = {module: importlib.import_module(f"nanovllm.{module}") for module in settings}
            places = [(modules[module], key) for module, values in settings.items() for key in values]
            before = [getattr(*place) for place in places]
            with stage.changed(settings):
                assert all(getattr(*place) != value for place, value in zip(places, before, strict=True)), name
            assert [getattr(*place) for place in places] == before

    def test_the_output_projection_alone_is_multiplied_element_by_element(self, stage: ModuleType) -> None:
        fused_linear = pytest.importorskip("nanovllm.kernels.fused_linear", reason="triton is not installed")
        shape = SHAPES["qwen3-0.6b"]
        hidden, intermediate = shape["hidden_size"], shape["intermediate_size"]
        products = [(hidden, 4096), (shape["num_attention_heads"] * 128, hidden), (intermediate, hidden)]

        def are_by_tiles() -> list[bool]:
            return [fused_linear._launch_sizes(*product, False, 2, 132)[0]["BY_TILES"] for product in products]

        assert are_by_tiles() == [True, True, True]
        with stage.changed(stage.SETTINGS[stage.ELEMENTWISE]):
            assert are_by_tiles() == [True, False, True]

    @pytest.mark.slow
    def test_steps_are_captured_anew_by_them(
        self, stage: ModuleType, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("triton", reason="triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("the stage itself runs there")
        from tests.test_cuda_graphs import all_kernels, call_again, open_captured

        monkeypatch.setattr(stage, "CudaCapture", lambda: call_again)
        with all_kernels(monkeypatch), open_captured(tiny_checkpoint, max_num_seqs=1, max_model_len=80) as llm:
            before = llm.engine.runner.graphs
            _, expected = stage.time_steps(llm, rows=1, steps=2, repeats=1)
            sizes = {"kernels.decode_few_rows": {"TILE": 32}, "kernels.fused_linear": {"MOST_TILE_BYTES": 2048}}
            with stage.changed(sizes):
                stage.recapture(llm)
                assert llm.engine.runner.graphs not in (None, before)
                assert stage.time_steps(llm, rows=1, steps=2, repeats=1)[1] == expected
