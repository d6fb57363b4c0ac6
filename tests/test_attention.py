"""Attention backends against a naive float64 reference: every shape, every mixture of rows, any state of the cache."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanovllm import LLM, SamplingParams, kernels
from nanovllm.attention import BACKENDS, AttentionBackend, AttentionSpec, matmul, select_backend
from nanovllm.attention.base import AttentionMetadata
from tests.threads import one_thread  # noqa: F401

CPU = torch.device("cpu")
SPEC = AttentionSpec(
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, device=CPU, block_size=16
)
BACKENDS_HERE = [name for name, backend in BACKENDS.items() if backend.why_not(SPEC) is None]
every_backend = pytest.mark.parametrize("name", BACKENDS_HERE)
# Interpreted kernels are too slow for as many examples: tests/test_paged_attention.py draws theirs.
every_fast_backend = pytest.mark.parametrize("name", [name for name in BACKENDS_HERE if name != "triton"])


def blocks_served(name: str, block_size: int) -> int:
    """``block_size`` or, if the backend serves no such blocks, the smallest that it does."""
    served = BACKENDS[name].why_not(replace(SPEC, block_size=block_size)) is None
    return block_size if served else BACKENDS[name].default_block_size


# The same examples in every run, and no limits of time: the machine may be busy.
examples = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Row:
    """A sequence in a step: tokens computed before it, and tokens computed in it."""

    history: int
    queries: int


@dataclass(frozen=True)
class Case:
    """Attention of some shape, and the rows of a step."""

    num_kv_heads: int
    group: int  # query heads a KV head
    head_dim: int
    block_size: int
    rows: tuple[Row, ...]
    seed: int = 0

    def spec(self, **changes: Any) -> AttentionSpec:
        return replace(
            SPEC,
            num_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            **changes,
        )


def lengths(block_size: int) -> st.SearchStrategy[int]:
    """Some that end with a block among them."""
    return st.one_of(st.integers(0, 40), st.sampled_from([block_size, 2 * block_size, block_size - 1, block_size + 1]))


@st.composite
def cases(draw: st.DrawFn, history: bool = True) -> Case:
    block_size = draw(st.sampled_from([1, 3, 16, 256]))
    row = st.builds(
        Row,
        history=lengths(block_size) if history else st.just(0),
        queries=st.one_of(st.just(1), lengths(block_size).filter(bool)),
    )
    return Case(
        num_kv_heads=draw(st.integers(1, 4)),
        group=draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from([8, 32, 48, 80])),
        block_size=block_size,
        rows=tuple(draw(st.lists(row, min_size=1, max_size=6))),
        seed=draw(st.integers(0, 1000)),
    )


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of the last queries of a sequence to all of it, head by head, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(q.shape[2])
        out[:, head] = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=1) @ v[:, head // group]
    return out


class Simulation:
    """A backend with a cache, and what it should have been told: random sequences in shuffled blocks.

    Args:
        garbage: What the cache holds before anything is written to it.
    """

    def __init__(self, case: Case, name: str, garbage: float | None = None, layer: int = 1, **changes: Any) -> None:
        case = replace(case, block_size=blocks_served(name, case.block_size))
        spec = case.spec(**changes)
        self.backend: AttentionBackend = BACKENDS[name](spec)
        self.case, self.spec, self.layer = case, spec, layer
        self.random = torch.Generator().manual_seed(case.seed)
        blocks = [-(-(row.history + row.queries) // case.block_size) for row in case.rows]
        num_blocks = sum(blocks) + 3
        self.backend.allocate_cache(num_blocks)
        for tensor in tree_leaves(self.backend.kv_cache()):
            tensor.fill_(math.nan if garbage is None else garbage)
        order = torch.randperm(num_blocks, generator=self.random)
        # Beyond a row's own blocks its table names any others, as a table does that was used before.
        self.tables = torch.randint(0, num_blocks, (len(blocks), max(blocks) + 2), generator=self.random)
        for row, own in enumerate(order[: sum(blocks)].split(blocks)):
            self.tables[row, : len(own)] = own
        totals = [row.history + row.queries for row in case.rows]
        self.q = [self.tensor(row.queries, spec.num_heads) for row in case.rows]
        self.k = [self.tensor(total, spec.num_kv_heads) for total in totals]
        self.v = [self.tensor(total, spec.num_kv_heads) for total in totals]

    def tensor(self, tokens: int, heads: int) -> torch.Tensor:
        values = torch.randn(tokens, heads, self.spec.head_dim, generator=self.random) * 2
        return values.to(self.spec.dtype)

    def metadata(self, starts: list[int], counts: list[int], rows: list[int]) -> AttentionMetadata:
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        size = self.case.block_size
        slots = []
        for row, start, end in zip(rows, starts, ends, strict=True):
            positions = torch.arange(start, end)
            slots.append(self.tables[row, positions // size] * size + positions % size)
        width = -(-max(ends) // size)
        return AttentionMetadata(counts, ends, self.tables[rows, :width], torch.cat(slots))

    def run(self, starts: list[int], counts: list[int], rows: list[int], q: list[torch.Tensor]) -> torch.Tensor:
        """One step: these tokens of these rows."""
        step = self.backend.begin_step(self.metadata(starts, counts, rows))
        pieces = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        k = torch.cat([self.k[row][piece] for row, piece in zip(rows, pieces, strict=True)])
        v = torch.cat([self.v[row][piece] for row, piece in zip(rows, pieces, strict=True)])
        return step.attend(self.layer, torch.cat(q), k, v)

    def compute_history(self) -> None:
        rows = [index for index, row in enumerate(self.case.rows) if row.history]
        if rows:
            counts = [self.case.rows[row].history for row in rows]
            self.run([0] * len(rows), counts, rows, [self.tensor(count, self.spec.num_heads) for count in counts])

    def compute_queries(self) -> torch.Tensor:
        rows = self.case.rows
        return self.run([row.history for row in rows], [row.queries for row in rows], list(range(len(rows))), self.q)

    def expected(self) -> torch.Tensor:
        return torch.cat([naive(q, k, v) for q, k, v in zip(self.q, self.k, self.v, strict=True)])


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-5)


class TestAgainstTheNaiveReference:
    """The three cases, and their mixtures."""

    @every_fast_backend
    @examples
    @given(case=cases(history=False))
    def test_without_a_cache(self, name: str, case: Case) -> None:
        simulation = Simulation(case, name)
        bare = BACKENDS[name](simulation.spec)
        counts = [row.queries for row in case.rows]
        nowhere = torch.zeros(len(counts), 0, dtype=torch.int64)
        step = bare.begin_step(
            AttentionMetadata(counts, list(counts), nowhere, torch.zeros(sum(counts), dtype=torch.int64))
        )
        out = step.attend(0, torch.cat(simulation.q), torch.cat(simulation.k), torch.cat(simulation.v))
        assert_close(out, simulation.expected())
        assert bare.kv_cache() is None

    @every_fast_backend
    @examples
    @given(case=cases(history=False))
    def test_prompts_without_history(self, name: str, case: Case) -> None:
        simulation = Simulation(case, name)
        assert_close(simulation.compute_queries(), simulation.expected())

    @every_fast_backend
    @examples
    @given(case=cases())
    def test_paged_with_history_in_mixed_batches(self, name: str, case: Case) -> None:
        simulation = Simulation(case, name)
        simulation.compute_history()
        assert_close(simulation.compute_queries(), simulation.expected())

    @every_backend
    @pytest.mark.parametrize("block_size", [1, 3, 16, 256])
    def test_token_by_token_equals_all_at_once(self, name: str, block_size: int) -> None:
        total = 2 * block_size if block_size < 256 else 258
        case = Case(2, 3, 16, block_size, (Row(0, total), Row(0, total)))
        whole = Simulation(case, name)
        expected = whole.compute_queries().view(2, total, *whole.q[0].shape[1:])
        # all are in the cache already; of many, those at the ends of blocks
        for position in range(total) if total < 100 else (0, 1, 63, 64, 254, 255, 256, 257):
            one = [q[position : position + 1] for q in whole.q]
            out = whole.run([position] * 2, [1] * 2, [0, 1], one)
            torch.testing.assert_close(out, expected[:, position], rtol=1e-5, atol=1e-5)

    @every_backend
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, name: str, dtype: torch.dtype) -> None:
        case = Case(2, 4, 32, 16, (Row(40, 1), Row(0, 33), Row(16, 5), Row(31, 1)))
        if BACKENDS[name].why_not(case.spec(dtype=dtype)):
            pytest.skip(f"{name} does not serve {dtype}")
        simulation = Simulation(case, name, dtype=dtype)
        simulation.compute_history()
        out = simulation.compute_queries()
        assert out.dtype == dtype
        # Scores, weights and sums are rounded to the dtype once each; a softmax in it too would exceed the mean.
        error = (out.double() - simulation.expected()).abs() / torch.finfo(dtype).eps
        assert error.max() < 16
        assert error.mean() < 0.65

    @every_backend
    def test_float16_scores_beyond_its_largest_number(self, name: str) -> None:
        """Products of 65,504 and more are harmless once they are divided by the root of head_dim."""
        case = Case(1, 2, 64, 16, (Row(20, 1), Row(0, 9)))
        if BACKENDS[name].why_not(case.spec(dtype=torch.float16)):
            pytest.skip(f"{name} does not serve float16")
        simulation = Simulation(case, name, dtype=torch.float16)
        for tensors in (simulation.q, simulation.k):
            for tensor in tensors:
                tensor.fill_(40.0)
        simulation.compute_history()
        out = simulation.compute_queries()
        torch.testing.assert_close(out.double(), simulation.expected(), rtol=5e-3, atol=5e-3)


class TestCache:
    """Only what a sequence wrote is read, and only its own places are written."""

    @every_backend
    @pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
    @pytest.mark.parametrize("block_size", [1, 3, 16, 256])
    def test_garbage_beyond_a_context_does_not_leak(self, name: str, block_size: int, garbage: float) -> None:
        """Contexts of very different length, so that the short ones are padded, and one that fills its blocks."""
        rows = (Row(1, 1), Row(2 * block_size - 1, 1), Row(30, 1), Row(25, 1), Row(20, 3), Row(0, 5), Row(0, 1))
        simulation = Simulation(Case(2, 2, 16, block_size, rows), name, garbage)
        simulation.compute_history()
        assert_close(simulation.compute_queries(), simulation.expected())

    @every_backend
    def test_other_layers_and_other_blocks_are_left_alone(self, name: str) -> None:
        case = Case(2, 2, 16, 4, (Row(5, 1), Row(3, 4), Row(0, 9)))
        simulation = Simulation(case, name, garbage=7.0, layer=1)
        simulation.compute_history()
        simulation.compute_queries()
        changed = [tensor != 7.0 for tensor in tree_leaves(simulation.backend.kv_cache())]
        written = sum((row.history + row.queries) for row in case.rows) * 2 * 2 * 16  # keys and values
        assert sum(int(tensor.sum()) for tensor in changed) == written
        other = Simulation(case, name, garbage=7.0, layer=0)
        other.compute_history()
        for tensor, places in zip(tree_leaves(other.backend.kv_cache()), changed, strict=True):
            assert not ((tensor != 7.0) & places).any()

    @every_backend
    def test_inputs_may_be_views_of_the_fused_projection(self, name: str) -> None:
        """q, k and v as neighbouring columns of one tensor, and even with their strides reversed."""
        case = Case(2, 2, 16, 4, (Row(6, 1), Row(0, 9), Row(8, 3)))
        simulation = Simulation(case, name)
        simulation.compute_history()
        rows = list(range(3))
        starts, counts = [6, 0, 8], [1, 9, 3]
        pieces = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        q = torch.cat(simulation.q)
        k = torch.cat([simulation.k[row][piece] for row, piece in enumerate(pieces)])
        v = torch.cat([simulation.v[row][piece] for row, piece in enumerate(pieces)])
        fused = torch.cat([q, k, v], dim=1).flatten(1)
        views = fused.view(13, 8, 16).split((4, 2, 2), dim=1)
        for given_q, given_k, given_v in (views, [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v)]):
            assert not given_q.is_contiguous()
            step = simulation.backend.begin_step(simulation.metadata(starts, counts, rows))
            assert_close(step.attend(simulation.layer, given_q, given_k, given_v), simulation.expected())
        assert torch.equal(fused.view(13, 8, 16)[:, :4], q)  # nothing was written into them


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation makes; views of what was there before do not count."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        old = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.elements = max(self.elements, tensor.numel())
        return result


class TestCost:
    """What the matmul backend does not spend."""

    @pytest.mark.parametrize("rows", [(Row(120, 8),), (Row(127, 1),) * 4], ids=["chunk", "decode"])
    def test_shared_heads_are_never_repeated_in_memory(self, rows: tuple[Row, ...]) -> None:
        simulation = Simulation(Case(num_kv_heads=2, group=8, head_dim=64, block_size=16, rows=rows), "matmul")
        simulation.compute_history()
        with LargestTensor() as largest:
            out = simulation.compute_queries()
        assert_close(out, simulation.expected())
        gathered_keys, scores = len(rows) * 2 * 128 * 64, 16 * sum(row.queries for row in rows) * 128
        assert largest.elements == max(gathered_keys, scores)

    @pytest.mark.parametrize("max_scores", [1, 300, 5000])
    @pytest.mark.parametrize("history", [0, 21])
    def test_long_prompts_attend_in_slices(
        self, monkeypatch: pytest.MonkeyPatch, max_scores: int, history: int
    ) -> None:
        case = Case(num_kv_heads=2, group=4, head_dim=8, block_size=16, rows=(Row(history, 47), Row(3, 1), Row(0, 20)))
        simulation = Simulation(case, "matmul")
        simulation.compute_history()
        monkeypatch.setattr(matmul, "MAX_SCORES", max_scores)
        with LargestTensor() as largest:
            out = simulation.compute_queries()
        assert_close(out, simulation.expected())
        context = history + 47
        one_query = 8 * context
        keys_and_inputs = 2 * 68 * 2 * 8 + 68 * 8 * 8
        assert largest.elements <= max(max_scores, one_query, keys_and_inputs)

    @pytest.mark.parametrize("max_gathered", [1, 2000, 5000])
    def test_many_decode_rows_gather_a_few_at_a_time(self, monkeypatch: pytest.MonkeyPatch, max_gathered: int) -> None:
        monkeypatch.setattr(matmul, "MAX_GATHERED", max_gathered)
        rows = tuple(Row(history, 1) for history in (30, 31, 17, 1, 60, 64, 33, 2))
        simulation = Simulation(Case(num_kv_heads=2, group=4, head_dim=8, block_size=4, rows=rows), "matmul")
        simulation.compute_history()
        with LargestTensor() as largest:
            assert_close(simulation.compute_queries(), simulation.expected())
        one_row = 2 * 68 * 8
        assert largest.elements <= max(1.25 * max_gathered, one_row)  # with the blocks' last places

    @examples
    @given(contexts=st.lists(st.integers(2, 3000), min_size=1, max_size=40), block_size=st.sampled_from([1, 16, 256]))
    def test_decode_groups_hold_each_row_once_and_waste_little(self, contexts: list[int], block_size: int) -> None:
        backend = matmul.MatmulAttention(replace(SPEC, block_size=block_size))
        backend.allocate_cache(1)
        tables = torch.zeros(len(contexts), -(-max(contexts) // block_size), dtype=torch.int64)
        mapping = torch.zeros(len(contexts), dtype=torch.int64)
        step = backend.begin_step(AttentionMetadata([1] * len(contexts), list(contexts), tables, mapping))
        tokens = torch.cat([group.tokens for group in step.decodes]).tolist()
        assert sorted(tokens) == list(range(len(contexts)))
        assert not step.prefills
        for group in step.decodes:
            lengths = [contexts[token] for token in group.tokens.tolist()]
            assert min(lengths) >= matmul.MIN_FILL * max(lengths) - 2 * block_size
            # the mask leaves each row its context, and pads to whole blocks
            assert (~group.beyond).sum(-1).flatten().tolist() == lengths
            assert group.beyond.shape[-1] == -(-max(lengths) // block_size) * block_size


class TestSelection:
    """Which backend serves a model, and what is said if none does."""

    def test_auto_interprets_no_kernels(self) -> None:
        compiled = "matmul" if kernels.why_no_cpu_kernels() else "cpu"
        assert select_backend("auto", SPEC) is BACKENDS[compiled]

    @every_backend
    def test_by_name(self, name: str) -> None:
        assert select_backend(name, SPEC) is BACKENDS[name]

    @pytest.mark.parametrize("wrong", ["flashy", "", None])
    def test_unknown_name_lists_the_known(self, wrong: Any) -> None:
        with pytest.raises(ValueError, match=rf"attention_backend is {wrong!r}; use auto.*matmul"):
            select_backend(wrong, SPEC)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "auto",
                r"no attention backend serves 4 query heads, .*, int8, .*on cpu \(cpu: dtype torch\.int8 is not "
                r"bfloat16 or float32; matmul: dtype torch\.int8 is not",
            ),
            ("matmul", r"attention_backend is 'matmul', but dtype torch\.int8 is not a floating-point type"),
        ],
    )
    def test_reasons_are_given_if_none_can(self, name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            select_backend(name, replace(SPEC, dtype=torch.int8))

    def test_unknown_backend_is_refused_by_the_engine(self, tiny_checkpoint: Path) -> None:
        with pytest.raises(ValueError, match=r"attention_backend is 'flashy'; use auto.*matmul"):
            LLM(tiny_checkpoint, device="cpu", skip_tokenizer_init=True, attention_backend="flashy")

    def test_block_size_must_be_known_when_a_backend_is_made(self) -> None:
        with pytest.raises(ValueError, match="block_size must be set"):
            matmul.MatmulAttention(replace(SPEC, block_size=None))

    def test_bytes_per_token_counts_keys_and_values_of_all_layers(self) -> None:
        assert SPEC.bytes_per_token() == 2 * 2 * 2 * 16 * 4
        published = AttentionSpec(28, 16, 8, 128, torch.bfloat16, CPU)
        assert published.bytes_per_token() == 112 * 1024


def test_profiling_run_computes_what_a_prompt_computes(tiny_checkpoint: Path) -> None:
    """Without a cache it is the same arithmetic, so the memory it takes is a real step's."""
    captured = []
    with LLM(
        tiny_checkpoint,
        device="cpu",
        skip_tokenizer_init=True,
        num_kvcache_blocks=64,
        max_model_len=24,
        enable_prefix_caching=False,
    ) as llm:
        runner = llm.engine.runner
        runner.sampler.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0].clone()))
        params = SamplingParams(temperature=0, max_tokens=1)
        llm.generate([[0] * length for length in range(1, 24)], params, use_tqdm=False)
        normal = torch.cat(captured)  # a row a prompt: the logits after 1, 2, ... tokens

        cached = runner.attention
        runner.attention = type(cached)(cached.spec)  # as it is before the cache is allocated
        with torch.inference_mode():
            profiled = runner.run_without_cache(60)  # prompts of 24, 24 and 12 tokens
    assert profiled.shape == (60, normal.shape[1])
    for first in (0, 24):
        torch.testing.assert_close(profiled[first : first + 23], normal, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(profiled[48:], normal[:12], rtol=1e-4, atol=1e-5)
