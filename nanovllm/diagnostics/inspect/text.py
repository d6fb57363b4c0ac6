"""An inspection as text: tables of at most 120 columns."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nanovllm.diagnostics.inspect import Inspection
from nanovllm.diagnostics.inspect.chat import ChatSection
from nanovllm.diagnostics.inspect.configuration import ConfigSection, Entry
from nanovllm.diagnostics.inspect.findings import by_layer
from nanovllm.diagnostics.inspect.memory import Capacity, MemorySection
from nanovllm.diagnostics.inspect.parameters import FILLS, ParametersSection, TensorInfo
from nanovllm.diagnostics.inspect.support import SupportSection
from nanovllm.diagnostics.inspect.tokens import TokenizerSection
from nanovllm.utils.text import counted

WIDTH = 120
_LEAST = 20  # columns, of the first and the last column
_TITLES = {
    "config": "Configuration",
    "support": "Support",
    "parameters": "Parameters",
    "memory": "Memory",
    "tokenizer": "Tokenizer",
    "chat": "Chat template",
}


def render(inspection: Inspection) -> str:
    """The whole report."""
    lines: list[str] = []
    for name, section in inspection.sections.items():
        lines += _heading(_TITLES[name])
        lines += ["(nothing to show: see the problems)"] if section is None else _RENDERERS[name](section)
        for note in inspection.findings.notes_of(name):
            lines += _wrapped(f"note: {note}", indent="      ")
        lines.append("")
    lines += _heading("Problems")
    for number, problem in enumerate(inspection.problems, 1):
        lines += _wrapped(f"{number}. {problem.kind}: {problem.message}", indent="   ")
    if not inspection.problems:
        lines.append("none")
    return "\n".join(lines)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = (), gap: str = "  "
) -> list[str]:
    """Aligned columns; those of ``numeric`` to the right.

    Of a last column that is too wide the rest goes on below; of a first one the middle is left out.
    """
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    between = len(gap) * (len(header) - 1)
    last = min(widths[-1], max(_LEAST, WIDTH - sum(widths[:-1]) - between))
    widths[0] = min(widths[0], max(_LEAST, WIDTH - sum(widths[1:-1]) - last - between))
    left = sum(widths[:-1]) + between
    lines = []
    for row in [header, ["-" * width for width in [*widths[:-1], last]], *rows]:
        first, *others = [_cut(row[0], widths[0]), *row[1:]]
        cells = [
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip([first, *others], [*widths[:-1], last], strict=True))
        ]
        pieces = textwrap.wrap(row[-1], last) if len(row[-1]) > last else [cells[-1]]
        lines.append(gap.join([*cells[:-1], pieces[0]]).rstrip())
        lines += [" " * left + piece for piece in pieces[1:]]
    return lines


def _cut(text: str, width: int) -> str:
    """``text``, or its beginning and end."""
    if len(text) <= width:
        return text
    end = (width - 3) // 2
    return f"{text[: width - 3 - end]}...{text[-end:]}"


def _heading(title: str) -> list[str]:
    return [title, "=" * len(title)]


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent)


def _config(section: ConfigSection) -> list[str]:
    lines = table(["entry", "value", "from (other spellings)"], [_entry(entry) for entry in section.entries])
    heads = section.heads
    sizes = f"a token has {heads.query_size} numbers of queries, {heads.key_value_size} each of keys and values"
    numbers = f"{heads.query} query, {heads.key_value} key-value, {heads.group} queries to a key"
    lines += ["", *_wrapped(f"heads: {numbers}, head_dim {heads.head_dim}; {sizes}")]
    if section.sampling:
        rows = [_entry(entry) for entry in section.sampling]
        lines += ["", *table(["sampling default", "value", "from"], rows)]
    if section.unused:
        lines += ["", *_wrapped(f"entries of config.json that change nothing here: {', '.join(section.unused)}")]
    return lines


def _entry(entry: Entry) -> list[str]:
    others = f" ({', '.join(entry.other_spellings)})" if entry.other_spellings else ""
    return [entry.name, str(entry.value), f"{entry.source}{others}"]


def _support(section: SupportSection) -> list[str]:
    rows = [
        [one.what, "no" if one.value is None else "yes" if one.value is True else str(one.value), one.reason]
        for one in section.answers
    ]
    lines = table(["feature", "here", "why not"], rows)
    allowed = ", ".join(map(str, section.allowed_ranks)) or "none"
    lines += ["", *_wrapped(f"tensor_parallel_size may be {allowed}")]
    reasons: dict[str, list[str]] = {}
    for size, reason in section.tensor_parallel.items():
        if reason:
            reasons.setdefault(reason.replace(f" {size} ", " N "), []).append(str(size))
    for reason, sizes in reasons.items():
        lines += _wrapped(f"  not {', '.join(sizes)}: {reason}", indent="    ")
    return lines


def _parameters(section: ParametersSection) -> list[str]:
    files = [
        [file.name, _bytes(file.num_bytes), str(file.num_tensors) if file.readable else "damaged"]
        for file in section.files
    ]
    lines = table(["file", "size", "tensors"], files, numeric=(1, 2)) if files else []
    if section.tied is not None:
        tied = "tied: the embedding's table is the output head's" if section.tied else "not tied"
        stored = "; lm_head.weight is stored too" if section.tied and section.head_stored else ""
        lines += ["", *_wrapped(f"{counted(section.num_parameters, 'parameter', ',')}; {tied}{stored}")]
    if section.tensors:
        lines += ["", *_tensors(section.tensors)]
    if section.missing:
        lines += ["", *_wrapped(f"missing: {', '.join(by_layer(section.missing))}", indent="  ")]
    return lines


def _tensors(tensors: Sequence[TensorInfo]) -> list[str]:
    """A row a tensor; those of a layer below a heading, by the rest of their names."""
    rows = []
    layer = ""
    for tensor in sorted(tensors, key=_place):
        prefix = _layer_of(tensor.name)
        if prefix != layer and prefix:
            rows.append([f"{prefix}*", *[""] * 8])
        layer = prefix
        name = f"  {tensor.name[len(prefix) :]}" if prefix else tensor.name
        rows.append([name, tensor.dtype, "x".join(map(str, tensor.shape)), _use(tensor), *_numbers(tensor)])
    header = ["tensor", "dtype", "shape", "fills", "min", "max", "mean", "std", "zeros"]
    if all(tensor.statistics is None for tensor in tensors):
        return table(header[:4], [row[:4] for row in rows])
    return table(header, rows, numeric=(4, 5, 6, 7, 8), gap=" ")


def _place(tensor: TensorInfo) -> tuple[int, int]:
    """The embedding first, layers by their numbers, what comes after them last."""
    prefix = _layer_of(tensor.name)
    if prefix:
        return 1, int(prefix.split(".")[-2])
    return (0 if "embed" in tensor.name else 2), 0


def _layer_of(name: str) -> str:
    """``model.layers.3.`` of the name of a tensor of a layer; "" of others."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1]) + "."


def _use(tensor: TensorInfo) -> str:
    """Which parameter it fills, in short: it has the tensor's own name but where several are fused."""
    if tensor.use != FILLS or tensor.parameter is None:
        return tensor.use
    return f"{tensor.parameter.split('.')[-2]}[{tensor.shard}]" if tensor.shard else "same name"


def _numbers(tensor: TensorInfo) -> list[str]:
    found = tensor.statistics
    if found is None or found.min is None:
        return ["" if found is None else "none finite", "", "", "", ""]
    numbers = [f"{number:.3g}" for number in (found.min, found.max, found.mean, found.std) if number is not None]
    share = found.zeros / found.count
    return [*numbers, "0" if not share else f"{share:.1%}" if share >= 0.001 else "<0.1%"]


def _memory(section: MemorySection) -> list[str]:
    header = ["dtype", "weights", "KV a token", f"KV of {section.max_model_len:,} tokens"]
    rows = [
        [one.dtype, _bytes(one.weight_bytes), _bytes(one.kv_bytes_per_token), _bytes(one.kv_bytes_per_sequence)]
        for one in section.dtypes
    ]
    lines = table(header, rows, numeric=(1, 2, 3))
    if section.ranks > 1:
        lines.append(f"(of each of {section.ranks} ranks)")
    return lines if section.capacity is None else [*lines, "", *_capacity(section, section.capacity)]


def _capacity(section: MemorySection, found: Capacity) -> list[str]:
    rows = [
        ["free now", _bytes(found.free_bytes), ""],
        ["weights", _bytes(found.weight_bytes), ""],
        ["tables", _bytes(found.table_bytes), f"of {section.max_num_seqs} sequences of {section.max_model_len} tokens"],
    ]
    if found.activation_bytes:
        rows.append(["activations", _bytes(found.activation_bytes), "estimated here; the engine measures them"])
    rows.append(["left for KV", _bytes(found.kv_bytes), "the share of the rest that the engine takes at most"])
    limit = (
        f"what memory allows; {counted(found.num_full_sequences, 'sequence', ',')} of {section.max_model_len:,} tokens"
    )
    if found.limit == "need":
        limit = f"all that {section.max_num_seqs} sequences of {section.max_model_len:,} tokens can fill"
    rows.append(["KV cache", f"{counted(found.num_tokens, 'token', ',')}", limit])
    rows.append(["", "", f"{counted(found.num_blocks, 'block', ',')} of {found.block_size}"])
    return table([f"{found.device}, {found.dtype}", "size", ""], rows, numeric=(1,))


def _tokenizer(section: TokenizerSection) -> list[str]:
    def shown(number: int | None) -> str:
        return "-" if number is None else f"{number:,}"

    rows = [
        ["vocab_size of config.json", shown(section.vocab_size)],
        ["rows of the embedding", shown(section.embedding_rows)],
        ["rows of the output head", shown(section.head_rows)],
        [f"tokens of the tokenizer ({section.kind})", shown(section.num_tokens)],
        ["largest id of the tokenizer", shown(section.largest_id)],
    ]
    lines = table(["vocabulary", "size"], rows, numeric=(1,))
    ends = ", ".join(f"{end.id} ({'no token' if end.text is None else end.text})" for end in section.end_tokens)
    lines += ["", *_wrapped(f"the engine stops at: {ends or 'no token'}")]
    if section.special_tokens:
        rows = [
            [str(one.id), one.text, "yes" if one.special else "", "yes" if one.ends_text else "", ", ".join(one.roles)]
            for one in section.special_tokens
        ]
        lines += ["", *table(["id", "added token", "special", "stops", "role"], rows, numeric=(0,))]
    rows = [
        [trip.name, str(len(trip.text)), str(len(trip.token_ids)), trip.outcome, trip.difference]
        for trip in section.round_trips
    ]
    header = ["round trip", "characters", "tokens", "comes back", "difference"]
    return [*lines, "", *table(header, rows, numeric=(1, 2))]


def _chat(section: ChatSection) -> list[str]:
    if not section.has_template:
        return ["there is none"]
    lines: list[str] = []
    for rendering in section.renderings:
        lines += [f"{rendering.name} ({counted(rendering.num_tokens, 'token')}):"]
        lines += [f"  | {line}" for text in rendering.text.split("\n") for line in _shown(text)]
        lines.append("")
    if section.answer_end is not None:
        lines += _wrapped(f"an answer ends with {section.answer_end[0]} ({section.answer_end[1]})")
    return lines


def _shown(line: str) -> Iterator[str]:
    """A line of a prompt, spaces and all, in pieces that fit."""
    room = WIDTH - len("  | ")
    yield line[:room]
    for start in range(room, len(line), room):
        yield line[start : start + room]


def _bytes(number: float) -> str:
    if number < 1024:
        return f"{number} B"
    units = ["KiB", "MiB", "GiB"]
    number /= 1024
    while number >= 1024 and len(units) > 1:
        number /= 1024
        del units[0]
    return f"{number:,.1f} {units[0]}"


_RENDERERS: dict[str, Callable[[Any], list[str]]] = {
    "config": _config,
    "support": _support,
    "parameters": _parameters,
    "memory": _memory,
    "tokenizer": _tokenizer,
    "chat": _chat,
}
