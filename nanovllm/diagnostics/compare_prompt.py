"""The prompt of a comparison, as token ids."""

import os
import random
from typing import Any

from nanovllm.engine.prompts import check_text
from nanovllm.engine.tokenizer import TOKENIZER_FILES, load_tokenizer
from nanovllm.utils.model_config import load_model_config

# Longer than a block of the KV cache, so that a prompt that comes again is served from it in part.
DEFAULT_CONVERSATION = (
    ("user", "add 12 and 30"),
    ("assistant", "12 + 30 = 42"),
    ("user", "list all prime numbers within 30"),
)
# Of a checkpoint without a tokenizer.
NUM_RANDOM_TOKENS = 37


def has_tokenizer(path: str) -> bool:
    """Whether a directory has a tokenizer's files."""
    return any(os.path.exists(os.path.join(path, name)) for name in TOKENIZER_FILES)


def prompt_ids(
    model: str,
    tokenizer: str | None = None,
    text: str | None = None,
    token_ids: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of what is to be compared.

    Args:
        model: The checkpoint's directory.
        tokenizer: The tokenizer's; the model's by default.
        text: A prompt; by default a conversation in the checkpoint's own chat format.
        token_ids: Token ids, separated by commas or spaces, instead.
        overrides: Replaces entries of config.json.

    Raises:
        ValueError: They are no token ids, the text is empty or not valid Unicode, or there is no tokenizer for it.
    """
    config = load_model_config(model, overrides)
    where = tokenizer or model
    if token_ids is not None:
        try:
            found = [int(word) for word in token_ids.replace(",", " ").split()]
        except ValueError:
            raise ValueError(f"token ids are {token_ids!r}; give whole numbers, as in 12,7,30") from None
    elif text is not None:
        check_text("the prompt", text)
        if not has_tokenizer(where):
            raise ValueError(f"{where} has no tokenizer, which a prompt of text needs; give token ids instead")
        found = list(load_tokenizer(where).encode(text))
    elif has_tokenizer(where):
        found = _default(load_tokenizer(where))
    else:
        draw = random.Random(0)
        found = [draw.randrange(config.vocab_size) for _ in range(NUM_RANDOM_TOKENS)]
    if not found:
        raise ValueError("the prompt is empty; give at least one token")
    wrong = next((token for token in found if not 0 <= token < config.vocab_size), None)
    if wrong is not None:
        raise ValueError(f"the prompt has token id {wrong}; the vocabulary has ids 0 to {config.vocab_size - 1}")
    return found


def _default(tokenizer: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer.encode("\n".join(text for _, text in DEFAULT_CONVERSATION)))
    messages = [{"role": role, "content": text} for role, text in DEFAULT_CONVERSATION]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))
