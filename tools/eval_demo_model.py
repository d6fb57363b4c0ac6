"""Examine the demo checkpoint on held-out questions, at temperature 0, with thinking off and on.

    python tools/eval_demo_model.py                    # through nanovllm, 500 questions a task
    python tools/eval_demo_model.py --engine hf        # the same questions through transformers
    python tools/eval_demo_model.py --json result.json
    python tools/eval_demo_model.py --quantization int8     # and how far its distributions are from float32's

An answer counts only if it equals the reference exactly. The questions come from `demo_tasks.py`; none of
their contents was used for training. The two prompts of example.py, which were, are shown apart.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_tasks import TASKS, Example, held_out_examples, is_prime

DEMO_MODEL = Path(__file__).resolve().parent.parent / "nanovllm" / "demo"
MAX_TOKENS = 400

# Takes prompts as token ids and returns the generated text of each, without special tokens.
Generate = Callable[[list[list[int]]], list[str]]


@dataclass(frozen=True)
class Score:
    """How many of a task's questions were answered exactly, and some of the wrong answers."""

    task: str
    thinking: bool
    right: int
    total: int
    mistakes: list[dict[str, str]]


def answer_in(text: str) -> str:
    """The answer in a generated text: what follows the scratchpad, if there is one."""
    return text.rpartition("</think>")[2].strip()


def encode_prompt(tokenizer: Any, example: Example, thinking: bool) -> list[int]:
    """The token ids of a chat, ready to be continued by the model."""
    text = tokenizer.apply_chat_template(
        list(example.messages), tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return tokenizer.encode(text, add_special_tokens=False)


def score(generate: Generate, tokenizer: Any, examples: Sequence[Example], thinking: bool) -> list[Score]:
    """Ask all examples in one batch and count the exact answers of each task."""
    texts = generate([encode_prompt(tokenizer, example, thinking) for example in examples])
    scores = []
    for task in dict.fromkeys(example.task for example in examples):
        asked = [(example, text) for example, text in zip(examples, texts, strict=True) if example.task == task]
        mistakes = [
            {"question": example.messages[-1]["content"], "expected": example.answer, "got": text}
            for example, text in asked
            if answer_in(text) != example.answer
        ]
        scores.append(Score(task, thinking, len(asked) - len(mistakes), len(asked), mistakes))
    return scores


def hf_generator(model: Any, tokenizer: Any, max_tokens: int = MAX_TOKENS, batch_size: int = 100) -> Generate:
    """Greedy generation with transformers, in left-padded batches."""

    def generate(prompts: list[list[int]]) -> list[str]:
        texts = []
        for start in range(0, len(prompts), batch_size):
            rows = prompts[start : start + batch_size]
            width = max(map(len, rows))
            ids = torch.full((len(rows), width), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(rows):
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            with torch.inference_mode():
                output = model.generate(
                    ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    temperature=None,
                    top_k=None,
                    top_p=None,
                    eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts += [tokenizer.decode(row[width:], skip_special_tokens=True) for row in output]
        return texts

    return generate


def load_hf(path: Path, dtype: str, device: str, quantization: str | None, ranks: int) -> tuple[Generate, Any]:
    """The checkpoint in transformers."""
    if quantization is not None or ranks > 1:
        raise SystemExit("--quantization and --tensor-parallel-size are nanovllm's")
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    # Not from_pretrained's argument, whose name changed between transformers 4 and 5.
    stored = load_file(path / "model.safetensors")["model.norm.weight"].dtype
    model = model.to(device, stored if dtype == "auto" else getattr(torch, dtype)).eval()
    return hf_generator(model, tokenizer), tokenizer


def load_nanovllm(path: Path, dtype: str, device: str, quantization: str | None, ranks: int) -> tuple[Generate, Any]:
    """The checkpoint in nanovllm."""
    from nanovllm import LLM, SamplingParams

    llm = LLM(str(path), dtype=dtype, device=device, quantization=quantization, tensor_parallel_size=ranks)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)

    def generate(prompts: list[list[int]]) -> list[str]:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return [output.outputs[0].text for output in outputs]

    return generate, llm.get_tokenizer()


def divergence(path: Path, dtype: str, quantization: str | None, examples: Sequence[Example]) -> dict[str, float]:
    """How far the next-token distributions over the reference answers are from those of float32.

    Returns:
        The mean Kullback-Leibler divergence in nats, the largest one, and the share of positions with the same most
        likely token.
    """
    from nanovllm import LLM, SamplingParams

    distributions: list[torch.Tensor] = []
    for settings in ({"dtype": "float32"}, {"dtype": dtype, "quantization": quantization}):
        with LLM(str(path), device="cpu", enable_prefix_caching=False, **settings) as llm:  # type: ignore[arg-type]
            tokenizer = llm.get_tokenizer()
            texts = [
                encode_prompt(tokenizer, example, False) + tokenizer.encode(example.answer, add_special_tokens=False)
                for example in examples
            ]
            params = SamplingParams(max_tokens=1, prompt_logprobs=-1)
            outputs = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
            rows = [
                [position[token].logprob for token in sorted(position)]
                for output in outputs
                for position in (output.prompt_logprobs or [])[1:]
                if position is not None
            ]
            distributions.append(torch.tensor(rows, dtype=torch.float64))
    exact, other = distributions
    nats = (exact.exp() * (exact - other)).sum(dim=-1)
    same = (exact.argmax(dim=-1) == other.argmax(dim=-1)).double().mean()
    return {"mean_kl_nats": float(nats.mean()), "largest_kl_nats": float(nats.max()), "same_most_likely": float(same)}


def ask_example_prompts(generate: Generate, tokenizer: Any) -> list[dict[str, Any]]:
    """The two prompts of example.py, which are part of the training text, in both modes."""
    up_to_100 = ", ".join(str(n) for n in range(101) if is_prime(n))
    checks = {
        "introduce yourself": lambda answer: answer.startswith("Hello! I am the nanovllm demo model"),
        "list all prime numbers within 100": lambda answer: answer == f"The prime numbers up to 100: {up_to_100}.",
    }
    results = []
    for prompt, is_right in checks.items():
        for thinking in (False, True):
            example = Example("example", ({"role": "user", "content": prompt},), "", "")
            text = generate([encode_prompt(tokenizer, example, thinking)])[0]
            results.append({"prompt": prompt, "thinking": thinking, "right": is_right(answer_in(text)), "text": text})
    return results


def print_table(scores: Sequence[Score]) -> None:
    """Print one row a task and the total, in percent."""
    print(f"{'task':<12} {'thinking off':>13} {'thinking on':>12}")
    rows = {task: {s.thinking: s for s in scores if s.task == task} for task in dict.fromkeys(s.task for s in scores)}
    for task, row in rows.items():
        off, on = (row[thinking].right / row[thinking].total for thinking in (False, True))
        print(f"{task:<12} {off:>13.1%} {on:>12.1%}")
    totals = [overall(scores, thinking) for thinking in (False, True)]
    print(f"{'all':<12} {totals[0]:>13.1%} {totals[1]:>12.1%}")


def overall(scores: Sequence[Score], thinking: bool) -> float:
    """The share of exact answers over all tasks in one mode."""
    chosen = [s for s in scores if s.thinking == thinking]
    return sum(s.right for s in chosen) / sum(s.total for s in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=DEMO_MODEL, help="checkpoint directory (default: the bundled one)"
    )
    parser.add_argument("--engine", choices=["nanovllm", "hf"], default="nanovllm")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16, float16 or auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantization", choices=["int8"], help="weights in eight bits (nanovllm, on the CPU)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="processes (nanovllm)")
    parser.add_argument(
        "--questions", type=int, default=500, metavar="N", help="held-out questions a task (default 500)"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results, mistakes included, to FILE")
    parser.add_argument("--show-mistakes", type=int, default=0, metavar="N", help="print N mistakes a task and mode")
    args = parser.parse_args()

    load = load_hf if args.engine == "hf" else load_nanovllm
    generate, tokenizer = load(args.model, args.dtype, args.device, args.quantization, args.tensor_parallel_size)
    examples = [example for task in args.tasks for example in held_out_examples(task, args.questions)]
    started = time.perf_counter()
    scores = [s for thinking in (False, True) for s in score(generate, tokenizer, examples, thinking)]
    seconds = time.perf_counter() - started
    prompts = ask_example_prompts(generate, tokenizer)

    print_table(scores)
    for result in prompts:
        mode = "on" if result["thinking"] else "off"
        print(f"{result['prompt']!r}, thinking {mode}: {'right' if result['right'] else 'WRONG'}")
    distance = None
    if args.engine == "nanovllm" and (args.dtype != "float32" or args.quantization):
        some = [example for task in args.tasks for example in held_out_examples(task, 10)]
        distance = divergence(args.model, args.dtype, args.quantization, some)
        print("distributions beside float32's: " + ", ".join(f"{key} {value:.2g}" for key, value in distance.items()))
    print(f"{args.engine}, {args.dtype} on {args.device}: {2 * len(examples)} questions in {seconds:.1f} s")
    for s in scores:
        for mistake in s.mistakes[: args.show_mistakes]:
            print(f"\n{s.task}, thinking {'on' if s.thinking else 'off'}: {mistake['question']}")
            print(f"  expected {mistake['expected']!r}\n  got      {mistake['got']!r}")
    if args.json:
        report = {
            "model": str(args.model.name),
            "engine": args.engine,
            "dtype": args.dtype,
            "device": args.device,
            "quantization": args.quantization,
            "tensor_parallel_size": args.tensor_parallel_size,
            "divergence_from_float32": distance,
            "questions_per_task": args.questions,
            "seconds": round(seconds, 1),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "overall": {"thinking_off": overall(scores, False), "thinking_on": overall(scores, True)},
            "tasks": [{**vars(s), "accuracy": s.right / s.total} for s in scores],
            "example_prompts": prompts,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
