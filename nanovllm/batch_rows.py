"""A row of a batch job: what it asks for, what identifies it, and how its answer is written."""

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash

from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.text import kind_of
from nanovllm.utils.validation import check_int, unknown_argument

CONTENT_OF_URL = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
OPENAI_KEYS = {"custom_id", "method", "url", "body"}
CHAT_OPTIONS: dict[str, type] = {
    "chat_template": str,
    "chat_template_kwargs": dict,
    "tools": list,
    "add_generation_prompt": bool,
    "continue_final_message": bool,
}
PARAMETERS = {field.name for field in dataclasses.fields(SamplingParams)} - {"logits_processors"}
OTHER_PARAMETERS = {"max_completion_tokens", "top_logprobs"}
NULLABLE = {"max_tokens"} | {name for name in PARAMETERS if getattr(SamplingParams(), name) is None}
IGNORED = {"model", "user", "metadata", "store"}  # they change no answer
# Parameters that we lack, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (None, False),
    "stream_options": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "response_format": (None, {"type": "text"}),
}


@dataclasses.dataclass(slots=True)
class BatchRow:
    """A row of the input: where it stands, what it asks for, and what its answer depends on."""

    line: int
    row_id: str | int
    digest: str = ""
    url: str | None = None  # None: a plain row
    content: str = ""  # "messages" or "prompt"
    value: Any = None
    metadata: Any = None  # the caller's own, for the answer
    chat: dict[str, Any] = dataclasses.field(default_factory=dict)
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)


# ---- reading a row


def load_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError("the line is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"the line is not JSON ({error})") from error


def line_id(number: int) -> str:
    """The id of a row without one: no number, for that may be another row's own id."""
    return f"line-{number}"


def _is_openai(record: dict[str, Any]) -> bool:
    """Whether a row is in OpenAI's format, or means to be."""
    return bool(OPENAI_KEYS & (record.keys() - {"custom_id"}))


def row_id_of(record: Any, number: int) -> str | int:
    """A row's id, or one from its line number; TypeError if the id is neither text nor a whole number."""
    found = None
    if isinstance(record, dict):
        found = record.get("custom_id")
        if found is None and not _is_openai(record):
            found = record.get("id")
    if found is None:
        return line_id(number)
    if isinstance(found, bool) or not isinstance(found, (str, int)):
        raise TypeError(f"the row's id is {found!r}; it must be a string or a whole number")
    return found


def metadata_of(record: Any) -> Any:
    """What a row has for whoever reads its answer; None if there is nothing."""
    if isinstance(record, dict) and _is_openai(record):
        record = record.get("body")
    return record.get("metadata") if isinstance(record, dict) else None


def parse_record(record: Any, row: BatchRow, defaults: SamplingParams, template_kwargs: Mapping[str, Any]) -> None:
    """Fill in what a row asks for; TypeError or ValueError saying what is wrong with it."""
    if not isinstance(record, dict):
        raise TypeError(f"the line is {kind_of(record)}; it must be an object")
    if _is_openai(record):
        for name in record.keys() - OPENAI_KEYS:
            raise _unknown("a row with 'url' and 'body'", name, OPENAI_KEYS, "the body's 'metadata'")
        row.url = record.get("url")
        if not isinstance(row.url, str) or row.url not in CONTENT_OF_URL:
            row.url = None
            raise ValueError(f"url is {record.get('url')!r}; use one of {', '.join(CONTENT_OF_URL)}")
        if record.get("method", "POST") != "POST":
            raise ValueError(f"method is {record['method']!r}; it must be 'POST'")
        if not isinstance(record.get("body"), dict):
            raise TypeError(f"body is {record.get('body')!r}; it must be an object")
        settings = dict(record["body"])
    else:
        settings = {name: value for name, value in record.items() if name not in ("custom_id", "id")}
    wanted = [CONTENT_OF_URL[row.url]] if row.url else ["messages", "prompt"]
    given = [name for name in ("messages", "prompt") if name in settings]
    if len(given) != 1 or given[0] not in wanted:
        has = " and ".join(given) or f"no prompt{', only ' if settings else ''}{', '.join(map(repr, settings))}"
        raise ValueError(f"the row has {has}; it needs {' or '.join(wanted)}")
    row.content = given[0]
    row.value = settings.pop(row.content)
    is_chat = row.content == "messages"
    if is_chat:
        row.chat = _chat_options(settings, template_kwargs)
    row.params = dataclasses.replace(defaults, **_parameters(settings, row.url, is_chat))


def _unknown(where: str, name: str, known: set[str], place: str) -> TypeError:
    """A TypeError for what may be misspelt, or a column that only the caller reads."""
    own = f"a column of your own goes into {place}, and comes back with the answer"
    return unknown_argument(where, name, known, otherwise=own)


def _chat_options(settings: dict[str, Any], template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Take the arguments of :meth:`LLM.render_chat` out of ``settings``."""
    chat = {name: settings.pop(name) for name in CHAT_OPTIONS if name in settings}
    chat = {name: value for name, value in chat.items() if value is not None}
    for name, value in chat.items():
        if not isinstance(value, CHAT_OPTIONS[name]):
            kind = {str: "a string", dict: "an object", list: "a list", bool: "true or false"}[CHAT_OPTIONS[name]]
            raise TypeError(f"{name} is {value!r}; it must be {kind}")
    chat["chat_template_kwargs"] = {**template_kwargs, **chat.get("chat_template_kwargs", {})}
    chat.setdefault("add_generation_prompt", not chat.get("continue_final_message", False))
    return chat


def _parameters(settings: dict[str, Any], url: str | None, is_chat: bool) -> dict[str, Any]:
    """Arguments of SamplingParams; TypeError or ValueError for what would change the answer and is not known."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise ValueError(f"{name} is {value!r}, which a batch job cannot do; leave it out")
        if name in CHAT_OPTIONS and not is_chat:
            raise ValueError(f"{name} is for messages; the row has a prompt")
        if name not in PARAMETERS | OTHER_PARAMETERS | NEUTRAL.keys() | IGNORED:
            known = PARAMETERS | OTHER_PARAMETERS | (CHAT_OPTIONS.keys() if is_chat else set())
            raise _unknown("a row", name, known, "'metadata'")
        # null is a value of some parameters (max_tokens: as many as fit); others count as left out.
        if name in NULLABLE or (name in PARAMETERS | OTHER_PARAMETERS and value is not None):
            found[name] = value
    if "max_completion_tokens" in found:
        if found.get("max_tokens") is not None:
            raise ValueError("the row has max_tokens and max_completion_tokens; give one of them")
        found["max_tokens"] = found.pop("max_completion_tokens")
    top = found.pop("top_logprobs", None)
    wanted = found.get("logprobs")
    if isinstance(wanted, bool) and is_chat:
        found["logprobs"] = (0 if top is None else check_int("top_logprobs", top, low=0)) if wanted else None
    elif wanted is not None and url and is_chat:
        raise TypeError(f"logprobs is {wanted!r}; it must be true or false, with top_logprobs for their number")
    if top and wanted is not True:
        raise ValueError(f"top_logprobs is {top!r}, which needs messages and logprobs: true")
    return found


def make_prompt(llm: LLM, row: BatchRow) -> Any:
    """What the engine is to continue; ValueError or TypeError if the messages cannot be rendered."""
    if row.content == "prompt":
        return row.value
    if not isinstance(row.value, list) or not row.value or not all(isinstance(m, dict) for m in row.value):
        raise TypeError(f"messages is {row.value!r}; it must be a list of {{'role': ..., 'content': ...}}")
    return llm.render_chat(row.value, **row.chat)[0]


# ---- what identifies a row


def hash_of(*parts: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=_name_of).encode())


def hash_id(row_id: str | int) -> bytes:
    return xxhash.xxh3_128_digest(json.dumps(row_id).encode())


def _name_of(value: Any) -> Any:
    """Stands in a hash for what JSON lacks: a schedule's pieces, a callable's name."""
    if hasattr(value, "pieces"):
        return value.pieces()
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}" if callable(value) else str(value)


def canonical(params: SamplingParams) -> dict[str, Any]:
    """The parameters that are not our defaults: a parameter that a later version adds changes no hash."""
    plain = SamplingParams()
    values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    return {name: value for name, value in values.items() if value != getattr(plain, name)}


def engine_context(llm: LLM) -> list[Any]:
    """What all answers of an engine depend on.

    Chat template, tokenizer and end tokens are files of the fingerprint; the checkpoint's sampling defaults are among
    a row's parameters. What changes no more than rounding is left out, for a job may go on elsewhere: device, attention
    backend, number of processes, sizes of batch and cache. So is ``max_model_len``, which not every answer depends on:
    see :func:`cut_off_at`. And so are versions of the libraries, ours too: a job goes on after an update.
    """
    config = llm.engine.config
    folders = dict.fromkeys([config.model, config.tokenizer or config.model])
    fingerprints = [checkpoint_fingerprint(folder) for folder in folders]
    context = [fingerprints, llm.get_metrics()["dtype"], config.seed, config.hf_overrides, config.skip_tokenizer_init]
    # What is put in later stands there only where it is not the default: a job begun before goes on.
    return context if config.quantization is None else [*context, {"quantization": config.quantization}]


def longest_sequence(llm: LLM) -> int:
    """Most tokens, prompt and output together, that an engine lets a sequence have."""
    engine = llm.engine
    return min(engine.max_model_len, engine.scheduler.max_tokens_per_sequence())


def cut_off_at(row: BatchRow, output: RequestOutput, room: int) -> int:
    """Tokens, prompt included, at which the engine's ``room`` ended an answer, or began its prompt; else 0.

    Of what is 0 the answer would be the same in more room.
    """
    most, num_prompt = row.params.max_tokens, len(output.prompt_token_ids)
    lengths = [
        num_prompt + len(completion.token_ids)
        for completion in output.outputs
        if completion.finish_reason == "length" and (most is None or len(completion.token_ids) < most)
    ]
    if row.params.truncate_prompt_tokens == -1 and num_prompt + 1 >= room:  # more of the prompt may have been there
        lengths.append(num_prompt + 1)
    return max(lengths, default=0)


def checkpoint_fingerprint(folder: str | os.PathLike[str]) -> str:
    """A hash that stays when a checkpoint is copied, and changes with its configuration, tokenizer or weights.

    Of the weights it reads names, shapes and two samples of each tensor, which takes milliseconds: a change that
    spares all of them is not seen.
    """
    digest = xxhash.xxh3_128()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".jinja", ".model") or path.name == "merges.txt":
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        elif path.suffix == ".safetensors":
            with open(path, "rb") as file:
                size = file.read(8)
                header = file.read(int.from_bytes(size, "little"))
                digest.update(path.name.encode() + b"\0" + header)
                for name, tensor in json.loads(header).items():
                    if name != "__metadata__":
                        begin, end = tensor["data_offsets"]
                        for offset in (begin, (begin + end) // 2):
                            file.seek(8 + len(header) + offset)
                            digest.update(file.read(min(1024, end - offset)))
    return digest.hexdigest()


# ---- writing a row


def line_head(row: BatchRow) -> dict[str, Any]:
    """What each line of a row begins with."""
    head: dict[str, Any] = {"hash": row.digest, "line": row.line, "custom_id": row.row_id}
    if row.url is not None:
        head |= {"id": f"batch_req_{row.digest}", "response": None}
    return head | {"error": None} | ({} if row.metadata is None else {"metadata": row.metadata})


def answer_line(row: BatchRow, output: RequestOutput, model: str, room: int) -> dict[str, Any]:
    """The line of a row that was answered by an engine with ``room`` for so many tokens."""
    line = _answer(row, output, model)
    return line | {"cut_off_at": length} if (length := cut_off_at(row, output, room)) else line


def _answer(row: BatchRow, output: RequestOutput, model: str) -> dict[str, Any]:
    num_prompt, num_output = len(output.prompt_token_ids), sum(len(c.token_ids) for c in output.outputs)
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}
    if row.url is None:
        choices = [_plain_choice(completion) for completion in output.outputs]
        line = line_head(row) | {row.content: row.value, **choices[0]}
        if len(choices) > 1:
            line["outputs"] = [{"index": index, **choice} for index, choice in enumerate(choices)]
        if output.prompt_logprobs is not None:
            line["prompt_logprobs"] = [entry and _entries(entry) for entry in output.prompt_logprobs]
        return line | {"usage": usage}
    is_chat = row.content == "messages"
    choices = [_choice(completion, is_chat, row.params.logprobs) for completion in output.outputs]
    if output.prompt_logprobs is not None:
        choices[0]["prompt_logprobs"] = [entry and _entries(entry) for entry in output.prompt_logprobs]
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{row.digest}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage,
    }
    return line_head(row) | {"response": {"status_code": 200, "request_id": row.digest, "body": body}}


def _plain_choice(completion: CompletionOutput) -> dict[str, Any]:
    choice: dict[str, Any] = {"text": completion.text, "token_ids": completion.token_ids}
    choice |= {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
    if completion.logprobs is not None:
        choice["logprobs"] = [_entries(entry) for entry in completion.logprobs]
    return choice


def _choice(completion: CompletionOutput, is_chat: bool, num_top: int | None) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": completion.index}
    choice |= {"message": {"role": "assistant", "content": completion.text}} if is_chat else {"text": completion.text}
    choice |= {"logprobs": None, "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
    if completion.logprobs is not None:
        taken = [entry[token] for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
        tops = [sorted(entry.values(), key=lambda e: e.rank or 0) for entry in completion.logprobs]
        tops = [top if num_top == -1 else top[:num_top] for top in tops]
        if is_chat:
            pairs = zip(taken, tops, strict=True)
            choice["logprobs"] = {
                "content": [_chat_token(e) | {"top_logprobs": [_chat_token(t) for t in top]} for e, top in pairs]
            }
        else:
            tokens = [e.decoded_token or "" for e in taken]
            choice["logprobs"] = {
                "tokens": tokens,
                "token_logprobs": [_finite(e) for e in taken],
                "top_logprobs": [{t.decoded_token or "": _finite(t) for t in reversed(top)} for top in tops],
                "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
            }
    return choice


def _chat_token(entry: Logprob) -> dict[str, Any]:
    token = entry.decoded_token or ""
    return {"token": token, "logprob": _finite(entry), "bytes": list(token.encode())}


def _entries(entries: Mapping[int, Logprob]) -> dict[int, dict[str, Any]]:
    """Log-probabilities by token id."""
    return {token: dataclasses.asdict(entry) | {"logprob": _finite(entry)} for token, entry in entries.items()}


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, -9999.0)  # JSON has no infinity
