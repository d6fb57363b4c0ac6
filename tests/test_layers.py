"""Layers compute what their formulas say, whole or split over ranks, and each rank reads only its share.

Ranks are threads here that exchange tensors in memory, so that tensor parallelism is tested anywhere.
"""

import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3 import modeling_qwen3

from nanovllm.attention.base import AttentionMetadata, AttentionSpec
from nanovllm.attention.matmul import MatmulAttention
from nanovllm.layers.activation import SiluAndMul, get_activation
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ColumnParallelLinear, GateUpParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.product import OneDnnWeight, PackedWeight, TiledWeight, pack_weights
from nanovllm.layers.rotary_embedding import RotaryEmbedding, apply_rotary, rope_frequencies
from nanovllm.layers.sampler import Sampler, SamplingRows, ShardedSampler
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils.loader import ShapeMismatchError, load_weights
from nanovllm.utils.model_config import ModelConfig, load_model_config
from tests.checkpoints import BASE, LLAMA3_ROPE, LONGROPE, load_reference, reference_logits, write_checkpoint
from tests.threads import one_thread  # noqa: F401

CPU = torch.device("cpu")
F32 = torch.float32
ALONE = ParallelGroup()
SIZES = [2, 4, 8]
every_size = pytest.mark.parametrize("size", SIZES)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Exchange:
    """Where the ranks of a simulated group meet: each hands in a tensor and gets everybody's."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.tensors: list[torch.Tensor] = [torch.empty(0)] * size

    def swap(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.tensors[rank] = x.clone()
        self.barrier.wait()
        everybody = list(self.tensors)
        self.barrier.wait()  # nobody hands in the next one before all have these
        return everybody


@dataclass(frozen=True, slots=True)
class SimulatedGroup(ParallelGroup):
    """A rank that is a thread."""

    exchange: Exchange = field(default_factory=lambda: Exchange(1))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self.exchange.swap(self.rank, x)).sum(0))

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.exchange.swap(self.rank, x)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self.exchange.swap(self.rank, x)[0])


def run_ranks(size: int, function: Callable[[ParallelGroup], Any]) -> list[Any]:
    """What ``function`` returns on each of ``size`` ranks that run at the same time."""
    exchange = Exchange(size)

    def run(rank: int) -> Any:
        try:
            return function(SimulatedGroup(rank, size, None, exchange))
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


class Source:
    """A checkpoint tensor that remembers which of its elements were read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.read = torch.zeros(tensor.shape, dtype=torch.int64)

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.read[index] += 1
        return self.tensor[index].clone()


def load(parameter: nn.Parameter | None, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fill a parameter from a tensor a shard id; returns how often each element of them was read."""
    assert parameter is not None
    assert set(parameter.shard_ids) == set(tensors)
    sources = {shard: Source(tensor) for shard, tensor in tensors.items()}
    for shard, source in sources.items():
        parameter.load(parameter, source, shard)
    return {shard: source.read for shard, source in sources.items()}


def read_once_in_all(reads: list[torch.Tensor]) -> bool:
    return bool((torch.stack(reads).sum(0) == 1).all())


class TestRMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_equals_transformers(self, dtype: torch.dtype) -> None:
        reference = modeling_qwen3.Qwen3RMSNorm(80, eps=1e-5).to(dtype)
        reference.weight.data.copy_(1 + 0.1 * randn(80))
        norm = RMSNorm(80, 1e-5, dtype, CPU)
        load(norm.weight, {"": reference.weight.data})
        for scale in (1e-3, 1.0, 1e3):
            x = (randn(7, 3, 80, seed=1) * scale).to(dtype)
            torch.testing.assert_close(norm(x), reference(x).detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)

    def test_float16_does_not_overflow(self) -> None:
        norm = RMSNorm(64, 1e-6, torch.float16, CPU)
        load(norm.weight, {"": torch.ones(64)})
        x = torch.full((2, 64), 6e4, dtype=torch.float16)
        torch.testing.assert_close(norm(x), torch.ones_like(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_input_and_residual_stay_as_they_are(self, dtype: torch.dtype) -> None:
        """In float32, x.float() is x: whatever worked on it in place would spoil the residual stream."""
        norm = RMSNorm(16, 1e-6, dtype, CPU)
        load(norm.weight, {"": 1 + randn(16)})
        x, residual = randn(5, 16, seed=1).to(dtype), randn(5, 16, seed=2).to(dtype)
        kept_x, kept_residual = x.clone(), residual.clone()
        out = norm(x)
        assert out.data_ptr() != x.data_ptr()
        normed, total = norm.add(x, residual)
        assert torch.equal(x, kept_x)
        assert torch.equal(residual, kept_residual)
        assert torch.equal(total, kept_x + kept_residual)
        torch.testing.assert_close(normed, norm(total))  # by a kernel, whose sums are in another order
        assert torch.equal(total, kept_x + kept_residual)

    def test_the_stream_starts_with_the_input(self) -> None:
        norm = RMSNorm(16, 1e-6, F32, CPU)
        load(norm.weight, {"": 1 + randn(16)})
        x = randn(5, 16, seed=1)
        kept = x.clone()
        normed, total = norm.add(x, None)
        assert torch.equal(total, kept)
        torch.testing.assert_close(normed, norm(kept))
        normed.zero_()
        assert torch.equal(total, kept)


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "another theta": {"rope_theta": 1000000.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        "rope_theta": 1000000.0,
    },
    "yarn, all entries": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.25,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        }
    },
    "llama3": {"rope_scaling": LLAMA3_ROPE},
    "longrope": {"rope_scaling": LONGROPE},
}


def model_config(path: Path, **changes: Any) -> ModelConfig:
    """The configuration as the engine reads it from the file that transformers writes."""
    Qwen3Config(**{**BASE, **changes}, architectures=["Qwen3ForCausalLM"]).save_pretrained(path)
    return load_model_config(str(path))


class TestRotaryEmbedding:
    """The tables are transformers', and each token turns by its absolute position."""

    @pytest.mark.parametrize("head_dim", [32, 48, 128])
    @pytest.mark.parametrize("kind", list(ROPES))
    def test_tables_are_transformers(self, tmp_path: Path, kind: str, head_dim: int) -> None:
        changes = {**ROPES[kind], "head_dim": head_dim}
        if kind == "longrope":
            factors = [1.0 + 0.1 * i for i in range(head_dim // 2)]
            changes["rope_scaling"] = {**changes["rope_scaling"], "short_factor": factors, "long_factor": factors}
        rotary = RotaryEmbedding(model_config(tmp_path, **changes), 512, CPU)
        reference = modeling_qwen3.Qwen3RotaryEmbedding(Qwen3Config(**{**BASE, **changes}))
        positions = torch.tensor([0, 1, 2, 63, 64, 65, 300, 511, 5, 5])
        cos, sin = rotary(positions).rows()
        expected_cos, expected_sin = reference(torch.zeros(1), positions[None])
        for ours, theirs in ((cos, expected_cos), (sin, expected_sin)):
            assert ours.shape == (len(positions), 1, head_dim // 2)
            assert ours.dtype == torch.float32
            torch.testing.assert_close(torch.cat([ours, ours], dim=-1)[:, 0], theirs[0], rtol=1e-6, atol=1e-6)

    def test_scaled_types_differ_from_the_default(self, tmp_path: Path) -> None:
        tables = {kind: RotaryEmbedding(model_config(tmp_path, **ROPES[kind]), 512, CPU).cos for kind in ROPES}
        same = [kind for kind, table in tables.items() if torch.allclose(table, tables["default"])]
        assert same == ["default", "dynamic"]  # dynamic only begins to differ beyond the model's own length

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rotation_is_transformers(self, tmp_path: Path, dtype: torch.dtype) -> None:
        rotary = RotaryEmbedding(model_config(tmp_path, **ROPES["yarn"]), 512, CPU)
        positions = torch.tensor([3, 0, 511, 64, 64])
        q, k = randn(5, 4, 32).to(dtype), randn(5, 2, 32, seed=1).to(dtype)
        kept = q.clone()
        cos, sin = (torch.cat([table, table], dim=-1)[:, 0][None] for table in rotary(positions).rows())
        expected = modeling_qwen3.apply_rotary_pos_emb(
            q.float().transpose(0, 1)[None], k.float().transpose(0, 1)[None], cos, sin
        )
        for x, want in zip((q, k), expected, strict=True):
            out = apply_rotary(x, *rotary(positions).rows())
            assert out.dtype == dtype
            torch.testing.assert_close(out, want[0].transpose(0, 1).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(q, kept)

    def test_positions_count_from_zero(self, tmp_path: Path) -> None:
        rotary = RotaryEmbedding(model_config(tmp_path), 512, CPU)
        x = randn(1, 2, 32)
        torch.testing.assert_close(apply_rotary(x, *rotary(torch.tensor([0])).rows()), x)
        # The first element turns by one radian a position.
        turned = apply_rotary(x, *rotary(torch.tensor([1])).rows())
        expected = x[..., 0] * math.cos(1) - x[..., 16] * math.sin(1)
        torch.testing.assert_close(turned[..., 0], expected)

    def test_products_depend_on_the_distance_only(self, tmp_path: Path) -> None:
        rotary = RotaryEmbedding(model_config(tmp_path), 512, CPU)
        q, k = randn(1, 1, 32), randn(1, 1, 32, seed=1)

        def product(query_position: int, key_position: int) -> torch.Tensor:
            turned_q = apply_rotary(q, *rotary(torch.tensor([query_position])).rows())
            return (turned_q * apply_rotary(k, *rotary(torch.tensor([key_position])).rows())).sum()

        torch.testing.assert_close(product(7, 3), product(400, 396), rtol=1e-4, atol=1e-4)
        assert abs(product(7, 3) - product(7, 4)) > 1e-2

    @pytest.mark.parametrize("kind", ["default", "linear"])
    @pytest.mark.parametrize("beside", [True, False])
    def test_rotating_part_of_a_head_is_refused(self, tmp_path: Path, kind: str, beside: bool) -> None:
        """Wherever the file says so: among the rope parameters, or beside them."""
        assert rope_frequencies(model_config(tmp_path, **ROPES[kind]), 512)[0].shape == (16,)
        values = json.loads((tmp_path / "config.json").read_text())
        rope = {"rope_type": kind, "factor": 2.0}
        values |= {"rope_parameters": rope, "rope_scaling": rope}
        (values if beside else rope)["partial_rotary_factor"] = 0.5
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"partial_rotary_factor is 0\.5; only rotary embeddings of whole heads"):
            rope_frequencies(load_model_config(str(tmp_path)), 512)


class TestActivation:
    """SwiGLU's gate."""

    def test_gate_comes_first(self) -> None:
        gate, up = randn(3, 8), randn(3, 8, seed=1)
        out = SiluAndMul(CPU)(torch.cat([gate, up], dim=1))
        torch.testing.assert_close(out, gate * torch.sigmoid(gate) * up)

    def test_only_silu(self) -> None:
        assert isinstance(get_activation("silu", CPU), SiluAndMul)
        with pytest.raises(ValueError, match="hidden_act is 'relu'; only 'silu'"):
            get_activation("relu", CPU)


class TestLinearSplitOverRanks:
    """N ranks together compute what one computes."""

    @pytest.mark.parametrize("size", [1, *SIZES])
    def test_column_parallel(self, size: int) -> None:
        weight, bias, x = randn(24, 10), randn(24, seed=1), randn(5, 10, seed=2)

        def rank(parallel: ParallelGroup) -> tuple[torch.Tensor, ...]:
            layer = ColumnParallelLinear(10, 24, True, parallel, F32, CPU)
            reads = load(layer.weight, {"": weight})[""], load(layer.bias, {"": bias})[""]
            return layer(x), *reads

        outs, weight_reads, bias_reads = zip(*run_ranks(size, rank), strict=True)
        torch.testing.assert_close(torch.cat(outs, dim=1), F.linear(x, weight, bias))
        assert read_once_in_all(list(weight_reads))
        assert read_once_in_all(list(bias_reads))

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("size", [1, *SIZES])
    def test_row_parallel_adds_its_bias_once(self, size: int, bias: bool) -> None:
        weight, b, x = randn(6, 24), 10 + randn(6, seed=1), randn(5, 24, seed=2)

        def rank(parallel: ParallelGroup) -> tuple[torch.Tensor, torch.Tensor]:
            layer = RowParallelLinear(24, 6, bias, parallel, F32, CPU)
            read = load(layer.weight, {"": weight})[""]
            if bias:
                load(layer.bias, {"": b})
            return layer(x.chunk(size, dim=1)[parallel.rank]), read

        outs, reads = zip(*run_ranks(size, rank), strict=True)
        for out in outs:  # every rank has the sum
            torch.testing.assert_close(out, F.linear(x, weight, b if bias else None), rtol=1e-5, atol=1e-5)
        assert read_once_in_all(list(reads))

    @pytest.mark.parametrize("size", [1, *SIZES])
    def test_gate_and_up_are_split_alike(self, size: int) -> None:
        """Each rank holds its part of both, so that the product of the two is its part of the whole."""
        gate, up, x = randn(24, 10), randn(24, 10, seed=1), randn(5, 10, seed=2)

        def rank(parallel: ParallelGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            layer = GateUpParallelLinear(10, 24, parallel, F32, CPU)
            reads = load(layer.weight, {"gate": gate, "up": up})
            return SiluAndMul(CPU)(layer(x)), reads["gate"], reads["up"]

        outs, gate_reads, up_reads = zip(*run_ranks(size, rank), strict=True)
        expected = F.silu(F.linear(x, gate)) * F.linear(x, up)
        torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=1e-5, atol=1e-5)
        assert read_once_in_all(list(gate_reads))
        assert read_once_in_all(list(up_reads))

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
    @pytest.mark.parametrize("size", [1, *SIZES])
    def test_heads_meet_their_key_value_heads(self, size: int, num_kv_heads: int, bias: bool) -> None:
        """Also with fewer KV heads than ranks: neighbours then keep copies of the same one."""
        heads, head_dim, x = 16, 4, randn(3, 10, seed=9)
        shapes = {"q": heads, "k": num_kv_heads, "v": num_kv_heads}
        weights = {name: randn(n * head_dim, 10, seed=ord(name)) for name, n in shapes.items()}
        biases = {name: randn(n * head_dim, seed=ord(name) + 1) for name, n in shapes.items()}
        whole = {
            name: F.linear(x, weights[name], biases[name] if bias else None).view(3, -1, head_dim) for name in shapes
        }

        def rank(parallel: ParallelGroup) -> dict[str, torch.Tensor]:
            layer = QKVParallelLinear(10, head_dim, heads, num_kv_heads, bias, parallel, F32, CPU)
            reads = load(layer.weight, weights)
            if bias:
                load(layer.bias, biases)
            assert layer.num_heads == heads // size
            assert layer.num_kv_heads == max(1, num_kv_heads // size)
            out = layer(x).view(3, -1, head_dim)
            q, k, v = out.split((layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), dim=1)
            for local in range(layer.num_heads):
                head = parallel.rank * layer.num_heads + local
                own_kv = local // (layer.num_heads // layer.num_kv_heads)
                torch.testing.assert_close(q[:, local], whole["q"][:, head])
                for ours, name in ((k, "k"), (v, "v")):
                    torch.testing.assert_close(ours[:, own_kv], whole[name][:, head // (heads // num_kv_heads)])
            return reads

        reads = run_ranks(size, rank)
        assert read_once_in_all([read["q"] for read in reads])
        copies = max(1, size // num_kv_heads)
        for name in ("k", "v"):
            assert (torch.stack([read[name] for read in reads]).sum(0) == copies).all()

    def test_what_does_not_divide_is_refused_by_name(self) -> None:
        third = ParallelGroup(0, 3)
        with pytest.raises(ValueError, match="num_attention_heads is 8, which 3 tensor-parallel ranks do not divide"):
            QKVParallelLinear(8, 4, 8, 4, False, third, F32, CPU)
        with pytest.raises(ValueError, match="num_key_value_heads is 6, which 4 tensor-parallel ranks do not divide"):
            QKVParallelLinear(8, 4, 12, 6, False, ParallelGroup(0, 4), F32, CPU)
        with pytest.raises(ValueError, match="4 tensor-parallel ranks cannot share 3 key-value heads evenly"):
            QKVParallelLinear(8, 4, 12, 3, False, ParallelGroup(0, 4), F32, CPU)
        with pytest.raises(ValueError, match="intermediate_size is 10, which 3 tensor-parallel ranks do not divide"):
            GateUpParallelLinear(8, 10, third, F32, CPU)
        with pytest.raises(ValueError, match="input_size is 10, which 3"):
            RowParallelLinear(10, 8, False, third, F32, CPU)
        with pytest.raises(ValueError, match="output_size is 10, which 3"):
            ColumnParallelLinear(8, 10, False, third, F32, CPU)

    def test_a_tensor_of_the_wrong_shape_is_refused_and_not_read(self) -> None:
        layer = RowParallelLinear(8, 6, False, ParallelGroup(1, 2), F32, CPU)
        source = Source(torch.zeros(6, 4))  # as many columns as the rank keeps, but not as the whole has
        with pytest.raises(ShapeMismatchError, match=r"has shape \[6, 4\], expected \[6, 8\]"):
            layer.weight.load(layer.weight, source, "")
        assert not source.read.any()

    def test_one_rank_needs_no_process_group(self) -> None:
        x = randn(2, 3)
        assert ALONE.all_reduce(x) is x
        assert ALONE.all_gather(x) is x
        assert ALONE.shard(7, "anything") == (0, 7)


class TestVocabularySplitOverRanks:
    """Any vocabulary: divisible, not divisible, and so small that some ranks hold nothing."""

    @pytest.mark.parametrize("vocab_size", [9, 10, 32, 211])
    @pytest.mark.parametrize("size", [1, *SIZES])
    def test_embedding(self, size: int, vocab_size: int) -> None:
        table = randn(vocab_size, 6)
        tokens = torch.randint(0, vocab_size, (40,), generator=torch.Generator().manual_seed(1))
        tokens[:2] = torch.tensor([0, vocab_size - 1])

        def rank(parallel: ParallelGroup) -> tuple[torch.Tensor, torch.Tensor]:
            layer = VocabParallelEmbedding(vocab_size, 6, parallel, F32, CPU)
            layer.weight.data.fill_(math.nan)  # what an uninitialised parameter may hold
            read = load(layer.weight, {"": table})[""]
            return layer(tokens), read

        outs, reads = zip(*run_ranks(size, rank), strict=True)
        for out in outs:
            assert torch.equal(out, table[tokens])
        assert read_once_in_all(list(reads))

    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("vocab_size", [9, 10, 32, 211])
    @pytest.mark.parametrize("size", [1, *SIZES])
    def test_head_keeps_rows_and_columns_apart(self, size: int, vocab_size: int, rows: int) -> None:
        """The gathered parts are columns; laid out one after another in memory they would interleave the rows."""
        table, hidden = randn(vocab_size, 6), randn(rows, 6, seed=1)

        def rank(parallel: ParallelGroup) -> tuple[torch.Tensor, torch.Tensor]:
            layer = ParallelLMHead(vocab_size, 6, parallel, F32, CPU)
            layer.weight.data.fill_(math.nan)
            read = load(layer.weight, {"": table})[""]
            return layer(hidden), read

        outs, reads = zip(*run_ranks(size, rank), strict=True)
        for out in outs:
            torch.testing.assert_close(out, hidden @ table.T)
        assert read_once_in_all(list(reads))

    @pytest.mark.parametrize("vocab_size", [97, 300, 1000])
    @pytest.mark.parametrize("size", [2, 4])
    def test_draws_are_those_of_one_rank(self, size: int, vocab_size: int) -> None:
        """Of logits that no rank has whole; greedy rows, and rows with nothing finite, among them."""
        rows = 60
        logits = randn(rows, vocab_size) * 3
        logits[7] = -math.inf
        logits[8, vocab_size // 2] = math.nan
        logits[9, : vocab_size // 2] = -math.inf
        keys = torch.randint(-(2**31), 2**31, (rows, 2), generator=torch.Generator().manual_seed(2)).to(torch.int32)
        params = SamplingRows(
            temperature=torch.tensor([0.0, 0.5, 1.3]).repeat(rows // 3),
            top_k=torch.zeros(rows, dtype=torch.int64),
            top_p=torch.ones(rows),
            keys=keys,
            positions=torch.arange(rows),
            all_greedy=False,
            any_greedy=True,
            any_truncated=False,
        )
        expected = Sampler(vocab_size, CPU)(logits, params)
        assert expected[7] == expected[8] == -1

        def rank(parallel: ParallelGroup) -> torch.Tensor:
            columns = VocabParallelEmbedding(vocab_size, 6, parallel, F32, CPU).rows
            padded = F.pad(logits, (0, columns * size - vocab_size), value=-math.inf)
            share = padded[:, parallel.rank * columns :][:, :columns]
            return ShardedSampler(columns, CPU, parallel)(share, params)

        for tokens in run_ranks(size, rank):
            assert torch.equal(tokens, expected)

    def test_some_rank_holds_nothing(self) -> None:
        shares = [VocabParallelEmbedding(300, 6, ParallelGroup(rank, 4), F32, CPU).num_ids for rank in range(4)]
        assert shares == [128, 128, 44, 0]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_logits_are_float32(self, dtype: torch.dtype) -> None:
        layer = ParallelLMHead(9, 6, ALONE, dtype, CPU)
        load(layer.weight, {"": randn(9, 6)})
        assert layer(randn(2, 6).to(dtype)).dtype == torch.float32

    def test_tied_head_shares_the_table(self) -> None:
        embedding = VocabParallelEmbedding(9, 6, ALONE, F32, CPU)
        head = ParallelLMHead(9, 6, ALONE, F32, CPU, tied_to=embedding)
        load(embedding.weight, {"": randn(9, 6)})
        hidden = randn(2, 6, seed=1)
        torch.testing.assert_close(head(hidden), hidden @ embedding.weight.T)
        assert head.weight is embedding.weight


class TestModelSplitOverRanks:
    """The whole model from a real checkpoint: every rank gets transformers' logits."""

    TOKENS = (3, 141, 59, 26, 53, 58, 97, 200, 210, 0)

    @pytest.mark.parametrize("tied", [True, False])
    @every_size
    def test_logits(self, tmp_path: Path, size: int, tied: bool) -> None:
        path = write_checkpoint(tmp_path, num_hidden_layers=2, attention_bias=True, tie_word_embeddings=tied)
        expected = reference_logits(load_reference(path), list(self.TOKENS))
        config = load_model_config(str(path))

        def rank(parallel: ParallelGroup) -> torch.Tensor:
            model = Qwen3ForCausalLM(config, 64, parallel, F32, CPU)
            load_weights(model, str(path), model.resolve_weight)
            heads = model.model.layers[0].self_attn.qkv_proj
            spec = AttentionSpec(2, heads.num_heads, heads.num_kv_heads, config.head_dim, F32, CPU, 16)
            count = len(self.TOKENS)
            metadata = AttentionMetadata([count], [count], torch.zeros(1, 0, dtype=torch.int64), torch.zeros(count))
            with torch.inference_mode():
                step = MatmulAttention(spec).begin_step(metadata)
                return model.compute_logits(model(torch.tensor(self.TOKENS), torch.arange(count), step))

        for logits in run_ranks(size, rank):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    def test_heads_that_do_not_divide_are_refused_by_name(self, tmp_path: Path) -> None:
        config = model_config(tmp_path, num_attention_heads=6, num_key_value_heads=2)
        with pytest.raises(ValueError, match="num_attention_heads is 6, which 4 tensor-parallel ranks do not divide"):
            Qwen3ForCausalLM(config, 64, ParallelGroup(0, 4), F32, CPU)


@pytest.mark.parametrize("packing", [TiledWeight, OneDnnWeight])
class TestPackedWeights:
    """Where the processor gains from it, bfloat16 weights are kept in another layout; products stay the same."""

    @pytest.mark.parametrize("rows", [0, 1, 3, 16, 40])
    @pytest.mark.parametrize(("outputs", "inputs"), [(10, 24), (32, 2), (70, 130), (96, 64)])
    def test_products_stay_the_same(self, packing: type[PackedWeight], rows: int, outputs: int, inputs: int) -> None:
        layer = RowParallelLinear(inputs, outputs, True, ALONE, torch.bfloat16, CPU)
        weight, bias = randn(outputs, inputs).bfloat16(), randn(outputs, seed=1).bfloat16()
        load(layer.weight, {"": weight})
        load(layer.bias, {"": bias})
        skip_unless(packing, weight)
        x = randn(rows, inputs, seed=2).bfloat16()
        expected = F.linear(x.double(), weight.double(), bias.double())
        layer.pack(packing)
        assert layer.weight is None
        torch.testing.assert_close(layer(x).double(), expected, rtol=2**-7, atol=2**-6)

    def test_a_tied_embedding_gives_the_same_rows(self, packing: type[PackedWeight]) -> None:
        embedding = VocabParallelEmbedding(70, 6, ALONE, torch.bfloat16, CPU)
        head = ParallelLMHead(70, 6, ALONE, torch.bfloat16, CPU, tied_to=embedding)
        table = randn(70, 6).bfloat16()
        load(embedding.weight, {"": table})
        skip_unless(packing, table)
        head.pack(packing)
        ids = torch.tensor([69, 0, 31, 32, 32])
        assert torch.equal(embedding(ids), table[ids])
        hidden = randn(2, 6, seed=1).bfloat16()
        torch.testing.assert_close(head(hidden), (hidden @ table.T).float(), rtol=2**-7, atol=2**-7)


def skip_unless(packing: type[PackedWeight], weight: torch.Tensor) -> None:
    if not packing.suits(weight):
        pytest.skip("this processor or this torch has no such products")


class TestUnpackedWeights:
    def test_odd_inputs_do_not_fit_pairs(self) -> None:
        assert not TiledWeight.suits(randn(4, 3).bfloat16())

    def test_float32_stays_as_it_is(self) -> None:
        layer = RowParallelLinear(24, 10, False, ALONE, F32, CPU)
        load(layer.weight, {"": randn(10, 24)})
        pack_weights(layer)
        assert torch.equal(layer.weight, randn(10, 24))
