"""Checkpoints load whole and right, or not at all: every defect is named, together with what to do about it."""

import gc
import json
import math
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.rotary_embedding import rope_frequencies
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils import loader
from nanovllm.utils.loader import load_weights
from nanovllm.utils.model_config import load_model_config
from nanovllm.utils.random_checkpoint import write_random_checkpoint
from tests.checkpoints import load_reference, make_model, reference_greedy, reference_logits, write_checkpoint
from tests.threads import one_thread  # noqa: F401

PROMPT = [3, 141, 59, 26, 53, 58]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
PUBLISHED_KEYS = """
    architectures attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size
    initializer_range intermediate_size max_position_embeddings max_window_layers model_type num_attention_heads
    num_hidden_layers num_key_value_heads rms_norm_eps rope_scaling rope_theta sliding_window tie_word_embeddings
    torch_dtype transformers_version use_cache use_sliding_window vocab_size
"""
PUBLISHED_TENSORS_OF_A_LAYER = """
    input_layernorm mlp.down_proj mlp.gate_proj mlp.up_proj post_attention_layernorm
    self_attn.k_norm self_attn.k_proj self_attn.o_proj self_attn.q_norm self_attn.q_proj self_attn.v_proj
"""
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0] * 16,
}


def make_llm(path: Path, **arguments: Any) -> LLM:
    return LLM(
        path, **{"device": "cpu", "skip_tokenizer_init": True, "num_kvcache_blocks": 64, "max_num_seqs": 4, **arguments}
    )


def next_token_logits(path: Path, **arguments: Any) -> torch.Tensor:
    """The engine's float32 logits for the token after PROMPT."""
    captured = []
    with make_llm(path, **arguments) as llm:
        sampler = llm.engine.runner.sampler
        sampler.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0].clone()))
        llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    return captured[0][0]


def edit_config(path: Path, changes: dict[str, Any] | None = None, remove: tuple[str, ...] = ()) -> None:
    file = path / "config.json"
    config = {**json.loads(file.read_text()), **(changes or {})}
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("pristine"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def expected(pristine: Path) -> torch.Tensor:
    """transformers' logits for the token after PROMPT."""
    return reference_logits(load_reference(pristine), PROMPT)[-1]


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoilt."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


class TestLayouts:
    """What a good checkpoint may look like."""

    def test_published_qwen3_layout(self, tmp_path: Path) -> None:
        path = write_random_checkpoint(
            tmp_path,
            {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 301, "eos_token_id": 299},
            torch.float32,
            seed=5,
            store_tied_head=True,
        )
        # Exactly what is published, at reduced size: these keys and these tensors, the tied head among them.
        config = json.loads((path / "config.json").read_text())
        assert sorted(config) == PUBLISHED_KEYS.split()
        assert config["rope_scaling"] is None
        assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
        with safe_open(path / "model.safetensors", framework="pt") as file:
            layers = [
                f"model.layers.{i}.{name}.weight"
                for i in range(config["num_hidden_layers"])
                for name in PUBLISHED_TENSORS_OF_A_LAYER.split()
            ]
            others = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
            assert sorted(file.keys()) == sorted(layers + others)
        model = load_reference(path)
        assert (next_token_logits(path) - reference_logits(model, PROMPT)[-1]).abs().max() < 1e-4
        with make_llm(path) as llm:
            params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            assert llm.generate(PROMPT, params, use_tqdm=False)[0]["token_ids"] == reference_greedy(model, PROMPT, 8)
            assert llm.engine.default_params == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)

    @pytest.mark.parametrize("rope", [{"rope_type": "default"}, YARN], ids=["default", "yarn"])
    def test_both_spellings_of_config_json_mean_the_same(
        self, tmp_path: Path, pristine: Path, rope: dict[str, Any]
    ) -> None:
        path = write_checkpoint(tmp_path, num_hidden_layers=2, rope_theta=50000.0, rope_scaling={**rope})
        both = ("dtype", "rope_parameters", "torch_dtype", "rope_theta", "rope_scaling")
        edit_config(path, remove=both)
        edit_config(path, {"dtype": "float32", "rope_parameters": {**rope, "rope_theta": 50000.0}})
        new = next_token_logits(path)
        old_rope = None if rope["rope_type"] == "default" else rope
        edit_config(path, remove=both)
        edit_config(path, {"torch_dtype": "float32", "rope_theta": 50000, "rope_scaling": old_rope})
        old = next_token_logits(path)
        assert torch.equal(old, new)
        assert (new - reference_logits(load_reference(path), PROMPT)[-1]).abs().max() < 1e-4
        assert (new - next_token_logits(pristine)).abs().max() > 1e-2  # the rope is not ignored

    def test_rope_types_older_name_is_understood(self, checkpoint: Path) -> None:
        edit_config(checkpoint, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 123.0})
        edit_config(checkpoint, remove=("rope_parameters",))
        rope = load_model_config(str(checkpoint)).rope
        assert (rope.rope_type, rope.theta, rope.parameters) == ("linear", 123.0, {"factor": 2.0})

    def test_an_empty_entry_in_one_spelling_does_not_hide_the_other(self, checkpoint: Path) -> None:
        edit_config(checkpoint, {"rope_parameters": None, "rope_scaling": YARN, "rope_theta": 500.0})
        rope = load_model_config(str(checkpoint)).rope
        assert (rope.rope_type, rope.theta) == ("yarn", 500.0)

    def test_rope_theta_defaults_to_transformers(self, checkpoint: Path) -> None:
        edit_config(checkpoint, remove=("rope_parameters", "rope_scaling", "rope_theta"))
        assert load_model_config(str(checkpoint)).rope.theta == 10000.0

    @pytest.mark.parametrize(
        ("entries", "dtype"),
        [
            ({"torch_dtype": "bfloat16"}, "bfloat16"),
            ({"dtype": "float16"}, "float16"),
            ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
            ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
            ({}, "float32"),  # the tensors'
        ],
    )
    def test_dtype_of_either_spelling_or_of_the_tensors(
        self, checkpoint: Path, entries: dict[str, Any], dtype: str
    ) -> None:
        edit_config(checkpoint, remove=("dtype", "torch_dtype"))
        edit_config(checkpoint, entries)
        with make_llm(checkpoint) as llm:
            assert llm.get_metrics()["dtype"] == dtype
            assert {parameter.dtype for parameter in llm.engine.runner.model.parameters()} == {getattr(torch, dtype)}

    def test_dtype_of_half_precision_tensors(self, tmp_path: Path) -> None:
        make_model(num_hidden_layers=1).to(torch.bfloat16).save_pretrained(tmp_path)
        edit_config(tmp_path, remove=("dtype", "torch_dtype"))
        with make_llm(tmp_path) as llm:
            assert llm.get_metrics()["dtype"] == "bfloat16"

    def test_sharded_checkpoint_is_read_by_its_index(self, tmp_path: Path, expected: torch.Tensor) -> None:
        make_model(num_hidden_layers=2).save_pretrained(tmp_path, max_shard_size="60KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        assert (next_token_logits(tmp_path) - expected).abs().max() < 1e-4
        # Only what the index names is read.
        (tmp_path / "other.safetensors").write_bytes(b"not a tensor file")
        assert (next_token_logits(tmp_path) - expected).abs().max() < 1e-4

    def test_shards_without_an_index_are_read_too(self, tmp_path: Path, expected: torch.Tensor) -> None:
        make_model(num_hidden_layers=2).save_pretrained(tmp_path, max_shard_size="60KB")
        (tmp_path / "model.safetensors.index.json").unlink()
        assert (next_token_logits(tmp_path) - expected).abs().max() < 1e-4

    def test_tied_checkpoint_may_hold_its_head_too(self, checkpoint: Path, expected: torch.Tensor) -> None:
        edit_tensors(
            checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
        )
        assert (next_token_logits(checkpoint) - expected).abs().max() < 1e-4
        with make_llm(checkpoint) as llm:  # and keeps one table
            model = llm.engine.runner.model
            assert model.lm_head.weight is model.model.embed_tokens.weight

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_copied_head_may_lie_in_any_file_and_is_compared_in_pieces(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
    ) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        (checkpoint / "model.safetensors").unlink()
        table = tensors["model.embed_tokens.weight"]
        save_file({"lm_head.weight": table.clone()}, checkpoint / "model-00001-of-00002.safetensors")
        save_file(tensors, checkpoint / "model-00002-of-00002.safetensors")
        itemsize = getattr(torch, dtype).itemsize
        monkeypatch.setattr(loader, "_COMPARED_BYTES", 50 * 64 * itemsize)  # 50 of the 211 rows
        reads = ReadRecorder(monkeypatch)
        with make_llm(checkpoint, dtype=dtype):
            assert reads.sizes[-5:] == [50 * 64 * 4] * 4 + [11 * 64 * 4]
            assert reads.total_bytes == sum(tensor.nbytes for tensor in tensors.values()) + table.nbytes
            assert reads.live_bytes == 0

    def test_each_rank_compares_its_own_rows_of_a_copied_head(self, checkpoint: Path) -> None:
        def add_head(tensors: dict[str, torch.Tensor]) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

        def spoil_last_row(tensors: dict[str, torch.Tensor]) -> None:
            tensors["lm_head.weight"][-1] += 1

        config = load_model_config(str(checkpoint))

        def load(rank: int) -> None:
            group = ParallelGroup(rank, 2)
            model = Qwen3ForCausalLM(config, 16, group, torch.float32, torch.device("cpu"))
            load_weights(model, str(checkpoint), model.resolve_weight)

        edit_tensors(checkpoint, add_head)
        load(0)
        load(1)
        edit_tensors(checkpoint, spoil_last_row)
        load(0)
        with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
            load(1)

    def test_untied_checkpoint_uses_its_own_head(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, num_hidden_layers=1, tie_word_embeddings=False)
        expected = reference_logits(load_reference(path), PROMPT)[-1]
        assert (next_token_logits(path) - expected).abs().max() < 1e-4

    def test_buffers_that_older_checkpoints_hold_are_left_out(self, checkpoint: Path, expected: torch.Tensor) -> None:
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        edit_tensors(checkpoint, lambda tensors: tensors.update({name: torch.ones(16)}))
        assert (next_token_logits(checkpoint) - expected).abs().max() < 1e-4


class TestDamage:
    """A checkpoint that is not whole is refused, and the message names the file or the tensors."""

    def test_no_config_json(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"no config\.json.*Hugging Face checkpoint"):
            make_llm(checkpoint)

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
    @pytest.mark.parametrize("text", ['{"vocab_size": 12', "[]", ""])
    def test_broken_json_is_named(self, checkpoint: Path, name: str, text: str) -> None:
        if name == "model.safetensors.index.json":  # which is read only where there is no model.safetensors
            (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
        (checkpoint / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}.*download it again"):
            make_llm(checkpoint)

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
    @pytest.mark.parametrize(
        "contents",
        [b'{"weight_map": "\xff"}', b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"],
        ids=["not UTF-8", "nested too deep", "a number of 5000 digits"],
    )
    def test_json_beyond_what_can_be_read_is_named(self, checkpoint: Path, name: str, contents: bytes) -> None:
        if name == "model.safetensors.index.json":
            (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
        (checkpoint / name).write_bytes(contents)
        with pytest.raises(ValueError, match=rf"{name}.*download it again"):
            make_llm(checkpoint)

    def test_no_weights(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors file.*convert"):
            make_llm(checkpoint)

    def test_missing_shard_is_named(self, tmp_path: Path) -> None:
        make_model(num_hidden_layers=2).save_pretrained(tmp_path, max_shard_size="60KB")
        shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=rf"lacks {shard.name}, which .*index\.json names"):
            make_llm(tmp_path)

    @pytest.mark.parametrize("kept", [0, 5, 100, -1])
    def test_truncated_file_is_named(self, checkpoint: Path, kept: int) -> None:
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short.*download it again"):
            make_llm(checkpoint)

    def test_a_file_that_git_has_not_fetched_is_told_from_a_damaged_one(self, checkpoint: Path) -> None:
        text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1503300328\n"
        (checkpoint / "model.safetensors").write_text(text)
        with pytest.raises(ValueError, match=r"model\.safetensors is what git puts in place .*git lfs pull"):
            make_llm(checkpoint)

    @pytest.mark.skipif(sys.platform == "win32", reason="links need a right of their own")
    def test_a_link_to_what_is_not_there_says_so(self, checkpoint: Path) -> None:
        """As in a cache of downloads that was cleared in part: a listing shows the file."""
        file = checkpoint / "model.safetensors"
        file.unlink()
        file.symlink_to(checkpoint / "blob")
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors is a link to .*blob, which is not there"):
            make_llm(checkpoint)

    def test_truncated_file_of_unknown_dtype_is_named(self, checkpoint: Path) -> None:
        edit_config(checkpoint, remove=("dtype", "torch_dtype"))
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
            make_llm(checkpoint)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_a_quantized_tensor_is_not_mistaken_for_weights(self, checkpoint: Path, dtype: torch.dtype) -> None:
        def quantize(tensors: dict[str, torch.Tensor]) -> None:
            name = "model.layers.1.mlp.down_proj.weight"
            tensors[name] = tensors[name].to(dtype)

        edit_tensors(checkpoint, quantize)
        with pytest.raises(ValueError, match=r"quantized, which is not supported: model.layers.1.mlp.down_proj.weight"):
            make_llm(checkpoint)

    def test_missing_unexpected_and_misshapen_tensors_are_listed_together(self, checkpoint: Path) -> None:
        def spoil(tensors: dict[str, torch.Tensor]) -> None:
            del tensors["model.norm.weight"]
            del tensors["model.layers.1.self_attn.k_proj.weight"]
            tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(96, 64)
            tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(256)
            tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 95)
            tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(16)

        edit_tensors(checkpoint, spoil)
        with pytest.raises(ValueError) as caught:
            make_llm(checkpoint)
        missing, unexpected, misshapen = str(caught.value).split("Tensors ")[1:]
        assert missing.startswith("missing: ")
        assert "model.norm.weight" in missing
        assert "model.layers.1.self_attn.qkv_proj.weight[k]" in missing
        assert unexpected.startswith("unexpected: ")
        assert "model.layers.7.mlp.up_proj.weight" in unexpected
        assert "model.layers.0.self_attn.q_proj.bias" in unexpected
        assert misshapen.startswith("of the wrong shape: ")
        assert "model.layers.0.mlp.down_proj.weight has shape [64, 95], expected [64, 96]" in misshapen
        assert "model.layers.0.self_attn.q_norm.weight has shape [16], expected [32]" in misshapen

    def test_a_tied_head_of_its_own_is_refused_with_the_way_to_use_it(self, checkpoint: Path) -> None:
        """Versions of transformers disagree on which of the two to take."""

        def add_head(tensors: dict[str, torch.Tensor]) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()

        edit_tensors(checkpoint, add_head)
        remedy = {"tie_word_embeddings": False}
        with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding.*or delete it") as caught:
            make_llm(checkpoint)
        assert f"hf_overrides={remedy}" in str(caught.value)
        edit_config(checkpoint, remedy)
        expected = reference_logits(load_reference(checkpoint), PROMPT)[-1]
        edit_config(checkpoint, {"tie_word_embeddings": True})
        assert (next_token_logits(checkpoint, hf_overrides=remedy) - expected).abs().max() < 1e-4

    @pytest.mark.parametrize(
        ("head", "message"),
        [
            (torch.zeros(210, 64), r"wrong shape: lm_head\.weight has shape \[210, 64\], expected \[211, 64\]"),
            (torch.zeros(211, 64, dtype=torch.int8), r"quantized, which is not supported: lm_head\.weight"),
        ],
        ids=["shape", "dtype"],
    )
    def test_a_tied_head_that_cannot_be_a_copy(self, checkpoint: Path, head: torch.Tensor, message: str) -> None:
        edit_tensors(checkpoint, lambda tensors: tensors.update({"lm_head.weight": head}))
        with pytest.raises(ValueError, match=message):
            make_llm(checkpoint)

    def test_a_tied_head_is_not_compared_with_an_embedding_that_is_absent(self, checkpoint: Path) -> None:
        def rename(tensors: dict[str, torch.Tensor]) -> None:
            tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

        edit_tensors(checkpoint, rename)
        with pytest.raises(ValueError, match=r"missing: model\.embed_tokens\.weight") as caught:
            make_llm(checkpoint)
        assert "differs" not in str(caught.value)

    @pytest.mark.parametrize("vocab_size", [10**12, 10**30])
    def test_a_weight_that_no_memory_holds(self, checkpoint: Path, vocab_size: int) -> None:
        with pytest.raises(ValueError, match=rf"a weight of shape \[{vocab_size}, 64\] takes .* bytes.*hf_overrides"):
            make_llm(checkpoint, hf_overrides={"vocab_size": vocab_size})

    @pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "head_dim", "num_key_value_heads"])
    def test_a_config_of_another_model_does_not_load(self, checkpoint: Path, key: str) -> None:
        edit_config(checkpoint, {key: 4})
        with pytest.raises(ValueError, match=r"of the wrong shape: .*expected"):
            make_llm(checkpoint)

    def test_untied_checkpoint_without_its_head(self, checkpoint: Path) -> None:
        edit_config(checkpoint, {"tie_word_embeddings": False})
        with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
            make_llm(checkpoint)


class TestUnsupported:
    """What the engine cannot do it says, and names the entry."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM'.*supported: Qwen3ForCausalLM"),
            ({"architectures": []}, "architecture ''.*architectures"),
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
            ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.*unquantized"),
            ({"head_dim": 31}, "head_dim is 31.*even"),
            ({"num_key_value_heads": 3}, r"num_attention_heads is 8, which num_key_value_heads \(3\) does not divide"),
            ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type is 'spiral'.*yarn"),
            ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn'.*factor"),
            ({"rope_scaling": {**YARN, "factor": 0}}, "factor is 0 .*positive, finite"),
            ({"rope_scaling": {**YARN, "factor": -4.0}}, "factor is -4.0 .*positive, finite"),
            ({"rope_scaling": {**YARN, "factor": math.inf}}, "factor is inf .*positive, finite"),
            ({"rope_scaling": {**YARN, "factor": True}}, "factor is True .*positive, finite"),
            ({"rope_scaling": {**YARN, "attention_factor": math.nan}}, "attention_factor is nan .*positive, finite"),
            ({"rope_scaling": {**YARN, "mscale": math.nan, "mscale_all_dim": 1.0}}, "mscale is nan .*finite"),
            ({"rope_scaling": {**YARN, "beta_fast": "a"}}, "beta_fast is 'a' .*positive, finite"),
            (
                {"rope_scaling": {**YARN, "original_max_position_embeddings": -5}},
                "original_max_position_embeddings is -5 .*positive, finite",
            ),
            (
                {"rope_scaling": LONGROPE, "original_max_position_embeddings": "64"},
                "original_max_position_embeddings is '64' .*positive, finite",
            ),
            (
                {"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 15}},
                "short_factor has 15 numbers.*head_dim of 32: 16",
            ),
            ({"rope_scaling": {**LONGROPE, "long_factor": 2.0}}, "long_factor is 2.0 .*list of positive"),
            ({"rope_scaling": {**LONGROPE, "long_factor": [0.0] * 16}}, "long_factor is .*list of positive"),
            ({"rope_scaling": {"rope_typ": "yarn", "factor": 4.0}}, "entry 'rope_typ'; did you mean 'rope_type'"),
            ({"rope_scaling": {"rope_type": "yarn", "rope_tetha": 5.0}}, "'rope_tetha'; did you mean 'rope_theta'"),
            (
                {"rope_scaling": {"full_attention": YARN}},
                r"for each type of layer \(full_attention\).*hf_overrides=\{'rope_parameters': \{'rope_type': 'yarn'",
            ),
            ({"rope_scaling": 4}, "rope_parameters is 4.*dictionary"),
            (
                {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
                "partial_rotary_factor is 0.5; only rotary embeddings of whole heads",
            ),
            ({"vocab_size": None}, "vocab_size is missing .*positive whole number"),
            ({"num_hidden_layers": 0}, "num_hidden_layers is 0 .*positive whole number"),
            ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000 .*positive whole number of at most 1024"),
            ({"hidden_size": 64.5}, "hidden_size is 64.5 .*positive whole number"),
            ({"intermediate_size": True}, "intermediate_size is True .*positive whole number"),
            ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.* number of at least 0"),
            ({"dtype": "float8_e4m3fn"}, "'float8_e4m3fn'; pass dtype='bfloat16'"),
            ({"architectures": [["Qwen3ForCausalLM"]]}, "architectures is .*list of names"),
            ({"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true' in .*config.json.* true or false"),
            ({"attention_bias": 1}, "attention_bias is 1 in .*true or false"),
            ({"use_sliding_window": "false"}, "use_sliding_window is 'false' in .*true or false"),
            ({"max_window_layers": "x", "use_sliding_window": True}, "max_window_layers is 'x' in .*whole number"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_config_entries(self, checkpoint: Path, changes: dict[str, Any], message: str) -> None:
        edit_config(checkpoint, changes)
        with pytest.raises(ValueError, match=message):
            make_llm(checkpoint)

    @pytest.mark.parametrize(
        "changes",
        [
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64},
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": None},
        ],
        ids=["by layer", "by number of layers"],
    )
    def test_sliding_window_and_the_way_around_it(
        self, checkpoint: Path, changes: dict[str, Any], expected: torch.Tensor
    ) -> None:
        edit_config(checkpoint, changes, remove=() if changes["layer_types"] else ("layer_types",))
        with pytest.raises(ValueError, match=r"sliding-window attention.*hf_overrides=") as caught:
            make_llm(checkpoint)
        remedy = {"use_sliding_window": False, "layer_types": None}
        assert f"hf_overrides={remedy}" in str(caught.value)
        assert (next_token_logits(checkpoint, hf_overrides=remedy) - expected).abs().max() < 1e-4

    @pytest.mark.parametrize("theta", [math.nan, math.inf, 10**400, -1.0, 0, "5", True])
    @pytest.mark.parametrize("among", [True, False])
    def test_rope_theta_that_no_number_is(self, checkpoint: Path, theta: Any, among: bool) -> None:
        beside = {"rope_parameters": None, "rope_theta": theta}
        edit_config(checkpoint, {"rope_parameters": {"rope_theta": theta}} if among else beside)
        with pytest.raises(ValueError, match=r"rope_theta is .*positive, finite number"):
            load_model_config(str(checkpoint))
        load_model_config(str(checkpoint), {"rope_theta": 5.0, "rope_parameters": None})  # an override mends it

    def test_rope_theta_of_frequencies_beyond_float32(self, checkpoint: Path) -> None:
        with pytest.raises(ValueError, match=r"rope_theta 1e-300 .*not finite"):
            make_llm(checkpoint, hf_overrides={"rope_parameters": {"rope_theta": 1e-300}})

    @pytest.mark.parametrize("known", [True, False])
    def test_unknown_rope_entries_are_named_in_the_log(
        self, checkpoint: Path, known: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        nothing = {"attention_factor": None, "beta_fast": 32, "beta_slow": 1.0, "mscale": 0, "truncate": True}
        extra = nothing if known else {"mrope_section": [4, 6, 6]}
        edit_config(checkpoint, {"rope_scaling": {**YARN, "type": "yarn", **extra}}, remove=("rope_parameters",))
        with caplog.at_level("WARNING", logger="nanovllm"):
            rope_frequencies(load_model_config(str(checkpoint)), 512)
        assert ("an entry 'mrope_section', which is not used" in caplog.text) is not known

    def test_sliding_window_that_no_layer_uses_is_no_obstacle(self, checkpoint: Path) -> None:
        edit_config(checkpoint, {"use_sliding_window": True, "max_window_layers": 2}, remove=("layer_types",))
        load_model_config(str(checkpoint))

    @pytest.mark.parametrize(
        ("rope", "limit"),
        [
            ({"rope_type": "dynamic", "factor": 4.0}, 512),
            ({**LONGROPE, "original_max_position_embeddings": 128}, 128),
            (LONGROPE, 512),
        ],
        ids=["dynamic", "longrope", "longrope of unstated length"],
    )
    def test_tables_that_change_with_the_length_serve_their_fixed_range_only(
        self, checkpoint: Path, rope: dict[str, Any], limit: int
    ) -> None:
        edit_config(checkpoint, {"rope_scaling": rope}, remove=("rope_parameters",))
        config = load_model_config(str(checkpoint))
        rope_frequencies(config, limit)
        kind = rope["rope_type"]
        message = rf"max_model_len is {limit + 1}.*'{kind}'.*use max_model_len={limit}, or a static type such as yarn"
        with pytest.raises(ValueError, match=message):
            rope_frequencies(config, limit + 1)

    def test_longrope_length_beside_the_rope_parameters_counts(self, checkpoint: Path) -> None:
        changes = {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64}
        edit_config(checkpoint, changes, remove=("rope_parameters",))
        with pytest.raises(ValueError, match="use max_model_len=64"):
            make_llm(checkpoint)
        expected = reference_logits(load_reference(checkpoint), PROMPT)[-1]
        assert (next_token_logits(checkpoint, max_model_len=64) - expected).abs().max() < 1e-4

    def test_max_model_len_beyond_the_models(self, checkpoint: Path) -> None:
        with pytest.raises(ValueError, match=r"max_model_len is 513, but the model has 512 positions.*hf_overrides="):
            make_llm(checkpoint, max_model_len=513)
        with make_llm(checkpoint) as llm:
            assert llm.engine.max_model_len == 512


class TestOverrides:
    """hf_overrides replaces entries of config.json."""

    @pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
    def test_yarn_in_either_spelling_gives_transformers_tables(self, checkpoint: Path, spelling: str) -> None:
        if spelling == "rope_parameters":
            overrides: dict[str, Any] = {"rope_parameters": {**YARN, "rope_theta": 20000.0}}
        else:
            overrides = {"rope_scaling": {**YARN}, "rope_theta": 20000.0}
        logits = next_token_logits(checkpoint, hf_overrides=overrides)
        edit_config(checkpoint, {"rope_scaling": YARN, "rope_theta": 20000.0}, remove=("rope_parameters",))
        expected = reference_logits(load_reference(checkpoint), PROMPT)[-1]
        assert (logits - expected).abs().max() < 1e-4

    @pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
    def test_only_what_is_named_is_replaced(self, checkpoint: Path, spelling: str) -> None:
        theta = {"rope_theta": 321.0}
        if spelling == "rope_parameters":
            edit_config(checkpoint, {"rope_parameters": {**YARN, **theta}})
        else:
            edit_config(checkpoint, {"rope_scaling": YARN, **theta}, remove=("rope_parameters",))

        def rope(overrides: dict[str, Any]) -> tuple[str, float, dict[str, Any]]:
            found = load_model_config(str(checkpoint), overrides).rope
            return found.rope_type, found.theta, found.parameters

        details = {key: value for key, value in YARN.items() if key != "rope_type"}
        assert rope({}) == ("yarn", 321.0, details)
        assert rope({"rope_theta": 5.0}) == ("yarn", 5.0, details)
        assert rope({"rope_scaling": {"type": "linear", "factor": 2.0}}) == ("linear", 321.0, {"factor": 2.0})
        assert rope({"rope_parameters": {"rope_type": "default"}}) == ("default", 321.0, {})
        assert rope({"rope_scaling": None}) == ("default", 321.0, {})

    def test_published_yarn_recipe(self, checkpoint: Path) -> None:
        """Four times 32,768 positions: cosines and sines are scaled by 0.1 ln 4 + 1."""
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1000000}
        config = load_model_config(str(checkpoint), {"rope_parameters": yarn, "max_position_embeddings": 131072})
        frequencies, scaling = rope_frequencies(config, 131072)
        assert scaling == pytest.approx(1.1386, abs=1e-4)
        assert frequencies[0] == 1.0  # the fastest is untouched, the slowest stretched four times
        assert frequencies[-1] == pytest.approx(1e6 ** -(30 / 32) / 4)

    @pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
    def test_dtype(self, checkpoint: Path, spelling: str) -> None:
        with make_llm(checkpoint, hf_overrides={spelling: "bfloat16"}) as llm:
            assert llm.get_metrics()["dtype"] == "bfloat16"
        with make_llm(checkpoint, hf_overrides={spelling: "bfloat16"}, dtype="float32") as llm:
            assert llm.get_metrics()["dtype"] == "float32"

    def test_more_positions(self, checkpoint: Path) -> None:
        overrides = {"rope_parameters": YARN, "max_position_embeddings": 2048}
        with make_llm(checkpoint, hf_overrides=overrides, max_model_len=2048) as llm:
            assert llm.engine.max_model_len == 2048

    @pytest.mark.parametrize(
        ("key", "hint"),
        [
            ("rope_parameter", "did you mean 'rope_parameters'"),
            ("hiden_size", "did you mean 'hidden_size'"),
            ("zzz", "does not have$"),
        ],
    )
    def test_unknown_key_suggests_the_nearest(self, checkpoint: Path, key: str, hint: str) -> None:
        with pytest.raises(ValueError, match=f"hf_overrides names '{key}', which config.json .*{hint}"):
            make_llm(checkpoint, hf_overrides={key: 1})

    def test_overrides_are_checked_like_the_file(self, checkpoint: Path) -> None:
        with pytest.raises(ValueError, match="num_hidden_layers is '2'"):
            make_llm(checkpoint, hf_overrides={"num_hidden_layers": "2"})


class TestMemory:
    """A model larger than half the memory loads, and goes when it is dropped."""

    def test_one_tensor_at_a_time_and_each_byte_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_model(num_hidden_layers=2).save_pretrained(tmp_path, max_shard_size="60KB")
        reads = ReadRecorder(monkeypatch)
        with make_llm(tmp_path) as llm:
            weights = [parameter.nbytes for parameter in llm.engine.runner.model.parameters()]
            assert reads.total_bytes == sum(weights)
            assert reads.peak_bytes == reads.largest_bytes < sum(weights) / 4
            assert reads.live_bytes == 0  # nothing read is kept: parameters are filled, not replaced

    def test_dropped_model_goes_at_once(self, checkpoint: Path) -> None:
        """Not when the garbage collector comes round: on a GPU the next model may need the memory now."""
        gc.collect()
        gc.disable()
        try:
            llm = make_llm(checkpoint)
            model = weakref.ref(llm.engine.runner.model)
            weight = weakref.ref(llm.engine.runner.model.model.norm.weight)
            assert model() is not None
            llm.close()
            assert model() is None
            assert weight() is None
        finally:
            gc.enable()


class ReadRecorder:
    """Counts the bytes of the tensors read from safetensors files, and how many of them are alive together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total_bytes = self.live_bytes = self.peak_bytes = self.largest_bytes = 0
        self.sizes: list[int] = []
        recorder = self

        class Slice:
            def __init__(self, inner: Any) -> None:
                self.get_shape, self.get_dtype, self.inner = inner.get_shape, inner.get_dtype, inner

            def __getitem__(self, index: Any) -> torch.Tensor:
                tensor = self.inner[index]
                recorder.note(tensor)
                return tensor

        class File:
            def __init__(self, *arguments: Any, **keywords: Any) -> None:
                self.inner = safe_open(*arguments, **keywords)

            def __enter__(self) -> "File":
                self.inner.__enter__()
                return self

            def __exit__(self, *exc_info: object) -> None:
                self.inner.__exit__(*exc_info)

            def keys(self) -> list[str]:
                return self.inner.keys()

            def get_slice(self, name: str) -> Slice:
                return Slice(self.inner.get_slice(name))

        monkeypatch.setattr(loader, "safe_open", File)

    def note(self, tensor: torch.Tensor) -> None:
        self.sizes.append(tensor.nbytes)
        self.total_bytes += tensor.nbytes
        self.live_bytes += tensor.nbytes
        self.largest_bytes = max(self.largest_bytes, tensor.nbytes)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(tensor, self.forget, tensor.nbytes)

    def forget(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes
