"""Batch jobs: every row is answered once, whatever happens in between."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, __version__
from nanovllm import batch as batch_module
from nanovllm.batch import BatchJob, BatchSummary, run_batch
from nanovllm.batch_rows import CHAT_OPTIONS, canonical, checkpoint_fingerprint, hash_of
from nanovllm.cli import main
from nanovllm.cli.batch import failure
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.metrics import Counters
from nanovllm.engine.tokenizer import ChatOptions
from nanovllm.outputs import CompletionOutput, RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=8)
HOT = SamplingParams(temperature=3, max_tokens=8)
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO_MODEL_PATH, device="cpu", dtype="float32", max_num_seqs=16) as llm:
        yield llm


class Files:
    """The input and output of a job."""

    def __init__(self, folder: Path) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"

    def put(self, *rows: Any) -> "Files":
        """Write the input: objects as JSON, strings as they are."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        self.input.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return self

    def run(self, llm: Any, sampling_params: SamplingParams = GREEDY, **arguments: Any) -> BatchSummary:
        return run_batch(llm, self.input, self.output, sampling_params=sampling_params, use_tqdm=False, **arguments)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_bytes().splitlines()]

    def by_id(self) -> dict[Any, dict[str, Any]]:
        return {line["custom_id"]: line for line in self.lines()}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


class StubLLM:
    """Answers at once; ``outcome`` makes what the request gives back."""

    def __init__(self, outcome: Callable[[int], RequestOutput] | None = None) -> None:
        config = SimpleNamespace(
            model=DEMO_MODEL_PATH,
            tokenizer=None,
            seed=0,
            hf_overrides={},
            skip_tokenizer_init=False,
            quantization=None,
        )
        scheduler = SimpleNamespace(max_tokens_per_sequence=lambda: 1001)
        self.engine = SimpleNamespace(config=config, counters=Counters(), max_model_len=128, scheduler=scheduler)
        self.outcome = outcome or stub_output

    def get_default_sampling_params(self) -> SamplingParams:
        return GREEDY

    def get_metrics(self) -> dict[str, Any]:
        return {"dtype": "float32"}

    def generate_iter(self, prompts: Iterable[Any], **options: Any) -> Iterator[RequestOutput]:
        assert options == {"ordered": False, "on_error": "return"}
        for index, _ in enumerate(prompts):
            yield self.outcome(index)


def stub_output(index: int, finish_reason: str = "stop", error: str | None = None) -> RequestOutput:
    completion = CompletionOutput(0, "text", [1], finish_reason=finish_reason)
    return RequestOutput(str(index), "prompt", [1], [completion], True, prompt_index=index, error=error)


def chat_row(custom_id: str, question: str, **parameters: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "any", "messages": messages, **NO_THINKING, **parameters},
    }


def completion_row(custom_id: str, prompt: Any, **parameters: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "url": "/v1/completions", "body": {"prompt": prompt, **parameters}}


# ---- answers


def test_a_chat_row_is_answered_as_a_chat_completion(llm: LLM, files: Files) -> None:
    row = chat_row("sum", "add 12 and 30", max_completion_tokens=20, temperature=0, logprobs=True, top_logprobs=2)
    summary = files.put(row).run(llm)
    [line] = files.lines()
    body = line["response"]["body"]
    [choice] = body["choices"]
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("sum", None, 200)
    assert body["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": "12 + 30 = 42"}
    assert choice["finish_reason"] == "stop"
    entries = choice["logprobs"]["content"]
    assert len(entries) == body["usage"]["completion_tokens"] == summary.output_tokens
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert "".join(entry["token"] for entry in entries[:-1]) == "12 + 30 = 42"
    assert entries[0]["bytes"] == [ord("1")]
    assert (summary.num_rows, summary.num_answered, summary.num_errors, summary.num_skipped) == (1, 1, 0, 0)


def test_a_completion_row_is_answered_as_a_text_completion(llm: LLM, files: Files) -> None:
    files.put(completion_row("c", "count from", n=2, seed=3, temperature=2, max_tokens=4, logprobs=1)).run(llm)
    [expected] = llm.generate("count from", SamplingParams(n=2, seed=3, temperature=2, max_tokens=4), use_tqdm=False)
    body = files.lines()[0]["response"]["body"]
    assert body["object"] == "text_completion"
    assert [choice["text"] for choice in body["choices"]] == [completion.text for completion in expected.outputs]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert len(body["choices"][1]["logprobs"]["token_logprobs"]) == 4
    num_prompt = len(expected.prompt_token_ids)
    assert body["usage"] == {"prompt_tokens": num_prompt, "completion_tokens": 8, "total_tokens": num_prompt + 8}


def test_a_row_may_have_every_option_of_a_chat() -> None:
    assert CHAT_OPTIONS.keys() == ChatOptions.__optional_keys__


def test_plain_rows_are_answered_with_text(llm: LLM, files: Files) -> None:
    question = {"messages": [{"role": "user", "content": "add 12 and 30"}], "id": 7, **NO_THINKING, "max_tokens": 20}
    files.put({"prompt": "count from"}, {"prompt": [5, 6], "custom_id": "ids", "n": 2}, question).run(llm)
    lines = files.by_id()
    [expected] = llm.generate("count from", GREEDY, use_tqdm=False)
    assert lines["line-1"]["prompt"] == "count from"
    assert lines["line-1"]["text"] == expected["text"]
    assert lines["line-1"]["token_ids"] == expected["token_ids"]
    assert lines["ids"]["text"] == lines["ids"]["outputs"][0]["text"]
    assert len(lines["ids"]["outputs"]) == 2
    assert lines[7]["text"] == "12 + 30 = 42"
    assert [lines[row_id]["line"] for row_id in ("line-1", "ids", 7)] == [1, 2, 3]


def test_template_arguments_of_the_job_hold_where_the_row_has_none(llm: LLM, files: Files) -> None:
    thinking = {"id": "on", "messages": [{"role": "user", "content": "add 12 and 30"}], "max_tokens": 40}
    thinking["chat_template_kwargs"] = {"enable_thinking": True}
    files.put({**thinking, "id": "job", "chat_template_kwargs": None}, thinking)
    files.run(llm, chat_template_kwargs={"enable_thinking": False})
    assert files.by_id()["job"]["text"] == "12 + 30 = 42"
    assert "<think>" in files.by_id()["on"]["text"]


def test_parameters_that_change_no_answer_are_accepted(llm: LLM, files: Files) -> None:
    harmless = {"user": "me", "metadata": {"a": 1}, "stream": False, "temperature": None, "response_format": None}
    files.put(chat_row("a", "add 12 and 30"), chat_row("b", "add 12 and 30", **harmless)).run(llm)
    first, second = files.by_id()["a"], files.by_id()["b"]
    assert first["response"]["body"]["choices"] == second["response"]["body"]["choices"]


def test_metadata_stands_beside_the_answer_and_changes_nothing_else(llm: LLM, files: Files) -> None:
    """Answers come as they finish: what is theirs is found without the input."""
    gold = [{"gold": "42", "tags": [1, None], "name": "Zoë"}, "a text", 0, None]
    rows = [{"id": number, "prompt": "hello", "seed": 1, "metadata": value} for number, value in enumerate(gold)]
    files.put(*rows, {"id": 4, "prompt": "hello", "seed": 1}, chat_row("chat", "add 1 and 2", metadata={"gold": "3"}))
    files.run(llm, HOT)
    lines = files.by_id()
    assert [lines[number].get("metadata", "absent") for number in range(5)] == [*gold[:3], "absent", "absent"]
    assert lines["chat"]["metadata"] == {"gold": "3"}
    assert len({lines[number]["text"] for number in range(5)}) == 1
    files.put(*[row | {"metadata": "another"} for row in rows])
    assert files.run(llm, HOT).num_skipped == 4  # the answers would be the same


def test_error_rows_bear_their_metadata(files: Files) -> None:
    bad = {"id": "bad", "prompt": "a", "temperature": -1, "metadata": 1}
    late = {"id": "late", "prompt": "a", "metadata": [2]}
    files.put(bad, {"id": [], "prompt": "a", "metadata": 3}, late, chat_row("chat", "a", stop=[""], metadata=4))
    files.run(StubLLM(lambda index: stub_output(index, error="it failed")))
    assert {line["line"]: line["metadata"] for line in files.lines()} == {1: 1, 2: 3, 3: [2], 4: 4}
    assert all(line["error"] for line in files.lines())


def test_null_asks_for_as_many_tokens_as_fit(llm: LLM, files: Files) -> None:
    files.put(chat_row("a", "count from 1 to 7", max_tokens=None)).run(llm)
    [choice] = files.lines()[0]["response"]["body"]["choices"]
    assert choice["message"]["content"] == "1, 2, 3, 4, 5, 6, 7"


# ---- rows that cannot be run


BAD_ROWS = [
    ("{not json", "not JSON"),
    ("[" * 100_000, "nested too deeply"),
    ("[1, 2]", "must be an object"),
    ('{"prompt": "\\ud800"}', "Unicode"),
    ({"text": "a", "id": "t"}, "no prompt, only 'text'; it needs messages or prompt"),
    ({}, "no prompt; it needs messages or prompt"),
    ({"prompt": "a", "gold": 1}, "no argument 'gold'; a column of your own goes into 'metadata', and comes back"),
    ({"prompt": "a", "messages": []}, "messages and prompt"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": 5}, "the prompt is an int"),
    ({"prompt": [10**6]}, "token id 1000000"),
    ({"prompt": list(range(1000)) * 5}, "5000 tokens"),
    ({"prompt": "a", "temprature": 1}, "'temprature'; did you mean 'temperature'?"),
    ({"prompt": "a", "temperature": -1}, "temperature is -1"),
    ({"prompt": "a", "logits_processors": []}, "'logits_processors'"),
    ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens is 9"),
    ({"prompt": "a", "max_tokens": 9, "max_completion_tokens": 8}, "give one of them"),
    ({"prompt": "a", "stream": True}, "stream is True"),
    ({"prompt": "a", "tools": []}, "tools is for messages"),
    ({"prompt": "a", "id": [1]}, "id is [1]"),
    ({"messages": []}, "messages is []"),
    ({"messages": [{"content": "a"}]}, "no 'role'"),
    ({"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": "yes"}, "add_generation_prompt"),
    (chat_row("x", "a", stop=[""]), "stop[0] is empty"),
    (chat_row("x", "a", logprobs=3), "true or false"),
    (chat_row("x", "a", top_logprobs=3), "logprobs: true"),
    (chat_row("x", "a", chat_template_kwarg={}), "did you mean 'chat_template_kwargs'?"),
    (chat_row("x", "a", enable_thinking=False), "it goes into chat_template_kwargs"),
    (chat_row("x", "a") | {"url": "/v1/embeddings"}, "url is '/v1/embeddings'"),
    (chat_row("x", "a") | {"method": "GET"}, "method is 'GET'"),
    (chat_row("x", "a") | {"body": None}, "body is None"),
    (chat_row("x", "a") | {"bodi": 1}, "did you mean 'body'?"),
    (chat_row("x", "a") | {"url": "/v1/completions"}, "it needs prompt"),
    (
        chat_row("x", "a") | {"metadata": {}},
        "no argument 'metadata'; a column of your own goes into the body's 'metadata'",
    ),
]


def test_bad_rows_become_error_rows_and_stop_nothing(llm: LLM, files: Files) -> None:
    rows: list[Any] = [
        {**row, "custom_id": f"bad {i}"} if "custom_id" in row else row for i, (row, _) in enumerate(BAD_ROWS)
    ]
    summary = files.put({"prompt": "a", "id": "good"}, *rows, {"prompt": "b", "id": "good too"}).run(llm)
    by_line = {line["line"]: line for line in files.lines()}
    for number, (_, part) in enumerate(BAD_ROWS, 2):
        assert part in by_line[number]["error"]["message"]
        assert by_line[number]["error"]["type"] == "invalid_request_error"
        assert not by_line[number].get("response")
    assert (summary.num_answered, summary.num_errors) == (2, len(BAD_ROWS))
    assert all(line["error"] is None for line in files.lines() if str(line["custom_id"]).startswith("good"))
    assert files.run(llm).num_skipped == summary.num_rows  # errors are done, too


def test_a_request_that_fails_or_is_aborted_becomes_an_error_row(files: Files) -> None:
    outcomes = [stub_output(0, "error", "it broke"), stub_output(1, "abort"), stub_output(2)]
    summary = files.put(*[{"prompt": "a"}] * 3).run(StubLLM(lambda index: outcomes[index]))
    assert [line["error"] and line["error"]["message"] for line in files.lines()] == [
        "it broke",
        "the request was aborted",
        None,
    ]
    assert files.lines()[0]["error"]["type"] == "server_error"
    assert (summary.num_answered, summary.num_errors) == (1, 2)


def test_error_rows_are_run_again_when_asked(llm: LLM, files: Files) -> None:
    broken = StubLLM(lambda index: stub_output(index, "error", "it broke"))
    files.put({"prompt": "a", "id": 1}, {"prompt": "b", "id": 2}, "{").run(broken)
    assert files.run(StubLLM()).num_skipped == 3
    summary = files.run(StubLLM(), retry_errors=True)
    assert (summary.num_skipped, summary.num_answered, summary.num_errors) == (0, 2, 1)
    assert [line["error"] is None for line in files.lines()].count(True) == 2
    assert files.by_id()[1]["error"] is None  # the last line counts
    summary = files.run(StubLLM(), retry_errors=True)
    assert (summary.num_skipped, summary.num_answered, summary.num_errors) == (2, 0, 1)


def test_blank_lines_and_a_byte_order_mark_are_no_rows(files: Files) -> None:
    files.input.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b"}')
    assert files.run(StubLLM()).num_rows == 2
    assert [line["line"] for line in files.lines()] == [1, 4]
    assert all(line["error"] is None for line in files.lines())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_an_input_in_another_encoding_is_refused_as_a_whole(files: Files, encoding: str) -> None:
    """What some shells write when output is redirected: rows would become errors one by one."""
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    files.input.write_bytes((mark + '{"prompt": "a"}\n{"prompt": "b"}\n').encode(encoding))
    with pytest.raises(ValueError, match=r"in\.jsonl is in UTF-16 or UTF-32; save it as UTF-8"):
        files.run(StubLLM())
    assert not files.output.exists()


NOT_JSONL = [
    ("in.csv", 'id,prompt\n7,"add 1, and 2"\n', [("add 1, and 2", {"id": "7"})]),
    ("in.tsv", "prompt\tgold\nadd 1 and 2\t3\n", [("add 1 and 2", {"gold": "3"})]),
    ("in.txt", "add 1 and 2\r\n\r\nsag Übung\n", [("add 1 and 2", None), ("sag Übung", None)]),
    ("in.jsonl", "add 1 and 2\n3\n", [("add 1 and 2", None), ("3", None)]),
    ("in.json", '[\n{"prompt": "a"},\n{"prompt": "b"}\n]\n', [("a", None), ("b", None)]),
    ("in.json", '[{"prompt": "a"}]', [("a", None)]),
]


@pytest.mark.parametrize(("name", "content", "asked"), NOT_JSONL)
def test_a_file_that_is_not_jsonl_is_refused_with_what_makes_it_so(
    tmp_path: Path, name: str, content: str, asked: list[tuple[str, Any]]
) -> None:
    source, output = tmp_path / name, tmp_path / "out.jsonl"
    source.write_bytes(content.encode())
    with pytest.raises(ValueError, match="is not JSONL; a row is an object on a line of its own") as refused:
        BatchJob(source, output)
    assert not output.exists()
    program, path, target = re.search(r'python -c "(.*)" "(.*)" > "(.*)"$', str(refused.value)).groups()  # type: ignore[union-attr]
    assert path == str(source)
    assert target != path
    made = subprocess.run([sys.executable, "-c", program, path], capture_output=True, check=True).stdout
    Path(target).write_bytes(made)
    with BatchJob(target, output) as job:
        assert job.num_rows == len(asked)
    rows = [json.loads(line) for line in made.splitlines()]
    found = [row.get("prompt") or row["messages"][0]["content"] for row in rows]
    assert list(zip(found, [row.get("metadata") for row in rows], strict=True)) == asked


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{\n "prompt": "a",\n "messages":\n{"role": "user"}\n}\n', "its objects are spread over several lines"),
        (b"\x1f\x8b\x08\0\0\n", "binary, or compressed"),
        (b"\xfdabc\n", "binary, or compressed"),
    ],
)
def test_a_file_without_rows_is_refused(files: Files, content: bytes, part: str) -> None:
    files.input.write_bytes(content)
    with pytest.raises(ValueError, match=f"is not JSONL.*{part}"):
        files.run(StubLLM())
    assert not files.output.exists()


@pytest.mark.parametrize("change", ["fewer", "more"])
def test_an_input_that_changes_while_it_is_read_is_told(files: Files, change: str) -> None:
    files.put({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    with BatchJob(files.input, files.output) as job:
        files.put(*[{"prompt": "a"}] * {"fewer": 2, "more": 4}[change])
        with pytest.raises(ValueError, match=r"in\.jsonl has changed while the job ran: it had 3 rows, and has [24];"):
            job.run(StubLLM())  # type: ignore[arg-type]
    files.put({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}).run(StubLLM())
    assert files.run(StubLLM()).num_skipped == 3


@posix
def test_an_output_that_is_deleted_while_it_is_written_is_told(files: Files) -> None:
    def deleting(index: int) -> RequestOutput:
        files.output.unlink(missing_ok=True)
        return stub_output(index)

    files.put({"prompt": "a"})
    with pytest.raises(FileNotFoundError, match=r"out\.jsonl was deleted while the job ran"):
        files.run(StubLLM(deleting))
    assert files.run(StubLLM()).num_answered == 1


def test_zeros_that_a_power_failure_leaves_are_no_lines(files: Files) -> None:
    files.put(*[{"prompt": "a"}] * 3).run(StubLLM())
    whole = files.output.read_bytes()
    first = whole.index(b"\n") + 1
    for kept in (first, first + 4, first + 40, first + len(b'{"hash": "')):
        files.output.write_bytes(whole[:kept] + b"\0" * 300)
        assert files.run(StubLLM()).num_skipped == 1
        assert files.output.read_bytes() == whole


def test_an_empty_input_is_a_job_without_rows(files: Files) -> None:
    assert files.put().run(StubLLM()).num_rows == 0
    assert files.output.read_bytes() == b""


@pytest.mark.parametrize("name", ["id", "custom_id"])
def test_an_id_on_two_lines_is_refused_before_anything_runs(files: Files, name: str) -> None:
    files.put({"prompt": "a", name: "x"}, {"prompt": "b", name: "y"}, {"prompt": "c", name: "x"})
    with pytest.raises(ValueError, match=r"lines 1 and 3 of .*in\.jsonl have the same id"):
        files.run(StubLLM())
    assert not files.output.exists()


def test_ids_may_be_numbers_that_are_line_numbers_too(files: Files) -> None:
    files.put({"prompt": "a", "id": 2}, {"prompt": "b"}, {"prompt": "c", "id": "2"}, "{", {"prompt": "d", "id": 4})
    assert files.run(StubLLM()).num_rows == 5
    assert [line["custom_id"] for line in files.lines()] == [2, "line-2", "2", "line-4", 4]


# ---- continuing


def mixed_rows(number: int) -> list[Any]:
    """Rows of every kind, most of them sampled."""
    makers: list[Callable[[int], Any]] = [
        lambda i: chat_row(f"chat {i}", f"add {i} and {2 * i}", temperature=0),
        lambda i: chat_row(f"hot {i}", f"count from {i} to {i + 9}", temperature=2.0, top_p=0.95),
        lambda i: completion_row(f"seeded {i}", "say stone", temperature=2.0, seed=i),
        lambda i: {"prompt": [1 + i, 2, 3], "temperature": 1.5, "n": 1 + i % 3},
        lambda i: {"prompt": "the same prompt again", "id": i, "temperature": 3.0, "min_p": 0.001},
        lambda i: {"prompt": "penalties", "id": f"p {i}", "frequency_penalty": 1.0, "top_k": 50},
        lambda i: '{"prompt": "torn' if i % 2 else {"prompt": "a", "id": f"bad {i}", "max_tokens": 0},
        lambda i: {"prompt": "é世界 " * (1 + i % 4), "temperature": 1.0, "stop": ["\n"], "ignore_eos": True},
    ]
    return [makers[i % len(makers)](i) for i in range(number)]


def answers(files: Files) -> dict[tuple[str, int], Any]:
    """What counts of each row, by its hash and line; fails if a row was written twice."""
    found: dict[tuple[str, int], Any] = {}
    for line in files.lines():
        body = (line.get("response") or {}).get("body")
        said = [(c.get("text"), c.get("message"), c["finish_reason"]) for c in body["choices"]] if body else None
        key = (line["hash"], line["line"])
        assert key not in found, f"line {line['line']} was answered twice"
        found[key] = (line["custom_id"], line["error"], line.get("text"), line.get("outputs"), said)
    return found


def test_a_finished_job_is_left_as_it_is(llm: LLM, files: Files) -> None:
    files.put(*mixed_rows(16)).run(llm)
    before = files.output.read_bytes()
    summary = files.run(llm)
    assert files.output.read_bytes() == before
    assert (summary.num_skipped, summary.num_answered, summary.num_errors) == (16, 0, 0)


def test_what_was_cut_off_anywhere_is_completed(llm: LLM, files: Files) -> None:
    files.put(*mixed_rows(16)).run(llm)
    expected, whole = answers(files), files.output.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1  # where the last line begins
    for end in (0, 1, 5, last // 2, last - 1, last, last + 1, last + 5, len(whole) - 2, len(whole) - 1):
        files.output.write_bytes(whole[:end])
        kept = len(whole[:end].splitlines()) if end in (last - 1, len(whole) - 1) else whole[:end].count(b"\n")
        assert files.run(llm).num_skipped == kept, end  # a line that only lacks its end is whole
        assert answers(files) == expected
        assert files.output.read_bytes().startswith(whole[: whole.rfind(b"\n", 0, end) + 1])


@pytest.mark.parametrize(
    "content", ["hello\n", "hello", '{"hash": "00"}\n', '{"a": 1}\n', "[]\n", '{"hash": 5}\n', "\0\0"]
)
def test_a_file_of_somebody_else_is_not_touched(files: Files, content: str) -> None:
    files.put({"prompt": "a"}).output.write_text(content)
    with pytest.raises(ValueError, match=r"line 1 of .*out\.jsonl was not written by a batch job"):
        files.run(StubLLM())
    assert files.output.read_text() == content


def test_a_line_torn_in_the_middle_of_the_file_is_an_error(files: Files) -> None:
    files.put(*[{"prompt": "a"}] * 3).run(StubLLM())
    lines = files.output.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:40] + b"\n"
    files.output.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match="line 2 of"):
        files.run(StubLLM())
    assert files.output.read_bytes() == b"".join(lines)


def test_an_output_that_is_no_file_is_refused(files: Files) -> None:
    """A device may be read without end."""
    files.put({"prompt": "a"})
    for output in (os.devnull, files.input.parent):
        with pytest.raises(ValueError, match="is not a file"):
            run_batch(StubLLM(), files.input, output)  # type: ignore[arg-type]


def test_pipes_are_refused(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.put({"prompt": "a"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"output is '-': .* needs a file"):
        run_batch(StubLLM(), files.input, "-")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not a file; a job reads its rows more than once"):
        run_batch(StubLLM(), os.devnull, files.output)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"there is no file - \(a pipe cannot be read more than once\)"):
        run_batch(StubLLM(), "-", files.output)  # type: ignore[arg-type]
    assert run_batch(StubLLM(), files.input, "./-").num_answered == 1  # type: ignore[arg-type]


def test_input_and_output_are_two_files(files: Files) -> None:
    files.put({"prompt": "a"})
    with pytest.raises(ValueError, match="both input and output"):
        run_batch(StubLLM(), files.input, files.input)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        run_batch(StubLLM(), files.input.parent / "no.jsonl", files.output)  # type: ignore[arg-type]
    assert not files.output.exists()


def test_a_changed_row_is_run_again_and_its_last_line_counts(files: Files) -> None:
    rows = [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 2}]
    files.put(*rows).run(StubLLM())
    assert files.put(rows[0], {"prompt": "c", "id": 2}).run(StubLLM()).num_answered == 1
    assert files.by_id()[2]["prompt"] == "c"
    assert files.put(*rows).run(StubLLM()).num_answered == 1  # back again: its first answer is not the last any more
    assert files.by_id()[2]["prompt"] == "b"
    assert len(files.lines()) == 4
    # Neither place nor what changes no answer makes a row another one.
    moved = [{"id": 2, "user": "me", "prompt": "b"}, rows[0]]
    assert files.put(*moved).run(StubLLM()).num_skipped == 2


def test_other_parameters_or_another_seed_or_model_run_all_rows_again(files: Files, tmp_path: Path) -> None:
    files.put({"prompt": "a"}).run(StubLLM(), GREEDY)
    assert files.run(StubLLM(), HOT).num_answered == 1
    other = StubLLM()
    other.engine.config.seed = 1
    assert files.run(other, HOT).num_answered == 1
    other.engine.config.model = shutil.copytree(DEMO_MODEL_PATH, tmp_path / "copy")
    assert files.run(other, HOT).num_skipped == 1
    (tmp_path / "copy" / "generation_config.json").write_text("{}")
    assert files.run(other, HOT).num_answered == 1
    assert len({line["hash"] for line in files.lines()}) == 4


def test_int8_weights_run_all_rows_again_and_no_others(files: Files) -> None:
    files.put({"prompt": "a"}).run(StubLLM())
    # As it was before quantization counted: a job begun then goes on.
    fingerprint = checkpoint_fingerprint(DEMO_MODEL_PATH)
    asked = [None, "prompt", "a", {}, canonical(GREEDY)]
    assert files.lines()[0]["hash"] == hash_of("line-1", asked, [[fingerprint], "float32", 0, {}, False])
    other = StubLLM()
    other.engine.config.quantization = "int8"
    assert files.run(other).num_answered == 1
    assert files.run(other).num_skipped == 1


def test_what_the_room_cut_off_is_run_again_in_more_room(files: Files) -> None:
    def answers(index: int) -> RequestOutput:
        """Cut off at 2 of 128 tokens, at 64 of its own, at its end, and one of two completions at 3."""
        ends = [[(1, "length")], [(64, "length")], [(1, "stop")], [(2, "length"), (1, "stop")]][index % 4]
        completions = [CompletionOutput(i, "", [1] * size, finish_reason=how) for i, (size, how) in enumerate(ends)]
        return RequestOutput(str(index), "prompt", [1], completions, True, prompt_index=index)

    def llm(room: int, blocks: int = 1000) -> StubLLM:
        made = StubLLM(answers)
        made.engine.max_model_len, made.engine.scheduler.max_tokens_per_sequence = room, lambda: blocks
        return made

    urls = {"url": "/v1/completions"}
    rows = [{"custom_id": str(i), **urls, "body": {"prompt": "a", "max_tokens": 64}} for i in range(3)]
    files.put(*rows, {"custom_id": "3", "prompt": "a", "n": 2, "temperature": 1, "max_tokens": None})
    assert files.run(llm(3)).num_answered == 4
    assert [line.get("cut_off_at") for line in files.lines()] == [2, None, None, 3]
    assert files.run(llm(2)).num_skipped == 4  # in less room nothing comes back better
    assert files.run(llm(100, blocks=2)).num_skipped == 4  # nor where the cache has no more
    files.output.write_text("".join(json.dumps(line) + "\n" for line in files.lines()))
    summary = files.run(llm(4))
    assert (summary.num_answered, summary.num_skipped) == (2, 2)
    hashes = [line["hash"] for line in files.lines()]
    assert hashes[4:] == [hashes[0], hashes[3]]  # and so the same seed


def test_an_answer_goes_on_from_where_max_model_len_cut_it_off(files: Files) -> None:
    files.put({"id": "count", "prompt": "count from 1 to 30:", "max_tokens": None, "ignore_eos": True})
    texts = []
    for room in (24, 24, 48):
        with LLM(DEMO_MODEL_PATH, device="cpu", max_model_len=room, max_num_seqs=2, dtype="float32") as llm:
            texts.append((files.run(llm, HOT).num_answered, files.by_id()["count"]["text"]))
            assert files.by_id()["count"]["cut_off_at"] == room
    assert [answered for answered, _ in texts] == [1, 0, 1]
    assert texts[2][1].startswith(texts[0][1])
    assert len(texts[2][1]) > len(texts[0][1])


def test_a_prompt_that_was_truncated_to_max_model_len_is_run_again_in_more_room(files: Files) -> None:
    row = {"prompt": "count from 1 to 30:", "max_tokens": 1}
    files.put({**row, "id": "fits", "truncate_prompt_tokens": -1}, {**row, "id": "three", "truncate_prompt_tokens": 3})
    with LLM(DEMO_MODEL_PATH, device="cpu", max_num_seqs=2, dtype="float32") as llm:
        files.run(llm, GREEDY)
        want = files.by_id()["fits"]["usage"]["prompt_tokens"]
    files.output.unlink()
    rooms, answered = (want - 2, want - 2, want - 1, want - 3, want + 2, want + 9), []
    for room in rooms:
        with LLM(DEMO_MODEL_PATH, device="cpu", max_model_len=room, max_num_seqs=2, dtype="float32") as llm:
            answered.append(files.run(llm, GREEDY).num_answered)
    assert answered == [2, 0, 1, 0, 1, 0]
    lines = [line for line in files.lines() if line["custom_id"] == "fits"]
    assert [line.get("cut_off_at") for line in lines] == [want - 2, want - 1, None]
    assert lines[-1]["usage"]["prompt_tokens"] == want


def test_the_fingerprint_follows_the_content_of_a_checkpoint(tmp_path: Path) -> None:
    copy = shutil.copytree(DEMO_MODEL_PATH, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    original = checkpoint_fingerprint(DEMO_MODEL_PATH)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    (copy / "README.md").write_text("hello")
    assert checkpoint_fingerprint(copy) == original
    weights = bytearray((copy / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(weights[:8], "little")
    weights[header] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    changed = checkpoint_fingerprint(copy)
    assert changed != original
    (copy / "tokenizer.json").write_text("{}")
    assert checkpoint_fingerprint(copy) not in (changed, original)


def test_rows_without_a_seed_have_one_of_their_own(llm: LLM, files: Files) -> None:
    rows = [{"prompt": "say stone", "id": i} for i in range(12)]
    files.put(*rows).run(llm, HOT)
    texts = {line["custom_id"]: line["text"] for line in files.lines()}
    assert len(set(texts.values())) > 6  # the same prompt is sampled anew
    files.output.unlink()
    files.put(*reversed(rows[3:])).run(llm, HOT)
    assert {line["custom_id"]: line["text"] for line in files.lines()} == {i: texts[i] for i in range(3, 12)}
    files.output.unlink()
    files.put({**rows[0], "seed": 5}, {**rows[1], "seed": 5}).run(llm, HOT)
    assert files.by_id()[0]["text"] == files.by_id()[1]["text"]


# ---- writing


def test_a_line_is_written_before_the_next_row_is_looked_at(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(batch_module.os, "fsync", synced.append)

    def look(index: int) -> RequestOutput:
        assert len(files.lines()) == index
        return stub_output(index)

    files.put(*[{"prompt": "a"}] * 50).run(StubLLM(look))
    assert len(files.lines()) == 50
    assert 1 <= len(synced) <= 5  # of a short job; not one a line


def test_an_interrupt_keeps_the_finished_rows(files: Files) -> None:
    def interrupt(index: int) -> RequestOutput:
        if index == 3:
            raise KeyboardInterrupt
        return stub_output(index)

    with pytest.raises(KeyboardInterrupt):
        files.put(*[{"prompt": "a"}] * 5).run(StubLLM(interrupt))
    assert len(files.lines()) == 3
    summary = files.run(StubLLM())
    assert (summary.num_skipped, summary.num_answered) == (3, 2)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit for the size of files")
def test_a_full_disk_keeps_the_finished_rows_and_says_how_to_continue(files: Files) -> None:
    """A limit for the size of files stands for it: writing ends in the middle of a line, or before it."""
    files.put(*[{"prompt": "a", "id": number} for number in range(40)])
    code = (
        "import resource, signal, sys; from nanovllm.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY)); sys.exit(main(sys.argv[1:]))"
    )
    for _ in range(2):
        arguments = ["batch", str(files.input), str(files.output), "--max-tokens", "2"]
        ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
        assert ended.returncode == 2
        [line] = ended.stderr.splitlines()
        assert line.startswith(f"nanovllm: error: {files.output}: File too large (rows that were finished are there;")
        assert files.output.stat().st_size == 3000
    whole = files.output.read_bytes().count(b"\n")
    assert 0 < whole < 40
    assert main(["batch", str(files.input), str(files.output), "--max-tokens", "2"]) == 0
    assert sorted(line["custom_id"] for line in files.lines()) == list(range(40))


def test_two_jobs_cannot_write_one_file(files: Files) -> None:
    files.put({"prompt": "a"})
    with BatchJob(files.input, files.output):
        with pytest.raises(BlockingIOError, match=r"out\.jsonl is being written by another batch job"):
            BatchJob(files.input, files.output)
        other = f"from nanovllm.batch import BatchJob; BatchJob({str(files.input)!r}, {str(files.output)!r})"
        done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, timeout=120)
        assert "is being written by another batch job" in done.stderr
    assert files.run(StubLLM()).num_answered == 1


def test_memory_does_not_grow_with_the_input(files: Files) -> None:
    num_rows, width = 3000, 10_000
    with files.input.open("w") as file:
        for i in range(num_rows):
            file.write(json.dumps({"prompt": f"{i} " + "x" * width}) + "\n")
    taken = 0

    class Lazy(StubLLM):
        def generate_iter(self, prompts: Iterable[Any], **options: Any) -> Iterator[RequestOutput]:
            nonlocal taken
            for index, _ in enumerate(prompts):
                taken += 1
                assert taken <= len(files_done) + 1
                files_done.append(index)
                yield stub_output(index)

    files_done: list[int] = []
    for _ in range(2):  # anew, and with all rows done
        tracemalloc.start()
        summary = files.run(Lazy())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert summary.num_rows == num_rows
        assert peak < 2_000_000, f"{peak} bytes for an input of {num_rows * width}"
    assert taken == num_rows


def test_hashes_that_end_in_zeros_are_found(files: Files) -> None:
    hashes = ["00" * 16, "ab" * 15 + "00", "ab" * 14 + "0000"]
    rows = [{"hash": digest, "line": 1, "custom_id": i, "error": None} for i, digest in enumerate(hashes)]
    files.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with BatchJob(files.put().input, files.output) as job:
        assert all(job.output.is_done(digest, 1) for digest in hashes)
        assert not any(job.output.is_done(digest, 1) for digest in ("ab" * 16, "00" * 15 + "01", "ff" * 16))


def test_arguments_are_checked_before_any_row(files: Files) -> None:
    files.put({"prompt": "a"})
    with pytest.raises(TypeError, match="sampling_params is a dict"):
        files.run(StubLLM(), {"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="chat_template_kwargs is 5"):
        files.run(StubLLM(), chat_template_kwargs=5)
    assert files.output.read_bytes() == b""
    with BatchJob(files.input, files.output) as job:
        job.run(StubLLM(), use_tqdm=False)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="make a new one"):
            job.run(StubLLM(), use_tqdm=False)  # type: ignore[arg-type]


# ---- the command


def test_the_progress_bar_counts_rows(llm: LLM, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.put(*mixed_rows(8))
    run_batch(llm, files.input, files.output, sampling_params=GREEDY)
    assert "8/8" in capsys.readouterr().err
    run_batch(llm, files.input, files.output, sampling_params=GREEDY)
    assert "8/8" in capsys.readouterr().err


def test_the_command_runs_a_job(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.put({"messages": [{"role": "user", "content": "add 12 and 30"}]}, "{")
    argv = ["batch", str(files.input), str(files.output), "--device", "cpu", "--temperature", "0", "--max-tokens", "20"]
    argv += ["--chat-template-kwargs", '{"enable_thinking": false}', "--no-progress"]
    assert main(argv) == 1
    assert files.by_id()["line-1"]["text"] == "12 + 30 = 42"
    told = capsys.readouterr().err.splitlines()
    assert "2 rows: 1 answered, 1 error, 0 done before" in told[-2]
    failed = f"1 row failed: line-2; {files.output} says why (--retry-errors runs them again)"
    assert told[-1].startswith(f"{failed}; the first: line 2: ")
    assert main(argv) == 1
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "2 rows: 0 answered, 0 errors, 2 done before (1 error); 0 prompt + 0 output tokens in 0.0 s (0 output tok/s)",
        failed,
    ]
    assert main([*argv, "--retry-errors"]) == 1
    assert "2 rows: 0 answered, 1 error, 1 done before" in capsys.readouterr().err
    files.put({"messages": [{"role": "user", "content": "add 12 and 30"}]})
    assert main(argv) == 0
    assert "failed" not in capsys.readouterr().err


def test_the_command_draws_a_bar_on_a_terminal_only(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files.put({"prompt": "a"})
    argv = ["batch", str(files.input), "--device", "cpu", "--max-tokens", "2"]
    assert main([*argv, str(files.output)]) == 0
    told = capsys.readouterr().err
    assert "Generating" not in told
    assert "1 row: 1 answered, 0 errors" in told
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*argv, f"{files.output}.2"]) == 0
    assert "Generating" in capsys.readouterr().err


def test_error_rows_of_earlier_runs_are_counted_and_the_first_are_named(files: Files) -> None:
    files.put(*[{"prompt": "a", "temperature": -1, "id": f"bad-{number}"} for number in range(12)], {"prompt": "a"})
    first = run_batch(StubLLM(), files.input, files.output, use_tqdm=False)  # type: ignore[arg-type]
    assert (first.num_errors, first.num_skipped_errors, first.skipped_error_ids) == (12, 0, ())
    assert first.error_ids == tuple(f"bad-{number}" for number in range(10))
    assert ", bad-9, ...; answers says why" in failure(first, 12, "answers")
    both = dataclasses.replace(first, num_skipped_errors=1, skipped_error_ids=("older",))
    assert ", bad-9, ...; answers says why" in failure(both, 13, "answers")
    again = run_batch(StubLLM(), files.input, files.output, use_tqdm=False)  # type: ignore[arg-type]
    assert (again.num_errors, again.num_skipped, again.num_skipped_errors) == (0, 13, 12)
    assert again.skipped_error_ids == tuple(f"bad-{number}" for number in range(10))
    retried = run_batch(StubLLM(), files.input, files.output, retry_errors=True, use_tqdm=False)  # type: ignore[arg-type]
    assert (retried.num_errors, retried.num_skipped, retried.num_skipped_errors) == (12, 1, 0)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--dtype", "int4"], "dtype is 'int4'"),
    ],
)
def test_mistakes_get_one_line(files: Files, capsys: pytest.CaptureFixture[str], options: list[str], part: str) -> None:
    files.put({"prompt": "a"})
    assert main(["batch", str(files.input), str(files.output), *options]) == 2
    line = capsys.readouterr().err
    assert line.startswith("nanovllm: error: ")
    assert part in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "COMMAND"),
        (["bach"], "'bach'"),
        (["batch", "in"], "OUTPUT.jsonl"),
        (
            ["--model", "x", "generate", "hi"],
            "--model stands before the command; its options follow it: nanovllm generate",
        ),
        (["--model=x", "generate", "hi"], "its options follow it: nanovllm generate --model ..."),
        (["--device", "cpu"], "its options follow it: nanovllm COMMAND --device ..."),
        (["batch", "in", "out", "--max-tokens", "many"], "'many'"),
        (["batch", "in", "out", "--chat-template-kwargs", "[]"], "not a JSON object"),
        (["batch", "in", "out", "--temprature", "1"], "1; did you mean --temperature? (see nanovllm batch"),
        (["generate", "--prompt", "hi"], "--prompt; PROMPT: given without an option, as in nanovllm generate PROMPT"),
        (["batch", "--input", "in", "--output", "out"], "as in nanovllm batch INPUT.jsonl OUTPUT.jsonl"),
        (["chat", "somewhere"], "arguments: somewhere; a checkpoint is named with --model, and one question"),
        (["batch", "in", "out", "--device", "cuda:x"], "device is 'cuda:x'; use auto, cuda, cuda:N, mps or cpu"),
        (["bench", "--device", "gpu"], "device is 'gpu'; use auto, cuda, cuda:N, mps or cpu"),
    ],
)
def test_arguments_that_cannot_be_parsed_get_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], part: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(argv)
    assert refused.value.code == 2
    line = capsys.readouterr().err
    assert part in line
    assert line.count("\n") == 1


def test_the_package_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "nanovllm", "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"nanovllm {__version__}\n"


def start(files: Files) -> "subprocess.Popen[str]":
    argv = ["batch", str(files.input), str(files.output), "--device", "cpu", "--dtype", "float32", "--max-tokens", "8"]
    command = [sys.executable, "-m", "nanovllm", *argv, "--max-num-seqs", "4", "--no-progress"]
    # One thread: several wait for each other where other work has the processor.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_lines(process: "subprocess.Popen[str]", files: Files, number: int) -> None:
    """Until the output has so many lines, or the process has ended."""
    while process.poll() is None:
        if files.output.exists() and files.output.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.002)


@posix
def test_ctrl_c_says_how_to_continue(files: Files) -> None:
    files.put(*[{"prompt": "say stone", "id": i} for i in range(2000)])
    process = start(files)
    wait_for_lines(process, files, 3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command continues" in said
    assert "Traceback" not in said
    assert 3 <= len(files.lines()) < 2000


@posix
@pytest.mark.slow
def test_a_job_killed_twenty_times_answers_every_row_once(llm: LLM, files: Files, tmp_path: Path) -> None:
    number, draw = 320, random.Random(0)
    (tmp_path / "whole").mkdir()
    whole = Files(tmp_path / "whole").put(*mixed_rows(number))
    whole.run(llm, dataclasses.replace(llm.get_default_sampling_params(), max_tokens=8))
    files.put(*mixed_rows(number))
    written = b""
    for kill in range(20):
        process = start(files)
        if kill % 7 == 3:  # while it starts
            time.sleep(draw.uniform(0, 1))
        else:  # while it runs, and writes
            wait_for_lines(process, files, written.count(b"\n") + draw.randint(1, 6))
            time.sleep(draw.choice([0, draw.uniform(0, 0.03)]))
        process.kill()
        process.communicate(timeout=60)
        now = files.output.read_bytes() if files.output.exists() else b""
        assert now.startswith(written[: written.rfind(b"\n") + 1])  # what was finished stays
        written = now
    assert 0 < written.count(b"\n") < number, "the job ended before it had been killed often enough"
    process = start(files)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said  # there are bad rows among them
    assert "40 rows failed: " in said
    assert answers(files) == answers(whole)
    assert len(answers(files)) == number


def test_what_was_cut_off_and_the_first_error_are_told(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.put({"prompt": "a", "max_tokens": 2, "ignore_eos": True}, {"prompt": ""}, {"prompt": 5})
    assert main(["batch", str(files.input), str(files.output), "--device", "cpu", "--no-progress"]) == 1
    said = capsys.readouterr().err
    assert "without --model, the demo checkpoint has answered" in said
    assert "1 answer was cut off (--max-tokens, up to --max-model-len, allows more)" in said
    assert "; the first: line " in said
    assert "2 rows failed: line-2, line-3; " in said
