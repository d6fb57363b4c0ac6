"""Many questions after one long beginning, which is computed once.

python examples/prefix_sharing.py
python examples/prefix_sharing.py --model Qwen3-0.6B --questions 32

Instructions, examples, a document: where prompts begin alike, the KV cache holds the beginning once for all of them,
and nobody has to ask for it (enable_prefix_caching=False does without).
"""

import argparse
import time

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH


def beginning() -> list[dict[str, str]]:
    """The turns that all conversations have in common."""
    messages = []
    for number in range(10):
        first, second = 7 * number % 90 + 3, 13 * number % 80 + 5
        messages.append({"role": "user", "content": f"add {first} and {second}"})
        messages.append({"role": "assistant", "content": f"{first} + {second} = {first + second}"})
    return messages


def run(model: str, conversations: list[list[dict[str, str]]], *, caching: bool) -> tuple[list[RequestOutput], float]:
    """Answers and seconds of an engine with or without the prefix cache."""
    params = SamplingParams(temperature=0, max_tokens=16)
    options = {"enable_thinking": False}
    with LLM(model, enable_prefix_caching=caching) as llm:
        # As many of something else first: a process's first steps are slower than the others.
        other = [[{"role": "user", "content": f"count from {number} to {number + 9}"}] for number in range(64)]
        llm.chat(other, params, use_tqdm=False, chat_template_kwargs=options)
        started = time.perf_counter()
        outputs = llm.chat(conversations, params, use_tqdm=False, chat_template_kwargs=options)
        return outputs, time.perf_counter() - started


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_help = "checkpoint directory, or OWNER/NAME on the Hugging Face hub (default: the demo checkpoint)"
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help=model_help)
    parser.add_argument("--questions", type=int, default=128, metavar="N", help="conversations (default: 128)")
    args = parser.parse_args(argv)
    shared = beginning()
    sums = [(11 * number % 97 + 2, 17 * number % 89 + 3) for number in range(args.questions)]
    conversations = [[*shared, {"role": "user", "content": f"add {first} and {second}"}] for first, second in sums]

    for caching in (True, False):
        # Whole blocks are shared. The first conversations are computed whole: nobody has been there before them.
        outputs, seconds = run(args.model, conversations, caching=caching)
        prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        cached = sum(output.num_cached_tokens for output in outputs)
        right = sum(
            output["text"].strip().endswith(f"= {first + second}")
            for output, (first, second) in zip(outputs, sums, strict=True)
        )
        print(f"caching {'on ' if caching else 'off'}: {cached:6} of {prompt_tokens} prompt tokens cached, ", end="")
        print(f"{seconds:.2f} s, {right} of {len(sums)} right")


if __name__ == "__main__":
    main()
