"""A model shared by two processes, a GPU each, or on the CPU a share of the cores each.

python examples/tensor_parallel.py
python examples/tensor_parallel.py --model Qwen3-0.6B --ranks 2

For models that one device cannot hold. (Not on Windows.) On a single CPU it saves no time, but shows how it works: the
answers are those of one process, and the script needs no guard around its code for it.
"""

import argparse

from nanovllm import LLM, EngineDeadError, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH

QUESTIONS = ["list all primes up to 50", "sort these numbers: 58, 31, 77, 12", "what is 96 minus 48?"]


def answers(model: str, ranks: int) -> list[str]:
    """What so many processes answer."""
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    params = SamplingParams(temperature=0, max_tokens=128)
    with LLM(model, tensor_parallel_size=ranks) as llm:
        try:
            outputs = llm.chat(conversations, params, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})
        except EngineDeadError as error:  # a process was killed, or hung: no other is left behind either
            raise SystemExit(f"the engine has died: {error}") from error
        metrics = llm.get_metrics()
    print(
        f"{ranks} rank{'s' if ranks > 1 else ''}: {metrics['kvcache_bytes'] // metrics['num_kvcache_blocks']} bytes a "
        f"KV block each, {metrics['num_threads']} threads each, ready after {metrics['startup_seconds']:.1f} s"
    )
    return [output["text"] for output in outputs]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_help = "checkpoint directory, or OWNER/NAME on the Hugging Face hub (default: the demo checkpoint)"
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help=model_help)
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="must divide the heads (default: 2)")
    args = parser.parse_args(argv)
    alone, together = answers(args.model, 1), answers(args.model, args.ranks)
    for question, answer in zip(QUESTIONS, together, strict=True):
        print(f"{question}\n  {answer}")
    # Sums of two shares are rounded differently: in bfloat16 that can tip a close call, in float32 hardly ever.
    same = sum(one == other for one, other in zip(alone, together, strict=True))
    print(f"{same} of {len(QUESTIONS)} answers are those of one rank")


if __name__ == "__main__":
    main()
