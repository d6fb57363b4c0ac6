"""Text as it is made: one answer, several at once, and one that is broken off.

python examples/streaming.py
python examples/streaming.py --model Qwen3-0.6B
"""

import argparse
import time

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH


def ask(question: str) -> list[dict[str, str]]:
    """A conversation of one turn."""
    return [{"role": "user", "content": question}]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_help = "checkpoint directory, or OWNER/NAME on the Hugging Face hub (default: the demo checkpoint)"
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help=model_help)
    args = parser.parse_args(argv)
    params = SamplingParams(temperature=0, max_tokens=200)
    options = {"enable_thinking": False}

    with LLM(args.model) as llm:
        # One answer. A piece is text that can no longer change: never half a character.
        print("-- one answer")
        started = time.perf_counter()
        first = None
        for piece in llm.stream_chat(ask("list all primes up to 50"), params, chat_template_kwargs=options):
            if first is None:
                first = time.perf_counter() - started
            print(piece.text, end="", flush=True)
        print(f"\n(the first piece came after {first:.3f} s, the last after {time.perf_counter() - started:.3f} s)")

        # Several at once: they run in the same steps, and prompt_index tells whose piece it is.
        print("-- three at once")
        asked = ["count from 3 to 9", "add 12 and 30", "reverse these words: apple river stone"]
        answers = [""] * len(asked)
        for piece in llm.stream_chat([ask(question) for question in asked], params, chat_template_kwargs=options):
            answers[piece.prompt_index] += piece.text
            if piece.finish_reason is not None:  # a completion's last piece says why it ended
                print(f"{asked[piece.prompt_index]}: {answers[piece.prompt_index]} ({piece.finish_reason})")

        # Leaving the loop ends the request: nothing more is computed for it.
        print("-- broken off")
        text = ""
        for piece in llm.stream_chat(ask("count from 1 to 40"), params, chat_template_kwargs=options):
            text += piece.text
            if "5" in text:
                break
        print(text)
        print(f"unfinished requests: {llm.engine.num_unfinished_requests}")


if __name__ == "__main__":
    main()
