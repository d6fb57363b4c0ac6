"""How tokens are chosen: greedy, with seeds, several at once, temperature schedules, and rules of your own.

python examples/sampling.py
python examples/sampling.py --model Qwen3-0.6B --temperature 1

The demo checkpoint is sure of nearly all it says, so the temperatures here are high.
"""

import argparse

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.layers.temperature import Linear, Points


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_help = "checkpoint directory, or OWNER/NAME on the Hugging Face hub (default: the demo checkpoint)"
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help=model_help)
    parser.add_argument("--temperature", type=float, default=3.0, metavar="T", help="a high one (default: 3)")
    args = parser.parse_args(argv)
    hot = args.temperature

    with LLM(args.model) as llm:

        def ask(question: str, params: SamplingParams) -> list[str]:
            """The completions of an answer."""
            [output] = llm.chat(
                [{"role": "user", "content": question}],
                params,
                use_tqdm=False,
                chat_template_kwargs={"enable_thinking": False},
            )
            return [completion.text for completion in output.outputs]

        def show(what: str, texts: list[str]) -> None:
            for text in texts:
                print(f"{what:24} {text!r}")

        count = "count from 1 to 12"
        print("-- temperature 0 takes the most likely token")
        show("greedy", ask(count, SamplingParams(temperature=0)))

        print("-- a seed makes noise repeatable, whatever else runs beside it")
        for seed in (1, 1, 2):
            show(f"seed {seed}", ask(count, SamplingParams(temperature=hot, max_tokens=24, seed=seed)))

        print("-- n completions of a prompt, which is computed once; top_p cuts off what is unlikely")
        show("n=3", ask(count, SamplingParams(temperature=hot, max_tokens=24, seed=1, n=3)))
        show("n=3, top_p=0.3", ask(count, SamplingParams(temperature=hot, top_p=0.3, max_tokens=24, seed=1, n=3)))

        print("-- schedules: a temperature for each position of the output")
        warming = Linear(0.0, 1.5 * hot, num_tokens=24)
        show("warming up", ask(count, SamplingParams(temperature=warming, max_tokens=40, seed=1)))
        sudden = Points(((0, 0.0), (15, 0.0), (16, 2 * hot)))
        show("sudden, at token 16", ask(count, SamplingParams(temperature=sudden, max_tokens=32, seed=1)))

        print("-- a logits processor changes the logits as it likes; this one forbids a digit")
        tokenizer = llm.get_tokenizer()
        with_seven = [token for text, token in tokenizer.get_vocab().items() if "7" in text]

        def no_seven(output_token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            """Called for each token with those before it and the logits of the next, float32 [vocab_size]."""
            logits[with_seven] = float("-inf")
            return logits

        show("without sevens", ask(count, SamplingParams(temperature=0, max_tokens=64, logits_processors=[no_seven])))
        # Where a fixed set of tokens is all there is to it, this does the same, and faster:
        bias = dict.fromkeys(with_seven, -100.0)
        show("with logit_bias", ask(count, SamplingParams(temperature=0, max_tokens=64, logit_bias=bias)))


if __name__ == "__main__":
    main()
