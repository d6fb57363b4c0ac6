"""Ask a model a few things.

python example.py                                 # the bundled demo checkpoint, two prompts
python example.py "add 12 and 30" "count from 1 to 7"    # your own prompts
python example.py --model PATH --thinking         # any Qwen3 checkpoint folder
"""

import argparse
import sys
import time
from collections.abc import Sequence

from nanovllm import LLM, EngineDeadError, RequestOutput, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH

PROMPTS = ["introduce yourself", "list all prime numbers within 100"]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help=f"default: {' / '.join(PROMPTS)}")
    model_help = "checkpoint directory, or OWNER/NAME on the Hugging Face hub (default: the demo checkpoint)"
    add("--model", metavar="PATH", default=DEMO_MODEL_PATH, help=model_help)
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="processes that share the model")
    add("--max-tokens", type=int, metavar="N", help="most tokens an answer has (default: 512; thinking 2048)")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: demo checkpoint 0, others 0.6)")
    add("--thinking", action=argparse.BooleanOptionalAction, default=False, help="think before the answer")
    args = parser.parse_args(argv)
    if args.max_tokens is None:
        args.max_tokens = 2048 if args.thinking else 512
    if args.temperature is None:
        args.temperature = 0.0 if args.model == DEMO_MODEL_PATH else 0.6
    return args


def ask(args: argparse.Namespace) -> None:
    """Load the model, answer all prompts in one batch and print the answers."""
    prompts = args.prompts or PROMPTS
    sampling_params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    with LLM(
        args.model,
        device=args.device,
        dtype=args.dtype,
        tensor_parallel_size=args.tensor_parallel_size,
    ) as llm:
        start = time.perf_counter()
        outputs = llm.chat(
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            sampling_params,
            use_tqdm=sys.stderr.isatty(),
            chat_template_kwargs={"enable_thinking": args.thinking},
        )
        seconds = time.perf_counter() - start
        metrics = llm.get_metrics()

    for prompt, output in zip(prompts, outputs, strict=True):
        print_answer(prompt, output)
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    output_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(
        f"{prompt_tokens} prompt + {output_tokens} output tokens in {seconds:.2f} s "
        f"({output_tokens / seconds:.0f} output tok/s) on {metrics['device']} in {metrics['dtype']}; "
        f"start-up {metrics['startup_seconds']:.2f} s"
    )


def print_answer(prompt: str, output: RequestOutput) -> None:
    completion = output.outputs[0]
    thought, closed, answer = completion.text.rpartition("</think>")
    print(f"Prompt: {prompt}")
    if closed:
        print(f"Thought: {thought.replace('<think>', '').strip()}")
    print(f"Answer: {answer.strip()}")
    if completion.finish_reason == "length":
        print(f"(cut off after {len(completion.token_ids)} tokens; --max-tokens allows more)")
    print()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after one line on stderr when what was asked for cannot be done."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a character must not end the program
    args = parse_args(argv)
    try:
        ask(args)
    except (ValueError, OSError, EngineDeadError) as error:
        print(f"example.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
