"""The forms a prompt may take: text, token ids, or a dictionary of either."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.utils.text import kind_of
from nanovllm.utils.validation import check_int

Prompt = str | list[int] | Mapping[str, Any]
FOR_CHAT = "answer conversations with llm.chat(messages) or llm.stream_chat(messages)"


def as_prompt_list(prompts: Any, name: str = "prompts") -> list[Any]:
    """One prompt or many -> a list of prompts; TypeError if it is neither. ``name`` is what messages call it."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    prompts = _plain(prompts)
    if isinstance(prompts, str):  # numpy's
        return [prompts]
    if not _is_list(prompts):
        raise TypeError(f"{name} is {kind_of(prompts)}; pass a string, a list of token ids, or a list of prompts")
    if prompts and all(isinstance(_plain(token), numbers.Integral) for token in prompts):
        return [list(prompts)]
    return list(prompts)


def as_it_is(prompt: Any) -> Any:
    """A copy of what a prompt may be, as far as its owner could go on to change it; whatever else it is, as it is."""
    if isinstance(prompt, Mapping):
        return {key: as_it_is(value) for key, value in prompt.items()}
    prompt = _plain(prompt)
    return list(prompt) if _is_list(prompt) else prompt


def parse_prompt(name: str, prompt: Any) -> tuple[str | None, list[int] | None]:
    """Text and token ids of a prompt in any of its forms; ids are None where the text is to be tokenised.

    Args:
        name: What error messages call it.
        prompt: A string, token ids, or a dictionary with "prompt", "prompt_token_ids", or a tokenizer's "input_ids".

    Raises:
        TypeError: It, or a part of it, has the wrong type.
        ValueError: It has other keys, or text that is not valid Unicode.
    """
    if isinstance(prompt, Mapping):
        keys = [str(key) for key in prompt]
        if "input_ids" in keys:
            return None, _encoded_ids(name, prompt)
        if {"role", "content"} <= set(keys):
            raise ValueError(f"{name} is a chat message; {FOR_CHAT}")
        if not keys or not set(keys) <= {"prompt", "prompt_token_ids"}:
            raise ValueError(f"{name} has the keys {keys}; use 'prompt' (text) or 'prompt_token_ids'")
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is None and ids is None:
            raise ValueError(f"{name} has neither 'prompt' nor 'prompt_token_ids'")
        if text is not None:
            check_text(f"{name}['prompt']", text)
        return text, None if ids is None else _token_ids(f"{name}['prompt_token_ids']", ids)
    if isinstance(prompt, str):
        check_text(name, prompt)
        return prompt, None
    return None, _token_ids(name, prompt)


def check_text(name: str, text: Any) -> None:
    """TypeError if it is no string, ValueError if it is not valid Unicode."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is {kind_of(text)}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode ({error}); replace the lone surrogates in it") from error


def _encoded_ids(name: str, encoding: Mapping[str, Any]) -> list[int]:
    """Token ids of what a transformers tokenizer returns for one text."""
    mask = _plain(encoding.get("attention_mask"))
    if _is_list(mask) and not all(mask):
        raise ValueError(f"{name} is padded (its attention_mask has zeros); encode each prompt by itself")
    return _token_ids(f"{name}['input_ids']", encoding["input_ids"])


def _token_ids(name: str, ids: Any) -> list[int]:
    ids = _plain(ids)
    if not _is_list(ids):
        raise TypeError(f"{name} is {kind_of(ids)}; it must be a string, a list of token ids or a dictionary")
    ids = list(ids)
    if set(map(type, ids)) <= {int}:  # as nearly always: prompts are long
        return ids
    if any(isinstance(token, Mapping) and "role" in token for token in ids):
        raise ValueError(f"{name} is a conversation; {FOR_CHAT}")
    return [check_int(f"position {position} of {name}", token) for position, token in enumerate(map(_plain, ids))]


def _is_list(values: Any) -> bool:
    """Whether ``values`` are items in an order: neither a set nor a view of a dictionary, nor text or raw bytes."""
    return isinstance(values, Sequence) and not isinstance(values, (str, bytes, bytearray, memoryview))


def _plain(values: Any) -> Any:
    """A numpy array, a tensor or an ``array`` as lists; anything else as it is."""
    tolist = None if isinstance(values, memoryview) else getattr(values, "tolist", None)
    return values if tolist is None else tolist()
