"""The CPU's kernels against float64, and against what the layers do with torch's operators where there are none."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovllm import kernels

if (reason := kernels.why_no_cpu_kernels()) is not None:
    pytest.skip(reason, allow_module_level=True)

from numba import njit, types

from nanovllm.kernels.cpu import kv_cache, linear, tiles, vectors
from nanovllm.kernels.cpu.block_sums import block_sums
from nanovllm.kernels.cpu.embedding import embedding
from nanovllm.kernels.cpu.qk_norm_rope_store import _next_block, qk_norm_rope_store
from nanovllm.kernels.cpu.rms_norm import rms_norm
from nanovllm.kernels.cpu.silu_and_mul import silu_and_mul
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.product import TiledWeight
from nanovllm.layers.rotary_embedding import apply_rotary
from nanovllm.utils import huge_pages
from tests.threads import one_thread, threads  # noqa: F401

CPU = torch.device("cpu")
DTYPES = st.sampled_from((torch.bfloat16, torch.float32))
PADDINGS = st.sampled_from((0, 1, 16))
SEEDS = st.integers(0, 2**31)
EPS = 1e-6
# What a defect or an overflow may leave in an activation; the last three are a denormal, the smallest one, and none.
EXTREMES = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e20, -1e20, 1e-39, -1e-45, 0.0)


def examples(count: int) -> settings:
    """The same ``count`` examples in every run."""
    return settings(derandomize=True, deadline=None, max_examples=count)


@pytest.fixture(autouse=True)
def plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the layers from using the kernels they are compared with."""
    monkeypatch.setenv(kernels.DISABLE_VARIABLE, " ".join(kernels.CPU_KERNELS))


@pytest.fixture(autouse=True)
def poison_allocations() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that nothing the kernels leave unwritten looks right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int, padding: int = 0) -> torch.Tensor:
    """Normal numbers of some magnitude; rows are ``padding`` NaN apart from one another."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((*shape[:-1], shape[-1] + padding), torch.nan)
    whole[..., : shape[-1]] = torch.randn(shape, generator=generator) * 2
    return whole.to(dtype)[..., : shape[-1]]


def random_extremes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers, one in eight of which is extreme."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), shape, generator=generator)]
    is_normal = torch.rand(shape, generator=generator) < 0.875
    return torch.where(is_normal, torch.randn(shape, generator=generator), chosen).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as integers, which are equal where it is equal, NaN included."""
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def assert_rounded_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for a few elements where float32 results that differ in their last bits round differently."""
    assert actual.dtype == expected.dtype
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        return
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02, equal_nan=True)
    differing = ((actual != expected) & ~expected.isnan()).sum().item()
    assert differing <= 2 + actual.numel() // 50, f"{differing} of {actual.numel()} elements differ"


# Numbers


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    """All upper halves of a float32, with lower halves on both sides of every tie."""

    @njit
    def narrow_all(source, target):  # type: ignore[no-untyped-def]
        for i in range(len(source)):
            target[i] = vectors.narrow(source[i])

    @njit
    def widen_all(source, target):  # type: ignore[no-untyped-def]
        for i in range(len(source)):
            target[i] = vectors.widen(source[i])

    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    numbers = (upper | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)).view(np.float32).ravel()
    narrowed, widened = np.zeros(len(numbers), dtype=np.uint16), np.zeros(1 << 16, dtype=np.float32)
    narrow_all(numbers, narrowed)
    expected = torch.from_numpy(numbers).to(torch.bfloat16)
    actual = torch.from_numpy(narrowed.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(bits(actual)[~expected.isnan()], bits(expected)[~expected.isnan()])
    halves = np.arange(1 << 16, dtype=np.uint16)
    widen_all(halves, widened)
    assert np.array_equal(widened.view(np.uint32), upper.ravel())


def test_powers_of_two_are_exact_to_three_units_in_the_last_place_and_end_as_they_should() -> None:
    @njit
    def exp2_all(source, target):  # type: ignore[no-untyped-def]
        for i in range(len(source)):
            target[i] = vectors.exp2(source[i])

    def exp2(numbers: np.ndarray) -> np.ndarray:
        result = np.zeros_like(numbers)
        exp2_all(numbers, result)
        return result

    numbers = np.linspace(-126, 127, 100_003, dtype=np.float32)
    actual, expected = exp2(numbers), np.exp2(numbers.astype(np.float64))
    assert (np.abs(actual - expected) <= 3 * np.spacing(expected.astype(np.float32))).all()
    ends = np.array([-128, -1e30, -math.inf, 128, 1e30, math.inf, math.nan, 0], dtype=np.float32)
    np.testing.assert_array_equal(exp2(ends), [0, 0, 0, math.inf, math.inf, math.inf, math.nan, 1])


def test_rough_powers_of_two_are_good_enough_for_bfloat16() -> None:
    @njit
    def exp2_all(source, target):  # type: ignore[no-untyped-def]
        for i in range(len(source)):
            target[i] = vectors.rough_exp2(source[i])

    numbers = np.concatenate([np.linspace(-126, 0, 100_003), -np.arange(127.0), [-1e-30, -0.5]]).astype(np.float32)
    powers = np.zeros_like(numbers)
    exp2_all(numbers, powers)
    np.testing.assert_allclose(powers, np.exp2(numbers.astype(np.float64)), rtol=1 / 17_000)
    assert powers[numbers == 0].tolist() == [1, 1]
    ends = np.array([-127, -1e30, -math.inf, math.nan], dtype=np.float32)
    powers = np.zeros_like(ends)
    exp2_all(ends, powers)
    np.testing.assert_array_equal(powers, [0, 0, 0, math.nan])


def test_scratch_memory_is_not_cleared() -> None:
    """LLVM takes the clearing of much of it apart, which made half of the time in which kernels are compiled."""

    @njit
    def of_scratch():  # type: ignore[no-untyped-def]
        memory = vectors.scratch(8064)
        vectors.fetch_add(memory, 1)
        return vectors.fetch_add(memory + 64, 1)

    of_scratch.compile(())
    code = of_scratch.inspect_llvm(())
    assert "alloca [8064 x float]" in code
    assert "memset" not in code
    assert "zeroinitializer" not in code


def test_quick_rounding_differs_for_denormals_only() -> None:
    @njit
    def narrow_all(source, target):  # type: ignore[no-untyped-def]
        for i in range(len(source)):
            target[i] = vectors.quickly_narrow(source[i])

    random = np.random.default_rng(0)
    numbers = random.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    narrowed = np.zeros(len(numbers), dtype=np.uint16)
    narrow_all(numbers, narrowed)
    actual = torch.from_numpy(narrowed.view(np.int16)).view(torch.bfloat16)
    expected = torch.from_numpy(numbers).to(torch.bfloat16)
    small = torch.from_numpy(numbers).abs() < torch.finfo(torch.float32).tiny
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~small].nan_to_num(7), expected[~small].nan_to_num(7))
    assert ((actual == expected) | (actual == 0))[small].all()


# Products


@examples(120)
@given(
    rows=st.integers(0, 60),
    outputs=st.integers(1, 100),
    pairs=st.integers(1, 70),
    bias=st.booleans(),
    dtype=DTYPES,
    padding=PADDINGS,
    block_bytes=st.sampled_from((1, 4096, linear.BLOCK_BYTES)),
    seed=SEEDS,
)
@example(rows=600, outputs=65, pairs=9, bias=True, dtype=torch.bfloat16, padding=0, block_bytes=1, seed=0)
@example(rows=2, outputs=33, pairs=4000, bias=True, dtype=torch.float32, padding=1, block_bytes=1, seed=0)
def test_linear_of_whole_numbers_is_exact(rows, outputs, pairs, bias, dtype, padding, block_bytes, seed):
    """Of which every sum fits a float32, so that a product too few or too many shows."""
    generator = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator).bfloat16()

    whole_x = torch.full((rows, 2 * pairs + padding), torch.nan, dtype=torch.bfloat16)
    whole_x[:, : 2 * pairs] = whole(rows, 2 * pairs)
    x, weight = whole_x[:, : 2 * pairs], whole(outputs, 2 * pairs)
    added = whole(outputs).to(dtype) if bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "BLOCK_BYTES", block_bytes)
        actual = linear.linear(x, linear.pack(weight), outputs, added, dtype)
    expected = F.linear(x.double(), weight.double(), None if added is None else added.double())
    assert actual.dtype == dtype
    assert torch.equal(actual, expected.to(dtype))


@examples(40)
@given(rows=st.integers(1, 40), outputs=st.integers(1, 70), pairs=st.integers(1, 300), dtype=DTYPES, seed=SEEDS)
def test_linear_is_as_exact_as_sums_in_float32(rows, outputs, pairs, dtype, seed):
    x, weight = (random_rows((n, 2 * pairs), torch.bfloat16, seed + i) for i, n in enumerate((rows, outputs)))
    bias = random_rows((outputs,), dtype, seed + 2)
    actual = linear.linear(x, linear.pack(weight), outputs, bias, dtype).double()
    x, weight, bias = x.double(), weight.double(), bias.double()
    exact, size = F.linear(x, weight, bias), F.linear(x.abs(), weight.abs(), bias.abs())
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    assert ((actual - exact).abs() <= 1.01 * rounding * exact.abs() + 2e-6 * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_keeps_what_is_not_finite_within_its_row_and_output(dtype: torch.dtype) -> None:
    x, weight = random_rows((17, 66), torch.bfloat16, 0), random_rows((45, 66), torch.bfloat16, 1)
    for place, value in (((3, 5), math.nan), ((9, 65), math.inf), ((16, 0), -math.inf)):
        x[place] = value
    weight[7, 7], weight[44, 1] = math.inf, math.nan
    actual = linear.linear(x, linear.pack(weight), 45, None, dtype)
    expected = F.linear(x.double(), weight.double())
    assert not expected.isfinite().all()
    assert expected.isfinite().sum() == 14 * 43
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(actual), test(expected))


@examples(40)
@given(outputs=st.integers(1, 100), pairs=st.integers(1, 70), count=st.integers(0, 40), seed=SEEDS)
def test_rows_of_a_packed_weight_are_those_that_were_packed(outputs, pairs, count, seed):
    """To the bit, whatever the bits mean; also out of a part of a wider tensor, and for ids that are strided."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-(2**15), 2**15, (outputs, 2 * pairs + 4), generator=generator, dtype=torch.int16)
    weight = whole.view(torch.bfloat16)[:, 2 : 2 * pairs + 2]
    packed = linear.pack(weight)
    ids = torch.randint(outputs, (2 * count,), generator=generator)[::2]
    assert torch.equal(bits(linear.unpack_rows(packed, ids)), bits(weight[ids]))
    assert packed.shape == (-(-outputs // tiles.COLUMNS), pairs, tiles.COLUMNS, 2)


@examples(30)
@given(rows=st.integers(1, 100), size=st.integers(1, 70), count=st.integers(0, 40), dtype=DTYPES, seed=SEEDS)
def test_rows_of_a_table(rows, size, count, dtype, seed):
    """To the bit."""
    table = random_extremes((rows, size), dtype, seed)
    ids = torch.randint(rows, (2 * count,), generator=torch.Generator().manual_seed(seed))[::2]
    assert torch.equal(bits(embedding(ids, table)), bits(table[ids]))


def test_products_of_a_cuda_device_are_left_to_torch() -> None:
    """There is no kernel of this name for it, and no package may be asked for one."""
    weight = SimpleNamespace(shape=(4, 4), dtype=torch.bfloat16, device=torch.device("cuda", 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernels.DISABLE_VARIABLE)
        patch.setattr(kernels, "why_no_triton", lambda device: None)
        assert not TiledWeight.suits(weight)


# Norms and activations


@examples(120)
@given(
    rows=st.integers(0, 11),
    size=st.integers(1, 700),
    dtype=DTYPES,
    padding=PADDINGS,
    has_residual=st.booleans(),
    is_extreme=st.booleans(),
    seed=SEEDS,
)
@example(rows=300, size=1, dtype=torch.bfloat16, padding=1, has_residual=True, is_extreme=True, seed=0)
@example(rows=2, size=16384, dtype=torch.bfloat16, padding=16, has_residual=True, is_extreme=False, seed=0)
def test_rms_norm(rows, size, dtype, padding, has_residual, is_extreme, seed):
    """Normalises the rounded sum, reads nothing between strided rows, and leaves its arguments as they were."""
    x = random_rows((rows, size), dtype, seed, padding)
    residual = random_rows((rows, size), dtype, seed + 1, 2 * padding) if has_residual else None
    weight = random_rows((size,), dtype, seed + 2)
    if is_extreme:
        x[:] = random_extremes((rows, size), dtype, seed)
        if residual is not None:
            residual[:] = random_extremes((rows, size), dtype, seed + 1)
    before = x.clone(), None if residual is None else residual.clone()
    layer = RMSNorm(size, EPS, dtype, CPU)
    assert layer.fused_add is None
    layer.weight.data.copy_(weight)
    expected_normed, expected_total = layer.add(x, residual)
    normed, total = rms_norm(x, weight, EPS, residual)
    assert_rounded_alike(normed, expected_normed.detach())
    assert torch.equal(total.nan_to_num(7), expected_total.nan_to_num(7))
    assert torch.equal(x.nan_to_num(7), before[0].nan_to_num(7))
    if residual is None:
        assert total is x
    else:
        assert torch.equal(residual.nan_to_num(7), before[1].nan_to_num(7))


@examples(120)
@given(
    rows=st.integers(0, 11),
    size=st.integers(1, 700),
    dtype=DTYPES,
    padding=PADDINGS,
    scale=st.sampled_from((1.0, 60.0)),
    is_extreme=st.booleans(),
    seed=SEEDS,
)
@example(rows=1, size=5, dtype=torch.bfloat16, padding=0, scale=1.0, is_extreme=True, seed=0)
def test_silu_and_mul(rows, size, dtype, padding, scale, is_extreme, seed):
    """Also of gates so negative that their exponential overflows."""
    gate_up = random_rows((rows, 2 * size), dtype, seed, padding)
    if is_extreme:
        gate_up[:] = random_extremes((rows, 2 * size), dtype, seed)
    else:
        gate_up[:, :size] *= scale
    layer = SiluAndMul(CPU, dtype)
    assert layer.fused is None
    actual, expected = silu_and_mul(gate_up), layer(gate_up)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    finite = expected.isfinite()
    largest = max(expected[finite].abs().max().item(), 1.0) if finite.any() else 1.0
    power = 2.0 ** -math.ceil(math.log2(largest))  # multiplied by a power of two, which loses nothing, one bound serves
    assert_rounded_alike(actual[finite] * power, expected[finite] * power)


def test_silu_of_each_extreme_gate_is_torchs() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        gates = torch.tensor(EXTREMES, dtype=dtype)
        gate_up = torch.stack([gates, torch.ones_like(gates)], dim=1)
        expected = F.silu(gates)[:, None]
        torch.testing.assert_close(silu_and_mul(gate_up), expected, rtol=1e-5, atol=1e-35, equal_nan=True)


@examples(60)
@given(rows=st.integers(0, 7), blocks=st.integers(1, 40), size=st.sampled_from((1, 16, 100, 128)), seed=SEEDS)
def test_block_sums(rows, blocks, size, seed):
    """Maxima are exact, sums relative to the row's maximum; of rows that ask for none they are 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((rows, blocks, size), generator=generator) * 8
    logits[torch.rand(logits.shape, generator=generator) < 0.3] = -math.inf
    logits[:, 0, 0] = 1.0  # something is allowed
    scale = torch.rand(rows, generator=generator) * 3
    wanted = torch.rand(rows, generator=generator) < 0.7
    maxima, sums = block_sums(logits, scale, wanted)
    assert torch.equal(maxima, logits.amax(dim=2))
    relative = (logits - logits.amax(dim=(1, 2), keepdim=True)).double() * scale[:, None, None]
    expected = torch.exp2(relative).sum(dim=2) * wanted[:, None]
    torch.testing.assert_close(sums.double(), expected, rtol=2e-5, atol=1e-30)


def test_a_logit_that_is_no_number_shows_in_its_row_only() -> None:
    logits = torch.zeros(3, 4, 16)
    logits[1, 2, 5] = math.nan
    maxima, _ = block_sums(logits, torch.ones(3), torch.ones(3, dtype=torch.bool))
    assert maxima.isnan().nonzero().tolist() == [[1, 2]]


# Queries, keys and values


def new_cache(
    blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's keys and values, full of NaN."""
    shapes = kv_cache.cache_shapes(blocks, kv_heads, block_size, head_dim, dtype)
    return torch.full(shapes[0], torch.nan, dtype=dtype), torch.full(shapes[1], torch.nan, dtype=dtype)


def random_slots(tokens: int, blocks: int, block_size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(blocks * block_size, generator=generator)[:tokens]


head_counts = st.sampled_from(((1, 1), (2, 1), (6, 2), (16, 8), (20, 20), (64, 1), (96, 8)))
head_dims = st.one_of(st.sampled_from((2, 4, 64, 80, 128, 256)), st.integers(1, 128).map(lambda half: 2 * half))
block_sizes = st.sampled_from((16, 32, 48, 256))


@examples(120)
@given(
    tokens=st.integers(0, 6),
    heads=head_counts,
    head_dim=head_dims,
    block_size=block_sizes,
    dtype=DTYPES,
    padding=PADDINGS,
    is_extreme=st.booleans(),
    seed=SEEDS,
)
@example(
    tokens=40, heads=(16, 8), head_dim=128, block_size=16, dtype=torch.bfloat16, padding=0, is_extreme=False, seed=0
)
def test_qk_norm_rope_store(tokens, heads, head_dim, block_size, dtype, padding, is_extreme, seed):
    """Queries as the layers compute them; of the cache only the slots mapped to are written, and nothing to slot -1."""
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    max_len, blocks = 50, tokens // block_size + 2
    angles = torch.rand((max_len, head_dim // 2), generator=generator) * 7
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(max_len, (tokens,), generator=generator)
    slots = random_slots(tokens, blocks, block_size, generator)
    slots[torch.rand(tokens, generator=generator) < 0.2] = -1
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = random_rows((tokens, width), dtype, seed, padding)
    if is_extreme:
        qkv[:] = random_extremes((tokens, width), dtype, seed)
    before = qkv.clone()
    q_weight, k_weight = (random_rows((head_dim,), dtype, seed + 1 + i) for i in range(2))
    keys, values = new_cache(blocks, num_kv_heads, block_size, head_dim, dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    overflow = torch.zeros(1, dtype=torch.int32)
    q = qk_norm_rope_store(
        qkv, q_weight, k_weight, EPS, cos, sin, positions, keys, values, slots, overflow, num_heads, num_kv_heads
    )

    split = qkv.unflatten(1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    rotated = []
    for x, weight in zip(split, (q_weight, k_weight), strict=False):
        norm = RMSNorm(head_dim, EPS, dtype, CPU)
        norm.weight.data.copy_(weight)
        rotated.append(apply_rotary(norm(x), cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)).detach())
    kept = slots >= 0
    kv_cache.store(expected_keys, expected_values, slots[kept], rotated[1][kept], split[2][kept])
    assert q.is_contiguous()
    assert_rounded_alike(q, rotated[0])
    assert_rounded_alike(keys, expected_keys)
    assert torch.equal(bits(values), bits(expected_values))
    assert int(overflow) == int(not split[2][kept].isfinite().all())
    assert torch.equal(bits(qkv), bits(before))


@examples(60)
@given(
    tokens=st.integers(0, 40),
    kv_heads=st.integers(1, 3),
    head_dim=head_dims,
    block_size=block_sizes,
    dtype=DTYPES,
    seed=SEEDS,
)
def test_what_is_stored_is_found_in_the_plain_layout(tokens, kv_heads, head_dim, block_size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = tokens // block_size + 2
    cache = new_cache(blocks, kv_heads, block_size, head_dim, dtype)
    slots = random_slots(tokens, blocks, block_size, generator)
    new_keys, new_values = (random_rows((tokens, kv_heads, head_dim), dtype, seed + i) for i in range(2))
    kv_cache.store(*cache, slots, new_keys, new_values)
    is_free = torch.ones(blocks * block_size, dtype=torch.bool)
    is_free[slots] = False
    plain = kv_cache.plain_keys(cache[0]), kv_cache.plain_values(cache[1], head_dim)
    for stored, new in zip(plain, (new_keys, new_values), strict=True):
        assert stored.shape == (blocks, kv_heads, block_size, head_dim)
        by_slot = stored.transpose(1, 2).flatten(0, 1)
        assert torch.equal(by_slot[slots], new)
        assert by_slot[is_free].isnan().all()
    assert [tensor.untyped_storage().nbytes() for tensor in cache] == [
        blocks * block_size * kv_heads * columns * dtype.itemsize
        for columns in (head_dim, kv_cache.value_columns(head_dim))
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_ways_of_storing_write_the_same_bytes(dtype: torch.dtype) -> None:
    """A kernel's keys, read back and stored by torch, make the same cache: no place of either is another's."""
    heads, kv_heads, head_dim, block_size, blocks = 4, 2, 34, 48, 3
    generator = torch.Generator().manual_seed(0)
    tokens = blocks * block_size - 5
    slots = random_slots(tokens, blocks, block_size, generator)
    qkv = random_rows((tokens, (heads + 2 * kv_heads) * head_dim), dtype, 0)
    angles = torch.rand((9, head_dim // 2), generator=generator)
    positions, weight = torch.arange(tokens) % 9, random_rows((head_dim,), dtype, 1)
    written, copied = (new_cache(blocks, kv_heads, block_size, head_dim, dtype) for _ in range(2))
    overflow = torch.zeros(1, dtype=torch.int32)
    norms, tables = (weight, weight, EPS), (angles.cos(), angles.sin(), positions)
    qk_norm_rope_store(qkv, *norms, *tables, *written, slots, overflow, heads, kv_heads)
    plain = kv_cache.plain_keys(written[0]), kv_cache.plain_values(written[1], head_dim)
    by_slot = [tensor.transpose(1, 2).flatten(0, 1)[slots] for tensor in plain]
    kv_cache.store(*copied, slots, *by_slot)
    for one, other in zip(written, copied, strict=True):
        assert torch.equal(bits(one), bits(other))


# Threads and memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_threads_do_not_write_to_the_same_pair_of_a_block(number: int, dtype: torch.dtype) -> None:
    """Prompts of any length, from any place of a block on, in tasks of several tokens."""
    heads, kv_heads, head_dim, block_size = 1, 2, 8, 16
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 7, 33, 64, 131, 500):
        blocks = torch.randperm(2 * tokens + 8, generator=generator)
        slots, rest, used = [], tokens, 0
        while rest:
            start, count = (int(torch.randint(1, n, (1,), generator=generator)) for n in (block_size, 64))
            positions = torch.arange(start, start + min(count, rest))
            slots.append(blocks[used + positions // block_size] * block_size + positions % block_size)
            used += 1 + int(positions[-1]) // block_size
            rest -= len(positions)
        mapping = torch.cat(slots)
        qkv = random_rows((tokens, (heads + 2 * kv_heads) * head_dim), dtype, tokens)
        tables = torch.ones(1, head_dim // 2), torch.zeros(1, head_dim // 2), torch.zeros(tokens, dtype=torch.int64)
        weight, overflow = torch.ones(head_dim, dtype=dtype), torch.zeros(1, dtype=torch.int32)
        cache = new_cache(len(blocks), kv_heads, block_size, head_dim, dtype)
        with threads(number):
            qk_norm_rope_store(qkv, weight, weight, EPS, *tables, *cache, mapping, overflow, heads, kv_heads)
        values = kv_cache.plain_values(cache[1], head_dim).transpose(1, 2).flatten(0, 1)
        assert torch.equal(values[mapping], qkv.unflatten(1, (-1, head_dim))[:, heads + kv_heads :])
        keys = kv_cache.plain_keys(cache[0]).transpose(1, 2).flatten(0, 1)
        assert keys[mapping].isfinite().all()
        is_free = torch.ones(len(values), dtype=torch.bool)
        is_free[mapping] = False
        assert values[is_free].isnan().all()
        assert keys[is_free].isnan().all()


@examples(100)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    starts=st.lists(st.integers(0, 40), min_size=8, max_size=8),
    size=st.integers(1, 16),
)
def test_tasks_end_where_blocks_do(lengths, starts, size):
    """Of whatever size, they take each token once, and no two of them the same block."""
    rows = enumerate(zip(lengths, starts, strict=False))
    slots = np.concatenate([1000 * row + np.arange(start, start + length) for row, (length, start) in rows])
    ends = [_next_block(slots, min(len(slots), first), len(slots), 16) for first in range(0, len(slots) + size, size)]
    assert (ends[0], ends[-1]) == (0, len(slots))
    assert ends == sorted(ends)
    for end in set(ends[1:-1]) - {len(slots)}:
        assert slots[end] // 16 != slots[end - 1] // 16


@pytest.mark.parametrize("number", [2, 5])
def test_more_threads_than_processors_compute_the_same(number: int) -> None:
    x, weight = random_rows((50, 130), torch.bfloat16, 0), random_rows((300, 130), torch.bfloat16, 1)
    packed, norm_weight = linear.pack(weight), random_rows((130,), torch.bfloat16, 2)

    def compute() -> list[torch.Tensor]:
        return [
            linear.linear(x, packed, 300),
            *rms_norm(x, norm_weight, EPS, x),
            silu_and_mul(x),
            linear.unpack_rows(packed, torch.arange(300)),
        ]

    expected = compute()
    with threads(number):
        for _ in range(20):
            for actual, wanted in zip(compute(), expected, strict=True):
                assert torch.equal(actual, wanted)


@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, 1024, 1024), (1 << 21, 3)])
def test_memory_in_huge_pages_is_like_any_other(shape: tuple[int, ...]) -> None:
    tensor = huge_pages.empty(shape, torch.bfloat16)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, torch.bfloat16, True)
    tensor.fill_(3)
    part = tensor[-1:].clone() if len(tensor) else tensor
    view = tensor[-1:]
    del tensor
    assert torch.equal(view, part), "a view keeps the whole alive"


def test_memory_that_cannot_be_had_is_an_error_of_torchs() -> None:
    with pytest.raises(RuntimeError, match=r"memory|storage"):
        huge_pages.empty((1 << 46,), torch.uint8)


def test_types_of_numba_are_what_kernels_take_them_for() -> None:
    assert vectors.Address == types.int64
    assert vectors.VECTOR_BYTES == 4 * vectors.LANES
    assert kv_cache.BLOCK_MULTIPLE == vectors.LANES
