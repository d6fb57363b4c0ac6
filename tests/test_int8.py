"""Weights in eight bits: exact integer sums of rounded factors, and what is lost by rounding them."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.kernels import why_no_cpu_kernels
from nanovllm.layers.product import Int8Weight

pytestmark = pytest.mark.skipif(why_no_cpu_kernels() is not None, reason=str(why_no_cpu_kernels()))


def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers of -127 to 127, 1 where another integer is as near (else 0), and a scale a row; all float64."""
    scales = rows.double().abs().amax(dim=1, keepdim=True) / 127
    exact = torch.where(scales > 0, rows.double() / scales, 0.0)
    return exact.round(), ((exact - exact.floor() - 0.5).abs() < 1e-4).double(), scales


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 90),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(rows=30, outputs=15, inputs=82, dtype=torch.bfloat16, with_bias=False, seed=130)
def test_sums_are_those_of_the_rounded_factors(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, with_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = (torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator)).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if with_bias else None
    product = Int8Weight(weight).product(x, bias, torch.float32 if bias is None else dtype)
    (xs, x_ties, x_scales), (ws, w_ties, w_scales) = rounded(x), rounded(weight)
    expected = (xs @ ws.T) * x_scales * w_scales.T + (0 if bias is None else bias.double())
    # Factors that lie between two integers may go to either; of a row whose scale is a power of two many do.
    steps = (x_ties @ ws.abs().T + xs.abs() @ w_ties.T + x_ties @ w_ties.T) * x_scales * w_scales.T
    assert ((product.double() - expected).abs() <= steps + 2**-8 * (expected.abs() + steps) + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_zeros_and_outputs_of_zeros_give_zeros(dtype: torch.dtype) -> None:
    weight, x = torch.randn(5, 8).to(dtype), torch.randn(3, 8).to(dtype)
    weight[2], x[1] = 0, 0
    product = Int8Weight(weight).product(x, None, dtype)
    assert (product[1] == 0).all()
    assert (product[:, 2] == 0).all()
    assert product.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_so(bad: float) -> None:
    x = torch.randn(3, 8)
    x[1, 3] = bad
    product = Int8Weight(torch.randn(5, 8)).product(x, None, torch.float32)
    assert not product[1].isfinite().any()
    assert product[[0, 2]].isfinite().all()


def test_the_demo_checkpoint_still_answers() -> None:
    questions = ["add 12 and 30", "count from 3 to 9", "list all primes up to 50", "say stone 3 times"]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    answers = []
    for quantization in (None, "int8"):
        with LLM(DEMO_MODEL_PATH, quantization=quantization) as llm:
            assert llm.get_metrics()["quantization"] == quantization
            options = {"chat_template_kwargs": {"enable_thinking": False}, "use_tqdm": False}
            outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=80), **options)
            answers.append([output.outputs[0].text for output in outputs])
    assert answers[0] == answers[1]


def test_batches_do_not_change_answers() -> None:
    """Scales are a row's own, and sums of integers are exact, whoever else is in the batch."""
    prompts = [[5, 6, 7], [9] * 40, [11, 12] * 9]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    with LLM(DEMO_MODEL_PATH, quantization="int8", dtype="float32", skip_tokenizer_init=True) as llm:
        together = [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]
        alone = [llm.generate(prompt, params, use_tqdm=False)[0]["token_ids"] for prompt in prompts]
    assert together == alone


class TestErrors:
    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match="quantization is 'int3', which is not supported; use None or 'int8'"):
            LLM(DEMO_MODEL_PATH, quantization="int3")

    def test_float16(self) -> None:
        with pytest.raises(ValueError, match="quantization is 'int8', but it is not for float16; use dtype='bfloat16'"):
            LLM(DEMO_MODEL_PATH, quantization="int8", dtype="float16")
