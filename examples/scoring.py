"""How likely given answers are: multiple choice without generating a token.

python examples/scoring.py
python examples/scoring.py --model Qwen3-0.6B
"""

import argparse
import math

from nanovllm import LLM
from nanovllm.demo import DEMO_MODEL_PATH

# A question, the choices, and the number of the right one.
QUESTIONS = [
    ("what is 96 minus 48?", ["96 - 48 = 38", "96 - 48 = 48", "96 - 48 = 58", "96 - 48 = 144"], 1),
    ("sort these numbers: 58, 31, 77, 12", ["12, 31, 58, 77", "77, 58, 31, 12", "12, 31, 77, 58"], 0),
    ("reverse these words: apple river stone", ["apple river stone", "river stone apple", "stone river apple"], 2),
    ("count from 3 to 9", ["3, 4, 5, 6, 7, 8", "3, 4, 5, 6, 7, 8, 9", "3, 5, 7, 9"], 1),
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_help = "checkpoint directory, or OWNER/NAME on the Hugging Face hub (default: the demo checkpoint)"
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help=model_help)
    args = parser.parse_args(argv)

    with LLM(args.model) as llm:
        # The questions as the model was trained to see them; each ends where the answer begins.
        conversations = [[{"role": "user", "content": question}] for question, _, _ in QUESTIONS]
        prompts = llm.render_chat(conversations, chat_template_kwargs={"enable_thinking": False})
        # Every answer ends with this token. It counts, too: "3, 4, 5" is a likely beginning of "3, 4, 5, 6".
        end = llm.get_tokenizer().eos_token

        # One call for all pairs. Equal prompts are computed once, as the prefix cache is on.
        pairs = [
            (prompt, f"{choice}{end}")
            for prompt, (_, choices, _) in zip(prompts, QUESTIONS, strict=True)
            for choice in choices
        ]
        scores = iter(llm.score([prompt for prompt, _ in pairs], [text for _, text in pairs], use_tqdm=False))

    num_right = 0
    for question, choices, right in QUESTIONS:
        found = [next(scores) for _ in choices]
        total = sum(math.exp(score.logprob) for score in found)
        best = max(range(len(choices)), key=lambda index: found[index].logprob)
        num_right += best == right
        print(question)
        for index, (choice, score) in enumerate(zip(choices, found, strict=True)):
            share = math.exp(score.logprob) / total  # among the choices
            mark = "*" if index == best else " "
            # Longer answers have more tokens that can be unlikely: the mean of a token compares them otherwise.
            mean = score.logprob / len(score.token_ids)
            print(f"  {mark} {choice:24} log-probability {score.logprob:8.2f} ({mean:6.2f} a token) share {share:6.1%}")
    print(f"{num_right} of {len(QUESTIONS)} right")


if __name__ == "__main__":
    main()
