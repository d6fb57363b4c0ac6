"""The bundled demo checkpoint answers, through the engine, what it was trained for."""

import json
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import eval_demo_model  # noqa: E402
from demo_tasks import TASKS, held_out_examples, is_held_out  # noqa: E402

QUESTIONS = 25  # a task and mode; tools/eval_demo_model.py asks 500


@pytest.fixture(scope="module")
def generate_and_tokenizer():
    llm = LLM(DEMO_MODEL_PATH, device="cpu", dtype="float32")

    def generate(prompts: list[list[int]]) -> list[str]:
        params = SamplingParams(temperature=0, max_tokens=eval_demo_model.MAX_TOKENS)
        return [output["text"] for output in llm.generate(prompts, params, use_tqdm=False)]

    yield generate, llm.get_tokenizer()
    llm.close()


def test_both_prompts_of_the_example_are_answered_right_with_thinking_off_and_on(generate_and_tokenizer) -> None:
    for result in eval_demo_model.ask_example_prompts(*generate_and_tokenizer):
        assert result["right"], result


@pytest.mark.parametrize("thinking", [False, True], ids=["thinking off", "thinking on"])
def test_held_out_questions_are_answered_right(generate_and_tokenizer, thinking: bool) -> None:
    generate, tokenizer = generate_and_tokenizer
    examples = [example for task in TASKS for example in held_out_examples(task, QUESTIONS)]
    scores = eval_demo_model.score(generate, tokenizer, examples, thinking)
    assert eval_demo_model.overall(scores, thinking) >= 0.93
    for score in scores:
        assert score.right / score.total >= 0.8, (score.task, score.mistakes[:3])


def test_the_scratchpad_is_shown_with_thinking_on_and_absent_with_thinking_off(generate_and_tokenizer) -> None:
    generate, tokenizer = generate_and_tokenizer
    example = next(held_out_examples("add", 1))
    prompts = [eval_demo_model.encode_prompt(tokenizer, example, thinking) for thinking in (False, True)]
    off, on = generate(prompts)
    assert "</think>" not in off
    assert on.startswith("<think>\n")
    assert "\n</think>\n\n" in on


def test_held_out_questions_are_never_trained_on() -> None:
    for task in TASKS:
        turns = list(held_out_examples(task, 20))
        assert len({json.dumps(example.messages) for example in turns}) == 20
    assert not is_held_out("add", "")


def test_the_checkpoint_is_small_bfloat16_and_laid_out_as_published() -> None:
    folder = Path(DEMO_MODEL_PATH)
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert {"torch_dtype", "rope_theta", "rope_scaling", "tie_word_embeddings", "head_dim"} <= set(config)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert all(file.get_slice(name).get_dtype() == "BF16" for name in names)
    assert "model.layers.0.self_attn.q_norm.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize(
    "text", ["", "héllo wörld", "日本語 😀👩‍👩‍👧", "12345 a\tb\r\n\n", "<think>x</think>", "\x00\x7f"]
)
def test_the_tokenizer_gives_any_text_back(generate_and_tokenizer, text: str) -> None:
    _, tokenizer = generate_and_tokenizer
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_every_digit_is_a_token(generate_and_tokenizer) -> None:
    _, tokenizer = generate_and_tokenizer
    assert len(tokenizer.encode("1234567890")) == 10


def test_the_template_leaves_past_scratchpads_out(generate_and_tokenizer) -> None:
    _, tokenizer = generate_and_tokenizer
    messages = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "<think>\nsecret\n</think>\n\n1 + 1 = 2"},
        {"role": "user", "content": "2 + 2"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "secret" not in text
    assert "1 + 1 = 2" in text
    assert text.endswith("<|im_start|>assistant\n")
