"""The kernels that sample give what the sampler gives by torch's operators.

They run on a GPU where there is one, else in Triton's interpreter.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl

from nanovllm.kernels.nucleus import nucleus, nucleus_reference
from nanovllm.kernels.sample import block_noise, row_words, sample, sample_reference, token_noise
from nanovllm.layers import sampler as sampler_module
from nanovllm.layers.noise import block_words, exponential_noise, token_words
from nanovllm.layers.sampler import Sampler, SamplingRows
from nanovllm.layers.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE
from nanovllm.layers.top_tokens import in_blocks
from tests.bounds import bounds  # noqa: F401
from tests.test_sampler import exact_distribution, make_rows, mixed_rows, request_keys
from tests.test_sampling_statistics import LIMIT, example_logits, p_value
from tests.threads import one_thread  # noqa: F401

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEMPERATURES = [0.0, 1e-38, 1e-20, 0.5, 1.0, 3.0, 1e20, 1e38]
# Of draws from a nucleus: most are as requests have them, since at the limits one draw is like another.
NUCLEUS_TEMPERATURES = [1e-38, 0.3, 0.7, 1.0, 1.0, 1.3, 3.0, 1e38]
TOP_PS = [0.0, 1e-45, 0.01, 0.3, 0.5, 0.8, 0.95, 0.999, 1 - 2**-24, 1.0]
MIN_PS = [0.0, 1e-30, 0.01, 0.05, 0.3, 1.0]


def random_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to_device(rows: SamplingRows) -> SamplingRows:
    for name in ("temperature", "top_k", "top_p", "keys", "positions", "min_p"):
        setattr(rows, name, getattr(rows, name).to(DEVICE))
    return rows


def assert_nearly_all_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """One token in fifty may differ, and one at least: where two noisy weights are as large up to rounding."""
    different = int((found != expected).sum())
    assert different <= max(1, len(found) // 50), (found, expected)


@triton.jit
def noise_kernel(keys, positions, of_tokens, of_blocks, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    key, other_key = tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1)
    second, factor = row_words(tl.load(positions + row), key, other_key)
    words = tl.arange(0, BLOCK)
    tl.store(of_tokens + row * columns + words, token_noise(words, second, factor), mask=words < columns)
    tl.store(of_blocks + row * columns + words, block_noise(words, second, factor), mask=words < columns)


def test_the_noise_is_the_same() -> None:
    """Of words of all kinds: the bits, hence every draw up to the rounding of its logarithm."""
    rows, columns = 60, 5000
    keys = torch.randint(-(2**31), 2**31, (rows, 2), generator=random_generator(0)).to(torch.int32).to(DEVICE)
    keys[0], keys[1, 0], keys[1, 1] = 0, -(2**31), 2**31 - 1
    positions = torch.randint(0, 2**33, (rows,), generator=random_generator(1)).to(DEVICE)
    of_tokens, of_blocks = torch.empty(2, rows, columns, device=DEVICE)
    noise_kernel[(rows,)](keys, positions, of_tokens, of_blocks, columns, BLOCK=triton.next_power_of_2(columns))
    for found, words in ((of_tokens, token_words), (of_blocks, block_words)):
        expected = exponential_noise(keys, positions, words(columns, DEVICE))
        assert expected.min() < 2e-5  # the smallest, which decide most, are among them
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


class TestSample:
    """Rows without top_k, top_p and min_p."""

    @given(
        vocab_size=st.sampled_from([1, 100, 128, 129, 1000, 5000]),
        rows=st.integers(0, 5),
        padding=st.sampled_from([0, 0, 8, 200]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        spread=st.sampled_from([0.0, 0.1, 6.0]),
        seed=st.integers(0, 1000),
        bad=st.lists(st.sampled_from([None, None, torch.nan, torch.inf, -torch.inf]), min_size=5, max_size=5),
    )
    @settings(max_examples=60, deadline=None)
    def test_the_same_tokens(
        self,
        vocab_size: int,
        rows: int,
        padding: int,
        dtype: torch.dtype,
        spread: float,
        seed: int,
        bad: list[float | None],
    ) -> None:
        generator = random_generator(seed)
        padded = (torch.randn(rows, vocab_size + padding, generator=generator) * spread).to(dtype)
        padded[:, vocab_size:] = torch.nan
        number = torch.arange(rows)
        for row, value in zip(range(rows), bad, strict=False):
            if value is not None:
                padded[row, (slice(vocab_size) if value == -torch.inf else seed % vocab_size)] = value
        temperature = torch.tensor(TEMPERATURES)[(number + seed) % len(TEMPERATURES)]
        given_rows = to_device(make_rows(request_keys(rows), number + seed, temperature))
        logits, rest = padded.to(DEVICE), (given_rows.temperature, given_rows.keys, given_rows.positions, vocab_size)
        before = logits.clone()

        found = sample(logits, *rest)
        assert torch.equal(logits.nan_to_num(), before.nan_to_num())
        assert found.dtype == torch.int64
        sampler = Sampler(vocab_size, DEVICE, use_kernels=False)
        for expected in (sampler(logits, given_rows), sample_reference(logits, *rest)) if rows else ():
            assert_nearly_all_equal(found, expected)
            assert torch.equal(found == -1, expected == -1)
            greedy = (temperature == 0).to(DEVICE)
            assert torch.equal(found[greedy], expected[greedy])

    def test_nearly_every_draw_of_many(self) -> None:
        """The rows' parameters as columns of a wider table, as the engine keeps them."""
        rows, vocab_size = 150, 700
        table = torch.zeros(rows, 6, dtype=torch.int32)
        table[:, 4:] = request_keys(rows)
        table.view(torch.float32)[:, 0] = torch.linspace(0.3, 2.0, rows)
        table = table.to(DEVICE)
        temperature, keys = table.view(torch.float32)[:, 0], table[:, 4:]
        positions = torch.arange(3, 3 + rows, device=DEVICE)
        wide = torch.randn(rows, 997, generator=random_generator(0)).to(DEVICE)
        logits = wide[:, 90:]  # neither the start nor the distance of its rows is aligned
        found = sample(logits, temperature, keys, positions, vocab_size)
        expected = sample_reference(logits, temperature, keys, positions, vocab_size)
        assert (found != expected).sum() <= 1
        assert len(found.unique()) > 100
        assert torch.equal(sample(logits, temperature, keys, positions.int(), vocab_size), found)

    @pytest.mark.parametrize("vocab_size", [40, 5000])
    def test_greedy_takes_the_lowest_id_of_several(self, vocab_size: int) -> None:
        logits = torch.randint(-3, 3, (20, vocab_size), generator=random_generator(0)).float() * 0.0
        logits[10:] = torch.randint(-3, 3, (10, vocab_size), generator=random_generator(1)).float()
        logits[5:8, : vocab_size // 2] = -torch.inf
        rows = to_device(make_rows(request_keys(20), torch.arange(20), 0.0))
        found = sample(logits.to(DEVICE), rows.temperature, rows.keys, rows.positions, vocab_size)
        assert torch.equal(found, logits.to(DEVICE).argmax(dim=-1))

    def test_draws_follow_the_distribution(self) -> None:
        draws, temperature = 500 if DEVICE.type == "cpu" else 100_000, 1.3
        logits = example_logits(200) - 4
        logits[::20] += 6  # of either block
        keys, positions = request_keys(100).repeat(draws // 100, 1), torch.arange(draws) // 100
        rows = to_device(make_rows(keys, positions, temperature))
        expanded = logits.to(DEVICE).expand(draws, -1)
        tokens = sample(expanded, rows.temperature, rows.keys, rows.positions, 200).cpu()
        assert p_value(tokens, exact_distribution(logits, temperature)) > LIMIT
        assert p_value(tokens, exact_distribution(logits, temperature / 2)) < LIMIT

    @pytest.mark.gpu
    def test_a_graph_can_hold_it(self) -> None:
        logits = torch.randn(8, 151_936, device=DEVICE, dtype=torch.bfloat16)
        rows = to_device(make_rows(request_keys(8), torch.arange(8), 0.8))
        arguments = logits, rows.temperature.contiguous(), rows.keys, rows.positions, 151_936
        sample(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = sample(*arguments)
        for _ in range(3):
            logits.normal_()
            rows.positions += 1
            graph.replay()
            assert torch.equal(found, sample(*arguments))
            assert_nearly_all_equal(found, sample_reference(*arguments))


def nucleus_case(
    rows: int, vocab_size: int, seed: int, min_p: bool, dtype: torch.dtype, ties: bool
) -> tuple[torch.Tensor, SamplingRows, Any]:
    """Logits, parameters, and what the sampler knows of them by the time it draws."""
    generator = random_generator(seed)
    logits = torch.randn(rows, vocab_size, generator=generator)
    logits = ((logits * 2).round() if ties else logits).to(dtype).to(DEVICE)
    kept = to_device(
        make_rows(
            request_keys(rows),
            torch.arange(rows) + seed,
            temperature=torch.rand(rows, generator=generator) + 0.5,
            top_p=torch.rand(rows, generator=generator) * 0.99,
            min_p=0.05 if min_p else 0.0,
        )
    )
    sampler = Sampler(vocab_size, DEVICE, use_kernels=False)
    return logits, kept, sampler_module._Batch(sampler, logits.float(), kept)


def assert_is_kept(token: int, logits: torch.Tensor, rows: SamplingRows, row: int) -> None:
    """That min_p and top_p leave a token, up to the rounding of its weight and of those ahead of it."""
    assert 0 <= token < len(logits)
    temperature = float(rows.temperature[row].clamp(MIN_TEMPERATURE, MAX_TEMPERATURE))
    weights = ((logits.double() - logits.max().double()) / temperature).exp()
    assert weights[token] >= float(rows.min_p[row]) * (1 - 1e-4)
    kept = weights * (weights >= float(rows.min_p[row]) * (1 - 1e-4))
    earlier = torch.arange(len(logits), device=logits.device) < token
    ahead = kept[(logits > logits[token]) | ((logits == logits[token]) & earlier)].sum()
    assert ahead == 0 or ahead < (float(rows.top_p[row]) + 1e-4) * kept.sum()


class TestNucleus:
    """Rows with a top_p alone, whose kept tokens are many."""

    @pytest.mark.parametrize("min_p", [False, True])
    @pytest.mark.parametrize(
        ("vocab_size", "dtype", "ties"),
        [
            (1, torch.float32, False),
            (100, torch.float32, True),
            (129, torch.bfloat16, False),
            (1000, torch.float32, True),
            (5000, torch.bfloat16, False),
        ],
    )
    def test_the_same_tokens(self, vocab_size: int, dtype: torch.dtype, ties: bool, min_p: bool) -> None:
        rows, missing = 24, -7
        logits, kept, batch = nucleus_case(rows, vocab_size, vocab_size, min_p, dtype, ties)
        pending = torch.arange(rows, device=DEVICE) % 4 > 0
        found, other = torch.full((2, rows), missing, device=DEVICE)
        rest = (kept.temperature, kept.min_p if min_p else None, kept.top_p, kept.keys, kept.positions, pending)
        nucleus(logits, batch.sums, batch.peaks, *rest, found, vocab_size)
        nucleus_reference(logits, batch.sums, batch.peaks, *rest, other, vocab_size)
        expected = torch.full_like(found, missing)
        index = pending.nonzero()[:, 0]
        expected[index] = batch._draw_nucleus(index)
        assert torch.equal(found == missing, ~pending)
        assert_nearly_all_equal(found, expected)
        assert_nearly_all_equal(found, other)

    @given(
        vocab_size=st.one_of(st.integers(1, 700), st.sampled_from([127, 128, 129, 1000, 4097])),
        rows=st.sampled_from([12, 1, 5, 16]),
        before=st.integers(0, 9),
        behind=st.sampled_from([0, 1, 50, 200]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        spread=st.sampled_from([2.0, 0.0, 0.1, 20.0]),
        has_min_p=st.sampled_from([True, True, False]),
        pending_share=st.sampled_from([0.8, 0.8, 1.0, 0.0]),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=25, deadline=None, derandomize=True)
    def test_any_shape_any_parameters(
        self,
        vocab_size: int,
        rows: int,
        before: int,
        behind: int,
        dtype: torch.dtype,
        spread: float,
        has_min_p: bool,
        pending_share: float,
        seed: int,
    ) -> None:
        """Logits, sums and parameters are parts of wider tables, as the engine keeps them; NaN lies around."""
        missing, generator = -7, random_generator(seed)
        wide = torch.full((rows, before + vocab_size + behind), torch.nan)
        wide[:, before : before + vocab_size] = torch.randn(rows, vocab_size, generator=generator) * spread
        logits = wide.to(dtype).to(DEVICE)[:, before:]
        columns = torch.full((rows, 7), torch.nan)
        for column, values in enumerate((NUCLEUS_TEMPERATURES, TOP_PS, MIN_PS if has_min_p else [0.0])):
            columns[:, 2 * column] = torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]
        temperature, top_p, min_p = columns.to(DEVICE)[:, :6:2].unbind(dim=1)
        positions = torch.stack([torch.arange(rows) + seed, torch.full((rows,), -1)], dim=1).to(DEVICE)[:, 0]
        keys = torch.cat([request_keys(rows), torch.zeros(rows, 3, dtype=torch.int32)], dim=1).to(DEVICE)[:, :2]
        given_rows = to_device(make_rows(keys, positions, temperature, top_p=top_p, min_p=min_p))
        sampler = Sampler(vocab_size, DEVICE, use_kernels=False)
        batch = sampler_module._Batch(sampler, logits[:, :vocab_size].float(), given_rows)
        sums = torch.cat([batch.sums, torch.full((rows, 3), torch.nan, device=DEVICE)], dim=1)[:, :-3]
        pending = (torch.rand(rows, generator=generator) < pending_share).to(DEVICE)
        found, expected = torch.full((2, rows), missing, device=DEVICE)
        rest = (temperature, min_p if has_min_p else None, top_p, keys, positions, pending)
        nucleus(logits, sums, batch.peaks, *rest, found, vocab_size)
        nucleus_reference(logits, sums, batch.peaks, *rest, expected, vocab_size)
        assert torch.equal(found == missing, ~pending)
        if DEVICE.type == "cpu":  # interpreted, it rounds as torch does, but for the order of sums
            assert torch.equal(found, expected)
        assert_nearly_all_equal(found, expected)
        for row in pending.nonzero()[:, 0].tolist():
            assert_is_kept(int(found[row]), batch.blocks[row].flatten()[:vocab_size], given_rows, row)

    def test_what_min_p_leaves_out_is_never_drawn_first(self) -> None:
        """It would be rejected, and another draw made, which would be another token."""
        rows, vocab_size = 40, 200
        logits = torch.randn(rows, vocab_size, generator=random_generator(0)).to(DEVICE) * 2
        kept = to_device(make_rows(request_keys(rows), torch.arange(rows), temperature=2.0, top_p=0.9, min_p=0.3))
        batch = sampler_module._Batch(Sampler(vocab_size, DEVICE, use_kernels=False), logits, kept)
        found = torch.full((rows,), -7, device=DEVICE)
        rest = (kept.temperature, kept.min_p, kept.top_p, kept.keys, kept.positions, torch.ones_like(found).bool())
        nucleus(logits, batch.sums, batch.peaks, *rest, found, vocab_size)
        assert_nearly_all_equal(found, batch._draw_nucleus(batch.everything))

    def test_many_attempts(self) -> None:
        """A top_p that nearly every draw misses: tokens of the nucleus alone, and several attempts each."""
        rows, vocab_size = 20, 3000
        kept = to_device(make_rows(request_keys(rows), torch.arange(rows), top_p=0.05))
        logits = torch.zeros(rows, vocab_size, device=DEVICE)
        batch = sampler_module._Batch(Sampler(vocab_size, DEVICE, use_kernels=False), logits, kept)
        assert (batch._draw(batch.everything, batch.sums) >= 150).sum() > 10
        found = torch.full((rows,), -7, device=DEVICE)
        rest = (kept.temperature, None, kept.top_p, kept.keys, kept.positions, torch.ones_like(found).bool())
        nucleus(logits, batch.sums, batch.peaks, *rest, found, vocab_size)
        assert found.min() >= 0
        assert found.max() < 150
        assert torch.equal(found, batch._draw_nucleus(batch.everything))

    @pytest.mark.parametrize("top_p", [0.0, 1e-45, 0.5, 1.0])
    def test_it_ends_whatever_it_is_given(self, top_p: float) -> None:
        logits = torch.zeros(5, 300)
        logits[0, 7], logits[1, 8], logits[2], logits[3, 1:] = torch.nan, torch.inf, -torch.inf, -torch.inf
        kept = to_device(make_rows(request_keys(5), torch.arange(5), temperature=1e-20, top_p=top_p))
        logits, found = logits.to(DEVICE), torch.full((5,), -7, device=DEVICE)
        peaks, sums = logits.amax(dim=-1), in_blocks(logits).exp().sum(dim=-1)
        rest = (kept.temperature, None, kept.top_p, kept.keys, kept.positions, torch.ones_like(found).bool())
        nucleus(logits, sums, peaks, *rest, found, 300)
        assert found[:4].tolist() == [-7, -7, -7, 0]
        assert 0 <= found[4] < 300

    def test_no_rows(self) -> None:
        logits, kept, batch = nucleus_case(1, 300, 0, False, torch.float32, False)
        none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
        rest = (kept.temperature[:0], None, kept.top_p[:0], kept.keys[:0], none, none.bool(), none, 300)
        nucleus(logits[:0], batch.sums[:0], batch.peaks[:0], *rest)


class Elsewhere(sampler_module._Batch):
    """As on a device that is not waited for."""

    host_may_look = property(lambda self: False, lambda self, value: None)


class TestThroughTheSampler:
    """With kernels, and without a wait."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_mixed_batches(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        logits = torch.randn(100, 310, generator=random_generator(0)).to(dtype).to(DEVICE)
        sampler = Sampler(300, DEVICE, use_kernels=False)
        mixed, plain = to_device(mixed_rows(100)), to_device(make_rows(request_keys(100), torch.arange(100)))
        expected = [sampler(logits[:, :300].float(), rows) for rows in (mixed, plain)]
        monkeypatch.setattr(sampler_module, "_Batch", Elsewhere)
        calls = []

        def counted(kernel: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments: (calls.append(kernel.__name__), kernel(*arguments))[1]

        sampler.sample_kernel, sampler.nucleus_kernel = counted(sample), counted(nucleus)
        for rows, tokens in zip((mixed, plain), expected, strict=True):
            assert_nearly_all_equal(sampler(logits, rows), tokens)
        assert calls == ["nucleus", "sample"]

    @pytest.mark.parametrize("with_kernels", [True, False])
    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("greedy", {"temperature": 0.0}),
            ("plain", {}),
            ("some greedy", {"temperature": torch.tensor([0.0, 1.0])}),
            ("top_k", {"top_k": torch.tensor([3, 100])}),
            ("top_k of the vocabulary", {"top_k": torch.tensor([3, 1000])}),
            ("top_p", {"top_p": 0.9}),
            ("top_k or top_p", {"top_k": torch.tensor([0, 4]), "top_p": 0.9}),
            ("min_p", {"min_p": 0.1}),
            ("all", {"temperature": torch.tensor([0.0, 1.0]), "top_p": 0.9, "min_p": torch.tensor([0.0, 0.1])}),
        ],
        ids=str,
    )
    def test_the_host_reads_nothing_from_a_gpu(
        self, monkeypatch: pytest.MonkeyPatch, name: str, parameters: dict[str, Any], with_kernels: bool
    ) -> None:
        """Tensors of the meta device have no contents: what depends on them fails."""

        def fake_sample(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
            return torch.empty(len(logits), dtype=torch.int64, device=logits.device)

        fakes = {"sample": fake_sample, "nucleus": lambda *arguments: None}
        monkeypatch.setattr(sampler_module.kernels, "load", lambda name, *_: fakes.get(name) if with_kernels else None)
        rows = make_rows(request_keys(2), torch.arange(2), **parameters)
        for field in ("temperature", "top_k", "top_p", "keys", "positions", "min_p"):
            setattr(rows, field, getattr(rows, field).to("meta"))
        monkeypatch.setattr(torch, "tensor", None)  # from host memory, which waits
        sampler = Sampler(300, torch.device("meta"))
        logits = torch.empty(2, 300, device="meta")
        assert sampler(logits, rows).shape == (2,)
