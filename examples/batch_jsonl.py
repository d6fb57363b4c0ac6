"""A file of requests, answered row by row, and continued after a crash.

python examples/batch_jsonl.py                      # in a directory of its own, which is deleted again
python examples/batch_jsonl.py --directory sums     # keeps the files; run it again: nothing is computed twice
python examples/batch_jsonl.py --model Qwen3-0.6B

The same from the shell: nanovllm batch requests.jsonl answers.jsonl
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from nanovllm import LLM, SamplingParams
from nanovllm.batch import BatchSummary, run_batch
from nanovllm.demo import DEMO_MODEL_PATH

SUMS = [(number, 7 * number % 90) for number in range(11, 31)]


def write_requests(path: Path) -> None:
    """A row a line. The id finds the answer again; parameters of a row's own may stand beside it."""
    with open(path, "w", encoding="utf-8") as file:
        for first, second in SUMS:
            row = {
                "custom_id": f"{first} + {second}",
                "messages": [{"role": "user", "content": f"add {first} and {second}"}],
                "max_tokens": 32,
            }
            print(json.dumps(row), file=file)


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Answers by their ids. They come in the order in which rows are finished; of several for an id the last counts."""
    with open(path, encoding="utf-8") as file:
        return {answer["custom_id"]: answer for answer in map(json.loads, file)}


def report(what: str, done: BatchSummary) -> None:
    print(f"{what}: {done.num_answered} answered, {done.num_skipped} done before, {done.num_errors} errors")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_help = "checkpoint directory, or OWNER/NAME on the Hugging Face hub (default: the demo checkpoint)"
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help=model_help)
    parser.add_argument("--directory", type=Path, help="where the files are kept (default: nowhere)")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as temporary, LLM(args.model) as llm:
        directory = args.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        requests, answers = directory / "requests.jsonl", directory / "answers.jsonl"
        write_requests(requests)

        def run() -> BatchSummary:
            return run_batch(
                llm,
                requests,
                answers,
                sampling_params=SamplingParams(temperature=0),  # of rows that say nothing themselves
                chat_template_kwargs={"enable_thinking": False},
                use_tqdm=False,
            )

        report("first run", run())
        # As if the power had gone while the last lines were written: the file ends in the middle of one.
        lines = answers.read_bytes().splitlines(keepends=True)
        answers.write_bytes(b"".join(lines[:-5]) + lines[-5][:20])
        report("after a crash", run())
        report("once more", run())

        found = read_answers(answers)
        right = 0
        for first, second in SUMS:
            text = found[f"{first} + {second}"]["text"]
            right += text.strip().endswith(f"= {first + second}")
        print(f"for example: {text}")
        print(f"{right} of {len(SUMS)} sums are right")


if __name__ == "__main__":
    main()
