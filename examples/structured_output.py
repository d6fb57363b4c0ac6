"""JSON that follows a schema: a logits processor that allows only the tokens with which the schema can still be met.

pip install llguidance
python examples/structured_output.py
python examples/structured_output.py --model Qwen/Qwen3-0.6B --temperature 0.6

llguidance (MIT) turns the schema into a grammar and tells the allowed tokens; the rest is a dozen lines.
"""

import argparse
import json
import sys
from typing import Any

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH

try:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer
except ImportError:
    LLMatcher = from_tokenizer = None

SENTENCES = [
    "Ada is a baker from Oslo and is 41 years old.",
    "Bob, 25, works as a pilot in Paris.",
    "The teacher Eva lives in Rome and is 63.",
]
SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,11}$"},
        "city": {"type": "string", "pattern": "^[A-Z][a-z]{1,11}$"},
        "work": {"enum": ["crafts", "school", "travel"]},  # of which the question says nothing
    },
    "required": ["age", "name", "city", "work"],
    "additionalProperties": False,
}


class FollowSchema:
    """A logits processor; a request needs one of its own, for it follows the text that the request has so far."""

    def __init__(self, tokenizer: Any, schema: dict[str, Any]) -> None:
        # Without a fixed layout, a small model may write spaces until max_tokens.
        layout = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        self.matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema, overrides=layout))
        if self.matcher.is_error():
            raise ValueError(f"the schema cannot be followed: {self.matcher.get_error()}")
        self.seen: list[int] = []

    def __call__(self, output_token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Called for each token with those before it and the logits of the next, float32 [vocab_size]."""
        if output_token_ids[: len(self.seen)] != self.seen:  # another completion of the request (n > 1)
            self.matcher.reset()
            self.seen = []
        self.matcher.consume_tokens(output_token_ids[len(self.seen) :])
        self.seen = list(output_token_ids)
        # A byte a token: 0 if it is not allowed. The model's vocabulary may be padded beyond the tokenizer's.
        allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
        forbidden = torch.ones(len(logits), dtype=torch.bool)
        forbidden[: len(allowed)] = allowed[: len(logits)] == 0
        return logits.masked_fill_(forbidden.to(logits.device), float("-inf"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_help = "checkpoint directory, or OWNER/NAME on the Hugging Face hub (default: the demo checkpoint)"
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help=model_help)
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(default: 0)")
    args = parser.parse_args(argv)
    if LLMatcher is None:
        sys.exit("this example needs llguidance: pip install llguidance")

    with LLM(args.model) as llm:
        tokenizer = from_tokenizer(llm.get_tokenizer())  # once, for all requests

        def ask(follow: bool) -> list[str]:
            questions = [f"{sentence} Write age, name and city as JSON." for sentence in SENTENCES]
            params = [
                SamplingParams(
                    temperature=args.temperature,
                    max_tokens=128,
                    logits_processors=[FollowSchema(tokenizer, SCHEMA)] if follow else None,
                )
                for _ in questions
            ]
            conversations = [[{"role": "user", "content": question}] for question in questions]
            options = {"enable_thinking": False}
            outputs = llm.chat(conversations, params, use_tqdm=False, chat_template_kwargs=options)
            return [output.outputs[0].text for output in outputs]

        for sentence, free, followed in zip(SENTENCES, ask(False), ask(True), strict=True):
            record = json.loads(followed)
            print(f"{sentence}\n  left to itself: {free}\n  by the schema:  {json.dumps(record)}")


if __name__ == "__main__":
    main()
