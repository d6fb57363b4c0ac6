"""Triton kernels against their torch references, and those against the layers they stand for.

Without a GPU the kernels run in Triton's interpreter, which is slow (hence the small shapes), and which truncates
where a GPU rounds to the nearest bfloat16 (hence the wide bounds for that; float16 rounds in the same places).
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovllm.kernels import DISABLE_VARIABLE, is_interpreted

pytest.importorskip("triton", reason="the package triton is not installed")
if not torch.cuda.is_available() and not is_interpreted():
    pytest.skip("TRITON_INTERPRET is not 1, and there is no GPU", allow_module_level=True)

from nanovllm.kernels import fused_linear as fused_linear_module
from nanovllm.kernels.decode_inputs import decode_inputs, decode_inputs_reference
from nanovllm.kernels.decode_outputs import decode_outputs, decode_outputs_reference
from nanovllm.kernels.dependent_launch import SINCE_TRITON_3_5
from nanovllm.kernels.fused_linear import fused_linear, fused_linear_reference
from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store, qk_norm_rope_store_reference
from nanovllm.kernels.rms_norm import rms_norm, rms_norm_reference
from nanovllm.kernels.silu_and_mul import silu_and_mul, silu_and_mul_reference
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import apply_rotary
from tests.bounds import bounds  # noqa: F401

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = st.sampled_from((torch.bfloat16, torch.float16, torch.float32))
SEEDS = st.integers(0, 2**31)
EPS = 1e-6
UNWRITTEN = -7777  # what buffers of integers hold before; those of floats hold NaN


def examples(count: int) -> settings:
    """The same ``count`` examples in every run."""
    return settings(derandomize=True, deadline=None, max_examples=count)


@pytest.fixture(autouse=True)
def plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the layers from using the kernels they are compared with."""
    monkeypatch.setenv(DISABLE_VARIABLE, "rms_norm silu_and_mul")


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
    return whole.to(DEVICE, dtype)[..., : shape[-1]]


def assert_rounded_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for a few elements where float32 results that differ in their last bits round differently."""
    assert actual.dtype == expected.dtype
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    elif actual.dtype == torch.bfloat16 and DEVICE.type == "cpu":
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.1)
    else:
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
        differing = (actual != expected).sum().item()
        assert differing <= 2 + actual.numel() // 50, f"{differing} of {actual.numel()} elements differ"


def assert_identical(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in every bit, NaN included."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def new_norm(weight: torch.Tensor) -> RMSNorm:
    """The layer with a given weight."""
    norm = RMSNorm(weight.shape[0], EPS, weight.dtype, DEVICE)
    norm.weight.data.copy_(weight)
    return norm


@examples(100)
@given(
    rows=st.integers(0, 4),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 90),
    dtype=DTYPES if DEVICE.type == "cuda" else st.sampled_from((torch.float16, torch.float32)),
    padding=st.sampled_from((0, 1, 16)),
    kind=st.sampled_from(("plain", "bias", "norm", "norm bias", "residual", "bias residual", "norm gated", "gated")),
    seed=SEEDS,
)
@example(rows=2, inputs=5000, outputs=3, dtype=torch.float16, padding=0, kind="norm gated", seed=0)
@example(rows=2, inputs=8200, outputs=3, dtype=torch.bfloat16, padding=0, kind="norm gated", seed=0)  # not by tiles
@example(rows=1, inputs=256, outputs=600, dtype=torch.float16, padding=0, kind="residual", seed=0)
def test_fused_linear(rows, inputs, outputs, dtype, padding, kind, seed):
    """Rounds where separate operations do, and writes each output of each row.

    The interpreter takes the bits of bfloat16 for integers where it multiplies tiles: a GPU has to show these products.
    """
    x = random_rows((rows, inputs), dtype, seed, padding)
    gated = "gated" in kind
    weight = random_rows((outputs * (2 if gated else 1), inputs), dtype, seed + 1) * inputs**-0.5
    bias = random_rows((outputs,), dtype, seed + 2) if "bias" in kind else None
    norm = random_rows((inputs,), dtype, seed + 3) if "norm" in kind else None
    residual = random_rows((rows, outputs), dtype, seed + 4, 2 * padding) if "residual" in kind else None
    actual = fused_linear(x, weight, bias, norm, EPS, residual, gated)
    exact = [None if one is None else one.float() for one in (x, weight, bias, norm, residual)]
    expected = fused_linear_reference(*exact[:4], EPS, exact[4], gated)
    assert actual.dtype == dtype
    assert actual.shape == (rows, outputs)
    tolerance = {torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.25}[dtype]
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not SINCE_TRITON_3_5, reason="no earlier Triton is asked for descriptors")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["norm gated", "bias residual"])
def test_fused_linear_reads_tiles_by_descriptors(kind, dtype, monkeypatch):
    """As it does where a GPU can copy them as a whole: a last program has lines that are beyond the weight."""
    described = []

    def describe(*arguments):
        described.append(_describe(*arguments))
        return described[-1]

    _describe = fused_linear_module._describe
    monkeypatch.setattr(fused_linear_module, "_describe", describe)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(fused_linear_module, "has_hopper_features", lambda device: True)
    test_fused_linear.hypothesis.inner_test(3, 448, 37, dtype, 0, kind, 0)
    expected = 1 if fused_linear_module.has_hopper_features(DEVICE) else 0
    assert len(described) == expected


@pytest.mark.skipif(not SINCE_TRITON_3_5, reason="no earlier Triton is asked for descriptors")
@pytest.mark.parametrize(("inputs", "beginning"), [(446, 0), (440, 0), (448, 3)])
def test_fused_linear_loads_what_descriptors_cannot_describe(inputs, beginning, monkeypatch):
    """Lines that pieces do not fill, pieces that are not a multiple of 16 bytes, a weight that begins between these."""
    monkeypatch.setattr(fused_linear_module, "has_hopper_features", lambda device: True)
    x = random_rows((2, inputs), torch.float16, 0)
    storage = random_rows((beginning + 40 * inputs,), torch.float16, 1) * inputs**-0.5
    weight = storage[beginning:].view(40, inputs)
    expected = fused_linear_reference(x.float(), weight.float())
    torch.testing.assert_close(fused_linear(x, weight).float(), expected, rtol=0.02, atol=0.02)


@given(
    inputs=st.integers(1, 32768) | st.sampled_from((1024, 2048, 3072, 4096, 5120, 12288, 25600)),
    outputs=st.integers(1, 200_000) | st.sampled_from((1024, 4096, 5120)),
    gated=st.booleans(),
    itemsize=st.sampled_from((2, 4)),
    processors=st.sampled_from((4, 20, 132, 148)),
)
@examples(500)
def test_sizes_of_fused_linear_are_those_a_gpu_can_take(inputs, outputs, gated, itemsize, processors):
    if gated:
        inputs = min(inputs, 16384)  # a model's hidden size
    sizes, warps = fused_linear_module._launch_sizes(inputs, outputs, gated, itemsize, processors)
    lines = (2 if gated else 1) * sizes["OUTPUT_TILE"] * sizes["FOLD"]
    assert sizes["FOLD"] * sizes["PIECE"] >= inputs > sizes["FOLD"] * (sizes["PIECE"] - 1)
    assert sizes["PIECE_TILE"] >= sizes["PIECE"]
    assert sizes["OUTPUT_TILE"] * sizes["FOLD"] <= 256  # lines of a box that is copied as a whole
    assert warps in (4, 8, 16)
    # Registers that hold it: half of those that a thread can have, and of sixteen warps each has but 128.
    assert lines * sizes["PIECE_TILE"] * itemsize <= warps * 32 * 4 * (128 if warps == 4 else 64)
    if sizes["BY_TILES"]:
        assert lines % (16 * warps) == 0
        assert lines * sizes["PIECE_TILE"] * itemsize <= 64 << 10  # shared memory, through which they are rearranged


def test_fused_linear_gives_a_row_the_same_whatever_rows_are_beside_it():
    x, weight = random_rows((4, 256), torch.float16, 0), random_rows((100, 256), torch.float16, 1)
    norm, residual = random_rows((256,), torch.float16, 2), random_rows((4, 100), torch.float16, 3)
    together = fused_linear(x, weight, None, norm, EPS, residual)
    alone = [fused_linear(x[row : row + 1], weight, None, norm, EPS, residual[row : row + 1]) for row in range(4)]
    assert_identical(together, torch.cat(alone))


@examples(150)
@given(
    tokens=st.integers(0, 9),
    size=st.integers(1, 1100),
    dtype=DTYPES,
    padding=st.sampled_from((0, 1, 16)),
    has_residual=st.booleans(),
    seed=SEEDS,
)
@example(tokens=0, size=64, dtype=torch.float32, padding=0, has_residual=True, seed=0)
@example(tokens=2, size=16384, dtype=torch.float16, padding=16, has_residual=True, seed=0)
@example(tokens=300, size=1, dtype=torch.float16, padding=0, has_residual=False, seed=0)
def test_rms_norm(tokens, size, dtype, padding, has_residual, seed):
    """Normalises the rounded sum, reads nothing between strided rows, and leaves its arguments as they were."""
    x = random_rows((tokens, size), dtype, seed, padding)
    residual = random_rows((tokens, size), dtype, seed + 1, 2 * padding) if has_residual else None
    weight = random_rows((size,), dtype, seed + 2)
    before = x.clone(), None if residual is None else residual.clone()
    normed, total = rms_norm(x, weight, EPS, residual)
    expected_normed, expected_total = rms_norm_reference(x, weight, EPS, residual)
    assert_rounded_alike(normed, expected_normed)
    assert_rounded_alike(total, expected_total)
    assert_identical(x, before[0])
    if residual is None:
        assert total is x
    else:
        assert_identical(residual, before[1])
    layer_normed, layer_total = new_norm(weight).add(x, residual)
    assert_identical(expected_normed, layer_normed.detach())
    assert_identical(expected_total, layer_total)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # on purpose
@examples(150)
@given(
    tokens=st.integers(0, 9),
    n=st.integers(1, 2200),
    dtype=DTYPES,
    padding=st.sampled_from((0, 1, 16)),
    scale=st.sampled_from((1.0, 60.0)),
    seed=SEEDS,
)
@example(tokens=0, n=64, dtype=torch.float32, padding=0, scale=1.0, seed=0)
@example(tokens=2, n=1024, dtype=torch.bfloat16, padding=0, scale=1.0, seed=0)
def test_silu_and_mul(tokens, n, dtype, padding, scale, seed):
    """Also of gates so negative that their exponential overflows."""
    gate_up = random_rows((tokens, 2 * n), dtype, seed, padding)
    gate_up[:, :n] *= scale
    expected = silu_and_mul_reference(gate_up)
    assert_identical(expected, SiluAndMul(DEVICE)(gate_up))
    divisor = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    actual = silu_and_mul(gate_up)
    # Divided by a power of two, which loses nothing, so that one bound serves.
    power = 2.0 ** -(torch.tensor(divisor).log2().ceil().item())
    assert_rounded_alike(actual * power, expected * power)


def new_cache(
    blocks: int, heads: int, block_size: int, head_dim: int, dtype: torch.dtype, is_permuted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [blocks, heads, block_size, head_dim] full of NaN, interleaved or in layouts of their own."""
    if is_permuted:
        keys = torch.full((blocks, block_size, heads, head_dim + 3), torch.nan, dtype=dtype, device=DEVICE)
        values = torch.full((heads, blocks, block_size + 1, head_dim), torch.nan, dtype=dtype, device=DEVICE)
        return keys.transpose(1, 2)[..., :head_dim], values.transpose(0, 1)[:, :, :block_size]
    cache = torch.full((blocks, 2, heads, block_size, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    return cache[:, 0], cache[:, 1]


@examples(150)
@given(
    tokens=st.integers(0, 6),
    heads=st.sampled_from(((1, 1), (2, 1), (6, 2), (16, 8), (20, 20), (40, 5))),
    head_dim=st.sampled_from((64, 80, 96, 128, 192, 256)),
    block_size=st.sampled_from((1, 3, 16, 32)),
    dtype=DTYPES,
    padding=st.sampled_from((0, 1, 16)),
    is_permuted=st.booleans(),
    seed=SEEDS,
)
@example(
    tokens=0, heads=(16, 8), head_dim=128, block_size=16, dtype=torch.float16, padding=0, is_permuted=False, seed=0
)
@example(
    tokens=40, heads=(16, 8), head_dim=128, block_size=16, dtype=torch.float16, padding=0, is_permuted=False, seed=0
)
def test_qk_norm_rope_store(tokens, heads, head_dim, block_size, dtype, padding, is_permuted, seed):
    """Queries as the layers compute them; of the cache only the slots mapped to are written, in any layout."""
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    max_len, blocks = 50, tokens // block_size + 2
    angles = torch.rand((max_len, head_dim // 2), generator=generator) * 7
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    positions = torch.randint(max_len, (tokens,), generator=generator).to(DEVICE)
    slot_mapping = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    slot_mapping[torch.rand(tokens, generator=generator) < 0.2] = -1
    qkv = random_rows((tokens, (num_heads + 2 * num_kv_heads) * head_dim), dtype, seed, padding)
    q_weight = random_rows((head_dim,), dtype, seed + 1)
    k_weight = random_rows((head_dim,), dtype, seed + 2)
    arguments = (qkv, q_weight, k_weight, EPS, cos, sin, positions)
    keys, values = new_cache(blocks, num_kv_heads, block_size, head_dim, dtype, is_permuted)
    expected_keys, expected_values = keys.clone(), values.clone()
    slots = slot_mapping.to(DEVICE)
    q = qk_norm_rope_store(*arguments, keys, values, slots, num_heads, num_kv_heads)
    expected_q = qk_norm_rope_store_reference(
        *arguments, expected_keys, expected_values, slots, num_heads, num_kv_heads
    )
    assert q.is_contiguous()
    assert_rounded_alike(q, expected_q)
    assert_identical(values, expected_values)
    assert_identical(keys.isnan(), expected_keys.isnan())
    assert_rounded_alike(keys.nan_to_num(), expected_keys.nan_to_num())

    by_head = qkv.unflatten(-1, (-1, head_dim))
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    layer_q = apply_rotary(new_norm(q_weight)(by_head[:, :num_heads]), cos, sin)
    layer_k = apply_rotary(new_norm(k_weight)(by_head[:, num_heads : num_heads + num_kv_heads]), cos, sin)
    assert_identical(expected_q, layer_q.detach())
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            assert_identical(expected_keys[slot // block_size, :, slot % block_size], layer_k[token].detach())
            assert_identical(values[slot // block_size, :, slot % block_size], by_head[token, -num_kv_heads:])


@pytest.mark.parametrize("is_permuted", [False, True])
def test_qk_norm_rope_store_of_tokens_that_store_nothing(is_permuted):
    """The cache stays as it is."""
    keys, values = new_cache(3, 2, 16, 64, torch.float32, is_permuted)
    qkv = random_rows((5, 8 * 64), torch.float32, 0)
    weight, table = torch.ones(64, device=DEVICE), torch.ones(8, 32, device=DEVICE)
    nowhere = torch.full((5,), -1, device=DEVICE)
    qk_norm_rope_store(qkv, weight, weight, EPS, table, table, nowhere + 1, keys, values, nowhere, 4, 2)
    assert keys.isnan().all()
    assert values.isnan().all()


@st.composite
def decode_tables(draw: Callable[..., Any]) -> dict[str, Any]:
    """Tables of residents, some of which have counted on past their end, and rows, some of which are none."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    num_slots, max_len = draw(st.integers(1, 300)), draw(st.integers(1, 70))
    block_size = draw(st.sampled_from((1, 3, 16, 32)))
    max_blocks = draw(st.integers(1, max_len // block_size + 2))
    rows = draw(st.sampled_from((0, 1, num_slots, num_slots + 2)))
    slots = torch.cat((torch.randperm(num_slots, generator=generator), torch.full((2,), -1)))[:rows]
    slots[torch.rand(rows, generator=generator) < draw(st.sampled_from((0.0, 0.3, 1.0)))] = -1
    # Columns beyond the tables that must not be read.
    token_ids = torch.full((num_slots, max_len + 1 + draw(st.integers(0, 2))), UNWRITTEN, dtype=torch.int32)
    token_ids[:, : max_len + 1] = torch.randint(150000, (num_slots, max_len + 1), generator=generator)
    block_tables = torch.full((num_slots, max_blocks + draw(st.integers(0, 2))), UNWRITTEN, dtype=torch.int32)
    # Blocks so high that their slots do not fit an int32.
    block_tables[:, :max_blocks] = torch.randint(2**31 - 1, (num_slots, max_blocks), generator=generator)
    return {
        "slots": slots.int().to(DEVICE),
        "num_computed": torch.randint(max_len + 3, (num_slots,), generator=generator).int().to(DEVICE),
        "token_ids": token_ids.to(DEVICE)[:, : max_len + 1],
        "block_tables": block_tables.to(DEVICE)[:, :max_blocks],
        "block_size": block_size,
        "params": torch.randint(-(2**31), 2**31 - 1, (num_slots, 5), generator=generator).int().to(DEVICE),
    }


def decode_buffers(rows: int) -> tuple[torch.Tensor, ...]:
    """Outputs of decode_inputs, longer than there are rows."""
    shapes = ((torch.int64, ()), (torch.int64, ()), (torch.int64, ()), (torch.int32, ()), (torch.int32, (5,)))
    return tuple(torch.full((rows + 3, *shape), UNWRITTEN, dtype=dtype, device=DEVICE) for dtype, shape in shapes)


@examples(200)
@given(tables=decode_tables())
def test_decode_inputs(tables):
    """Every row's next token, its place and its slot; nothing beyond the rows is written, nor any table."""
    rows = tables["slots"].shape[0]
    actual, expected = decode_buffers(rows), decode_buffers(rows)
    before = {name: value.clone() for name, value in tables.items() if isinstance(value, torch.Tensor)}
    decode_inputs(*tables.values(), *(buffer[:rows] for buffer in actual))
    decode_inputs_reference(*tables.values(), *(buffer[:rows] for buffer in expected))
    for one, other in zip(actual, expected, strict=True):
        assert_identical(one, other)
        assert (one[rows:] == UNWRITTEN).all()
    for name, value in before.items():
        assert_identical(tables[name], value)

    input_ids, positions, slot_mapping, context_lengths, params = (buffer.tolist() for buffer in actual)
    token_ids, block_tables = tables["token_ids"].tolist(), tables["block_tables"].tolist()
    block_size, num_computed = tables["block_size"], tables["num_computed"].tolist()
    for row, slot in enumerate(tables["slots"].tolist()):
        assert params[row] == (tables["params"][slot].tolist() if slot >= 0 else [0] * 5)
        found = input_ids[row], positions[row], slot_mapping[row], context_lengths[row]
        if slot < 0:
            assert found == (0, 0, -1, 0)
            continue
        position = num_computed[slot]
        limit = min(len(token_ids[slot]) - 1, len(block_tables[slot]) * block_size)
        if position < limit:
            target = block_tables[slot][position // block_size] * block_size + position % block_size
        else:
            position, target = limit - 1, -1
        assert found == (token_ids[slot][position], position, target, position + 1)


@examples(200)
@given(tables=decode_tables(), seed=SEEDS)
def test_decode_outputs(tables, seed):
    """Tokens go where the next step reads them; lines of no row, and full ones, stay as they are."""
    slots = tables["slots"]
    rows = slots.shape[0]
    tokens = torch.randint(-1, 150000, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    tokens[::5] = -1
    results = []
    for function in (decode_outputs, decode_outputs_reference):
        num_computed, token_ids = tables["num_computed"].clone(), tables["token_ids"].clone()
        sampled = torch.full((rows + 3,), UNWRITTEN, dtype=torch.int32, device=DEVICE)
        function(slots, tokens, num_computed, token_ids, sampled[:rows])
        results.append((num_computed, token_ids, sampled))
    for one, other in zip(*results, strict=True):
        assert_identical(one, other)

    num_computed, token_ids, sampled = (tensor.tolist() for tensor in results[0])
    expected_computed, expected_ids = tables["num_computed"].tolist(), tables["token_ids"].tolist()
    expected_sampled = [UNWRITTEN] * (rows + 3)
    for row, (slot, token) in enumerate(zip(slots.tolist(), tokens.tolist(), strict=True)):
        expected_sampled[row] = token if slot >= 0 else -1
        place = expected_computed[slot] + 1
        if slot >= 0 and place < len(expected_ids[slot]):
            expected_ids[slot][place] = max(token, 0)
            expected_computed[slot] = place
    assert (num_computed, token_ids, sampled) == (expected_computed, expected_ids, expected_sampled)


def test_decode_steps_follow_one_another():
    """What one step's outputs leave is what the next step's inputs are."""
    slots = torch.tensor([2, -1, 0], dtype=torch.int32, device=DEVICE)
    num_computed = torch.tensor([3, 0, 5], dtype=torch.int32, device=DEVICE)
    token_ids = torch.zeros((3, 10), dtype=torch.int32, device=DEVICE)
    block_tables = torch.tensor([[4, 1], [0, 0], [7, 3]], dtype=torch.int32, device=DEVICE)
    sampled = torch.full((3,), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    for step, tokens in enumerate(([11, 12, 13], [21, 22, 23])):
        decode_outputs(slots, torch.tensor(tokens, device=DEVICE), num_computed, token_ids, sampled)
        assert sampled.tolist() == [tokens[0], -1, tokens[2]]
        inputs = tuple(buffer[:3] for buffer in decode_buffers(3))
        params = torch.arange(15, dtype=torch.int32, device=DEVICE).view(3, 5)
        decode_inputs(slots, num_computed, token_ids, block_tables, 4, params, *inputs)
        assert inputs[0].tolist() == [tokens[0], 0, tokens[2]]
        assert inputs[1].tolist() == [6 + step, 0, 4 + step]
        assert inputs[2].tolist() == [14 + step, -1, 4 + step]
        assert inputs[3].tolist() == [7 + step, 0, 5 + step]
        assert inputs[4].tolist() == [params[2].tolist(), [0] * 5, params[0].tolist()]
