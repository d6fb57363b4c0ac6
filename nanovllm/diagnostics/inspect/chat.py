"""The chat template of a checkpoint: what it makes of a conversation."""

from dataclasses import dataclass
from typing import Any

from nanovllm.diagnostics.inspect.findings import Findings
from nanovllm.engine.tokenizer import render_chat
from nanovllm.utils.model_config import ModelConfig

QUESTION = {"role": "user", "content": "add 12 and 30"}
ANSWER = {"role": "assistant", "content": "12 + 30 = 42"}
CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hello! How can I help?"},
    QUESTION,
]

# How the conversation is rendered: what it is called, and the options of ``render_chat``.
VARIANTS: dict[str, dict[str, Any]] = {
    "thinking on, generation prompt": {"chat_template_kwargs": {"enable_thinking": True}},
    "thinking off, generation prompt": {"chat_template_kwargs": {"enable_thinking": False}},
    "no generation prompt": {"add_generation_prompt": False},
}


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as the template writes it.

    Args:
        name: How it was rendered.
        text: The prompt.
        num_tokens: Its tokens.
    """

    name: str
    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ChatSection:
    """The section "chat".

    Args:
        has_template: Whether the tokenizer has a chat template.
        conversation: What was rendered.
        renderings: The conversation, rendered in each way.
        answer_end: The token right behind an answer, and its id; None if the template writes none.
    """

    has_template: bool
    conversation: list[dict[str, str]]
    renderings: list[Rendering]
    answer_end: tuple[str, int] | None = None


def inspect_chat(model: ModelConfig | None, tokenizer: Any, findings: Findings) -> ChatSection | None:
    """The section "chat"; None without a tokenizer."""
    if tokenizer is None:
        return None
    if not getattr(tokenizer, "chat_template", None):
        findings.note("chat", "the tokenizer has no chat template: chat() needs chat_template=...")
        return ChatSection(False, [], [])
    conversation = CONVERSATION
    try:
        render_chat(tokenizer, conversation)
    except ValueError as error:  # some know no system message
        findings.note("chat", f"a conversation of all roles is refused, a question alone is shown: {error}")
        conversation = [QUESTION]
    renderings = []
    for name, options in VARIANTS.items():
        try:
            text = render_chat(tokenizer, conversation, **options)
        except ValueError as error:
            findings.problem("chat", "chat template", f"{name}: {error}")
            continue
        renderings.append(Rendering(name, text, len(tokenizer.encode(text, add_special_tokens=False))))
    texts = {one.name: one.text for one in renderings}
    on, off, bare = (texts.get(name) for name in VARIANTS)
    if on is not None and on == off:
        findings.note("chat", "the template does not heed enable_thinking")
    if on is not None and on == bare:
        findings.note("chat", "the template writes no generation prompt")
    return ChatSection(True, conversation, renderings, _answer_end(model, tokenizer, findings))


def _answer_end(model: ModelConfig | None, tokenizer: Any, findings: Findings) -> tuple[str, int] | None:
    """The token that the template writes behind an answer: a model that was trained with it ends its own so."""
    try:
        text = render_chat(tokenizer, [QUESTION, ANSWER], add_generation_prompt=False)
    except ValueError:  # it takes a question, which is what is needed
        return None
    _, answered, rest = text.rpartition(ANSWER["content"])
    ids = tokenizer.encode(rest, add_special_tokens=False) if answered else []
    added = tokenizer.added_tokens_decoder
    if not ids or ids[0] not in added:
        return None
    end = str(added[ids[0]]), int(ids[0])
    if model is not None and end[1] not in model.eos_token_ids:
        findings.note("chat", f"the engine does not stop at {end[0]!r} ({end[1]}), by which the template ends answers")
    return end
