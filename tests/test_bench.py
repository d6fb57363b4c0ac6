"""bench.py draws fixed workloads, measures honestly and says in one line what it cannot do."""

import io
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import nanovllm.benchmarks.bench
from nanovllm.cli import main as command
from nanovllm.utils import environment
from nanovllm.utils.random_checkpoint import (
    SHAPES,
    cached_random_checkpoint,
    parameter_shapes,
    random_config,
    write_random_checkpoint,
)

PUBLISHED_KEYS = [
    "architectures",
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
]


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return nanovllm.benchmarks.bench


@pytest.fixture(scope="module")
def weights_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def tiny(weights_cache: Path) -> list[str]:
    """Arguments that run the tiny shape on the CPU."""
    return ["--random-weights", "tiny", "--weights-cache", str(weights_cache), "--device", "cpu"]


def error_line(bench: ModuleType, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a refused command line prints, after checking that it is one line and that the exit code is 2."""
    try:
        code = bench.main(list(argv))
    except SystemExit as error:  # argparse's own way out
        code = error.code
    assert code == 2
    line = capsys.readouterr().err
    assert ": error: " in line
    assert line.count("\n") == 1
    return line


# --------------------------------------------------------------------------------------------------- workload


@pytest.mark.parametrize(
    ("spec", "prompt_tokens", "output_tokens"),
    [
        ("16:64-256:64-128", 2528, 1411),
        ("64:16-64:16-64", 2609, 2728),
        ("4:1024-2048:64-128", 6644, 317),
        ("32:1-16:32-32:1024", 33029, 1024),
    ],
)
def test_seed_0_draws_the_workloads_that_published_figures_were_measured_on(
    bench: ModuleType, spec: str, prompt_tokens: int, output_tokens: int
) -> None:
    requests = bench.Workload.parse(spec).draw(0, vocab_size=151936)
    assert (requests.prompt_tokens, requests.output_tokens) == (prompt_tokens, output_tokens)


def test_a_workload_is_the_same_for_the_same_seed_only(bench: ModuleType) -> None:
    workload = bench.Workload.parse("8:10-20:5-9")
    assert workload.draw(7, 1000) == workload.draw(7, 1000)
    assert workload.draw(7, 1000) != workload.draw(8, 1000)


def test_lengths_stay_in_their_ranges(bench: ModuleType) -> None:
    requests = bench.Workload.parse("200:3-6:2-4").draw(0, 1000)
    assert {len(prompt) for prompt in requests.prompts} == {3, 4, 5, 6}
    assert set(requests.output_lens) == {2, 3, 4}
    assert requests.longest == max(len(p) + n for p, n in zip(requests.prompts, requests.output_lens, strict=True))


def test_a_small_vocabulary_changes_the_ids_and_not_the_lengths(bench: ModuleType) -> None:
    workload = bench.Workload.parse("8:10-20:5-9:4")
    small, large = workload.draw(0, 50), workload.draw(0, 151936)
    assert [len(p) for p in small.prompts] == [len(p) for p in large.prompts]
    assert small.output_lens == large.output_lens
    assert all(0 <= token < 50 for prompt in small.prompts for token in prompt)


def test_a_shared_prefix_begins_every_prompt_on_top_of_its_own_length(bench: ModuleType) -> None:
    prompts = bench.Workload.parse("5:2-4:1-1:8").draw(0, 1000).prompts
    assert all(prompt[:8] == prompts[0][:8] for prompt in prompts)
    assert all(10 <= len(prompt) <= 12 for prompt in prompts)


@pytest.mark.parametrize("spec", ["16:64-256:64-128", "1:5-5:7-7:32"])
def test_a_workload_prints_as_it_is_written(bench: ModuleType, spec: str) -> None:
    assert str(bench.Workload.parse(spec)) == spec


def test_one_length_stands_for_a_range_of_one(bench: ModuleType) -> None:
    assert str(bench.Workload.parse("3:5:7")) == "3:5-5:7-7"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ["256:100-1024:100-1024"]),
        (["--preset", "mini"], ["16:64-256:64-128"]),
        (["--preset", "mini", "--num-requests", "4", "--shared-prefix", "9"], ["4:64-256:64-128:9"]),
        (["--prompt-len", "5-6", "--output-len", "7"], ["256:5-6:7-7"]),
        (["--num-prompts", "8", "--input-len", "5", "--output-len", "7"], ["8:5-5:7-7"]),
        (["--workload", "1:2-3:4-5", "--workload", "6:7-8:9-10:11"], ["1:2-3:4-5", "6:7-8:9-10:11"]),
    ],
)
def test_options_choose_the_workloads(bench: ModuleType, argv: list[str], expected: list[str]) -> None:
    args = bench.build_parser().parse_args(argv)
    assert [str(workload) for workload in bench.chosen_workloads(args)] == expected


def test_without_a_model_the_demo_checkpoint_runs(bench: ModuleType) -> None:
    name, path = bench.chosen_model(bench.build_parser().parse_args([]))
    assert (name, path.name) == ("demo", "demo")


# ------------------------------------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def report(bench: ModuleType, tiny: list[str]) -> dict[str, Any]:
    """Both engines, twice, on two small workloads."""
    workloads = ["--workload", "3:20-40:4-8", "--workload", "2:5-5:3-3:32"]
    with redirect_stdout(io.StringIO()) as printed:
        assert bench.main([*tiny, *workloads, "--engine", "nanovllm,hf", "--repeats", "2", "--json"]) == 0
    return json.loads(printed.getvalue())


def test_json_says_what_ran_where(report: dict[str, Any]) -> None:
    assert report["model"] == "tiny, random weights"
    assert report["options"]["repeats"] == 2
    assert set(report["versions"]) == {"nanovllm", "commit", "python", "torch", "transformers"}
    assert report["versions"]["torch"] == torch.__version__
    hardware = report["hardware"]
    assert hardware["cpu"]
    assert hardware["threads"] >= 1
    assert hardware["ram_bytes"] > 2**28
    assert isinstance(hardware["gpus"], list)
    assert report["peak_process_memory_bytes"] > 2**26
    assert report["engines"]["nanovllm"]["startup_seconds"] > 0
    assert report["engines"]["hf"]["startup_seconds"] > 0


def test_json_holds_every_timing_and_its_median(report: dict[str, Any]) -> None:
    assert [w["workload"] for w in report["workloads"]] == ["3:20-40:4-8", "2:5-5:3-3:32"]
    for workload in report["workloads"]:
        for result in workload["results"].values():
            assert len(result["seconds"]) == 2
            assert min(result["seconds"]) <= result["median_seconds"] <= max(result["seconds"])


def test_only_requested_output_tokens_count(bench: ModuleType, report: dict[str, Any]) -> None:
    measured = report["workloads"][0]
    requests = bench.Workload.parse(measured["workload"]).draw(0, SHAPES["tiny"]["vocab_size"])
    assert len(set(requests.output_lens)) > 1  # or padding to the longest would add nothing
    assert measured["output_tokens"] == requests.output_tokens
    for result in measured["results"].values():
        expected = requests.output_tokens / result["median_seconds"]
        assert result["output_tokens_per_second"] == pytest.approx(expected)


def test_the_ratio_is_the_first_engine_to_the_second(report: dict[str, Any]) -> None:
    for workload in report["workloads"]:
        nanovllm, hf = (workload["results"][name]["output_tokens_per_second"] for name in ("nanovllm", "hf"))
        assert workload["ratios"] == {"nanovllm/hf": pytest.approx(nanovllm / hf)}


def test_a_repeat_finds_none_of_its_prompts_in_the_prefix_cache(report: dict[str, Any]) -> None:
    measured = report["workloads"][0]  # its prompts share nothing, so all must be computed in the repeat too
    assert measured["results"]["nanovllm"]["prefill_tokens"] == measured["prompt_tokens"]


def test_kv_blocks_and_their_peak_are_reported(report: dict[str, Any]) -> None:
    result = report["engines"]["nanovllm"]
    assert 0 < result["peak_kvcache_blocks_used"] <= result["num_kvcache_blocks"]


def test_a_run_prints_what_a_reader_wants_to_know(
    bench: ModuleType, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num-kvcache-blocks", "16", "--kvcache-block-size", "16", "--temperature", "0"]
    assert bench.main([*tiny, "--workload", "2:5-5:4-4", "--engine", "hf,nanovllm", *options]) == 0
    out = capsys.readouterr().out
    for part in (
        "10 prompt + 8 output tokens",
        "output tok/s",
        "KV blocks in use at the peak: 2 of 16",
        "nanovllm ready in",
        "peak memory",
    ):
        assert part in out
    assert "ratio hf / nanovllm: " in out


def test_transformers_runs_alone_and_in_smaller_batches(
    bench: ModuleType, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*tiny, "--workload", "3:5-6:2-3", "--engine", "hf", "--hf-batch-size", "2", "--dtype", "float32"]
    assert bench.main(argv) == 0
    assert "cpu, float32, batches of 2" in capsys.readouterr().out


needs_continuous_batching = pytest.mark.skipif(
    not hasattr(transformers.generation, "ContinuousBatchingConfig"), reason="needs a newer transformers"
)


@needs_continuous_batching
def test_continuous_batching_of_transformers_gives_every_request_its_length(
    bench: ModuleType, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*tiny, "--workload", "4:5-9:2-6", "--engine", "nanovllm,hf-cb", "--separately", "--repeats", "2"]
    assert bench.main([*argv, "--dtype", "float32", "--json"]) == 0
    printed = capsys.readouterr()
    assert "hf-cb ready in" in printed.err
    assert "ratio nanovllm / hf-cb: " in printed.err
    report = json.loads(printed.out)
    [workload] = report["workloads"]
    assert list(workload["results"]) == list(report["engines"]) == ["nanovllm", "hf-cb"]
    assert all(len(result["seconds"]) == 2 for result in workload["results"].values())


@needs_continuous_batching
def test_continuous_batching_says_which_request_failed(bench: ModuleType, tiny: list[str]) -> None:
    class Result:
        request_id, error, generated_tokens = "req_0", "out of blocks", ()

        def is_finished(self) -> bool:
            return True

    args = bench.build_parser().parse_args([*tiny, "--dtype", "float32"])
    engine = bench.HFContinuousEngine(bench.chosen_model(args)[1], 16, args)
    try:
        manager, engine.manager = (
            engine.manager,
            SimpleNamespace(add_request=lambda prompt, max_new_tokens: "req_0", get_result=lambda timeout: Result()),
        )
        with pytest.raises(RuntimeError, match="a request failed: out of blocks"):
            engine.run(bench.Requests([[7]], [2]))
        engine.manager.get_result, engine.manager.is_running = lambda timeout: None, lambda: False
        with pytest.raises(RuntimeError, match="the thread that generates has ended"):
            engine.run(bench.Requests([[7]], [2]))
    finally:
        engine.manager = manager
        engine.close()


def test_a_transformers_without_continuous_batching_gets_one_line(
    bench: ModuleType, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "generation", SimpleNamespace())
    line = error_line(bench, capsys, *tiny, "--workload", "1:4-4:4-4", "--engine", "hf-cb")
    assert f"transformers {transformers.__version__} has no continuous batching" in line


def test_engines_are_opened_one_after_the_other_if_asked(
    bench: ModuleType, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Watched(bench.NanovllmEngine):
        def __init__(self, *arguments: Any) -> None:
            events.append(f"open {self.name}")
            super().__init__(*arguments)

        def close(self) -> None:
            events.append(f"close {self.name}")
            super().close()

    engines = {name: type("Engine", (Watched,), {"name": name}) for name in ("nanovllm", "hf")}
    monkeypatch.setattr(bench, "ENGINES", engines)
    argv = [*tiny, "--workload", "2:5-5:2-2", "--engine", "nanovllm,hf"]
    assert bench.main([*argv, "--separately"]) == 0
    assert events == ["open nanovllm", "close nanovllm", "open hf", "close hf"]
    events.clear()
    assert bench.main(argv) == 0
    assert events == ["open nanovllm", "open hf", "close hf", "close nanovllm"]


def test_gpu_memory_of_an_engine_does_not_count_what_others_hold(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([1000, 700])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 600)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    engine = SimpleNamespace(run=lambda requests: (1.0, {}))
    requests = bench.Requests([[7]], [2])
    results = bench.measure({"first": engine, "second": engine}, {"first": 400, "second": 200}, requests, 1)
    assert results["first"]["peak_gpu_memory_bytes"] == 400 + 400
    assert results["second"]["peak_gpu_memory_bytes"] == 200 + 100


def test_what_was_switched_off_is_reported(
    bench: ModuleType, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOVLLM_DISABLE", "graphs,sample")
    assert bench.main([*tiny, "--workload", "1:5-5:2-2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["disabled"] == "graphs,sample"


def test_transformers_sees_left_padded_prompts(bench: ModuleType, tiny: list[str]) -> None:
    args = bench.build_parser().parse_args([*tiny, "--temperature", "0", "--dtype", "float32"])
    engine = bench.HFEngine(bench.chosen_model(args)[1], 16, args)
    seen: dict[str, Any] = {}

    def generate(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.update(options, ids=ids)
        return torch.zeros(len(ids), ids.shape[1] + options["max_new_tokens"], dtype=torch.long)

    engine.model.generate = generate
    engine.run(bench.Requests([[7], [8, 9]], [2, 3]))
    assert seen["ids"].tolist() == [[0, 7], [8, 9]]
    assert seen["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert seen["min_new_tokens"] == seen["max_new_tokens"] == 3
    assert seen["do_sample"] is False


def test_random_weights_are_written_once(tmp_path: Path) -> None:
    folder = cached_random_checkpoint("tiny", tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert cached_random_checkpoint("tiny", tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert list(tmp_path.iterdir()) == [folder]  # nothing unfinished is left behind


def test_a_cache_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json; delete it"):
        cached_random_checkpoint("tiny", tmp_path)


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--workload", "4:3"], "e.g. 16:64-256:64-128"),
        (["--workload", "0:3-4:5-6"], "'0' is not a whole number of at least 1"),
        (["--workload", "4:9-3:5-6"], "'9-3' runs backwards"),
        (["--workload", "4:3-9:5-6:x"], "'x' is not a whole number of at least 0"),
        (["--prompt-len", "0-4"], "'0' is not a whole number of at least 1"),
        (["--num-requests", "1.5"], "'1.5' is not a whole number"),
        (["--workload", "1:2-3:4-5", "--preset", "mini"], "--workload and --preset exclude each other"),
        (
            ["--workload", "1:2-3:4-5", "--prompt-len", "3-4"],
            "--workload and --prompt-len exclude each other",
        ),
        (["--engine", "vllm"], "invalid choice: 'vllm'"),
        (["--engine", "hf,hf"], "'hf,hf' names an engine twice"),
        (["--random-weights", "qwen3-7b"], "qwen3-0.6b"),
        (["--random-weights", "tiny", "--model", "x"], "not allowed with"),
        (["--model", "no/such/folder"], "is not a directory; give the path of a downloaded"),
        (["--temperature", "-1"], "--temperature is -1.0; it must be at least 0"),
        (["--json", "x.json"], "unrecognized arguments: x.json"),
        (["--compare", "hf", "--peers", "x", "--quantization", "int8"], "(use nanovllm-int8) exclude each other"),
        (["--shuffle"], "unrecognized arguments: --shuffle (see"),
    ],
)
def test_bad_input_gets_one_line(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], argv: list[str], part: str
) -> None:
    assert part in error_line(bench, capsys, *argv)


def test_a_workload_that_the_model_cannot_hold_is_refused_with_the_numbers(
    bench: ModuleType, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(bench, capsys, *tiny, "--workload", "1:4000-4000:97-97")
    assert "4097 prompt and output tokens" in line
    assert "4096" in line
    line = error_line(bench, capsys, *tiny, "--workload", "1:60-60:5-5", "--max-model-len", "64")
    assert "65 prompt and output tokens" in line
    assert "--max-model-len" in line


def test_what_the_engine_refuses_gets_one_line(
    bench: ModuleType, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(bench, capsys, *tiny, "--workload", "1:4-4:4-4", "--attention-backend", "abacus")
    assert "abacus" in line


def test_a_device_with_a_number_becomes_the_one_whose_memory_is_told(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    for name in ("cpu", "cuda", "cuda:1", "cuda:2"):  # of which the last is not there
        bench.use_device(name)
    assert made == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("engine", ["nanovllm", "hf"])
def test_a_missing_device_gets_one_line(
    bench: ModuleType, tiny: list[str], capsys: pytest.CaptureFixture[str], engine: str, device: str
) -> None:
    argv = [*tiny, "--workload", "1:4-4:4-4", "--device", device, "--engine", engine]
    assert "cuda" in error_line(bench, capsys, *argv).lower()


# ----------------------------------------------------------------------------------------- random checkpoints


@pytest.mark.parametrize("shape", list(SHAPES))
def test_config_has_exactly_the_published_entries(shape: str) -> None:
    assert list(random_config(shape)) == PUBLISHED_KEYS


@pytest.mark.parametrize(
    ("shape", "parameters", "kv_bytes_per_token"),
    [
        ("qwen3-0.6b", 596_049_920, 112 * 1024),
        ("qwen3-1.7b", 1_720_574_976, 112 * 1024),
        ("qwen3-4b", 4_022_468_096, 144 * 1024),
        ("qwen3-8b", 8_190_735_360, 144 * 1024),
        ("qwen3-14b", 14_768_307_200, 160 * 1024),
        ("qwen3-32b", 32_762_123_264, 256 * 1024),
    ],
)
def test_shapes_have_the_published_size(shape: str, parameters: int, kv_bytes_per_token: int) -> None:
    config = random_config(shape)
    assert sum(math.prod(size) for _, size in parameter_shapes(config)) == parameters
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    assert 2 * heads * config["head_dim"] * 2 == kv_bytes_per_token


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention_bias", [True, False])
def test_transformers_loads_a_random_checkpoint_completely(tmp_path: Path, tied: bool, attention_bias: bool) -> None:
    shape = {"tie_word_embeddings": tied, "attention_bias": attention_bias, "vocab_size": 333}
    path = write_random_checkpoint(tmp_path / "new" / "folder", shape, dtype=torch.float32)
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert ("lm_head.weight" in load_file(path / "model.safetensors")) is not tied
    assert model.generation_config.eos_token_id == [1023, 1022]


def test_weights_are_normal_and_norms_are_ones(tmp_path: Path) -> None:
    weights = load_file(write_random_checkpoint(tmp_path, "tiny") / "model.safetensors")
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    for name, weight in weights.items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert weight.float().std() == pytest.approx(0.02, rel=0.1)
            assert weight.float().mean() == pytest.approx(0.0, abs=0.002)
    embeddings = weights["model.embed_tokens.weight"]
    assert len(embeddings.unique(dim=0)) == len(embeddings)


def test_a_seed_always_writes_the_same_bytes(tmp_path: Path) -> None:
    files = {
        name: write_random_checkpoint(tmp_path / name, "tiny", seed=seed) / "model.safetensors"
        for name, seed in {"first": 1, "again": 1, "other": 2}.items()
    }
    assert files["first"].read_bytes() == files["again"].read_bytes()
    assert files["first"].read_bytes() != files["other"].read_bytes()


def test_large_checkpoints_are_sharded_with_an_index(tmp_path: Path) -> None:
    whole = load_file(write_random_checkpoint(tmp_path / "whole", "tiny") / "model.safetensors")
    path = write_random_checkpoint(tmp_path / "shards", "tiny", max_shard_bytes=150_000)
    shards = sorted(path.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 150_000  # noqa: SIM118
            for name in file.keys():  # noqa: SIM118
                assert index["weight_map"][name] == shard.name
                assert torch.equal(file.get_tensor(name), whole[name])
    _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]


def test_writing_again_replaces_the_weights_of_before(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, "tiny", max_shard_bytes=150_000)
    write_random_checkpoint(tmp_path, "tiny")
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_tied_head_can_be_stored_as_the_published_small_checkpoints_do(tmp_path: Path) -> None:
    weights = load_file(write_random_checkpoint(tmp_path, "tiny", store_tied_head=True) / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_unknown_shapes_entries_and_dtypes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown shape 'qwen3-7b'; choose from tiny, qwen3-0\.6b"):
        write_random_checkpoint(tmp_path, "qwen3-7b")
    with pytest.raises(ValueError, match=r"unknown config\.json entries num_layers"):
        write_random_checkpoint(tmp_path, {"num_layers": 3})
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; choose from torch\.bfloat16"):
        write_random_checkpoint(tmp_path, "tiny", dtype=torch.int8)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- the script, the command


def options_of(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]+", text.partition("Throughput")[0].partition("Measure")[0]))


def test_the_script_and_the_command_take_the_same_options(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "bench.py"), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "bench.py"), run_name="__main__")
    script = capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        command(["bench", "--help"])
    own = capsys.readouterr().out
    assert options_of(script) == options_of(own)
    assert len(options_of(own)) > 25
    assert "python bench.py --preset mini" in script
    assert "nanovllm bench --preset mini" in own
    assert "python bench.py" not in own


def test_the_command_measures_what_the_script_measures(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", *tiny, "--workload", "2:5-5:4-4"]) == 0
    assert "8 output tokens" in capsys.readouterr().out


def test_eight_bit_weights_are_measured_and_named(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", *tiny, "--workload", "1:5-5:2-2", "--quantization", "int8"]) == 0
    assert re.search(r"ready in .*, attention \w+, int8$", capsys.readouterr().out, re.MULTILINE)


def test_json_is_printed_alone(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["bench", *tiny, "--workload", "1:5-5:2-2", "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["workloads"][0]["output_tokens"] == 2
    assert report["options"]["engine"] == ["nanovllm"]
    assert "run" not in report["options"]
    assert "2 output tokens" in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("message", ["a step does not fit", ""])
def test_too_little_memory_is_one_line(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    def fail(args: object) -> None:
        raise MemoryError(message)

    monkeypatch.setattr(bench, "benchmark", fail)
    assert f": error: {message or 'there is not enough memory'}\n" in error_line(bench, capsys)


def test_what_the_system_refuses_has_the_commands_words(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> None:
        raise PermissionError(13, "Permission denied", "weights")

    monkeypatch.setattr(bench, "benchmark", fail)
    assert ": error: weights: Permission denied\n" in error_line(bench, capsys)


def test_the_command_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", "--preset", "mini", "--workload", "2:5-5:4-4"]) == 2
    assert capsys.readouterr().err == "nanovllm: error: --workload and --preset exclude each other\n"
    with pytest.raises(SystemExit, match="2"):
        command(["bench", "--engine", "hg"])
    line = capsys.readouterr().err
    assert "invalid choice: 'hg' (choose from nanovllm, one-rank, hf, hf-cb)" in line
    assert line.count("\n") == 1


def test_the_engines_that_can_be_named_are_those_there_are(bench: ModuleType) -> None:
    assert list(bench.ENGINES) == list(nanovllm.benchmarks.options.ENGINE_NAMES)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_checkout_the_package_is_in_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "nanovllm/utils/environment.py"))
    assert re.fullmatch("[0-9a-f]{10}", environment.versions()["commit"] or "")
    installed = tmp_path / ".venv/lib/site-packages/nanovllm/utils/environment.py"  # within somebody's checkout
    monkeypatch.setattr(environment, "__file__", str(installed))
    assert environment.versions()["commit"] is None
