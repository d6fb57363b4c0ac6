"""What the engine answers is what transformers answers: the same greedy tokens and, in float32, the same logits.

However a run is scheduled: any block size, any chunking of the prompts, with preemptions, shared prefixes, duplicates,
prompts that end with a block, and prompts whose beginning is cached.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from nanovllm import LLM, SamplingParams
from nanovllm.attention import BACKENDS, AttentionSpec
from nanovllm.engine.llm_engine import noise_key
from tests.checkpoints import BASE, LLAMA3_ROPE, LONGROPE, load_reference, write_checkpoint
from tests.threads import one_thread  # noqa: F401

NEW_TOKENS = 12
MORE_NEW_TOKENS = 24  # more than the growth that is reserved for a sequence when it is let in
MAX_MODEL_LEN = 288
TOLERANCE = 1e-4  # of logits that are several units large

# Changes to the base configuration; between them they cover the odd shapes and every type of rope.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gqa1-untied": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "gqa2-head48-theta": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48, "rope_theta": 1e6},
    "gqa8-head128": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 97},
    "head80-bias-untied": {"head_dim": 80, "attention_bias": True, "tie_word_embeddings": False, "vocab_size": 509},
    "one-layer-gqa3": {
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 52,
        "intermediate_size": 37,
        "vocab_size": 33,
    },
    "yarn-bias": {
        "attention_bias": True,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    },
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "llama3": {"rope_scaling": LLAMA3_ROPE},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "longrope": {"rope_scaling": LONGROPE},
}
FULL_SIZED = "gqa2-head48-theta"  # where one configuration is enough


@dataclass
class Reference:
    """A checkpoint, prompts, and what transformers answers to them."""

    path: Path
    model: Any
    prompts: dict[str, list[int]]
    tokens: dict[str, list[int]]  # greedy continuations
    logits: dict[str, torch.Tensor]  # [tokens, vocab_size], those that each of the tokens was taken from


def make_prompts(vocab_size: int) -> dict[str, list[int]]:
    draw = random.Random(3)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    sixteen, long = ids(16), ids(256)
    return {
        "one token": ids(1),
        "one block": sixteen,
        "duplicate": list(sixteen),
        "two blocks, the first shared": sixteen + ids(16),
        "a block and a bit, shared": sixteen + ids(5),
        "less than a block": ids(7),
        "one long block": long,
        "one long block and a token": [*long, *ids(1)],
        "full A": ids(48),
        "full B": ids(48),
        "nearly a long block A": ids(240),
        "nearly a long block B": ids(240),
    }


@torch.inference_mode()
def greedy_continuations(model: Any, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """One token at a time, without a cache, without padding: the plainest way there is."""
    names_of_length: dict[int, list[str]] = defaultdict(list)
    for name, prompt in prompts.items():
        names_of_length[len(prompt)].append(name)
    continuations = {}
    for names in names_of_length.values():
        ids = torch.tensor([prompts[name] for name in names])
        count = MORE_NEW_TOKENS if names[0].endswith(("A", "B")) else NEW_TOKENS
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        continuations.update(zip(names, ids[:, -count:].tolist(), strict=True))
    return continuations


@torch.inference_mode()
def teacher_forced_logits(model: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
    """The model's logits for each token of ``output``: float32 [len(output), vocab_size]."""
    return model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1].float()


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def one_reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(FULL_SIZED, tmp_path_factory.mktemp("one"))


def make_reference(name: str, path: Path) -> Reference:
    changes = {"num_hidden_layers": 2, **CONFIGURATIONS[name]}
    write_checkpoint(path, **changes)
    model = load_reference(path)
    prompts = make_prompts(changes.get("vocab_size", BASE["vocab_size"]))
    tokens = greedy_continuations(model, prompts)
    logits = {name: teacher_forced_logits(model, prompts[name], tokens[name]) for name in prompts}
    best_two = torch.cat(list(logits.values())).topk(2).values
    assert (best_two[:, 0] - best_two[:, 1]).min() > 2 * TOLERANCE, "a near tie: choose another seed for the weights"
    return Reference(path, model, prompts, tokens, logits)


def make_llm(path: Path, **arguments: Any) -> LLM:
    defaults = {"device": "cpu", "skip_tokenizer_init": True, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8}
    return LLM(path, **{**defaults, "num_kvcache_blocks": 4096, **arguments})


def generate(
    llm: LLM, prompts: list[list[int]], num_tokens: int = NEW_TOKENS
) -> tuple[list[list[int]], list[torch.Tensor], list[int]]:
    """Greedy tokens of each prompt, the logits each was taken from, and each prompt's number of cached tokens."""
    rows: list[tuple[list[int], int, torch.Tensor]] = []

    def note(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        logits, sampling = arguments
        for row, (key, position) in enumerate(zip(sampling.keys.tolist(), sampling.positions.tolist(), strict=True)):
            rows.append((key, position, logits[row].clone()))

    params = [
        SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, seed=number)
        for number in range(len(prompts))
    ]
    hook = llm.engine.runner.sampler.register_forward_pre_hook(note)
    try:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    finally:
        hook.remove()
    request_of_key = {split_words(noise_key("request", number, 0)): number for number in range(len(prompts))}
    captured: list[dict[int, torch.Tensor]] = [{} for _ in prompts]
    for key, position, row in rows:
        captured[request_of_key[tuple(key)]][position] = row
    for prompt, by_position in zip(prompts, captured, strict=True):
        assert sorted(by_position) == list(range(len(prompt), len(prompt) + num_tokens))
    logits = [torch.stack([row for _, row in sorted(by_position.items())]) for by_position in captured]
    return [output["token_ids"] for output in outputs], logits, [output.num_cached_tokens for output in outputs]


def split_words(key: int) -> tuple[int, ...]:
    """The two int32 words of a 64-bit key, as the batch state keeps them."""
    return tuple(torch.tensor([key - 2**64 if key >> 63 else key]).view(torch.int32).tolist())


def assert_parity(reference: Reference, names: list[str], tokens: list[list[int]], logits: list[torch.Tensor]) -> None:
    for name, ours, our_logits in zip(names, tokens, logits, strict=True):
        assert ours == reference.tokens[name][: len(ours)], name
        difference = (our_logits - reference.logits[name][: len(ours)]).abs().max().item()
        assert difference < TOLERANCE, f"{name}: logits differ by {difference}"


@pytest.mark.parametrize("chunk_budget", [1, 7, 64])
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_tokens_and_logits_are_transformers_for_any_block_size_and_chunking(
    reference: Reference, block_size: int, chunk_budget: int
) -> None:
    # The long prompts are for the long blocks; token by token, one of them is enough.
    names = list(reference.prompts)[: 6 if block_size < 256 else 7 if chunk_budget == 1 else 8]
    prompts = [reference.prompts[name] for name in names]
    with make_llm(
        reference.path, kvcache_block_size=block_size, max_num_batched_tokens=chunk_budget, num_kvcache_blocks=600
    ) as llm:
        first_tokens, first_logits, _ = generate(llm, prompts)
        assert_parity(reference, names, first_tokens, first_logits)

        # Again, now that the beginnings of the prompts are cached: whole blocks of them, but never the last token.
        tokens, logits, num_cached = generate(llm, prompts)
        assert_parity(reference, names, tokens, logits)
        assert num_cached == [(len(prompt) - 1) // block_size * block_size for prompt in prompts]


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_preempted_sequences_go_on_as_if_they_had_not_been(reference: Reference, block_size: int) -> None:
    kind = "nearly a long block" if block_size == 256 else "full"
    names = [f"{kind} A", f"{kind} B", f"{kind} B"]
    prompts = [reference.prompts[name] for name in names]
    # Room for the prompts of two sequences to grow by 16 tokens each: they are let in, and grow further.
    num_blocks = 2 * -(-(len(prompts[0]) + 16) // block_size)
    with make_llm(
        reference.path, kvcache_block_size=block_size, num_kvcache_blocks=num_blocks, max_num_batched_tokens=64
    ) as llm:
        tokens, logits, _ = generate(llm, prompts, MORE_NEW_TOKENS)
        assert llm.get_metrics()["num_preemptions"] > 0
        assert_parity(reference, names, tokens, logits)


def cpu_backends() -> Iterator[str]:
    spec = AttentionSpec(2, 4, 2, 48, torch.float32, torch.device("cpu"), 16)
    return (name for name, backend in BACKENDS.items() if backend.why_not(spec) is None)


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("backend", cpu_backends())
def test_every_attention_backend_of_the_cpu_agrees(
    one_reference: Reference, backend: str, prefix_caching: bool
) -> None:
    names = list(one_reference.prompts)
    if backend == "triton":  # interpreted
        names = names[::4]
    prompts = [one_reference.prompts[name] for name in names]
    with make_llm(
        one_reference.path,
        attention_backend=backend,
        max_num_batched_tokens=23,
        enable_prefix_caching=prefix_caching,
    ) as llm:
        for _ in range(2):
            tokens, logits, num_cached = generate(llm, prompts)
            assert_parity(one_reference, names, tokens, logits)
        assert any(num_cached) == prefix_caching


def test_a_cached_beginning_shared_by_different_prompts_changes_nothing(one_reference: Reference) -> None:
    """One prompt alone first; then others that begin like it, end to end or with another end."""
    shared, longer, same = "one block", "two blocks, the first shared", "duplicate"
    with make_llm(one_reference.path, kvcache_block_size=4) as llm:
        for name, expected_cached in ((shared, 0), (longer, 16), (same, 12)):
            tokens, logits, num_cached = generate(llm, [one_reference.prompts[name]])
            assert_parity(one_reference, [name], tokens, logits)
            assert num_cached == [expected_cached]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_within_its_own_error_of_the_float32_logits(one_reference: Reference, dtype: str) -> None:
    """The yardstick is transformers in the same precision: rounding differs, but errors must be of the same size."""
    try:
        model = type(one_reference.model).from_pretrained(one_reference.path, torch_dtype=getattr(torch, dtype)).eval()
        model(torch.tensor([[1, 2, 3]]))
    except RuntimeError as error:
        pytest.skip(f"torch cannot compute in {dtype} here: {error}")
    names = list(one_reference.prompts)[:8]
    prompts = [one_reference.prompts[name] for name in names]
    with make_llm(one_reference.path, dtype=dtype, max_num_batched_tokens=64) as llm:
        assert llm.get_metrics()["dtype"] == dtype
        all_tokens, all_logits, _ = generate(llm, prompts)
    ours, theirs, scale = [], [], []
    for prompt, tokens, logits in zip(prompts, all_tokens, all_logits, strict=True):
        exact = teacher_forced_logits(one_reference.model, prompt, tokens)
        ours.append(logits - exact)
        theirs.append(teacher_forced_logits(model, prompt, tokens) - exact)
        scale.append(exact)
    our_error, their_error = torch.cat(ours), torch.cat(theirs)
    assert our_error.square().mean().sqrt() <= 1.5 * their_error.square().mean().sqrt()
    assert our_error.abs().max() <= 2 * their_error.abs().max()
    # and the yardstick itself is sound: a few roundings of numbers of this size
    assert their_error.abs().max() < 64 * torch.finfo(getattr(torch, dtype)).eps * torch.cat(scale).abs().max()


def test_half_precision_checkpoint_keeps_its_dtype_unless_told(tmp_path: Path, one_reference: Reference) -> None:
    one_reference.model.to(torch.bfloat16).save_pretrained(tmp_path)
    one_reference.model.float()
    for asked, used in (("auto", "bfloat16"), ("float32", "float32")):
        with make_llm(tmp_path, dtype=asked) as llm:
            assert llm.get_metrics()["dtype"] == used
            cache = tree_leaves(llm.engine.runner.attention.kv_cache())
            assert {tensor.dtype for tensor in cache} == {getattr(torch, used)}
