"""``nanovllm inspect`` shows what the engine makes of a checkpoint, and names every kind of damage."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM
from nanovllm.attention import AttentionSpec
from nanovllm.attention.triton import TritonAttention
from nanovllm.cli import main
from nanovllm.config import EngineConfig
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.diagnostics.inspect import SECTIONS, Inspection, inspect_checkpoint
from nanovllm.diagnostics.inspect.findings import by_layer
from nanovllm.diagnostics.inspect.memory import _capacity, int8_bytes
from nanovllm.diagnostics.inspect.statistics import Statistics, read_statistics
from nanovllm.diagnostics.inspect.support import Placement, model_without_memory
from nanovllm.diagnostics.inspect.text import WIDTH, render, table
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.kernels import why_no_cpu_kernels
from nanovllm.utils import memory
from nanovllm.utils.model_config import load_model_config
from nanovllm.utils.random_checkpoint import write_random_checkpoint
from tests.checkpoints import LLAMA3_ROPE, write_checkpoint

WEIGHTS = ("config", "support", "parameters", "memory")  # what a checkpoint without a tokenizer has


@pytest.fixture(scope="module")
def demo() -> Inspection:
    return inspect_checkpoint(DEMO_MODEL_PATH, device="cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of two layers to be damaged, in two files, without a tokenizer."""
    return write_random_checkpoint(
        tmp_path / "checkpoint", {"tie_word_embeddings": False, "attention_bias": True}, max_shard_bytes=250_000
    )


@pytest.fixture
def demo_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL_PATH, tmp_path / "demo"))


def edit_json(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None takes one away."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard_of(path: Path, name: str) -> Path:
    """The file that holds a tensor."""
    return path / json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][name]


def problems(path: Path, *sections: str, **arguments: Any) -> list[tuple[str, str]]:
    """(kind, message) of all that is wrong with a checkpoint."""
    found = inspect_checkpoint(path, sections or WEIGHTS, device="cpu", **arguments)
    assert all(len(line) <= WIDTH for line in render(found).splitlines())
    json.dumps(found.to_json(), allow_nan=False)
    return [(problem.kind, problem.message) for problem in found.problems]


def the_problem(path: Path, *sections: str, **arguments: Any) -> tuple[str, str]:
    [found] = problems(path, *sections, **arguments)
    return found


class TestDemoCheckpoint:
    def test_nothing_is_wrong_with_it(self, demo: Inspection) -> None:
        assert demo.problems == []
        assert tuple(demo.sections) == SECTIONS

    def test_the_configuration_says_where_each_value_comes_from(self, demo: Inspection) -> None:
        entries = {entry.name: entry for entry in demo.sections["config"].entries}
        assert entries["dtype"].value == "bfloat16"
        assert entries["dtype"].source == "config.json: torch_dtype"
        assert entries["dtype"].other_spellings == ("dtype",)
        assert entries["rope_theta"].source == "config.json: rope_theta"
        assert "rope_parameters.rope_theta" in entries["rope_theta"].other_spellings
        assert entries["rope_type"].source == "default"
        assert entries["eos_token_ids"].value == [1277, 1275]
        assert entries["eos_token_ids"].source == "generation_config.json: eos_token_id"
        sampling = {entry.name: (entry.value, entry.source) for entry in demo.sections["config"].sampling}
        assert sampling["top_k"] == (20, "generation_config.json: top_k")
        assert sampling["max_tokens"] == (64, "default")
        assert "transformers_version" in demo.sections["config"].unused

    def test_every_tensor_has_its_parameter(self, demo: Inspection) -> None:
        section = demo.sections["parameters"]
        query = section.find("model.layers.2.self_attn.q_proj.weight")
        assert (query.parameter, query.shard) == ("model.layers.2.self_attn.qkv_proj.weight", "q")
        assert (query.shape, query.dtype, query.use) == ([256, 192], "BF16", "fills")
        assert {tensor.use for tensor in section.tensors} == {"fills"}
        assert section.tied
        assert not section.head_stored
        assert section.num_parameters == sum(tensor.numel for tensor in section.tensors)

    def test_statistics_are_those_of_the_tensors(self, demo: Inspection) -> None:
        tensors = load_file(Path(DEMO_MODEL_PATH) / "model.safetensors")
        for tensor in demo.sections["parameters"].tensors:
            numbers = tensors[tensor.name].double()
            found = tensor.statistics
            assert found.count == numbers.numel()
            assert (found.min, found.max) == (numbers.min(), numbers.max())
            assert found.mean == pytest.approx(numbers.mean().item(), rel=1e-4, abs=1e-6)
            assert found.std == pytest.approx(numbers.std(correction=0).item(), rel=1e-5)
            assert found.zeros == (numbers == 0).sum()

    def test_texts_come_back(self, demo: Inspection) -> None:
        assert len(demo.sections["tokenizer"].round_trips) > 8
        assert {trip.outcome for trip in demo.sections["tokenizer"].round_trips} == {"same"}

    def test_tokens_and_the_ends_of_text(self, demo: Inspection) -> None:
        section = demo.sections["tokenizer"]
        assert (section.vocab_size, section.embedding_rows, section.head_rows) == (1280, 1280, None)
        assert (section.num_tokens, section.largest_id) == (1280, 1279)
        assert [(end.id, end.text) for end in section.end_tokens] == [(1277, "<|im_end|>"), (1275, "<|endoftext|>")]
        roles = {token.text: (token.roles, token.ends_text) for token in section.special_tokens}
        assert roles["<|im_end|>"] == (["eos_token"], True)
        assert roles["<think>"] == ([], False)

    def test_the_chat_template_with_and_without_thinking(self, demo: Inspection) -> None:
        on, off, bare = demo.sections["chat"].renderings
        assert on.text.endswith("add 12 and 30<|im_end|>\n<|im_start|>assistant\n")
        assert off.text == on.text + "<think>\n\n</think>\n\n"
        assert on.text == bare.text + "<|im_start|>assistant\n"
        assert demo.sections["chat"].answer_end == ("<|im_end|>", 1277)

    def test_ranks_are_those_that_the_layers_allow(self, demo: Inspection) -> None:
        section = demo.sections["support"]
        assert section.allowed_ranks == [1, 2, 4]
        assert "num_attention_heads is 4" in section.tensor_parallel[3]
        heads = demo.sections["config"].heads
        assert (heads.query, heads.key_value, heads.group, heads.head_dim, heads.query_size) == (4, 2, 2, 64, 256)

    def test_memory_by_dtype(self, demo: Inspection) -> None:
        rows = {row.dtype: row for row in demo.sections["memory"].dtypes}
        assert rows["bfloat16"].kv_bytes_per_token == 2 * 4 * 2 * 64 * 2
        assert rows["float32"].weight_bytes == 2 * rows["bfloat16"].weight_bytes == 4 * 2_164_928
        assert rows["int8"].weight_bytes < rows["bfloat16"].weight_bytes

    def test_the_report_has_all_of_it_in_120_columns(self, demo: Inspection) -> None:
        text = render(demo)
        assert max(map(len, text.splitlines())) <= WIDTH
        for part in (
            "gate_up_proj[gate]",
            "1280x192",
            "KV a token",
            "<|im_start|>assistant",
            "emoji",
            "may be 1, 2, 4",
        ):
            assert part in text
        assert text.endswith("Problems\n========\nnone")


class TestCommand:
    def test_a_sound_checkpoint_ends_with_0(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "--device", "cpu", "--no-statistics", "--section", "parameters", "memory"]) == 0
        out = capsys.readouterr().out
        assert "Parameters\n" in out
        assert "Memory\n" in out
        assert "Tokenizer\n" not in out
        assert "zeros" not in out  # no statistics were asked for

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "--device", "cpu", "--json", "--section", "config", "chat"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert list(found["sections"]) == ["config", "chat"]
        assert found["sections"]["config"]["heads"]["group"] == 2
        assert found["problems"] == []

    def test_a_damaged_checkpoint_ends_with_1(self, demo_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        edit_tensors(demo_copy / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
        told = []
        for model in (["--model", str(demo_copy)], [str(demo_copy)]):
            assert main(["inspect", *model, "--device", "cpu", "--section", "parameters"]) == 1
            told.append(capsys.readouterr().out)
        assert told[0].endswith("1. missing tensor: model.norm.weight: no file holds it\n")
        assert told[1] == told[0]

    @pytest.mark.parametrize(
        ("argv", "part"),
        [
            (["--model", "no/such/directory"], "not a directory"),
            (["one", "--model", "another"], "both one and --model another are given"),
            (
                ["--section", "config", DEMO_MODEL_PATH],
                "stands among the sections; name the checkpoint before --section",
            ),
            (["--section", "weights"], "section is 'weights'; choose from config"),
            (["--dtype", "int4"], "dtype is 'int4'"),
            (["--max-model-len", "1"], "max_model_len is 1"),
        ],
    )
    def test_bad_input_gets_one_line(self, argv: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", *argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert part in captured.err
        assert captured.err.count("\n") == 1

    def test_a_directory_that_is_no_checkpoint(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "--model", str(tmp_path)]) == 2
        line = capsys.readouterr().err
        assert "has no config.json" in line
        assert line.count("\n") == 1

    def test_help_names_the_sections(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as done:
            main(["inspect", "--help"])
        assert done.value.code == 0
        assert ", ".join(SECTIONS) in " ".join(capsys.readouterr().out.split())


class TestRandomCheckpoints:
    def test_tied_and_untied(self, tmp_path: Path) -> None:
        for tied in (True, False):
            path = write_checkpoint(tmp_path / str(tied), tie_word_embeddings=tied)
            found = inspect_checkpoint(path, WEIGHTS, device="cpu")
            assert found.problems == []
            section = found.sections["parameters"]
            assert section.tied is tied
            assert section.head_stored is not tied
            head = section.find("lm_head.weight")
            assert head is None if tied else head.parameter == "lm_head.weight"

    def test_a_tied_head_that_is_stored_too_is_a_copy(self, tmp_path: Path) -> None:
        path = write_random_checkpoint(tmp_path, "tiny", store_tied_head=True)
        found = inspect_checkpoint(path, WEIGHTS, device="cpu")
        assert found.problems == []
        head = found.sections["parameters"].find("lm_head.weight")
        assert (head.use, head.parameter) == ("copy", "model.embed_tokens.weight")

    def test_sharded_with_biases(self, checkpoint: Path) -> None:
        found = inspect_checkpoint(checkpoint, WEIGHTS, device="cpu")
        assert found.problems == []
        section = found.sections["parameters"]
        assert len(section.files) > 1
        assert sum(file.num_tensors for file in section.files) == len(section.tensors)
        bias = section.find("model.layers.1.self_attn.k_proj.bias")
        assert (bias.parameter, bias.shard) == ("model.layers.1.self_attn.qkv_proj.bias", "k")

    def test_either_spelling(self, tmp_path: Path) -> None:
        path = write_random_checkpoint(tmp_path, {"max_position_embeddings": 512})
        edit_json(
            path / "config.json",
            torch_dtype=None,
            dtype="bfloat16",
            rope_theta=None,
            head_dim=32,
            rms_norm_eps=None,
            rope_parameters={**LLAMA3_ROPE, "rope_theta": 5000.0},
        )
        section = inspect_checkpoint(path, ["config"], device="cpu").sections["config"]
        entries = {entry.name: entry for entry in section.entries}
        assert entries["dtype"].source == "config.json: dtype"
        assert entries["dtype"].other_spellings == ("torch_dtype",)
        assert (entries["rope_theta"].value, entries["rope_theta"].source) == (
            5000.0,
            "config.json: rope_parameters.rope_theta",
        )
        assert entries["rope_theta"].other_spellings == ("rope_theta", "rope_scaling.rope_theta")
        assert entries["rope_type"].value == "llama3"
        assert entries["low_freq_factor"].source == "config.json: rope_parameters.low_freq_factor"
        assert entries["rms_norm_eps"].source == "default"

    def test_overrides_are_told(self, checkpoint: Path) -> None:
        overrides = {"rope_theta": 777.0, "dtype": "float32"}
        found = inspect_checkpoint(checkpoint, ["config"], device="cpu", hf_overrides=overrides)
        entries = {entry.name: entry for entry in found.sections["config"].entries}
        assert (entries["rope_theta"].value, entries["rope_theta"].source) == (777.0, "hf_overrides: rope_theta")
        assert entries["dtype"].source == "hf_overrides: dtype"

    def test_spellings_that_contradict_each_other_are_noted(self, checkpoint: Path) -> None:
        edit_json(checkpoint / "config.json", dtype="float32")
        notes = inspect_checkpoint(checkpoint, ["config"], device="cpu").findings.notes_of("config")
        assert any("dtype and torch_dtype are both there and differ" in note for note in notes)


class TestDamage:
    def test_a_missing_tensor(self, checkpoint: Path) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        edit_tensors(shard_of(checkpoint, name), lambda tensors: tensors.pop(name))
        assert the_problem(checkpoint) == ("missing tensor", f"{name}: no file holds it")

    def test_missing_in_every_layer_is_one_line(self, tmp_path: Path) -> None:
        path = write_random_checkpoint(tmp_path, "tiny")
        names = [f"model.layers.{layer}.self_attn.q_norm.weight" for layer in range(2)]
        edit_tensors(path / "model.safetensors", lambda tensors: [tensors.pop(name) for name in names])
        _, message = the_problem(path)
        assert message.startswith("model.layers.{0-1}.self_attn.q_norm.weight")
        assert inspect_checkpoint(path, ["parameters"], device="cpu").sections["parameters"].missing == names

    def test_an_unexpected_tensor(self, checkpoint: Path) -> None:
        file = shard_of(checkpoint, "model.norm.weight")
        edit_tensors(file, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.ones(2)}))
        kind, message = the_problem(checkpoint)
        assert kind == "unexpected tensor"
        assert "model.layers.0.mlp.extra.weight" in message

    @pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 4)])
    def test_an_unexpected_tensor_of_an_odd_shape(self, checkpoint: Path, shape: tuple[int, ...]) -> None:
        file = shard_of(checkpoint, "model.norm.weight")
        edit_tensors(file, lambda tensors: tensors.update({"scale": torch.ones(shape)}))
        kind, _ = the_problem(checkpoint)
        assert kind == "unexpected tensor"
        found = inspect_checkpoint(checkpoint, ["parameters"], device="cpu").sections["parameters"].find("scale")
        assert found.statistics.count == torch.ones(shape).numel()

    def test_a_tensor_that_is_there_twice(self, checkpoint: Path) -> None:
        first, second = (shard_of(checkpoint, name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
        assert first != second
        norm = load_file(shard_of(checkpoint, "model.norm.weight"))["model.norm.weight"]
        edit_tensors(first, lambda tensors: tensors.update({"model.norm.weight": norm}))
        kind, message = the_problem(checkpoint)
        assert kind == "unexpected tensor"
        assert "model.norm.weight has filled its parameter" in message

    def test_a_wrong_shape(self, checkpoint: Path) -> None:
        name = "model.layers.0.self_attn.o_proj.weight"
        edit_tensors(shard_of(checkpoint, name), lambda tensors: tensors.update({name: tensors[name][:-1]}))
        kind, message = the_problem(checkpoint)
        assert kind == "wrong shape"
        assert message.startswith(f"{name} has shape [63, 128], expected [64, 128]")

    def test_nan_and_infinity(self, checkpoint: Path) -> None:
        name = "model.layers.1.mlp.down_proj.weight"

        def spoil(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name][3, :5] = float("nan")
            tensors[name][4, 0] = float("-inf")

        edit_tensors(shard_of(checkpoint, name), spoil)
        assert the_problem(checkpoint) == ("NaN", f"{name} has 5 NaN and 1 infinite of 8,192 elements")
        assert problems(checkpoint, statistics=False) == []  # nobody has looked

    def test_numbers_that_the_dtype_does_not_hold(self, checkpoint: Path) -> None:
        name = "model.norm.weight"
        edit_tensors(shard_of(checkpoint, name), lambda tensors: tensors[name].fill_(1e6))
        assert problems(checkpoint) == []
        kind, message = the_problem(checkpoint, "parameters", dtype="float16")
        assert kind == "overflow"
        assert "infinite in float16" in message

    def test_a_file_cut_short(self, checkpoint: Path) -> None:
        file = shard_of(checkpoint, "model.layers.1.mlp.up_proj.weight")
        file.write_bytes(file.read_bytes()[:-100])
        kind, message = the_problem(checkpoint)
        assert kind == "damaged file"
        assert message.startswith(f"{file.name} is damaged or cut short")
        assert "model.layers.1.mlp.up_proj.weight" in message

    def test_a_single_file_cut_short(self, demo_copy: Path) -> None:
        file = demo_copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        kind, message = the_problem(demo_copy, *SECTIONS)
        assert kind == "damaged file"
        assert message.startswith("model.safetensors is damaged or cut short")

    @pytest.mark.skipif(sys.platform == "win32", reason="links need a right of their own")
    def test_a_link_to_nothing(self, demo_copy: Path) -> None:
        file = demo_copy / "model.safetensors"
        file.unlink()
        file.symlink_to(demo_copy / "blob")
        kind, message = the_problem(demo_copy, *SECTIONS)
        assert kind == "missing file"
        assert message.startswith("model.safetensors is a link to ")

    def test_a_file_that_is_not_there(self, checkpoint: Path) -> None:
        file = shard_of(checkpoint, "lm_head.weight")
        file.unlink()
        kind, message = the_problem(checkpoint)
        assert kind == "missing file"
        assert message.startswith(f"{file.name}, which model.safetensors.index.json names, is not there")
        assert "lm_head.weight" in message

    def test_no_weights_at_all(self, checkpoint: Path) -> None:
        for file in checkpoint.glob("model*"):
            file.unlink()
        kind, message = the_problem(checkpoint)
        assert kind == "missing file"
        assert "has no *.safetensors file" in message

    def test_an_index_that_is_not_json(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors.index.json").write_text("{")
        kind, message = the_problem(checkpoint)
        assert kind == "damaged file"
        assert "is not a valid safetensors index" in message

    def test_a_copy_that_is_none(self, tmp_path: Path) -> None:
        path = write_random_checkpoint(tmp_path, "tiny", store_tied_head=True)
        edit_tensors(path / "model.safetensors", lambda tensors: tensors["lm_head.weight"][1000].zero_())
        kind, message = the_problem(path)
        assert kind == "different copy"
        assert message.startswith("lm_head.weight differs from model.embed_tokens.weight")

    def test_a_quantized_tensor(self, checkpoint: Path) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        edit_tensors(
            shard_of(checkpoint, name), lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)})
        )
        kind, message = the_problem(checkpoint)
        assert kind == "quantized tensor"
        assert message.startswith(f"{name} has dtype F8_E4M3, which is not supported")

    def test_a_config_that_is_not_json(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").write_text("{")
        kind, message = the_problem(checkpoint)
        assert kind == "configuration"
        assert "config.json is not valid JSON" in message
        tensors = inspect_checkpoint(checkpoint, ["parameters"], device="cpu").sections["parameters"].tensors
        assert tensors[0].statistics is not None  # the files can be looked at without it

    def test_a_config_that_lacks_an_entry(self, checkpoint: Path) -> None:
        edit_json(checkpoint / "config.json", hidden_size=None)
        _, message = the_problem(checkpoint)
        assert message.startswith("hidden_size is missing")

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"architectures": ["LlamaForCausalLM"]}, "architecture 'LlamaForCausalLM'"),
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
            ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type is 'spiral'"),
            ({"quantization_config": {"bits": 4}}, "is quantized (quantization_config)"),
            ({"use_sliding_window": True, "max_window_layers": 1}, "uses sliding-window attention"),
            ({"torch_dtype": "int8"}, "the checkpoint's dtype is 'int8'"),
        ],
    )
    def test_what_is_not_supported(self, checkpoint: Path, changes: dict[str, Any], part: str) -> None:
        edit_json(checkpoint / "config.json", **changes)
        assert any(part in message for _, message in problems(checkpoint))
        # The rest is looked at all the same.
        section = inspect_checkpoint(checkpoint, ["parameters"], device="cpu").sections["parameters"]
        assert section.tensors[0].statistics is not None

    def test_two_things_that_are_not_supported_are_both_named(self, checkpoint: Path) -> None:
        edit_json(checkpoint / "config.json", hidden_act="gelu", quantization_config={"bits": 4})
        messages = " ".join(message for _, message in problems(checkpoint))
        assert "hidden_act is 'gelu'" in messages
        assert "is quantized" in messages

    def test_ranks_that_do_not_divide(self, checkpoint: Path) -> None:
        messages = [message for _, message in problems(checkpoint, "support", tensor_parallel_size=3)]
        assert messages == [
            "tensor_parallel_size 3: num_attention_heads is 4, which 3 tensor-parallel ranks do not divide"
        ]

    def test_a_vocabulary_smaller_than_the_tokenizer(self, demo_copy: Path) -> None:
        edit_json(demo_copy / "config.json", vocab_size=1278)
        name = "model.embed_tokens.weight"
        edit_tensors(
            demo_copy / "model.safetensors", lambda tensors: tensors.update({name: tensors[name][:1278].clone()})
        )
        kind, message = the_problem(demo_copy, *SECTIONS)
        assert kind == "vocabulary"
        assert "ids up to 1279, beyond the model's vocab_size of 1278" in message

    def test_an_embedding_of_other_rows(self, demo_copy: Path) -> None:
        edit_json(demo_copy / "config.json", vocab_size=1300)
        found = problems(demo_copy, *SECTIONS)
        assert ("vocabulary", "the embedding has 1280 rows, vocab_size is 1300") in found
        assert any(kind == "wrong shape" for kind, _ in found)

    def test_an_end_beyond_the_vocabulary(self, demo_copy: Path) -> None:
        edit_json(demo_copy / "generation_config.json", eos_token_id=[1277, 5000])
        kind, message = the_problem(demo_copy, "tokenizer")
        assert (kind, message) == ("vocabulary", "eos_token_id 5000 is outside the vocabulary of 1280")

    def test_ends_that_the_template_does_not_know_are_noted(self, demo_copy: Path) -> None:
        edit_json(demo_copy / "generation_config.json", eos_token_id=1275)
        found = inspect_checkpoint(demo_copy, ["tokenizer", "chat"], device="cpu")
        assert found.problems == []
        assert ["does not stop" in note for _, note in found.findings.notes] == [True, True]

    def test_a_tokenizer_that_loses_text(self, demo_copy: Path) -> None:
        tokenizer = json.loads((demo_copy / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer["normalizer"] = {"type": "Lowercase"}
        (demo_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
        found = problems(demo_copy, "tokenizer")
        assert {kind for kind, _ in found} == {"round trip"}
        changed = "comes back changed: at character 0 'The quick br' has become 'the quick br'"
        assert ("round trip", f"the text 'plain' {changed}") in found

    def test_unicode_normal_forms_are_no_damage(self, demo_copy: Path) -> None:
        tokenizer = json.loads((demo_copy / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer["normalizer"] = {"type": "NFC"}
        (demo_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
        found = inspect_checkpoint(demo_copy, ["tokenizer"], device="cpu")
        assert found.problems == []
        assert "'combining' comes back in another of Unicode's normal forms" in " ".join(
            found.findings.notes_of("tokenizer")
        )

    def test_a_tokenizer_that_is_not_there(self, checkpoint: Path) -> None:
        kind, message = the_problem(checkpoint, *SECTIONS)
        assert kind == "tokenizer"
        assert "has no tokenizer" in message

    def test_a_tokenizer_cut_short(self, demo_copy: Path) -> None:
        file = demo_copy / "tokenizer.json"
        file.write_bytes(file.read_bytes()[:1000])
        kind, message = the_problem(demo_copy, "tokenizer", "chat")
        assert kind == "tokenizer"
        assert "cannot be loaded" in message

    def test_a_template_that_fails(self, demo_copy: Path) -> None:
        edit_json(demo_copy / "tokenizer_config.json", chat_template="{{ raise_exception('no such luck') }}")
        found = problems(demo_copy, "chat")
        assert {kind for kind, _ in found} == {"chat template"}
        assert "no such luck" in found[0][1]

    def test_no_template_is_noted(self, demo_copy: Path) -> None:
        edit_json(demo_copy / "tokenizer_config.json", chat_template=None)
        found = inspect_checkpoint(demo_copy, ["chat"], device="cpu")
        assert found.problems == []
        assert not found.sections["chat"].has_template
        assert "chat template\n=============\nthere is none" in render(found).lower()

    def test_a_generation_config_out_of_range(self, demo_copy: Path) -> None:
        edit_json(demo_copy / "generation_config.json", top_p=3.0)
        _, message = the_problem(demo_copy, "config")
        assert message.startswith("generation_config.json: top_p is 3.0")


class TestMemory:
    @pytest.mark.parametrize("available", [40_000_000, 2**34])
    def test_as_many_tokens_fit_as_the_engine_finds(self, monkeypatch: pytest.MonkeyPatch, available: int) -> None:
        options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_num_seqs": 64, "max_model_len": 512}
        monkeypatch.setattr(memory, "available_cpu_memory", lambda: available)
        capacity = inspect_checkpoint(DEMO_MODEL_PATH, ["memory"], **options).sections["memory"].capacity
        # Of which the engine's weights and rotary tables are gone when it sizes its cache.
        rotary = 4 * 64 * 512
        monkeypatch.setattr(memory, "available_cpu_memory", lambda: available - capacity.weight_bytes - rotary)
        with LLM(DEMO_MODEL_PATH, skip_tokenizer_init=True, **options) as llm:
            metrics = llm.get_metrics()
        assert capacity.num_blocks == metrics["num_kvcache_blocks"]
        assert capacity.block_size == metrics["kvcache_block_size"]
        assert capacity.limit == ("memory" if available < 10**9 else "need")

    def test_a_model_that_does_not_fit_is_noted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "available_cpu_memory", lambda: 1_000_000)
        found = inspect_checkpoint(DEMO_MODEL_PATH, ["memory"], device="cpu")
        assert found.problems == []
        assert found.sections["memory"].capacity.num_tokens == 0
        assert "does not fit cpu now" in found.findings.notes_of("memory")[0]

    def test_weights_of_a_rank_are_its_share(self) -> None:
        one, two = (
            inspect_checkpoint(DEMO_MODEL_PATH, ["memory"], device="cpu", tensor_parallel_size=size).sections["memory"]
            for size in (1, 2)
        )
        assert two.dtypes[0].kv_bytes_per_token * 2 == one.dtypes[0].kv_bytes_per_token
        assert one.dtypes[0].weight_bytes / 2 < two.dtypes[0].weight_bytes < one.dtypes[0].weight_bytes * 0.6

    def test_on_cuda_weights_tables_and_activations_come_off_the_share(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a stand-in for the device: nothing is loaded, so nothing but its memory is asked for."""
        gib = 2**30
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * gib, 10 * gib))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: gib)
        spec = AttentionSpec(4, 4, 2, 64, torch.bfloat16, torch.device("cuda", 0), 32)
        placement = Placement(spec.device, spec.dtype, 2**16, spec, TritonAttention)
        config = EngineConfig(model=DEMO_MODEL_PATH, enforce_eager=True)
        model = load_model_config(DEMO_MODEL_PATH)
        found = _capacity(config, model, placement, 2 * gib)
        rotary, logits = 4 * 64 * 2**16, 512 * 1280 * 4
        assert found.activation_bytes == max(4 * logits, 16384 * (2 * 192 + 3 * 576) * 2)
        assert found.kv_bytes == 9 * gib - (gib + 2 * gib + rotary) - found.activation_bytes - found.table_bytes
        assert found.num_blocks == found.kv_bytes // (32 * 2048)
        assert found.limit == "memory"
        captured = _capacity(replace(config, enforce_eager=False), model, placement, 2 * gib)
        assert captured.num_blocks < found.num_blocks  # captured steps keep something, too

    @pytest.mark.skipif(why_no_cpu_kernels() is not None, reason=str(why_no_cpu_kernels()))
    @pytest.mark.parametrize("tied", [True, False])
    def test_int8_takes_what_the_engine_packs(self, tmp_path: Path, tied: bool) -> None:
        shape = {"tie_word_embeddings": tied, "vocab_size": 1000, "eos_token_id": 1, "bos_token_id": 2}
        path = write_random_checkpoint(tmp_path, shape)
        options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "quantization": "int8"}
        with LLM(path, skip_tokenizer_init=True, num_kvcache_blocks=4, **options) as llm:
            engine: LLMEngine = llm.engine
            network = engine.runner.model
            plain = {id(parameter): parameter.nbytes for parameter in network.parameters()}
            packed = 0
            for module in network.modules():
                weight = getattr(getattr(module, "packed", None), "weight", None)
                packed += sum(part.nbytes for part in weight[:3]) if weight is not None else 0
            assert int8_bytes(model_without_memory(engine.config, engine.model_config), 2) == packed + sum(
                plain.values()
            )


class Slices:
    """A tensor as safetensors gives it, that counts what is read at a time."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.largest = tensor, 0

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.largest = max(self.largest, self.tensor[index].numel())
        return self.tensor[index]


class TestStatistics:
    @pytest.mark.parametrize("shape", [(), (0,), (1,), (1000,), (100, 30), (7, 5, 3)])
    def test_read_piece_by_piece(self, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("nanovllm.diagnostics.inspect.statistics.PIECE_ELEMENTS", 64)
        tensor = torch.randn(shape, dtype=torch.float64) + 3
        tensor.view(-1)[::7] = 0
        slices = Slices(tensor)
        found = read_statistics(slices)
        assert slices.largest <= 64
        assert (found.count, found.zeros) == (tensor.numel(), int((tensor == 0).sum()))
        if tensor.numel():
            assert found.mean == pytest.approx(tensor.mean().item())
            assert found.std == pytest.approx(tensor.std(correction=0).item())
            assert (found.min, found.max) == (tensor.min(), tensor.max())
        else:
            assert found.mean is None

    def test_what_is_not_finite_is_counted_and_left_out(self) -> None:
        found = Statistics()
        found.add(torch.tensor([1.0, float("nan"), 3.0]))
        found.add(torch.tensor([float("inf"), float("nan")]))
        found.add(torch.tensor([5.0, float("-inf"), 0.0]))
        assert (found.count, found.nan, found.infinite, found.zeros) == (8, 2, 2, 1)
        assert (found.min, found.max, found.mean) == (0.0, 5.0, 2.25)
        assert found.std == pytest.approx(torch.tensor([1.0, 3, 5, 0]).std(correction=0).item())

    def test_numbers_whose_squares_are_too_large_for_float32(self) -> None:
        found = Statistics()
        found.add(torch.tensor([1e30, -1e30]))
        assert found.std == pytest.approx(1e30)


def test_names_that_differ_by_the_layer_are_drawn_together() -> None:
    names = [f"model.layers.{layer}.a.weight" for layer in (0, 1, 2, 5, 10)] + ["model.norm.weight", "m.layers.3.b"]
    assert by_layer(names) == ["model.layers.{0-2,5,10}.a.weight", "model.norm.weight", "m.layers.3.b"]


def test_a_table_wraps_its_last_column() -> None:
    lines = table(["a", "number", "words"], [["x", "7", "many words " * 20], ["long name", "12,345", ""]], numeric=(1,))
    assert max(map(len, lines)) <= WIDTH
    assert lines[2].startswith("x               7  many words")
    assert lines[3].startswith(" " * 19 + "many")
    assert lines[-1] == "long name  12,345"


def test_a_table_cuts_names_that_are_too_long() -> None:
    lines = table(["name", "number"], [["begin" + "x" * 200 + "end", "7"]], numeric=(1,))
    assert max(map(len, lines)) <= WIDTH
    assert lines[2].startswith("beginx")
    assert "x...x" in lines[2]
    assert lines[2].endswith("xend       7")
