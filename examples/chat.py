"""A conversation of several turns, in a loop.

python examples/chat.py                                      # type; an empty line ends it
python examples/chat.py "my name is Ada." "what is my name?" # or give the turns here
python examples/chat.py --model Qwen3-0.6B --thinking

The model remembers nothing between two calls: what it knows of earlier turns is the conversation that is sent along.
That costs little: what the conversation begins with is still in the KV cache (the prefix cache), block by block.
"""

import argparse
import sys
from collections.abc import Iterator

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH


def questions(given: list[str]) -> Iterator[str]:
    """The turns of the user: those given, or what is typed until an empty line or the end of the input."""
    if given:
        for question in given:
            print(f"you: {question}")
            yield question
        return
    while True:
        try:
            question = input("you: ").strip()
        except EOFError:
            print()
            return
        if not sys.stdin.isatty():
            print(question)  # a terminal shows what is typed, a pipe does not
        if not question:
            return
        yield question


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("turns", nargs="*", metavar="TURN", help="what the user says; typed if there is none")
    model_help = "checkpoint directory, or OWNER/NAME on the Hugging Face hub (default: the demo checkpoint)"
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help=model_help)
    parser.add_argument("--thinking", action="store_true", help="let the model think before it answers")
    args = parser.parse_args(argv)

    params = SamplingParams(temperature=0, max_tokens=2048 if args.thinking else 512)
    options = {"enable_thinking": args.thinking}
    conversation: list[dict[str, str]] = []
    with LLM(args.model) as llm:
        for question in questions(args.turns):
            conversation.append({"role": "user", "content": question})
            print("model: ", end="")
            answer = ""
            for piece in llm.stream_chat(conversation, params, chat_template_kwargs=options):
                print(piece.text, end="", flush=True)
                answer += piece.text
                output = piece.output  # with the last piece the whole output comes
            print()
            # Templates leave thoughts out of earlier turns, so that they do not fill the context.
            conversation.append({"role": "assistant", "content": answer})
            assert output is not None
            cached, total = output.num_cached_tokens, len(output.prompt_token_ids)
            print(f"       ({total} prompt tokens, {cached} of them cached)")


if __name__ == "__main__":
    main()
