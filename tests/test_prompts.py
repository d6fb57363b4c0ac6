"""Prompts in every form that has an order, and none that has not."""

from array import array
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.engine.prompts import as_prompt_list, parse_prompt

IDS = [3, 14, 15]
UNORDERED = {
    "set": {3, 14, 15},
    "frozenset": frozenset(IDS),
    "keys": dict.fromkeys(IDS).keys(),
    "values": dict(enumerate(IDS)).values(),
    "dict": dict.fromkeys(IDS),
    "memoryview": memoryview(bytes(IDS)),
    "bytes": bytes(IDS),
    "bytearray": bytearray(IDS),
    "generator": (token for token in IDS),
}
ORDERED = {
    "list": IDS,
    "tuple": tuple(IDS),
    "range": range(3, 6),
    "deque": deque(IDS),
    "array": array("i", IDS),
    "numpy": np.array(IDS),
    "tensor": torch.tensor(IDS),
    "list of numpy": list(np.array(IDS)),
}


@pytest.mark.parametrize("ids", UNORDERED.values(), ids=UNORDERED.keys())
class TestRefused:
    """The order of a set is nobody's, and raw bytes are not token ids."""

    def test_as_token_ids(self, ids: Any) -> None:
        with pytest.raises(TypeError, match=rf"\['prompt_token_ids'\] is a {type(ids).__name__};.*list of token"):
            parse_prompt("prompt 0", {"prompt_token_ids": ids})

    def test_as_prompts(self, ids: Any) -> None:
        if isinstance(ids, dict):
            return  # a prompt by itself, and refused for its keys
        with pytest.raises(TypeError, match=f"prompts is a {type(ids).__name__};"):
            as_prompt_list(ids)


@pytest.mark.parametrize("ids", ORDERED.values(), ids=ORDERED.keys())
class TestAccepted:
    """Anything else that holds whole numbers one after another."""

    def test_as_token_ids(self, ids: Any) -> None:
        text, found = parse_prompt("prompt 0", ids)
        assert (text, found) == (None, list(map(int, ids)))
        assert {type(token) for token in found or ()} == {int}
        assert parse_prompt("prompt 0", {"prompt_token_ids": ids}) == (None, found)

    def test_as_the_only_prompt(self, ids: Any) -> None:
        (prompt,) = as_prompt_list(ids)
        assert list(map(int, prompt)) == list(map(int, ids))


def test_ids_and_text_may_both_be_given() -> None:
    assert parse_prompt("prompt 0", {"prompt": "a", "prompt_token_ids": IDS}) == ("a", IDS)


def test_an_encoding_may_have_no_mask() -> None:
    assert parse_prompt("prompt 0", {"input_ids": IDS, "attention_mask": None}) == (None, IDS)
    with pytest.raises(ValueError, match="prompt 0 is padded"):
        parse_prompt("prompt 0", {"input_ids": IDS, "attention_mask": torch.tensor([0, 1, 1])})
