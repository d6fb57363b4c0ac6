"""The checkpoint's tokenizer: loading it, and rendering conversations and words with it."""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, TypedDict

from nanovllm.utils.model_config import CONFIG_FILE
from nanovllm.utils.text import kind_of

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
# Of a tokenizer's own: how long a prompt may be is for max_model_len to say.
NO_LIMIT = 1 << 62


class RenderedText(str):
    """Text that has its special tokens already: a chat template has put them in."""

    __slots__ = ()


class ChatOptions(TypedDict, total=False):
    """How conversations become prompts.

    Args:
        chat_template: A Jinja template instead of the tokenizer's.
        add_generation_prompt: End with the beginning of an answer, as is done unless told.
        continue_final_message: Continue the last message instead of answering it; needs
            ``add_generation_prompt=False``.
        tools: Functions the model may call, as the template takes them.
        chat_template_kwargs: More arguments of the template, such as ``{"enable_thinking": False}``.
    """

    chat_template: str | None
    add_generation_prompt: bool
    continue_final_message: bool
    tools: list[Any] | None
    chat_template_kwargs: Mapping[str, Any] | None


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint; ValueError saying what to do if it cannot be loaded."""
    from transformers import AutoTokenizer

    if not any(os.path.exists(os.path.join(path, name)) for name in TOKENIZER_FILES):
        # transformers 5 would make up an empty tokenizer
        raise ValueError(
            f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES)}); download it, name another directory with "
            "tokenizer=..., or pass skip_tokenizer_init=True and prompt with token ids"
        )
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception:
            # Of config.json it needs the kind of model alone, yet refuses what is wrong, or unusual, anywhere in it.
            config = _plain_config(path)
            if config is None:
                raise
            tokenizer = AutoTokenizer.from_pretrained(path, config=config)
    except Exception as error:  # transformers raises whatever its parsers raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the tokenizer in {path} cannot be loaded ({reason}); download tokenizer.json and tokenizer_config.json, "
            "name another directory with tokenizer=..., or pass skip_tokenizer_init=True and prompt with token ids"
        ) from error
    if not isinstance(tokenizer.model_max_length, int | float):  # it would compare with the first prompt, and fail
        tokenizer.model_max_length = NO_LIMIT
    return tokenizer


def _plain_config(path: str) -> Any:
    """A configuration of the kind that config.json names, and nothing else of the file; None if that is not known."""
    from transformers import AutoConfig

    try:
        with open(os.path.join(path, CONFIG_FILE), encoding="utf-8") as file:
            return AutoConfig.for_model(json.load(file)["model_type"])
    except Exception:  # transformers, too, knows some kinds only
        return None


def encode(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text, of any length without a word; a :class:`RenderedText` is given no more special tokens."""
    special = add_special_tokens and not isinstance(text, RenderedText)
    return tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def check_start(name: str, tokenizer: Any, text: str, max_model_len: int) -> None:
    """Refuse a text whose beginning alone is far too long: a tokenizer takes minutes, and gigabytes, for a large file.

    Raises:
        ValueError: It is.
    """
    length = 16 * max_model_len
    if len(text) <= 4 * length:  # then looking twice would cost more than it spares
        return
    num_tokens = len(encode(tokenizer, text[:length]))
    if num_tokens > 2 * max_model_len:  # whatever the last of them become with what follows
        raise ValueError(
            f"{name} has {len(text):,} characters, the first {length:,} alone {num_tokens:,} tokens; max_model_len is "
            f"{max_model_len}, prompt and output together (raise max_model_len or shorten the prompt)"
        )


def encode_words(tokenizer: Any, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word, and of it after a space, unless it begins with one, or a line's end, of its own."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word,) if word[:1].isspace() else (word, f" {word}"):
            ids = tuple(encode(tokenizer, text, add_special_tokens=False))
            if ids:
                found[ids] = None
    return tuple(found)


def as_conversations(messages: Any) -> list[tuple[str, Any]]:
    """One conversation or many -> what error messages call each, and the conversations, which are yet to be checked.

    Raises:
        TypeError: It is no list of messages, nor a list of such lists.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(
            f"messages is {kind_of(messages)}; pass a list of {{'role': ..., 'content': ...}}, or a list of such lists"
        )
    given = list(messages)
    if given and isinstance(given[0], Mapping):
        return [("messages", given)]
    return [(f"conversation {index}", conversation) for index, conversation in enumerate(given)]


def check_conversation(name: str, conversation: Any) -> list[dict[str, Any]]:
    """The messages of a conversation, their contents as text.

    Raises:
        TypeError: It is no list of messages, or a content is no text.
        ValueError: It is empty, or a message lacks its role.
    """
    if isinstance(conversation, (str, bytes, Mapping)) or not isinstance(conversation, Iterable):
        raise TypeError(f"{name} is {kind_of(conversation)}; it must be a list of messages")
    checked = []
    for index, message in enumerate(conversation):
        if not isinstance(message, Mapping):
            raise TypeError(f"{name}[{index}] is {kind_of(message)}; it must be a dictionary with 'role'")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{name}[{index}] has no 'role'; use 'system', 'user', 'assistant' or 'tool'")
        if "content" not in message and "tool_calls" not in message:
            known = ", ".join(repr(str(key)) for key in message)
            raise ValueError(f"{name}[{index}] has no 'content', only {known}")
        checked.append({**message, "content": _text(f"{name}[{index}]", message.get("content"))})
    if not checked:
        raise ValueError(f"{name} is empty; give at least one message")
    return checked


def _text(name: str, content: Any) -> str:
    """The content of a message as text; parts of type "text" are joined."""
    if content is None:  # a message that only calls tools
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise TypeError(f"{name}['content'] is {content!r}; it must be a string or a list of parts of type 'text'")


# What transformers itself gives to every template, besides functions.
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
_SPECIAL_TOKENS = frozenset(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
) | {"additional_special_tokens", "extra_special_tokens"}  # fmt: skip


def template_options(tokenizer: Any, chat_template: str | None = None) -> frozenset[str] | None:
    """The arguments that a chat template reads besides those it always gets; None if its text does not tell."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):  # several by name, of which transformers chooses
        own = own.get(chat_template or "default", chat_template)
    template = own if chat_template is None or isinstance(tokenizer.chat_template, dict) else chat_template
    return _read_options(template) if isinstance(template, str) else None


@lru_cache(maxsize=16)
def _read_options(template: str) -> frozenset[str] | None:
    from jinja2 import TemplateError, meta
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """transformers' block ``{% generation %}``, read as what is within it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols])
    try:
        names = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:  # transformers will say what is wrong with it
        return None
    return frozenset(names - _GIVEN - _SPECIAL_TOKENS - {"raise_exception", "strftime_now"})


_warned: set[tuple[str, frozenset[str]]] = set()


def _warn_of_unread(tokenizer: Any, chat_template: str | None, names: Iterable[str]) -> None:
    """Warn, once, of template arguments that the template does not read: nothing else would tell of a slip."""
    options = template_options(tokenizer, chat_template)
    if options is None:
        return
    for name in names:
        if name in options | _GIVEN | _SPECIAL_TOKENS or (name, options) in _warned:
            continue
        _warned.add((name, options))
        reads = ", ".join(sorted(options)) or "none besides the conversation"
        logger.warning(
            "chat_template_kwargs has %r, which the chat template does not read, so it does nothing; the options that "
            "it reads: %s",
            name,
            reads,
        )


def render_chat(
    tokenizer: Any,
    conversation: list[dict[str, Any]],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as the text that the model was trained to continue; the options are :class:`ChatOptions`.

    Raises:
        TypeError: ``chat_template_kwargs`` is no mapping.
        ValueError: The tokenizer has no chat template, or the template refuses the conversation.
    """
    if not isinstance(chat_template_kwargs, Mapping | None):
        raise TypeError(f"chat_template_kwargs is {chat_template_kwargs!r}; it must be a dictionary")
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template; pass chat_template=..., or call generate() with plain text"
        )
    _warn_of_unread(tokenizer, chat_template, chat_template_kwargs or ())
    try:
        return tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **(chat_template_kwargs or {}),
        )
    except Exception as error:  # templates are programs, and raise what they like
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
