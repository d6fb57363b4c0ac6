"""``nanovllm compare`` names the layer and operation that is wrong, and finds nothing where nothing is.

Each mutation breaks one thing in our model, in memory; the verdict must name it, not what follows from it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.attention.matmul import MatmulStep
from nanovllm.cli import main
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.diagnostics.compare import Comparison, compare
from nanovllm.diagnostics.compare_layers import compare_layers
from nanovllm.diagnostics.compare_reference import Redone, Reference, trace_reference
from nanovllm.diagnostics.compare_report import comparison_json, comparison_text
from nanovllm.diagnostics.compare_settings import compare_settings, parse_settings
from nanovllm.diagnostics.compare_trace import record
from nanovllm.engine.recorded_steps import RecordedSteps
from nanovllm.layers.rotary_embedding import Rotation
from nanovllm.models import qwen3
from tests.checkpoints import write_checkpoint
from tests.mps_device import fake_mps
from tests.threads import one_thread  # noqa: F401

# Biases, grouped heads whose sizes do not add up to hidden_size, and a head of its own.
ODD = {"attention_bias": True, "tie_word_embeddings": False, "head_dim": 48, "vocab_size": 257}
PROMPT = [int(token) for token in torch.randperm(257, generator=torch.Generator().manual_seed(1))[:21]]
SMALL = {"skip_tokenizer_init": True, "device": "cpu", "max_model_len": 96, "num_kvcache_blocks": 32, "max_num_seqs": 4}

Patch = pytest.MonkeyPatch
Mutation = Callable[[LLM, Patch], None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("odd"), **ODD)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(str(checkpoint), torch.float32)


def compared(checkpoint: Path, reference: Reference | None = None, mutate: Mutation | None = None, **arguments: Any):
    """A comparison of an engine that ``mutate`` has had its hands on."""
    with pytest.MonkeyPatch.context() as patch, LLM(checkpoint, **{**SMALL, **arguments}) as llm:
        if mutate is not None:
            mutate(llm, patch)
        return compare(llm, PROMPT, max_tokens=6, reference=reference)


def layer_of(llm: LLM, number: int) -> Any:
    return llm.engine.runner.model.model.layers[number]


# --- what is broken ---


def rope_is_a_position_ahead(llm: LLM, patch: Patch) -> None:
    rotary = llm.engine.runner.model.model.rotary
    patch.setattr(rotary, "forward", lambda positions: Rotation(rotary.cos, rotary.sin, positions + 1))


def rope_turns_the_wrong_way(llm: LLM, patch: Patch) -> None:
    rotary = llm.engine.runner.model.model.rotary
    patch.setattr(rotary, "sin", -rotary.sin)


def rope_turns_neighbours(llm: LLM, patch: Patch) -> None:
    def interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    patch.setattr(qwen3, "apply_rotary", interleaved)


def heads_are_swapped(llm: LLM, patch: Patch) -> None:
    weight = layer_of(llm, 1).self_attn.qkv_proj.weight.data
    bias = layer_of(llm, 1).self_attn.qkv_proj.bias.data
    for rows in (weight, bias):
        rows[48:144] = rows[48:144].clone().roll(48, 0)  # heads 1 and 2 of the queries


def queries_are_not_normalised(llm: LLM, patch: Patch) -> None:
    patch.setattr(layer_of(llm, 1).self_attn.q_norm, "forward", lambda x: x)


def keys_forget_their_norm(llm: LLM, patch: Patch) -> None:
    def attend(self: Any, qkv: torch.Tensor, rotation: Any, attention: Any) -> torch.Tensor:
        heads, kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        q, k, v = qkv.view(-1, heads + 2 * kv_heads, self.head_dim).split((heads, kv_heads, kv_heads), dim=1)
        q = qwen3.apply_rotary(self.q_norm(q), *rotation.rows())
        k = qwen3.apply_rotary(k, *rotation.rows())
        return attention.attend(self.layer, q, k, v).flatten(1)

    patch.setattr(qwen3.Qwen3Attention, "attend", attend)


def gate_and_up_are_swapped(llm: LLM, patch: Patch) -> None:
    def swapped(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(up) * gate

    patch.setattr(layer_of(llm, 2).mlp.activation, "forward", swapped)


def masked_attention(diagonal: int) -> Mutation:
    def mutate(llm: LLM, patch: Patch) -> None:
        attend = MatmulStep.attend

        def shifted(self: Any, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = attend(self, layer, q, k, v)
            if layer == 1 and len(q) > 1:
                keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(0, 1) for x in (k, v))
                scores = q.transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
                hidden = ~torch.ones(len(q), len(q), dtype=torch.bool).tril(diagonal)
                hidden[0, 0] = False
                out = (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1).contiguous()
            return out

        patch.setattr(MatmulStep, "attend", shifted)

    return mutate


def heads_ask_the_wrong_keys(llm: LLM, patch: Patch) -> None:
    attend = MatmulStep.attend

    def mixed(self: Any, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(self, layer, q, k.flip(1) if layer == 1 else k, v)

    patch.setattr(MatmulStep, "attend", mixed)


def epsilon_is_large(llm: LLM, patch: Patch) -> None:
    patch.setattr(layer_of(llm, 1).post_attention_layernorm, "eps", 0.1)


def stream_is_lost_after_attention(llm: LLM, patch: Patch) -> None:
    norm = layer_of(llm, 1).post_attention_layernorm
    add = norm.add
    patch.setattr(norm, "add", lambda x, residual: add(x, None))


def stream_is_lost_after_the_mlp(llm: LLM, patch: Patch) -> None:
    layer = layer_of(llm, 0)
    forward = layer.forward

    def forgetful(*arguments: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = forward(*arguments, **more)
        return hidden, torch.zeros_like(residual)

    patch.setattr(layer, "forward", forgetful)


def scores_are_scaled_wrong(llm: LLM, patch: Patch) -> None:
    patch.setattr(llm.engine.runner.attention, "scale", 1 / 48)


def keys_of_a_layer_are_zero(llm: LLM, patch: Patch) -> None:
    layer_of(llm, 1).self_attn.qkv_proj.weight.data[8 * 48 : 10 * 48] = 0


def layers_have_each_others_weights(llm: LLM, patch: Patch) -> None:
    first, second = (layer_of(llm, number).self_attn.o_proj for number in (1, 2))
    first.weight.data, second.weight.data = second.weight.data, first.weight.data


def final_norm_is_skipped(llm: LLM, patch: Patch) -> None:
    norm = llm.engine.runner.model.model.norm
    patch.setattr(norm, "add", lambda x, residual: (x + residual, x + residual))


def embedding_is_a_row_off(llm: LLM, patch: Patch) -> None:
    embedding = llm.engine.runner.model.model.embed_tokens
    rows = embedding._rows
    patch.setattr(embedding, "_rows", lambda ids: rows((ids + 1) % 257))


def head_lacks_a_row(llm: LLM, patch: Patch) -> None:
    llm.engine.runner.model.lm_head.weight.data[30] = 0


def bias_is_forgotten(llm: LLM, patch: Patch) -> None:
    patch.setattr(layer_of(llm, 2).self_attn.o_proj, "bias", None)


def fused_kernel_is_wrong(llm: LLM, patch: Patch) -> None:
    attention = llm.engine.runner.attention
    kernel = attention.fused_store
    if kernel is None:
        pytest.skip("there are no kernels for this CPU")

    def wrong(qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        return kernel(qkv, q_weight, q_weight, *rest)  # keys by the queries' norm

    patch.setattr(attention, "fused_store", wrong)


@dataclass
class Case:
    mutate: Mutation
    layer: int | None
    operation: str
    hint: str = ""
    backends: tuple[str, ...] = ("cpu", "matmul")
    weight: str = ""  # that is named
    path: str = ""  # that alone departs there; any if empty


CASES = [
    Case(rope_is_a_position_ahead, 0, "q_rope", "is turned for positions +1"),
    Case(rope_turns_the_wrong_way, 0, "q_rope", "is turned the wrong way"),
    Case(rope_turns_neighbours, 0, "q_rope", "has neighbours turned, not halves"),
    Case(heads_are_swapped, 1, "q_proj", "head 1 is what head 2 should be", weight="layers.1.self_attn.q_proj.weight"),
    Case(queries_are_not_normalised, 1, "q_norm", "is its input: the norm was not applied"),
    Case(keys_forget_their_norm, 0, "k_norm", "was not run"),
    Case(gate_and_up_are_swapped, 2, "activation", "has gate and up swapped"),
    Case(masked_attention(1), 1, "attention", "which comes after it", ("matmul",)),
    Case(masked_attention(-1), 1, "attention", "does not attend to key", ("matmul",)),
    Case(heads_ask_the_wrong_keys, 1, "attention", "", ("matmul",)),
    Case(epsilon_is_large, 1, "post_attention_layernorm"),
    Case(stream_is_lost_after_attention, 1, "attention_residual", "the residual stream is missing"),
    Case(stream_is_lost_after_the_mlp, 0, "output", "the residual stream is missing"),
    Case(scores_are_scaled_wrong, 0, "attention", "the scale of the scores is 0.02083 instead of 0.1443"),
    Case(keys_of_a_layer_are_zero, 1, "k_proj", weight="layers.1.self_attn.k_proj.weight"),
    Case(layers_have_each_others_weights, 1, "o_proj", weight="layers.1.self_attn.o_proj.weight"),
    Case(final_norm_is_skipped, None, "norm", "is its input: the norm was not applied"),
    Case(embedding_is_a_row_off, None, "embed_tokens"),
    Case(head_lacks_a_row, None, "lm_head", weight="lm_head.weight"),
    Case(bias_is_forgotten, 2, "o_proj", weight="layers.2.self_attn.o_proj.bias"),
    Case(fused_kernel_is_wrong, 0, "k_rope", "", ("cpu",), path="engine"),
]


@pytest.mark.parametrize("backend", ["cpu", "matmul"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}-{case.mutate.__name__}")
def test_a_mutation_is_named(checkpoint: Path, reference: Reference, case: Case, backend: str) -> None:
    if backend not in case.backends:
        pytest.skip(f"it is a mutation of {' and '.join(case.backends)}")
    found = compared(checkpoint, reference, case.mutate, attention_backend=backend)
    first = found.departure()
    assert first is not None
    assert (first.layer, first.operation) == (case.layer, case.operation)
    assert case.hint in first.hint
    assert found.departs()
    where = case.operation if case.layer is None else f"layer {case.layer}, {case.operation}"
    assert found.summary().startswith(f"departs: {where} (")
    wrong = [weight.name.removeprefix("model.") for weight in found.wrong_weights()]
    assert (case.weight in wrong) if case.weight else not wrong
    if case.path:
        assert {result.path for result in found.layers.results if result.departs} <= {case.path, "decode"}
        assert first.path == case.path


def test_what_only_passes_an_error_on_is_not_blamed(checkpoint: Path, reference: Reference) -> None:
    found = compared(checkpoint, reference, epsilon_is_large)
    wrong = {result.name for result in found.layers.results if result.departs}
    assert wrong == {"layers.1.post_attention_layernorm"}
    passing = {result.name for result in found.layers.results if result.total and result.total.ratio > 1}
    assert {"layers.1.gate_proj", "layers.2.q_rope", "norm", "lm_head"} <= passing
    assert "passes on" in comparison_text(found)


def test_a_wrong_captured_step_is_found_though_the_operations_are_right(checkpoint: Path) -> None:
    replays = []

    def mutate(llm: LLM, patch: Patch) -> None:
        forward = RecordedSteps.forward

        def wrong(*arguments: Any) -> torch.Tensor | None:
            hidden = forward(*arguments)
            if hidden is not None:
                replays.append(hidden)
                return hidden.flip(-1)
            return None

        patch.setattr(RecordedSteps, "forward", wrong)

    for quantization in (None, "int8"):  # with int8 it is our own eager steps that it is judged by
        try:
            found = compared(checkpoint, None, mutate, dtype="bfloat16", quantization=quantization)
        except ValueError as error:
            pytest.skip(str(error))
        if not replays:
            pytest.skip("steps are not recorded on this CPU")
        assert found.departure() is None
        assert found.tokens.first_wrong_step() == 1  # the first that is not of the prompt
        assert found.summary().startswith("departs: output token 1: ")


def test_the_kernels_of_a_gpu_are_judged_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of few rows have kernels of their own there, in which most operations cannot be seen."""
    pytest.importorskip("triton")
    from tests.test_cuda_graphs import all_kernels

    if torch.cuda.is_available():
        pytest.skip("interprets the kernels, which are compiled here")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    path = write_checkpoint(tmp_path, **{**ODD, **sizes, "num_hidden_layers": 2, "head_dim": 16})
    reference = Reference(str(path), torch.float32)
    with all_kernels(monkeypatch), LLM(path, attention_backend="triton", **SMALL) as llm:
        found = compare(llm, PROMPT[:5], max_tokens=2, reference=reference)
        assert found.summary().startswith("equal"), comparison_text(found, verbose=True)
        seen = {result.operation for result in found.layers.results if result.path == "decode"}
        assert {"q_proj", "k_rope", "attention", "attention_residual", "activation", "output"} <= seen
        assert not {"input_layernorm", "o_proj", "gate_proj"} & seen

        layer = layer_of(llm, 1)
        fused, down = layer.fused_linear, layer.mlp.down_proj.weight

        def forgetful(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **keywords: Any) -> torch.Tensor:
            return fused(x, weight, *rest, **{**keywords, **({"residual": None} if weight is down else {})})

        monkeypatch.setattr(layer, "fused_linear", forgetful)
        first = compare(llm, PROMPT[:5], max_tokens=1, reference=reference).departure()
        assert first is not None
        assert (first.path, first.layer, first.operation) == ("decode", 1, "output")


def test_what_a_device_that_runs_behind_does_is_recorded(checkpoint: Path, reference: Reference) -> None:
    with fake_mps(), LLM(checkpoint, **{**SMALL, "device": "mps", "dtype": "float32"}) as llm:
        prompt, decode, _ = record(llm, PROMPT, num_decoded=2, plain=True, probe=True)
    found = compare_layers(reference, [prompt], decode)
    assert found.first_departure() is None
    assert found.first_sum() is None
    assert {result.path for result in found.results} == {"plain", "decode"}
    assert set(prompt.attention_weights) == {0, 1, 2}


def test_a_weight_says_whose_it_is(checkpoint: Path, reference: Reference) -> None:
    found = compared(checkpoint, reference, layers_have_each_others_weights)
    hints = {weight.name: weight.hint for weight in found.wrong_weights()}
    assert hints["model.layers.1.self_attn.o_proj.weight"] == "is model.layers.2.self_attn.o_proj.weight here"
    zero = compared(checkpoint, reference, keys_of_a_layer_are_zero).wrong_weights()
    assert [(weight.name, weight.hint) for weight in zero] == [
        ("model.layers.1.self_attn.k_proj.weight", "is all zeros here")
    ]


def test_packed_weights_are_compared_too(checkpoint: Path) -> None:
    def mutate(llm: LLM, patch: Patch) -> None:
        first, second = (layer_of(llm, number).mlp.gate_up_proj for number in (0, 2))
        first.packed, second.packed = second.packed, first.packed
        first.weight, second.weight = second.weight, first.weight

    found = compared(checkpoint, None, mutate, dtype="bfloat16")
    first = found.departure()
    assert first is not None
    assert (first.layer, first.operation) == (0, "gate_proj")
    assert len(found.wrong_weights()) == 4


# --- nothing is broken ---

ODD_SHAPES: dict[str, dict[str, Any]] = {
    "head-of-48-biases-untied": ODD,
    "gqa3-odd-sizes": {
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 52,
        "intermediate_size": 37,
        "vocab_size": 257,
    },
    "no-groups-long-rope": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 257,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    },
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_an_engine_that_is_right_is_found_right(shape: str, dtype: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, **ODD_SHAPES[shape])
    found = compared(path, dtype=dtype, max_num_batched_tokens=8)  # the prompt in three steps
    assert found.summary().startswith("equal"), comparison_text(found, verbose=True)
    assert not found.departs()
    assert all(weight.equal for weight in found.weights)
    assert {result.path for result in found.layers.results} == {"engine", "plain", "decode"} or not (
        found.has_fused_kernels
    )


@pytest.mark.parametrize("arguments", [{"attention_backend": "triton"}, {"dtype": "float16"}, {"quantization": "int8"}])
def test_every_way_to_run_is_found_right(checkpoint: Path, arguments: dict[str, Any]) -> None:
    try:
        found = compared(checkpoint, **arguments)
    except ValueError as error:
        if "attention_backend is" in str(error) or "quantization is" in str(error):
            pytest.skip(str(error))
        raise
    assert found.summary().startswith("equal"), comparison_text(found, verbose=True)


def test_the_mask_is_drawn_from_what_attention_does(checkpoint: Path, reference: Reference) -> None:
    found = compared(checkpoint, reference)
    for masks in (masks for path, masks in found.layers.masks.items() if path != "decode"):
        assert set(masks) == {0, 1, 2}
        for mask in masks.values():
            for query, line in enumerate(mask):
                assert set(line[: query + 1]) <= set("#+")
                assert line[query + 1 :] == "." * (len(PROMPT) - query - 1)
    broken = compared(checkpoint, reference, masked_attention(1), attention_backend="matmul")
    assert broken.layers.masks["plain"][1][3].startswith("####!.")
    assert broken.layers.masks["plain"][0][3].startswith("####..")


def test_the_reference_agrees_with_itself_done_again(reference: Reference) -> None:
    trace = trace_reference(reference.exact, PROMPT)
    redone = Redone(reference.exact, trace)
    for name, value in trace.values.items():
        torch.testing.assert_close(redone.expected(name), value, rtol=1e-5, atol=1e-5, msg=name)
    trace.path = "plain"
    assert compare_layers(reference, [trace]).first_departure() is None


# --- reports, settings, the command ---


def test_reports_are_complete(checkpoint: Path, reference: Reference) -> None:
    found: Comparison = compared(checkpoint, reference, head_lacks_a_row)
    told = json.loads(json.dumps(comparison_json(found), allow_nan=False))
    assert told["departs"] is True
    assert told["first"]["operation"] == "lm_head"
    [lm_head] = [row for row in told["layers"]["results"] if row["name"] == "lm_head" and row["path"] == "decode"]
    assert lm_head["own"]["index"] == 30
    assert len(told["weights"]) == len(found.weights)
    attention = next(row for row in told["layers"]["results"] if row["operation"] == "attention")
    assert len(attention["own"]["by_head"]) == 8
    page = comparison_text(found, verbose=True)
    for words in ("layer 2, down_proj", "by head:", "greedy tokens", "lm_head.weight", "# attends"):
        assert words in page


def test_settings_of_one_engine_against_another(checkpoint: Path) -> None:
    arguments = {"model": str(checkpoint), **SMALL}
    found = compare_settings(arguments, {"attention_backend": "matmul"}, {"enable_prefix_caching": False}, PROMPT, 6)
    assert not found.departs(), found.summary()
    assert [answers[1].num_cached_tokens for answers in found.answers] == [16, 0]
    assert set(found.differences[0].by_position) == set(range(1, len(PROMPT) + 6))
    coarse = compare_settings(arguments, {"dtype": "float32"}, {"dtype": "bfloat16"}, PROMPT, 6, tolerance=1e-6)
    assert coarse.departs()
    assert coarse.summary().startswith("departs: ")


def test_settings_that_differ_name_the_layer(checkpoint: Path) -> None:
    overrides = {"hf_overrides": {"rms_norm_eps": 0.1}}
    found = compare_settings({"model": str(checkpoint), **SMALL}, {}, overrides, PROMPT, 6)
    assert found.summary().startswith("departs: layer 0, input_layernorm: ")


def test_settings_are_read() -> None:
    found = parse_settings(["enforce_eager=true", "max_num_seqs=3", "dtype=float32", "quantization=none"])
    found |= parse_settings(["disable=sample,graphs"])
    assert found == {
        "enforce_eager": True,
        "max_num_seqs": 3,
        "dtype": "float32",
        "quantization": None,
        "disable": "sample,graphs",
    }


def test_the_command_finds_the_demo_model_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--max-tokens", "4", "--prompt", "add 12 and 30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["departs"] is False


def test_the_command_says_what_departs(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["compare", "--model", str(checkpoint), "--max-model-len", "96", "--max-tokens", "4"]
    assert main([*given, "--settings", "dtype=bfloat16", "--against", "--tolerance", "1e-7"]) == 1
    assert capsys.readouterr().out.startswith("departs: ")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--model", "/nowhere"], "not a directory"),
        (["--token-ids", "1,x"], "token ids are '1,x'"),
        (["--token-ids", "1,99999"], "token id 99999"),
        (["--token-ids", " "], "empty"),
        (["--prompt", "x", "--token-ids", "1"], "give one of"),
        (["--prompt-file", "/nowhere"], "/nowhere"),
        (["--settings", "atention_backend=cpu"], "attention_backend"),
        (["--settings", "dtype"], "not name=value"),
        (["--settings", "max_num_seqs=many"], "max_num_seqs is 'many'"),
        (["--settings", "enforce_eager=perhaps"], "use true or false"),
        (["--settings", "tensor_parallel_size=2"], "--against"),
        (["--settings", "disable=nothing"], "error: disable=nothing names 'nothing'; it may name rms_norm, "),
        (["--reference-device", "cuda:99"], "transformers cannot load"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--prompt", "\udcff"], "the prompt is not valid Unicode"),
        (["--tolerance", "nan"], "--tolerance is nan; it must be a finite number of at least 0"),
        (["--tolerance", "-1"], "--tolerance is -1.0; it must be"),
        (["--max-model-len", "8"], "max_model_len is 8"),
    ],
)
def test_bad_input_is_told_in_one_line(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--model", DEMO_MODEL_PATH, *given]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
