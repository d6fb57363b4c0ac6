"""What only a CUDA device can show; all of it skips without one. ``tools/gpu_check.py`` runs these and measures."""

from pathlib import Path

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.attention import BACKENDS
from nanovllm.layers.noise import exponential_noise, token_words
from tests.checkpoints import reference_greedy

pytestmark = pytest.mark.gpu
PROMPTS = [[7 + (i * 31 + n) % 200 for i in range(n)] for n in (1, 5, 16, 17, 64, 100)]


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 7}, {"num_kvcache_blocks": 9}], ids=str)
def test_greedy_tokens_on_cuda_equal_transformers(tiny_checkpoint: Path, tiny_reference, backend: str, limits) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(
        tiny_checkpoint,
        device="cuda",
        dtype="float32",
        skip_tokenizer_init=True,
        attention_backend=backend,
        **{"num_kvcache_blocks": 64, **limits},
    ) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [out["token_ids"] for out in outputs] == [reference_greedy(tiny_reference, p, 12) for p in PROMPTS]


def test_sampling_noise_is_the_same_on_cuda_and_cpu() -> None:
    keys = torch.tensor([[1, -2], [3, 4]], dtype=torch.int32)
    positions = torch.tensor([5, 70000])
    cpu = exponential_noise(keys, positions, token_words(5000, torch.device("cpu")))
    cuda = exponential_noise(keys.cuda(), positions.cuda(), token_words(5000, torch.device("cuda")))
    torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-5, atol=1e-9)


def test_closing_an_engine_gives_its_gpu_memory_back(tiny_checkpoint: Path) -> None:
    before = torch.cuda.memory_allocated()
    llm = LLM(tiny_checkpoint, device="cuda", skip_tokenizer_init=True, num_kvcache_blocks=64)
    llm.generate(PROMPTS, SamplingParams(max_tokens=4), use_tqdm=False)
    llm.close()
    assert torch.cuda.memory_allocated() == before


def test_the_kv_cache_is_sized_from_a_profiled_step(tiny_checkpoint: Path) -> None:
    with LLM(tiny_checkpoint, device="cuda", skip_tokenizer_init=True, gpu_memory_utilization=0.5) as llm:
        metrics = llm.get_metrics()
    assert 0 < metrics["kvcache_bytes"] <= 0.5 * torch.cuda.get_device_properties(0).total_memory
